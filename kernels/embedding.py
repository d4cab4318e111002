"""Embeddings of a batch's tokens as packed rows: the formulas of ``roberta_fast/ops/embedding.py``.

A tile is whole rows, each gathered from its three tables and normalized in registers; statistics are float32. The kernel of the
backward pass gathers the sum again and takes the gradient through dropout, for LayerNorm's own kernel to go on with.
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels.add_layer_norm import dropout_factors, normalize, row_tile
from roberta_fast.kernels.dropout import keep_mask


@triton.jit
def embedding_fwd_kernel(
    ids_ptr, position_ids_ptr, token_type_ids_ptr, indices_ptr, word_ptr, position_ptr, token_type_ptr, weight_ptr, bias_ptr,
    y_ptr, mean_ptr, rstd_ptr, seed_ptr, count_ptr, N, S, C, words, positions, types, eps, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of rows; see ``_summed`` for the arguments. y_ptr: contiguous [N, C]. mean_ptr, rstd_ptr: float32 [N]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    if tl.program_id(0) * BLOCK_N >= real:
        return
    z, places, inside = _summed(
        ids_ptr, position_ids_ptr, token_type_ids_ptr, indices_ptr, word_ptr, position_ptr, token_type_ptr,
        real, S, C, words, positions, types, rows, columns,
    )  # fmt: skip
    y, mean, rstd = normalize(z, weight_ptr, bias_ptr, columns, inside, C, eps)
    if seed_ptr is not None:
        y = tl.where(keep_mask(tl.load(seed_ptr), threshold, places, 0, 0, 0, BLOCK_C), y * keep_scale, 0.0)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * C + columns[None, :], y, mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < real)
    tl.store(rstd_ptr + rows, rstd, mask=rows < real)


@triton.jit
def embedding_bwd_kernel(
    dy_ptr, ids_ptr, position_ids_ptr, token_type_ids_ptr, indices_ptr, word_ptr, position_ptr, token_type_ptr,
    z_ptr, through_dropout_ptr, seed_ptr, count_ptr, N, S, C, words, positions, types, stride_dy_n, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum z, float32 [N, C], and dy through the dropout, in dy's dtype, where seed_ptr and through_dropout_ptr are given."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    if tl.program_id(0) * BLOCK_N >= real:
        return
    z, places, inside = _summed(
        ids_ptr, position_ids_ptr, token_type_ids_ptr, indices_ptr, word_ptr, position_ptr, token_type_ptr,
        real, S, C, words, positions, types, rows, columns,
    )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(z_ptr + offsets, z, mask=inside)
    if through_dropout_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), threshold, places, 0, 0, 0, BLOCK_C)
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * stride_dy_n + columns[None, :], mask=inside, other=0.0)
        tl.store(through_dropout_ptr + offsets, tl.where(keep, dy.to(tl.float32) * keep_scale, 0.0), mask=inside)


@triton.jit
def _summed(
    ids_ptr, position_ids_ptr, token_type_ids_ptr, indices_ptr, word_ptr, position_ptr, token_type_ptr,
    real, S, C, words, positions, types, rows, columns,
):  # fmt: skip
    """(word + token type + position of a tile's rows, float32, zero outside; the rows' places; which elements are real).

    ids_ptr: integer [B * S]. position_ids_ptr: likewise; None: a place's position is its column. token_type_ids_ptr: likewise;
    None: all 0. indices_ptr: int64 [N], places; None: a row's place is its number. Tables are contiguous, of ``words``,
    ``positions`` and ``types`` rows; token_type_ptr may be None. real: how many rows there are.
    """
    is_real = rows < real
    inside = is_real[:, None] & (columns < C)[None, :]
    places = rows.to(tl.int64) if indices_ptr is None else tl.load(indices_ptr + rows, mask=is_real, other=0)
    word_ids = tl.load(ids_ptr + places, mask=is_real, other=0)
    z = _looked_up(word_ptr, word_ids, words, C, columns, is_real, inside)
    if token_type_ptr is not None:
        if token_type_ids_ptr is None:
            type_ids = tl.zeros_like(places)
        else:
            type_ids = tl.load(token_type_ids_ptr + places, mask=is_real, other=0)
        z += _looked_up(token_type_ptr, type_ids, types, C, columns, is_real, inside)
    if position_ids_ptr is None:
        position_ids = places % S
    else:
        position_ids = tl.load(position_ids_ptr + places, mask=is_real, other=0)
    z += _looked_up(position_ptr, position_ids, positions, C, columns, is_real, inside)
    return z, places, inside


@triton.jit
def _looked_up(table_ptr, ids, size, C, columns, is_real, inside):
    """Rows ``ids`` of a table of ``size`` rows as float32; fails on the device where it has no such row."""
    tl.device_assert((ids >= 0) & (ids < size), "an id is out of range for its table of embeddings", mask=is_real)
    return tl.load(table_ptr + ids.to(tl.int64)[:, None] * C + columns[None, :], mask=inside, other=0.0).to(tl.float32)


def embedding_fwd(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    indices: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [N, C] in word's dtype; mean, rstd, float32 [N])."""
    n, hidden = _rows(input_ids, indices), word.shape[1]
    y = word.new_empty(n, hidden)
    mean, rstd = (word.new_empty(n, dtype=torch.float32) for _ in range(2))
    if y.numel():
        ids, tables, sizes = _arguments(input_ids, position_ids, token_type_ids, indices, word, position, token_type)
        tile = row_tile(hidden, elements=16)
        embedding_fwd_kernel[(triton.cdiv(n, tile["BLOCK_N"]),)](
            *ids, *tables, weight.contiguous(), bias.contiguous(), y, mean, rstd, seed, count,
            n, input_ids.shape[1], hidden, *sizes, eps, *dropout_factors(dropout_p), **tile, **_CHECKED,
        )  # fmt: skip
    return y, mean, rstd


def embedding_bwd(
    dy: torch.Tensor,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    indices: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum that was normalized, float32 [N, C]; dy through the dropout, empty where nothing was dropped)."""
    z = dy.new_empty(dy.shape, dtype=torch.float32)
    through_dropout = dy.new_empty(dy.shape if dropout_p else (0,))
    if z.numel():
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        ids, tables, sizes = _arguments(input_ids, position_ids, token_type_ids, indices, word, position, token_type)
        tile = row_tile(dy.shape[1], elements=8)
        embedding_bwd_kernel[(triton.cdiv(dy.shape[0], tile["BLOCK_N"]),)](
            dy, *ids, *tables, z, through_dropout if dropout_p else None, seed, count,
            dy.shape[0], input_ids.shape[1], dy.shape[1], *sizes, dy.stride(0), *dropout_factors(dropout_p), **tile, **_CHECKED,
        )  # fmt: skip
    return z, through_dropout


# Assertions are compiled into kernels that are launched so; of what else that would add, overflow checks cost most.
_CHECKED = {"debug": True, "sanitize_overflow": False}


def _arguments(input_ids, position_ids, token_type_ids, indices, word, position, token_type):
    """What both kernels read: (ids, tables, the tables' numbers of rows), contiguous."""
    ids = [t if t is None else t.contiguous() for t in (input_ids, position_ids, token_type_ids, indices)]
    tables = [t if t is None else t.contiguous() for t in (word, position, token_type)]
    return ids, tables, [0 if table is None else table.shape[0] for table in tables]


def _rows(input_ids, indices):
    return input_ids.numel() if indices is None else indices.shape[0]
