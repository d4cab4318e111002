"""The chip that a launcher chooses its tiles for, and the tiles of attention and of matrix products.

Tiles are fixed by tables: nothing is searched for at run time, and every launch compiles without a GPU. All were chosen by what
the compiler reports, as ``tests/ahead_of_time.py`` prints it: no spilled registers, the tensor cores' fast path, and as many
warps a multiprocessor as registers and shared memory then allow. They still have to be measured: ``benchmarks/gpu.py``.
"""

import functools
from typing import NamedTuple

import torch
import triton

REGISTERS = 65536  # of a multiprocessor, in every generation


class Chip(NamedTuple):
    """What tile choices depend on.

    generation: 80, 90, 100 or 120, the compute capability times ten whose resources the chip has; 0 in Triton's interpreter.
    multiprocessors: how many of them it has, for persistent kernels.
    """

    generation: int
    multiprocessors: int


def chip_of(tensor: torch.Tensor) -> Chip:
    """The chip that a kernel over ``tensor`` runs on."""
    return _cuda_chip(tensor.get_device()) if tensor.is_cuda else Chip(0, 1)


@functools.cache
def _cuda_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(generation_of(properties.major * 10 + properties.minor), properties.multi_processor_count)


def generation_of(capability: int) -> int:
    """The generation whose tiles fit: what has about 99 KiB of shared memory a block (8.6, 8.9, 12.x, older) goes with 120."""
    if capability in (80, 87):
        return 80
    if 90 <= capability < 120:
        return 90 if capability < 100 else 100
    return 120


class Tile(NamedTuple):
    """Query rows and key rows of a score tile, the warps that share it, loads in flight, and a limit on registers a thread."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None


# Kernel and generation to {largest head dimension: tile}. "forward_dropout" is the forward kernel where it also draws a mask,
# which takes registers. Of the limits on them, 168 lets three programs share a multiprocessor; 184 stops the assembler from
# choosing 168 itself and spilling.
_MMA_SYNC = {
    "forward": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
    "forward_dropout": {64: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
    "dq": {128: Tile(64, 32, 4, 2)},
    "dkdv": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2)},
}
_WGMMA = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2)},
    "forward_dropout": {64: Tile(64, 64, 4, 3, registers=168), 128: Tile(128, 64, 8, 2)},
    "dq": {64: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
    "dkdv": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2)},
}
_TCGEN05 = {**_WGMMA, "dq": {64: Tile(64, 64, 4, 2, registers=184), 128: Tile(128, 64, 8, 2)}}
_ATTENTION_TILES = {80: _MMA_SYNC, 90: _WGMMA, 100: _TCGEN05, 120: _MMA_SYNC}

# Tiles of whole segments, smallest first: kernel and generation to {largest head dimension: tiles}.
# Forward they let 16 warps run on a multiprocessor, with the next head's rows on their way, where the general kernels at the same
# lengths have 8 to 12 and wait for theirs; on 90 and 128 rows those have 16 as well. Not here is what takes all registers of a
# multiprocessor for eight warps or spills hundreds of bytes: 128 rows with dropout (255, or 384 bytes), or of head dimension 128.
# Backward 128 rows are one program of eight warps a multiprocessor, looped or not (255 and 210 registers): only the second
# stage keeps the memory busy meanwhile. One stage is where a second would spill 128 bytes and more (80, 100), and where 99 KiB of
# shared memory are all (120).
_SHORT_FORWARD = {
    "forward": {64: (Tile(32, 32, 2, 2, 128), Tile(64, 64, 4, 2, 128), Tile(128, 128, 8, 2, 128))},
    "forward_dropout": {64: (Tile(32, 32, 2, 2, 128), Tile(64, 64, 4, 2, 128))},
}
_SHORT_ATTENTION_TILES = {
    80: {
        **_SHORT_FORWARD,
        "backward": {64: (Tile(32, 32, 2, 2, 168), Tile(64, 64, 4, 1)), 128: (Tile(32, 32, 4, 1), Tile(64, 64, 8, 1))},
    },
    90: {
        **_SHORT_FORWARD,
        "backward": {
            64: (Tile(32, 32, 2, 2, 168), Tile(64, 64, 4, 2, 168), Tile(128, 128, 8, 2)),
            128: (Tile(32, 32, 2, 1), Tile(64, 64, 4, 1)),
        },
    },
    100: {
        **_SHORT_FORWARD,
        "backward": {
            64: (Tile(32, 32, 2, 2, 168), Tile(64, 64, 4, 1, 168), Tile(128, 128, 8, 1)),
            128: (Tile(32, 32, 2, 1), Tile(64, 64, 4, 1)),
        },
    },
    120: {
        "forward": _SHORT_FORWARD["forward_dropout"],
        "forward_dropout": _SHORT_FORWARD["forward_dropout"],
        "backward": {64: (Tile(32, 32, 2, 1, 168), Tile(64, 64, 4, 1)), 128: (Tile(32, 32, 4, 1), Tile(64, 64, 8, 1))},
    },
}


def attention_tile(kernel: str, query: torch.Tensor, lengths: tuple[int, int] | None) -> Tile:
    """The tile of an attention kernel for ``query`` [N, H, D].

    kernel: "forward", "forward_dropout", "dq" or "dkdv".
    lengths: the longest query and key segments, to which the tile is cut down so that fewer of its rows idle, with its warps
        in proportion. None: the tile, and with it the order of every sum, is the same for all lengths.
    """
    generation, head_dim = chip_of(query).generation, query.shape[2]
    if generation == 0:
        return Tile(32, 32, 1, 1)
    if query.dtype == torch.float32:
        tile = Tile(32, 32, 8, 1)
    else:
        sizes = _ATTENTION_TILES[generation][kernel]
        tile = sizes[min(size for size in sizes if head_dim <= size)]
    if lengths is None:
        return tile
    block_m, block_n = (
        min(block, max(32, triton.next_power_of_2(length))) for block, length in zip(tile[:2], lengths, strict=True)
    )
    return tile._replace(block_m=block_m, block_n=block_n, warps=max(1, tile.warps * block_m // tile.block_m))


def short_attention_tile(kernel: str, query: torch.Tensor, lengths: tuple[int, int] | None) -> Tile | None:
    """The tile of a kernel of ``attention_short.py`` for ``query`` [N, H, D], or None where the general kernels serve better.

    kernel: "forward", "forward_dropout" or "backward". lengths: the longest query and key segments, for which one size of tile
        must be right: where it is not, half of a tile would idle. None: what serves must not depend on them.
    """
    if lengths is None:
        return None
    generation, head_dim = chip_of(query).generation, query.shape[2]
    if generation == 0:
        tiles = [Tile(32, 32, 1, 1)]
    elif query.dtype == torch.float32:
        tiles = [Tile(32, 32, 8, 1)]
    else:
        sizes = _SHORT_ATTENTION_TILES[generation][kernel]
        tiles = next((tiles for size, tiles in sizes.items() if head_dim <= size), [])
    of_queries, of_keys = (next((tile for tile in tiles if length <= tile.block_m), None) for length in lengths)
    return of_queries if of_queries == of_keys else None


def heads_per_program(tile: Tile, query: torch.Tensor, segments: int) -> int:
    """How many heads of a segment a program takes: as many as leave two programs for each that runs at a time, at most all.

    With fewer programs than that, some multiprocessors would be done when others begin their last. Registers are what limits
    how many run at a time.
    """
    heads = query.shape[1]
    at_a_time = chip_of(query).multiprocessors * (REGISTERS // (32 * tile.warps * (tile.registers or 256)))
    share = min(heads, max(1, segments * heads // (2 * at_a_time)))
    return triton.cdiv(heads, triton.cdiv(heads, share))


GROUP_M = 8  # rows of tiles that are done together, so that neighbours share operands in the L2 cache


class GemmTile(NamedTuple):
    """Rows and columns of a product's tile, depth of a step, warps, loads in flight, and programs that share a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int


# Generation to the tiles of ``persistent.py``, large ones first. The larger a tile, the less its operands are read: 85
# operations a byte from the L2 cache at 128 × 256, 64 at 128 × 128, 32 at 64 × 64; more loads in flight than three hide the
# epilogue of the last tile. What has no entry multiplies by pointers: 80 has no bulk copies, and of what goes with 120 some
# chips (8.6, 8.9) have none either, and 12.x spilled with them in 128 × 128.
_HOPPER = (GemmTile(128, 256, 64, 8, 4, 1), GemmTile(128, 128, 64, 8, 4, 1), GemmTile(64, 64, 64, 4, 4, 2))
_GEMM_TILES = {90: _HOPPER, 100: _HOPPER}


def gemm_tile(chip: Chip, rows: int | None, columns: int) -> GemmTile | None:
    """The tile of a persistent product [rows, columns]: the largest with work for half of the chip, or None without tiles.

    rows: as many as there may be; None: the tile, and with it the order of every sum, is the same for any number of them.
    """
    tiles = _GEMM_TILES.get(chip.generation)
    if tiles is None or rows is None:
        return tiles and tiles[0]
    for tile in tiles:
        if 2 * triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n) >= chip.multiprocessors:
            return tile
    return tiles[-1]


def pointer_gemm(*operands: torch.Tensor) -> dict[str, int | str]:
    """The tile of a product whose operands are loaded by pointers, one a program, by their type and alignment alone: a row's
    result does not depend on the rows beside it.

    Eight warps and three stages throughout.

    | operands | BLOCK_M × BLOCK_N × BLOCK_K | why |
    | 16-bit | 128 × 128 × 64 | 96 KiB of shared memory: all chips, two programs on an H100's multiprocessor |
    | 16-bit, rows not in steps of 16 bytes | 64 × 64 × 32 | loaded one by one: more addresses would spill |
    | float32 | 64 × 64 × 16 | without TF32 no tensor cores: registers are the limit |
    """
    half = operands[0].element_size() == 2
    aligned = all(max(t.stride()) % 8 == 0 for t in operands)
    block, block_k = (128, 64) if half and aligned else (64, 32 if half else 16)
    precision = "tf32" if not half and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    sizes = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": block_k, "GROUP_M": GROUP_M}
    return sizes | {"PRECISION": precision, "num_warps": 8, "num_stages": 3}
