"""y = LayerNorm(residual + dropout(x)) over packed rows: the formulas of ``roberta_fast/ops/add_layer_norm.py``.

A tile is whole rows, so a row is read once; statistics are float32. The backward pass recomputes residual + dropout(x). Its
programs each walk over a share of the rows and keep partial sums of the weight's and the bias's gradient in registers, which
``column_sum.sum_partials`` adds up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels.column_sum import row_programs, sum_partials
from roberta_fast.kernels.dropout import keep_mask
from roberta_fast.kernels.fp8 import to_e4m3
from roberta_fast.ops import dropout


@triton.jit
def add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, inverse_ptr, y_ptr, q_ptr, mean_ptr, rstd_ptr, seed_ptr, count_ptr,
    dropout_rows_ptr,
    N, C, stride_x_n, stride_residual_n, eps, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of rows; see ``_pre_norm`` for the arguments. y_ptr: contiguous [N, C].

    q_ptr: y · inverse in eight bits, likewise, with inverse_ptr float32 [C]; or in their place mean_ptr, rstd_ptr: float32 [N].
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    if tl.program_id(0) * BLOCK_N >= real:
        return
    inside = (rows < real)[:, None] & (columns < C)[None, :]
    z, _ = _pre_norm(
        x_ptr, residual_ptr, seed_ptr, dropout_rows_ptr, stride_x_n, stride_residual_n, threshold, keep_scale,
        rows, real, columns, inside, BLOCK_C,
    )  # fmt: skip
    y, mean, rstd = normalize(z, weight_ptr, bias_ptr, columns, inside, C, eps)
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(y_ptr + offsets, y, mask=inside)
    if q_ptr is not None:
        inverse = tl.load(inverse_ptr + columns, mask=columns < C, other=0.0)
        tl.store(q_ptr + offsets, to_e4m3(y * inverse[None, :]), mask=inside)
    else:
        tl.store(mean_ptr + rows, mean, mask=rows < real)
        tl.store(rstd_ptr + rows, rstd, mask=rows < real)


@triton.jit
def normalize(z, weight_ptr, bias_ptr, columns, inside, C, eps):
    """(LayerNorm's result, mean, rstd) of a float32 tile of whole rows, zero outside; weight_ptr, bias_ptr: [C]."""
    mean = tl.sum(z, axis=1) / C
    centered = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / C + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    return centered * rstd[:, None] * weight[None, :] + bias[None, :], mean, rstd


@triton.jit
def add_layer_norm_bwd_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, count_ptr, dropout_rows_ptr,
    dz_ptr, dx_ptr, dweight_partials_ptr, dbias_partials_ptr,
    N, C, stride_dy_n, stride_x_n, stride_residual_n, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every num_programs(0)-th tile of rows.

    dz_ptr, dx_ptr: contiguous [N, C]; dx_ptr None without dropout. Partials: float32 [num_programs(0), C]. Others as forward.
    """
    program, columns = tl.program_id(0), tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in tl.range(program * BLOCK_N, real, tl.num_programs(0) * BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside = (rows < real)[:, None] & (columns < C)[None, :]
        z, keep = _pre_norm(
            x_ptr, residual_ptr, seed_ptr, dropout_rows_ptr, stride_x_n, stride_residual_n, threshold, keep_scale,
            rows, real, columns, inside, BLOCK_C,
        )  # fmt: skip
        mean = tl.load(mean_ptr + rows, mask=rows < real, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < real, other=0.0)
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * stride_dy_n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        normalized = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
        g = dy * weight[None, :]
        along_ones = tl.sum(g, axis=1) / C
        along_normalized = tl.sum(g * normalized, axis=1) / C
        dz = rstd[:, None] * (g - along_ones[:, None] - normalized * along_normalized[:, None])
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(dz_ptr + offsets, dz, mask=inside)
        if dx_ptr is not None:
            tl.store(dx_ptr + offsets, tl.where(keep, dz * keep_scale, 0.0), mask=inside)
        dweight += dy * normalized
        dbias += dy
    offsets = program.to(tl.int64) * C + columns
    tl.store(dweight_partials_ptr + offsets, tl.sum(dweight, axis=0), mask=columns < C)
    tl.store(dbias_partials_ptr + offsets, tl.sum(dbias, axis=0), mask=columns < C)


@triton.jit
def _pre_norm(
    x_ptr, residual_ptr, seed_ptr, dropout_rows_ptr, stride_x_n, stride_residual_n, threshold, keep_scale,
    rows, real, columns, inside, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(residual + dropout(x) as a float32 tile, zero outside; which of x's elements are kept).

    x_ptr, residual_ptr: [N, C], rows stride_*_n elements apart; residual_ptr may be None. seed_ptr: int64 [1]; None: nothing is
    dropped. dropout_rows_ptr: int64 [N], the rows' coordinates in dropout; None: their numbers. threshold, keep_scale: those of
    ``roberta_fast/ops/dropout.py``. real: how many rows are; inside: which elements.
    """
    far_rows = rows.to(tl.int64)[:, None]
    z = tl.load(x_ptr + far_rows * stride_x_n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    keep = inside
    if seed_ptr is not None:
        numbers = rows if dropout_rows_ptr is None else tl.load(dropout_rows_ptr + rows, mask=rows < real, other=0)
        keep = keep_mask(tl.load(seed_ptr), threshold, numbers, 0, 0, 0, BLOCK_C)
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + far_rows * stride_residual_n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return z, keep


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    count: torch.Tensor | None,
    dropout_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [N, C] in the dtype of residual, or of x without one; mean, rstd, float32 [N])."""
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    _forward(x, residual, weight, bias, None, eps, dropout_p, (y, None, mean, rstd), seed, count, dropout_rows)
    return y, mean, rstd


def add_layer_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    inverse: torch.Tensor,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y as ``add_layer_norm_fwd`` has it without dropout; y · inverse [C] in float8_e4m3fn)."""
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    _forward(x, residual, weight, bias, inverse, eps, 0.0, (y, q, None, None), None, count, None)
    return y, q


def _forward(x, residual, weight, bias, inverse, eps, dropout_p, results, seed, count, dropout_rows):
    """Fills ``results``: y, and y in eight bits or mean and rstd, those that are not None."""
    n, hidden = x.shape
    x, residual, weight, bias = (_unit_stride(t) for t in (x, residual, weight, bias))
    tile = row_tile(hidden, elements=16)
    if x.numel():
        add_layer_norm_fwd_kernel[(triton.cdiv(n, tile["BLOCK_N"]),)](
            x, residual, weight, bias, inverse, *results, seed, count, _unit_stride(dropout_rows),
            n, hidden, x.stride(0), 0 if residual is None else residual.stride(0), eps, *dropout_factors(dropout_p), **tile,
        )  # fmt: skip


def add_layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    count: torch.Tensor | None,
    dropout_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz [N, C] in the forward result's dtype; dx [N, C], empty without dropout; dweight, dbias [C])."""
    n, hidden = x.shape
    dz = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    dx = x.new_empty(x.shape if dropout_p else (0,))
    dy, x, residual, weight = (_unit_stride(t) for t in (dy, x, residual, weight))
    tile = row_tile(hidden, elements=8)
    programs = row_programs(x, 1, tile["BLOCK_N"])
    dweight, dbias = (x.new_empty(programs, hidden, dtype=torch.float32) for _ in range(2))
    add_layer_norm_bwd_kernel[(programs,)](
        dy, x, residual, weight, mean, rstd, seed, count, _unit_stride(dropout_rows),
        dz, dx if dropout_p else None, dweight, dbias,
        n, hidden, dy.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), *dropout_factors(dropout_p), **tile,
    )  # fmt: skip
    return dz, dx, sum_partials(dweight, weight.dtype), sum_partials(dbias, weight.dtype)


def row_tile(hidden: int, elements: int) -> dict[str, int]:
    """Whole rows, 2,048 elements or one row a program, ``elements`` a thread; the same for a row whatever is in the batch."""
    block_c = max(8, triton.next_power_of_2(hidden))
    block_n = max(1, 2048 // block_c)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": min(16, block_n * block_c // (32 * elements))}


def dropout_factors(p: float) -> tuple[int, float]:
    """What kernels know of dropout's probability."""
    return dropout.threshold(p), dropout.scale(p)


def _unit_stride(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t``, copied where its last dimension is not contiguous."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()
