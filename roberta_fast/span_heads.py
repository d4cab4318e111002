"""Heads that mark a span of the text, as question answering's: padding is no place for it.

A fast encoder leaves zeros at padding, of which ``*ForQuestionAnswering`` makes a logit as good as any. In a stock model padding
has hidden states of its own, which training teaches to be unlikely. So such a head becomes a subclass of itself by its
``__class__``, whose logits at padding are the least of their dtype, and whose loss is that of the real tokens.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.utils import can_return_tuple

from roberta_fast.reporting import FastModel


class FastSpanHead(FastModel):
    """Mixin before a stock head for spans."""


def masked_forward(stock: type[nn.Module]) -> Callable:
    """The forward of a fast ``stock`` head, with its signature, by which Trainer and others choose what to pass."""
    names = list(inspect.signature(stock.forward).parameters)[1:]

    @can_return_tuple
    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        # Restored, while someone kept this forward; or nothing says what padding is.
        if not isinstance(self, FastSpanHead) or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return stock.forward(self, *args, **kwargs)
        positions = [given.pop(name, None) for name in ("start_positions", "end_positions")]
        output = stock.forward(self, **given, return_dict=True)
        start, end = (
            logits.masked_fill(~mask.bool(), torch.finfo(logits.dtype).min) for logits in (output.start_logits, output.end_logits)
        )
        loss = None
        if all(position is not None for position in positions):
            loss = sum(_loss(logits, position, mask) for logits, position in zip((start, end), positions, strict=True)) / 2
        return dataclasses.replace(output, loss=loss, start_logits=start, end_logits=end)

    return forward


def _loss(logits, positions, mask):
    """The mean cross-entropy of logits [B, S]; positions [B] or [B, 1] beyond the text do not count, nor those at padding."""
    outside = logits.shape[1]
    positions = (positions.squeeze(-1) if positions.dim() > 1 else positions).clamp(0, outside)
    inside = nn.functional.pad(mask.bool(), (0, 1)).gather(1, positions[:, None]).squeeze(1)
    positions = positions.masked_fill(~inside, outside)
    return nn.functional.cross_entropy(logits, positions, ignore_index=outside)
