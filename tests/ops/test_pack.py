"""pack_indices, pack and unpack: against plain indexing, each other's gradient, and mutants that must be caught."""

import math

import pytest
import torch

from roberta_fast.kernels import pack as kernels
from roberta_fast.ops import pack, pack_indices, unpack
from roberta_fast.ops.pack import pack_indices_ref, pack_ref, unpack_ref
from roberta_fast.testing import MASKS, poisoned

indices_operator = torch.ops.roberta_fast.pack_indices.default
pack_operator = torch.ops.roberta_fast.pack.default
unpack_operator = torch.ops.roberta_fast.unpack.default

MORE_MASKS = {
    "all padding": torch.zeros(2, 3, dtype=torch.int64),
    "one sequence among padding": torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0]]),
    "no sequences": torch.ones(0, 4, dtype=torch.int64),
    "many sequences": (torch.arange(24)[:, None] * 7 % 5 > torch.arange(3)).long(),
    "longer than a block": torch.arange(2 * 2500).view(2, 2500) % 3,
}
ALL_MASKS = MASKS | MORE_MASKS
FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128
DTYPES = *FLOATS, torch.int8, torch.int64, torch.bool


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def listed(mask):
    """(positions, cu_seqlens, count, query_only, order) by walking over the mask in Python."""
    rows = mask.tolist()
    kept = [[s for s, real in enumerate(row) if real or s == 0] for row in rows]
    positions = [b * mask.shape[1] + s for b, row in enumerate(kept) for s in row]
    bounds = [0]
    for row in kept:
        bounds.append(bounds[-1] + len(row))
    order = sorted(range(len(rows)), key=lambda b: -len(kept[b]))
    results = (positions, bounds, [len(positions)], [int(not row[0]) for row in rows], order)
    return tuple(torch.tensor(r, dtype=d) for r, d in zip(results, (torch.int64, *[torch.int32] * 4), strict=True))


def check_indices(got, mask, capacity=None):
    """Holds the five results to the list, with B * S behind the count up to the capacity."""
    indices, *others = (t.cpu() for t in got)
    wanted, *wanted_others = listed(mask)
    if capacity is not None:
        wanted = torch.nn.functional.pad(wanted, (0, capacity - len(wanted)), value=mask.numel())
    for result, want in zip((indices, *others), (wanted, *wanted_others), strict=True):
        assert result.dtype == want.dtype
        assert torch.equal(result, want)


@pytest.mark.parametrize("name", ALL_MASKS)
def test_indices_of_the_reference(name):
    mask = ALL_MASKS[name]
    check_indices(pack_indices_ref(mask), mask)
    check_indices(pack_indices_ref(mask, mask.numel() + 3), mask, mask.numel() + 3)


@pytest.mark.parametrize("name", ALL_MASKS)
def test_indices(name, backend, monkeypatch):
    """Sized exactly, and with a capacity that just suffices or leaves room."""
    monkeypatch.setattr(kernels, "BLOCK_B", 16)  # so that a few sequences are many
    mask = ALL_MASKS[name]
    tokens = len(listed(mask)[0])
    for capacity in (None, tokens, tokens + 7):
        check_indices(pack_indices(mask.to(backend.device), capacity, backend=backend.name), mask, capacity)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=dtype_name)
def test_masks_of_every_type(dtype, backend):
    """Nonzero is real, whatever the type says by it: NaN and minus one too, minus zero not."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        mask[0, 0], mask[0, 1], mask[2, 0] = math.nan, -0.0, -1e-7 if dtype != torch.float16 else -1e-3
    check_indices(pack_indices(mask.to(backend.device), backend=backend.name), mask != 0)


def test_strided_mask(backend):
    """A transposed one, and one that is a slice of a longer."""
    mask = MASKS["holes"]
    for strided in (mask.mT.contiguous().mT, torch.nn.functional.pad(mask, (2, 3), value=1)[:, 2:-3]):
        check_indices(pack_indices(strided.to(backend.device), backend=backend.name), mask)


def test_too_many_tokens_for_the_capacity_fail(triton_device, backend):
    if backend.device == "cuda":
        pytest.skip("a failed assertion on the device ends the process's use of it")
    with pytest.raises(RuntimeError, match="more real tokens than capacity=5"):
        pack_indices(torch.ones(2, 3), 5, backend=backend.name)


def batch_of(mask, columns, dtype=torch.float32, device="cpu"):
    """Different values in [B, S, columns], of either sign where there is one."""
    x = torch.arange(mask.numel() * columns).view(*mask.shape, columns) - 5
    return (x % 3 == 0 if dtype == torch.bool else x).to(device, dtype)


def check_round_trip(x, mask, pack, unpack, spare=None):
    """pack takes the listed rows, unpack puts them back among zeros; spare rows behind the count are not looked at."""
    batch, seqlen, columns = x.shape
    indices = listed(mask)[0].to(x.device)
    wanted = x.flatten(0, 1)[indices]
    rows, count = len(indices), None
    if spare is not None:
        count = torch.tensor([rows], dtype=torch.int32, device=x.device)
        indices = torch.nn.functional.pad(indices, (0, spare), value=batch * seqlen)
    packed = pack(x, indices, count)
    assert packed.dtype == x.dtype and packed.shape == (rows + (spare or 0), columns)
    assert torch.equal(packed[:rows], wanted)
    behind = poisoned(wanted, spare) if spare and x.is_floating_point() else packed
    padded = unpack(behind, indices, batch, seqlen, count)
    assert padded.dtype == x.dtype and padded.shape == x.shape
    expected = x.new_zeros(batch * seqlen, columns)
    expected[indices[:rows]] = wanted
    assert torch.equal(padded.flatten(0, 1), expected)


def with_backend(backend):
    return (lambda *a: pack(*a, backend=backend.name)), (lambda *a: unpack(*a, backend=backend.name))


@pytest.mark.parametrize("name", ALL_MASKS)
def test_round_trip(name, backend):
    """Without a count, with one that says all, and with one that hides rows."""
    mask = ALL_MASKS[name]
    for spare in (None, 0, 9):
        check_round_trip(batch_of(mask, 5, device=backend.device), mask, *with_backend(backend), spare)


@pytest.mark.parametrize("name", MASKS)
def test_round_trip_of_the_reference(name):
    for spare in (None, 9):
        check_round_trip(batch_of(MASKS[name], 5), MASKS[name], pack_ref, unpack_ref, spare)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rows_of_every_type(dtype, backend):
    mask = MASKS["holes"]
    for columns in (1, 33):
        check_round_trip(batch_of(mask, columns, dtype, backend.device), mask, *with_backend(backend), 3)


@pytest.mark.parametrize("columns", [0, 1, 1023, 1025, 2100])
def test_widths(columns, backend):
    mask = MASKS["holes"]
    check_round_trip(batch_of(mask, columns, device=backend.device), mask, *with_backend(backend))


def test_strided_rows(backend):
    """Sequences first, columns first, and a slice of wider rows; rows whose columns lie apart."""
    mask = MASKS["holes"]
    x = batch_of(mask, 6, device=backend.device)
    pack_rows, unpack_rows = with_backend(backend)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT, x.repeat(1, 1, 2)[..., 3:9]):
        check_round_trip(strided, mask, pack_rows, lambda rows, *a: unpack_rows(rows.mT.contiguous().mT, *a))


@pytest.mark.parametrize("spare", [None, 4], ids=["no count", "rows behind"])
def test_each_is_the_gradient_of_the_other(spare, backend):
    mask = MASKS["holes"]
    x = batch_of(mask, 5, device=backend.device).requires_grad_()
    indices = listed(mask)[0].to(x.device)
    rows, count = len(indices), None
    if spare is not None:
        count = torch.tensor([rows], dtype=torch.int32, device=x.device)
        indices = torch.nn.functional.pad(indices, (0, spare), value=mask.numel())
    dy = torch.randn(len(indices), 5, device=x.device)
    dy[rows:] = math.nan
    (dx,) = torch.autograd.grad(pack(x, indices, count, backend=backend.name), x, dy)
    assert torch.equal(dx.view(-1, 5)[indices[:rows]], dy[:rows])
    assert dx.count_nonzero() == rows * 5

    leaf = dy.clone().requires_grad_()
    dz = torch.randn(*mask.shape, 5, device=x.device)
    (drows,) = torch.autograd.grad(unpack(leaf, indices, *mask.shape, count, backend=backend.name), leaf, dz)
    assert torch.equal(drows[:rows], dz.view(-1, 5)[indices[:rows]])


def by_lengths(mask):
    """Takes the mask's sums for lengths, which loses holes and left padding."""
    filled = (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)).long()
    return pack_indices_ref(filled)


def without_first_position(mask):
    """Drops position 0 where it is padding."""
    positions = (mask.flatten() != 0).nonzero().squeeze(1)
    lengths = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    *_, query_only, order = pack_indices_ref(mask)
    return positions, torch.nn.functional.pad(lengths, (1, 0)), lengths[-1:], query_only, order


def seen_first_position(mask):
    """Forgets that position 0 is padding."""
    *others, query_only, order = pack_indices_ref(mask)
    return *others, torch.zeros_like(query_only), order


def shortest_first(mask):
    *others, order = pack_indices_ref(mask)
    return *others, order.flip(0)


def equal_ones_backwards(mask):
    """Sequences of equal length by descending index."""
    *others, _ = pack_indices_ref(mask)
    *_, order = pack_indices_ref(mask.flip(0))
    return *others, mask.shape[0] - 1 - order


INDEX_MUTANTS = {
    "by lengths": by_lengths,
    "without position 0": without_first_position,
    "position 0 seen": seen_first_position,
    "shortest first": shortest_first,
    "equal ones backwards": equal_ones_backwards,
}


@pytest.mark.parametrize("mask", ["holes", "left padding"])
@pytest.mark.parametrize("name", INDEX_MUTANTS)
def test_check_catches_mutants_of_the_indices(name, mask):
    twice = MASKS[mask].repeat(2, 1)  # so that lengths are equal
    check_indices(pack_indices_ref(twice), twice)
    with pytest.raises(AssertionError):
        check_indices(INDEX_MUTANTS[name](twice), twice)


ROW_MUTANTS = {
    "pack takes the next row": (lambda x, i, c: pack_ref(x, (i + 1) % (x.shape[0] * x.shape[1]), c), unpack_ref),
    "pack rounds": (lambda x, i, c: pack_ref(x, i, c).half().float() * 1.001, unpack_ref),
    "unpack leaves something at padding": (pack_ref, lambda *a: unpack_ref(*a) + 1e-30),
    "unpack reads behind the count": (pack_ref, lambda rows, i, b, s, c: unpack_ref(rows, i, b, s, c + 1)),
}


@pytest.mark.parametrize("name", ROW_MUTANTS)
def test_check_catches_mutants_of_the_rows(name):
    mask = MASKS["holes"]
    x = batch_of(mask, 5)
    check_round_trip(x, mask, pack_ref, unpack_ref, 2)
    with pytest.raises(AssertionError):
        check_round_trip(x, mask, *ROW_MUTANTS[name], 2)


@pytest.mark.parametrize("capacity", [None, 20])
def test_opcheck_of_indices(capacity, backend):
    torch.library.opcheck(indices_operator, (MASKS["holes"].to(backend.device), capacity, backend.name))


@pytest.mark.parametrize("hidden", [False, True], ids=["all rows", "count"])
def test_opcheck_of_rows(hidden, backend):
    mask = MASKS["holes"]
    x = batch_of(mask, 4, device=backend.device)
    indices = listed(mask)[0].to(x.device)
    count = torch.tensor([len(indices)], dtype=torch.int32, device=x.device) if hidden else None
    packed = pack(x, indices, count, backend=backend.name)
    torch.library.opcheck(pack_operator, (x.clone().requires_grad_(), indices, count, backend.name))
    torch.library.opcheck(unpack_operator, (packed.clone().requires_grad_(), indices, *mask.shape, count, backend.name))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """A batch of more than 2^31 elements: its last row is packed, and unpacked into place."""
    batch, seqlen, columns = 4, 2**19 + 1, 1040
    x = torch.zeros(batch, seqlen, columns, dtype=torch.int8, device="cuda")
    x[-1, -1] = 7
    mask = torch.zeros(batch, seqlen, device="cuda")
    mask[:, -1] = 1
    indices, _, count, *_ = pack_indices(mask, 8, backend="triton")
    packed = pack(x, indices, count, backend="triton")
    assert (packed[7] == 7).all() and not packed[:7].any()
    assert torch.equal(unpack(packed, indices, batch, seqlen, count, backend="triton"), x)


@pytest.mark.gpu
def test_capacity_needs_no_host():
    """With a capacity nothing waits for the device, forward and backward."""
    mask = MASKS["holes"].cuda()
    x = batch_of(mask, 64, device="cuda").requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices, _, count, *_ = pack_indices(mask, 21, backend="triton")
        rows = pack(x, indices, count, backend="triton")
        unpack(rows, indices, *mask.shape, count, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


INDICES = torch.arange(4)
BAD_CALLS = {
    "mask of one dimension": (lambda: pack_indices(torch.ones(3)), r"mask must be \[B, S\] with S >= 1, got shape \(3,\)"),
    "mask of no positions": (lambda: pack_indices(torch.ones(3, 0)), r"mask must be \[B, S\] with S >= 1, got shape \(3, 0\)"),
    "x of two dimensions": (lambda: pack(torch.ones(4, 3), INDICES), r"x must be \[B, S, C\], got shape \(4, 3\)"),
    "rows of three dimensions": (
        lambda: unpack(torch.ones(1, 4, 3), INDICES, 2, 2), r"rows must be \[N, C\], got shape \(1, 4, 3\)",
    ),
    "unknown backend": (lambda: pack_indices(torch.ones(2, 3), backend="cudnn"), "backend='cudnn' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_argument_and_value(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
