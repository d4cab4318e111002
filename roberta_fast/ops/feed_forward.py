"""y = GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂, a feed-forward block.

Backward, of u = x W₁ᵀ + b₁ and a = GELU(u): du = (dy W₂) ⊙ GELU′(u), written once, dx = du W₁, dW₁ = duᵀ x, db₁ = sum(du),
dW₂ = dyᵀ a, db₂ = sum(dy) over the real rows. a is kept, or computed again of u, which is kept in any case. Forward and in
inference it is ``linear_gelu`` and ``linear``; so it is in training where no kernel has both products in hand.
"""

import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops.linear import check_weight, linear
from roberta_fast.ops.linear_gelu import APPROXIMATIONS, linear_gelu, linear_gelu_backward_ref
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


def feed_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    approximate: str = "none",
    recompute: bool = False,
    count: torch.Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """GELU(x @ weight1ᵀ + bias1) @ weight2ᵀ + bias2.

    x: [N, K]; weight1: [M, K]; bias1: [M] or None; weight2: [L, M]; bias2: [L] or None. approximate: ``"none"`` (exact erf) or
    ``"tanh"``. recompute: backward computes GELU again, so that of [N, M] the pre-activation alone is kept. count,
    deterministic: as in ``linear_gelu``. Under autocast computes in its dtype. Returns [N, L].
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
    tensors = x, weight1, bias1, weight2, bias2
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not needs_grad or not is_fused(recompute, x.is_cuda, backend):
        how = {"count": count, "deterministic": deterministic, "backend": backend}
        return linear(linear_gelu(x, weight1, bias1, approximate=approximate, **how), weight2, bias2, **how)
    keep = weight2.requires_grad and not recompute
    y, *_ = _forward(*autocast_to(*tensors), approximate, keep, count, deterministic, backend)
    return y


def is_fused(recompute: bool, is_cuda: bool, backend: str) -> bool:
    """True where the backward pass has both products in hand: where a kernel gains by it, and where GELU is computed again."""
    return recompute or is_cuda or backend == "triton"


def feed_forward_ref(x, weight1, bias1, weight2, bias2, approximate="none"):
    """The composition in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def feed_forward_backward_ref(
    dy, u, activated, x, weight1, weight2, needs, approximate="none", count=None, gelu_backward=linear_gelu_backward_ref
):
    """Gradients (dx, dweight1, dbias1, dweight2, dbias2), those empty that ``needs`` (five bools) does not ask for.

    activated: GELU(u), or None where it has to be computed again. gelu_backward: of ``linear_gelu``.
    """
    dy, u, x = (real_rows(t, count) for t in (dy, u, x))
    gradients = *gelu_backward(dy @ weight2, u, x, weight1, needs[2], approximate, None), None, None
    if needs[3]:
        activated = F.gelu(u, approximate=approximate) if activated is None else real_rows(activated, count)
        gradients = *gradients[:3], dy.mT @ activated, None
    if needs[4]:
        gradients = *gradients[:4], dy.sum(0)
    return tuple(gradient if needed else dy.new_empty(0) for gradient, needed in zip(gradients, needs, strict=True))


def feed_forward_backward_cpp(*arguments):
    """``feed_forward_backward_ref`` with the C++ kernel for GELU and what is before it."""
    return feed_forward_backward_ref(*arguments, gelu_backward=torch.ops.roberta_fast_cpp.linear_gelu_bwd.default)


def _forward_implementation(x, weight1, bias1, weight2, bias2, approximate, keep, count, deterministic, backend):
    inner = torch.ops.roberta_fast.linear_gelu.default
    activated, u = inner(x, weight1, bias1, approximate, True, count, deterministic, backend)
    y = linear(activated, weight2, bias2, count=count, deterministic=deterministic, backend=backend)
    return y, u, activated if keep else x.new_empty(0)


def _forward_fake(x, weight1, bias1, weight2, bias2, approximate, keep, count, deterministic, backend):
    shape = x.shape[0], weight1.shape[0]
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(shape), x.new_empty(shape if keep else (0,))


def _backward_implementation(dy, u, activated, x, weight1, weight2, needs, approximate, count, backend):
    facts = facts_of(x, device_rows=count is not None)
    run = dispatch.choose("feed_forward_backward", facts, backend).run
    return run(dy, u, activated, x, weight1, weight2, needs, approximate, count)


def _backward_fake(dy, u, activated, x, weight1, weight2, needs, approximate, count, backend):
    shapes = x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1]
    return tuple(x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))


_forward = define(
    "feed_forward(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str approximate, bool keep, "
    "Tensor? count, bool deterministic, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    "feed_forward_backward(Tensor dy, Tensor u, Tensor? activated, Tensor x, Tensor weight1, Tensor weight2, bool[] needs, "
    "str approximate, Tensor? count, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight1, _, weight2, _, ctx.approximate, keep, count, _, ctx.backend = inputs
    _, u, activated = output
    ctx.mark_non_differentiable(u, activated)
    ctx.save_for_backward(u, activated if keep else None, x, weight1, weight2, count)


def _autograd_backward(ctx, dy, _du, _dactivated):
    *saved, count = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients = _backward(dy.contiguous(), *saved, needs, ctx.approximate, count, ctx.backend)
    return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), *[None] * 5


register_autograd("feed_forward", _autograd_backward, _setup_context)
register_backends(
    "feed_forward",
    {"feed_forward_backward": "feed_forward_bwd"},
    cpp=f"{__name__}:feed_forward_backward_cpp",
    in_cpp=float32_or_bfloat16,
)
