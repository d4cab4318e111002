"""Products of 16-bit matrices on Hopper and later: programs that stay, and operands that the bulk-copy engine brings.

A program computes one tile after another, ``num_programs`` apart. The loop over tiles and the one over their steps are flattened
into one, so that the next tile's operands are on their way while the epilogue of the last one runs.

The number of rows is known to the device alone. The descriptors are made by the host all the same, of the rows that there is
memory for: those made on the device, of the real rows, would need an allocator of Triton's, which is set per thread and for
everybody, and a program would wait for each. A row of a product is made of the same row of its left operand alone, so what
stands behind the real rows reaches none of them; tiles wholly behind are not computed, and stores are masked by ``count``.
Beyond an operand's edges the engine fills in zeros.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from roberta_fast.kernels import tuning


@triton.jit
def product_of_tile(
    a_desc, b_desc, row, column, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, B_HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """A[row:row + BLOCK_M, :] B[:, column:column + BLOCK_N], float32, summed over K in ascending steps of BLOCK_K.

    a_desc: of A [N, K], blocks [BLOCK_M, BLOCK_K]. b_desc: of B [K, M], blocks [BLOCK_K, BLOCK_N], where B_HAS_ROWS; else of its
    transpose.
    """
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a = a_desc.load([row, k])
        b = b_desc.load([k, column]) if B_HAS_ROWS else b_desc.load([column, k]).T
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def halves_of(tile):
    """The left and the right half of the columns of a tile: an epilogue on one at a time keeps to its registers."""
    return tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]).permute(0, 2, 1).split()


def choose(a: torch.Tensor, b: torch.Tensor, deterministic: bool = False) -> tuple[tuple[int], list, dict] | None:
    """How the persistent kernels multiply a [N, K] by b [K, M], or None where they do not: (grid, descriptors, sizes).

    They do where the chip has tiles for them in ``tuning``, both operands are of 16 bits, not empty, with rows of a (rows or
    columns of b) of unit stride, 16 bytes or a multiple apart, from an address that is one.
    deterministic: the tile is the same for any number of rows.
    """
    chip, (rows, columns) = tuning.chip_of(a), (a.shape[0], b.shape[1])
    by_rows = b.stride(1) == 1
    b = b if by_rows else b.mT
    if not (_can_be_described(a) and _can_be_described(b)):
        return None
    tile = tuning.gemm_tile(chip, None if deterministic else rows, columns)
    if tile is None:
        return None
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tuning.GROUP_M}
    block_b = [tile.block_k, tile.block_n] if by_rows else [tile.block_n, tile.block_k]
    descriptors = [
        TensorDescriptor.from_tensor(a, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(b, block_b),
    ]
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return (min(tiles, tile.programs * chip.multiprocessors),), descriptors, sizes | {"B_HAS_ROWS": by_rows} | options


def _can_be_described(t: torch.Tensor) -> bool:
    aligned = t.stride(1) == 1 and t.stride(0) > 0 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
    return t.element_size() == 2 and aligned and t.numel() > 0
