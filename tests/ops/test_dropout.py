"""Dropout's mask: Philox against its authors' vectors, the statistics of what is kept, and Triton's mask bit for bit."""

import math

import pytest
import torch
import triton
import triton.language as tl

from roberta_fast.kernels.dropout import interleaved_columns, keep_mask, keep_mask_interleaved
from roberta_fast.ops import dropout

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def seed_of(key_words):
    """The int64 seed whose low and high halves are these two words."""
    low, high = key_words
    seed = high << 32 | low
    return torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed])


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_its_authors_vectors(name):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in KNOWN_ANSWERS[name])
    words = dropout.philox(seed_of(key).reshape(()), tuple(torch.tensor(c) for c in counter))
    assert [int(w) for w in words] == expected


def test_draws_are_the_halves_of_the_words():
    """Columns 8j ... 8j + 7 take the output of counter (j, row, head, segment), each word's low half first."""
    seed, row, head, segment = torch.tensor([31]), 1000, 11, 3
    words = [w for j in range(4) for w in dropout.philox(seed[0], tuple(torch.tensor(c) for c in (j, row, head, segment)))]
    draws = torch.tensor([half for word in words for half in (int(word) & 0xFFFF, int(word) >> 16)])
    for p in (0.1, 0.5, 0.9):
        mask = dropout.keep_mask(seed, p, torch.tensor([row]), 32, head, segment)
        assert torch.equal(mask[0], draws >= round(p * 65536))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_keep_rate_of_every_column_and_row(p):
    """Within five standard deviations of the exact probability: over all, and for each of a Philox call's eight draws."""
    rows, columns = 2000, 400
    keep = dropout.keep_mask(torch.tensor([2024]), p, torch.arange(rows), columns).double()
    exact = 1 - dropout.threshold(p) / 65536
    deviation = math.sqrt(exact * (1 - exact))
    assert abs(keep.mean() - exact) < 5 * deviation / math.sqrt(rows * columns)
    by_draw = keep.view(rows, columns // 8, 8).mean((0, 1))
    assert (by_draw - exact).abs().max() < 5 * deviation / math.sqrt(rows * columns / 8)


def test_draws_are_independent_of_their_neighbours():
    """No correlation above five standard deviations along columns, rows, heads or segments."""
    seed, rows, columns = torch.tensor([7]), torch.arange(1000), 400
    centred = [
        dropout.keep_mask(seed, 0.5, rows, columns, head, segment).double() - 0.5 for head, segment in ((0, 0), (1, 0), (0, 1))
    ]
    here, other_head, other_segment = centred
    limit = 5 * 0.25 / math.sqrt(here.numel())
    assert all(abs((here[:, :-shift] * here[:, shift:]).mean()) < limit for shift in (1, 2, 4, 7, 8))
    assert abs((here[:-1] * here[1:]).mean()) < limit
    assert abs((here * other_head).mean()) < limit
    assert abs((here * other_segment).mean()) < limit


def test_other_seeds_give_other_masks():
    """Seeds that differ in one bit of either half agree on no more than chance allows."""
    rows = torch.arange(200)
    masks = [dropout.keep_mask(torch.tensor([seed]), 0.5, rows, 200) for seed in (0, 1, 1 << 32, 1 << 61)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / 200


def test_mask_depends_on_coordinates_alone():
    """A part of a larger mask, rows in any order, is the mask of that part: so packing cannot change what is dropped."""
    seed = torch.tensor([99])
    whole = dropout.keep_mask(seed, 0.3, torch.arange(50), 64, 3, 5)
    order = torch.tensor([40, 3, 3, 17])
    assert torch.equal(dropout.keep_mask(seed, 0.3, order, 30, 3, 5), whole[order, :30])


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 1 / 3, 0.5, 0.999999])
def test_scale_is_the_inverse_of_the_exact_keep_probability(p):
    assert dropout.scale(p) * (65536 - dropout.threshold(p)) == 65536
    assert abs(dropout.threshold(p) / 65536 - p) <= 1 / 65536
    if p == 0.0:
        assert dropout.keep_mask(torch.tensor([1]), p, torch.arange(8), 64).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_impossible_probability_is_named(p):
    with pytest.raises(ValueError, match=f"dropout_p must be in .* got {p}"):
        dropout.threshold(p)


def test_new_seeds_follow_the_generator():
    torch.manual_seed(5)
    first = dropout.new_seeds(100, torch.device("cpu"))
    second = dropout.new_seeds(100, torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, dropout.new_seeds(100, torch.device("cpu")))
    assert first.dtype == torch.int64 and (first >= 0).all()
    assert len(set(first.tolist()) | set(second.tolist())) == 200


@triton.jit
def mask_kernel(
    mask_ptr, seed_ptr, threshold, first_row, first_column, head, segment,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the mask in the natural order of its columns."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr)
    if INTERLEAVED:
        columns = interleaved_columns(BLOCK_N)
        keep = keep_mask_interleaved(seed, threshold, first_row + rows, first_column, head, segment, BLOCK_N)
    else:
        keep = keep_mask(seed, threshold, first_row + rows, first_column, head, segment, BLOCK_N)
    tl.store(mask_ptr + rows[:, None] * BLOCK_N + columns[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("interleaved", [False, True], ids=["natural", "interleaved"])
@pytest.mark.parametrize("block_n", [32, 128])
@pytest.mark.parametrize("seed", [0, 2**62 - 1, -1234567890123456789])
def test_triton_mask_is_the_reference_mask(interleaved, block_n, seed, triton_device):
    seed = torch.tensor([seed], device=triton_device)
    for p, first_row, first_column, head, segment in (
        (0.1, 0, 0, 0, 0), (0.5, 300, 40, 15, 1), (0.9, 1, 1024, 3, 70000), (0.0, 5, 8, 1, 2),
    ):  # fmt: skip
        mask = torch.full((16, block_n), -1, dtype=torch.int8, device=triton_device)
        mask_kernel[(1,)](mask, seed, dropout.threshold(p), first_row, first_column, head, segment, 16, block_n, interleaved)
        rows = torch.arange(first_row, first_row + 16, device=triton_device)
        expected = dropout.keep_mask(seed, p, rows, first_column + block_n, head, segment)[:, first_column:]
        assert torch.equal(mask.bool(), expected), f"p={p} row {first_row} column {first_column}"
