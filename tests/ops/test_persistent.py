"""The persistent products: against the reference, on the interpreter as if it were a Hopper chip, and on GPUs that have them."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import test_feed_forward as feed_forward_tests
import torch
import torch.nn.functional as F
from test_linear import Case, check, composed, in_double, run

from roberta_fast import ops
from roberta_fast.kernels import linear, persistent, tuning
from roberta_fast.testing import assert_close_as_torch, poisoned

HALF = torch.float16  # the interpreter multiplies the bits of bfloat16
CASES = {
    "one tile": Case(20, 32, 16, dtype=HALF),
    "several programs take several tiles": Case(300, 520, 72, residual=True, dtype=HALF),
    "columns not in steps of eight": Case(70, 67, 40, residual=True, dtype=HALF),
    "no bias": Case(130, 40, 136, bias=False, dtype=HALF),
    "count": Case(70, 72, 136, hidden=90, residual=True, dtype=HALF),
    "count, tiles behind it": Case(130, 264, 72, hidden=400, dtype=HALF),
    "count within the first tile": Case(3, 72, 40, hidden=400, dtype=HALF),
    "count of zero": Case(0, 24, 40, hidden=70, dtype=HALF),
    "count of all": Case(128, 256, 64, hidden=0, residual=True, dtype=HALF),
}
FEED_FORWARD_CASES = {
    "no count": feed_forward_tests.Case(140, 64, 520, dtype=HALF),
    "count": feed_forward_tests.Case(130, 72, 136, hidden=300, dtype=HALF),
    "tanh, no biases": feed_forward_tests.Case(70, 40, 72, hidden=9, biases=False, approximate="tanh", dtype=HALF),
    "count of zero": feed_forward_tests.Case(0, 40, 24, hidden=140, dtype=HALF),
}


@contextmanager
def counted(monkeypatch):
    """How often a persistent product was chosen, in a list."""
    chosen, choose = [], persistent.choose

    def choose_and_tell(*arguments):
        choice = choose(*arguments)
        chosen.extend([choice] if choice else [])
        return choice

    with monkeypatch.context() as patch:
        patch.setattr(persistent, "choose", choose_and_tell)
        yield chosen


@pytest.fixture
def device(triton_device, monkeypatch):
    """Where persistent products run: a GPU that has them, or the interpreter, told to be three multiprocessors of Hopper."""
    if triton_device == "cpu":
        monkeypatch.setattr(tuning, "chip_of", lambda tensor: tuning.Chip(90, 3))
    elif tuning.gemm_tile(tuning.chip_of(torch.empty(1, device="cuda")), None, 1) is None:
        pytest.skip("this GPU has no persistent products")
    return triton_device


@pytest.mark.parametrize("name", CASES)
def test_linear(name, device, monkeypatch):
    """y and dx, whose weight is read by rows and by columns."""
    case = CASES[name]
    inputs, dy = case.inputs(device)
    with counted(monkeypatch) as chosen:
        fast = run(case, inputs, dy, "triton")
    assert len(chosen) == (2 if case.outer % 8 == 0 else 1)
    check(fast, composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))


@pytest.mark.parametrize("name", FEED_FORWARD_CASES)
def test_feed_forward(name, device, monkeypatch):
    """Both products of the forward pass, and what is made of dy W₂, its sums over rows among it."""
    for case in (FEED_FORWARD_CASES[name], replace(FEED_FORWARD_CASES[name], recompute=True)):
        inputs, dy = case.inputs(device)
        with counted(monkeypatch) as chosen:
            fast = feed_forward_tests.run(case, inputs, dy, "triton")
        assert len(chosen) >= (2 if case.hidden is None else 4)
        exact = feed_forward_tests.in_double(case, inputs, dy)
        feed_forward_tests.check(fast, feed_forward_tests.composed(case, inputs, dy), exact)


@pytest.mark.parametrize("rows", [20, 200, 700], ids="{} rows".format)
def test_every_tile(rows, device):
    """Of the table: which one depends on how many rows there may be."""
    case = Case(rows, 520, 72, hidden=9, residual=True, dtype=HALF)
    inputs, dy = case.inputs(device)
    chip = tuning.Chip(90, 40)
    tile = tuning.gemm_tile(chip, rows + 9, case.outer)
    assert (tile.block_m, tile.block_n) == {20: (64, 64), 200: (64, 64), 700: (128, 128)}[rows]
    check(run(case, inputs, dy, "triton"), composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))


def test_the_tile_is_the_largest_that_gives_half_of_the_chip_work():
    chip = tuning.Chip(90, 132)
    chosen = [tuning.gemm_tile(chip, rows, 768)[:2] for rows in (1, 128, 1536, 2816, 2944, 65536)]
    assert chosen == [(64, 64), (64, 64), (128, 128), (128, 256), (128, 256), (128, 256)]
    assert tuning.gemm_tile(chip, None, 768)[:2] == (128, 256)
    assert tuning.gemm_tile(tuning.Chip(80, 108), 8192, 768) is tuning.gemm_tile(tuning.Chip(0, 1), 8192, 768) is None


def half(*shape, device="cpu"):
    return torch.zeros(shape, dtype=HALF, device=device)


@pytest.mark.parametrize(("a", "b"), [
    (lambda: half(8, 40).float(), lambda: half(40, 16).float()),
    (lambda: half(8, 36), lambda: half(36, 16)),
    (lambda: half(8, 41)[:, 1:], lambda: half(40, 16)),
    (lambda: half(8, 48)[:, 1:41], lambda: half(40, 16)),
    (lambda: half(40, 8).mT, lambda: half(40, 16)),
    (lambda: half(8, 40), lambda: half(40, 32)[:, ::2]),
    (lambda: half(1, 40).expand(8, 40), lambda: half(40, 16)),
    (lambda: half(0, 40), lambda: half(40, 16)),
    (lambda: half(8, 0), lambda: half(0, 16)),
], ids=["float32", "odd step", "odd step of a slice", "odd address", "columns first", "every other", "expanded", "no rows",
        "no columns"])  # fmt: skip
def test_other_operands_are_loaded_by_pointers(a, b, device):
    assert persistent.choose(half(8, 40, device=device), half(40, 16, device=device)) is not None
    assert persistent.choose(a().to(device), b().to(device)) is None


def test_rows_of_a_wider_tensor(device):
    """x, the weight and the residual are slices: their rows lie farther apart than they are long."""
    case = Case(140, 72, 40, residual=True, dtype=HALF)
    (x, weight, bias, residual), _ = case.inputs(device)

    def sliced(t):
        return F.pad(t, (8, 16), value=torch.nan)[:, 8:-16]

    assert persistent.choose(sliced(x), sliced(weight).mT) is not None
    y = linear.linear_fwd(sliced(x), sliced(weight), bias, sliced(residual), None)
    assert torch.equal(y, linear.linear_fwd(x, weight, bias, residual, None))


def test_rows_behind_the_count_are_not_written(device, monkeypatch):
    case = Case(70, 72, 136, residual=True, dtype=HALF)
    (x, weight, bias, residual), _ = case.inputs(device)
    x, residual = poisoned(x, 90), poisoned(residual, 90)
    y = torch.full((160, 72), 7, dtype=HALF, device=device)
    grid, descriptors, sizes = persistent.choose(x, weight.mT)
    count = torch.tensor([70], dtype=torch.int32, device=device)
    linear.linear_fwd_persistent_kernel[grid](
        *descriptors, bias, residual, y, count, 160, 72, 136, *residual.stride(), **sizes
    )  # fmt: skip
    assert (y[70:] == 7).all() and y[:70].isfinite().all()


def test_a_row_has_the_same_bits_in_any_batch(device):
    """Where deterministic, whatever is beside it and behind the count."""
    case = Case(300, 264, 136, residual=True, dtype=HALF)
    (x, weight, bias, residual), _ = case.inputs(device)
    whole = ops.linear(x, weight, bias, residual=residual, deterministic=True, backend="triton")
    for rows in (1, 70, 129):
        count = torch.tensor([rows], dtype=torch.int32, device=device)
        hidden = poisoned(x[:rows], 60), poisoned(residual[:rows], 60)
        y = ops.linear(hidden[0], weight, bias, residual=hidden[1], count=count, deterministic=True, backend="triton")
        assert torch.equal(y[:rows], whole[:rows])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("outer", "inner"), [(768, 768), (3072, 768), (768, 3072), (2304, 768), (1024, 4096)], ids=str)
@pytest.mark.parametrize("rows", [1, 128, 1500, 5000], ids="{} rows".format)
def test_model_sizes(rows, outer, inner, dtype, device):
    """Every tile at the sizes that are served, 1,000 rows of NaN behind the count."""
    case = Case(rows, outer, inner, hidden=1000, residual=True, dtype=dtype)
    inputs, dy = case.inputs("cuda")
    check(run(case, inputs, dy, "triton"), composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rows", [60, 400, 3000], ids="{} rows".format)
def test_feed_forward_of_model_sizes(rows, recompute, device):
    case = feed_forward_tests.Case(rows, 768, 3072, hidden=500, recompute=recompute, dtype=torch.bfloat16)
    inputs, dy = case.inputs("cuda")
    exact = feed_forward_tests.in_double(case, inputs, dy)
    feed_forward_tests.check(
        feed_forward_tests.run(case, inputs, dy, "triton"), feed_forward_tests.composed(case, inputs, dy), exact
    )  # fmt: skip


@pytest.mark.gpu
def test_one_graph_serves_every_count(device):
    """Captured on a stream of its own without a host sync, and replayed with other counts."""
    case = Case(4000, 768, 768, residual=True, dtype=torch.bfloat16)
    (x, weight, bias, residual), _ = case.inputs("cuda")
    count = torch.tensor([4000], dtype=torch.int32, device="cuda")

    def both():
        y = ops.linear(x, weight, bias, residual=residual, count=count, backend="triton")
        return y, ops.linear_gelu(x, weight, bias, count=count, backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")
        both()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    exact, stock = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    for rows in (4000, 1, 0, 129, 3999):
        count.fill_(rows)
        for y in captured:
            y.fill_(torch.nan)
        graph.replay()
        results = (
            (stock + residual, exact + residual.double()),
            (F.gelu(stock), F.gelu(exact)),
        )
        for y, (torch_result, wanted) in zip(captured, results, strict=True):
            assert_close_as_torch(y[:rows], torch_result[:rows], wanted[:rows])
            assert y[rows:].isnan().all()
