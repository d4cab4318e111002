"""Pretrains a model on given text from scratch and records the run: config, command, curve, speed, masks filled.

``python benchmarks/pretrain.py --text FILES --work DIR --json FILE`` learns a byte-level BPE, prepares the text in DIR, a
paragraph a line, 1% of it for validation, and trains as the flags say; those behind ``--`` go to ``roberta-fast pretrain`` as
they are. What an interrupted call has left in DIR is taken up by the same one. The model stays in DIR/model.

With ``--ner_train FILE --ner_validation FILE`` (CoNLL) it also learns to recognize named entities, beside the same shape from
random parameters, with equal seeds and flags.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from transformers import pipeline

from roberta_fast.benchmarks import measure
from roberta_fast.cli import main as command
from roberta_fast.training import finetune
from roberta_fast.training.pretraining.corpus import read_index
from roberta_fast.training.report import write_json

# Of a small model on two cores: short blocks first, on which attention learns soonest where to look.
FLAGS = {
    "recipe": "modern",
    "config_name": "mini",
    "max_seq_length": "128",
    "global_batch_size": "0",
    "per_device_train_batch_size": "16",
    "per_device_eval_batch_size": "32",
    "learning_rate": "2e-3",
    "hidden_dropout": "0",
    "length_warmup_start": "16",
    "eval_strategy": "steps",
    "eval_steps": "0.1",
    "max_eval_samples": "256",
    "save_strategy": "steps",
    "save_steps": "0.05",
    "logging_steps": "0.01",
    "disable_tqdm": "True",
}
# Of a model of named entities made of it.
NER_FLAGS = {
    "learning_rate": 5e-4,
    "tokens_per_batch": 512,
    "num_train_epochs": 6,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
    "report_to": "none",
}
SEEDS = (1, 2, 3)
SENTENCES = (
    "The capital of France is <mask>.",
    "He opened the <mask> and went into the house.",
    "The package contains the <mask> files of the library.",
    "She said that she would be very <mask> to see him.",
    "The president of the United <mask> spoke to the Congress.",
)


def main(argv: list[str] | None = None) -> int:
    """Prepares, trains, fills masks, and writes the record; returns the exit status of the step that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files, a paragraph a line")
    parser.add_argument("--vocab_size", type=int, default=16_384, help="of the BPE that is learned from the text")
    parser.add_argument("--work", type=Path, required=True, help="where corpus and model go")
    parser.add_argument("--steps", type=int, default=9_000, help="optimizer steps; a sixth of them on shorter blocks")
    parser.add_argument("--json", type=Path, help="where the record goes, benchmarks/results/pretrain.json say")
    parser.add_argument("--ner_train", help="tokens and their tags, to fine-tune on")
    parser.add_argument("--ner_validation", help="others, to evaluate on")
    parser.add_argument("flags", nargs="*", help="flags of roberta-fast pretrain, behind --")
    options = parser.parse_args(argv)
    corpus, model = options.work / "corpus", options.work / "model"
    prepare = ["--input", *options.text, "--document_separator", "line", "--validation_split_percentage", "1"]
    prepare += ["--vocab_size", str(options.vocab_size), "--output", str(corpus)]
    if not corpus.exists():
        status = command(["pretrain", "prepare", *prepare])
        if status:
            return status
    flags = {**FLAGS, "max_steps": str(options.steps), "length_warmup_steps": str(options.steps // 6)}
    train = ["--data", str(corpus), "--output_dir", str(model), "--resume_from_checkpoint", "last"]
    train += [part for name, value in flags.items() for part in (f"--{name}", value)]
    status = command(["pretrain", *train, *options.flags])
    if status:
        return status
    record = record_of(model, corpus, [*train, *options.flags], [Path(text).name for text in options.text])
    for sentence, words in record["filled"].items():
        print(f"{sentence}  {', '.join(words)}")
    if options.ner_train:
        record["ner"] = ner_record(model, options.work / "ner", options.ner_train, options.ner_validation)
    if options.json:
        write_json(options.json, record)
        print(f"written: {options.json}")
    return 0


def record_of(model: Path, corpus: Path, flags: list[str], texts: list[str]) -> dict:
    """What a result holds of the run in ``model``, machine paths left out."""
    run, index = json.loads((model / "metrics.json").read_text()), read_index(corpus)
    private = {"--data", "--output_dir"}
    shown = [part for i, part in enumerate(flags) if part not in private and (i == 0 or flags[i - 1] not in private)]
    splits = {name: {k: v for k, v in split.items() if k != "shards"} for name, split in index["splits"].items()}
    curve = ("step", "loss", "eval_loss", "eval_perplexity", "learning_rate", "tokens_per_second", "mfu", "corpus_epoch")
    fill = pipeline("fill-mask", str(model), top_k=5)
    return {
        "benchmark": "pretrain",
        "command": " ".join(["roberta-fast pretrain --data CORPUS --output_dir MODEL", *shown]),
        "texts": texts,
        "corpus": {"vocab_size": index["vocab_size"], "bytes": index["bytes"], "splits": splits},
        "config": json.loads((model / "config.json").read_text()),
        "parameters": run["parameters"],
        "metrics": run["metrics"],
        "curve": [{name: entry[name] for name in curve if name in entry} for entry in run["log_history"]],
        "filled": {sentence: [word["token_str"].strip() for word in fill(sentence)] for sentence in SENTENCES},
        "environment": measure.environment("cuda" if torch.cuda.is_available() else "cpu"),
    }


def ner_record(model: Path, work: Path, train: str, validation: str) -> dict:
    """F1 of entities, one a seed, of a tagger from ``model`` and of one from random parameters, and what they differ by."""
    starts = {
        "pretrained": {"model_name_or_path": str(model)},
        "random": {"config_name": str(model), "tokenizer_name": str(model)},
    }
    files, scores = {"train_file": train, "validation_file": validation}, {name: [] for name in starts}
    for seed in SEEDS:
        for name, start in starts.items():
            result = finetune("ner", **start, **files, **NER_FLAGS, seed=seed, output_dir=str(work / f"{name}-{seed}"))
            scores[name].append(result.metrics["eval_f1"])
            print(f"{name}, seed {seed}: F1 {scores[name][-1]:.4f}", flush=True)
    names = [Path(file).name for file in (train, validation)]
    gains = [after - before for after, before in zip(scores["pretrained"], scores["random"], strict=True)]
    return {"files": names, "flags": NER_FLAGS, "seeds": SEEDS, "f1": scores, "mean_gain": statistics.fmean(gains)}


if __name__ == "__main__":
    sys.exit(main())
