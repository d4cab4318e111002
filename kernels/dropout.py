"""The keep mask of a tile, the same function of (seed, coordinates) as ``roberta_fast/ops/dropout.py``."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, threshold, rows, first_column, head, segment, BLOCK_N: tl.constexpr):
    """Which elements of a tile dropout keeps: bool [M, BLOCK_N].

    seed: int64 scalar. threshold: 16-bit draws below it drop. rows: int [M], the tile's row coordinates. first_column: int
    scalar, a multiple of 8, from which the tile's columns count. head, segment: int scalars, the other coordinates. BLOCK_N:
    columns, a multiple of 8.
    """
    kept = _kept_of_eight(seed, threshold, rows, first_column, head, segment, BLOCK_N)
    return tl.reshape(kept, (rows.shape[0], BLOCK_N)) != 0


@triton.jit
def interleaved_columns(BLOCK_N: tl.constexpr):
    """The order 0, 1, 8, 9, 16, 17, 24, 25, 2, 3, ... of the columns 0 ... BLOCK_N - 1, a multiple of 32, in each group of 32.

    The tensor cores leave columns 2t and 2t + 1 of every eight with thread t of four. A score tile whose key rows were loaded in
    this order puts eight neighbouring keys, which is one Philox call, into one thread: the mask is computed where it is used.
    """
    column = tl.arange(0, BLOCK_N)
    return column - (column & 30) + ((column & 6) << 2) + ((column & 24) >> 2)


@triton.jit
def keep_mask_interleaved(seed, threshold, rows, first_column, head, segment, BLOCK_N: tl.constexpr):
    """``keep_mask`` with its columns in the order of ``interleaved_columns``."""
    kept = _kept_of_eight(seed, threshold, rows, first_column, head, segment, BLOCK_N)
    kept = tl.reshape(kept, (rows.shape[0], BLOCK_N // 32, 4, 4, 2))
    return tl.reshape(tl.permute(kept, (0, 1, 3, 2, 4)), (rows.shape[0], BLOCK_N)) != 0


@triton.jit
def _kept_of_eight(seed, threshold, rows, first_column, head, segment, BLOCK_N: tl.constexpr):
    """One Philox call for eight neighbouring columns: int32 [M, BLOCK_N // 8, 8], 1 where the element is kept."""
    groups = first_column // 8 + tl.arange(0, BLOCK_N // 8)
    words = _philox(
        seed,
        groups[None, :].to(tl.uint32),
        rows[:, None].to(tl.uint32),
        tl.cast(head, tl.uint32),
        tl.cast(segment, tl.uint32),
    )
    threshold = tl.cast(threshold, tl.uint32)
    # The eight bits travel as one number, which the compiler takes apart again where eight columns share a thread, and which is
    # an eighth of the traffic where they do not.
    kept = _keep_bits(words[0], threshold) | (_keep_bits(words[1], threshold) << 2)
    kept |= (_keep_bits(words[2], threshold) << 4) | (_keep_bits(words[3], threshold) << 6)
    return (kept[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1


@triton.jit
def _keep_bits(word, threshold):
    """The verdicts on a word's two draws: bit 0 for the low half, bit 1 for the high half."""
    low, high = (word & 0xFFFF) >= threshold, word >= (threshold << 16)
    return low.to(tl.int32) | (high.to(tl.int32) << 1)


@triton.jit
def _philox(seed, word_0, word_1, word_2, word_3):
    """Philox4x32-10 of four uint32 words with the seed's halves as key.

    Unlike ``tl.philox`` it takes both halves of a product from one wide multiplication, an instruction where there were two.
    """
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = word_0.to(tl.uint64) * 0xD2511F53
        product_2 = word_2.to(tl.uint64) * 0xCD9E8D57
        word_0 = (product_2 >> 32).to(tl.uint32) ^ word_1 ^ key_0
        word_2 = (product_0 >> 32).to(tl.uint32) ^ word_3 ^ key_1
        word_1, word_3 = product_2.to(tl.uint32), product_0.to(tl.uint32)
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    return word_0, word_1, word_2, word_3
