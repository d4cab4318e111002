"""Attention of short segments, forward and backward: a tile holds all queries and all keys of one (segment, head).

So the softmax is a plain one, and the backward pass computes all three gradients with five matrix products in place of seven. A
program takes ``share`` heads of a segment one after the other; the rows of the next are on their way while one is computed.
``disable_licm``: what of a tile's addresses and masks is computed once, before the loop, would fill registers all through it.
Arguments are those of ``kernels/attention.py``.
"""

import triton
import triton.language as tl

from roberta_fast.kernels.attention_blocks import (
    drop,
    gradient_block,
    load_rows,
    segment_at,
    store_result,
    store_rows,
    visible_keys,
)
from roberta_fast.kernels.dropout import interleaved_columns

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows", "heads", "share", "threshold"])
def attention_fwd_short_kernel(
    query_ptr, key_ptr, value_ptr, inverse_ptr, out_ptr, lse_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    rows, heads, share, scale, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_QUERY_ONLY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of ``share`` heads of one segment of at most BLOCK_M queries and BLOCK_N keys."""
    groups = tl.cdiv(heads, share)
    segment, begin_q, length_q, begin_k, length_k, skip = segment_at(
        tl.program_id(0) // groups, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, order_ptr, HAS_QUERY_ONLY
    )
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    first_head = (tl.program_id(0) % groups * share).to(tl.int64)
    row_stride = heads * HEAD_DIM
    query_ptr += begin_q * stride_query_n
    key_ptr += begin_k * stride_key_n
    value_ptr += begin_k * stride_value_n
    out_ptr += begin_q * row_stride

    query_rows = tl.arange(0, BLOCK_M)
    columns = interleaved_columns(BLOCK_N)
    asked, real = query_rows < length_q, columns < length_k
    # A segment that does not ask, as padding of a cache, has nothing to compute.
    own = tl.where(length_q == 0, 0, tl.minimum(share, heads - first_head))
    for step in tl.range(0, own, disable_licm=True):
        head = first_head + step
        q = load_rows(query_ptr + head * stride_query_h, query_rows, stride_query_n, asked, HEAD_DIM, BLOCK_D)
        k = load_rows(key_ptr + head * stride_key_h, columns, stride_key_n, real, HEAD_DIM, BLOCK_D)
        v = load_rows(value_ptr + head * stride_value_h, columns, stride_value_n, real, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        scores = tl.where(visible_keys(query_rows, columns, skip, length_q, length_k, CAUSAL), scores, float("-inf"))
        # The scale is positive, so it may follow the maximum; one fused multiply-add then prepares each exponent.
        row_max = tl.max(scores, 1) * (scale * LOG2_E)
        # A row that sees no key has maximum -inf and sum 0: it gives 0 and -inf.
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        weights = tl.exp2(scores * (scale * LOG2_E) - shift[:, None])
        row_sum = tl.sum(weights, 1)
        weights = drop(weights, query_rows, 0, (seed, threshold, head, segment), HAS_DROPOUT)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
        out *= (rescale / divisor)[:, None]
        factors_ptr = None if inverse_ptr is None else inverse_ptr + head * HEAD_DIM
        store_result(out_ptr + head * HEAD_DIM, factors_ptr, out, query_rows, row_stride, asked, HEAD_DIM, BLOCK_D)
        statistics = lse_ptr + head * rows + begin_q + query_rows
        tl.store(statistics, (row_max + tl.log2(divisor)) / LOG2_E, mask=asked)


@triton.jit(do_not_specialize=["rows", "heads", "share", "threshold"])
def attention_bwd_short_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, dquery_ptr, dkey_ptr, dvalue_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    rows, heads, share, scale, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_QUERY_ONLY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of ``share`` heads of one segment of at most BLOCK_M queries and BLOCK_N keys."""
    groups = tl.cdiv(heads, share)
    segment, begin_q, length_q, begin_k, length_k, skip = segment_at(
        tl.program_id(0) // groups, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, order_ptr, HAS_QUERY_ONLY
    )
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    first_head = (tl.program_id(0) % groups * share).to(tl.int64)
    row_stride = heads * HEAD_DIM
    query_ptr += begin_q * stride_query_n
    key_ptr += begin_k * stride_key_n
    value_ptr += begin_k * stride_value_n
    offset_q, offset_k = begin_q * row_stride, begin_k * row_stride

    query_rows = tl.arange(0, BLOCK_M)
    columns = interleaved_columns(BLOCK_N)
    asked, real = query_rows < length_q, columns < length_k
    for step in tl.range(0, tl.minimum(share, heads - first_head), disable_licm=True):
        head = first_head + step
        own_q, own_k = offset_q + head * HEAD_DIM, offset_k + head * HEAD_DIM
        q = load_rows(query_ptr + head * stride_query_h, query_rows, stride_query_n, asked, HEAD_DIM, BLOCK_D)
        k = load_rows(key_ptr + head * stride_key_h, columns, stride_key_n, real, HEAD_DIM, BLOCK_D)
        v = load_rows(value_ptr + head * stride_value_h, columns, stride_value_n, real, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr + own_q, query_rows, row_stride, asked, HEAD_DIM, BLOCK_D)
        statistics = lse_ptr + head * rows + begin_q + query_rows
        lse = tl.load(statistics, mask=asked, other=float("-inf")) * LOG2_E
        # An infinite one makes every weight of a row without keys zero, as -inf in its place would not.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)

        visible = visible_keys(query_rows, columns, skip, length_q, length_k, CAUSAL)
        coordinates = (seed, threshold, head, segment)
        dropped, dscores = gradient_block(
            q, k, v, dout, lse, None, visible, query_rows, 0, scale * LOG2_E, coordinates, HAS_DROPOUT, PRECISION
        )
        dv = tl.dot(dropped.to(dout.dtype).T, dout, input_precision=PRECISION)
        store_rows(dvalue_ptr + own_k, dv * rescale, columns, row_stride, real, HEAD_DIM, BLOCK_D)
        dscores = (dscores * (scale * rescale)).to(q.dtype)
        dk = tl.dot(dscores.T, q, input_precision=PRECISION)
        store_rows(dkey_ptr + own_k, dk, columns, row_stride, real, HEAD_DIM, BLOCK_D)
        dq = tl.dot(dscores, k, input_precision=PRECISION)
        store_rows(dquery_ptr + own_q, dq, query_rows, row_stride, asked, HEAD_DIM, BLOCK_D)
