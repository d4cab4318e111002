"""The C++ extension: how it was built, its guard, its dropout and functions bit by bit, and what its results may depend on."""

import subprocess
import sys

import pytest
import torch

from roberta_fast import dispatch, ops
from roberta_fast.ops import dropout
from roberta_fast.ops.add_layer_norm import add_layer_norm_backward_ref, add_layer_norm_ref
from roberta_fast.ops.attention import attention_backward_ref, attention_ref
from roberta_fast.testing import assert_close_as_torch, segment_bounds, ulp_error

pytestmark = pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))
kernels = torch.ops.roberta_fast_cpp
SEED = torch.tensor([0x123456789ABCDEF])
LENGTHS = [5, 0, 70, 1, 33]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    """Every instruction set that this processor has, one test each."""
    best = kernels.instruction_set()
    try:
        kernels.set_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    kernels.set_instruction_set(best)


def attention_arguments(lengths, head_dim=32, heads=3, dropout_p=0.0, causal=False, skip=False):
    """Random q, k, v as slices of one projection, and the other arguments of attention_fwd."""
    torch.manual_seed(0)
    bounds = segment_bounds(lengths)
    query, key, value = torch.randn(sum(lengths), 3, heads, head_dim).unbind(1)
    query_only = torch.tensor([b % 2 for b in range(len(lengths))], dtype=torch.int32) if skip else None
    seed = SEED if dropout_p else None
    longest = max(lengths)
    return query, key, value, bounds, bounds, longest, longest, head_dim**-0.5, causal, query_only, dropout_p, seed, True


def test_build_info_tells_what_was_built():
    from roberta_fast import _C

    info = _C.build_info()
    assert set(info) == {"compiler", "cxx_standard", "flags", "instruction_sets", "torch", "cuda"}
    assert info["torch"] == torch.__version__
    assert info["compiler"].split()[0] in ("gcc", "clang") and "-O3" in info["flags"]
    assert kernels.instruction_set() in info["instruction_sets"]


def test_another_torch_is_refused_with_a_reason():
    code = (
        "import torch; torch.__version__ = '2.9.1'; from roberta_fast import dispatch; print(dispatch.load_cpp());"
        "print(hasattr(torch.ops.roberta_fast_cpp, 'pack'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    reason, loaded = out.strip().splitlines()
    assert f"built for torch {torch.__version__} and this is torch 2.9.1" in reason and "--no-build-isolation" in reason
    assert loaded == "False"


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'mmx' is unknown"):
        kernels.set_instruction_set("mmx")


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_layer_norm_drops_what_the_definition_drops(p, instruction_set):
    """dx is zero exactly where an element was dropped, as dz is nowhere zero."""
    torch.manual_seed(0)
    x, dy, weight = torch.randn(19, 300), torch.randn(19, 300), torch.ones(300)
    _, mean, rstd = kernels.add_layer_norm_fwd(x, x, weight, weight, 1e-5, p, SEED)
    dz, dx, _, _ = kernels.add_layer_norm_bwd(dy, x, x, weight, mean, rstd, p, SEED)
    keep = dropout.keep_mask(SEED, p, torch.arange(19), 300)
    assert (dz != 0).all() and torch.equal(dx != 0, keep)
    assert torch.equal(dx[keep], (dz * dropout.scale(p))[keep])


@pytest.mark.parametrize("skip", [False, True], ids=["all keys", "first key unseen"])
def test_attention_drops_what_the_definition_drops(skip, instruction_set):
    """With equal scores and V the identity, out is the mask: nonzero where a weight was kept."""
    lengths, heads = [21, 100, 8], 2
    bounds, rows = segment_bounds(lengths), sum(lengths)
    query_only = torch.full((3,), int(skip), dtype=torch.int32)
    query = torch.zeros(rows, heads, 100)
    value = torch.cat([torch.eye(n, 100) for n in lengths])[:, None].expand(-1, heads, -1).contiguous()
    out, _ = kernels.attention_fwd(query, query, value, bounds, bounds, 100, 100, 1.0, False, query_only, 0.3, SEED)
    for segment, (begin, n) in enumerate(zip(bounds.tolist(), lengths, strict=False)):
        for head in range(heads):
            keep = dropout.keep_mask(SEED, 0.3, torch.arange(n), n, head, segment)
            keep[:, : int(skip)] = False
            assert torch.equal(out[begin : begin + n, head, :n] != 0, keep)


def test_exp_and_log_of_attention_in_ulps(instruction_set):
    """Of two keys with scores x and 0, x <= 0, the weights are e^x / (1 + e^x) and 1 / (1 + e^x), and lse is log(1 + e^x)."""
    x = -torch.cat([torch.logspace(-6, 1.93, 4000), torch.linspace(0, 85, 4000)])
    x = x[: x.numel() // 2 * 2]
    rows = x.numel()
    query = torch.zeros(rows, 1, 16)
    query[:, 0, 0] = x
    key = torch.zeros(2, 1, 16)
    key[0, 0, 0] = 1
    value = torch.eye(2, 16)[:, None]
    queries, keys = segment_bounds([rows]), segment_bounds([2])
    out, lse = kernels.attention_fwd(query, key, value, queries, keys, rows, 2, 1.0)
    power = x.double().exp()
    # The exponential's 1.1 and half an ulp each for sum, reciprocal and product, where an ulp may weigh twice as much.
    assert ulp_error(out[:, 0, 0], power / (1 + power)).max() < 3.5
    assert ulp_error(out[:, 0, 1], 1 / (1 + power)).max() < 2.5
    # The logarithm's own rounding; the sum's, half an ulp of a number between 1 and 2, is absolute.
    assert ((lse[0].double() - power.log1p()).abs() < 1.5e-7).all()


@pytest.mark.parametrize(("approximate", "ulps"), [("none", 1.9), ("tanh", 2.5)])
def test_gelu_in_ulps(approximate, ulps, instruction_set):
    """Over the whole range and down to the subnormal numbers; without fused multiply-add a little more."""
    u = torch.cat([torch.linspace(-14.5, 14.5, 150_001), -torch.logspace(-37, 1, 30_000), torch.logspace(-37, 38, 15_999)])
    u = u.reshape(-1, 16)
    y, _ = kernels.linear_gelu_fwd(u, torch.eye(16), None, approximate)
    x = u.double()
    if approximate == "tanh":
        exact = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    else:
        exact = x * torch.special.erfc(-x * 0.5**0.5) / 2
    error = ulp_error(y, exact).flatten()
    worst = error.argmax()
    assert error[worst] < ulps + 0.7 * (instruction_set == "baseline"), f"{error[worst]:.3g} ulps at {u.flatten()[worst]:.7g}"


def test_gelu_at_the_ends():
    y, _ = kernels.linear_gelu_fwd(torch.zeros(1, 1), torch.zeros(4, 1), torch.tensor([torch.inf, -torch.inf, torch.nan, -1e30]))
    assert y[0, 0] == torch.inf and y[0, 1] == 0 and y[0, 2].isnan() and y[0, 3] == 0


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("skip", [False, True], ids=["", "query only"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_attention_of_every_instruction_set(head_dim, causal, skip, dtype, instruction_set):
    arguments = attention_arguments(LENGTHS, head_dim, dropout_p=0.2, causal=causal, skip=skip)
    arguments = (*(t.to(dtype) for t in arguments[:3]), *arguments[3:])
    double = [t.double() for t in arguments[:3]]
    out, lse = kernels.attention_fwd(*arguments)
    torch_out, torch_lse = attention_ref(*arguments)
    exact_out, exact_lse = attention_ref(*double, *arguments[3:])
    assert_close_as_torch(out, torch_out, exact_out)
    dout = torch.randn_like(out)
    gradients = kernels.attention_bwd(dout, *arguments[:3], out, lse, *arguments[3:])
    torch_gradients = attention_backward_ref(dout, *arguments[:3], torch_out, torch_lse, *arguments[3:])
    exact = attention_backward_ref(dout.double(), *double, exact_out, exact_lse, *arguments[3:])
    for name, *results in zip(("dquery", "dkey", "dvalue"), gradients, torch_gradients, exact, strict=True):
        assert_close_as_torch(*results, factor=3.0, name=name)


@DTYPES
@pytest.mark.parametrize("hidden", [64, 77])
def test_layer_norm_of_every_instruction_set(hidden, dtype, instruction_set):
    torch.manual_seed(0)
    x, residual, dy = torch.randn(3, 40, hidden).to(dtype).unbind()
    weight, bias = torch.randn(2, hidden).to(dtype).unbind()
    result = kernels.add_layer_norm_fwd(x, residual, weight, bias, 1e-5, 0.1, SEED)
    plain = add_layer_norm_ref(x, residual, weight, bias, 1e-5, 0.1, SEED)
    exact = add_layer_norm_ref(*(t.double() for t in (x, residual, weight, bias)), 1e-5, 0.1, SEED)
    for got in zip(result, plain, exact, strict=True):
        assert_close_as_torch(*got)
    result = kernels.add_layer_norm_bwd(dy, x, residual, weight, *result[1:], 0.1, SEED)
    plain = add_layer_norm_backward_ref(dy, x, residual, weight, *plain[1:], 0.1, SEED)
    exact = add_layer_norm_backward_ref(*(t.double() for t in (dy, x, residual, weight)), *exact[1:], 0.1, SEED)
    for got in zip(result, plain, exact, strict=True):
        assert_close_as_torch(*got, factor=3.0)


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_no_number(instruction_set):
    """LayerNorm with a weight of zero gives its bias, which comes in float32 here."""
    whole = torch.tensor([1.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3e38, 1e-40, 1e30])
    halfway = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F8000], dtype=torch.int32).view(torch.float32)
    bias = torch.cat([whole, halfway, -halfway, torch.randn(61)])
    for size in (len(bias), 16):  # with and without a rest beyond whole vectors
        zeros = torch.zeros(2, size, dtype=torch.bfloat16)
        y, _, _ = kernels.add_layer_norm_fwd(zeros, None, torch.zeros(size), bias[:size], 1e-5)
        assert torch.equal(y.nan_to_num(7.0), bias[:size].bfloat16().nan_to_num(7.0).expand(2, -1))
        assert torch.equal(y.isnan()[0], bias[:size].isnan())


def test_products_of_bfloat16_without_the_instruction():
    """PyTorch's serve, and the reason is said."""
    best, x = kernels.instruction_set(), torch.ones(2, 8, dtype=torch.bfloat16)
    try:
        kernels.set_instruction_set("baseline")
        dispatch.forget_choices()
        with pytest.raises(NotImplementedError, match="this processor has no AVX-512 BF16"):
            kernels.linear_fwd(x, x)
        with pytest.warns(RuntimeWarning, match=r"linear_gelu on cpu bfloat16 runs on torch \(not cpp: .* no AVX-512 BF16"):
            ops.linear_gelu(x, x)
        assert torch.equal(ops.linear(x, x), torch.full((2, 2), 8, dtype=torch.bfloat16))
    finally:
        kernels.set_instruction_set(best)
        dispatch.forget_choices()


def every_result(threads):
    """What each operator returns with this many threads, on inputs large enough to be divided among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x, dy = torch.randn(2, 200, 512).unbind()
        weight, bias = torch.randn(2, 512).unbind()
        normed = kernels.add_layer_norm_fwd(x, dy, weight, bias, 1e-5, 0.1, SEED)
        gelu = kernels.linear_gelu_fwd(x[:, :16], torch.eye(512, 16), bias, "none", True)
        arguments = attention_arguments([150, 3, 70], dropout_p=0.1, causal=True)
        out, lse = kernels.attention_fwd(*arguments)
        mask = (torch.rand(40, 4000) < 0.5).int()
        indices = kernels.pack_indices(mask)
        rows = kernels.pack(torch.randn(40, 4000, 3), indices[0])
        return [
            *normed,
            *kernels.add_layer_norm_bwd(dy, x, dy, weight, *normed[1:], 0.1, SEED),
            *gelu,
            *kernels.linear_gelu_bwd(dy, gelu[1], x[:, :16], torch.eye(512, 16), True)[1:],
            out,
            lse,
            *kernels.attention_bwd(out, *arguments[:3], out, lse, *arguments[3:]),
            *indices,
            rows,
            kernels.unpack(rows, indices[0], 40, 4000),
        ]
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_threads():
    for one, several in zip(every_result(1), every_result(3), strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_a_segment_gives_the_same_bits_in_any_batch(causal):
    """Without dropout, whose draws are those of the segment's place in the batch."""
    arguments = attention_arguments(LENGTHS, causal=causal)
    out, lse = kernels.attention_fwd(*arguments)
    gradients = kernels.attention_bwd(out, *arguments[:3], out, lse, *arguments[3:])
    for n, begin in zip(LENGTHS, segment_bounds(LENGTHS).tolist(), strict=False):
        part = slice(begin, begin + n)
        alone = (*(t[part] for t in arguments[:3]), segment_bounds([n]), segment_bounds([n]), *arguments[5:])
        out_alone, lse_alone = kernels.attention_fwd(*alone)
        assert torch.equal(out_alone, out[part]) and torch.equal(lse_alone, lse[:, part])
        again = kernels.attention_bwd(out_alone, *alone[:3], out_alone, lse_alone, *alone[3:])
        assert all(torch.equal(a, g[part]) for a, g in zip(again, gradients, strict=True))


def test_an_element_gives_the_same_bits_anywhere():
    """Where it stands in a row or a vector, and whether the pre-activation is saved, must not reach the last bit."""
    torch.manual_seed(0)
    u = 3 * torch.randn(37 * 64)
    expected = kernels.linear_gelu_fwd(u.view(-1, 64), torch.eye(64))[0].flatten()
    for columns in (37, 5, 16):
        part = u[: u.numel() // columns * columns].view(-1, columns)
        for save in (False, True):
            y, _ = kernels.linear_gelu_fwd(part, torch.eye(columns), None, "none", save)
            assert torch.equal(y.flatten(), expected[: y.numel()])


def test_nan_stays_in_its_segment_and_reaches_all_of_it():
    arguments = list(attention_arguments([5, 9]))
    arguments[1] = arguments[1].clone()
    arguments[1][2] = torch.nan
    out, lse = kernels.attention_fwd(*arguments)
    assert out[:5].isnan().all() and lse[:, :5].isnan().all() and out[5:].isfinite().all()


BAD_ARGUMENTS = {
    "dtype": (
        lambda: kernels.add_layer_norm_fwd(*[torch.ones(2, 4).half()] * 2, *[torch.ones(4)] * 2, 1e-5),
        "x must be .*float32",
    ),
    "weight": (
        lambda: kernels.add_layer_norm_fwd(torch.ones(2, 4), None, torch.ones(3), torch.ones(4), 1e-5),
        r"weight .*\[4\].*\[3\]",
    ),
    "seed": (lambda: kernels.add_layer_norm_fwd(torch.ones(2, 4), None, *[torch.ones(4)] * 2, 1e-5, 0.1), "seed must be"),
    "dropout_p": (lambda: kernels.add_layer_norm_fwd(torch.ones(2, 4), None, *[torch.ones(4)] * 2, 1e-5, 1.0, SEED), "dropout_p"),
    "count": (lambda: kernels.linear_gelu_fwd(torch.ones(2, 4), torch.ones(3, 4), count=torch.ones(1)), "count must be int32"),
    "approximate": (lambda: kernels.linear_gelu_fwd(torch.ones(2, 4), torch.ones(3, 4), None, "sigmoid"), "'sigmoid'"),
    "inner dimension": (lambda: kernels.linear_gelu_fwd(torch.ones(2, 4), torch.ones(3, 5)), r"weight .*\[3, 4\]"),
    "heads": (
        lambda: kernels.attention_fwd(torch.ones(2, 3, 16), *[torch.ones(2, 2, 16)] * 2, *[segment_bounds([2])] * 2, 2, 2, 1.0),
        "key must have shape",
    ),
    "bounds too long": (
        lambda: kernels.attention_fwd(*[torch.ones(2, 3, 16)] * 3, *[segment_bounds([3])] * 2, 2, 2, 1.0),
        "at most 2",
    ),
    "bounds descend": (
        lambda: kernels.attention_fwd(*[torch.ones(2, 3, 16)] * 3, *[torch.tensor([0, 2, 1], dtype=torch.int32)] * 2, 2, 2, 1.0),
        "must ascend",
    ),
    "bounds dtype": (lambda: kernels.attention_fwd(*[torch.ones(2, 3, 16)] * 3, *[torch.tensor([0, 2])] * 2, 2, 2, 1.0), "int32"),
    "mask": (lambda: kernels.pack_indices(torch.ones(3)), "mask must be"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name):
    call, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_capacity_and_places_are_checked():
    with pytest.raises(RuntimeError, match="capacity=5"):
        kernels.pack_indices(torch.ones(2, 3), 5)
    for place in (6, -1):
        with pytest.raises(IndexError, match=rf"indices\[1\]={place} .* 6 places"):
            kernels.pack(torch.ones(2, 3, 4), torch.tensor([0, place]))
        with pytest.raises(IndexError, match=rf"indices\[1\]={place} .* 6 places"):
            kernels.unpack(torch.ones(2, 4), torch.tensor([0, place]), 2, 3)
