"""``roberta-fast finetune TASK ...``; light, so that ``--help`` is quick."""

import argparse
import sys

from roberta_fast.training import arguments

TASKS = {
    "classification": (arguments.ClassificationArguments, "texts or pairs with one label, several, or a number"),
    "ner": (arguments.NerArguments, "tokens with a tag each: named entities, parts of speech"),
    "qa": (arguments.QaArguments, "questions whose answer is a span of a context: SQuAD 1.1 and 2.0"),
    "translation": (arguments.TranslationArguments, "sentences in two languages, by an encoder-decoder"),
    "generation": (arguments.GenerationArguments, "running text, by a causal language model"),
    "multitask": (arguments.MultitaskArguments, "several of the first three, with a head each on one encoder"),
}


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the output folder written, 1 with a reason in one line, 2 for wrong flags."""
    if not argv or argv[0] in ("-h", "--help"):
        tasks = "\n".join(f"  {name:<16} {text}" for name, (_, text) in TASKS.items())
        print(
            f"usage: roberta-fast finetune TASK [--config FILE] [--flag value ...]\n\nTASK is one of\n{tasks}\n\n"
            "roberta-fast finetune TASK --help shows its flags"
        )
        return 0 if argv else 2
    task = argv[0]
    if task not in TASKS:
        print(f"roberta-fast finetune: {task!r} is not one of {', '.join(TASKS)}", file=sys.stderr)
        return 2
    data_class, text = TASKS[task]
    model_args, data_args, args = arguments.parse(
        f"finetune {task}",
        f"Fine-tunes a model on {text}.",
        _once(argv[1:], "--task") if task == "multitask" else argv[1:],
        arguments.ModelArguments,
        data_class,
        training="roberta_fast.training.training_arguments:FineTuningArguments",
    )
    return report_errors(f"finetune {task}", lambda: _run(task, model_args, data_args, args))


def _once(argv, flag):
    """The values of all places of ``flag`` in one, as a flag that takes a list has them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, action="append", default=[], dest="values")
    known, rest = parser.parse_known_args(argv)
    return [*rest, flag, *known.values] if known.values else argv


def report_errors(command: str, action) -> int:
    """Runs ``action`` and returns 0, or 1 with what was wrong in one line: a user's files and flags need no traceback."""
    from roberta_fast.training.trainer import NotFiniteError, UnknownMetricError

    try:
        action()
    except (ValueError, OSError, NotFiniteError, UnknownMetricError) as error:
        print(f"roberta-fast {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(task, model_args, data_args, args):
    from roberta_fast.training.api import task_class

    result = task_class(task)(model_args, data_args, args).run()
    scores = {name: value for name, value in result.metrics.items() if name.startswith(("eval_", "test_"))}
    for name, value in scores.items():
        if not name.endswith(("_runtime", "_per_second", "_samples")):
            print(f"{name}: {value:.4f}")
    print(f"written: {result.output_dir}")
