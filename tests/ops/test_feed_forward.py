"""feed_forward: result and gradients against the reference, what is kept for the backward pass, and mutants."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from roberta_fast import ops
from roberta_fast.ops.feed_forward import feed_forward_backward_ref, feed_forward_ref
from roberta_fast.testing import assert_close_as_torch, poisoned

operator = torch.ops.roberta_fast.feed_forward.default
backward_operator = torch.ops.roberta_fast.feed_forward_backward.default
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``outer`` columns, ``inner`` between the products; behind a count lie ``hidden`` rows of NaN."""

    rows: int = 13
    outer: int = 24
    inner: int = 40
    hidden: int | None = None
    biases: bool = True
    approximate: str = "none"
    recompute: bool = False
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu"):
        """(x, weight1, bias1, weight2, bias2) without what lies behind the count, and the gradient of the result; seeded."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.outer + 977 * self.inner)

        def random(*shape, scale=1.0):
            shape = shape[::-1] if self.strided else shape
            t = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, self.dtype)
            return t.mT if self.strided else t

        weight1, weight2 = (random(*s, scale=1.5 * s[1] ** -0.5) for s in ((self.inner, self.outer), (self.outer, self.inner)))
        bias1, bias2 = (random(size, 1)[:, 0] if self.biases else None for size in (self.inner, self.outer))
        return [random(self.rows, self.outer), weight1, bias1, weight2, bias2], random(self.rows, self.outer)


def run(case, inputs, dy, backend):
    """{name: tensor} of the operation's result and gradients on ``backend``; real rows only."""
    (x, *weights), count = inputs, None
    if case.hidden is not None:
        x, dy = poisoned(x, case.hidden), poisoned(dy, case.hidden)
        count = torch.tensor([case.rows], dtype=torch.int32, device=x.device)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, *weights)]
    options = {"approximate": case.approximate, "recompute": case.recompute, "count": count, "backend": backend}
    return named(ops.feed_forward(*leaves, **options), leaves, dy, case.rows)


def composed(case, inputs, dy, function=feed_forward_ref):
    """The same by autograd of the plain composition on the real rows alone."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    return named(function(*leaves, approximate=case.approximate), leaves, dy, case.rows)


def named(y, leaves, dy, rows):
    given = {name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    found = {"y": y.detach(), **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))}
    return found | {name: found[name][:rows] for name in ("y", "x")}


def in_double(case, inputs, dy):
    return composed(case, [t if t is None else t.double() for t in inputs], dy.double())


def check(fast, torch_result, exact):
    assert fast.keys() == exact.keys()
    for name, wanted in exact.items():
        assert_close_as_torch(fast[name], torch_result[name], wanted, factor=2.0 if name == "y" else 3.0, name=name)


CASES = {
    "one tile": Case(),
    "odd sizes": Case(70, 33, 67),
    "several tiles of rows": Case(150, 9, 70),
    "several groups of tiles": Case(530, 8, 70),
    "many columns": Case(9, 20, 300),
    "no biases": Case(33, 40, 20, biases=False),
    "tanh": Case(70, 33, 30, approximate="tanh"),
    "strided": Case(70, 33, 67, strided=True),
    "no rows": Case(0, 8, 8),
    "one row": Case(1, 9, 70),
    "one of each": Case(1, 1, 1),
    "count": Case(70, 33, 67, hidden=90),
    "count of zero": Case(0, 33, 20, hidden=70),
    "count of all": Case(70, 33, 20, hidden=0),
    "count, tiles behind it": Case(140, 9, 140, hidden=200),
    "count, tanh, no biases": Case(70, 33, 30, hidden=9, biases=False, approximate="tanh"),
    "float16": Case(140, 64, 72, dtype=torch.float16),
    "float16, odd sizes, count": Case(133, 37, 129, hidden=170, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, backend):
    first = backend.fitted(CASES[name], products=True)
    for case in (first, replace(first, recompute=True)):
        inputs, dy = case.inputs(backend.device)
        check(run(case, inputs, dy, backend.name), composed(case, inputs, dy), in_double(case, inputs, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_in_plain_pytorch(dtype):
    case = Case(70, 33, 67, hidden=9, recompute=True, dtype=dtype)
    inputs, dy = case.inputs()
    check(run(case, inputs, dy, "torch"), composed(case, inputs, dy), in_double(case, inputs, dy))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(1000, 768, 3072, dtype=torch.bfloat16),
    Case(1000, 1024, 4096, hidden=1048, recompute=True, dtype=torch.bfloat16),
    Case(777, 1023, 3073, hidden=100, approximate="tanh", dtype=torch.bfloat16),
    Case(1000, 384, 1536, recompute=True, dtype=torch.float16),
    Case(1000, 768, 3072, hidden=24),
], ids=["base, bfloat16", "large, bfloat16", "odd, tanh, bfloat16", "MiniLM, float16", "float32 without TF32"])  # fmt: skip
def test_model_sizes(case):
    inputs, dy = case.inputs("cuda")
    check(run(case, inputs, dy, "triton"), composed(case, inputs, dy), in_double(case, inputs, dy))


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_gelu_is_never_stored(recompute):
    """Of u's size, backward makes du alone, and GELU(u) where that is not kept."""
    case = Case(4096, 512, 4096, recompute=recompute, dtype=torch.bfloat16)
    inputs, dy = case.inputs("cuda")
    leaves = [t.requires_grad_() for t in inputs]
    y = ops.feed_forward(*leaves, recompute=recompute)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(y, leaves, dy)
    wide = case.rows * case.inner * 2
    assert torch.cuda.max_memory_allocated() - before < (2.7 if recompute else 1.7) * wide


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reference_is_the_derivative(approximate):
    """Against PyTorch's autograd, in float64; hidden rows are left out."""
    case = Case(9, 5, 7, approximate=approximate)
    inputs, dy = ([t.double() for t in case.inputs()[0]], case.inputs()[1].double())
    x, weight1, bias1, weight2, _ = inputs
    wanted = composed(case, inputs, dy)
    u, count = F.linear(x, weight1, bias1), torch.tensor([9], dtype=torch.int32)
    for activated in (None, F.gelu(u, approximate=approximate)):
        rows = [t if t is None else poisoned(t, 3) for t in (dy, u, activated, x)]
        dx, *others = feed_forward_backward_ref(*rows, weight1, weight2, [True] * 5, approximate, count)
        for name, gradient in zip(NAMES, (dx[:9], *others), strict=True):
            torch.testing.assert_close(gradient, wanted[name], atol=1e-14, rtol=0)


def test_gradients_repeat_bitwise(backend):
    case = CASES["count, tiles behind it"]
    inputs, dy = case.inputs(backend.device)
    first, second = (run(case, inputs, dy, backend.name) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_gradients_that_are_asked_for(backend):
    """Frozen parameters cost nothing, and change nothing in the others' gradients."""
    case = Case(70, 33, 67, recompute=True)
    inputs, dy = case.inputs(backend.device)
    everything = run(case, inputs, dy, backend.name)
    for learning in (("x",), ("bias1", "weight2"), ("weight1",), ("bias2",)):
        leaves = [t.detach().requires_grad_(name in learning) for name, t in zip(NAMES, inputs, strict=True)]
        y = ops.feed_forward(*leaves, recompute=True, backend=backend.name)
        y.backward(dy)
        for name, leaf in zip(NAMES, leaves, strict=True):
            assert (leaf.grad is not None) == (name in learning)
            assert leaf.grad is None or torch.equal(leaf.grad, everything[name])


KEPT = {
    "everything learns": (NAMES, False, [(13, 24), (13, 40), (13, 40), (24, 40), (40, 24)]),
    "recomputed": (NAMES, True, [(13, 24), (13, 40), (24, 40), (40, 24)]),
    "frozen parameters": (("x",), False, [(13, 24), (13, 40), (24, 40), (40, 24)]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name, triton_device):
    learning, recompute, shapes = KEPT[name]
    inputs, _ = Case().inputs(triton_device)
    leaves = [t.requires_grad_(name in learning) for name, t in zip(NAMES, inputs, strict=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ops.feed_forward(*leaves, recompute=recompute, backend="triton")
    assert sorted(kept) == shapes


def test_opcheck(backend):
    for case, keep in ((Case(), True), (Case(biases=False), False)):
        inputs, dy = case.inputs(backend.device)
        leaves = [t if t is None else t.requires_grad_() for t in inputs]
        torch.library.opcheck(operator, (*leaves, "none", keep, None, False, backend.name))
    u = torch.randn(13, 40, device=backend.device)
    for needs in ([True] * 5, [True, False, True, False, False]):
        rest = inputs[0].detach(), inputs[1].detach(), inputs[3].detach(), needs, "tanh", None, backend.name
        torch.library.opcheck(backward_operator, (dy, u, u if needs[1] else None, *rest))


def test_autocast_computes_in_its_dtype(triton_device):
    """float32 parameters and inputs are cast; gradients come back in float32, as near as PyTorch's own."""
    case = Case()
    inputs, dy = case.inputs(triton_device)
    exact, found = in_double(case, inputs, dy), []
    with torch.autocast(triton_device, torch.float16):
        for function in (lambda *t, **_: ops.feed_forward(*t, backend="triton"), feed_forward_ref):
            found.append(composed(case, inputs, dy.half(), function))
    assert found[0].pop("y").dtype == torch.float16 and all(t.dtype == torch.float32 for t in found[0].values())
    for name, gradient in found[0].items():
        assert_close_as_torch(gradient.half(), found[1][name].half(), exact[name], factor=3.0, name=name)


BAD = {
    "x": (0, lambda t: t[0], "a packed [N, C] tensor"),
    "weight": (1, lambda t: t[:, :9], "[M, 24], got shape (40, 9)"),
    "bias": (2, lambda t: t[:9], "[40], got shape (9,)"),
    "weight2": (3, lambda t: t[:, :9], "[L, 40], got shape (24, 9)"),
    "bias2": (4, lambda t: t[:9], "[24], got shape (9,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    index, change, message = BAD[name]
    tensors, _ = Case().inputs()
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {message}")):
        ops.feed_forward(*tensors)


def test_bad_form_is_named():
    with pytest.raises(ValueError, match=r"approximate must be one of .*, got 'sigmoid'"):
        ops.feed_forward(*Case().inputs()[0], approximate="sigmoid")


class GeluPassedThrough(torch.autograd.Function):
    """GELU whose gradient is taken for that of the identity."""

    @staticmethod
    def forward(ctx, u):
        return F.gelu(u)

    @staticmethod
    def backward(ctx, dy):
        return dy


def without_derivative(x, weight1, bias1, weight2, bias2, approximate):
    return F.linear(GeluPassedThrough.apply(F.linear(x, weight1, bias1)), weight2, bias2)


def of_the_other_form(case, inputs, dy):
    return composed(replace(case, approximate="tanh"), inputs, dy)


MUTANTS = {
    "without the second bias": ("y", lambda case, i, dy, r: feed_forward_ref(*i[:4], i[4] * 0)),
    "the other form of GELU": ("y", lambda case, i, dy, r: feed_forward_ref(*i, approximate="tanh")),
    "gradient without GELU′": ("x", lambda case, i, dy, r: composed(case, i, dy, without_derivative)["x"]),
    "weight gradient of the other form": ("weight1", lambda case, i, dy, r: of_the_other_form(case, i, dy)["weight1"]),
    "bias gradient before GELU": ("bias1", lambda case, i, dy, r: (dy @ i[3]).sum(0)),
    "bias gradient of one tile": ("bias1", lambda case, i, dy, r: composed(case, [i[0][:64], *i[1:]], dy[:64])["bias1"]),
    "weight gradient of the pre-activation": ("weight2", lambda case, i, dy, r: dy.mT @ F.linear(*i[:3])),
    "bias gradient is dropped": ("bias2", lambda case, i, dy, r: torch.zeros_like(r["bias2"])),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_error_rules_catch_mutants(name):
    caught_in, mutate = MUTANTS[name]
    case = Case(70, 33, 67)
    inputs, dy = case.inputs()
    torch_result, exact = composed(case, inputs, dy), in_double(case, inputs, dy)
    check(torch_result, torch_result, exact)
    with pytest.raises(AssertionError, match=f"{caught_in}: max"):
        check(torch_result | {caught_in: mutate(case, inputs, dy, torch_result)}, torch_result, exact)
