"""Heads that read each text's first token: the last layer computes that row alone.

Of a ``RobertaForSequenceClassification``, ``BertForMultipleChoice``, ... only the first row of the last layer's output reaches
the result. Such a head becomes a subclass of itself by its ``__class__`` and tells its fast base model so: the last layer then
takes keys and values from all rows, and all else, queries, output product, feed-forward block and norms, for one row of each
sequence. The result, gradients and dropout included, is that of the whole layer.
"""

import functools
from collections.abc import Callable

from torch import nn

from roberta_fast.embeddings import FIRST_ROWS, FastBaseModel
from roberta_fast.layer import foreign_hooks
from roberta_fast.reporting import FastModel


class FastHead(FastModel):
    """Mixin before a stock head that reads the first token."""


def first_row_forward(stock: type[nn.Module]) -> Callable:
    """The forward of a fast ``stock`` head, with its signature, by which Trainer and others choose what to pass."""

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, FastHead):  # restored, while someone kept this forward, as Accelerate's wrapper for a dtype does
            return stock.forward(self, *args, **kwargs)
        reason = head_objection(self)
        if reason:
            self._count_whole(reason)
            return stock.forward(self, *args, **kwargs)
        return stock.forward(self, *args, **kwargs, **{FIRST_ROWS: True})

    return forward


def head_objection(head: FastHead) -> str | None:
    """Why all rows of this head's last layer are computed, or None."""
    base = head.base_model
    if not isinstance(base, FastBaseModel):
        return f"the base model is a {type(base).__name__}"
    if foreign_hooks(base):
        return f"a hook on {type(base).__name__}"
    if "forward" in base.__dict__:
        return f"a replaced forward of {type(base).__name__}"
    for reader in _readers(head, base):
        if foreign_hooks(reader):
            return f"a hook on {type(reader).__name__}"
        if type(reader).__module__.startswith("peft.") and "modules_to_save" in reader._modules:
            continue  # calls one of those that it holds, which come next
        if not type(reader).__module__.startswith("transformers.") or "forward" in reader.__dict__:
            return f"the head reads by a {type(reader).__name__} of {type(reader).__module__}"
        if getattr(reader, "summary_type", "first") != "first":
            return f"the head reads by summary_type={reader.summary_type!r}"
    return None


def _readers(head, base):
    """The modules that are handed the rows of the whole batch, those in an adapter's wrapper included."""
    if "sequence_summary" in head._modules:
        reader = head.sequence_summary
    elif getattr(base, "pooler", None) is not None:
        reader = base.pooler
    elif "pre_classifier" in head._modules:
        return []  # DistilBERT's heads take the first row themselves
    else:
        reader = head.classifier
    wrapped = reader._modules.get("modules_to_save")
    return [reader] if wrapped is None else [reader, reader.original_module, *wrapped.values()]
