"""linear: the reference against PyTorch's, the GEMM kernels against the reference, and mutants that the rule must catch."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.kernels.tuning import pointer_gemm
from roberta_fast.ops import linear
from roberta_fast.ops.linear import linear_backward_ref, linear_ref, prepack, product_objection
from roberta_fast.ops.registration import facts_of
from roberta_fast.testing import assert_close_as_torch, poisoned

operator = torch.ops.roberta_fast.linear.default
backward_operator = torch.ops.roberta_fast.linear_backward.default


@dataclass(frozen=True)
class Case:
    """``rows`` rows of K = ``inner`` columns to M = ``outer``; ``hidden`` rows of NaN lie behind the count, None: no count."""

    rows: int
    outer: int
    inner: int
    hidden: int | None = None
    bias: bool = True
    residual: bool = False
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu"):
        """(x, weight, bias, residual) without what lies behind the count, and the gradient of the result; seeded."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.outer + 977 * self.inner)

        def random(*shape):
            if self.strided and len(shape) == 2:
                return torch.randn(shape[::-1], generator=generator, dtype=torch.float64).to(device, self.dtype).mT
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, self.dtype)

        x, weight, dy = random(self.rows, self.inner), random(self.outer, self.inner), random(self.rows, self.outer)
        bias = random(self.outer) if self.bias else None
        return (x, weight, bias, random(self.rows, self.outer) if self.residual else None), dy


CASES = {
    "one tile": Case(20, 30, 16),
    "odd sizes": Case(70, 67, 33),
    "several groups of tiles": Case(530, 70, 8),
    "no bias": Case(33, 20, 40, bias=False),
    "residual": Case(70, 67, 33, residual=True),
    "residual without bias": Case(33, 20, 40, bias=False, residual=True),
    "strided": Case(70, 67, 33, strided=True, residual=True),
    "no rows": Case(0, 8, 8),
    "one row": Case(1, 70, 9),
    "one of each": Case(1, 1, 1),
    "count": Case(70, 67, 33, hidden=90, residual=True),
    "count within the first tile": Case(3, 67, 33, hidden=400),
    "count of zero": Case(0, 20, 33, hidden=70),
    "count of all": Case(70, 20, 33, hidden=0),
    "strided count": Case(70, 30, 20, hidden=90, strided=True, residual=True),
    "rows shared out": Case(300, 30, 20, hidden=11),
    "most shares empty": Case(5, 30, 20, hidden=1000),
    "many rows": Case(700, 70, 40, residual=True),
    "many rows without bias, count": Case(650, 70, 9, hidden=3, bias=False),
    "several steps of the sum": Case(30, 70, 2100, residual=True),
    "float16": Case(140, 64, 72, residual=True, dtype=torch.float16),
    "float16, few rows": Case(40, 70, 33, residual=True, strided=True, dtype=torch.float16),
    "float16, several steps of the sum": Case(70, 30, 2100, dtype=torch.float16),
    "float16, odd sizes, count": Case(133, 37, 129, hidden=170, residual=True, dtype=torch.float16),
}


def hide(case, tensors, device="cpu"):
    """The tensors [N, ...] with NaN rows behind, and the count; unchanged without one."""
    if case.hidden is None:
        return tensors, None
    tensors = [t if t is None else poisoned(t, case.hidden) for t in tensors]
    if case.strided:
        tensors = [t if t is None else t.mT.contiguous().mT for t in tensors]
    return tensors, torch.tensor([case.rows], dtype=torch.int32, device=device)


def run(case, inputs, dy, backend):
    """(y, dx, dweight, dbias, dresidual), what there is of them, of the operator on ``backend``; real rows only."""
    device = inputs[0].device
    x, weight, bias, residual = inputs
    (x, residual, dy), count = hide(case, (x, residual, dy), device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    y = operator(*leaves, count, False, backend)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    dx, dweight, dbias, dresidual = (None if t is None else next(gradients) for t in leaves)
    cut = slice(case.rows)
    results = {"y": y.detach()[cut], "dx": dx[cut], "dweight": dweight, "dbias": dbias}
    return results | {"dresidual": None if dresidual is None else dresidual[cut]}


def composed(case, inputs, dy):
    """The same by autograd of the plain composition on the real rows alone."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = linear_ref(*leaves)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    named = dict(
        zip(("dx", "dweight", "dbias", "dresidual"), (None if t is None else next(gradients) for t in leaves), strict=True)
    )
    return {"y": y.detach()} | named


@pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_prepacked_weights(name):
    """Backends that read weight itself pass over the argument."""
    case = CASES[name]
    inputs, _ = case.inputs()
    (x, residual), count = hide(case, (inputs[0], inputs[3]))
    exact, composition = linear_ref(*in_double(inputs)), linear_ref(*inputs)
    for backend in ("cpp", "torch"):
        if backend == "torch" and (x.shape[0] != case.rows or count is not None):
            continue
        y = linear(x, *inputs[1:3], residual=residual, count=count, backend=backend, packed=prepack(inputs[1]))
        assert_close_as_torch(y[: case.rows], composition, exact, factor=2.0, name=backend)
    options = {"residual": residual, "count": count, "backend": "cpp", "deterministic": True}
    y, as_they_lie = (linear(x, *inputs[1:3], **options, packed=packed) for packed in (prepack(inputs[1]), None))
    assert torch.equal(y[: case.rows], as_they_lie[: case.rows])
    if case.rows and case.inner > 1:
        with pytest.raises(ValueError, match="packed must have shape"):
            linear(x, *inputs[1:3], residual=residual, count=count, backend="cpp", packed=prepack(inputs[1])[1:])


def in_double(inputs):
    return [None if t is None else t.double() for t in inputs]


def check(fast, torch_result, exact):
    """Holds results and gradients to the error rules."""
    for name, wanted in exact.items():
        assert (fast[name] is None) == (wanted is None), name
        if wanted is not None:
            assert_close_as_torch(fast[name], torch_result[name], wanted, factor=2.0 if name == "y" else 3.0, name=name)


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, backend):
    case = backend.fitted(CASES[name], products=True)
    inputs, dy = case.inputs(backend.device)
    fast = run(case, inputs, dy, backend.name)
    check(fast, composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))


@pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))
@pytest.mark.parametrize("case", [
    Case(1100, 128, 40, residual=True), Case(1100, 128, 1200, residual=True), Case(1100, 70, 40),
    Case(2200, 960, 8, residual=True), Case(2200, 960, 1200, bias=False), Case(1100, 128, 40, strided=True),
], ids=["whole panels", "several steps", "a part of a panel", "past the caches", "too deep for that", "strided"])  # fmt: skip
def test_many_rows_on_the_cpu(case):
    """Weights are packed on the way where they make whole panels, and large results are written past the caches."""
    inputs, dy = case.inputs()
    check(run(case, inputs, dy, "cpp"), composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))
    y = linear(*inputs[:3], residual=inputs[3], backend="cpp", deterministic=True)
    x, weight, bias, residual = inputs
    last = linear(x[-5:], weight, bias, residual=None if residual is None else residual[-5:], deterministic=True)
    assert torch.equal(y[-5:], last)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(1000, 768, 768, hidden=1048, residual=True, dtype=torch.bfloat16),
    Case(1000, 3072, 768, dtype=torch.bfloat16),
    Case(777, 1023, 3073, hidden=100, dtype=torch.bfloat16),
    Case(1000, 768, 3072, hidden=24, dtype=torch.float16),
    Case(1000, 768, 768, hidden=24, residual=True),
], ids=["base, bfloat16", "wide, bfloat16", "odd, bfloat16", "float16", "float32 without TF32"])  # fmt: skip
def test_model_sizes(case):
    inputs, dy = case.inputs("cuda")
    check(run(case, inputs, dy, "triton"), composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """x of more than 2^31 elements; the last rows come out, and their gradients go in."""
    rows, inner, outer = 2**21 + 130, 1040, 8
    x = torch.zeros(rows, inner, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    weight = torch.ones(outer, inner, dtype=torch.bfloat16, device="cuda")
    count = torch.tensor([rows], dtype=torch.int32, device="cuda")
    y = operator(x, weight, None, None, count, False, "triton")
    assert (y[-1] == inner).all() and not y[:-1].any()
    dx, dweight, _ = backward_operator(y, x, weight, False, count, "triton")
    assert (dx[-1] == outer * inner).all() and not dx[:-1].any()
    assert (dweight == inner).all()


@pytest.mark.gpu
def test_runs_on_the_tensors_device():
    """Not on the current one, where they differ: neither with the dispatcher nor without."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = Case(70, 72, 40, hidden=9, dtype=torch.bfloat16)
    inputs, dy = case.inputs("cuda:1")
    fast = run(case, inputs, dy, "triton")
    check(fast, composed(case, inputs, dy), composed(case, in_double(inputs), dy.double()))
    count = torch.tensor([70], dtype=torch.int32, device="cuda:1")
    assert torch.equal(linear(*inputs[:3], count=count, backend="triton"), fast["y"])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_reference_is_torch_linear(residual):
    """Forward against PyTorch's, backward against its autograd, in float64."""
    case = Case(9, 7, 5, residual=residual)
    inputs, dy = case.inputs()
    inputs, dy = in_double(inputs), dy.double()
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    y = F.linear(*leaves[:3])
    y = y + leaves[3] if residual else y
    torch.testing.assert_close(linear_ref(*inputs), y, atol=1e-14, rtol=0)
    gradients = torch.autograd.grad(y, leaves[:3], dy)
    for got, wanted in zip(linear_backward_ref(dy, *leaves[:2], True), gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-14, rtol=0)
    assert torch.equal(linear(*inputs[:3], residual=inputs[3]), y)


def test_reference_leaves_hidden_rows_out():
    case = Case(9, 7, 5)
    (x, weight, *_), dy = case.inputs()
    count = torch.tensor([case.rows], dtype=torch.int32)
    dx, dweight, dbias = linear_backward_ref(poisoned(dy, 3), poisoned(x, 3), weight, True, count)
    wanted = linear_backward_ref(dy, x, weight, True)
    for got, want in zip((dx[: case.rows], dweight, dbias), wanted, strict=True):
        torch.testing.assert_close(got, want)


def half_sums(x, weight, bias, residual):
    """Rounds the running sum to x's dtype after every product."""
    y = torch.zeros_like(residual)
    for k in range(x.shape[1]):
        y += x[:, k, None] * weight[:, k]
    return y + bias + residual


MUTANTS = {
    "bias is dropped": ("y", lambda i, r: linear_ref(i[0], i[1], None, i[3])),
    "residual is dropped": ("y", lambda i, r: linear_ref(*i[:3])),
    "sums in half precision": ("y", lambda i, r: half_sums(*i)),
    "last step of the reduction is lost": ("y", lambda i, r: linear_ref(i[0][:, :-1], i[1][:, :-1], *i[2:])),
    "bias gradient is dropped": ("dbias", lambda i, r: torch.zeros_like(r["dbias"])),
    "bias gradient is a mean": ("dbias", lambda i, r: r["dbias"] / i[0].shape[0]),
    "weight gradient loses a row": ("dweight", lambda i, r: r["dweight"] - i[0].new_ones(i[1].shape[0], 1) * i[0][-1]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_rule_catches_mutants(name):
    caught_in, mutate = MUTANTS[name]
    case = replace(CASES["float16"], inner=512)
    inputs, dy = case.inputs()
    torch_result, exact = composed(case, inputs, dy), composed(case, in_double(inputs), dy.double())
    check(torch_result, torch_result, exact)
    with pytest.raises(AssertionError, match=f"{caught_in}: max"):
        check(torch_result | {caught_in: mutate(inputs, torch_result)}, torch_result, exact)


def test_a_row_does_not_depend_on_its_batch(triton_device):
    """Bitwise, forward and for dx, whatever rows and padding are beside it."""
    case = Case(150, 30, 20)
    inputs, dy = case.inputs(triton_device)
    whole = run(case, inputs, dy, "triton")
    few = replace(case, rows=70, hidden=55)
    part = run(few, [inputs[0][:70], *inputs[1:]], dy[:70], "triton")
    assert torch.equal(part["y"], whole["y"][:70]) and torch.equal(part["dx"], whole["dx"][:70])


def test_inference_on_cpu_takes_the_kernel():
    """Few rows on AVX-512 run on our product; with a gradient, and under autocast, PyTorch's own operation is seen."""
    if dispatch.load_cpp() or torch.ops.roberta_fast_cpp.instruction_set() != "avx512":
        pytest.skip(dispatch.load_cpp() or "without AVX-512 PyTorch's product serves")
    (x, weight, bias, residual), _ = Case(100, 70, 900, residual=True).inputs()
    ours = linear(x, weight, bias, residual=residual)
    assert torch.equal(ours, linear(x, weight, bias, residual=residual, deterministic=True))
    stock = F.linear(x, weight, bias) + residual
    assert not torch.equal(ours, stock)
    assert torch.equal(linear(x.requires_grad_(), weight, bias, residual=residual), stock)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_training_takes_the_kernel_where_pytorch_is_slower():
    """And PyTorch's operation wherever someone counts on it, or one factor alone wants a gradient."""
    (x, weight, bias, _), dy = Case(900, 70, 64).inputs()
    x.requires_grad_(), weight.requires_grad_()
    slow = dispatch.load_cpp() is None and torch.ops.roberta_fast_cpp.outruns_pytorch()
    y = linear(x, weight, bias)
    assert ("roberta_fast" in y.grad_fn.name()) == slow
    gradients, expected = (torch.autograd.grad(result, (x, weight), dy) for result in (y, F.linear(x, weight, bias)))
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-4)
    assert "roberta_fast" not in linear(x, weight.detach(), bias).grad_fn.name()
    assert "roberta_fast" not in linear(x, weight, bias, backend="torch").grad_fn.name()
    derivative = torch.func.grad(lambda weight: linear(x.detach(), weight, bias).sum())(weight.detach())
    assert torch.allclose(derivative, x.detach().sum(0).expand(70, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("outer", "inner"), [(1, 333), (67, 333), (192, 333), (192, 2400)])
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(outer, inner, dtype):
    """On the CPU where deterministic; 1,100 rows are divided among tasks in other ways than 5, packed if in whole panels."""
    if reason := dispatch.load_cpp() or product_objection(facts_of(torch.empty(0, dtype=dtype))):
        pytest.skip(reason)
    (x, weight, bias, residual), _ = Case(1100, outer, inner, residual=True, dtype=dtype).inputs()
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            for size in (1, 5, 47, 500, 1100):
                parts = zip(x.split(size), residual.split(size), strict=True)
                results.append(torch.cat([linear(a, weight, bias, residual=b, deterministic=True) for a, b in parts]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"backend": "torch"}], ids=str)
def test_what_cannot_be_deterministic_raises(change):
    """A promise of bits is kept or refused, never dropped in silence."""
    x = torch.zeros(4, 3, dtype=change.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=r"can(not)? run linear on cpu .*torch: PyTorch's products do not have the same bits"):
        linear(x, x.new_zeros(5, 3), deterministic=True, **change)


def test_gradients_repeat_bitwise(triton_device):
    case = CASES["rows shared out"]
    inputs, dy = case.inputs(triton_device)
    first, second = (run(case, inputs, dy, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("dx", "dweight", "dbias"))


def test_operands_and_rounding_follow_torch_settings(triton_device):
    """TF32 in float32 products only where torch allows it."""
    x = torch.zeros(1, 1, device=triton_device)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert pointer_gemm(x)["PRECISION"] == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_autocast_as_torch(triton_device):
    """float32 parameters and inputs are cast, whichever way the rows are counted; gradients come back in float32."""
    (x, weight, bias, _), _ = Case(9, 7, 5).inputs(triton_device)
    count = torch.tensor([9], dtype=torch.int32, device=triton_device)
    results = []
    with torch.autocast(triton_device, dtype=torch.float16):
        for function in (F.linear, linear, lambda *a: linear(*a, count=count, backend="triton")):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y.float().sum(), leaves)))
    for result in results[1:]:
        assert [t.dtype for t in result] == [t.dtype for t in results[0]] == [torch.float16, *[torch.float32] * 3]
        for got, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [Case(5, 7, 3), Case(5, 7, 3, bias=False, residual=True, hidden=2)], ids=["plain", "count"])
def test_opcheck(case, backend):
    (x, weight, bias, residual), dy = case.inputs(backend.device)
    count = torch.tensor([case.rows], dtype=torch.int32, device=backend.device)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(operator, (*leaves, count, True, backend.name))
    torch.library.opcheck(backward_operator, (dy, x, weight, case.bias, count, backend.name))


ROWS = torch.zeros(4, 3)
BAD_ARGUMENTS = {
    "x of one dimension": ({"x": torch.zeros(3)}, r"x must be a packed \[N, C\] tensor, got shape \(3,\)"),
    "integer x": ({"x": ROWS.long()}, "x must be a floating-point tensor, got torch.int64"),
    "weight of another width": ({"weight": torch.zeros(5, 2)}, r"weight must be \[M, 3\], got shape \(5, 2\)"),
    "weight of another dtype": ({"weight": torch.zeros(5, 3).half()}, "weight must be of x's dtype .* got torch.float16"),
    "bias of another length": ({"bias": torch.zeros(4)}, r"bias must be \[5\], got shape \(4,\)"),
    "bias of another dtype": ({"bias": torch.zeros(5).half()}, "bias must be of x's dtype .* got torch.float16"),
    "residual of another shape": ({"residual": ROWS}, r"residual must be \[N, M\] = \(4, 5\), got shape \(4, 3\)"),
    "count of int64": ({"count": torch.tensor([4])}, r"count must be int32 \[1\], got torch.int64 \(1,\)"),
    "count of two": ({"count": torch.zeros(2, dtype=torch.int32)}, r"count must be int32 \[1\], got torch.int32 \(2,\)"),
    "unknown backend": (
        {"count": torch.tensor([4], dtype=torch.int32), "backend": "cudnn"},
        "backend='cudnn' is not one of",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_errors_name_argument_and_value(name):
    change, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        linear(**{"x": ROWS, "weight": torch.zeros(5, 3), "bias": torch.zeros(5), **change})
