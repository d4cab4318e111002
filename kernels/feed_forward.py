"""The backward pass of y = GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂, of which the pre-activation u is kept.

The gradient of GELU's result, dy W₂, is as wide as u and read once: so GELU′(u) and the partial sums of b₁'s gradient are the
epilogue of that product, on its float32 accumulators, and du = (dy W₂) ⊙ GELU′(u) is all that is written; GELU(u), for W₂'s
gradient, beside it where it was not kept. The other products are plain GEMMs, cuBLAS's where the host knows the number of rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from roberta_fast.kernels import persistent, tuning
from roberta_fast.kernels.column_sum import column_sum, sum_partials
from roberta_fast.kernels.gelu import gelu, gelu_derivative
from roberta_fast.kernels.linear import matmul_tile, product_gradients, tile_of_program
from roberta_fast.kernels.persistent import halves_of, product_of_tile


@triton.jit
def feed_forward_bwd_kernel(
    dy_ptr, weight_ptr, u_ptr, du_ptr, activated_ptr, dbias_partials_ptr, count_ptr,
    N, M, K, stride_dy_n, stride_dy_k, stride_weight_k, stride_weight_m, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of du, the sums of du over its rows, and GELU(u) unless activated_ptr is None; the rest as ``linear_fwd_kernel``.

    dy_ptr: [N, K]. weight_ptr: [K, M]. u_ptr, du_ptr, activated_ptr: contiguous [N, M]. dbias_partials_ptr: float32
    [cdiv(N, BLOCK_M), M], every element of which is written, or None where nobody wants the bias's gradient.
    """
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    program = tl.program_id(0)
    if program >= tiles_m * tiles_n:
        # Behind the real rows; but the partial sums of all tiles are added up.
        if dbias_partials_ptr is not None:
            columns = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            nothing = tl.zeros([BLOCK_N], tl.float32)
            tl.store(dbias_partials_ptr + (program // tiles_n).to(tl.int64) * M + columns, nothing, mask=columns < M)
        return
    tile_m, tile_n = tile_of_program(program, tiles_m, tiles_n, GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dactivated = matmul_tile(
        dy_ptr, weight_ptr, rows, columns, 0, K, real, M, stride_dy_n, stride_dy_k, stride_weight_k, stride_weight_m,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    # Half of the columns at a time: so the epilogue takes no more registers than the product.
    halves = halves_of(dactivated)
    for half in tl.static_range(2):
        _finish(
            halves[half], u_ptr, du_ptr, activated_ptr, dbias_partials_ptr, tile_m, tile_m * BLOCK_M,
            tile_n * BLOCK_N + half * (BLOCK_N // 2), real, M, TANH,
        )  # fmt: skip


@triton.jit
def feed_forward_bwd_persistent_kernel(
    dy_desc, weight_desc, u_ptr, du_ptr, activated_ptr, dbias_partials_ptr, count_ptr, N, M, K, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, B_HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """``feed_forward_bwd_kernel`` by ``persistent.product_of_tile``: all tiles, several a program."""
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of_program(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        dactivated = product_of_tile(dy_desc, weight_desc, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K, B_HAS_ROWS)
        halves = halves_of(dactivated)
        is_real = (row + tl.arange(0, BLOCK_M) < real)[:, None]
        for half in tl.static_range(2):
            quarters = halves_of(halves[half])
            for quarter in tl.static_range(2):
                # What the rows behind hold was multiplied too, and must not reach the sums over rows.
                part = tl.where(is_real, quarters[quarter], 0.0)
                first = column + (2 * half + quarter) * (BLOCK_N // 4)
                _finish(part, u_ptr, du_ptr, activated_ptr, dbias_partials_ptr, tile_m, row, first, real, M, TANH)
    if dbias_partials_ptr is not None:
        partials_m = tl.cdiv(N, BLOCK_M)
        for tile in tl.range(tiles_m * tiles_n + tl.program_id(0), partials_m * tiles_n, tl.num_programs(0)):
            columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            nothing = tl.zeros([BLOCK_N], tl.float32)
            tl.store(dbias_partials_ptr + (tile // tiles_n).to(tl.int64) * M + columns, nothing, mask=columns < M)


@triton.jit
def _finish(
    dactivated, u_ptr, du_ptr, activated_ptr, dbias_partials_ptr, tile_m, row, column, real, M, TANH: tl.constexpr
):  # fmt: skip
    """Stores du, what of it goes into the bias's gradient, and GELU(u), of the tile that begins at ``row`` and ``column``."""
    block_rows, block_columns = tl.arange(0, dactivated.shape[0]), tl.arange(0, dactivated.shape[1])
    columns = column + block_columns
    inside = (row + block_rows < real)[:, None] & (columns < M)[None, :]
    # Beyond the tile's first element int32 does, and saves registers.
    offsets = block_rows[:, None] * M + block_columns[None, :]
    begin = row.to(tl.int64) * M + column
    u = tl.load(u_ptr + begin + offsets, mask=inside, other=0.0).to(tl.float32)
    if activated_ptr is not None:
        tl.store(activated_ptr + begin + offsets, gelu(u, activated_ptr.dtype.element_ty, TANH), mask=inside)
    du = dactivated * gelu_derivative(u, du_ptr.dtype.element_ty, TANH)
    tl.store(du_ptr + begin + offsets, du, mask=inside)
    if dbias_partials_ptr is not None:
        tl.store(dbias_partials_ptr + tile_m.to(tl.int64) * M + columns, tl.sum(du, axis=0), mask=columns < M)


def feed_forward_bwd(
    dy: torch.Tensor,
    u: torch.Tensor,
    activated: torch.Tensor | None,
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    needs: Sequence[bool],
    approximate: str,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(dx [N, K], dweight1 [M, K], dbias1 [M], dweight2 [L, M], dbias2 [L]), each empty unless ``needs`` says so.

    dy: [N, L]; u: [N, M], contiguous; activated: GELU(u), or None where it has to be computed again. Sums are over the real rows
    alone, in an order that is the same from run to run.
    """
    (n, m), empty = u.shape, dy.new_empty(0)
    needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = needs
    again = needs_weight2 and activated is None
    du, activated = torch.empty_like(u), torch.empty_like(u) if again else activated
    choice = persistent.choose(dy, weight2)
    tile = choice[2] if choice else tuning.pointer_gemm(dy, weight2)
    tiles_m = triton.cdiv(n, tile["BLOCK_M"])
    partials = dy.new_empty(tiles_m, m, dtype=torch.float32) if needs_bias1 else None
    outputs, sizes = (u, du, activated if again else None, partials), (n, m, dy.shape[1])
    tanh = approximate == "tanh"
    if choice:
        grid, descriptors, _ = choice
        feed_forward_bwd_persistent_kernel[grid](*descriptors, *outputs, count, *sizes, TANH=tanh, **tile)
    else:
        # Hopper then runs two programs on a multiprocessor. Blackwell does so unasked; elsewhere the product alone takes more.
        limit = {"maxnreg": 128} if tuning.chip_of(u).generation == 90 and not again else {}
        feed_forward_bwd_kernel[(tiles_m * triton.cdiv(m, tile["BLOCK_N"]),)](
            dy, weight2, *outputs, count, *sizes, *dy.stride(), *weight2.stride(), TANH=tanh, **tile, **limit
        )
    dx, dweight1 = product_gradients(du, x, weight1, count, needs_x, needs_weight1)
    _, dweight2 = product_gradients(dy, activated, weight2, count, False, needs_weight2)
    dbias1 = sum_partials(partials, dy.dtype) if needs_bias1 else empty
    return dx, dweight1, dbias1, dweight2, column_sum(dy, count) if needs_bias2 else empty
