"""``roberta-fast predict``: what a fine-tuned model says of new data."""

import argparse
import json
import sys
from pathlib import Path

from roberta_fast.training.arguments import require_extra
from roberta_fast.training.cli import report_errors


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the predictions written, 1 with a reason in one line."""
    parser = argparse.ArgumentParser(
        prog="roberta-fast predict", description="Predicts new data by a model of roberta-fast finetune."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the --output_dir of roberta-fast finetune")
    parser.add_argument("--file", required=True, help="the data, in a format of the training data; labels are not needed")
    parser.add_argument("--output", help="where the predictions go, a json object a line (default: standard output)")
    parser.add_argument("--batch_size", type=int, default=32, help="texts in a batch (32)")
    parser.add_argument("--no-fast", "--no_fast", action="store_true", help="on the stock encoder")
    given = parser.parse_args(argv)
    require_extra()
    return report_errors("predict", lambda: _run(given))


def _run(given):
    from transformers.utils import logging

    from roberta_fast.training import report
    from roberta_fast.training.api import predict

    logging.disable_progress_bar()
    rows = predict(
        given.model, given.file, fast=not given.no_fast, per_device_eval_batch_size=given.batch_size, disable_tqdm=True
    )
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if given.output:
        report.write_text(Path(given.output), text)
    else:
        sys.stdout.write(text)
