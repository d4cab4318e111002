"""cross_entropy against torch's on full logits in higher precision: loss, every gradient, chunks, edges, and mutants."""

import functools
import importlib
import math
import re

import pytest
import torch
import torch.nn.functional as F

from roberta_fast.ops import cross_entropy
from roberta_fast.testing import assert_close_as_torch

module = importlib.import_module("roberta_fast.ops.cross_entropy")
operator = torch.ops.roberta_fast.cross_entropy.default

DTYPES = {"triton": (torch.float32, torch.float16, torch.bfloat16), "cpp": (torch.float32,)}
SIZES = [(1, 40, 11), (7, 24, 121), (33, 16, 1000), (5, 8, 4500)]  # rows, C, V


def inputs(rows=7, hidden=24, classes=121, dtype=torch.float32, device="cpu", bias=True):
    """(hidden, weight, bias, labels); every third row has no label."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, hidden), (classes, hidden), *([(classes,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[1::3] = -100
    return *tensors, *([] if bias else [None]), labels.to(device)


def plain(hidden, weight, bias, labels, **options):
    """torch's own on full logits, as Hugging Face's heads compute it."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, **options)


def ours(backend):
    return lambda *tensors, **options: cross_entropy(*tensors, backend=backend.name, **options)


def loss_and_gradients(function, tensors, **options):
    """{name: tensor}: the loss, and the gradients of three times it."""
    *leaves, labels = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    loss = function(*leaves, labels, **options)
    given = {name: t for name, t in zip(("hidden", "weight", "bias"), leaves, strict=True) if t is not None}
    return {"loss": loss.detach(), **dict(zip(given, torch.autograd.grad(3 * loss, list(given.values())), strict=True))}


def check(function, tensors, **options):
    """Holds the loss and the gradients of ``function`` to the error rules."""
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    fast = loss_and_gradients(function, tensors, **options)
    composed, reference = (loss_and_gradients(plain, t, **options) for t in (tensors, exact))
    for name, value in fast.items():
        factor = 2.0 if name == "loss" else 3.0
        assert_close_as_torch(value, composed[name], reference[name], factor=factor, name=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss_and_gradients(backend, size, smoothing):
    for dtype in DTYPES[backend.name]:
        for bias in (True, False):
            check(ours(backend), inputs(*size, dtype, backend.device, bias), label_smoothing=smoothing)


def test_float64_is_exact():
    tensors = [t.double() if t.is_floating_point() else t for t in inputs()]
    expected = loss_and_gradients(plain, tensors, label_smoothing=0.1)
    in_chunks = functools.partial(cross_entropy, backend="torch", label_smoothing=0.1)
    for name, value in loss_and_gradients(in_chunks, tensors).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_logits_are_made_in_chunks(backend, rows, monkeypatch):
    choose, made = module.dispatch.choose, []

    def spy(*arguments):
        choice = choose(*arguments)
        return choice._replace(run=lambda logits, *rest: made.append(len(logits)) or choice.run(logits, *rest))

    for dtype in DTYPES[backend.name]:
        made.clear()
        monkeypatch.setattr(module, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), rows * 1024 * dtype.itemsize))
        with monkeypatch.context() as context:
            context.setattr(module.dispatch, "choose", spy)
            check(ours(backend), inputs(33, 16, 1000, dtype, backend.device))
        assert sum(made) == 33
        assert max(made) <= rows


def test_large_and_infinite_logits(backend):
    hidden, weight, bias, labels = inputs(7, 24, 121, device=backend.device)
    check(ours(backend), (hidden * 40, weight, bias, labels))
    # Classes that a model rules out: they get nothing, and take nothing.
    ruled_out = bias.clone()
    ruled_out[[c for c in range(121) if c not in labels.tolist()][:50]] = -torch.inf
    fast, expected = (loss_and_gradients(f, (hidden, weight, ruled_out, labels)) for f in (ours(backend), plain))
    for name, value in fast.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_reaches_the_loss(backend, value):
    hidden, weight, bias, labels = inputs(7, 24, 121, device=backend.device)
    bias[60] = value
    assert cross_entropy(hidden, weight, bias, labels, backend=backend.name).isnan()


def test_no_label_at_all(backend):
    *tensors, labels = inputs(device=backend.device)
    for rows in (0, 7):
        hidden = tensors[0][:rows].clone().requires_grad_()
        loss = cross_entropy(hidden, *tensors[1:], torch.full_like(labels[:rows], -100), backend=backend.name)
        assert loss.isnan(), "as torch's mean of nothing"
    loss = cross_entropy(hidden, *tensors[1:], torch.full_like(labels, -100), num_items=1, backend=backend.name)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_number_of_items_divides_the_sum(backend):
    tensors = inputs(device=backend.device)
    total = cross_entropy(*tensors, num_items=1.0, backend=backend.name)
    torch.testing.assert_close(total, plain(*tensors, reduction="sum"))
    torch.testing.assert_close(cross_entropy(*tensors, num_items=torch.tensor(8), backend=backend.name), total / 8)


def test_another_ignore_index(backend):
    hidden, weight, bias, labels = inputs(device=backend.device)
    labels = torch.where(labels == -100, 0, labels)
    check(ours(backend), (hidden, weight, bias, labels), ignore_index=0)


def test_only_what_is_asked_for_gets_a_gradient(backend):
    hidden, weight, bias, labels = inputs(device=backend.device)
    weight.requires_grad_()
    cross_entropy(hidden, weight, bias, labels, backend=backend.name).backward()
    _, _, dhidden, dweight, dbias = operator(hidden, weight, bias, labels, -100, 0.0, [False, True, False], False, backend.name)
    assert (dhidden.numel(), dbias.numel()) == (0, 0)
    torch.testing.assert_close(weight.grad, dweight / (labels != -100).sum())
    with torch.no_grad():
        assert not cross_entropy(hidden, weight, bias, labels, backend=backend.name).requires_grad


def test_a_graph_that_is_kept_and_used_twice():
    hidden, weight, bias, labels = inputs()
    weight.requires_grad_()
    loss = cross_entropy(hidden, weight, bias, labels)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2, weight)
    assert torch.equal(second, first * 2)


def test_autocast_computes_in_its_dtype():
    hidden, weight, bias, labels = inputs(33, 16, 1000)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, weight, bias, labels, backend="torch")
        expected = plain(hidden, weight, bias, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_opcheck(backend):
    hidden, weight, bias, labels = inputs(device=backend.device)
    for tensors, needs in (((hidden, weight, bias), [True] * 3), ((hidden, weight, None), [True, True, False])):
        for keep in (True, False):
            tensors = [t if t is None else t.clone().requires_grad_() for t in tensors]
            torch.library.opcheck(operator, (*tensors, labels, -100, 0.1, needs, keep, backend.name))


BAD = {
    "hidden": (lambda h, w, b, y: (h[0], w, b, y), "a packed [N, C] tensor, got shape (24,)"),
    "weight": (lambda h, w, b, y: (h, w[:, :9], b, y), "[M, 24], got shape (121, 9)"),
    "bias": (lambda h, w, b, y: (h, w, b[:9], y), "[121], got shape (9,)"),
    "labels": (lambda h, w, b, y: (h, w, b, y[:3]), "int64 [N] with N=7, got torch.int64 (3,)"),
    "labels of int32": (lambda h, w, b, y: (h, w, b, y.int()), "int64 [N] with N=7, got torch.int32 (7,)"),
    "labels too large": (lambda h, w, b, y: (h, w, b, y + 121), "classes from 0 to 120 or ignore_index=-100, got"),
    "labels below zero": (lambda h, w, b, y: (h, w, b, y.clamp(max=-1)), "classes from 0 to 120 or ignore_index=-100, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(f"{name.split()[0]} must be {message}")):
        cross_entropy(*change(*inputs()))


def test_smoothing_outside_its_range():
    with pytest.raises(ValueError, match=re.escape("label_smoothing must be in [0, 1], got 1.5")):
        cross_entropy(*inputs(), label_smoothing=1.5)


def test_a_class_that_does_not_exist_gives_nan_on_triton(triton_device):
    tensors = inputs(device=triton_device)
    rows = importlib.import_module("roberta_fast.kernels.cross_entropy").cross_entropy_fwd
    losses = rows(F.linear(*tensors[:3]), torch.tensor([0, 121, -100, -1, 120, 5, 6], device=triton_device), -100, 0.0, False)
    assert losses.isnan().tolist() == [False, True, False, True, False, False, False]


MUTANTS = {
    "mean over all rows": lambda h, w, b, y, **o: plain(h, w, b, y, **o) * (y != -100).sum() / len(y),
    "smoothing left out": lambda h, w, b, y, **o: plain(h, w, b, y),
    "without the bias": lambda h, w, b, y, **o: plain(h, w, b * 0, y, **o),
    "gradient of the logits alone": lambda h, w, b, y, **o: (
        plain(h, w, b, y, **o).detach() - F.linear(h, w, b)[y != -100].gather(1, y[y != -100, None]).mean() + math.pi
    ),
    "ignored rows take part": lambda h, w, b, y, **o: plain(h, w, b, y.clamp(min=0), **o),
    "last class unseen": lambda h, w, b, y, **o: plain(h, w, torch.cat([b[:-1], b[-1:] - 1e4]), y, **o),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_error_rules_catch_mutants(name):
    check(plain, inputs(), label_smoothing=0.1)
    with pytest.raises(AssertionError):
        check(MUTANTS[name], inputs(), label_smoothing=0.1)
