"""Packing before the embeddings: a base model that looks up, normalizes and encodes real tokens alone, and unpacks once.

A stock ``RobertaModel``, ``BertModel``, ... becomes a subclass of itself by its ``__class__``, as its encoder does. Its forward
packs by the attention mask, runs ``ops.embedding`` and the encoder's layers on the rows, and puts them back for the pooler and
the caller. Where someone wants to see what lies between, or a part is not the stock one, the stock forward runs around the
fast encoder as if there were none of this; ``explain`` shows why.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _active_collector

from roberta_fast import graphs, ops, padding_mask
from roberta_fast.families import is_plain
from roberta_fast.layer import dropout_probability, foreign_hooks, is_plain_dropout
from roberta_fast.ops import dropout
from roberta_fast.ops.embedding import positions_behind
from roberta_fast.ops.registration import TRANSFORMED, is_transformed
from roberta_fast.options import FastOptions
from roberta_fast.packing import PackedBatch
from roberta_fast.reporting import FastModel

_LOOKED_UP = ("input_ids", "position_ids", "token_type_ids")
FIRST_ROWS = "_first_rows"  # the argument by which a fast head says that it reads no others
_UNDERSTOOD = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "use_cache", "return_dict", "num_items_in_batch")


class FastBaseModel(FastModel):
    """Mixin before a stock base model: embeddings, layers and pooler on packed rows."""

    def _forward_packed(self, given: dict, first_rows: bool) -> ModelOutput:
        """The stock forward's output for its arguments ``given``; zeros at padding, and but for ``first_rows`` where only those
        are wanted."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        mask = mask if mask is None else mask.to(ids.device).expand(ids.shape)
        inputs = {name: given[name].expand(ids.shape) for name in _LOOKED_UP if given.get(name) is not None}
        encoded = functools.partial(self._encoded, first_rows=first_rows)
        call = graphs.Call(inputs, mask, encoded, self.embeddings, "first rows" if first_rows else "")
        hidden_states = graphs.replayed(encoder_of(self), call)
        if hidden_states is None:
            hidden_states = encoded(inputs, mask, self.fast_options)
        if first_rows:
            hidden_states = nn.functional.pad(hidden_states[:, None], (0, 0, 0, ids.shape[1] - 1))
        if not hasattr(self, "pooler"):
            return self.family.output(last_hidden_state=hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden_states, pooler_output=pooled)

    def _encoded(self, inputs: dict, mask: torch.Tensor | None, options: FastOptions, first_rows: bool) -> torch.Tensor:
        """The last layer's result [B, S, C] of ``inputs``, input_ids and what else is looked up; [B, C] of first rows alone."""
        encoder = encoder_of(self)
        batch = PackedBatch.of(inputs["input_ids"], mask, options)
        rows = self._embedded(*map(inputs.get, _LOOKED_UP), batch)
        if torch.is_grad_enabled() and not rows.requires_grad and self.embeddings.word_embeddings._forward_hooks:
            rows.requires_grad_()
        rows = encoder.run_layers(rows, encoder.prepared(batch, rows), first_rows=first_rows)
        return rows if first_rows else batch.unpack(rows)

    def _embedded(self, ids, position_ids, token_type_ids, batch):
        """The packed rows [N, C] that go into the first layer."""
        parts = self.embeddings
        if position_ids is None and hasattr(parts, "create_position_ids_from_input_ids"):  # RoBERTa and its kin
            position_ids = positions_behind(ids, parts.padding_idx)
        p = dropout_probability(parts.dropout)
        types = getattr(parts, "token_type_embeddings", None)
        return ops.embedding(
            ids,
            parts.word_embeddings.weight,
            parts.position_embeddings.weight,
            None if types is None else types.weight,
            parts.LayerNorm.weight,
            parts.LayerNorm.bias,
            parts.LayerNorm.eps,
            position_ids=position_ids,
            token_type_ids=None if types is None else token_type_ids,
            padding_idx=parts.word_embeddings.padding_idx,
            position_padding_idx=parts.position_embeddings.padding_idx,
            dropout_p=p,
            seed=dropout.new_seeds(1, ids.device) if p else None,
            indices=batch.indices,
            count=batch.count,
            backend=batch.options.backend,
        )


def packed_forward(stock: type[nn.Module]) -> Callable:
    """The forward of a fast ``stock`` base model, with its signature."""
    names = list(inspect.signature(stock.forward).parameters)[1:]

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        first_rows = kwargs.pop(FIRST_ROWS, False)
        if not isinstance(self, FastBaseModel):  # restored, while someone kept this forward
            return stock.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        reason = base_objection(self) or _call_objection(self, given)
        if reason:
            self._count_whole(reason)
            return stock.forward(self, *args, **kwargs)
        output = self._forward_packed(given, first_rows)
        as_model = given.get("return_dict")
        as_model = getattr(self.config, "return_dict", True) if as_model is None else as_model
        return output if as_model else output.to_tuple()

    return forward


def encoder_of(base: nn.Module) -> nn.Module:
    """The encoder of a base model; DistilBERT's is called ``transformer``."""
    return base._modules["encoder" if "encoder" in base._modules else "transformer"]


def base_objection(base: FastBaseModel) -> str | None:
    """Why this base model always embeds before it packs, or None."""
    parts, encoder = base.embeddings, encoder_of(base)
    if not hasattr(type(encoder), "run_layers"):  # a wrapper's instance would pass the question on
        return f"the encoder is a {type(encoder).__name__}"
    if encoder._compiled_call_impl is not None:
        return "the encoder is compiled by itself"
    reason = encoder.packed_objection()
    if reason:
        return reason
    if "embeddings_project" in base._modules:
        return "the embeddings are projected"
    if type(parts).__name__ != base.family.embeddings or type(parts).__module__ != base.stock.__module__:
        return f"the embeddings are a {type(parts).__name__} of {type(parts).__module__}"
    if getattr(parts, "use_task_id", False):
        return "the embeddings have task types"
    for module in (encoder, *parts.modules()):
        if not all(map(_asks_for_gradients, foreign_hooks(module))):
            return f"a hook on {type(module).__name__}"
        if "forward" in module.__dict__:
            return f"a replaced forward of {type(module).__name__}"
    tables = [getattr(parts, name) for name in _TABLES if name in parts._modules]
    for table in tables:
        if not is_plain(table, nn.Embedding) or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            return f"the embeddings hold a {table!r:.80}"
        if (table.weight.dtype, table.weight.device) != (tables[0].weight.dtype, tables[0].weight.device):
            return "the tables of embeddings differ in dtype or device"
    if not is_plain(parts.LayerNorm, nn.LayerNorm) or parts.LayerNorm.weight is None or parts.LayerNorm.bias is None:
        return f"the embeddings are normalized by a {type(parts.LayerNorm).__name__}"
    if not is_plain_dropout(parts.dropout):
        return f"dropout by a {type(parts.dropout).__name__}"
    return None


def _asks_for_gradients(hook):
    """Whether this is Hugging Face's hook by which a gradient reaches checkpointed layers over frozen word embeddings."""
    return getattr(hook, "__name__", "") == "make_inputs_require_grads" and hook.__module__ == "transformers.modeling_utils"


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def _call_objection(base, given):
    """Why the stock forward serves a call with the arguments ``given``, or None."""
    if not torch.compiler.is_compiling() and is_transformed():
        return TRANSFORMED
    if getattr(base.config, "is_decoder", False) or getattr(base.config, "is_causal", False):
        return "a decoder"
    for name in ("output_hidden_states", "output_attentions"):
        if given.get(name, getattr(base.config, name, False)):
            return f"{name.removeprefix('output_').replace('_', ' ')} are requested"
    # Traced code cannot read what is of one thread; there Hugging Face keeps it for all.
    if _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get():
        return "a model around this one records outputs"
    for name, value in given.items():
        if name not in _UNDERSTOOD and value is not None and value is not False:
            return name
    if not padding_mask.is_marked(base.config):
        return f"the attention implementation was set to {base.config._attn_implementation!r} after acceleration"
    ids, table = given.get("input_ids"), base.embeddings.word_embeddings.weight
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        return "no input_ids [B, S]"
    if ids.device != table.device:
        return f"input_ids on {ids.device}"
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape not in (ids.shape, (1, ids.shape[1]))):
        return "an attention_mask that is not [B, S]"
    if given.get("position_ids") is None and ids.shape[1] > base.embeddings.position_embeddings.weight.shape[0]:
        return "more tokens than positions"  # the stock model's error leaves a GPU usable, a failed assertion on it does not
    for name in ("position_ids", "token_type_ids"):
        value = given.get(name)
        if value is not None and (not isinstance(value, torch.Tensor) or value.shape not in (ids.shape, (1, ids.shape[1]))):
            return f"{name} that are not [B, S]"
        if value is not None and (value.dtype not in (torch.int64, torch.int32) or value.device != ids.device):
            return f"{name} of {value.dtype} on {value.device}"
    return None
