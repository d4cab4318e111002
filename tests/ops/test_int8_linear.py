"""int8_linear: the reference against float64 within the bound that rounding has, the kernel against the reference bit by bit."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops import int8_feed_forward, int8_linear, linear, quantize_weight
from roberta_fast.ops.int8_linear import pack_weight, quantize_rows, rotate
from roberta_fast.testing import poisoned

operator = torch.ops.roberta_fast.int8_linear.default
INSTRUCTION = dispatch.load_cpp() or (
    None if torch.ops.roberta_fast_cpp.int8_linear_is_fast() else "this processor has no AVX-512 VNNI"
)


@pytest.fixture(params=["cpp", "torch"])
def backend(request):
    if request.param == "cpp" and INSTRUCTION:
        pytest.skip(INSTRUCTION)
    return request.param


needs_kernel = pytest.mark.skipif(INSTRUCTION is not None, reason=str(INSTRUCTION))


@dataclass(frozen=True)
class Case:
    """``rows`` rows of K = ``inner`` columns to M = ``outer``; ``hidden`` rows of NaN lie behind the count, None: no count."""

    rows: int
    outer: int
    inner: int
    hidden: int | None = None
    bias: bool = True
    gelu: str | None = None
    strided: bool = False

    def inputs(self):
        """(x, weight, bias) without what lies behind the count, float32; seeded. Some channels of x are far larger."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.outer + 977 * self.inner)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).float()

        channels = 1 + 20 * (torch.arange(self.inner) % 50 == 7)
        x, weight = random(self.rows, self.inner) * channels, random(self.outer, self.inner) / max(self.inner, 1) ** 0.5
        x, weight = (t.mT.contiguous().mT if self.strided else t for t in (x, weight))
        return x, weight, random(self.outer) if self.bias else None


CASES = {
    "one block": Case(20, 64, 64),
    "odd sizes": Case(70, 67, 33),
    "a block and all smaller ones": Case(13, 130, 127),
    "several steps of the sum": Case(50, 100, 1100),
    "several tasks": Case(130, 200, 72),
    "no bias": Case(33, 20, 40, bias=False),
    "gelu": Case(50, 130, 96, gelu="none"),
    "tanh gelu": Case(50, 130, 96, gelu="tanh"),
    "strided": Case(70, 67, 33, strided=True),
    "no rows": Case(0, 8, 8),
    "no columns": Case(3, 0, 8),
    "no terms": Case(3, 70, 0),
    "one row": Case(1, 70, 9),
    "one of each": Case(1, 1, 1),
    "count": Case(70, 67, 33, hidden=90),
    "count of zero": Case(0, 20, 33, hidden=70),
    "count of all": Case(70, 20, 33, hidden=0),
    "strided count": Case(70, 30, 20, hidden=90, strided=True, gelu="none"),
}


def run(case, inputs, backend, quantized=None):
    """The real rows of the operator's result."""
    x, weight, bias = inputs
    quantized = quantized or quantize_weight(weight)
    count = None
    if case.hidden is not None:
        x, count = poisoned(x, case.hidden), torch.tensor([case.rows], dtype=torch.int32)
        x = x.mT.contiguous().mT if case.strided else x
    return int8_linear(x, quantized, bias, gelu=case.gelu, count=count, backend=backend)[: case.rows]


def activated(case, u):
    return u if case.gelu is None else F.gelu(u, approximate=case.gelu)


def check(case, inputs, result):
    """Holds every element to |y - act(x Wᵀ + b)| <= L (s/2 Σ|W R| + u/2 Σ|x R| + K s u/4) + rounding.

    L = 1.13 bounds GELU's slope. The rounding is that of float32: of x R, of the dequantized sum, of the bias and GELU.
    """
    x, weight, bias = (None if t is None else t.double() for t in inputs)
    shift = 0 if bias is None else bias
    x_rotated, weight_rotated = rotate(x), rotate(weight, inverse=True)
    s = x_rotated.abs().amax(1, keepdim=True) / 127 if case.inner else x.new_zeros(case.rows, 1)
    u = weight_rotated.abs().amax(1) / 127 if case.inner else x.new_zeros(case.outer)
    sums = [x_rotated.abs().sum(1, keepdim=True), weight_rotated.abs().sum(1)]
    bound = s / 2 * sums[1] + u / 2 * sums[0] + case.inner * s * u / 4
    exact = activated(case, x @ weight.mT + shift)
    rounding = 16 * torch.finfo(torch.float32).eps * (127 * s * sums[1] + 127 * u * sums[0] + abs(shift))
    excess = (result.double() - exact).abs() - 1.13 * bound - rounding
    assert result.shape == exact.shape and result.isfinite().all()
    assert (excess <= 0).all(), f"exceeds the bound by {excess.max():.3e}"
    # The bound adds up what never is of one sign; for random inputs the root of the sum of squares tells finer faults.
    if exact.numel() > 1000 and case.inner > 30:
        variance = (s**2 * (weight_rotated**2).sum(1) + u**2 * (x_rotated**2).sum(1, keepdim=True)) / 12
        slope = activated(case, x @ weight.mT + shift + 1e-6) - exact if case.gelu else x.new_tensor(1e-6)
        expected = (variance * (slope / 1e-6) ** 2).mean().sqrt()
        error = (result.double() - exact).square().mean().sqrt()
        assert error <= 1.25 * expected, f"root mean square error {error:.3e}, and rounding makes {expected:.3e}"


@pytest.mark.parametrize("name", CASES)
def test_within_the_bound_of_rounding(name, backend):
    case = CASES[name]
    inputs = case.inputs()
    check(case, inputs, run(case, inputs, backend))


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_has_the_reference_bits(name):
    """Quantization, sums and scales are the same to the last bit; only bias and GELU may round otherwise."""
    case = CASES[name]
    x, weight, bias = case.inputs()
    plain = replace(case, gelu=None)
    assert torch.equal(*(run(plain, (x, weight, None), b) for b in ("cpp", "torch")))
    ours, reference = (run(case, (x, weight, bias), b) for b in ("cpp", "torch"))
    before_gelu = run(plain, (x, weight, bias), "torch")
    assert ((ours - reference).abs() <= 4e-6 + 5e-7 * before_gelu.abs()).all()


def test_integers_are_exact(backend):
    """With a scale of one on both sides, in a basis that the rotation undoes, the product is the integers' own."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (n, 2080), generator=generator).float() for n in (5, 70))
    x[:, 3], weight[:, 5] = 127, -127  # every row has the largest value
    quantized = pack_weight(weight.to(torch.int8), torch.ones(70))
    assert torch.equal(quantized.integers(), weight.to(torch.int8))
    got = int8_linear(rotate(x, inverse=True), quantized, backend=backend)
    assert torch.equal(rotate(rotate(x, inverse=True)), x)
    assert torch.equal(got.double(), (x.double() @ weight.double().mT).float().double())


def test_the_longest_sum_fits(backend):
    """All products of one sign and the largest: 127² · 131072 is within 1% of what 32 bits hold, with the shift by 128."""
    x, integers = torch.full((1, 2**17), 127.0), torch.full((1, 2**17), 127, dtype=torch.int8)
    result = int8_linear(rotate(x, inverse=True), pack_weight(integers, torch.ones(1)), backend=backend)
    assert result.item() == 127 * 127 * 2**17
    with pytest.raises(ValueError, match="131073 columns"):
        quantize_weight(torch.zeros(1, 2**17 + 1))


def test_rotation_is_orthogonal_and_spreads():
    eye = torch.eye(127, dtype=torch.float64)
    assert torch.equal(rotate(eye) @ rotate(eye, inverse=True).mT, eye)
    spread = rotate(torch.eye(64))
    assert torch.equal(spread.abs(), torch.full((64, 64), 0.125)) and torch.equal(spread, spread.mT)


def test_quantized_weight_is_close_and_symmetric():
    weight = CASES["several steps of the sum"].inputs()[1]
    integers, scale = quantize_rows(weight)
    assert (integers.abs().amax(1) == 127).all(), "each channel uses its whole range"
    quantized = quantize_weight(weight)
    error = rotate(quantized.dequantized(), inverse=True) - rotate(weight, inverse=True)
    assert (error.abs() <= 0.501 * scale[:, None]).all()
    assert torch.equal(quantize_weight(-weight).integers(), -quantized.integers())
    assert torch.equal(quantized.offset, 128 * integers.sum(1, dtype=torch.int32))
    assert quantize_weight(torch.zeros(3, 8)).dequantized().eq(0).all()


def drop_offset(x, weight, bias, gelu):
    quantized = quantize_weight(weight)
    shifted = int8_linear(x, quantized, None, backend="torch")
    scale = rotate(x).abs().amax(1, keepdim=True) / 127
    return activated(Case(0, 0, 0, gelu=gelu), shifted + scale * quantized.scale * quantized.offset + bias)


def one_scale(x, weight, bias, gelu):
    scale = rotate(x).abs().max() / 127
    rows = rotate((rotate(x) / scale).round() * scale, inverse=True)
    return activated(Case(0, 0, 0, gelu=gelu), rows @ quantize_weight(weight).dequantized().mT + bias)


def one_weight_scale(x, weight, bias, gelu):
    rotated = rotate(weight, inverse=True)
    scale = rotated.abs().max() / 127
    quantized = pack_weight((rotated / scale).round().to(torch.int8), scale.expand(weight.shape[0]))
    return int8_linear(x, quantized, bias, gelu=gelu, backend="torch")


def not_rotated(x, weight, bias, gelu):
    scales = [t.abs().amax(1, keepdim=True) / 127 for t in (x, weight)]
    x, weight = ((t / s).round() * s for t, s in zip((x, weight), scales, strict=True))
    return activated(Case(0, 0, 0, gelu=gelu), x @ weight.mT + bias)


MUTANTS = {
    "the offset is not taken off": drop_offset,
    "one scale for all rows": one_scale,
    "one scale for all channels": one_weight_scale,
    "not rotated": not_rotated,
    "bias is dropped": lambda x, w, b, g: int8_linear(x, quantize_weight(w), None, gelu=g, backend="torch"),
    "no GELU": lambda x, w, b, g: int8_linear(x, quantize_weight(w), b, backend="torch"),
    "truncated": lambda x, w, b, g: F.gelu(
        rotate((rotate(x) / (s := rotate(x).abs().amax(1, keepdim=True) / 127)).trunc() * s, True)
        @ quantize_weight(w).dequantized().mT
        + b
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_rule_catches_mutants(name):
    case = Case(60, 130, 192, gelu="none")
    x, weight, bias = case.inputs()
    inputs = (x * torch.linspace(0.1, 10, 60)[:, None], weight * torch.linspace(0.1, 10, 130)[:, None], bias)
    check(case, inputs, run(case, inputs, "torch"))
    with pytest.raises(AssertionError, match=r"exceeds the bound|root mean square"):
        check(case, inputs, MUTANTS[name](*inputs, "none"))


@needs_kernel
def test_tanh_for_erf_is_caught():
    """Quantization hides the difference of the two forms, so the bits of the pre-activation are the measure."""
    case = Case(200, 130, 64)
    x, weight, bias = case.inputs()
    u = run(case, (x, weight, bias), "cpp").double()
    for form, other in (("none", "tanh"), ("tanh", "none")):
        result = run(replace(case, gelu=form), (x, weight, bias), "cpp").double()
        errors = [((result - F.gelu(u, approximate=a)).abs() / (4e-6 + 4e-7 * u.abs())).max().item() for a in (form, other)]
        assert errors[0] < 1 and errors[1] > 20, errors


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_no_number_stays_in_its_row(value, backend):
    x, weight, bias = Case(9, 70, 200).inputs()
    quantized, broken = quantize_weight(weight), x.clone()
    broken[4, 150] = value
    before, after = (int8_linear(t, quantized, bias, gelu="none", backend=backend) for t in (x, broken))
    assert after[4].isnan().all()
    assert torch.equal(torch.cat([after[:4], after[5:]]), torch.cat([before[:4], before[5:]]))


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
def test_rows_of_any_size(size, backend):
    """Rows too small to scale count as zeros."""
    x, weight, _ = Case(4, 70, 200).inputs()
    weight, bias = quantize_weight(weight), torch.linspace(-1, 1, 70)
    result = int8_linear(x * size, weight, bias * size, backend=backend)
    exact = (x * size).double() @ weight.dequantized().double().mT + (bias * size).double()
    assert result.isfinite().all()
    assert ((result.double() - exact).abs() <= max(0.1 * size * x.abs().max().item(), 1e-34)).all()


def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(backend):
    x, weight, bias = Case(500, 200, 333).inputs()
    quantized = quantize_weight(weight)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            for size in (1, 5, 47, 500):
                sizes = x.split(size)[: 500 if size > 1 else 40]
                parts = [int8_linear(part, quantized, bias, gelu="none", backend=backend) for part in sizes]
                results.append(torch.cat(parts))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[-1][: len(result)]) for result in results)


@needs_kernel
@pytest.mark.parametrize("outer", [80, 72], ids=["whole vectors", "part of a vector"])
def test_a_large_result_has_the_bits_of_its_parts(outer):
    """More than 8 MiB, which are written past the caches where they are whole vectors."""
    x, weight, bias = Case(33_000, outer, 24).inputs()
    quantized = quantize_weight(weight)
    parts = torch.cat([int8_linear(part, quantized, bias, backend="cpp") for part in x.split(1000)])
    assert torch.equal(int8_linear(x, quantized, bias, backend="cpp"), parts)
    apart = int8_linear(x, quantized, bias, heads=outer // 8 // 2, backend="cpp")
    assert torch.equal(apart.transpose(0, 1).flatten(1), parts)


@pytest.mark.parametrize("heads", [1, 4, 6, 12], ids=lambda heads: f"{192 // heads} columns")
@pytest.mark.parametrize("rows", [0, 5, 130])
def test_columns_of_heads_lie_together(rows, heads, backend):
    case = Case(rows, 192, 72, hidden=9)
    x, weight, bias = case.inputs()
    quantized, count = quantize_weight(weight), torch.tensor([rows], dtype=torch.int32)
    apart = int8_linear(poisoned(x, 9), quantized, bias, heads=heads, count=count, backend=backend)
    assert apart.shape == (heads, rows + 9, 192 // heads) and apart.is_contiguous()
    assert torch.equal(apart[:, :rows].transpose(0, 1).flatten(1), int8_linear(x, quantized, bias, backend=backend))


@pytest.mark.parametrize("rows", [0, 1, 20, 50, 200])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_feed_forward_has_the_bits_of_its_two_products(rows, gelu, backend):
    """With rows for one thread and for several, a count, a strided x, no bias, and sizes that fill no panel."""
    x, weight, bias = Case(rows, 130, 72, strided=True).inputs()
    _, weight_out, bias_out = Case(7, 33, 130).inputs()
    first, second, count = quantize_weight(weight), quantize_weight(weight_out), torch.tensor([rows], dtype=torch.int32)
    threads = torch.get_num_threads()
    for biases in ((bias, bias_out), (None, None)):
        hidden = int8_linear(x, first, biases[0], gelu=gelu, backend=backend)
        wanted = int8_linear(hidden, second, biases[1], backend=backend)
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                got = int8_feed_forward(
                    poisoned(x, 9), first, biases[0], second, biases[1], gelu=gelu, count=count, backend=backend
                )
                assert got.shape == (rows + 9, 33) and torch.equal(got[:rows], wanted)
        finally:
            torch.set_num_threads(threads)


def test_other_dtypes_run_on_the_reference():
    x, weight, bias = Case(9, 20, 64).inputs()
    quantized = quantize_weight(weight)
    wanted = int8_linear(x.double(), quantized, bias.double(), backend="torch")
    assert wanted.dtype == torch.float64
    for dtype, least in ((torch.float32, 0.9999), (torch.bfloat16, 0.999)):
        got = int8_linear(x.to(dtype), quantized, bias.to(dtype), backend="torch")
        assert got.dtype == dtype and F.cosine_similarity(got.double(), wanted).min() > least
    if not INSTRUCTION:
        with pytest.raises(ValueError, match=r"the C\+\+ kernel computes float32, not bfloat16"):
            int8_linear(x.bfloat16(), quantized, backend="cpp")


@needs_kernel
def test_without_the_instruction_the_reference_runs_and_says_so():
    kernels, x = torch.ops.roberta_fast_cpp, torch.zeros(2, 8)
    best = kernels.instruction_set()
    try:
        kernels.set_instruction_set("avx2")
        dispatch.forget_choices()
        with pytest.warns(RuntimeWarning, match=r"int8_linear on cpu float32 runs on torch \(not cpp: .* no AVX-512 VNNI"):
            int8_linear(x, quantize_weight(torch.zeros(3, 8)))
        with pytest.raises(ValueError, match="backend='cpp' cannot run int8_linear"):
            int8_linear(x, quantize_weight(torch.zeros(3, 8)), backend="cpp")
    finally:
        kernels.set_instruction_set(best)
        dispatch.forget_choices()


def test_backward_raises_and_says_why():
    x, weight, bias = Case(9, 20, 64).inputs()
    y = int8_linear(x.requires_grad_(), quantize_weight(weight), bias)
    with pytest.raises(NotImplementedError, match=r"int8_linear .*no gradient: precision='int8' is for inference"):
        y.sum().backward()
    y = int8_feed_forward(x, quantize_weight(weight), bias, quantize_weight(weight.mT), None, gelu="none")
    with pytest.raises(NotImplementedError, match=r"int8_feed_forward have no gradient: precision='int8' is for inference"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["gelu", "count", "no bias"])
def test_opcheck(name, backend):
    case = CASES[name]
    x, weight, bias = case.inputs()
    count = None if case.hidden is None else torch.tensor([case.rows], dtype=torch.int32)
    quantized = quantize_weight(weight)
    for heads in (None, 1, 2):
        if heads is None or case.outer % heads == 0:
            torch.library.opcheck(operator, (x, *quantized[:3], bias, case.gelu, count, heads, backend))
    out = quantize_weight(weight.mT)
    both = torch.ops.roberta_fast.int8_feed_forward.default
    torch.library.opcheck(both, (x, *quantized[:3], bias, case.gelu or "none", *out[:3], None, count, backend))


def test_fp32_is_far_closer():
    """So that the bound above is no loose one: what it allows is two orders above an fp32 product's error."""
    case = Case(60, 130, 192)
    inputs = x, weight, bias = case.inputs()
    exact = x.double() @ weight.double().mT + bias
    errors = [(t.double() - exact).abs().max() for t in (linear(x, weight, bias), run(case, inputs, "torch"))]
    assert 100 * errors[0] < errors[1]
