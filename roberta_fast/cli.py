"""The command ``roberta-fast``."""

import argparse
import importlib
import importlib.metadata
import sys

COMMANDS = {
    "demo": ("roberta_fast.demo", "a real model on real text, stock and accelerated, side by side"),
    "convert": ("roberta_fast.fairseq", "a fairseq RoBERTa checkpoint into a Hugging Face model"),
    "finetune": ("roberta_fast.training.cli", "a model on a task: classification, ner, qa, translation, generation, multitask"),
    "predict": ("roberta_fast.training.prediction", "what a fine-tuned model says of new data"),
    "pretrain": ("roberta_fast.training.pretraining.command", "RoBERTa from text: `prepare` tokenizes it, without it trains"),
    "serve": ("roberta_fast.serving.server", "a model over HTTP, batched by real tokens"),
    "bench": ("roberta_fast.benchmarks.encoder", "the encoder against its peers, in one run"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs ``roberta-fast <command> ...`` and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="roberta-fast", description="A drop-in, accelerated RoBERTa and BERT encoder.")
    parser.add_argument("--version", action="version", version=f"roberta-fast {importlib.metadata.version('roberta_fast')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    command = parser.parse_args(argv[:1]).command
    return importlib.import_module(COMMANDS[command][0]).run(argv[1:])


def positive(text: str) -> int:
    """A flag's value as a whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
