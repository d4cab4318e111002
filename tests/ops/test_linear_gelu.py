"""linear_gelu: GELU per element in ulps, the kernels against the reference, and mutants that the rules must catch."""

import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from roberta_fast.kernels import gelu as kernels
from roberta_fast.ops import linear_gelu
from roberta_fast.ops.linear_gelu import linear_gelu_backward_ref, linear_gelu_ref
from roberta_fast.testing import assert_close_as_torch, poisoned, ulp_error

operator = torch.ops.roberta_fast.linear_gelu.default
backward_operator = torch.ops.roberta_fast.linear_gelu_backward.default
REPOSITORY = Path(__file__).parents[2]

# Per output type: Triton's name, and how many units in the last place GELU may be off before it is rounded.
TYPES = {torch.bfloat16: (tl.bfloat16, 0.1), torch.float16: (tl.float16, 0.1), torch.float32: (tl.float32, 8.0)}
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=["bfloat16", "float16", "float32"])
FORMS = pytest.mark.parametrize("approximate", ["none", "tanh"])


def points(dtype):
    """float32 values over the whole range: both tails until nothing is left, around every feature, and next to zero."""
    tiny = torch.logspace(-37, 0, 3000)
    x = torch.cat([torch.linspace(-15, 15, 60_001), torch.linspace(-40, 40, 4001), tiny, -tiny, torch.tensor([0.0, 1e30, -1e30])])
    return x[x.abs() < torch.finfo(dtype).max]


def exact_gelu(x, approximate="none"):
    """(GELU, GELU′, the largest of GELU′ and its two terms) in float64, where nothing cancels."""
    x = x.double()
    if approximate == "tanh":
        y = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        first, slope = torch.sigmoid(y), 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        second = x * first * torch.sigmoid(-y) * slope
    else:
        first, second = torch.special.erfc(-x / math.sqrt(2)) / 2, x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x * first, first + second, torch.stack([first, second.abs(), first + second]).amax(0)


def check_elements(result, exact, at, x, approximate="none"):
    """Holds each element of a rounded result to its type's ulps at ``at``; a subnormal may have become zero."""
    allowed = 0.5 + TYPES[result.dtype][1]
    if approximate == "tanh" and result.dtype == torch.float32:
        # An ulp of its exponent, 2√(2/π)(x + 0.044715 x³), is so much of the result; the exact form carries it in two parts.
        allowed = allowed + 4 * (1.6 * (x + 0.044715 * x**3)).abs().clamp(max=100).double()
    error = ulp_error(result, exact, at)
    flushed = (result == 0) & (at.abs() < torch.finfo(result.dtype).smallest_normal)
    excess = torch.where(flushed, 0, error - allowed)
    worst = excess.argmax()
    assert excess[worst] <= 0, f"{error[worst]:.3g} ulps off at x = {x[worst]:.7g}, where {exact[worst]:.7g} is exact"


@triton.jit
def apply_kernel(x_ptr, y_ptr, slope_ptr, N, DTYPE: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """GELU and GELU′ of x [N], unrounded."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0)
    tl.store(y_ptr + offsets, kernels.gelu(x, DTYPE, TANH), mask=offsets < N)
    tl.store(slope_ptr + offsets, kernels.gelu_derivative(x, DTYPE, TANH), mask=offsets < N)


def apply(x, dtype, approximate="none", device="cpu"):
    """(GELU, GELU′) of float32 x by the kernels' device functions for ``dtype``, unrounded, on the CPU."""
    x = x.to(device)
    y, slope = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    apply_kernel[(triton.cdiv(len(x), 4096),)](x, y, slope, len(x), TYPES[dtype][0], approximate == "tanh", BLOCK=4096)
    return y.cpu(), slope.cpu()


@DTYPES
@FORMS
def test_each_element_of_gelu_and_its_derivative(dtype, approximate, triton_device):
    x = points(dtype)
    y, slope = apply(x, dtype, approximate, triton_device)
    exact, exact_slope, terms = exact_gelu(x, approximate)
    check_elements(y.to(dtype), exact, exact, x, approximate)
    check_elements(slope.to(dtype), exact_slope, terms, x, approximate)


@DTYPES
@FORMS
def test_nan_stays_nan(dtype, approximate, triton_device):
    assert all(t.isnan().all() for t in apply(torch.tensor([torch.nan]), dtype, approximate, triton_device))


def hastings_erf(x):
    """Abramowitz and Stegun 7.1.26: 1.5e-7 off at most, which is all there is of the tail."""
    t = 1 / (1 + 0.3275911 * x.abs())
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    return torch.sign(x) * (1 - series * torch.exp(-x * x))


ELEMENT_MUTANTS = {
    "tanh for erf": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid of 1.702 x": lambda x: x * torch.sigmoid(1.702 * x),
    "1 + erf, which cancels": lambda x: 0.5 * x * (1 + torch.special.erf(x / math.sqrt(2))),
    "erf after Hastings": lambda x: 0.5 * x * (1 + hastings_erf(x / math.sqrt(2))),
    "one percent too large": lambda x: exact_gelu(x)[0] * 1.01,
}


@DTYPES
@pytest.mark.parametrize("name", ELEMENT_MUTANTS)
def test_element_rule_catches_mutants(name, dtype):
    x = points(dtype)
    exact, *_ = exact_gelu(x)
    check_elements(exact.to(dtype), exact, exact, x)
    with pytest.raises(AssertionError, match="ulps off"):
        check_elements(ELEMENT_MUTANTS[name](x).to(dtype), exact, exact, x)


SLOPE_MUTANTS = {
    "without x φ(x)": lambda x: torch.special.erfc(-x.double() / math.sqrt(2)) / 2,
    "of the tanh form": lambda x: exact_gelu(x, "tanh")[1],
    "of ReLU": lambda x: (x > 0).double(),
}


@DTYPES
@pytest.mark.parametrize("name", SLOPE_MUTANTS)
def test_element_rule_catches_mutants_of_the_derivative(name, dtype):
    x = points(dtype)
    _, exact, terms = exact_gelu(x)
    check_elements(exact.to(dtype), exact, terms, x)
    with pytest.raises(AssertionError, match="ulps off"):
        check_elements(SLOPE_MUTANTS[name](x).to(dtype), exact, terms, x)


@pytest.mark.slow
def test_fit_gives_the_coefficients_of_the_kernel():
    """The script that documents the fit prints every coefficient that stands in the kernel."""
    run = subprocess.run([sys.executable, REPOSITORY / "benchmarks/fit_gelu.py"], capture_output=True, text=True, check=True)
    fits = re.findall(r"^(\w+): p = ([\d.]+).*\n +(.*)$", run.stdout, re.MULTILINE)
    assert [dtype for dtype, *_ in fits] == ["bfloat16", "float16", "float32"]
    source = Path(kernels.__file__).read_text().replace("- ", "-")
    for _, p, coefficients in fits:
        assert f"1 + {p} * a" in source
        assert all(coefficient in source for coefficient in coefficients.split(", "))


@FORMS
def test_each_element_through_the_operator(approximate, backend):
    """One column and a weight of one: u is x, y is GELU(x), dx is GELU′(x)."""
    for dtype in (torch.float32, torch.float16) if backend.name == "triton" else (torch.float32, torch.bfloat16):
        x = points(dtype)[::100].to(dtype)
        exact, exact_slope, terms = exact_gelu(x, approximate)
        rows = x[:, None].to(backend.device).requires_grad_()
        y, u = operator(rows, rows.new_ones(1, 1), None, approximate, True, None, False, backend.name)
        (dx,) = torch.autograd.grad(y, rows, torch.ones_like(y))
        assert torch.equal(u, rows.detach())
        check_elements(y.detach()[:, 0].cpu(), exact, exact, x, approximate)
        check_elements(dx[:, 0].cpu(), exact_slope, terms, x, approximate)


@dataclass(frozen=True)
class Case:
    """``rows`` rows of K = ``inner`` columns to M = ``outer``; ``hidden`` rows of NaN lie behind the count, None: no count."""

    rows: int
    outer: int
    inner: int
    hidden: int | None = None
    bias: bool = True
    approximate: str = "none"
    strided: bool = False
    deterministic: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu"):
        """(x, weight, bias) without what lies behind the count, and the gradient of the result; seeded."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.outer + 977 * self.inner)

        def random(*shape, scale=1.0):
            shape = shape[::-1] if self.strided else shape
            t = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, self.dtype)
            return t.mT if self.strided else t

        x, weight = random(self.rows, self.inner), random(self.outer, self.inner, scale=1.5 * self.inner**-0.5)
        bias = random(self.outer, 1)[:, 0] if self.bias else None
        return (x, weight, bias), random(self.rows, self.outer)


CASES = {
    "one tile": Case(20, 30, 16),
    "odd sizes": Case(70, 67, 33),
    "several groups of tiles": Case(530, 70, 8),
    "many columns": Case(9, 300, 20),
    "no bias": Case(33, 20, 40, bias=False),
    "tanh": Case(70, 30, 33, approximate="tanh"),
    "strided": Case(70, 67, 33, strided=True),
    "no rows": Case(0, 8, 8),
    "one row": Case(1, 70, 9),
    "one of each": Case(1, 1, 1),
    "count": Case(70, 67, 33, hidden=90),
    "count, tanh, no bias": Case(70, 30, 33, hidden=9, bias=False, approximate="tanh"),
    "count of zero": Case(0, 20, 33, hidden=70),
    "count of all": Case(70, 20, 33, hidden=0),
    "strided count": Case(70, 30, 20, hidden=90, strided=True),
    "rows shared out": Case(300, 30, 20, hidden=11),
    "deterministic": Case(70, 67, 33, hidden=9, deterministic=True),
    "many rows": Case(700, 70, 16, hidden=3),
    "many rows, tanh, no bias": Case(650, 70, 9, bias=False, approximate="tanh"),
    "several steps of the sum": Case(30, 70, 2100),
    "float16": Case(140, 64, 72, dtype=torch.float16),
    "float16, odd sizes, count": Case(133, 37, 129, hidden=170, dtype=torch.float16),
}


def run(case, inputs, dy, backend):
    """y, dx, dweight, dbias of the operator on ``backend``; real rows only."""
    (x, weight, bias), count = inputs, None
    if case.hidden is not None:
        x, dy = poisoned(x, case.hidden), poisoned(dy, case.hidden)
        x, dy = (t.mT.contiguous().mT for t in (x, dy)) if case.strided else (x, dy)
        count = torch.tensor([case.rows], dtype=torch.int32, device=x.device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y, _ = operator(*leaves, case.approximate, True, count, case.deterministic, backend)
    dx, *gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    named = zip(("y", "dx", "dweight", "dbias"), (y.detach()[: case.rows], dx[: case.rows], *gradients), strict=False)
    return dict(named)


def composed(case, inputs, dy, function=linear_gelu_ref):
    """The same by autograd of the plain composition on the real rows alone."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y, *_ = function(*leaves, case.approximate)
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=False))


def in_double(case, inputs, dy):
    return composed(case, [None if t is None else t.double() for t in inputs], dy.double())


def check(fast, torch_result, exact):
    """Holds results and gradients to the error rules."""
    assert fast.keys() == exact.keys()
    for name, wanted in exact.items():
        assert_close_as_torch(fast[name], torch_result[name], wanted, factor=2.0 if name == "y" else 3.0, name=name)


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, backend):
    case = backend.fitted(CASES[name], products=True)
    inputs, dy = case.inputs(backend.device)
    check(run(case, inputs, dy, backend.name), composed(case, inputs, dy), in_double(case, inputs, dy))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(1000, 3072, 768, hidden=1048, dtype=torch.bfloat16),
    Case(1000, 4096, 1024, dtype=torch.bfloat16),
    Case(777, 1023, 3073, hidden=100, approximate="tanh", dtype=torch.bfloat16),
    Case(1000, 3072, 768, hidden=24, dtype=torch.float16),
    Case(1000, 3072, 768, hidden=24),
], ids=["base, bfloat16", "large, bfloat16", "odd, tanh, bfloat16", "float16", "float32 without TF32"])  # fmt: skip
def test_model_sizes(case):
    inputs, dy = case.inputs("cuda")
    check(run(case, inputs, dy, "triton"), composed(case, inputs, dy), in_double(case, inputs, dy))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """y and u of more than 2^31 elements; the last row comes out, and its gradient goes in."""
    rows, inner, outer = 2**20 + 130, 16, 2056
    x = torch.zeros(rows, inner, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    weight = torch.ones(outer, inner, dtype=torch.bfloat16, device="cuda")
    count = torch.tensor([rows], dtype=torch.int32, device="cuda")
    y, u = operator(x, weight, None, "none", True, count, False, "triton")
    assert (y[-1] == inner).all() and not y[:-1].any()
    dx, dweight, _ = backward_operator(y, u, x, weight, False, "none", count, "triton")
    assert (dx[-1] == outer * inner).all() and not dx[:-1].any()
    assert (dweight == inner).all()


@FORMS
def test_reference_is_gelu_of_linear(approximate):
    """Forward against PyTorch's, backward against its autograd, in float64; hidden rows are left out."""
    case = Case(9, 7, 5, approximate=approximate)
    inputs, dy = case.inputs()
    x, weight, bias = (t.double().requires_grad_() for t in inputs)
    y = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    got, u = linear_gelu_ref(x, weight, bias, approximate, True)
    torch.testing.assert_close(got, y, atol=1e-14, rtol=0)
    torch.testing.assert_close(u, F.linear(x, weight, bias), atol=1e-14, rtol=0)
    wanted = torch.autograd.grad(y, (x, weight, bias), dy.double())
    count = torch.tensor([9], dtype=torch.int32)
    rows = (poisoned(t.detach(), 3) for t in (dy.double(), u, x))
    dx, *others = linear_gelu_backward_ref(*rows, weight, True, approximate, count)
    for gradient, want in zip((dx[:9], *others), wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-14, rtol=0)


def of_another_form(x, weight, bias, approximate):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh"), None


def without_gelu(x, weight, bias, approximate):
    return F.linear(x, weight, bias), None


MUTANTS = {
    "tanh for erf": ("y", lambda case, i, dy, r: composed(case, i, dy, of_another_form)["y"]),
    "GELU is missing": ("y", lambda case, i, dy, r: composed(case, i, dy, without_gelu)["y"]),
    "bias is dropped": ("y", lambda case, i, dy, r: linear_gelu_ref(*i[:2])[0]),
    "gradient without GELU′": ("dx", lambda case, i, dy, r: composed(case, i, dy, without_gelu)["dx"]),
    "weight gradient of the tanh form": ("dweight", lambda case, i, dy, r: composed(case, i, dy, of_another_form)["dweight"]),
    "bias gradient is dropped": ("dbias", lambda case, i, dy, r: torch.zeros_like(r["dbias"])),
    "bias gradient before GELU": ("dbias", lambda case, i, dy, r: dy.sum(0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_rule_catches_mutants(name):
    caught_in, mutate = MUTANTS[name]
    case = Case(70, 67, 33)
    inputs, dy = case.inputs()
    torch_result, exact = composed(case, inputs, dy), in_double(case, inputs, dy)
    check(torch_result, torch_result, exact)
    with pytest.raises(AssertionError, match=f"{caught_in}: max"):
        check(torch_result | {caught_in: mutate(case, inputs, dy, torch_result)}, torch_result, exact)


def test_preactivation_is_kept_for_backward_alone(backend, monkeypatch):
    """It is as large as the result: none is made under no_grad, or where nothing asks for a gradient."""
    (x, weight, bias), _ = Case(9, 7, 5).inputs(backend.device)
    module, saved = sys.modules["roberta_fast.ops.linear_gelu"], []
    monkeypatch.setattr(module, "_forward", lambda *arguments: saved.append(arguments[4]) or operator(*arguments))
    linear_gelu(x, weight, bias, backend=backend.name)
    weight.requires_grad_()
    with torch.no_grad():
        linear_gelu(x, weight, bias, backend=backend.name)
    linear_gelu(x, weight, bias, backend=backend.name)
    assert saved == [False, False, True]
    assert [operator(x, weight.detach(), bias, "none", keep, None, False, backend.name)[1].numel() for keep in (False, True)] == [
        0,
        9 * 7,
    ]


def test_a_row_does_not_depend_on_its_batch(backend):
    """Bitwise, whatever rows and padding are beside it."""
    case = Case(150, 30, 20, deterministic=True)
    inputs, dy = case.inputs(backend.device)
    whole = run(case, inputs, dy, backend.name)
    part = run(replace(case, rows=70, hidden=55), [inputs[0][:70], *inputs[1:]], dy[:70], backend.name)
    assert torch.equal(part["y"], whole["y"][:70])


def test_gradients_repeat_bitwise(backend):
    case = CASES["rows shared out"]
    inputs, dy = case.inputs(backend.device)
    first, second = (run(case, inputs, dy, backend.name) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_as_torch(triton_device):
    """float32 parameters and inputs are cast; gradients come back in float32."""
    (x, weight, bias), _ = Case(9, 7, 5).inputs(triton_device)
    results = []
    with torch.autocast(triton_device, dtype=torch.float16):
        for function in (lambda *a: F.gelu(F.linear(*a)), lambda *a: linear_gelu(*a, backend="triton")):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y.float().sum(), leaves)))
    assert [t.dtype for t in results[1]] == [t.dtype for t in results[0]] == [torch.float16, *[torch.float32] * 3]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [Case(5, 7, 3), Case(5, 7, 3, bias=False, approximate="tanh", hidden=2)], ids=["plain", "count"])
def test_opcheck(case, backend):
    (x, weight, bias), dy = case.inputs(backend.device)
    count = None if case.hidden is None else torch.tensor([case.rows], dtype=torch.int32, device=backend.device)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(operator, (*leaves, case.approximate, True, count, False, backend.name))
    torch.library.opcheck(backward_operator, (dy, dy, x, weight, case.bias, case.approximate, count, backend.name))
