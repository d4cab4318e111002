"""Rows of a padded batch, without the padding, and back: the contract of ``roberta_fast/ops/pack.py``.

Indices take two launches: the first counts each sequence's tokens, the second ranks them; both give a program to a sequence.
Rows are moved as integers of their size, so one kernel serves every dtype, bit by bit.
"""

import torch
import triton
import triton.language as tl

BLOCK_B = 1024
BLOCK_S = 1024
ELEMENTS_PER_PROGRAM = 4096
MOST_COLUMNS = 1024
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def pack_lengths_kernel(mask_ptr, lengths_ptr, query_only_ptr, S, stride_mask_b, stride_mask_s, BLOCK_S: tl.constexpr):
    """A sequence's number of rows, and whether its first is padding. mask_ptr: [B, S]; the others: int32 [B]."""
    sequence = tl.program_id(0)
    length = 0
    for first in tl.range(0, S, BLOCK_S):
        length += tl.sum(_kept(mask_ptr, sequence, first, S, stride_mask_b, stride_mask_s, BLOCK_S), axis=0)
    tl.store(lengths_ptr + sequence, length)
    first_token = tl.load(mask_ptr + sequence.to(tl.int64) * stride_mask_b)
    tl.store(query_only_ptr + sequence, (first_token == 0).to(tl.int32))


@triton.jit
def pack_indices_kernel(
    mask_ptr, lengths_ptr, indices_ptr, cu_seqlens_ptr, count_ptr, order_ptr, B, S, N, end, stride_mask_b, stride_mask_s,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A sequence's positions, its rank among the lengths, and its share of the rest of the indices, which is filled with ``end``.

    indices_ptr: int64 [N]; what does not fit is left out. end: B * S. cu_seqlens_ptr: int32 [B + 1]. count_ptr: int32 [1].
    order_ptr: int32 [B].
    """
    sequence = tl.program_id(0)
    length = tl.load(lengths_ptr + sequence)
    begin, total, rank = 0, 0, 0
    for first in tl.range(0, B, BLOCK_B):
        sequences = first + tl.arange(0, BLOCK_B)
        lengths = tl.load(lengths_ptr + sequences, mask=sequences < B, other=0)
        begin += tl.sum(tl.where(sequences < sequence, lengths, 0), axis=0)
        total += tl.sum(lengths, axis=0)
        # No sequence is shorter than one row, so that what lies behind the last comes before none.
        before = (lengths > length) | ((lengths == length) & (sequences < sequence))
        rank += tl.sum(before.to(tl.int32), axis=0)
    tl.store(order_ptr + rank, sequence)
    tl.store(cu_seqlens_ptr + sequence, begin)
    if sequence == B - 1:
        tl.store(cu_seqlens_ptr + B, total)
        tl.store(count_ptr, total)
    for first in tl.range(0, S, BLOCK_S):
        kept = _kept(mask_ptr, sequence, first, S, stride_mask_b, stride_mask_s, BLOCK_S)
        slots = begin + tl.cumsum(kept, axis=0) - 1
        positions = sequence.to(tl.int64) * S + first + tl.arange(0, BLOCK_S)
        tl.store(indices_ptr + slots, positions, mask=(kept > 0) & (slots < N))
        begin += tl.sum(kept, axis=0)
    for first in tl.range(sequence * BLOCK_S, N, B * BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        tl.store(indices_ptr + slots, tl.full([BLOCK_S], 0, tl.int64) + end, mask=(slots >= total) & (slots < N))


@triton.jit
def _kept(mask_ptr, sequence, first, S, stride_mask_b, stride_mask_s, BLOCK_S: tl.constexpr):
    """int32 [BLOCK_S], 1 at positions from ``first`` on that are kept: real tokens and position 0."""
    positions = first + tl.arange(0, BLOCK_S)
    offsets = sequence.to(tl.int64) * stride_mask_b + positions.to(tl.int64) * stride_mask_s
    real = tl.load(mask_ptr + offsets, mask=positions < S, other=0) != 0
    return ((real | (positions == 0)) & (positions < S)).to(tl.int32)


@triton.jit
def pack_kernel(
    x_ptr, indices_ptr, y_ptr, count_ptr, N, S, C, end, stride_x_b, stride_x_s, stride_x_c,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [N, C], contiguous: the rows of x [B, S, C] at indices [N]; one from ``end`` = B * S on reads as zeros."""
    rows, columns, index, inside = _tile(indices_ptr, count_ptr, N, C, BLOCK_N, BLOCK_C)
    source = (index // S) * stride_x_b + (index % S) * stride_x_s
    offsets = source[:, None] + columns[None, :] * stride_x_c
    y = tl.load(x_ptr + offsets, mask=inside & (index < end)[:, None], other=0)
    tl.store(y_ptr + rows[:, None] * C + columns[None, :], y, mask=inside)


@triton.jit
def unpack_kernel(
    rows_ptr, indices_ptr, out_ptr, count_ptr, N, C, end, stride_rows_n, stride_rows_c,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stores rows [N, C] into the contiguous out [end, C] at indices [N]; one from ``end`` on is dropped."""
    rows, columns, index, inside = _tile(indices_ptr, count_ptr, N, C, BLOCK_N, BLOCK_C)
    row = tl.load(rows_ptr + rows[:, None] * stride_rows_n + columns[None, :] * stride_rows_c, mask=inside, other=0)
    tl.store(out_ptr + index[:, None] * C + columns[None, :], row, mask=inside & (index < end)[:, None])


@triton.jit
def _tile(indices_ptr, count_ptr, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows, columns, indices of the rows, which elements are real) of a program's tile, all but the last int64."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    index = tl.load(indices_ptr + rows, mask=rows < real, other=0)
    return rows, columns, index, (rows < real)[:, None] & (columns < C)[None, :]


def pack_indices(mask: torch.Tensor, capacity: int | None) -> tuple[torch.Tensor, ...]:
    """(indices int64 [N], cu_seqlens int32 [B + 1], count int32 [1], query_only int32 [B], order int32 [B]) of a mask [B, S].

    N is ``capacity``; without one the host waits for the device to know it. More real tokens than ``capacity`` fail there.
    """
    batch, seqlen = mask.shape
    mask = mask != 0 if mask.is_floating_point() or mask.is_complex() else mask
    mask = mask.view(torch.int8) if mask.dtype == torch.bool else mask
    lengths, cu_seqlens, count, query_only, order = (
        torch.empty(size, dtype=torch.int32, device=mask.device) for size in (batch, batch + 1, 1, batch, batch)
    )
    if batch == 0:
        indices = torch.zeros(capacity or 0, dtype=torch.int64, device=mask.device)
        return indices, cu_seqlens.zero_(), count.zero_(), query_only, order
    pack_lengths_kernel[(batch,)](mask, lengths, query_only, seqlen, *mask.stride(), BLOCK_S=BLOCK_S)
    n = int(lengths.sum()) if capacity is None else capacity
    indices = torch.empty(n, dtype=torch.int64, device=mask.device)
    pack_indices_kernel[(batch,)](
        mask, lengths, indices, cu_seqlens, count, order, batch, seqlen, n, batch * seqlen, *mask.stride(),
        BLOCK_B=BLOCK_B, BLOCK_S=BLOCK_S,
    )  # fmt: skip
    if capacity is not None:
        torch._assert_async(count <= capacity, f"mask has more real tokens than capacity={capacity}")
    return indices, cu_seqlens, count, query_only, order


def pack(x: torch.Tensor, indices: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """The rows of x [B, S, C] at indices int64 [N], [N, C]; those from ``count`` on are left as they are."""
    (batch, seqlen, columns), n = x.shape, indices.shape[0]
    y = x.new_empty(n, columns)
    x_bits, y_bits = _as_integers(x), _as_integers(y)
    grid, tile = _tiles(n, y_bits.shape[1])
    pack_kernel[grid](
        x_bits, indices.contiguous(), y_bits, count, n, seqlen, y_bits.shape[1], batch * seqlen, *x_bits.stride(), **tile
    )
    return y


def unpack(rows: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int, count: torch.Tensor | None) -> torch.Tensor:
    """rows [N, C] at their places in [batch, seqlen, C], zeros elsewhere; those from ``count`` on are not read."""
    out = rows.new_zeros(batch, seqlen, rows.shape[1])
    row_bits, out_bits = _as_integers(rows), _as_integers(out)
    grid, tile = _tiles(rows.shape[0], row_bits.shape[1])
    unpack_kernel[grid](
        row_bits, indices.contiguous(), out_bits, count, *row_bits.shape, batch * seqlen, *row_bits.stride(), **tile
    )
    return out


def _as_integers(t: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the elements' size; 16-byte elements as two."""
    return t.view(INTEGERS[min(t.element_size(), 8)])


def _tiles(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, block sizes) that cover rows × columns."""
    block_c = min(MOST_COLUMNS, triton.next_power_of_2(max(columns, 1)))
    block_n = ELEMENTS_PER_PROGRAM // block_c
    return (triton.cdiv(rows, block_n), triton.cdiv(columns, block_c)), {"BLOCK_N": block_n, "BLOCK_C": block_c}
