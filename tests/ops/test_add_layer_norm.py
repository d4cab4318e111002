"""add_layer_norm: each element in ulps, dropout forward and backward, and mutants that the rules must catch."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from roberta_fast.ops import add_layer_norm, dropout
from roberta_fast.ops.add_layer_norm import add_layer_norm_backward_ref, add_layer_norm_ref
from roberta_fast.testing import assert_close_as_torch, poisoned, ulp_error

operator = torch.ops.roberta_fast.add_layer_norm.default
backward_operator = torch.ops.roberta_fast.add_layer_norm_backward.default
SEED = 20240229
EPS32 = torch.finfo(torch.float32).eps
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """``rows`` rows of C = ``hidden`` elements around ``mean`` with the deviation ``spread``; ``behind`` rows of NaN lie behind
    the count, None: no count. strided: ``"rows"`` lie apart, ``"columns"`` do."""

    rows: int
    hidden: int
    residual: torch.dtype | None = SINGLE
    dropout_p: float = 0.0
    behind: int | None = None
    strided: str = ""
    x: torch.dtype = SINGLE
    weight: torch.dtype = SINGLE
    mean: float = 0.3
    spread: float = 1.0
    eps: float = 1e-5

    def inputs(self, device="cpu"):
        """(x, residual, weight, bias) without what lies behind the count, and the gradient of the result; seeded."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.hidden)

        def random(*shape, dtype, spread=1.0, mean=0.0):
            t = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean).to(device, dtype)
            return self.with_strides(t) if len(shape) == 2 else t

        shape, like = (self.rows, self.hidden), {"mean": self.mean, "spread": self.spread}
        x = random(*shape, dtype=self.x, **like)
        residual = None if self.residual is None else random(*shape, dtype=self.residual, **like)
        weight, bias = random(self.hidden, dtype=self.weight, mean=1.0), random(self.hidden, dtype=self.weight)
        return (x, residual, weight, bias), random(*shape, dtype=self.residual or self.x)

    def with_strides(self, t):
        if self.strided == "rows":
            return F.pad(t, (3, 4))[:, 3 : 3 + self.hidden]
        return t.mT.contiguous().mT if self.strided == "columns" else t


CASES = {
    "base width": Case(5, 768),
    "no residual": Case(5, 768, residual=None),
    "odd width": Case(33, 7),
    "width of one": Case(4, 1),
    "beyond a power of two": Case(3, 1100),
    "many tiles": Case(203, 64),
    "no rows": Case(0, 24),
    "one row": Case(1, 24),
    "rows apart": Case(9, 40, strided="rows"),
    "columns apart": Case(9, 40, strided="columns"),
    "tiny eps": Case(9, 40, eps=1e-12),
    "large mean": Case(9, 768, mean=1000.0),
    "large mean, tiny spread": Case(9, 40, mean=-30.0, spread=1e-3, eps=1e-12),
    "constant rows": Case(9, 40, mean=0.1, spread=0.0),
    "huge": Case(9, 40, spread=1e15),
    "count": Case(33, 40, behind=60),
    "count of zero": Case(0, 40, behind=9),
    "count of all": Case(9, 40, behind=0),
    "dropout": Case(33, 40, dropout_p=0.3),
    "dropout, odd width": Case(33, 29, dropout_p=0.3),
    "dropout, no residual": Case(9, 768, residual=None, dropout_p=0.1),
    "dropout, count": Case(33, 40, dropout_p=0.3, behind=60, strided="rows"),
    "float16": Case(9, 768, x=HALF, residual=HALF, weight=HALF),
    "float16, no residual, dropout": Case(9, 40, x=HALF, residual=None, weight=HALF, dropout_p=0.3),
    "float16 to a float32 residual": Case(9, 40, x=HALF, dropout_p=0.3),
    "float16 to a float32 residual, large mean": Case(9, 40, x=HALF, mean=1000.0),
    "float32 to a float16 residual": Case(9, 40, residual=HALF),
    "float16 with float32 weights": Case(9, 40, x=HALF, residual=HALF),
}
RESULTS = ("y", "dx", "dresidual", "dweight", "dbias")


def seed_of(case, device="cpu"):
    return torch.tensor([SEED], device=device) if case.dropout_p else None


def run(case, inputs, dy, backend):
    """y and the gradients of the operator on ``backend``; real rows only, no dresidual without a residual."""
    (x, residual, weight, bias), count = inputs, None
    if case.behind is not None:
        x, residual, dy = (t if t is None else case.with_strides(poisoned(t, case.behind)) for t in (x, residual, dy))
        count = torch.tensor([case.rows], dtype=torch.int32, device=x.device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    y, *_ = operator(*leaves, case.eps, case.dropout_p, seed_of(case, x.device), count, backend)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    results = [y.detach(), *(None if t is None else next(gradients) for t in leaves)]
    return dict(zip(RESULTS, (None if t is None else t[: case.rows] if t.dim() == 2 else t for t in results), strict=True))


def composed(case, inputs, dy, p=None):
    """The same by PyTorch's layer_norm and its autograd in float64, with the reference's mask; p: another rescaling of it."""
    x, residual, weight, bias = (None if t is None else t.detach().double().requires_grad_() for t in inputs)
    z = x
    if case.dropout_p:
        keep = dropout.keep_mask(seed_of(case, x.device), case.dropout_p, torch.arange(case.rows, device=x.device), case.hidden)
        z = x * keep * dropout.scale(case.dropout_p if p is None else p)
    z = z if residual is None else z + residual
    y = F.layer_norm(z, z.shape[-1:], weight, bias, case.eps)
    leaves = [t for t in (x, residual, weight, bias) if t is not None]
    gradients = iter(torch.autograd.grad(y, leaves, dy.double()))
    results = y.detach(), *(None if t is None else next(gradients) for t in (x, residual, weight, bias))
    return dict(zip(RESULTS, results, strict=True))


def slack(case, inputs, dy):
    """What float32 arithmetic may do to each element of y, dx and dresidual before it is rounded.

    That is the effect of errors of a few ulps in z = residual + dropout(x), its mean, its rstd, and each term of the formulas.
    """
    x, residual, weight, bias = (None if t is None else t.double() for t in inputs)
    factor = torch.ones_like(x)
    if case.dropout_p:
        keep = dropout.keep_mask(seed_of(case, x.device), case.dropout_p, torch.arange(case.rows, device=x.device), case.hidden)
        factor = keep * dropout.scale(case.dropout_p)
    z, size = x * factor, (x * factor).abs()
    if residual is not None:
        z, size = z + residual, size + residual.abs()
    centered = z - z.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + case.eps).rsqrt()
    normalized = centered * rstd
    rounding = 2 * EPS32
    # Relative, of the rstd; absolute, of the normalized values.
    rstd_error = rounding * (1 + size.square().mean(-1, keepdim=True).sqrt() * rstd)
    error = rounding * rstd * (size + size.mean(-1, keepdim=True)) + normalized.abs() * rstd_error
    g = dy.double() * weight
    along = (g * normalized).mean(-1, keepdim=True).abs()
    terms = g.abs() + g.abs().mean(-1, keepdim=True) + normalized.abs() * (g * normalized).abs().mean(-1, keepdim=True)
    dz = rstd * ((rounding + rstd_error) * terms + error * along + normalized.abs() * (g.abs() * error).mean(-1, keepdim=True))
    return {"y": error * weight.abs() + rounding * ((normalized * weight).abs() + bias.abs()), "dx": dz * factor, "dresidual": dz}


def check(case, inputs, dy, fast):
    """Holds y, dx and dresidual to half an ulp beyond float32's errors, element by element, and the sums to the max-norm rule."""
    exact, allowed = composed(case, inputs, dy), slack(case, inputs, dy)
    for name, wanted in exact.items():
        assert (fast[name] is None) == (wanted is None), name
        if name in allowed and wanted is not None and wanted.numel():
            # Without dropout one tensor, of residual's type, is the gradient of both.
            shared = name == "dx" and not case.dropout_p and case.residual in (HALF, BF16)
            result = fast[name].to(case.residual) if shared else fast[name]
            error = (result.double() - wanted).abs()
            assert error.isfinite().all(), f"{name}: not finite"
            beyond = ulp_error(result, wanted) * (error - allowed[name]).clamp(min=0) / error.clamp(min=1e-300)
            assert beyond.max() <= 0.501, f"{name}: {beyond.max():.3g} ulps beyond what float32 does"
    torch_result = run(replace(case, behind=None), inputs, dy, "torch")
    for name in ("dweight", "dbias"):
        assert_close_as_torch(fast[name], torch_result[name], exact[name], factor=3.0, name=name)


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, backend):
    case = backend.fitted(CASES[name])
    inputs, dy = case.inputs(backend.device)
    fast = run(case, inputs, dy, backend.name)
    assert fast["y"].dtype == (case.residual or case.x)
    assert [None if t is None else t.dtype for t in (fast["dx"], fast["dresidual"])] == [case.x, case.residual]
    check(case, inputs, dy, fast)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(1000, 768, x=BF16, residual=BF16, weight=BF16, dropout_p=0.1, behind=1048),
    Case(1000, 1024, x=BF16, residual=BF16),
    Case(1000, 1024, x=BF16, dropout_p=0.1),
    Case(1000, 384, x=BF16, residual=None, weight=BF16),
    Case(100, 12_288, x=BF16, residual=BF16),
    Case(10_000, 768, dropout_p=0.1),
], ids=["base", "large, float32 weights", "float32 residual", "MiniLM, no residual", "widest", "float32"])  # fmt: skip
def test_model_sizes(case):
    inputs, dy = case.inputs("cuda")
    check(case, inputs, dy, run(case, inputs, dy, "triton"))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """x of more than 2^31 elements: the last row comes out as it does alone."""
    rows, hidden = 2**21 + 5, 1024
    x = torch.zeros(rows, hidden, dtype=BF16, device="cuda")
    x[-1] = torch.randn(hidden, device="cuda")
    weight, bias = torch.randn(2, hidden, dtype=BF16, device="cuda")
    y, mean, rstd = operator(x, None, weight, bias, 1e-5, 0.0, None, None, "triton")
    assert torch.equal(y[-1], operator(x[-1:], None, weight, bias, 1e-5, 0.0, None, None, "triton")[0][0])
    dz, *_ = backward_operator(x, x, None, weight, mean, rstd, 0.0, None, None, "triton")
    assert torch.equal(
        dz[-1], backward_operator(x[-1:], x[-1:], None, weight, mean[-1:], rstd[-1:], 0.0, None, None, "triton")[0][0]
    )


@pytest.mark.parametrize("name", ["base width", "no residual", "dropout", "dropout, no residual"])
def test_reference_is_torch_layer_norm(name):
    """Forward and backward against PyTorch's, in float64; hidden rows are left out."""
    case = CASES[name]
    inputs, dy = case.inputs()
    x, residual, weight, bias = (None if t is None else t.double() for t in inputs)
    wanted = composed(case, inputs, dy)
    seed, count = seed_of(case), torch.tensor([case.rows], dtype=torch.int32)
    y, mean, rstd = add_layer_norm_ref(x, residual, weight, bias, case.eps, case.dropout_p, seed)
    torch.testing.assert_close(y, wanted["y"], atol=1e-13, rtol=0)
    hidden = [None if t is None else poisoned(t, 3) for t in (dy.double(), x, residual)]
    statistics = poisoned(mean, 3), poisoned(rstd, 3)
    dz, dx, dweight, dbias = add_layer_norm_backward_ref(*hidden, weight, *statistics, case.dropout_p, seed, count)
    got = {"dx": dx if case.dropout_p else dz, "dresidual": None if residual is None else dz, "dweight": dweight, "dbias": dbias}
    for key, gradient in got.items():
        if gradient is not None:
            rows = gradient[: case.rows] if gradient.dim() == 2 else gradient
            torch.testing.assert_close(rows, wanted[key], atol=1e-13, rtol=0, msg=key)


def without_centering(case, inputs, dy):
    """dz without the mean of g taken off."""
    exact = composed(case, inputs, dy)
    z = inputs[0].double() + inputs[1].double()
    rstd = (z.var(-1, correction=0, keepdim=True) + case.eps).rsqrt()
    return exact["dresidual"] + rstd * (dy.double() * inputs[2].double()).mean(-1, keepdim=True)


def unbiased(case, inputs, dy):
    """The variance divided by C - 1."""
    x, residual, weight, bias = (t.double() for t in inputs)
    z = x + residual
    return (z - z.mean(-1, keepdim=True)) * (z.var(-1, correction=1, keepdim=True) + case.eps).rsqrt() * weight + bias


def eps_outside_the_root(case, inputs, dy):
    x, residual, weight, bias = (t.double() for t in inputs)
    z = x + residual
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, correction=0, keepdim=True) + case.eps) * weight + bias


def variance_from_squares(case, inputs, dy):
    """E[z²] - E[z]² in float32, which cancels."""
    x, residual, weight, bias = (t.float() for t in inputs)
    z = x + residual
    variance = z.square().mean(-1, keepdim=True) - z.mean(-1, keepdim=True).square()
    return (z - z.mean(-1, keepdim=True)) * (variance.clamp(min=0) + case.eps).rsqrt() * weight + bias


MUTANTS = {
    "unbiased variance": ("y", Case(9, 768), unbiased),
    "unbiased variance, float16": ("y", Case(9, 768, x=HALF, residual=HALF, weight=HALF), unbiased),
    "eps outside the root": ("y", Case(9, 40, spread=0.1), eps_outside_the_root),
    "variance as a difference of squares": ("y", Case(9, 768, mean=30.0), variance_from_squares),
    "residual is dropped": ("y", Case(9, 40), lambda c, i, dy: composed(c, (i[0], torch.zeros_like(i[1]), *i[2:]), dy)["y"]),
    "dropout does not rescale": ("y", Case(9, 40, dropout_p=0.3), lambda c, i, dy: composed(c, i, dy, p=0.0)["y"]),
    "dropout rescales too much": ("y", Case(9, 40, dropout_p=0.3), lambda c, i, dy: composed(c, i, dy, p=0.301)["y"]),
    "dx does not go through dropout": ("dx", Case(9, 40, dropout_p=0.3), lambda c, i, dy: composed(c, i, dy)["dresidual"]),
    "dresidual goes through dropout": ("dresidual", Case(9, 40, dropout_p=0.3), lambda c, i, dy: composed(c, i, dy)["dx"]),
    "gradient is not centered": ("dresidual", Case(9, 40), without_centering),
    "bias gradient is dropped": ("dbias", Case(9, 40), lambda c, i, dy: torch.zeros_like(i[3])),
    "weight gradient of values not normalized": (
        "dweight", Case(9, 40), lambda c, i, dy: (dy * (i[0] + i[1])).sum(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_rules_catch_mutants(name):
    caught_in, case, mutate = MUTANTS[name]
    inputs, dy = case.inputs()
    right = run(case, inputs, dy, "torch")
    check(case, inputs, dy, right)
    with pytest.raises(AssertionError, match=f"{caught_in}: "):
        check(case, inputs, dy, right | {caught_in: mutate(case, inputs, dy).to(right[caught_in].dtype)})


@pytest.mark.parametrize("residual", [SINGLE, None], ids=["residual", "no residual"])
def test_dropped_elements_have_no_influence_and_no_gradient(residual, backend):
    """Forward and backward drop the same elements, those of the reference's mask, and no others."""
    case = Case(37, 45, residual=residual, dropout_p=0.3)
    (x, *rest), dy = case.inputs(backend.device)
    keep = dropout.keep_mask(torch.tensor([SEED]), case.dropout_p, torch.arange(case.rows), case.hidden).to(x.device)
    results = run(case, (x, *rest), dy, backend.name)
    assert torch.equal(results["dx"] != 0, keep)
    assert torch.equal(run(case, (torch.where(keep, x, 1e9), *rest), dy, backend.name)["y"], results["y"])
    for row, column in keep.nonzero()[:: keep.sum() // 5].tolist():
        other = x.clone()
        other[row, column] += 1
        assert not torch.equal(run(case, (other, *rest), dy, backend.name)["y"][row], results["y"][row])


def test_dropout_follows_seed_and_row(backend):
    """The same seed gives the same result, another seed another; what is behind the rows does not matter."""
    case = Case(33, 40, dropout_p=0.3)
    inputs, _ = case.inputs(backend.device)

    def results(seed, rows=33):
        x, residual, *rest = inputs
        seed = torch.tensor([seed], device=backend.device)
        return operator(x[:rows], residual[:rows], *rest, case.eps, case.dropout_p, seed, None, backend.name)[0]

    assert torch.equal(results(SEED), results(SEED))
    assert torch.equal(results(SEED)[:20], results(SEED, 20))
    assert not torch.equal(results(SEED), results(SEED + 1))
    assert not torch.equal(results(SEED), results(SEED + (1 << 40)))


@pytest.mark.parametrize("backend_name", ["backend's own", "torch"])
def test_rows_taken_from_others_drop_as_among_them(backend, backend_name):
    """Forward and backward; without their numbers they would drop otherwise."""
    case = Case(33, 45, dropout_p=0.3)
    inputs, dy = case.inputs(backend.device)
    name, device = backend.name if backend_name != "torch" else "torch", backend.device
    taken = torch.tensor([0, 31, 7, 8, 30], device=device)
    seed = seed_of(case, device)

    def results(rows, numbers):
        x, residual = (t[rows].clone().requires_grad_() for t in inputs[:2])
        y = add_layer_norm(x, residual, *inputs[2:], case.eps, dropout_p=0.3, seed=seed, dropout_rows=numbers, backend=name)
        return y.detach(), *torch.autograd.grad(y, (x, residual), dy[rows])

    among_others = [t[taken] for t in results(slice(None), None)]
    assert all(map(torch.equal, results(taken, taken), among_others))
    assert not torch.equal(results(taken, None)[0], among_others[0])


def test_gradients_repeat_bitwise(backend):
    case = Case(203, 64, dropout_p=0.3)
    inputs, dy = case.inputs(backend.device)
    first, second = (run(case, inputs, dy, backend.name) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


AUTOCAST = {"float16 into float32": (HALF, SINGLE), "float32": (SINGLE, SINGLE), "float32 alone": (SINGLE, None)}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_as_torch(name, triton_device):
    """What reaches a LayerNorm of a model under autocast: a linear's float16 output and a float32 residual stream."""
    x_dtype, residual_dtype = AUTOCAST[name]
    case = Case(9, 40, x=x_dtype, residual=residual_dtype)
    (x, residual, weight, bias), _ = case.inputs(triton_device)
    with torch.autocast(triton_device, dtype=HALF):
        wanted = F.layer_norm(x if residual is None else x + residual, (40,), weight, bias, case.eps)
        got = add_layer_norm(x, residual, weight, bias, case.eps, backend="triton")
    assert got.dtype == wanted.dtype == SINGLE
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [
    Case(3, 8, residual=None), Case(3, 8), Case(3, 8, dropout_p=0.5, behind=2),
], ids=["plain", "residual", "dropout, count"])  # fmt: skip
def test_opcheck(case, backend):
    inputs, dy = case.inputs(backend.device)
    seed, count = seed_of(case, backend.device), None
    if case.behind is not None:
        count = torch.tensor([case.rows - 1], dtype=torch.int32, device=backend.device)
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    rest = case.dropout_p, seed, count, backend.name
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    # What lies behind the count is arbitrary, so that two runs of the whole differ there.
    torch.library.opcheck(operator, (*leaves, case.eps, *rest), test_utils="ALL" if count is None else checks)
    _, mean, rstd = operator(*inputs, case.eps, *rest)
    torch.library.opcheck(backward_operator, (dy, *inputs[:3], mean, rstd, *rest), test_utils="ALL" if count is None else checks)


ROWS, COLUMNS = torch.zeros(4, 3), torch.zeros(3)
BAD_ARGUMENTS = {
    "x of one dimension": ({"x": COLUMNS}, r"x must be a packed \[N, C\] tensor, got shape \(3,\)"),
    "integer x": ({"x": ROWS.long()}, "x must be a floating-point tensor, got torch.int64"),
    "residual of another shape": ({"residual": ROWS[1:]}, r"residual must be of x's shape \(4, 3\), got shape \(3, 3\)"),
    "weight of another length": ({"weight": ROWS[0, 1:]}, r"weight must be \[C\] with C=3, got shape \(2,\)"),
    "bias of another length": ({"bias": ROWS[0, 1:]}, r"bias must be \[C\] with C=3, got shape \(2,\)"),
    "dropout without seed": ({"dropout_p": 0.1}, "seed must be .* dropout_p=0.1, got None"),
    "dropout of everything": ({"dropout_p": 1.0, "seed": torch.tensor([1])}, r"dropout_p must be in \[0, 1\), got 1\.0"),
    "row numbers for other rows": ({"dropout_rows": torch.arange(3)}, r"dropout_rows must be int64 \[N\] with N=4, got .*\(3,\)"),
    "count of int64": ({"count": torch.tensor([4])}, r"count must be int32 \[1\], got torch.int64 \(1,\)"),
    "unknown backend": ({"backend": "cudnn"}, "backend='cudnn' is not one of"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_errors_name_argument_and_value(name):
    change, message = BAD_ARGUMENTS[name]
    arguments = {"x": ROWS, "residual": ROWS, "weight": COLUMNS, "bias": COLUMNS, "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**arguments, **change})
