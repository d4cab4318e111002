"""The chip that a launcher chooses its tiles for."""

import functools
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What tile choices depend on.

    generation: 80, 90, 100 or 120, the compute capability times ten whose resources the chip has; 0 in Triton's interpreter.
    multiprocessors: how many of them it has, for persistent kernels.
    """

    generation: int
    multiprocessors: int


def chip_of(tensor: torch.Tensor) -> Chip:
    """The chip that a kernel over ``tensor`` runs on."""
    return _cuda_chip(tensor.get_device()) if tensor.is_cuda else Chip(0, 1)


@functools.cache
def _cuda_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(generation_of(properties.major * 10 + properties.minor), properties.multi_processor_count)


def generation_of(capability: int) -> int:
    """The generation whose tiles fit: what has about 99 KiB of shared memory a block (8.6, 8.9, 12.x, older) goes with 120."""
    if capability in (80, 87):
        return 80
    if 90 <= capability < 120:
        return 90 if capability < 100 else 100
    return 120
