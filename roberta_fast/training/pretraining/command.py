"""``roberta-fast pretrain``; light, so that ``--help`` is quick."""

from roberta_fast.training import arguments
from roberta_fast.training.cli import report_errors
from roberta_fast.training.pretraining.arguments import MAIN_TRAINING_FLAGS, CorpusArguments, RunArguments

DESCRIPTION = """Trains a masked-language model on a corpus that `roberta-fast pretrain prepare` has written.

  roberta-fast pretrain prepare --input FILES --output CORPUS
  roberta-fast pretrain --data CORPUS --recipe modern --output_dir MODEL"""


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the output folder written, 1 with a reason in one line, 2 for wrong flags."""
    if argv[:1] == ["prepare"]:
        from roberta_fast.training.pretraining import prepare

        return prepare.run(argv[1:])
    run_args, data_args, args = arguments.parse(
        "pretrain",
        DESCRIPTION,
        argv,
        RunArguments,
        CorpusArguments,
        training="roberta_fast.training.pretraining.trainer:PretrainingArguments",
        training_help=MAIN_TRAINING_FLAGS,
        presets=_recipe,
    )
    return report_errors("pretrain", lambda: _pretrain(run_args, data_args, args))


def _recipe(run_args, data_args):
    from roberta_fast.training.pretraining.recipes import recipe_flags

    return recipe_flags(run_args.recipe, run_args.config_name or run_args.model_name_or_path) if run_args.recipe else {}


def _pretrain(run_args, data_args, args):
    from roberta_fast.training.pretraining.run import pretrain

    pretrain(run_args, data_args, args)
