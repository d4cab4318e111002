"""out = dropout(softmax(Q Kᵀ · scale)) V for packed segments of unequal lengths.

Segment b holds the query rows cu_seqlens_q[b] … cu_seqlens_q[b+1] - 1 and the key rows of cu_seqlens_k likewise, without its
first ``query_only[b]`` key rows. A row attends to the keys of its own segment; where it has none, its output is zero and
its log-sum-exp -inf. ``causal`` aligns the last query with the last key, as flash-attention does: query i of n sees key j
of m where j <= i + m - n.

Backward (Dao et al. 2022, "FlashAttention", appendix B), with P = exp(Q Kᵀ·scale - lse) and the dropout Z on P:
dV = (P∘Z)ᵀ dO, dP = (dO Vᵀ)∘Z, dS = P∘(dP - rowsum(dO∘O)), dQ = dS K·scale, dK = dSᵀ Q·scale.
"""

import torch

from roberta_fast import dispatch
from roberta_fast.ops import dropout
from roberta_fast.ops.fp8_linear import fp8_quantize_ref, refuse_gradient
from roberta_fast.ops.registration import (
    autocast_to,
    define,
    facts_of,
    float32_or_bfloat16,
    refuse,
    register_autograd,
    register_backends,
)

HEAD_DIMS = range(16, 129)  # what the Triton and C++ kernels serve; Triton pads to a power of two


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_only: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    deterministic: bool = False,
    order: torch.Tensor | None = None,
    inverse: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(query @ keyᵀ * scale) @ value within each segment.

    query: [Nq, H, D]; key, value: [Nk, H, D], one floating dtype; the last dimension is contiguous, others may be strided.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on the same device, ascending from 0: where segments begin, and the end.
        Rows from the end on are never read.
    max_seqlen_q, max_seqlen_k: upper bounds on the lengths, rows.
    scale: positive factor on the scores; None: 1 / sqrt(D). causal: a query sees no later keys.
    query_only: int32 [B], leading rows of each segment that ask but are not seen, or None for none.
    dropout_p: probability of dropping an attention weight, in [0, 1); seed: int64 [1], needed where it is not 0.
    deterministic: a segment gives bitwise the same, gradients included, from run to run and whatever it is batched with.
    order: int32 [B], the segments in the order in which a GPU begins them, which changes no result: the longest first, as
        ``pack_indices`` lists them, keep it from ending on one. None: as they stand.
    inverse: float32 [H, D], by which the result is multiplied and rounded to float8_e4m3fn for a product in 8 bits
        (``fp8_linear``); that has no gradient. None: it is of query's dtype.
    Under autocast computes in its dtype. Returns [Nq, H, D], contiguous. Raises ValueError naming the argument that does not fit.
    """
    query, key, value = autocast_to(query, key, value)
    if query.dim() != 3:
        refuse("query", f"shape {tuple(query.shape)}", "a packed [N, H, D] tensor")
    if not query.is_floating_point():
        refuse("query", query.dtype, "a floating-point tensor")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[1:] != query.shape[1:]:
            refuse(name, f"shape {tuple(tensor.shape)}", f"[N, H, D] with query's H and D {tuple(query.shape[1:])}")
        if tensor.dtype != query.dtype:
            refuse(name, tensor.dtype, f"query's dtype {query.dtype}")
        if tensor.stride(-1) != 1:
            refuse(name, f"stride {tensor.stride(-1)}", "contiguous in its last dimension")
    if key.shape[0] != value.shape[0]:
        refuse("value", f"{value.shape[0]} rows", f"key's {key.shape[0]} rows")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.dtype != torch.int32 or bounds.dim() != 1:
            refuse(name, f"{bounds.dtype} {tuple(bounds.shape)}", "int32 [B + 1]")
        if bounds.device != query.device:
            refuse(name, bounds.device, f"on query's device {query.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        refuse("cu_seqlens_k", tuple(cu_seqlens_k.shape), f"{tuple(cu_seqlens_q.shape)}")
    if dropout_p != 0.0 and seed is None:
        refuse("seed", seed, f"an int64 [1] tensor where dropout_p={dropout_p}")
    if order is not None and (order.dtype != torch.int32 or order.dim() != 1 or order.shape[0] != cu_seqlens_q.shape[0] - 1):
        refuse("order", f"{order.dtype} {tuple(order.shape)}", "int32 [B]")
    if order is not None and order.device != query.device:
        refuse("order", order.device, f"on query's device {query.device}")
    if inverse is not None and (inverse.shape != query.shape[1:] or inverse.dtype != torch.float32):
        refuse("inverse", f"{inverse.dtype} {tuple(inverse.shape)}", f"float32 [H, D] = {tuple(query.shape[1:])}")
    dropout.threshold(dropout_p)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        refuse("scale", scale, "positive")
    out, _ = _forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                      query_only, dropout_p, seed if dropout_p else None, deterministic, order, backend, inverse)  # fmt: skip
    return out


def attention_ref(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=False,
                  query_only=None, dropout_p=0.0, seed=None, deterministic=False, order=None, inverse=None):  # fmt: skip
    """Segment by segment in plain PyTorch; returns (out [Nq, H, D], lse [H, Nq] in float32, float64 for float64)."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = _statistics_like(query, query.shape[1], query.shape[0]).fill_(-torch.inf)
    for b, q, k in _segments(cu_seqlens_q, cu_seqlens_k, query_only):
        scores = _scores(query[q], key[k], scale, causal)
        lse[:, q] = scores.logsumexp(-1)
        weights = _drop(_softmax(scores, lse[:, q]), b, query_only, dropout_p, seed)
        out[q] = (weights.to(value.dtype) @ value[k].transpose(0, 1)).transpose(0, 1)
    return (out if inverse is None else fp8_quantize_ref(out, inverse)), lse


def attention_backward_ref(dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                           causal=False, query_only=None, dropout_p=0.0, seed=None, deterministic=False, order=None):  # fmt: skip
    """The formulas above, segment by segment; returns (dquery, dkey, dvalue)."""
    dquery, dkey, dvalue = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    for b, q, k in _segments(cu_seqlens_q, cu_seqlens_k, query_only):
        q_b, k_b, v_b, o_b, do_b = (t.transpose(0, 1) for t in (query[q], key[k], value[k], out[q], dout[q]))
        weights = _softmax(_scores(query[q], key[k], scale, causal), lse[:, q])
        dvalue[k] = (_drop(weights, b, query_only, dropout_p, seed).to(v_b.dtype).mT @ do_b).transpose(0, 1)
        dweights = _drop((do_b @ v_b.mT).to(weights.dtype), b, query_only, dropout_p, seed)
        row_sums = (do_b * o_b).to(weights.dtype).sum(-1, keepdim=True)
        dscores = (weights * (dweights - row_sums) * scale).to(query.dtype)
        dquery[q] = (dscores @ k_b).transpose(0, 1)
        dkey[k] = (dscores.mT @ q_b).transpose(0, 1)
    return dquery, dkey, dvalue


def _segments(cu_seqlens_q, cu_seqlens_k, query_only):
    """(segment, slice of its query rows, slice of its key rows) of every segment."""
    skipped = [0] * (len(cu_seqlens_q) - 1) if query_only is None else query_only.tolist()
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, skip in enumerate(skipped):
        yield b, slice(bounds_q[b], bounds_q[b + 1]), slice(min(bounds_k[b] + skip, bounds_k[b + 1]), bounds_k[b + 1])


def _statistics_like(x, *shape):
    return torch.empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


def _scores(query, key, scale, causal):
    """[H, n, m] scores in the statistics' precision, -inf where masked."""
    scores = query.transpose(0, 1) @ key.transpose(0, 1).mT * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool, device=scores.device).triu(m - n + 1), -torch.inf)
    return scores


def _softmax(scores, lse):
    """exp(scores - lse), zero for a row that sees no key."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])


def _drop(weights, segment, query_only, dropout_p, seed):
    """Dropout on [H, n, m]; coordinates count from the segment's first row, seen or not."""
    if not dropout_p:
        return weights
    skip = 0 if query_only is None else int(query_only[segment])
    heads, n, m = weights.shape
    rows, heads = (torch.arange(size, device=weights.device) for size in (n, heads))
    keep = dropout.keep_mask(seed, dropout_p, rows, m + skip, heads, segment)[..., skip:]
    return torch.where(keep, weights * dropout.scale(dropout_p), 0)


def _forward_implementation(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                            query_only, dropout_p, seed, deterministic, order, backend, inverse=None):  # fmt: skip
    choice = dispatch.choose("attention", facts_of(query, query.shape[-1], deterministic=deterministic), backend)
    rounds_itself = inverse is not None and choice.backend != "cpp"
    out, lse = choice.run(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, query_only,
                          dropout_p, seed, deterministic, order, *((inverse,) if rounds_itself else ()))  # fmt: skip
    return (out if inverse is None or rounds_itself else fp8_quantize_ref(out, inverse)), lse


def _forward_fake(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, query_only,
                  dropout_p, seed, deterministic, order, backend, inverse=None):  # fmt: skip
    dtype = query.dtype if inverse is None else torch.float8_e4m3fn
    return query.new_empty(query.shape, dtype=dtype), _statistics_like(query, query.shape[1], query.shape[0])


def _backward_implementation(dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                             causal, query_only, dropout_p, seed, deterministic, order, backend):  # fmt: skip
    run = dispatch.choose("attention_backward", facts_of(query, query.shape[-1], deterministic=deterministic), backend).run
    return run(dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
               query_only, dropout_p, seed, deterministic, order)  # fmt: skip


def _backward_fake(dout, query, key, value, *_):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_forward = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, bool causal, Tensor? query_only, float dropout_p, "
    "Tensor? seed, bool deterministic, Tensor? order, str backend, Tensor? inverse=None) -> (Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, "
    "Tensor? query_only, float dropout_p, Tensor? seed, bool deterministic, Tensor? order, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    query, key, value, cu_seqlens_q, cu_seqlens_k, *lengths_scale_causal = inputs[:9]
    query_only, dropout_p, seed, deterministic, order, backend, inverse = inputs[9:]
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, query_only, seed, order)
    ctx.lengths_scale_causal = lengths_scale_causal
    ctx.dropout_p, ctx.deterministic, ctx.backend, ctx.is_rounded = dropout_p, deterministic, backend, inverse is not None


def _autograd_backward(ctx, dout, _dlse):
    if ctx.is_rounded:
        refuse_gradient(ctx)
    query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, query_only, seed, order = ctx.saved_tensors
    gradients = _backward(dout.contiguous(), query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.lengths_scale_causal,
                          query_only, ctx.dropout_p, seed, ctx.deterministic, order, ctx.backend)  # fmt: skip
    return *gradients, *[None] * 13


register_autograd("attention", _autograd_backward, _setup_context)


def _kernel_objection(facts):
    if facts.head_dim in HEAD_DIMS:
        return None
    return f"head_dim={facts.head_dim} is outside {HEAD_DIMS.start}..{HEAD_DIMS.stop - 1}"


register_backends("attention", in_cpp=float32_or_bfloat16, objection=_kernel_objection)
