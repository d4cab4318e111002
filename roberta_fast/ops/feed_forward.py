"""y = GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂, a feed-forward block that saves its pre-activation and recomputes GELU of it for backward.

With u = x W₁ᵀ + b₁ and a = GELU(u): da = dy W₂, dW₂ = dyᵀ a, db₂ = sum(dy), and the rest is ``linear_gelu``'s backward of da. The
products and GELU are those of ``linear_gelu`` and ``linear``; what this operation adds is that a, of u's size, is not kept.
"""

import torch
import torch.nn.functional as F

from roberta_fast.ops.linear import check_weight, linear
from roberta_fast.ops.linear_gelu import APPROXIMATIONS
from roberta_fast.ops.registration import autocast_to, check_rows, define, refuse, register_autograd


def feed_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    approximate: str = "none",
    count: torch.Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """GELU(x @ weight1ᵀ + bias1) @ weight2ᵀ + bias2, which keeps for backward x and the pre-activation alone.

    x: [N, K]; weight1: [M, K]; bias1: [M] or None; weight2: [L, M]; bias2: [L] or None. approximate: ``"none"`` (exact erf) or
    ``"tanh"``. count, deterministic: as in ``linear_gelu``. Under autocast computes in its dtype. Returns [N, L].
    Raises ValueError naming the argument that does not fit.
    """
    check_rows(x, count)
    check_weight(x, weight1, bias1)
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        refuse("weight2", f"shape {tuple(weight2.shape)}", f"[L, {weight1.shape[0]}]")
    if bias2 is not None and bias2.shape != weight2.shape[:1]:
        refuse("bias2", f"shape {tuple(bias2.shape)}", f"[{weight2.shape[0]}]")
    if approximate not in APPROXIMATIONS:
        refuse("approximate", repr(approximate), f"one of {APPROXIMATIONS}")
    x, weight1, bias1, weight2, bias2 = autocast_to(x, weight1, bias1, weight2, bias2)
    y, _ = _forward(x, weight1, bias1, weight2, bias2, approximate, count, deterministic, backend)
    return y


def feed_forward_ref(x, weight1, bias1, weight2, bias2, approximate="none"):
    """The composition in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def _forward_implementation(x, weight1, bias1, weight2, bias2, approximate, count, deterministic, backend):
    inner = torch.ops.roberta_fast.linear_gelu.default
    activated, preactivation = inner(x, weight1, bias1, approximate, True, count, deterministic, backend)
    y = linear(activated, weight2, bias2, count=count, deterministic=deterministic, backend=backend)
    return y, preactivation


def _forward_fake(x, weight1, bias1, weight2, bias2, approximate, count, deterministic, backend):
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(x.shape[0], weight1.shape[0])


def _backward_implementation(dy, u, x, weight1, weight2, has_bias1, has_bias2, approximate, count, backend):
    outer, inner = (getattr(torch.ops.roberta_fast, name).default for name in ("linear_backward", "linear_gelu_backward"))
    dactivated, dweight2, dbias2 = outer(dy, F.gelu(u, approximate=approximate), weight2, has_bias2, count, backend)
    return *inner(dactivated, u, x, weight1, has_bias1, approximate, count, backend), dweight2, dbias2


def _backward_fake(dy, u, x, weight1, weight2, has_bias1, has_bias2, approximate, count, backend):
    biases = (weight.new_empty(weight.shape[:1] if has else (0,)) for weight, has in ((weight1, has_bias1), (weight2, has_bias2)))
    dbias1, dbias2 = biases
    return x.new_empty(x.shape), weight1.new_empty(weight1.shape), dbias1, weight2.new_empty(weight2.shape), dbias2


_forward = define(
    "feed_forward(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str approximate, Tensor? count, "
    "bool deterministic, str backend) -> (Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    "feed_forward_backward(Tensor dy, Tensor u, Tensor x, Tensor weight1, Tensor weight2, bool has_bias1, bool has_bias2, "
    "str approximate, Tensor? count, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight1, bias1, weight2, bias2, ctx.approximate, count, _, ctx.backend = inputs
    _, u = output
    ctx.has_biases = bias1 is not None, bias2 is not None
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(u, x, weight1, weight2, count)


def _autograd_backward(ctx, dy, _du):
    u, x, weight1, weight2, count = ctx.saved_tensors
    arguments = dy.contiguous(), u, x, weight1, weight2, *ctx.has_biases, ctx.approximate, count, ctx.backend
    dx, dweight1, dbias1, dweight2, dbias2 = _backward(*arguments)
    has_bias1, has_bias2 = ctx.has_biases
    return dx, dweight1, dbias1 if has_bias1 else None, dweight2, dbias2 if has_bias2 else None, *[None] * 4


register_autograd("feed_forward", _autograd_backward, _setup_context)
