"""Sums over rows, in two stages of fixed order: bitwise the same from run to run, without atomics.

First each of some programs sums its share of the rows, in float32; then the partial sums are added up. Kernels that have the
rows in hand anyway, as the backward passes have, write partial sums of their own and take the second stage alone.
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels import tuning

ROWS_PER_STEP = 32
COLUMNS_PER_PROGRAM = 128
# So many fit a multiprocessor at once with eight warps and 85 registers a thread; one more would run after them, alone.
PROGRAMS_PER_MULTIPROCESSOR = 3


@triton.jit
def column_sum_kernel(x_ptr, partials_ptr, count_ptr, N, C, stride_x_n, stride_x_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Partial sums of a block of columns over every num_programs(0)-th block of real rows.

    x_ptr: [N, C], its strides in elements. partials_ptr: float32 [num_programs(0), C]. count_ptr: int32 [1] or None.
    """
    program, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in tl.range(program * BLOCK_N, real, tl.num_programs(0) * BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        offsets = rows.to(tl.int64)[:, None] * stride_x_n + columns.to(tl.int64)[None, :] * stride_x_c
        sums += tl.load(x_ptr + offsets, mask=(rows < real)[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)
    tl.store(partials_ptr + program.to(tl.int64) * C + columns, tl.sum(sums, axis=0), mask=columns < C)


@triton.jit
def sum_partials_kernel(partials_ptr, out_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [C] = the sum of partials [P, C] over their first dimension, rounded once to out's dtype."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        sums += tl.load(partials_ptr + offsets, mask=(rows < P)[:, None] & (columns < C)[None, :], other=0.0)
    tl.store(out_ptr + columns, tl.sum(sums, axis=0), mask=columns < C)


def column_sum(x: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of x [N, C] over its rows before ``count`` (int32 [1]; None: all), [C] in x's dtype, added in float32."""
    n, columns = x.shape
    programs = row_programs(x, triton.cdiv(columns, COLUMNS_PER_PROGRAM))
    partials = x.new_empty(programs, columns, dtype=torch.float32)
    grid = programs, triton.cdiv(columns, COLUMNS_PER_PROGRAM)
    column_sum_kernel[grid](
        x, partials, count, n, columns, *x.stride(), BLOCK_N=ROWS_PER_STEP, BLOCK_C=COLUMNS_PER_PROGRAM, num_warps=8
    )
    return sum_partials(partials, x.dtype)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of float32 partials [P, ...], contiguous, over their first dimension, in ``dtype``."""
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    programs, columns = partials.shape[0], out.numel()
    # 4,096 elements a program in either shape: few rows of a weight's gradient, or many of a bias's.
    block_p = min(128, triton.next_power_of_2(max(programs, 1)))
    block_c = 4096 // block_p
    sum_partials_kernel[(triton.cdiv(columns, block_c),)](partials, out, programs, columns, BLOCK_P=block_p, BLOCK_C=block_c)
    return out


def row_programs(x: torch.Tensor, column_blocks: int, rows_per_step: int = ROWS_PER_STEP) -> int:
    """How many programs share the rows of x where each step of them has ``column_blocks`` blocks of columns."""
    steps = triton.cdiv(x.shape[0], rows_per_step)
    return max(1, min(steps, PROGRAMS_PER_MULTIPROCESSOR * tuning.chip_of(x).multiprocessors // max(column_blocks, 1)))
