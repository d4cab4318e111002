"""Weights packed in panels, for inference on the CPU: made at their first use, and anew where they have changed since.

They stand beside the parameters, in a table of this module, and are freed with them. So modules, ``state_dict()``, copies and
pickles know nothing of them, and training, which changes weights at every step, does without.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from roberta_fast.families import is_plain
from roberta_fast.ops.linear import prepack, prepack_objection


class _Packed(NamedTuple):
    """A packed weight, and what tells whether the weight is still the one that was packed."""

    packed: torch.Tensor
    state: tuple


_table = WeakIdKeyDictionary()  # of the weights


def packed_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """``weight`` [M, K] as ``ops.linear`` takes it packed, or None where it cannot be."""
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return None
    found, state = _table.get(weight), _state(weight)
    if found is None or found.state != state:
        if prepack_objection(weight):
            return None
        _table[weight] = found = _Packed(prepack(weight.detach()), state)
    return found.packed


def is_packed(weight: torch.Tensor) -> bool:
    """Whether ``weight`` was packed as it is now."""
    found = _table.get(weight)
    return found is not None and found.state == _state(weight)


def _state(weight):
    """What tells a weight from what it was: where it lies, how often autograd saw it written, and, for writes through
    ``weight.data``, some of its numbers."""
    served = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    numbers = None
    if served:
        from roberta_fast._C import fingerprint

        numbers = fingerprint(weight.data_ptr(), weight.numel())
    return weight.data_ptr(), None if weight.is_inference() else weight._version, numbers


def forget(model: nn.Module) -> None:
    """Frees what was made for the linear modules of ``model``; it is made anew where it is used again."""
    for module in model.modules():
        if is_plain(module, nn.Linear):
            _table.pop(module.weight, None)
