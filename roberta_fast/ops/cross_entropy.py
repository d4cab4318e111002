"""loss = cross-entropy of softmax(h Wᵀ + b), without the logits of all rows at once.

With z = h Wᵀ + b for a row of label y, V classes and smoothing ε: loss = lse(z) - (1-ε) z_y - ε mean(z), and its gradient
dz = softmax(z) - (1-ε) onehot(y) - ε/V; rows of label ``ignore_index`` give zero. dh = dz W, dW = dzᵀ h, db = sum(dz).

Rows are taken in chunks: a chunk's logits are made, and turned into dz where they lie. Where one chunk is all, its dz is kept for
the backward pass in the place of the logits. Else a chunk's dz is spent on dh, dW and db before the logits of the next are made,
in the forward pass, which knows dz up to the factor dloss, an idea of Liger-Kernel's (Hsu et al. 2024). No logits are made twice,
and no more than one chunk's exist. What backends implement is the pass over a chunk's logits; the products are PyTorch's.
"""

import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops.linear import check_weight
from roberta_fast.ops.registration import (
    autocast_to,
    check_rows,
    define,
    facts_of,
    refuse,
    register_autograd,
    register_backends,
)

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}  # of logits at once; more repays nothing, less adds to dW more often
ALIGNMENT = 64  # columns: rows of odd vocabularies begin where GEMMs can load vectors


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items: torch.Tensor | float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """cross_entropy(hidden @ weightᵀ + bias, labels), the mean over the rows whose label is not ``ignore_index``.

    hidden: [N, C]; weight: [V, C]; bias: [V] or None; labels: int64 [N], classes from 0 to V - 1 or ``ignore_index``.
    label_smoothing: ε in [0, 1]. num_items: what the sum over rows is divided by, in place of their number.
    Under autocast the products are in its dtype. Returns a float32 scalar (float64 for float64), NaN where it divides by zero, as
    ``torch.nn.functional.cross_entropy`` does. On CUDA a label outside the classes makes the loss NaN.
    Raises ValueError naming the argument that does not fit, on CPU also a label outside the classes.
    """
    check_rows(hidden, None, "hidden")
    check_weight(hidden, weight, bias)
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        refuse("labels", f"{labels.dtype} {tuple(labels.shape)}", f"int64 [N] with N={hidden.shape[0]}")
    if labels.device != hidden.device:
        refuse("labels", labels.device, f"on hidden's device {hidden.device}")
    if not 0.0 <= label_smoothing <= 1.0:
        refuse("label_smoothing", label_smoothing, "in [0, 1]")
    hidden, weight, bias = autocast_to(hidden, weight, bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    # A compiled graph serves every number of rows and cannot branch on it.
    keep = any(needs) and not torch.compiler.is_compiling() and _chunks(hidden, weight.shape[0]) == 1
    total, *_ = _forward(hidden, weight, bias, labels, ignore_index, label_smoothing, needs, keep, backend)
    return total / ((labels != ignore_index).sum() if num_items is None else num_items)


def cross_entropy_ref(logits, labels, ignore_index=-100, label_smoothing=0.0, with_gradient=False):
    """The losses of rows of ``logits`` [n, V], in float32 (float64 for float64); where asked, logits become their gradient."""
    precise = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(precise, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    if with_gradient:
        real = labels != ignore_index
        gradient = precise.softmax(-1) - label_smoothing / logits.shape[1]
        at_labels = gradient.new_full((len(labels), 1), label_smoothing - 1.0)
        gradient.scatter_add_(1, torch.where(real, labels, 0)[:, None], at_labels)
        logits.copy_(torch.where(real[:, None], gradient, 0))
    return losses


def _chunks(hidden, classes):
    """In how many chunks the rows of hidden [N, C] are taken."""
    limit = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    return max(1, -(-hidden.shape[0] * _stride(classes) * hidden.element_size() // limit))


def _stride(classes):
    """Elements from one row of logits to the next."""
    return -(-classes // ALIGNMENT) * ALIGNMENT


def _forward_implementation(hidden, weight, bias, labels, ignore_index, label_smoothing, needs, keep, backend):
    run = dispatch.choose("cross_entropy", facts_of(hidden), backend).run
    n, classes = hidden.shape[0], weight.shape[0]
    _check_labels(labels, ignore_index, classes)
    precise = torch.promote_types(hidden.dtype, torch.float32)
    rows = -(-n // _chunks(hidden, classes))
    buffer, losses = hidden.new_empty(rows, _stride(classes)), hidden.new_empty(n, dtype=precise)
    buffer[:, classes:] = 0
    gradients = None if keep else _Gradients(hidden, weight, needs)
    for begin in range(0, n, max(rows, 1)):
        chunk = hidden[begin : begin + rows]
        logits = buffer[: len(chunk), :classes]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        losses[begin : begin + rows] = run(logits, labels[begin : begin + rows], ignore_index, label_smoothing, any(needs))
        if gradients:
            gradients.add(logits, begin)
    total, empty = losses.sum(), [hidden.new_empty(0) for _ in range(3)]
    return (total, buffer, *empty) if keep else (total, hidden.new_empty(0), *gradients.results())


class _Gradients:
    """Those of the summed losses, from one chunk's dlogits after the other; of several chunks added in float32 at least."""

    def __init__(self, hidden, weight, needs):
        self.hidden, self.weight = hidden, weight
        precise = torch.promote_types(hidden.dtype, torch.float32)
        self.dhidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
        self.dweight = weight.new_zeros(weight.shape if needs[1] else (0,), dtype=precise)
        self.dbias = weight.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=precise)

    def add(self, dlogits, begin):
        rows = self.hidden[begin : begin + len(dlogits)]
        if self.dhidden.numel():
            torch.mm(dlogits, self.weight, out=self.dhidden[begin : begin + len(dlogits)])
        if self.dweight.numel() and self.dweight.dtype == rows.dtype:
            self.dweight.addmm_(dlogits.t(), rows)
        elif self.dweight.numel():
            self.dweight += dlogits.t() @ rows
        if self.dbias.numel():
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def results(self):
        return self.dhidden, self.dweight.to(self.weight.dtype), self.dbias.to(self.weight.dtype)


def _check_labels(labels, ignore_index, classes):
    if labels.device.type != "cpu" or not labels.numel():
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if wrong.numel():
        refuse("labels", int(wrong[0]), f"classes from 0 to {classes - 1} or ignore_index={ignore_index}")


def _forward_fake(hidden, weight, bias, labels, ignore_index, label_smoothing, needs, keep, backend):
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if keep:
        return total, hidden.new_empty(hidden.shape[0], _stride(weight.shape[0])), *(hidden.new_empty(0) for _ in range(3))
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = (weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
    return total, hidden.new_empty(0), *gradients


_forward = define(
    "cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float label_smoothing, "
    "bool[] needs, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)


def _setup_context(ctx, inputs, output):
    hidden, weight, *_, ctx.needs, ctx.keep, _ = inputs
    _, dlogits, *gradients = output
    ctx.mark_non_differentiable(dlogits, *gradients)
    ctx.save_for_backward(*((hidden, weight, dlogits) if ctx.keep else gradients))


def _autograd_backward(ctx, dtotal, *_):
    if not ctx.keep:
        gradients = (g * dtotal if need else None for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
        return *gradients, *[None] * 6
    hidden, weight, dlogits = ctx.saved_tensors
    dlogits = dlogits[:, : weight.shape[0]]
    # dtotal goes to the small factor of each product.
    dhidden = dlogits @ weight * dtotal if ctx.needs[0] else None
    dweight = dlogits.t() @ (hidden * dtotal) if ctx.needs[1] else None
    dbias = (dlogits.sum(0, dtype=dtotal.dtype) * dtotal).to(weight.dtype) if ctx.needs[2] else None
    return dhidden, dweight, dbias, *[None] * 6


register_autograd("cross_entropy", _autograd_backward, _setup_context)
register_backends("cross_entropy", {"cross_entropy": "cross_entropy_fwd"})
