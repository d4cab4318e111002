"""fp8_linear, fp8_quantize, add_layer_norm_fp8: rounding to the bit, errors within what eight bits explain, bounds that hold."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from roberta_fast.kernels.fp8 import to_e4m3
from roberta_fast.ops import add_layer_norm, add_layer_norm_fp8, attention, fp8_linear, fp8_quantize, quantize_weight_fp8
from roberta_fast.ops.fp8_linear import E4M3, LARGEST, inverse_of, layer_norm_bound, linear_bound
from roberta_fast.testing import assert_close_as_torch, poisoned, segment_bounds, ulp_error


@pytest.fixture(params=["triton", "torch"])
def backend(request, triton_device):
    """The kernels, and the reference composition, which serves wherever no kernel does."""
    return SimpleNamespace(name=request.param, device=triton_device)


HALF_STEP = 2.0**-4  # of a normal number; below 2⁻⁶ it is 2⁻¹⁰


@triton.jit
def round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, to_e4m3(tl.load(x_ptr + offsets)))


def every_number():
    """All 254 finite numbers of the type, the middles between them, and those middles' neighbours in float32."""
    grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    grid = grid[grid.isfinite()].unique()
    middles = (grid[1:] + grid[:-1]) / 2
    infinity = torch.tensor(math.inf)
    return torch.cat([grid, middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)])


def test_rounds_to_the_nearest_even_number(triton_device):
    beyond = torch.tensor([449.0, 464.0, 480.0, 1e30, -1e30, math.inf, -math.inf, math.nan, -math.nan, 1e-30, -1e-30, 0.0])
    x = torch.cat([every_number(), beyond])
    x = F.pad(x, (0, -len(x) % 256)).to(triton_device)
    rounded = torch.empty_like(x, dtype=E4M3)
    round_kernel[(len(x) // 256,)](x, rounded, BLOCK=256)
    assert torch.equal(rounded.float().nan_to_num(7e4), x.clamp(-LARGEST, LARGEST).to(E4M3).float().nan_to_num(7e4))


def layer(norm_seed=0, hidden=96, inner=112, rows=40, outlier=20.0):
    """(x before a LayerNorm, its parameters, a weight, a bias): with a channel far larger than the others."""
    generator = torch.Generator().manual_seed(norm_seed)
    x, gamma, beta, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, hidden), (hidden,), (hidden,), (inner, hidden), (inner,))
    )
    gamma[3], beta[5] = outlier, -outlier
    return x, gamma, beta * 0.1, weight * 0.2, bias


def product(backend, count=None, gelu=None, inverse=None, dtype=torch.float32, **how):
    """(fp8_linear behind a LayerNorm, that LayerNorm's result in float64, the weight, the bias, the bounds)."""
    x, gamma, beta, weight, bias = (t.to(backend.device) for t in layer(**how))
    bound = layer_norm_bound(gamma, beta)
    source = x if count is None else poisoned(x, 30)
    options = {"count": count, "backend": backend.name}
    normalized, rounded = add_layer_norm_fp8(source, None, gamma, beta, 1e-5, inverse_of(bound), **options)
    y = fp8_linear(rounded, quantize_weight_fp8(weight, bound), bias, gelu=gelu, inverse=inverse, dtype=dtype, **options)
    return y, normalized, rounded, weight, bias, bound


def explained(normalized, weight, bound):
    """What the rounding of both factors may move each element of a product by."""
    x, w = normalized.double().abs(), weight.double().abs()
    t = bound.double() / LARGEST
    scale = (w * t).amax(1, keepdim=True) / LARGEST
    moved_x = torch.maximum(x * HALF_STEP, t * 2.0**-10)
    moved_w = torch.maximum(w * HALF_STEP, scale / t * 2.0**-10)
    return moved_x @ w.mT + x @ moved_w.mT + moved_x @ moved_w.mT


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("counted", [False, True])
def test_errors_are_those_of_eight_bits(backend, gelu, counted):
    count = torch.tensor([40], dtype=torch.int32, device=backend.device) if counted else None
    y, normalized, _, weight, bias, bound = product(backend, count, gelu)
    y, normalized = y[:40], normalized[:40]
    exact = normalized.double() @ weight.double().mT + bias.double()
    allowed = explained(normalized, weight, bound) * (1 if gelu is None else 1.13) + 1e-5  # GELU's steepest slope
    exact = exact if gelu is None else F.gelu(exact, approximate=gelu)
    assert ((y.double() - exact).abs() <= allowed).all()
    assert ((y.double() - exact).abs() > 0.02 * allowed).float().mean() > 0.2  # the bound is not idle


@pytest.mark.parametrize("gelu", [None, "none"])
def test_kernels_and_reference_agree(backend, gelu):
    """The products of what was rounded are exact but for float32's sums."""
    y, _, rounded, weight, bias, bound = product(backend, gelu=gelu)
    values, scale = quantize_weight_fp8(weight, bound)
    exact = (rounded.double() @ values.double().mT) * scale.double() + bias.double()
    exact = exact if gelu is None else F.gelu(exact)
    terms = (rounded.double().abs() @ values.double().abs().mT) * scale.double() + bias.double().abs()
    # Hopper's tensor cores keep 13 bits of a sum behind its largest term's first.
    assert ((y.double() - exact).abs() <= terms * (2.0**-12 if y.is_cuda else 2.0**-21) + 1e-6).all()


def test_results_round_for_the_next_product(backend):
    y, _, _, weight, bias, _ = product(backend, gelu="none")
    inverse = inverse_of(linear_bound(weight, bias, *(t.to(backend.device) for t in layer()[1:3])))
    rounded = product(backend, gelu="none", inverse=inverse)[0]
    assert rounded.dtype == E4M3
    exact = (y * inverse).clamp(-LARGEST, LARGEST)
    off = (rounded.double() - exact.double()).abs()
    assert (off <= torch.maximum(exact.double().abs() * HALF_STEP, torch.tensor(2.0**-10)) * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_residual", [False, True])
def test_layer_norm_rounds_its_own_result(backend, dtype, has_residual):
    x, gamma, beta, _, _ = (t.to(backend.device) for t in layer(hidden=100))
    x, residual = x.to(dtype), x.flip(0).to(dtype) if has_residual else None
    inverse = inverse_of(layer_norm_bound(gamma, beta))
    y, rounded = add_layer_norm_fp8(x, residual, gamma, beta, 1e-5, inverse, backend=backend.name)
    assert torch.equal(y, add_layer_norm(x, residual, gamma, beta, 1e-5, backend=backend.name))
    z = x.double() if residual is None else x.double() + residual.double()
    exact = F.layer_norm(z, (100,), gamma.double(), beta.double(), 1e-5) * inverse.double()
    assert ulp_error(rounded.float(), exact, exact.abs().clamp(min=2.0**-6)).max() <= 0.5 * 2**20 * 1.02
    assert rounded.float().abs().max() > 1


@pytest.mark.parametrize("longest", [12, 70])
def test_attention_rounds_its_own_result(backend, longest):
    """By the short kernel and by the general one."""
    generator = torch.Generator().manual_seed(3)
    bounds = segment_bounds([longest, 1, 0, 8], backend.device)
    qkv = torch.randn(longest + 9, 3, 2, 24, generator=generator).to(backend.device).unbind(1)
    inverse = (torch.rand(2, 24, generator=generator) * 300 + 100).to(backend.device)
    how = {"query_only": torch.tensor([0, 1, 0, 2], dtype=torch.int32, device=backend.device), "backend": backend.name}
    rounded = attention(*qkv, bounds, bounds, longest, longest, inverse=inverse, **how)
    exact = attention(*(t.double() for t in qkv), bounds, bounds, longest, longest, **{**how, "backend": "torch"}) * inverse
    exact = exact.clamp(-LARGEST, LARGEST)
    assert rounded.dtype == E4M3 and (exact.abs() == LARGEST).any()
    off = (rounded.double() - exact).abs()
    assert (off <= torch.maximum(exact.abs() * HALF_STEP, torch.tensor(2.0**-10)) * 1.01).all()


def test_attention_on_the_cpu_rounds_what_its_kernel_gives():
    query = torch.randn(9, 2, 24)
    bounds, inverse = segment_bounds([9]), torch.rand(2, 24) * 300 + 100
    rounded = attention(query, query, query, bounds, bounds, 9, 9, inverse=inverse)
    wanted = attention(query, query, query, bounds, bounds, 9, 9) * inverse
    assert torch.equal(rounded.float(), wanted.clamp(-LARGEST, LARGEST).to(E4M3).float())


def test_the_rule_holds_8_bits():
    x = torch.arange(16).to(E4M3)
    assert_close_as_torch(x, x, x)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close_as_torch((x.float() / 0).to(E4M3), x, x)


def test_quantize_and_rows_behind_the_count(backend):
    x, gamma, beta, _, _ = (t.to(backend.device) for t in layer())
    inverse = inverse_of(layer_norm_bound(gamma, beta))
    count = torch.tensor([40], dtype=torch.int32, device=backend.device)
    rounded = fp8_quantize(poisoned(x, 9), inverse, count=count, backend=backend.name)
    assert torch.equal(rounded[:40].float(), (x * inverse).clamp(-LARGEST, LARGEST).to(E4M3).float())
    assert fp8_quantize(x[:0], inverse, backend=backend.name).shape == (0, 96)
    strided = x.mT.contiguous().mT
    assert torch.equal(fp8_quantize(strided, inverse, backend=backend.name).float(), rounded[:40].float())


def test_no_layer_norm_exceeds_the_bounds():
    """The worst rows there are: all of a row's length in one channel, or along a weight's own direction."""
    _, gamma, beta, weight, bias = layer(hidden=64, inner=48)
    spikes = torch.cat([torch.eye(64), -torch.eye(64)]) * 1e3
    along = torch.cat([weight * gamma, -weight * gamma]) * 1e3
    normalized = F.layer_norm(torch.cat([spikes, along]), (64,), gamma, beta, 1e-12)
    bound, inner_bound = layer_norm_bound(gamma, beta), linear_bound(weight, bias, gamma, beta)
    assert (normalized.abs() <= bound).all() and (normalized.abs().amax(0) > 0.9 * bound - beta.abs()).all()
    inner = F.linear(normalized, weight, bias)
    assert (inner.abs() <= inner_bound).all() and (inner.abs().amax(0) > 0.8 * inner_bound).all()
    assert (F.gelu(inner).abs() <= inner_bound).all()


def test_a_row_has_the_same_bits_in_any_batch(backend):
    whole, alone = product(backend, rows=40)[0], product(backend, rows=40)
    _, _, rounded, weight, bias, bound = alone
    one = fp8_linear(rounded[7:8], quantize_weight_fp8(weight, bound), bias, dtype=torch.float32, backend=backend.name)
    if backend.name == "triton":
        # NumPy, which multiplies in Triton's interpreter, sums in another order where memory lies otherwise.
        allowed = 0.0 if backend.device == "cuda" else 1e-5
        torch.testing.assert_close(one, whole[7:8], rtol=allowed, atol=allowed)


def test_operators_trace_and_have_no_gradient():
    x, gamma, beta, weight, bias = layer(hidden=32, inner=48, rows=5)
    bound = layer_norm_bound(gamma, beta)
    values, scale = quantize_weight_fp8(weight, bound)
    inverse, library = inverse_of(bound), torch.ops.roberta_fast
    rounded = fp8_quantize(x, inverse)
    tests = "test_faketensor"  # that of the schema multiplies its results, which torch cannot in eight bits
    torch.library.opcheck(library.fp8_quantize.default, (x, inverse, None, "torch"), test_utils=tests)
    arguments = (rounded, values, scale, bias, "none", None, torch.bfloat16, None, "torch")
    torch.library.opcheck(library.fp8_linear.default, arguments, test_utils=tests)
    arguments = (x, x, gamma, beta, 1e-5, inverse, None, "torch")
    torch.library.opcheck(library.add_layer_norm_fp8.default, arguments, test_utils=tests)
    y, _ = add_layer_norm_fp8(x.requires_grad_(), None, gamma, beta, 1e-5, inverse)
    with pytest.raises(NotImplementedError, match="products in fp8 have no gradient"):
        y.sum().backward()


def good(hidden=32, inner=48):
    _, gamma, beta, weight, _ = layer(hidden=hidden, inner=inner)
    return quantize_weight_fp8(weight, layer_norm_bound(gamma, beta))


ROWS = torch.zeros(2, 32).to(E4M3)
REFUSALS = {
    "odd": (
        lambda: quantize_weight_fp8(torch.zeros(8, 32), torch.ones(32)),
        r"weight must be .*multiples of 16, got .*\(8, 32\)",
    ),
    "bound": (lambda: quantize_weight_fp8(torch.zeros(16, 32), torch.ones(16)), r"bound must be \[32\], got shape \(16,\)"),
    "nan": (lambda: quantize_weight_fp8(torch.full((16, 32), math.nan), torch.ones(32)), "weight must be finite"),
    "x": (
        lambda: fp8_linear(torch.zeros(2, 32), good()),
        r"x must be torch.float8_e4m3fn \[N, 32\].*, got torch.float32 \(2, 32\)",
    ),
    "columns": (lambda: fp8_linear(ROWS[:, :16], good()), r"x must be .*\[N, 32\], as the weight has 32, got"),
    "gelu": (lambda: fp8_linear(ROWS, good(), gelu="erf"), "gelu must be None or one of .* got 'erf'"),
    "bias": (lambda: fp8_linear(ROWS, good(), torch.zeros(47)), r"bias must be float32 \[48\], got torch.float32 \(47,\)"),
    "inverse": (
        lambda: fp8_linear(ROWS, good(), inverse=torch.zeros(48).half()),
        r"inverse must be float32 \[48\], got torch.float16",
    ),
    "quantize": (lambda: fp8_quantize(torch.zeros(2, 32), torch.ones(31)), r"inverse must be float32 \[32\], got"),
    "attention": (
        lambda: attention(*[torch.zeros(4, 2, 8)] * 3, *[segment_bounds([4])] * 2, 4, 4, inverse=torch.ones(8)),
        r"inverse must be float32 \[H, D\] = \(2, 8\), got torch.float32 \(8,\)",
    ),
    "norm": (
        lambda: add_layer_norm_fp8(torch.zeros(2, 32), None, torch.ones(32), torch.ones(32), 1e-5, torch.ones(31)),
        r"inverse must be float32 \[32\], got",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_argument(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
