"""What a decoder's attention adds: causality, an encoder's rows, and keys and values that a cache kept.

A cache holds keys as [B, H, T, D], padding included. To ``ops.attention`` these are B * H * T rows of one head, divided into a
segment for each (sequence, head), and between them segments without a query, in which the padding lies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from roberta_fast import ops
from roberta_fast.families import layer_parts
from roberta_fast.packing import PackedBatch


class CachedKeys(NamedTuple):
    """How Q query rows of each of B sequences meet the T keys that a cache has for it.

    cu_seqlens_q, cu_seqlens_k: int32 [2 * B * H + 1]. heads: H. seqlen_q, seqlen_k: Q and T.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    heads: int
    seqlen_q: int
    seqlen_k: int

    @classmethod
    def of(cls, mask: torch.Tensor | None, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device) -> "CachedKeys":
        """mask: [B, T], nonzero at real keys, which stand in one run (see ``_has_gaps``), or None where all are."""
        segments = torch.arange(batch * heads, dtype=torch.int32, device=device)
        begin, end = segments.new_zeros(batch), segments.new_full((batch,), seqlen_k)
        if mask is not None:
            begin, end = (bound.to(torch.int32) for bound in _run_of(mask))
        bounds = torch.stack([begin, end], 1).repeat_interleave(heads, 0) + segments[:, None] * seqlen_k
        queries = torch.stack([segments, segments + 1], 1) * seqlen_q
        return cls(*(torch.nn.functional.pad(t.flatten(), (1, 0)) for t in (queries, bounds)), heads, seqlen_q, seqlen_k)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options) -> torch.Tensor:
        """query [B * Q, H, D]; keys, values [B, H, T, D]; options: those of ``ops.attention``. Returns [B * Q, H, D]."""
        head_dim = query.shape[-1]
        by_head = query.view(-1, self.seqlen_q, self.heads, head_dim).transpose(1, 2)
        rows = (t.reshape(-1, 1, head_dim) for t in (by_head, keys, values))
        out = ops.attention(*rows, self.cu_seqlens_q, self.cu_seqlens_k, self.seqlen_q, self.seqlen_k, **options)
        return out.view(by_head.shape).transpose(1, 2).reshape(query.shape)


class Decoding(NamedTuple):
    """What travels with a decoder's packed rows. One that is not None makes attention causal.

    past: how its rows meet the keys of a cache; None where all keys are those of the rows themselves.
    encoder: the ``PackedBatch`` of the encoder's rows, where layers attend to them. cross_past: in its place where a cache has
        their keys.
    """

    past: CachedKeys | None = None
    encoder: PackedBatch | None = None
    cross_past: CachedKeys | None = None

    @property
    def crosses(self) -> bool:
        """Whether layers attend to an encoder's rows."""
        return self.encoder is not None or self.cross_past is not None


def _run_of(mask):
    """Where the first real key of each row of mask [B, T] stands, and one behind the last, two int64 [B]; T and T without any."""
    real = (mask != 0).to(torch.int8)
    begin, end = real.argmax(1), mask.shape[1] - real.flip(1).argmax(1)
    return torch.where(real.amax(1) != 0, begin, end), end


def _has_gaps(mask, to_the_end=False):
    """Whether real keys of mask [B, T] stand in more than one run, or not ``to_the_end``. Waits for the device."""
    begin, end = _run_of(mask)
    gaps = end - begin != (mask != 0).sum(1)
    return bool((gaps | (end != mask.shape[1])).any() if to_the_end else gaps.any())


class DecoderCall(NamedTuple):
    """What a call of an encoder in decoder mode brings beside its own rows: as in the stock encoder's forward, but for ``mask``,
    which is [B, R]."""

    encoder_hidden_states: torch.Tensor | None
    encoder_mask: torch.Tensor | None
    cache: Cache | None

    @property
    def past(self) -> int:
        """How many tokens the cache has."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    def _cross_is_cached(self, layers):
        return isinstance(self.cache, EncoderDecoderCache) and all(self.cache.is_updated.get(i) for i in range(layers))

    def objection(self, layers: Sequence[nn.Module], mask: torch.Tensor | None, flattened: bool) -> str | None:
        """Why it takes the stock path, or None. mask: [B, T + S] or None. Waits for the device where a cache has tokens."""
        crosses = self.encoder_hidden_states is not None
        if crosses and any(layer_parts(layer).cross is None for layer in layers):
            return "cross-attention in layers that have none"
        reason = _cache_objection(self.cache, crosses)
        if reason:
            return reason
        if flattened and (crosses or self.past):
            return "texts divided by cu_seq_lens_q with a cache or cross-attention"
        if self.past and mask is not None and _has_gaps(mask, to_the_end=True):
            return "padding that is not on the left, with a cache"
        if crosses and self._cross_is_cached(len(layers)) and self.encoder_mask is not None and _has_gaps(self.encoder_mask):
            return "an encoder_attention_mask with gaps, with a cache"
        return None

    def decoding(
        self, batch: PackedBatch, mask: torch.Tensor | None, layers: int, heads: int
    ) -> tuple[Decoding, torch.Tensor | None]:
        """What the layers need, and the encoder's packed rows where they attend to those. mask: [B, T + S] or None."""
        device, sizes = batch.cu_seqlens.device, (batch.batch, heads, batch.seqlen)
        past = CachedKeys.of(mask, *sizes, self.past + batch.seqlen, device) if self.past else None
        if self.encoder_hidden_states is None:
            return Decoding(past), None
        if self._cross_is_cached(layers):
            length = self.cache.cross_attention_cache.get_seq_length()
            return Decoding(past, cross_past=CachedKeys.of(self.encoder_mask, *sizes, length, device)), None
        encoder = PackedBatch.of(self.encoder_hidden_states, self.encoder_mask, batch.options)
        encoder = encoder._replace(prepacked=batch.prepacked)
        return Decoding(past, encoder), encoder.pack(self.encoder_hidden_states)


def _cache_objection(cache, crosses):
    """Why fused attention cannot keep keys in this cache, or None."""
    if crosses and cache is not None and not isinstance(cache, EncoderDecoderCache):
        return f"cross-attention with a {type(cache).__name__}"
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if type(cache) is EncoderDecoderCache else (cache,)
    for part in parts:
        if part is not None and (type(part) is not DynamicCache or part.offloading):
            return f"a key-value cache of type {type(part).__name__}"
        for layer in part.layers if part is not None else ():
            if type(layer) is not DynamicLayer:
                return f"a key-value cache of {type(layer).__name__}s"
    return None


def self_attention(query, key, value, batch, cache: Cache | None, layer: int | None, **options) -> torch.Tensor:
    """Attention of packed rows [N, H, D] among themselves, and to what ``cache``, which keeps them, has of layer ``layer``.

    A batch of ``first_rows`` has queries [B, H, D].
    """
    decoding = batch.decoding
    if cache is not None:
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        keys, values = own.update(_padded(key, batch), _padded(value, batch), layer)
        if decoding.past:
            return decoding.past.attend(query, keys, values, causal=True, **options)
    bounds = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
    if batch.first_rows:
        bounds = (torch.arange(batch.batch + 1, dtype=torch.int32, device=query.device), batch.cu_seqlens, 1, batch.max_seqlen)
    options |= {"query_only": batch.query_only, "order": batch.order}
    return ops.attention(query, key, value, *bounds, causal=decoding is not None, **options)


def cross_attention(query, key_value, batch, cache: Cache | None, layer: int, **options) -> torch.Tensor:
    """Attention of packed rows [N, H, D] to the encoder's. key_value(): their (key, value) [M, H, D], where no cache has them."""
    decoding = batch.decoding
    if decoding.cross_past:
        kept = cache.cross_attention_cache.layers[layer]
        return decoding.cross_past.attend(query, kept.keys, kept.values, **options)
    encoder, (key, value) = decoding.encoder, key_value()
    if cache is not None:
        cache.cross_attention_cache.update(_padded(key, encoder), _padded(value, encoder), layer)
        cache.is_updated[layer] = True
    bounds = (batch.cu_seqlens, encoder.cu_seqlens, batch.max_seqlen, encoder.max_seqlen)
    return ops.attention(query, key, value, *bounds, query_only=encoder.query_only, order=batch.order, **options)


def _padded(rows, batch):
    """rows [N, H, D] as a cache keeps them: [B, H, S, D]."""
    return batch.unpack(rows.flatten(1)).unflatten(-1, rows.shape[1:]).transpose(1, 2)
