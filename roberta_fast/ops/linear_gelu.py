"""y = GELU(x Wᵀ + b), the first half of a feed-forward block.

GELU(u) = u Φ(u) with the normal distribution's Φ, exactly (``approximate="none"``), or u/2 (1 + tanh(√(2/π)(u + 0.044715 u³)))
where a model's config names that form (``"tanh"``); Hendrycks and Gimpel 2016. Only the pre-activation u is saved for backward:
du = dy GELU′(u), dx = du W, dW = duᵀ x, db = sum(du) over the real rows.
"""

import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops.linear import check_weight, linear_backward_ref, linear_ref, only_cpp, product_objection
from roberta_fast.ops.registration import (
    autocast_to,
    check_rows,
    define,
    facts_of,
    float32_or_bfloat16,
    real_rows,
    refuse,
    register_autograd,
    register_backends,
)

APPROXIMATIONS = ("none", "tanh")


def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    count: torch.Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """GELU(x @ weightᵀ + bias).

    x: [N, K]; weight: [M, K]; bias: [M] or None. approximate: ``"none"`` (exact erf) or ``"tanh"``.
    count: int32 [1] on x's device; rows from it on are never read and hold anything in the result. None: all are real.
    deterministic: a row gives bitwise the same whatever it is batched with; the backward pass is the same from run to run.
    packed: as in ``linear``.
    Under autocast computes in its dtype. Returns [N, M]. Raises ValueError naming the argument that does not fit.
    """
    check_rows(x, count)
    check_weight(x, weight, bias)
    if approximate not in APPROXIMATIONS:
        refuse("approximate", repr(approximate), f"one of {APPROXIMATIONS}")
    x, weight, bias = autocast_to(x, weight, bias)
    needs_grad = any(t is not None and t.requires_grad for t in (x, weight, bias))
    save = torch.is_grad_enabled() and needs_grad
    y, _ = _forward(x, weight, bias, approximate, save, count, deterministic, backend, packed)
    return y


def linear_gelu_ref(x, weight, bias=None, approximate="none", save_preactivation=False, count=None, deterministic=False):
    """The composition in plain PyTorch; returns (y, u), u empty unless it is to be saved."""
    u = linear_ref(x, weight, bias)
    return F.gelu(u, approximate=approximate), u if save_preactivation else u.new_empty(0)


def linear_gelu_backward_ref(dy, u, x, weight, has_bias, approximate="none", count=None):
    """Gradients (dx, dweight, dbias); dbias is empty where there is no bias."""
    du = torch.ops.aten.gelu_backward(real_rows(dy, count), real_rows(u, count), approximate=approximate)
    return linear_backward_ref(du, real_rows(x, count), weight, has_bias)


def _forward_implementation(x, weight, bias, approximate, save_preactivation, count, deterministic, backend, packed=None):
    choice = dispatch.choose("linear_gelu", facts_of(x, device_rows=count is not None, deterministic=deterministic), backend)
    return choice.run(x, weight, bias, approximate, save_preactivation, count, deterministic, *only_cpp(choice, packed))


def _forward_fake(x, weight, bias, approximate, save_preactivation, count, deterministic, backend, packed=None):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_preactivation else (0,))


def _backward_implementation(dy, u, x, weight, has_bias, approximate, count, backend):
    run = dispatch.choose("linear_gelu_backward", facts_of(x, device_rows=count is not None), backend).run
    return run(dy, u, x, weight, has_bias, approximate, count)


def _backward_fake(dy, u, x, weight, has_bias, approximate, count, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1] if has_bias else (0,))


_forward = define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, str approximate, bool save_preactivation, "
    "Tensor? count, bool deterministic, str backend, Tensor? packed=None) -> (Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    "linear_gelu_backward(Tensor dy, Tensor u, Tensor x, Tensor weight, bool has_bias, str approximate, "
    "Tensor? count, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.approximate, _, count, _, ctx.backend, _ = inputs
    _, u = output
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(u, x, weight, count)


def _autograd_backward(ctx, dy, _du):
    u, x, weight, count = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy.contiguous(), u, x, weight, ctx.has_bias, ctx.approximate, count, ctx.backend)
    return dx, dweight, dbias if ctx.has_bias else None, *[None] * 6


register_autograd("linear_gelu", _autograd_backward, _setup_context)
register_backends("linear_gelu", {"linear_gelu": "linear_gelu_fwd"}, in_cpp=product_objection)
register_backends("linear_gelu", {"linear_gelu_backward": "linear_gelu_bwd"}, in_cpp=float32_or_bfloat16)
