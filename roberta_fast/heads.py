"""Language-model heads in training: on labelled rows only, fused with their loss.

A stock ``RobertaForMaskedLM``, ``BertLMHeadModel``, ... becomes a subclass of itself by its ``__class__``, as encoders do. In
training mode and with labels, its forward drops all rows without one, runs dense, GELU and LayerNorm on the others, and takes
their loss by ``ops.cross_entropy``: no [B, S, V] logits exist, and ``outputs.logits`` is None. Other calls are the stock model's.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, MaskedLMOutput
from transformers.utils import can_return_tuple

from roberta_fast import ops
from roberta_fast.families import is_plain
from roberta_fast.layer import activated, add_norm, foreign_hooks
from roberta_fast.ops.registration import TRANSFORMED, is_transformed, refuse
from roberta_fast.packing import PackedBatch
from roberta_fast.reporting import FastModel

IGNORE_INDEX = -100  # that of torch.nn.CrossEntropyLoss, which these models use as it is


class FastLanguageModel(FastModel):
    """Mixin before a stock language model: its loss from the labelled rows."""

    def _loss_of(self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items=None) -> torch.Tensor:
        """The mean over the labelled rows of hidden_states [B, S, C], or their sum over ``num_items``: a float32 scalar."""
        labels = labels.to(hidden_states.device).flatten()
        # All rows as one sequence: packing keeps the first of each, labelled or not.
        rows = hidden_states.flatten(0, 1)[None]
        batch = PackedBatch.of(rows, (labels != IGNORE_INDEX)[None], self.fast_options)
        if batch.indices is not None:  # those behind the count point to the end
            labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[batch.indices]
        parts = self.family.head(self)
        rows = activated(batch.pack(rows), parts.dense, parts.activation, batch)
        rows = batch.real(add_norm(rows, None, parts.norm, 0.0, None, 0, batch))
        options = {"ignore_index": IGNORE_INDEX, "num_items": num_items, "backend": self.fast_options.backend}
        return ops.cross_entropy(rows, parts.decoder.weight, parts.decoder.bias, labels, **options)


def fused_forward(stock: type[nn.Module], causal: bool) -> Callable:
    """The forward of a fast ``stock`` model, with its signature, by which Trainer and others choose what to pass.

    causal: a row predicts the next token; ``labels`` are the tokens themselves.
    """
    names = list(inspect.signature(stock.forward).parameters)[1:]

    @can_return_tuple
    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, FastLanguageModel):  # restored, while someone kept this forward
            return stock.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        labels = given.pop("labels", None)
        if labels is None or not self.training or not self.fast_options.fuse_lm_head:
            return stock.forward(self, *args, **kwargs)
        reason = head_objection(self) or (_causal_objection(self, given) if causal else None)
        if reason:
            self._report(self.stock_calls, "computes all logits", "all logits would be computed", reason)
            return stock.forward(self, *args, **kwargs)
        if labels.dtype != torch.int64:
            refuse(
                "labels", f"{labels.dtype} {tuple(labels.shape)}", "int64 [B, S], a class of the vocabulary or -100 at each token"
            )
        if causal:
            given["use_cache"] = False  # as in the stock models
            given.pop("logits_to_keep", None)
        outputs = self.base_model(**given, return_dict=True)
        if labels.shape != outputs.last_hidden_state.shape[:2]:
            expected = tuple(outputs.last_hidden_state.shape[:2])
            raise ValueError(f"labels must be [B, S] = {expected}, got {tuple(labels.shape)}")
        recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        if not causal:
            return MaskedLMOutput(loss=self._loss_of(outputs.last_hidden_state, labels), **recorded)
        following = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        loss = self._loss_of(outputs.last_hidden_state, following, given.get("num_items_in_batch"))
        return CausalLMOutputWithCrossAttentions(
            loss=loss, past_key_values=outputs.past_key_values, cross_attentions=outputs.cross_attentions, **recorded
        )

    return forward


def _causal_objection(model, given):
    """Why the loss of this call is not that of ``fused_forward``, or None."""
    if model.loss_function is not ForCausalLMLoss:
        return "a loss_function of its own"
    logits_to_keep = given.get("logits_to_keep", 0)
    if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
        return "logits_to_keep"
    return next((f"{name} for the loss" for name in ("shift_labels", "ignore_index") if name in given), None)


def head_objection(model: nn.Module) -> str | None:
    """Why this model computes the logits of all rows in training, or None."""
    if not torch.compiler.is_compiling() and is_transformed():
        return TRANSFORMED
    parts = model.family.head(model)
    for module in (*parts.containers, parts.dense, parts.activation, parts.norm, parts.decoder):
        if isinstance(module, nn.Module) and foreign_hooks(module):
            return f"a hook on {type(module).__name__}"
    for module in parts.containers:
        if "forward" in module.__dict__:
            return f"a replaced forward of {type(module).__name__}"
        if not type(module).__module__.startswith("transformers."):
            return f"{type(module).__name__} is no class of Hugging Face's"
    if not is_plain(parts.decoder, nn.Linear):
        return f"the decoder is a {type(parts.decoder).__name__}"
    return None
