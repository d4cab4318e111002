"""Attention's kernels for whole segments, several heads a program: against float64, and what chooses their tiles."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, check, dout_of, exactly, run

from roberta_fast.kernels import attention, tuning

# The interpreter's tile has 32 rows. Three heads, so that of two a program the last one has but one.
CASES = {
    "head dim 64": Case((5, 32, 1, 17), heads=3, head_dim=64),
    "head dim 17, float16": Case((5, 31), heads=3, head_dim=17, dtype=torch.float16),
    "head dim 33": Case((5, 31), heads=3, head_dim=33),
    "empty segments": Case((0, 7, 0, 9, 0), heads=3),
    "queries without keys, keys without queries": Case((3, 30, 0, 8), (31, 5, 4, 0), heads=3),
    "everything at once": Case(
        (20, 32, 1), (31, 25, 2), heads=3, head_dim=24, causal=True, query_only=(1, 23, 0), dropout_p=0.4, order=(1, 0, 2)
    ),
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that the launchers take."""
    names = []
    for name in [name for name in vars(attention) if name.endswith("_kernel")]:
        kernel = getattr(attention, name)
        monkeypatch.setattr(attention, name, Spy(kernel, lambda name=name: names.append(name)))
    return names


class Spy:
    """A kernel that tells when it is launched."""

    def __init__(self, kernel, tell):
        self.kernel, self.tell = kernel, tell

    def __getitem__(self, grid):
        self.tell()
        return self.kernel[grid]


SHORT = {"attention_fwd_short_kernel", "attention_bwd_short_kernel"}


@pytest.mark.parametrize("name", CASES)
def test_results_for_any_number_of_heads_a_program(name, triton_device, launched, monkeypatch):
    """Within the error rules, and the same bits for every number."""
    case = CASES[name]
    inputs, dout = case.inputs(triton_device), dout_of(case, triton_device)
    results = []
    for share in (1, 2, 3):
        monkeypatch.setattr(tuning, "heads_per_program", lambda *_, share=share: share)
        results.append(run(case, inputs, dout, "triton"))
    assert set(launched) == SHORT
    check(case, results[0], run(case, inputs, dout, "torch"), exactly(case, inputs, dout))
    for out, lse, grads in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
        assert all(map(torch.equal, grads, results[0][2]))


def test_deterministic_segments_have_the_same_bits_beside_long_ones(triton_device, launched):
    """A segment that would fit a tile is computed by the kernels that it has beside a longer one."""
    case = Case((5, 17), heads=2, deterministic=True, dtype=torch.float16)
    together = replace(case, lengths_q=(5, 17, 40))
    inputs, dout = together.inputs(triton_device), dout_of(together, triton_device)
    out, lse, grads = run(together, inputs, dout, "triton")
    alone_out, alone_lse, alone_grads = run(case, [t[:22] for t in inputs], dout[:22], "triton")
    assert not SHORT & set(launched)
    assert torch.equal(out[:22], alone_out) and torch.equal(lse[:, :22], alone_lse)
    assert all(torch.equal(whole[:22], one) for whole, one in zip(grads, alone_grads, strict=True))


def test_heads_that_drop_alike_are_caught(triton_device):
    """A mask that forgets which of its heads a program is at."""
    case = replace(CASES["everything at once"], heads=2)
    inputs, dout = case.inputs(), dout_of(case)

    def by_head(head):
        return run(replace(case, heads=1), [t[:, head : head + 1] for t in inputs], dout[:, head : head + 1], "torch")

    heads = [by_head(head) for head in range(2)]
    grads = [torch.cat(parts, 1) for parts in zip(*(grads for *_, grads in heads), strict=True)]
    mutant = torch.cat([out for out, *_ in heads], 1), torch.cat([lse for _, lse, _ in heads]), grads
    with pytest.raises(AssertionError, match="out: max"):
        check(case, mutant, run(case, inputs, dout, "torch"), exactly(case, inputs, dout))


class TestChoice:
    @pytest.fixture(autouse=True)
    def on_hopper(self, monkeypatch):
        monkeypatch.setattr(tuning, "chip_of", lambda _: tuning.Chip(90, 132))

    def query(self, heads=12, head_dim=64, dtype=torch.bfloat16):
        return torch.empty(0, heads, head_dim, dtype=dtype)

    @pytest.mark.parametrize(
        ("kernel", "head_dim", "lengths", "rows"),
        [
            ("forward", 64, (1, 1), 32),
            ("forward", 64, (33, 64), 64),
            ("forward", 32, (128, 65), 128),
            ("forward", 64, (128, 129), None),
            ("forward", 64, (20, 100), None),
            ("forward", 80, (30, 30), None),
            ("forward_dropout", 64, (64, 64), 64),
            ("forward_dropout", 64, (65, 65), None),
            ("backward", 64, (128, 128), 128),
            ("backward", 128, (64, 64), 64),
            ("backward", 128, (65, 65), None),
        ],
    )
    def test_the_smallest_tile_that_holds_queries_and_keys(self, kernel, head_dim, lengths, rows):
        tile = tuning.short_attention_tile(kernel, self.query(head_dim=head_dim), lengths)
        assert (tile and tile.block_m) == rows
        assert tile is None or tile.block_m == tile.block_n

    def test_none_where_lengths_must_not_matter(self):
        assert tuning.short_attention_tile("forward", self.query(), None) is None

    @pytest.mark.parametrize(("segments", "share"), [(1, 1), (87, 1), (88, 2), (264, 6), (10**6, 12)])
    def test_two_programs_for_each_that_runs_at_a_time(self, segments, share):
        """264 programs of eight warps with 128 registers run at a time on 132 multiprocessors."""
        tile = tuning.Tile(128, 128, 8, 2, registers=128)
        got = tuning.heads_per_program(tile, self.query(), segments)
        assert got == share
        assert got == 1 or segments * -(-12 // got) >= 2 * 264
