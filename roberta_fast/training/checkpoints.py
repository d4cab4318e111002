"""Checkpoints that are there as a whole or not at all, and whose bytes are those that were written."""

import hashlib
import json
import math
import os
import shutil
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

# Under this name in the output folder a checkpoint is written; only when it is whole it gets the name that is looked for.
STAGING = ".saving"
CHECKSUMS = "checksums.json"
# FSDP's sharded weights, as accelerate names them.
FSDP_MODEL = "pytorch_model_fsdp_0"
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


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of each file in ``folder`` into its ``checksums.json``."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != CHECKSUMS:
            with open(file, "rb") as handle:
                sums[str(file.relative_to(folder))] = hashlib.file_digest(handle, "sha256").hexdigest()
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def last_complete_checkpoint(folder: str | Path, before: float = math.inf) -> str | None:
    """The ``checkpoint-N`` of the highest N below ``before`` in ``folder`` that is whole, or None; warns of each that it passes
    over, and why."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    found = [p for p in found if int(p.name.removeprefix("checkpoint-")) < before]
    for checkpoint in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        damage = damage_of(checkpoint)
        if damage is None:
            return str(checkpoint)
        warnings.warn(f"{checkpoint} is passed over: {damage}", RuntimeWarning, stacklevel=2)
    return None


def damage_of(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or is not what was written; None where nothing is.

    A checkpoint without ``checksums.json``, of stock Trainer say, is only held to have weights and a readable trainer state.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({error})"
    if not any((checkpoint / name).is_file() for name in _WEIGHTS) and not (checkpoint / FSDP_MODEL).is_dir():
        return "it has no weights"
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    for name, written in sums.items():
        try:
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written:
                    return f"{name} is not what was written: its SHA-256 is another"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
