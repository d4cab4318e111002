"""feed_forward: the two products and GELU between them against the reference, and what is kept for the backward pass."""

import re

import pytest
import torch

from roberta_fast import ops
from roberta_fast.ops.feed_forward import feed_forward_ref
from roberta_fast.testing import assert_close_as_torch, poisoned

operator = torch.ops.roberta_fast.feed_forward.default
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


def inputs(rows=13, hidden=24, inner=40, dtype=torch.float32, device="cpu", biases=True):
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,))
    tensors = [(torch.randn(shape, generator=generator) * 0.5).to(device, dtype) for shape in shapes]
    return [t if biases or t.dim() == 2 else None for t in tensors]


def results(function, tensors, **options):
    """{name: tensor} of the result and the gradients of its product with fixed numbers."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    given = {name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return {"y": y.detach(), **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))}


def check(function, tensors, **options):
    exact = results(feed_forward_ref, [t if t is None else t.double() for t in tensors], **options)
    composed, fast = (results(f, tensors, **options) for f in (feed_forward_ref, function))
    for name, value in fast.items():
        assert_close_as_torch(value, composed[name], exact[name], factor=2.0 if name == "y" else 3.0, name=name)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("rows", [1, 13, 70])
def test_result_and_gradients(backend, rows, approximate):
    for biases in (True, False):
        tensors = inputs(rows, device=backend.device, biases=biases)
        check(lambda *t, **o: ops.feed_forward(*t, backend=backend.name, **o), tensors, approximate=approximate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    check(lambda *t, **o: ops.feed_forward(*t, backend="torch", **o), inputs(dtype=dtype))


def test_keeps_its_input_and_the_preactivation_alone():
    x, *rest = [t.requires_grad_() for t in inputs()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ops.feed_forward(x, *rest)
    assert sorted(kept) == sorted([(13, 40), (13, 24), (40, 24), (24, 40)])


def test_rows_behind_the_count_are_never_read():
    x, *rest = inputs()
    count = torch.tensor([13], dtype=torch.int32)
    many = poisoned(x, 5).requires_grad_()
    weights = [t.clone().requires_grad_() for t in rest]
    y = ops.feed_forward(many, *weights, count=count, backend="torch")
    (y[:13] * 1.0).sum().backward()
    plain = [t.clone().requires_grad_() for t in (x, *rest)]
    feed_forward_ref(*plain).sum().backward()
    for ours, theirs in zip((many, *weights), plain, strict=True):
        torch.testing.assert_close(ours.grad[: len(theirs)], theirs.grad)


def test_opcheck(backend):
    for biases in (True, False):
        tensors = [t if t is None else t.requires_grad_() for t in inputs(device=backend.device, biases=biases)]
        torch.library.opcheck(operator, (*tensors, "none", None, False, backend.name))


def test_autocast_computes_in_its_dtype():
    x, *rest = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.feed_forward(x, *rest, backend="torch").dtype == torch.bfloat16


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
    tensors = inputs()
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {message}")):
        ops.feed_forward(*tensors)


MUTANTS = {
    "without the second bias": lambda x, w1, b1, w2, b2, **o: feed_forward_ref(x, w1, b1, w2, b2 * 0, **o),
    "the other form of GELU": lambda *t: feed_forward_ref(*t, approximate="tanh"),
    "no gradient through GELU": lambda x, w1, b1, w2, b2: feed_forward_ref(x, w1.detach() + 0 * w1, b1, w2, b2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_error_rules_catch_mutants(name):
    check(feed_forward_ref, inputs())
    with pytest.raises(AssertionError):
        check(MUTANTS[name], inputs())
