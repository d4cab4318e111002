"""Dropout that is a function of (seed, coordinates): no mask is stored, and packing does not change it.

One call of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and
the counter (column // 8, row, head, segment) yields four 32-bit words, hence eight 16-bit draws, low half first, for
columns 8j .. 8j + 7. An element is dropped where its draw is below ``threshold(p)`` = round(65536 p), and kept ones are
scaled by 65536 / (65536 - threshold), so that the expectation is exact although p is rounded to 1/65536. Every backend
computes this same function.
"""

import torch

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Draws below this 16-bit number drop their element. Raises ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    return min(round(p * 65536), 65535)


def scale(p: float) -> float:
    """The factor on kept elements, the inverse of the exact keep probability."""
    return 65536.0 / (65536 - threshold(p))


def new_seeds(n: int, device: torch.device) -> torch.Tensor:
    """``n`` fresh seeds, int64 [n] on ``device``, from torch's generator there (so ``torch.manual_seed`` governs them)."""
    return torch.randint(0, 2**62, (n,), dtype=torch.int64, device=device)


def philox(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: the four 32-bit output words, as int64 tensors of the counters' broadcast shape.

    seed: int64 scalar tensor; its low and high words are the key. counter: four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        low_0, high_0 = _multiply(c0, _MULTIPLIERS[0])
        low_1, high_1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high words of the 64-bit product of two 32-bit words; int64 products wrap, and so keep all 64 bits."""
    product = a * b
    return product & _WORD, (product >> 32) & _WORD


def keep_mask(
    seed: torch.Tensor, p: float, rows: torch.Tensor, columns: int, head: int | torch.Tensor = 0, segment: int = 0
) -> torch.Tensor:
    """The bool [len(rows), columns] mask of elements that dropout keeps; [H, len(rows), columns] where head is a tensor [H].

    seed: int64 tensor of one element. rows: int64 [R] row coordinates. head, segment: the other coordinates.
    """
    groups = torch.arange((columns + 7) // 8, device=rows.device)
    head, segment = (torch.as_tensor(c, dtype=torch.int64, device=rows.device)[..., None, None] for c in (head, segment))
    words = philox(seed.reshape(()), (groups, rows[:, None], head, segment))
    draws = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack([draw >= threshold(p) for draw in draws], dim=-1).flatten(-2)[..., :columns]
