"""y = x Wᵀ + b (+ residual) over packed rows whose number only the device knows, and its gradients.

One GEMM body, ``matmul_tile``, accumulates in float32 and reads nothing outside the given row, column and reduction bounds; so
rows behind ``count`` are never read. It serves the forward pass, dx = dy W (the same kernel with the weight's strides swapped)
and dW = dyᵀ x, a reduction over the rows; where ``persistent.py`` has a faster one, that serves the first two. dW of a
hidden-by-hidden weight has fewer tiles than the chip has multiprocessors: there the rows are split among programs too, and
``column_sum.sum_partials`` adds their partial sums in a fixed order.
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels import persistent, tuning
from roberta_fast.kernels.column_sum import column_sum, sum_partials
from roberta_fast.kernels.persistent import halves_of, product_of_tile


@triton.jit
def matmul_tile(
    a_ptr, b_ptr, rows, columns, first, last, M, N, stride_a_m, stride_a_k, stride_b_k, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum over k in [first, last) of A[rows, k] B[k, columns], float32 [BLOCK_M, BLOCK_N].

    rows, columns: int [BLOCK_M], [BLOCK_N], those from M and from N on are read as zeros. Strides in elements.
    PRECISION: how float32 operands are multiplied, "ieee" or "tf32".
    """
    steps = tl.arange(0, BLOCK_K)
    far_steps = (first + steps).to(tl.int64)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * stride_a_m + far_steps[None, :] * stride_a_k
    b_ptrs = b_ptr + far_steps[:, None] * stride_b_k + columns.to(tl.int64)[None, :] * stride_b_n
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(first, last, BLOCK_K):
        a = tl.load(a_ptrs, mask=(rows < M)[:, None] & (steps < last - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(steps < last - k)[:, None] & (columns < N)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_a_k
        b_ptrs += BLOCK_K * stride_b_k
    return sums


@triton.jit
def tile_of_program(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a program's tile: GROUP_M rows of tiles column by column, so that neighbours share operands in L2."""
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, count_ptr,
    N, M, K, stride_x_n, stride_x_k, stride_weight_k, stride_weight_m, stride_residual_n, stride_residual_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y [N, M], contiguous; bias_ptr [M] and residual_ptr [N, M] may be None.

    count_ptr: int32 [1], how many rows are real, or None; programs behind them exit at once. Tiles are BLOCK_M rows of x by
    BLOCK_N rows of the weight.
    """
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    program = tl.program_id(0)
    if program >= tiles_m * tiles_n:
        return
    tile_m, tile_n = tile_of_program(program, tiles_m, tiles_n, GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = matmul_tile(
        x_ptr, weight_ptr, rows, columns, 0, K, real, M, stride_x_n, stride_x_k, stride_weight_k, stride_weight_m,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    _finish(y, bias_ptr, residual_ptr, y_ptr, rows, columns, real, M, stride_residual_n, stride_residual_m)


@triton.jit
def linear_fwd_persistent_kernel(
    x_desc, weight_desc, bias_ptr, residual_ptr, y_ptr, count_ptr, N, M, K, stride_residual_n, stride_residual_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, B_HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """``linear_fwd_kernel`` by ``persistent.product_of_tile``: all tiles of y [N, M], several a program."""
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of_program(tile, tiles_m, tiles_n, GROUP_M)
        y = product_of_tile(
            x_desc, weight_desc, tile_m * BLOCK_M, tile_n * BLOCK_N, K, BLOCK_M, BLOCK_N, BLOCK_K, B_HAS_ROWS
        )  # fmt: skip
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        halves = halves_of(y)
        for half in tl.static_range(2):
            columns = tile_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            _finish(
                halves[half], bias_ptr, residual_ptr, y_ptr, rows, columns, real, M, stride_residual_n, stride_residual_m
            )  # fmt: skip


@triton.jit
def _finish(y, bias_ptr, residual_ptr, y_ptr, rows, columns, real, M, stride_residual_n, stride_residual_m):
    """Stores y + bias + residual at rows before ``real`` and columns before M, rounded once."""
    inside = (rows < real)[:, None] & (columns < M)[None, :]
    far_rows = rows.to(tl.int64)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < M, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        offsets = far_rows * stride_residual_n + columns.to(tl.int64)[None, :] * stride_residual_m
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + far_rows * M + columns[None, :], y, mask=inside)


@triton.jit
def linear_bwd_kernel(
    dy_ptr, x_ptr, dweight_ptr, count_ptr, N, M, K, stride_dy_n, stride_dy_m, stride_x_n, stride_x_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the weight's gradient over one share of the real rows.

    dweight_ptr: contiguous [num_programs(1), M, K]; program (_, s) sums the s-th share, in whole steps of BLOCK_K rows.
    """
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(real, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, real)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Where a share is empty there is nothing to do; and without this branch ptxas runs Hopper's products one by one.
    if first < last:
        dweight = matmul_tile(
            dy_ptr, x_ptr, rows, columns, first, last, M, K, stride_dy_m, stride_dy_n, stride_x_n, stride_x_k,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    offsets = (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * K + columns[None, :]
    tl.store(dweight_ptr + offsets, dweight, mask=(rows < M)[:, None] & (columns < K)[None, :])


def linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    count: torch.Tensor | None,
    deterministic: bool = False,
) -> torch.Tensor:
    """x [N, K] @ weight [M, K]ᵀ + bias [M] + residual [N, M] in x's dtype; rows from ``count`` on are left as they are.

    Each element is one program's sum in ascending k, in steps that are ``deterministic`` where that is asked for: fixed by the
    operands' type and alignment, not by how many rows there are.
    """
    return _rows_times(x, weight.mT, bias, residual, count, deterministic)


def linear_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, has_bias: bool, count: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx [N, K], dweight [M, K], dbias [M] or empty) of ``linear_fwd``, sums over the real rows alone."""
    dbias = column_sum(dy, count) if has_bias else dy.new_empty(0)
    return _rows_times(dy, weight, None, None, count), weight_gradient(dy, x, count), dbias


def product_gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    count: torch.Tensor | None,
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [N, K], dweight [M, K]) of x @ weightᵀ, each empty unless needed; by cuBLAS where the host knows the number of rows."""
    dx = dweight = dy.new_empty(0)
    if needs_x:
        dx = dy @ weight if count is None else _rows_times(dy, weight, None, None, count)
    if needs_weight:
        dweight = dy.mT @ x if count is None else weight_gradient(dy, x, count)
    return dx, dweight


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """dy [N, M]ᵀ @ x [N, K] over the rows before ``count``, [M, K] in x's dtype."""
    (n, m), k = dy.shape, x.shape[1]
    tile = tuning.pointer_gemm(dy, x)
    tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(k, tile["BLOCK_N"])
    # Two programs fit a multiprocessor; a share of fewer than four steps is not worth its partial sum.
    shares = min(2 * tuning.chip_of(x).multiprocessors // max(tiles, 1), n // (4 * tile["BLOCK_K"]))
    shares = max(shares, 1)
    out = x.new_empty(shares, m, k, dtype=torch.float32) if shares > 1 else x.new_empty(m, k)
    linear_bwd_kernel[(tiles, shares)](dy, x, out, count, n, m, k, *dy.stride(), *x.stride(), **tile)
    return sum_partials(out, x.dtype) if shares > 1 else out


def _rows_times(
    x: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    count: torch.Tensor | None,
    deterministic: bool = False,
) -> torch.Tensor:
    """x [N, K] @ matrix [K, M] + bias + residual over the real rows."""
    (n, k), m = x.shape, matrix.shape[1]
    y = x.new_empty(n, m)
    residual_strides = (0, 0) if residual is None else residual.stride()
    choice = persistent.choose(x, matrix, deterministic)
    if choice:
        grid, descriptors, sizes = choice
        linear_fwd_persistent_kernel[grid](*descriptors, bias, residual, y, count, n, m, k, *residual_strides, **sizes)
        return y
    tile = tuning.pointer_gemm(x, matrix)
    linear_fwd_kernel[(triton.cdiv(n, tile["BLOCK_M"]) * triton.cdiv(m, tile["BLOCK_N"]),)](
        x, matrix, bias, residual, y, count, n, m, k, *x.stride(), *matrix.stride(), *residual_strides, **tile
    )
    return y
