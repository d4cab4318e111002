"""y = act(u (q Qᵀ) + b) over packed rows, both factors float8_e4m3fn: the formula of ``roberta_fast/ops/fp8_linear.py``.

Products go into float32 sums; on Hopper the tensor cores keep fewer of their bits, which still is far below the operands' own
rounding. Scale, bias, GELU and the rounding to eight bits for the next product are the epilogue's.
"""

import torch
import triton
import triton.language as tl

from roberta_fast.kernels.fp8 import to_e4m3
from roberta_fast.kernels.gelu import gelu
from roberta_fast.kernels.linear import matmul_tile, tile_of_program

# For Hopper the assembler reports 96 KiB of shared memory, and 128 registers a thread with GELU, so that two programs share a
# multiprocessor; without it 148, so that one has it alone (held to 128, it spills 48 bytes). Not yet measured.
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def fp8_linear_fwd_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, inverse_ptr, y_ptr, count_ptr, N, M, K,
    GELU: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of y [N, M]. x_ptr: [N, K], weight_ptr: [M, K], all contiguous; scale_ptr, bias_ptr, inverse_ptr: float32 [M].

    bias_ptr may be None. inverse_ptr: factors before y is rounded to eight bits; None where y is not.
    """
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    tiles_m, tiles_n = tl.cdiv(real, BLOCK_M), tl.cdiv(M, BLOCK_N)
    program = tl.program_id(0)
    if program >= tiles_m * tiles_n:
        return
    tile_m, tile_n = tile_of_program(program, tiles_m, tiles_n, GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = matmul_tile(
        x_ptr, weight_ptr, rows, columns, 0, K, real, M, K, 1, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION="ieee"
    )  # fmt: skip
    known = columns < M
    y *= tl.load(scale_ptr + columns, mask=known, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=known, other=0.0)[None, :]
    if GELU:
        # What is rounded to eight bits needs no more than bfloat16 does.
        y = gelu(y, tl.bfloat16 if inverse_ptr is not None else y_ptr.dtype.element_ty, TANH)
    if inverse_ptr is not None:
        y = to_e4m3(y * tl.load(inverse_ptr + columns, mask=known, other=0.0)[None, :])
    # Beyond the tile's first element int32 does, and saves the registers by which two programs fit a multiprocessor.
    offsets = tl.arange(0, BLOCK_M)[:, None] * M + tl.arange(0, BLOCK_N)[None, :]
    begin = tile_m.to(tl.int64) * BLOCK_M * M + tile_n * BLOCK_N
    tl.store(y_ptr + begin + offsets, y, mask=(rows < real)[:, None] & known[None, :])


@triton.jit
def fp8_quantize_kernel(x_ptr, inverse_ptr, q_ptr, count_ptr, N, C, stride_x_n, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of q [N, C], contiguous: x [N, C], whose rows are stride_x_n elements apart, times inverse [C]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = N if count_ptr is None else tl.minimum(tl.load(count_ptr), N)
    if tl.program_id(0) * BLOCK_N >= real:
        return
    inside = (rows < real)[:, None] & (columns < C)[None, :]
    far_rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + far_rows * stride_x_n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + columns, mask=columns < C, other=0.0)
    tl.store(q_ptr + far_rows * C + columns[None, :], to_e4m3(x * inverse[None, :]), mask=inside)


def fp8_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: str | None,
    inverse: torch.Tensor | None,
    dtype: torch.dtype,
    count: torch.Tensor | None,
) -> torch.Tensor:
    """y [N, M] in ``dtype``, or in float8_e4m3fn times ``inverse``; rows from ``count`` on are left as they are.

    Each element is one program's sum in ascending k: a row has the same bits in any batch.
    """
    (n, k), m = x.shape, weight.shape[0]
    y = x.new_empty(n, m, dtype=dtype if inverse is None else torch.float8_e4m3fn)
    if y.numel():
        grid = (triton.cdiv(n, TILE["BLOCK_M"]) * triton.cdiv(m, TILE["BLOCK_N"]),)
        fp8_linear_fwd_kernel[grid](
            x.contiguous(), weight, scale, bias, inverse, y, count, n, m, k,
            GELU=gelu is not None, TANH=gelu == "tanh", **TILE,
        )  # fmt: skip
    return y


def fp8_quantize(x: torch.Tensor, inverse: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """x [N, C] times inverse [C] in float8_e4m3fn; rows from ``count`` on are left as they are."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    n, hidden = x.shape
    q = x.new_empty(n, hidden, dtype=torch.float8_e4m3fn)
    block_c = min(512, max(16, triton.next_power_of_2(hidden)))
    block_n = 4096 // block_c
    if x.numel():
        fp8_quantize_kernel[(triton.cdiv(n, block_n), triton.cdiv(hidden, block_c))](
            x, inverse, q, count, n, hidden, x.stride(0), BLOCK_N=block_n, BLOCK_C=block_c, num_warps=4
        )
    return q
