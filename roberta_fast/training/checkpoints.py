"""Checkpoints that are there as a whole or not at all."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

# Under this name in the output folder a checkpoint is written; only when it is whole it gets the name that is looked for.
STAGING = ".saving"
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME)


def publish(staged: Path, target: Path) -> None:
    """Gives the whole folder ``staged`` the name ``target`` at once, after its bytes have reached the disk; an older one goes."""
    for file in staged.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    replaced = staged.with_name(f"{target.name}.replaced")
    if target.exists():
        target.rename(replaced)
    staged.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The ``checkpoint-N`` of the highest N in ``folder`` that has weights and a readable trainer state, or None.

    One that another program left half-written is passed over.
    """
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit() and _is_complete(p)]
    return str(max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))) if found else None


def _is_complete(checkpoint):
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any((checkpoint / name).is_file() for name in _WEIGHTS)
