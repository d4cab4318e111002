"""y = LayerNorm(residual + dropout(x)) over packed rows.

With z = residual + dropout(x), mean and variance over the last dimension (the biased variance, as in Ba et al. 2016,
"Layer Normalization"): y = (z - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps).
Backward, with g = dy * weight and n = (z - mean) * rstd: dz = rstd * (g - mean(g) - n * mean(g * n)); dx is dz through the
dropout; dweight = sum(dy * n), dbias = sum(dy) over the rows.
"""

import torch

from roberta_fast import dispatch
from roberta_fast.ops import dropout
from roberta_fast.ops.fp8_linear import fp8_quantize_ref, refuse_gradient
from roberta_fast.ops.registration import (
    check_rows,
    define,
    facts_of,
    float32_or_bfloat16,
    real_rows,
    refuse,
    register_autograd,
    register_backends,
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    dropout_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm(residual + dropout(x)), statistics in float32.

    x: [N, C] floating. residual: [N, C] or None; the result has its dtype (x's without one).
    weight, bias: [C] affine parameters. eps: added to the variance.
    dropout_p: probability of dropping an element of x, in [0, 1); seed: int64 [1] on x's device, needed where it is not 0.
    count: int32 [1] on x's device; rows from it on are never read and hold anything in the result. None: all are real.
    dropout_rows: int64 [N], the rows' coordinates in dropout, for rows that were taken from among others; None: 0, 1, 2, ...
    Under autocast the result is float32, as from ``torch.nn.functional.layer_norm``.
    Returns [N, C]. Raises ValueError naming the argument that does not fit.
    """
    _check(x, residual, weight, bias, count)
    if dropout_p != 0.0 and seed is None:
        refuse("seed", seed, f"an int64 [1] tensor where dropout_p={dropout_p}")
    if dropout_rows is not None and (dropout_rows.shape != x.shape[:1] or dropout_rows.dtype != torch.int64):
        refuse("dropout_rows", f"{dropout_rows.dtype} {tuple(dropout_rows.shape)}", f"int64 [N] with N={x.shape[0]}")
    dropout.threshold(dropout_p)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        residual = residual if residual is None else residual.float()
        x = x.float() if residual is None or x.device.type == "cpu" else x
    seed, dropout_rows = (seed, dropout_rows) if dropout_p else (None, None)
    y, _, _ = _forward(x, residual, weight, bias, eps, dropout_p, seed, count, backend, dropout_rows)
    return y


def add_layer_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    inverse: torch.Tensor,
    *,
    count: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y = LayerNorm(residual + x), y · inverse in float8_e4m3fn), the second for products in 8 bits (``fp8_linear``).

    inverse: float32 [C]; the others and errors as in ``add_layer_norm``. Two [N, C], which have no gradient.
    """
    _check(x, residual, weight, bias, count)
    if inverse.shape != (x.shape[1],) or inverse.dtype != torch.float32:
        refuse("inverse", f"{inverse.dtype} {tuple(inverse.shape)}", f"float32 [{x.shape[1]}]")
    return _fp8(x, residual, weight, bias, eps, inverse, count, backend)


def _check(x, residual, weight, bias, count):
    check_rows(x, count)
    if residual is not None and residual.shape != x.shape:
        refuse("residual", f"shape {tuple(residual.shape)}", f"of x's shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != (x.shape[1],):
            refuse(name, f"shape {tuple(parameter.shape)}", f"[C] with C={x.shape[1]}")


def add_layer_norm_ref(x, residual, weight, bias, eps, dropout_p=0.0, seed=None, count=None, dropout_rows=None):
    """The composition in plain PyTorch; returns (y, mean, rstd), the statistics as [N] in float32 (float64 for float64)."""
    z = _pre_norm(x, residual, dropout_p, seed, dropout_rows)
    y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)
    return y.to(x.dtype if residual is None else residual.dtype), mean[:, 0], rstd[:, 0]


def add_layer_norm_fp8_ref(x, residual, weight, bias, eps, inverse, count=None):
    """The composition in plain PyTorch."""
    z = _pre_norm(x, residual, 0.0, None, None)
    y = torch.native_layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)[0]
    return y.to(x.dtype if residual is None else residual.dtype), fp8_quantize_ref(y, inverse)


def add_layer_norm_backward_ref(dy, x, residual, weight, mean, rstd, dropout_p=0.0, seed=None, count=None, dropout_rows=None):
    """Gradients (dz, dx, dweight, dbias); dx is empty where nothing was dropped, as dz then serves for both."""
    dy, x = real_rows(dy, count), real_rows(x, count)
    residual = None if residual is None else real_rows(residual, count)
    mean, rstd = (real_rows(t[:, None], count) for t in (mean, rstd))
    normalized = (_pre_norm(x, residual, dropout_p, seed, dropout_rows) - mean) * rstd
    dy = dy.to(normalized.dtype)
    g = dy * weight.to(normalized.dtype)
    dz = rstd * (g - g.mean(-1, keepdim=True) - normalized * (g * normalized).mean(-1, keepdim=True))
    dx = _drop(dz, dropout_p, seed, dropout_rows).to(x.dtype) if dropout_p else x.new_empty(0)
    dweight, dbias = (dy * normalized).sum(0), dy.sum(0)
    return dz.to(x.dtype if residual is None else residual.dtype), dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _pre_norm(x, residual, dropout_p, seed, dropout_rows):
    """residual + dropout(x), one precision up from half types."""
    z = x if x.dtype == torch.float64 else x.float()
    z = _drop(z, dropout_p, seed, dropout_rows)
    return z if residual is None else z + residual.to(z.dtype)


def _drop(x, dropout_p, seed, dropout_rows):
    if not dropout_p:
        return x
    rows = torch.arange(x.shape[0], device=x.device) if dropout_rows is None else dropout_rows
    return torch.where(dropout.keep_mask(seed, dropout_p, rows, x.shape[1]), x * dropout.scale(dropout_p), 0)


def _forward_implementation(x, residual, weight, bias, eps, dropout_p, seed, count, backend, dropout_rows=None):
    run = dispatch.choose("add_layer_norm", facts_of(x, device_rows=count is not None), backend).run
    return run(x, residual, weight, bias, eps, dropout_p, seed, count, dropout_rows)


def _forward_fake(x, residual, weight, bias, eps, dropout_p, seed, count, backend, dropout_rows=None):
    like = x if residual is None else residual
    statistics = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape, dtype=like.dtype), statistics, torch.empty_like(statistics)


def _backward_implementation(dy, x, residual, weight, mean, rstd, dropout_p, seed, count, backend, dropout_rows=None):
    run = dispatch.choose("add_layer_norm_backward", facts_of(x, device_rows=count is not None), backend).run
    return run(dy, x, residual, weight, mean, rstd, dropout_p, seed, count, dropout_rows)


def _backward_fake(dy, x, residual, weight, mean, rstd, dropout_p, seed, count, backend, dropout_rows=None):
    like = x if residual is None else residual
    dx = x.new_empty(x.shape if dropout_p else (0,))
    return x.new_empty(x.shape, dtype=like.dtype), dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _fp8_implementation(x, residual, weight, bias, eps, inverse, count, backend):
    run = dispatch.choose("add_layer_norm_fp8", facts_of(x, device_rows=count is not None), backend).run
    return run(x, residual, weight, bias, eps, inverse, count)


def _fp8_fake(x, residual, weight, bias, eps, inverse, count, backend):
    like = x if residual is None else residual
    return x.new_empty(x.shape, dtype=like.dtype), x.new_empty(x.shape, dtype=torch.float8_e4m3fn)


_forward = define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout_p, "
    "Tensor? seed, Tensor? count, str backend, Tensor? dropout_rows=None) -> (Tensor, Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    "add_layer_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd, "
    "float dropout_p, Tensor? seed, Tensor? count, str backend, Tensor? dropout_rows=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)

_fp8 = define(
    "add_layer_norm_fp8(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, Tensor inverse, Tensor? count, "
    "str backend) -> (Tensor, Tensor)",
    _fp8_implementation,
    _fp8_fake,
)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, _, ctx.dropout_p, seed, count, ctx.backend, dropout_rows = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, mean, rstd, seed, count, dropout_rows)


def _autograd_backward(ctx, dy, _dmean, _drstd):
    x, residual, weight, mean, rstd, seed, count, dropout_rows = ctx.saved_tensors
    statistics, drops = (mean, rstd), (ctx.dropout_p, seed, count, ctx.backend, dropout_rows)
    dz, dx, dweight, dbias = _backward(dy.contiguous(), x, residual, weight, *statistics, *drops)
    dx = dx if ctx.dropout_p else dz.to(x.dtype)
    return dx, None if residual is None else dz, dweight, dbias, *[None] * 6


register_autograd("add_layer_norm", _autograd_backward, _setup_context)
register_backends("add_layer_norm", in_cpp=float32_or_bfloat16)
register_autograd("add_layer_norm_fp8", refuse_gradient, lambda ctx, inputs, output: None)
register_backends("add_layer_norm", {"add_layer_norm_fp8": "add_layer_norm_fp8"}, backends=("triton", "torch"))
