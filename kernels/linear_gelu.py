"""y = GELU(x Wᵀ + b) with GELU in the GEMM's epilogue, on the float32 accumulators, and its gradients.

Only the pre-activation u is kept. Backward: one element-wise pass makes du = dy GELU′(u) and partial sums of the bias's gradient
on its way; then dx = du W and dW = duᵀ x are plain GEMMs, cuBLAS's where the host knows the number of rows.
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels import persistent, tuning
from roberta_fast.kernels.column_sum import COLUMNS_PER_PROGRAM, ROWS_PER_STEP, row_programs, sum_partials
from roberta_fast.kernels.gelu import gelu, gelu_derivative
from roberta_fast.kernels.linear import matmul_tile, product_gradients, tile_of_program
from roberta_fast.kernels.persistent import halves_of, product_of_tile


@triton.jit
def linear_gelu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, u_ptr, count_ptr,
    N, M, K, stride_x_n, stride_x_k, stride_weight_m, stride_weight_k, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y and, unless u_ptr is None, of u, both contiguous [N, M]; the rest as ``linear_fwd_kernel``.

    TANH: the tanh form in place of the exact one.
    """
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    program = tl.program_id(0)
    if program >= tiles_m * tiles_n:
        return
    tile_m, tile_n = tile_of_program(program, tiles_m, tiles_n, GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    u = matmul_tile(
        x_ptr, weight_ptr, rows, columns, 0, K, real, M, stride_x_n, stride_x_k, stride_weight_k, stride_weight_m,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    _finish(u, bias_ptr, y_ptr, u_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N, real, M, TANH)


@triton.jit
def linear_gelu_fwd_persistent_kernel(
    x_desc, weight_desc, bias_ptr, y_ptr, u_ptr, count_ptr, N, M, K, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, B_HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """``linear_gelu_fwd_kernel`` by ``persistent.product_of_tile``: all tiles of y and u [N, M], several a program."""
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of_program(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        u = product_of_tile(x_desc, weight_desc, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K, B_HAS_ROWS)
        halves = halves_of(u)
        for half in tl.static_range(2):
            _finish(halves[half], bias_ptr, y_ptr, u_ptr, row, column + half * (BLOCK_N // 2), real, M, TANH)


@triton.jit
def _finish(u, bias_ptr, y_ptr, u_ptr, row, column, real, M, TANH: tl.constexpr):
    """Stores GELU(u + bias), and u + bias unless u_ptr is None, of the tile u that begins at ``row`` and ``column``."""
    block_rows, block_columns = tl.arange(0, u.shape[0]), tl.arange(0, u.shape[1])
    columns = column + block_columns
    inside = (row + block_rows < real)[:, None] & (columns < M)[None, :]
    # Beyond the tile's first element int32 does, and saves the registers by which two programs fit a multiprocessor.
    offsets = block_rows[:, None] * M + block_columns[None, :]
    begin = row.to(tl.int64) * M + column
    if bias_ptr is not None:
        u += tl.load(bias_ptr + columns, mask=columns < M, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + begin + offsets, gelu(u, y_ptr.dtype.element_ty, TANH), mask=inside)
    if u_ptr is not None:
        tl.store(u_ptr + begin + offsets, u, mask=inside)


@triton.jit
def linear_gelu_bwd_kernel(
    dy_ptr, u_ptr, du_ptr, dbias_partials_ptr, count_ptr, N, M, stride_dy_n, stride_dy_m,
    TANH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """du of a block of columns for every num_programs(0)-th block of real rows, and partial sums of du over them.

    u_ptr, du_ptr: contiguous [N, M]. dbias_partials_ptr: float32 [num_programs(0), M], or None where there is no bias.
    """
    program, columns = tl.program_id(0), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    dbias = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(program * BLOCK_N, real, tl.num_programs(0) * BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside = (rows < real)[:, None] & (columns < M)[None, :]
        far_rows = rows.to(tl.int64)[:, None]
        dy_offsets = far_rows * stride_dy_n + columns.to(tl.int64)[None, :] * stride_dy_m
        dy = tl.load(dy_ptr + dy_offsets, mask=inside, other=0.0).to(tl.float32)
        offsets = far_rows * M + columns[None, :]
        u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        du = dy * gelu_derivative(u, du_ptr.dtype.element_ty, TANH)
        tl.store(du_ptr + offsets, du, mask=inside)
        dbias += du
    if dbias_partials_ptr is not None:
        tl.store(dbias_partials_ptr + program.to(tl.int64) * M + columns, tl.sum(dbias, axis=0), mask=columns < M)


def linear_gelu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    save_preactivation: bool,
    count: torch.Tensor | None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(GELU(u), u) in x's dtype with u = x [N, K] @ weight [M, K]ᵀ + bias [M]; u is empty unless it is to be saved.

    deterministic: as in ``linear_fwd``.
    """
    (n, k), m = x.shape, weight.shape[0]
    y, u = x.new_empty(n, m), x.new_empty((n, m) if save_preactivation else (0,))
    preactivation = u if save_preactivation else None
    choice = persistent.choose(x, weight.mT, deterministic)
    if choice:
        grid, descriptors, sizes = choice
        linear_gelu_fwd_persistent_kernel[grid](
            *descriptors, bias, y, preactivation, count, n, m, k, TANH=approximate == "tanh", **sizes
        )
        return y, u
    tile = tuning.pointer_gemm(x, weight)
    linear_gelu_fwd_kernel[(triton.cdiv(n, tile["BLOCK_M"]) * triton.cdiv(m, tile["BLOCK_N"]),)](
        x, weight, bias, y, preactivation, count,
        n, m, k, *x.stride(), *weight.stride(), TANH=approximate == "tanh", **tile,
    )  # fmt: skip
    return y, u


def linear_gelu_bwd(
    dy: torch.Tensor,
    u: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    has_bias: bool,
    approximate: str,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx [N, K], dweight [M, K], dbias [M] or empty) of ``linear_gelu_fwd``, sums over the real rows alone."""
    n, m = u.shape
    du = torch.empty_like(u)
    column_blocks = triton.cdiv(m, COLUMNS_PER_PROGRAM)
    programs = row_programs(u, column_blocks)
    partials = u.new_empty(programs, m, dtype=torch.float32) if has_bias else None
    linear_gelu_bwd_kernel[(programs, column_blocks)](
        dy, u, du, partials, count, n, m, *dy.stride(),
        TANH=approximate == "tanh", BLOCK_N=ROWS_PER_STEP, BLOCK_M=COLUMNS_PER_PROGRAM, num_warps=8,
    )  # fmt: skip
    dbias = sum_partials(partials, weight.dtype) if has_bias else weight.new_empty(0)
    return *product_gradients(du, x, weight, count), dbias
