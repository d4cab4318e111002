"""The output folder of fine-tuning: what an earlier run left in it is not overwritten unless that is asked for."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from roberta_fast.training.checkpoints import damage_of
from roberta_fast.training.search import STORAGE
from roberta_fast.training.training_arguments import FineTuningArguments

# What a run leaves beside the model and its tokenizer. Those are always replaced; of this, a run may leave only some, and the
# rest would pass for its own: a checkpoint to resume from, predictions, the tokenizer of a decoder.
_LEFT = (
    *("checkpoint-*", "adapter", "decoder_tokenizer", "README.md", "finetune.json", "metrics.json", "metrics.txt"),
    *("report.txt", "mistakes.txt", "predictions.jsonl", "eval_predictions.json", "continuations.txt", "trainer_state.json"),
    *("confusion_matrix.png", "learning_curves.png", "search.json", "search.txt", STORAGE),
)
_MODEL = ("checkpoint-*", "seed-*", SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
_LOGS = (".log", ".out", ".err")


def require_free(args: FineTuningArguments, model: str | None, *, trains: bool) -> None:
    """Raises ValueError where a run would overwrite what ``args.output_dir`` holds, naming it and the flags that allow it.

    Logs do not count: TensorBoard's, a shell's or a scheduler's, hidden files; nor a search that this one goes on with. What only
    evaluates the model ``model``, its folder or name, may write to that model's folder, or over an earlier evaluation.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={args.output_dir!r} is no folder")
    wanted = args.resume_from_checkpoint
    if wanted and wanted not in (True, "last"):
        damage = damage_of(wanted) if Path(wanted).is_dir() else "there is no such folder"
        if damage:
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {damage}; 'last' is the last complete one in output_dir")
    if wanted or not folder.is_dir():
        return
    if args.overwrite_output_dir:
        if trains and model and any(Path(model).resolve().is_relative_to(path.resolve()) for path in _left_in(folder)):
            raise ValueError(
                f"model_name_or_path={model!r} is among what --overwrite_output_dir deletes: give another output_dir"
            )
        return
    if trains:
        found = [] if args.search_trials and (folder / STORAGE).exists() else sorted(filter(_counts, folder.iterdir()))
    else:
        found = [] if model and folder.resolve() == Path(model).resolve() else sorted(_matches(folder, _MODEL))
    if found:
        names = ", ".join(path.name for path in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        flags = "--overwrite_output_dir replaces what a run left, --resume_from_checkpoint last goes on from its last checkpoint"
        raise ValueError(f"output_dir={args.output_dir!r} is not empty: there is {names}. {flags}; or give another folder")


def clear(args: FineTuningArguments) -> None:
    """Deletes what an earlier run left in ``args.output_dir``, where ``overwrite_output_dir`` asks for it and none is resumed."""
    if args.overwrite_output_dir and not args.resume_from_checkpoint and args.should_save:
        for path in _left_in(Path(args.output_dir)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _left_in(folder: Path) -> list[Path]:
    # Only numbers: a folder that a user named checkpoint-best is the user's.
    return [p for p in _matches(folder, _LEFT) if "-" not in p.name or p.name.partition("-")[2].isdigit()]


def _matches(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern))


def _counts(path: Path) -> bool:
    """Whether there is more to ``path`` than logs."""
    if path.name.startswith(".") or path.suffix in _LOGS or path.name.startswith("events.out.tfevents"):
        return False
    return any(map(_counts, path.iterdir())) if path.is_dir() else True
