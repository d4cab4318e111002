"""``roberta-fast predict``: what a fine-tuned model says of new data."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from roberta_fast.options import PRECISIONS
from roberta_fast.training.arguments import require_extra
from roberta_fast.training.cli import report_errors

# The form of what comes by standard input, where it is not a text a line.
_FROM_STDIN = {"ner": ".conll", "qa": ".jsonl"}


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the predictions written, 1 with a reason in one line."""
    description = "Predicts new data by a model of roberta-fast finetune."
    parser = argparse.ArgumentParser(prog="roberta-fast predict", description=description, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="the --output_dir of roberta-fast finetune")
    parser.add_argument(
        "--file", required=True, help="the data, in a format of the training data; labels are not needed. -: standard input"
    )
    parser.add_argument("--output", help="where the predictions go, a json object a line (default: standard output)")
    parser.add_argument("--batch_size", type=int, default=32, help="texts in a batch (32)")
    parser.add_argument("--precision", choices=PRECISIONS[1:], help="8-bit weights in the layers: int8 on CPU, fp8 on a GPU")
    parser.add_argument("--n_best_size", type=int, help="answers a question, the best one first (qa; as the model was trained)")
    parser.add_argument("--no-fast", "--no_fast", action="store_true", help="on the stock encoder")
    given = parser.parse_args(argv)
    if given.output and Path(given.output).is_dir():
        parser.error(f"--output {given.output} is a folder")
    require_extra()
    return report_errors("predict", lambda: _run(given))


def _run(given):
    from transformers.utils import logging

    from roberta_fast.training import report
    from roberta_fast.training.api import predict, task_of

    logging.disable_progress_bar()
    chosen = {name: value for name in ("precision", "n_best_size") if (value := getattr(given, name)) is not None}
    settings = {"fast": not given.no_fast, "per_device_eval_batch_size": given.batch_size, "disable_tqdm": True, **chosen}
    if given.file == "-":
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"stdin{_FROM_STDIN.get(task_of(given.model), '.txt')}"
            file.write_bytes(sys.stdin.buffer.read())
            rows = predict(given.model, file, **settings)
    else:
        rows = predict(given.model, given.file, **settings)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if given.output:
        report.write_text(Path(given.output), text)
    else:
        sys.stdout.write(text)
