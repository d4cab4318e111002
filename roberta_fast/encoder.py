"""The fast encoder: Hugging Face's own modules, with a forward that packs once and runs on fused operations.

One mechanism serves every way in. The mixins ``FastLayer`` and ``FastEncoder`` stand before a stock class; the resulting
subclasses (``RobertaLayer``, ``RobertaEncoder``, ... of this module) are put in place by assigning ``__class__``, so the
objects, their parameters, hooks and names stay as they are. A layer is called with a ``PackedBatch`` where the stock
layer gets its attention mask; called in any other way it is the stock layer.
"""

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.roberta.modeling_roberta import RobertaEncoder as StockRobertaEncoder
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, _active_collector

from roberta_fast import copies, embeddings, first_token, graphs, heads, padding_mask, prepacked, span_heads
from roberta_fast.decoding import DecoderCall
from roberta_fast.deterministic import set_deterministic
from roberta_fast.families import (
    FAMILIES,
    FIRST_TOKEN_HEADS,
    ROLES,
    Family,
    family_of,
    family_of_encoder,
    family_of_layer,
    layer_parts,
    unwrapped,
)
from roberta_fast.layer import NOT_DETERMINISTIC, SEE_EACH_OTHER, FastLayer, is_watched, layer_objection
from roberta_fast.ops.linear import prepack_objection
from roberta_fast.ops.registration import TRANSFORMED, is_transformed
from roberta_fast.options import FastOptions
from roberta_fast.packing import Carried, PackedBatch
from roberta_fast.reporting import Reporting


class FastEncoder(graphs.GraphHolder, Reporting):
    """Mixin before a stock encoder class: packs, runs the layers, unpacks."""

    fast_options = FastOptions()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        make_fast(self, self.fast_options)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> ModelOutput:
        """The encoder's output, ``last_hidden_state`` [B, S, C], zeros at padding.

        hidden_states: [B, S, C] embeddings. attention_mask: [B, S], nonzero at real tokens, [1, S] for all texts alike, or None.
        A decoder attends causally, to encoder_hidden_states [B, R, C] under encoder_attention_mask [B, R], and to the T tokens
        that a dynamic cache in past_key_values has, which it fills: attention_mask is [B, T + S] then. Other 4D masks and caches,
        and requested attentions, take the stock path. Texts laid one after the other in one row come with ``cu_seq_lens_q`` and
        ``max_length_q``, as from ``DataCollatorWithFlattening``, and do not see each other.
        Raises ValueError naming a mask that does not fit, or a parameter of another dtype.
        """
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 3 or hidden_states.shape[1] == 0:
            got = tuple(hidden_states.shape) if isinstance(hidden_states, torch.Tensor) else type(hidden_states).__name__
            raise ValueError(f"hidden_states must be [B, S, C] with S >= 1, got {got}")
        mask = _for_all(padding_mask.padding_of(attention_mask), hidden_states)
        cross_mask = _for_all(padding_mask.padding_of(encoder_attention_mask), hidden_states)
        call = DecoderCall(encoder_hidden_states, cross_mask, past_key_values)
        collected, config, flattened = _active_collector.get() or (), _config_of(self), kwargs.get("cu_seq_lens_q")
        decodes = bool(getattr(config, "is_decoder", False))
        reason = (
            encoder_objection(self)
            or _call_objection(call, decodes, collected)
            or _mask_objection(mask, config)
            or (_mask_objection(cross_mask, config) if decodes else None)
            or (self._decoder_objection(call, mask, flattened is not None) if decodes else None)
        )
        if reason:
            if flattened is not None and "flash" not in str(config._attn_implementation):
                raise NotImplementedError(f"roberta_fast: the stock path would run, {reason}, {SEE_EACH_OTHER}")
            forbidden = NOT_DETERMINISTIC if self.fast_options.deterministic else None
            forbidden = copies.RELEASED if copies.any_released(self.layer) else forbidden
            self._report(self.stock_calls, "takes the stock path", "the stock path would run", reason, forbidden)
            if not decodes and isinstance(mask, torch.Tensor) and mask.shape == hidden_states.shape[:2]:
                attention_mask = padding_mask.stock_mask(layer_parts(self.layer[0]).attention, mask, hidden_states)
            decoding = {
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
            }
            given = {name: value for name, value in decoding.items() if value is not None}
            return self.stock.forward(self, hidden_states, attention_mask, **given, **kwargs)
        _check_mask("attention_mask", mask, "hidden_states", hidden_states, call.past)
        if flattened is not None and mask is not None:
            raise ValueError(f"attention_mask must be None where cu_seq_lens_q divides the row, got {tuple(mask.shape)}")
        if not decodes and flattened is None:
            replayed = graphs.replayed(self, graphs.Call({"hidden_states": hidden_states}, mask, self._encoded), collected)
            if replayed is not None:
                return self.family.output(last_hidden_state=replayed)
        batch = (
            PackedBatch.of(hidden_states, None if call.past else mask, self.fast_options)
            if flattened is None
            else PackedBatch.of_flattened(hidden_states, flattened, kwargs.get("max_length_q"), self.fast_options)
        )
        watched = "hidden_states" in collected or any(is_watched(layer) for layer in self.layer)
        batch, arguments, result = self.prepared(batch, hidden_states, watched), (), {}
        if decodes:
            _check_mask("encoder_attention_mask", cross_mask, "encoder_hidden_states", encoder_hidden_states)
            heads = layer_parts(self.layer[0]).attention.num_attention_heads
            decoding, encoder_rows = call.decoding(batch, mask, len(self.layer), heads)
            batch, arguments = batch._replace(decoding=decoding), (encoder_rows,)
            result = {"past_key_values": past_key_values if use_cache else None}
        rows = hidden_states if watched else batch.pack(hidden_states)
        rows = self.run_layers(rows, batch, *arguments, past_key_values=past_key_values if decodes else None, past=call.past)
        return self.family.output(last_hidden_state=rows if watched else batch.unpack(rows), **result)

    def _encoded(self, inputs: dict, mask: torch.Tensor, options: FastOptions) -> torch.Tensor:
        """The last layer's result [B, S, C] of ``inputs``' hidden_states."""
        batch = PackedBatch.of(inputs["hidden_states"], mask, options)
        rows = batch.pack(inputs["hidden_states"])
        return batch.unpack(self.run_layers(rows, self.prepared(batch, rows)))

    def packed_objection(self) -> str | None:
        """Why rows that were packed before the embeddings cannot be run through the layers, or None."""
        watched = (f"a hook on {type(layer).__name__}" for layer in self.layer if is_watched(layer))
        return encoder_objection(self) or next(watched, None) or (None if len(self.layer) else "the encoder has no layers")

    def prepared(self, batch: PackedBatch, rows: torch.Tensor, watched: bool = False) -> PackedBatch:
        """``batch`` with what this encoder decides for each call on ``rows``: whether its layers compute in 8 bits, and from
        prepacked weights. watched: whether someone sees what is between the layers."""
        eight_bits = self._computes_in_eight_bits(rows, watched)
        carried = Carried() if eight_bits and self.fast_options.precision == "fp8" else None
        return batch._replace(eight_bits=eight_bits, carried=carried, prepacked=self._reads_prepacked(rows))

    def run_layers(
        self, rows: torch.Tensor, batch: PackedBatch, *encoder_rows, past_key_values=None, past: int = 0, first_rows: bool = False
    ) -> torch.Tensor:
        """The last layer's result for a ``prepared`` batch.

        rows: packed [N, C], or [B, S, C] where someone between the layers wants to see that. encoder_rows, past_key_values: those
        of a decoder; past: how many tokens the cache has. first_rows: the result is each sequence's first row alone, [B, C].
        Raises ValueError naming a parameter that is not of rows' dtype.
        """
        recomputes = self.fast_options.recompute == "layer" and torch.is_grad_enabled()
        # As Hugging Face's checkpointing has it: what is computed twice fills no cache.
        fills = past_key_values is not None and (past or not recomputes)
        cache = {"past_key_values": past_key_values} if fills else {}
        dtype, batches = rows.dtype, [batch] * len(self.layer)
        batches[-1:] = [batch._replace(first_rows=first_rows)] if batches else []
        try:
            for layer, layer_batch in zip(self.layer, batches, strict=True):
                call_layer = functools.partial(checkpoint, layer, use_reentrant=False) if recomputes else layer
                rows = call_layer(rows, layer_batch, *encoder_rows, **cache)
        except (RuntimeError, ValueError) as error:
            mixed = _mixed_dtype(self, dtype)
            if mixed is None:
                raise
            raise ValueError(mixed) from error
        return rows

    def _decoder_objection(self, call, mask, flattened):
        """Why a decoder takes the stock path in this call, or None: one of its layers never does so alone."""
        own = (layer_objection(layer, layer_parts(layer)) for layer in map(unwrapped, self.layer))
        return next(filter(None, own), None) or call.objection(self.layer, mask, flattened)

    def _computes_in_eight_bits(self, hidden_states: torch.Tensor, watched: bool) -> bool:
        """Whether layers use their 8-bit weights in this call, where the options ask for it; reports where not all do."""
        if self.fast_options.precision is None:
            return False
        layers = [unwrapped(layer) for layer in self.layer]
        reason = copies.call_objection(self, hidden_states)
        if self.fast_options.precision == "fp8":
            copies.check_bounds(layers, *self.norm_before)
            if watched:
                reason = reason or "who sees hidden states between the layers might change them, and fp8 relies on their bounds"
        if reason and copies.any_released(layers):
            raise RuntimeError(f"roberta_fast: the layers would not compute in 8 bits, {reason}, {copies.RELEASED}")
        missing = next((f"8-bit weights: {layer.copies}" for layer in layers if isinstance(layer.copies, str)), None)
        if not self.training and (reason or missing):  # training without copies is no surprise
            self._report(self.fp32_calls, "does not compute in 8 bits", "layers would not compute in 8 bits", reason or missing)
        return reason is None

    def _reads_prepacked(self, hidden_states: torch.Tensor) -> bool:
        """Whether layers read packed weights in this call."""
        asked = self.fast_options.prepack and not torch.compiler.is_compiling()
        able = asked and prepack_objection(hidden_states, self.fast_options.backend) is None
        return able and copies.call_objection(self, hidden_states) is None


def encoder_objection(encoder: nn.Module) -> str | None:
    """Why this encoder always takes the stock path, or None."""
    for layer in map(unwrapped, encoder.layer):
        if "forward" in layer.__dict__ and "forward_before" in layer.__dict__:
            return f"a replaced forward of {type(layer).__name__}"
    config = _config_of(encoder)
    if getattr(config, "is_decoder", False) and not getattr(config, "is_causal", True):
        return "a decoder whose attention is not causal"
    return None


def _config_of(encoder):
    """The config by which an encoder was built; DistilBERT's does not keep it."""
    return encoder.config if hasattr(encoder, "config") else layer_parts(encoder.layer[0]).attention.config


def _for_all(mask, hidden_states):
    """A mask [1, S] for all sequences of hidden_states; any other as it is."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == 1 != hidden_states.shape[0]:
        return mask.expand(hidden_states.shape[0], -1)
    return mask


def _check_mask(name, mask, of, hidden_states, past=0):
    """Raises ValueError where the mask does not fit hidden_states [B, S, C] behind ``past`` tokens."""
    if mask is None or hidden_states is None:
        return
    expected = (hidden_states.shape[0], past + hidden_states.shape[1])
    if mask.shape != expected:
        raise ValueError(f"{name} must be [B, S] = {expected} as {of} has it, got {tuple(mask.shape)}")


def _call_objection(call, decodes, collected):
    """Why this call takes the stock path, or None."""
    if not torch.compiler.is_compiling() and is_transformed():
        return TRANSFORMED
    if not decodes and call.encoder_hidden_states is not None:
        return "cross-attention"
    if not decodes and call.cache is not None:
        return "a key-value cache"
    if "attentions" in collected or "cross_attentions" in collected:
        return "attentions are requested"
    return None


def _mask_objection(mask, config):
    """Why this mask takes the stock path, or None."""
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return None
    if not padding_mask.is_marked(config):
        return f"the attention implementation was set to {config._attn_implementation!r} after acceleration"
    return f"a {mask.dim()}D attention mask" if isinstance(mask, torch.Tensor) else f"a mask of type {type(mask).__name__}"


def _mixed_dtype(encoder, dtype):
    """Which parameter is not of ``dtype``, as a sentence, or None."""
    for name, parameter in encoder.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            return f"{name} is {parameter.dtype}, but hidden_states are {dtype}: an encoder computes in one dtype"
    return None


class FastRobertaEncoder(FastEncoder, StockRobertaEncoder):
    """A fast encoder to build or to put in place by hand: ``model.roberta.encoder = FastRobertaEncoder.from_hf(encoder)``.

    ``FastRobertaEncoder(config, options)`` builds fresh layers of the config's family (roberta, bert, ...), with that family's
    parameter names. Raises ValueError naming an unsupported ``model_type``.
    """

    def __init__(self, config, options: FastOptions | None = None):
        nn.Module.__init__(self)
        self._be_of(family_of(getattr(config, "model_type", None)))
        self.config, self.layer = config, self.stock(config).layer
        make_fast(self, options or FastOptions())

    @classmethod
    def from_hf(cls, encoder: nn.Module, options: FastOptions | None = None) -> "FastRobertaEncoder":
        """A fast encoder around the layer objects of a stock ``encoder``, so that parameters and hooks are shared.

        Marks the attention implementation in the shared config, by which the padding mask arrives unexpanded.
        Raises ValueError if ``encoder`` is no encoder of a supported family.
        """
        family = encoder.family if isinstance(encoder, FastEncoder) else family_of_encoder(encoder)
        if family is None:
            raise ValueError(f"encoder must be the encoder of a supported family, got {type(encoder).__name__}")
        fast = cls.__new__(cls)
        nn.Module.__init__(fast)
        fast._be_of(family)
        fast.config, fast.layer = _config_of(encoder), encoder.layer
        fast.train(encoder.training)
        make_fast(fast, options or FastOptions())
        return fast

    def _be_of(self, family):
        self.family, self.stock = family, family.stock_class("encoder")


def make_fast(encoder: nn.Module, options: FastOptions, owners: Sequence[nn.Module] = ()) -> None:
    """Puts a fast encoder's layers and configs in order; an encoder that always takes the stock path keeps its config.

    owners: the models that hold the encoder and make its mask, where their config may be another object than the layers'.
    """
    if not isinstance(options, FastOptions):
        raise ValueError(f"options must be FastOptions or None, got {options!r}")
    encoder.fast_options = options
    encoder.stock_calls, encoder.fp32_calls, encoder.graphs = {}, {}, graphs.GraphSet()
    set_deterministic(encoder, options.deterministic)
    for layer, layer_class in zip(map(unwrapped, encoder.layer), layer_classes(encoder), strict=True):
        if not isinstance(layer, FastLayer):
            layer.__class__ = layer_class
            # A forward that was replaced before calls the stock one; one that is replaced from now on calls the fast one.
            if "forward" in layer.__dict__:
                layer.forward_before = True
    encoder.norm_before = (_norm_before(owners),)  # in a tuple, as it is no module of the encoder's
    copies.prepare(encoder.layer, options, *encoder.norm_before)
    prepacked.forget(encoder)
    if encoder_objection(encoder) is None:
        padding_mask.mark((*_attentions(encoder), *owners))


def _norm_before(owners):
    """The LayerNorm whose result an encoder takes in, where a model that holds it has one at the end of its embeddings."""
    for owner in owners:
        adds_behind = hasattr(owner, "embeddings_project") or not getattr(owner.config, "concat_input", True)  # RoCBert's
        if isinstance(getattr(owner, "embeddings", None), nn.Module) and not adds_behind:
            return getattr(owner.embeddings, "LayerNorm", None)
    return None


def layer_classes(encoder: nn.Module) -> list[type[nn.Module]]:
    """The fast class of every layer. Raises ValueError naming a layer that is of no supported family."""
    return [fast_class(family_of_layer(layer), "layer") for layer in encoder.layer]


def make_stock(encoder: nn.Module, owners: Sequence[nn.Module] = ()) -> None:
    """Undoes ``make_fast`` and the change of class. Raises ValueError where FSDP has changed a class since."""
    layers = [unwrapped(layer) for layer in encoder.layer]
    for module in (encoder, *layers):
        if any(c.__module__.startswith("torch.distributed") for c in type(module).__mro__):
            raise ValueError(f"a sharded module cannot be made stock again: {type(module).__name__}")
    padding_mask.unmark((*_attentions(encoder), *owners))
    prepacked.forget(encoder)
    set_deterministic(encoder, False)
    for layer in layers:
        layer.__class__ = layer.stock
        for name in ("forward_before", "copies"):
            layer.__dict__.pop(name, None)
    stock = encoder.stock
    for name in ("fast_options", "stock_calls", "fp32_calls", "graphs", "norm_before", "family", "stock"):
        encoder.__dict__.pop(name, None)
    encoder.__class__ = stock


def _attentions(encoder):
    return [layer_parts(layer).attention for layer in encoder.layer]


@functools.cache
def fast_class(family: Family, role: str) -> type[nn.Module]:
    """The fast subclass of a family's stock class for one of ``ROLES``. It keeps the stock name, by which FSDP wraps."""
    stock = family.stock_class(role)
    mixin, make_forward = _MADE_OF[role]
    body = {
        "__module__": __name__,
        "__qualname__": _global_name(family, role),
        "__doc__": f"{stock.__name__} on fused operations.",
        "family": family,
        "stock": stock,
    }
    if make_forward:
        body["forward"] = make_forward(stock)
    fast = type(stock.__name__, (mixin, stock), body)
    # Hugging Face looks up by the name of a class what its models can record of their layers.
    if hasattr(stock, "_can_record_outputs"):
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(fast), stock._can_record_outputs)
    return fast


# Role to (mixin, what makes the forward where that of the mixin has not the signature of every stock class).
_MADE_OF = {
    "layer": (FastLayer, None),
    "encoder": (FastEncoder, None),
    "masked_lm": (heads.FastLanguageModel, functools.partial(heads.fused_forward, causal=False)),
    "causal_lm": (heads.FastLanguageModel, functools.partial(heads.fused_forward, causal=True)),
    "base": (embeddings.FastBaseModel, embeddings.packed_forward),
    "question_answering": (span_heads.FastSpanHead, span_heads.masked_forward),
    **dict.fromkeys(FIRST_TOKEN_HEADS, (first_token.FastHead, first_token.first_row_forward)),
}


def _global_name(family, role):
    """The name of a fast class in this module: the stock one, lengthened where an earlier family has it."""
    name = getattr(family, role)
    owner = next(f for f in FAMILIES if name in (getattr(f, r) for r in ROLES))
    return name if owner is family else f"{name}_{family.module.split('.')[0]}"


def __getattr__(name: str):
    """Finds the fast classes by name, so that they pickle like any class of a module."""
    for family in FAMILIES:
        for role in ROLES:
            if getattr(family, role) and _global_name(family, role) == name:
                return fast_class(family, role)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
