"""What attention's kernels do to one block of rows: loads, stores, masks, and the arithmetic of a score tile.

A score tile is [BLOCK_M query rows, BLOCK_N key rows], float32. Its key rows are in the order of ``interleaved_columns``, which
spares dropout an exchange between threads. Arguments not explained here are in ``kernels/attention.py``.
"""

import triton
import triton.language as tl

from roberta_fast.kernels.dropout import interleaved_columns, keep_mask_interleaved
from roberta_fast.kernels.fp8 import to_e4m3


@triton.jit
def locate(
    blocks, heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, seed_ptr, order_ptr, threshold,
    HAS_QUERY_ONLY: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """What this program works on: (block, head, first query row, their number, first key row, their number, skip, coordinates).

    Blocks of one segment and head are neighbours and share its rows in the cache. skip: leading keys that are not seen.
    coordinates: what dropout depends on beside row and column, (seed, threshold, head, segment).
    """
    program = tl.program_id(0)
    head = program // blocks % heads
    segment, begin_q, length_q, begin_k, length_k, skip = segment_at(
        program // blocks // heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, order_ptr, HAS_QUERY_ONLY
    )
    coordinates = (tl.load(seed_ptr) if HAS_DROPOUT else 0, threshold, head, segment)
    return program % blocks, head.to(tl.int64), begin_q, length_q, begin_k, length_k, skip, coordinates


@triton.jit
def segment_at(
    position, cu_seqlens_q_ptr, cu_seqlens_k_ptr, query_only_ptr, order_ptr, HAS_QUERY_ONLY: tl.constexpr
):  # fmt: skip
    """(segment, first query row, their number, first key row, their number, skip) of the segment at ``position`` of the order."""
    segment = position if order_ptr is None else tl.load(order_ptr + position)
    begin_q, begin_k = tl.load(cu_seqlens_q_ptr + segment), tl.load(cu_seqlens_k_ptr + segment)
    length_q, length_k = tl.load(cu_seqlens_q_ptr + segment + 1) - begin_q, tl.load(cu_seqlens_k_ptr + segment + 1) - begin_k
    skip = tl.load(query_only_ptr + segment) if HAS_QUERY_ONLY else 0
    return segment, begin_q.to(tl.int64), length_q, begin_k.to(tl.int64), length_k, skip


@triton.jit
def load_rows(ptr, rows, stride, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [len(rows), BLOCK_D]; zeros where ``real`` [len(rows)] is false. None: all are real."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if real is None and HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    elif real is None:
        tile = tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers, mask=real[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    return tile


@triton.jit
def store_rows(ptr, tile, rows, stride, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the real rows and columns of ``tile`` [len(rows), BLOCK_D], rounded to the buffer's dtype."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=real[:, None] & (columns[None, :] < HEAD_DIM))


@triton.jit
def store_result(ptr, inverse_ptr, tile, rows, stride, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``store_rows``, in eight bits and times inverse_ptr's [HEAD_DIM] factors of this head where it is not None."""
    if inverse_ptr is not None:
        columns = tl.arange(0, BLOCK_D)
        tile = to_e4m3(tile * tl.load(inverse_ptr + columns, mask=columns < HEAD_DIM, other=0.0)[None, :])
    store_rows(ptr, tile, rows, stride, real, HEAD_DIM, BLOCK_D)


@triton.jit
def key_ranges(first_row, skip, length_q, length_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Where a block of query rows finds its keys: (lead, first_full, end_full, end).

    Blocks from ``first_full`` to ``end_full`` are seen whole by every row; those from ``lead`` (the one that ``skip`` cuts, if it
    cuts one) and from ``end_full`` to ``end`` are seen in part.
    """
    lead = skip // BLOCK_N * BLOCK_N
    first_full = tl.cdiv(skip, BLOCK_N) * BLOCK_N
    end, seen_by_all = length_k, length_k
    if CAUSAL:
        end = tl.minimum(length_k, first_row + BLOCK_M + length_k - length_q)
        seen_by_all = tl.minimum(length_k, first_row + 1 + length_k - length_q)
    return lead, first_full, tl.maximum(seen_by_all // BLOCK_N * BLOCK_N, first_full), end


@triton.jit
def visible_keys(rows, columns, skip, length_q, length_k, CAUSAL: tl.constexpr):
    """Which of these query rows see which of these keys, [len(rows), len(columns)]."""
    visible = ((columns >= skip) & (columns < length_k))[None, :]
    if CAUSAL:
        visible = visible & not_later(rows, columns, length_q, length_k)
    return visible


@triton.jit
def not_later(rows, columns, length_q, length_k):
    """The causal mask, [len(rows), len(columns)]: the last query is aligned with the last key."""
    return columns[None, :] <= rows[:, None] + (length_k - length_q)


@triton.jit
def drop(weights, rows, first_column, coordinates, HAS_DROPOUT: tl.constexpr):
    """Weights with the dropped ones zero, not rescaled."""
    if HAS_DROPOUT:
        seed, threshold, head, segment = coordinates
        keep = keep_mask_interleaved(seed, threshold, rows, first_column, head, segment, weights.shape[1])
        # A zero that the compiler cannot know: before a literal one it would round to half precision first, to select half words.
        weights = tl.where(keep, weights, 0.0 * threshold.to(tl.float32))
    return weights


@triton.jit
def forward_block(
    acc, row_max, row_sum, q, key_ptr, value_ptr, stride_key_n, stride_value_n, rows, first_column, skip, length_q, length_k,
    scale_log2, coordinates,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds one block of keys into the running softmax; MASKED where not every row sees all of it."""
    columns = first_column + interleaved_columns(BLOCK_N)
    real = (columns >= skip) & (columns < length_k) if MASKED else None
    k = load_rows(key_ptr, columns, stride_key_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(value_ptr, columns, stride_value_n, real, HEAD_DIM, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible_keys(rows, columns, skip, length_q, length_k, CAUSAL), scores, float("-inf"))
    # The scale is positive, so it may follow the maximum; one fused multiply-add then prepares each exponent.
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    weights = drop(weights, rows, first_column, coordinates, HAS_DROPOUT)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def gradient_block(
    q, k, v, dout, lse, delta, visible, rows, first_column, scale_log2, coordinates,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, gradient of the scores / (scale · rescale)), both float32 [len(rows), len(k)].

    lse, delta: the rows' statistics; delta None where the tile has every key of them, from which it follows.
    visible: [len(rows), len(k)]; None where masked keys do no harm.
    """
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dropped = drop(weights, rows, first_column, coordinates, HAS_DROPOUT)
    dweights = tl.dot(dout, v.T, input_precision=PRECISION)
    if delta is None:
        delta = tl.sum(dropped * dweights, 1)
    return dropped, dropped * dweights - weights * delta[:, None]


@triton.jit
def dq_block(
    acc, q, dout, lse, delta, key_ptr, value_ptr, stride_key_n, stride_value_n, rows, first_column, skip, length_q, length_k,
    scale_log2, coordinates,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one block of keys gives dq; MASKED where not every row sees all of it."""
    columns = first_column + interleaved_columns(BLOCK_N)
    real = (columns >= skip) & (columns < length_k) if MASKED else None
    k = load_rows(key_ptr, columns, stride_key_n, real, HEAD_DIM, BLOCK_D)
    v = load_rows(value_ptr, columns, stride_value_n, real, HEAD_DIM, BLOCK_D)
    visible = visible_keys(rows, columns, skip, length_q, length_k, CAUSAL) if MASKED else None
    _, dscores = gradient_block(
        q, k, v, dout, lse, delta, visible, rows, first_column, scale_log2, coordinates, HAS_DROPOUT, PRECISION
    )
    return tl.dot(dscores.to(k.dtype), k, acc, input_precision=PRECISION)
