"""Variable-length flash attention, forward and backward (Dao 2023, "FlashAttention-2", arXiv:2307.08691).

A program of the forward and of the dq kernel owns BLOCK_M query rows of one (segment, head), one of the dkdv kernel BLOCK_N key
rows. Where whole segments fit one tile, the kernels of ``attention_short.py`` serve. No kernel adds to memory that another
program writes, so gradients are the same from run to run. Lengths are read on the device: grids come from the longest length, and
programs behind a segment's end leave at once.

Arguments that the kernels share:
  query_ptr, key_ptr, value_ptr   [Nq | Nk, H, D], strided but for D; stride_*_n, stride_*_h in elements
  out_ptr, dout_ptr, d*_ptr       contiguous [Nq | Nk, H, D]
  lse_ptr                         float32 [H, Nq], log-sum-exp of the scores
  statistics_ptr                  float32 [H, Nq, 2], lse·log2(e) (inf where it is -inf) and rowsum(dO∘O) / rescale
  cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr   as in ops/attention.py
  rows, heads, blocks             Nq, H, and how many blocks the longest segment is cut into
  inverse_ptr                     float32 [H, D], factors by which out is rounded to eight bits, or None
  scale, threshold, rescale       factor on the scores; dropout's threshold and its factor on what is kept
  BLOCK_D                         HEAD_DIM padded to a power of two; columns from HEAD_DIM on are zeros
  PRECISION                       how float32 operands are multiplied, "ieee" or "tf32"
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels import tuning
from roberta_fast.kernels.attention_blocks import (
    dq_block,
    forward_block,
    gradient_block,
    key_ranges,
    load_rows,
    locate,
    not_later,
    store_result,
    store_rows,
)
from roberta_fast.kernels.attention_short import attention_bwd_short_kernel, attention_fwd_short_kernel
from roberta_fast.kernels.dropout import interleaved_columns
from roberta_fast.ops import dropout

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows", "heads", "blocks", "threshold"])
def attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, inverse_ptr, out_ptr, lse_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    rows, heads, blocks, scale, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_QUERY_ONLY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M query rows of one (segment, head)."""
    block, head, begin_q, length_q, begin_k, length_k, skip, coordinates = locate(
        blocks, heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr, threshold,
        HAS_QUERY_ONLY, HAS_DROPOUT,
    )  # fmt: skip
    first_row = block * BLOCK_M
    if first_row >= length_q:
        return
    query_ptr += begin_q * stride_query_n + head * stride_query_h
    key_ptr += begin_k * stride_key_n + head * stride_key_h
    value_ptr += begin_k * stride_value_n + head * stride_value_h

    query_rows = first_row + tl.arange(0, BLOCK_M)
    real = query_rows < length_q
    q = load_rows(query_ptr, query_rows, stride_query_n, real, HEAD_DIM, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    lead, first_full, end_full, end = key_ranges(first_row, skip, length_q, length_k, BLOCK_M, BLOCK_N, CAUSAL)
    for first_column in tl.range(first_full, end_full, BLOCK_N):
        acc, row_max, row_sum = forward_block(
            acc, row_max, row_sum, q, key_ptr, value_ptr, stride_key_n, stride_value_n, query_rows, first_column, skip, length_q,
            length_k, scale * LOG2_E, coordinates, HEAD_DIM, BLOCK_D, BLOCK_N, False, CAUSAL, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    for position in tl.range(end_full - (first_full - lead), end, BLOCK_N):
        first_column = tl.where(position < end_full, lead, position)
        acc, row_max, row_sum = forward_block(
            acc, row_max, row_sum, q, key_ptr, value_ptr, stride_key_n, stride_value_n, query_rows, first_column, skip, length_q,
            length_k, scale * LOG2_E, coordinates, HEAD_DIM, BLOCK_D, BLOCK_N, True, CAUSAL, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    # A row that saw no key has maximum -inf and sum 0: it gives 0 and -inf.
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    out_ptr += (begin_q * heads + head) * HEAD_DIM
    inverse_ptr = None if inverse_ptr is None else inverse_ptr + head * HEAD_DIM
    acc *= (rescale / divisor)[:, None]
    store_result(out_ptr, inverse_ptr, acc, query_rows, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * rows + begin_q + query_rows, (row_max + tl.log2(divisor)) / LOG2_E, mask=real)


@triton.jit(do_not_specialize=["rows", "heads", "blocks", "threshold"])
def attention_bwd_dq_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, statistics_ptr, dquery_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    rows, heads, blocks, scale, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_QUERY_ONLY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query rows of one (segment, head), and their statistics for the dkdv kernel, which runs next."""
    block, head, begin_q, length_q, begin_k, length_k, skip, coordinates = locate(
        blocks, heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr, threshold,
        HAS_QUERY_ONLY, HAS_DROPOUT,
    )  # fmt: skip
    first_row = block * BLOCK_M
    if first_row >= length_q:
        return
    query_ptr += begin_q * stride_query_n + head * stride_query_h
    key_ptr += begin_k * stride_key_n + head * stride_key_h
    value_ptr += begin_k * stride_value_n + head * stride_value_h
    offset = (begin_q * heads + head) * HEAD_DIM
    row_stride = heads * HEAD_DIM

    query_rows = first_row + tl.arange(0, BLOCK_M)
    real = query_rows < length_q
    q = load_rows(query_ptr, query_rows, stride_query_n, real, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr + offset, query_rows, row_stride, real, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr + offset, query_rows, row_stride, real, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / rescale
    lse = tl.load(lse_ptr + head * rows + begin_q + query_rows, mask=real, other=float("-inf")) * LOG2_E
    # An infinite one makes every weight of a row without keys zero, as -inf in its place would not.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    statistics_ptr += (head * rows + begin_q) * 2
    pair = query_rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(statistics_ptr + pair, tl.join(lse, delta), mask=real[:, None])

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lead, first_full, end_full, end = key_ranges(first_row, skip, length_q, length_k, BLOCK_M, BLOCK_N, CAUSAL)
    for first_column in tl.range(first_full, end_full, BLOCK_N):
        dq = dq_block(
            dq, q, dout, lse, delta, key_ptr, value_ptr, stride_key_n, stride_value_n, query_rows, first_column, skip, length_q,
            length_k, scale * LOG2_E, coordinates, HEAD_DIM, BLOCK_D, BLOCK_N, False, CAUSAL, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    for position in tl.range(end_full - (first_full - lead), end, BLOCK_N):
        first_column = tl.where(position < end_full, lead, position)
        dq = dq_block(
            dq, q, dout, lse, delta, key_ptr, value_ptr, stride_key_n, stride_value_n, query_rows, first_column, skip, length_q,
            length_k, scale * LOG2_E, coordinates, HEAD_DIM, BLOCK_D, BLOCK_N, True, CAUSAL, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    store_rows(dquery_ptr + offset, dq * (scale * rescale), query_rows, row_stride, real, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "heads", "blocks", "threshold"])
def attention_bwd_dkdv_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, statistics_ptr, dkey_ptr, dvalue_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr,
    stride_query_n, stride_query_h, stride_key_n, stride_key_h, stride_value_n, stride_value_h,
    rows, heads, blocks, scale, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_QUERY_ONLY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key rows of one (segment, head)."""
    block, head, begin_q, length_q, begin_k, length_k, skip, coordinates = locate(
        blocks, heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr, threshold,
        HAS_QUERY_ONLY, HAS_DROPOUT,
    )  # fmt: skip
    first_column = block * BLOCK_N
    if first_column >= length_k:
        return
    row_stride = heads * HEAD_DIM
    query_ptr += begin_q * stride_query_n + head * stride_query_h
    dout_ptr += begin_q * row_stride + head * HEAD_DIM
    statistics_ptr += (head * rows + begin_q) * 2

    columns = first_column + interleaved_columns(BLOCK_N)
    real = columns < length_k
    k = load_rows(key_ptr + begin_k * stride_key_n + head * stride_key_h, columns, stride_key_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(value_ptr + begin_k * stride_value_n + head * stride_value_h, columns, stride_value_n, real, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin = tl.maximum(0, first_column + length_q - length_k) // BLOCK_M * BLOCK_M if CAUSAL else 0
    # The loop runs once even where it has nothing to do: after a path around it, ptxas would run Hopper's products one by one.
    for step in tl.range(0, tl.maximum(length_q - begin, 1), BLOCK_M):
        query_rows = begin + step + tl.arange(0, BLOCK_M)
        # Rows behind the end load zeros, statistics included, and so add nothing.
        asked = query_rows < length_q
        q = load_rows(query_ptr, query_rows, stride_query_n, asked, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, query_rows, row_stride, asked, HEAD_DIM, BLOCK_D)
        pair = query_rows[:, None] * 2 + tl.arange(0, 2)[None, :]
        lse, delta = tl.split(tl.load(statistics_ptr + pair, mask=asked[:, None], other=0.0))
        # Keys that no query sees spoil their own rows of dk and dv alone, which are not stored, or as zeros.
        visible = not_later(query_rows, columns, length_q, length_k) if CAUSAL else None
        dropped, dscores = gradient_block(
            q, k, v, dout, lse, delta, visible, query_rows, first_column, scale * LOG2_E, coordinates, HAS_DROPOUT, PRECISION
        )
        dv = tl.dot(dropped.to(dout.dtype).T, dout, dv, input_precision=PRECISION)
        dk = tl.dot(dscores.to(q.dtype).T, q, dk, input_precision=PRECISION)

    seen = (columns >= skip)[:, None]
    offset = begin_k * row_stride + head * HEAD_DIM
    store_rows(dkey_ptr + offset, tl.where(seen, dk * (scale * rescale), 0.0), columns, row_stride, real, HEAD_DIM, BLOCK_D)
    store_rows(dvalue_ptr + offset, tl.where(seen, dv * rescale, 0.0), columns, row_stride, real, HEAD_DIM, BLOCK_D)


def attention_fwd(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=False,
                  query_only=None, dropout_p=0.0, seed=None, deterministic=False, order=None, inverse=None):  # fmt: skip
    """(out [Nq, H, D] in query's dtype, lse float32 [H, Nq]), as ``attention_ref``."""
    (rows, heads, _), segments = query.shape, cu_seqlens_q.shape[0] - 1
    lengths = None if deterministic else (max_seqlen_q, max_seqlen_k)
    name = "forward_dropout" if dropout_p else "forward"
    out = torch.empty(query.shape, dtype=query.dtype if inverse is None else torch.float8_e4m3fn, device=query.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=query.device)
    tile = tuning.short_attention_tile(name, query, lengths)
    if tile is not None:
        kernel, heads_or_blocks = attention_fwd_short_kernel, tuning.heads_per_program(tile, query, segments)
        programs = triton.cdiv(heads, heads_or_blocks) * segments
    else:
        kernel, tile = attention_fwd_kernel, tuning.attention_tile(name, query, lengths)
        heads_or_blocks = triton.cdiv(max_seqlen_q, tile.block_m)
        programs = heads_or_blocks * heads * segments
    kernel[(programs,)](
        query, key, value, inverse, out, lse, cu_seqlens_q, cu_seqlens_k, query_only, seed, order,
        *_strides(query, key, value), rows, heads, heads_or_blocks,
        scale, dropout.threshold(dropout_p), dropout.scale(dropout_p),
        **_options(query, tile, causal, query_only, dropout_p),
    )  # fmt: skip
    return out, lse


def attention_bwd(dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                  causal=False, query_only=None, dropout_p=0.0, seed=None, deterministic=False, order=None):  # fmt: skip
    """(dquery, dkey, dvalue), contiguous, in query's dtype, as ``attention_backward_ref``."""
    (rows, heads, _), segments = query.shape, cu_seqlens_q.shape[0] - 1
    lengths = None if deterministic else (max_seqlen_q, max_seqlen_k)
    pairs = heads * segments
    dquery, dkey, dvalue = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    bounds = cu_seqlens_q, cu_seqlens_k, query_only, seed, order, *_strides(query, key, value), rows, heads
    factors = scale, dropout.threshold(dropout_p), dropout.scale(dropout_p)
    flags = causal, query_only, dropout_p
    tile = tuning.short_attention_tile("backward", query, lengths)
    if tile is not None:
        share = tuning.heads_per_program(tile, query, segments)
        attention_bwd_short_kernel[(triton.cdiv(heads, share) * segments,)](
            dout, query, key, value, lse, dquery, dkey, dvalue, *bounds, share, *factors, **_options(query, tile, *flags)
        )
        return dquery, dkey, dvalue
    statistics = torch.empty((heads, rows, 2), dtype=torch.float32, device=query.device)
    tile = tuning.attention_tile("dq", query, lengths)
    blocks = triton.cdiv(max_seqlen_q, tile.block_m)
    attention_bwd_dq_kernel[(blocks * pairs,)](
        dout, query, key, value, out, lse, statistics, dquery, *bounds, blocks, *factors, **_options(query, tile, *flags)
    )
    tile = tuning.attention_tile("dkdv", query, lengths)
    blocks = triton.cdiv(max_seqlen_k, tile.block_n)
    attention_bwd_dkdv_kernel[(blocks * pairs,)](
        dout, query, key, value, statistics, dkey, dvalue, *bounds, blocks, *factors, **_options(query, tile, *flags)
    )
    return dquery, dkey, dvalue


def _strides(*tensors):
    return [stride for t in tensors for stride in t.stride()[:2]]


def _options(query, tile, causal, query_only, dropout_p):
    """The compile-time arguments that the kernels share."""
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "HEAD_DIM": query.shape[2], "BLOCK_D": triton.next_power_of_2(query.shape[2]),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "CAUSAL": causal, "HAS_QUERY_ONLY": query_only is not None, "HAS_DROPOUT": dropout_p > 0.0,
        "PRECISION": "tf32" if tf32 else "ieee", "num_warps": tile.warps, "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }  # fmt: skip
