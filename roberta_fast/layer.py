"""The fast layer: the post-LayerNorm block on packed rows, around the modules of a stock layer."""

import torch
from torch import nn

from roberta_fast import ops, padding_mask
from roberta_fast.copies import CopiesHolder, copies_of
from roberta_fast.decoding import cross_attention, self_attention
from roberta_fast.deterministic import Linear
from roberta_fast.families import gelu_form, is_plain, is_plain_norm, layer_parts, unwrapped
from roberta_fast.one_call import by_one_call
from roberta_fast.ops import dropout
from roberta_fast.packing import PackedBatch
from roberta_fast.parts import LINEARS, LayerParts
from roberta_fast.prepacked import packed_weight


class FastLayer(CopiesHolder):
    """Mixin before a stock layer class: the post-LayerNorm block on packed rows."""

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        """One block. With a ``PackedBatch`` as attention_mask: packed rows [N, C] in and out, or [B, S, C] in and out
        where someone between the layers wants to see that shape; a decoder's layer also takes the encoder's packed rows [M, C],
        by position, and ``past_key_values``. A batch of ``first_rows`` comes packed. With anything else: the stock layer."""
        if not isinstance(attention_mask, PackedBatch):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        batch = attention_mask
        parts = layer_parts(self)
        reason = None if batch.decoding else layer_objection(self, parts)  # a decoder's encoder has asked all its layers
        decoder = (*args, kwargs.get("past_key_values")) if batch.decoding else ()
        if batch.options.deterministic:
            _refuse_other_bits(parts, reason)
        if reason:
            if batch.is_flattened:
                raise NotImplementedError(f"roberta_fast: the stock layer would run, {reason}, {SEE_EACH_OTHER}")
            rows = self._stock_block(hidden_states, batch)
            return rows.index_select(0, batch.asking) if batch.first_rows else rows
        if hidden_states.dim() == 2:
            return self._block(hidden_states, batch, parts, *decoder)
        return batch.unpack(self._block(batch.pack(hidden_states), batch, parts, *decoder))

    def _block(self, rows, batch: PackedBatch, parts: LayerParts, encoder_rows=None, cache=None) -> torch.Tensor:
        dropouts = [parts.attention_dropout, parts.attention_output_dropout, parts.output_dropout]
        attends_to_encoder = batch.decoding is not None and batch.decoding.crosses
        if attends_to_encoder:
            dropouts += [parts.cross.attention_dropout, parts.cross.attention_output_dropout]
        p = [dropout_probability(module) for module in dropouts]
        seeds = dropout.new_seeds(len(p), rows.device) if any(p) else None
        copies = copies_of(self, parts) if batch.eight_bits else None
        whole = None if any(p) else by_one_call(rows, batch, parts, copies)
        if whole is not None:
            return whole
        inverses = copies.inverses if copies else (None, None)

        projections = _query_key_value(rows, parts, batch, copies)
        if batch.first_rows:  # only attention needs the others
            rows, batch = rows.index_select(0, batch.asking), batch._replace(count=None)
        attention_options = _attention_options(parts, p, seeds, 0, batch)
        if copies and batch.decoding is None:
            attention_options["inverse"] = copies.context_inverse
        context = self_attention(*projections, batch, cache, **attention_options).flatten(1)
        projected = copies.attention_output(context, batch) if copies else linear(parts.attention_output, context, batch)
        rows = add_norm(projected, rows, parts.attention_norm, p[1], seeds, 1, batch, inverses[0])
        if attends_to_encoder:
            context = _attend_to_encoder(parts.cross, rows, encoder_rows, batch, cache, p, seeds)
            projected = linear(parts.cross.attention_output, context, batch)
            rows = add_norm(projected, rows, parts.cross.attention_norm, p[4], seeds, 4, batch)
        expanded = copies.feed_forward(rows, batch, parts) if copies else _feed_forward(rows, parts, batch)
        return add_norm(expanded, rows, parts.output_norm, p[2], seeds, 2, batch, inverses[1])

    def _stock_block(self, hidden_states, batch):
        padded = hidden_states if hidden_states.dim() == 3 else batch.unpack(hidden_states)
        padded = super().forward(padded, padding_mask.stock_mask(layer_parts(self).attention, batch.mask, padded))
        return padded if hidden_states.dim() == 3 else batch.pack(padded)


SEE_EACH_OTHER = "where texts divided by cu_seq_lens_q see each other"
NOT_DETERMINISTIC = "which deterministic=True forbids: its bits depend on the batch"


def _refuse_other_bits(parts, reason):
    """Raises NotImplementedError where the stock layer would run, for ``reason``, or a linear layer that is none of ours."""
    what = reason and f"the stock layer would run, {reason}"
    for name, part in linears(parts).items():
        for module in part.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, Linear):
                kind = f"{type(module).__name__} that acceleration did not replace (accelerate_model does, called again)"
                what = what or f"{name} would run a {kind}"
    if what:
        raise NotImplementedError(f"roberta_fast: {what}, {NOT_DETERMINISTIC}")


def linears(parts: LayerParts) -> dict[str, nn.Module]:
    """The linear modules of a layer by name, those of its cross-attention included."""
    found = {name: getattr(parts, name) for name in LINEARS}
    if parts.cross:
        found |= {f"cross {name}": getattr(parts.cross, name) for name in LINEARS if hasattr(parts.cross, name)}
    return found


def layer_objection(layer: nn.Module, parts: LayerParts) -> str | None:
    """Why this layer cannot run fused now, or None: hooks inside it expect the stock modules' calls and shapes."""
    for module in parts.modules():
        if foreign_hooks(module):
            return f"a hook on {type(module).__name__}"
    if "feed_forward_chunk" in layer.__dict__:
        return f"a replaced feed_forward_chunk of {type(layer).__name__}"
    crossing = parts.cross
    for module in (*parts.containers, *(crossing.containers if crossing else ())):
        if "forward" in module.__dict__:
            return f"a replaced forward of {type(module).__name__}"
        if not type(module).__module__.startswith("transformers."):
            return f"{type(module).__name__} is no class of Hugging Face's"
    dropouts = (parts.attention_dropout, parts.attention_output_dropout, parts.output_dropout)
    for module in (*dropouts, *((crossing.attention_dropout, crossing.attention_output_dropout) if crossing else ())):
        if module is not None and not is_plain_dropout(module):
            return f"dropout by a {type(module).__name__}"
    return None


def is_plain_dropout(module):
    """Whether only its probability matters, and is one that can be scaled away."""
    if type(module) is nn.Dropout:
        return "forward" not in module.__dict__ and (module.p < 1.0 or not module.training)
    return type(module) is nn.Identity


def dropout_probability(dropout):
    """The probability by which a part drops now."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def linear(module, rows, batch):
    """module(rows), by the operation where the module is a plain Linear."""
    if is_plain(module, nn.Linear):
        return ops.linear(rows, module.weight, module.bias, count=batch.count, packed=_packed(module, batch), **_how(batch))
    return batch.real(module(batch.real(rows)))


def _packed(module, batch):
    return packed_weight(module.weight) if batch.prepacked else None


def _how(batch):
    return {"deterministic": batch.options.deterministic, "backend": batch.options.backend}


def _attention_options(parts, p, seeds, index, batch):
    """What ``ops.attention`` and a cache need to know beside the rows; index: which of p and seeds are the attention's."""
    return {
        "layer": parts.attention.layer_idx if batch.decoding else None,
        "scale": parts.attention.scaling,
        "dropout_p": p[index],
        "seed": seeds[index : index + 1] if p[index] else None,
        **_how(batch),
    }


def _attend_to_encoder(parts, rows, encoder_rows, batch, cache, p, seeds):
    """The context [N, C] of packed rows over the encoder's rows."""
    heads = (-1, parts.attention.attention_head_size)

    def key_value():
        return (linear(m, encoder_rows, batch.decoding.encoder).unflatten(1, heads) for m in (parts.key, parts.value))

    query = linear(parts.query, rows, batch).unflatten(1, heads)
    return cross_attention(query, key_value, batch, cache, **_attention_options(parts, p, seeds, 3, batch)).flatten(1)


def _query_key_value(rows, parts, batch, copies=None):
    """Three [N, H, D] views; of the query [B, H, D] where only first rows ask.

    One GEMM on CUDA for those of all rows, where concatenating the weights costs less than more launches.
    """
    projections = (parts.query, parts.key, parts.value)
    heads = (-1, parts.attention.attention_head_size)
    if copies:
        query, key, value = copies.query_key_value(rows, batch, heads[1])
        return (query.index_select(0, batch.asking) if batch.first_rows else query), key, value
    first = ()
    if batch.first_rows:
        of_first = linear(parts.query, rows.index_select(0, batch.asking), batch._replace(count=None))
        first, projections = (of_first.unflatten(1, heads),), projections[1:]
    if rows.is_cuda and all(is_plain(p, nn.Linear) and p.bias is not None for p in projections):
        weight, bias = torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])
        joined = ops.linear(rows, weight, bias, count=batch.count, **_how(batch))
        return *first, *joined.unflatten(1, (len(projections), *heads)).unbind(1)
    return *first, *(linear(p, rows, batch).unflatten(1, heads) for p in projections)


def _feed_forward(rows, parts, batch):
    form, dense = gelu_form(parts.activation), (parts.intermediate, parts.output)
    if form and not batch.prepacked and all(is_plain(module, nn.Linear) for module in dense):
        weights = (tensor for module in dense for tensor in (module.weight, module.bias))
        recompute = batch.options.recompute == "gelu"
        return ops.feed_forward(rows, *weights, approximate=form, recompute=recompute, count=batch.count, **_how(batch))
    return linear(parts.output, activated(rows, parts.intermediate, parts.activation, batch), batch)


def activated(rows, dense, activation, batch):
    """activation(dense(rows)), fused where it is a GELU over a plain Linear."""
    form = gelu_form(activation)
    if form is None or not is_plain(dense, nn.Linear):
        return activation(linear(dense, rows, batch))
    how = {"count": batch.count, "packed": _packed(dense, batch), **_how(batch)}
    return ops.linear_gelu(rows, dense.weight, dense.bias, approximate=form, **how)


def add_norm(x, residual, norm, p, seeds, index, batch, inverse=None):
    """norm(residual + dropout(x)), fused where norm is a plain LayerNorm.

    inverse: the factors by which it goes on in 8 bits as well, in ``batch.carried``; in inference alone.
    """
    if inverse is not None:
        rounding = {"inverse": inverse, "count": batch.count, "backend": batch.options.backend}
        y, rounded = ops.add_layer_norm_fp8(x, residual, norm.weight, norm.bias, norm.eps, **rounding)
        batch.carried.put(y, rounded)
        return y
    seed = seeds[index : index + 1] if p else None
    if not is_plain_norm(norm):
        return batch.real(norm(batch.real(residual + nn.functional.dropout(x, p))))
    options = {"dropout_p": p, "seed": seed, "count": batch.count, "backend": batch.options.backend}
    options["dropout_rows"] = batch.asking if p else None  # a row drops the same in whatever company it is
    return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, **options)


def foreign_hooks(module: nn.Module) -> list:
    """The hooks on a module, without Hugging Face's recording hooks: the active recording says what those want."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return []
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for group in hooks for hook in group.values() if getattr(hook, "__name__", "") != "output_capturing_hook"]


def is_watched(layer: nn.Module) -> bool:
    """True where a hook on the layer may look at hidden states, so that they must have their stock shape [B, S, C].

    Hooks that only manage parameters, as those of FSDP, do not look.
    """
    hooks = [hook for module in dict.fromkeys((layer, unwrapped(layer))) for hook in foreign_hooks(module)]
    return any(not getattr(hook, "__module__", "").startswith("torch.distributed") for hook in hooks)
