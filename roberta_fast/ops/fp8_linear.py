"""y = act(x Wᵀ + b) by products of 8-bit floating-point numbers, for inference.

Both factors are float8_e4m3fn: three bits of mantissa over fifteen powers of two. Such a number's rounding error is relative, so
a factor's scale matters little as long as nothing exceeds 448, and need not be found in the data: LayerNorm bounds what follows
it. Its normalized vector n has length at most √C, hence for z = γ∘n + β, for u = W z + b, and for an average of several such u,
    |z[c]| <= √C |γ[c]| + |β[c]|,   |u[m]| <= √C ‖W[m]∘γ‖ + |W[m]·β + b[m]|,   |GELU(u)| <= |u|.
With t = bound / 448, for each channel k of an input and each output channel m:
    q[n, k] = e4m3(x[n, k] / t[k]),   s[m] = max|(W∘t)[m]| / 448,   Q[m, k] = e4m3(W[m, k] t[k] / s[m]),
    y[n, m] = act(s[m] Σₖ q[n, k] Q[m, k] + b[m]).
All scales come from parameters alone: nothing is calibrated, no pass looks for a largest value, a row has the same bits in any
batch, and whoever makes x rounds it on the way out. An x beyond its bound, which no LayerNorm makes, is cut off there.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops.linear_gelu import APPROXIMATIONS
from roberta_fast.ops.registration import check_rows, define, facts_of, refuse, register_autograd, register_backends

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
STEP = 16  # what both sizes of a product are multiples of, as the tensor cores' loads want it


class Fp8Weight(NamedTuple):
    """A quantized weight. values: float8_e4m3fn [M, K], Q above; scale: float32 [M], s above."""

    values: torch.Tensor
    scale: torch.Tensor


def layer_norm_bound(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What no element of LayerNorm's result exceeds, float32 [C]. weight, bias: [C], its parameters γ and β."""
    return math.sqrt(weight.shape[0]) * weight.float().abs() + bias.float().abs()


def linear_bound(
    weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> torch.Tensor:
    """What no element of LayerNorm's result times weight [M, C]ᵀ plus bias [M] exceeds, float32 [M].

    norm_weight, norm_bias: [C], the LayerNorm's γ and β.
    """
    weight = weight.float()
    spread = math.sqrt(norm_weight.shape[0]) * (weight * norm_weight.float()).norm(dim=1)
    center = weight @ norm_bias.float()
    return spread + (center if bias is None else center + bias.float()).abs()


def quantize_weight_fp8(weight: torch.Tensor, bound: torch.Tensor) -> Fp8Weight:
    """A copy of ``weight`` [M, K], floating, in 8 bits, for an x [N, K] within ``bound`` float32 [K].

    Raises ValueError where a value is not finite, or M or K is no multiple of 16.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[0] % STEP or weight.shape[1] % STEP:
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", f"floating [M, K], both multiples of {STEP}")
    if bound.shape != weight.shape[1:]:
        refuse("bound", f"shape {tuple(bound.shape)}", f"[{weight.shape[1]}]")
    scaled = weight.detach().float() * (bound / LARGEST)
    if not scaled.isfinite().all():
        refuse("weight", "infinite or no numbers", "finite")
    scale = scaled.abs().amax(1) / LARGEST
    return Fp8Weight(_rounded(scaled / torch.where(scale > 0, scale, 1)[:, None]), scale)


def inverse_of(bound: torch.Tensor) -> torch.Tensor:
    """1/t above: what takes values within ``bound``, float32 [K], to those that 8 bits hold; 0 where nothing but 0 is within."""
    return torch.where(bound > 0, LARGEST / bound, 0)


def fp8_quantize(
    x: torch.Tensor, inverse: torch.Tensor, *, count: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """x · inverse in float8_e4m3fn, to the nearest and within ±448. x: [N, K] floating; inverse: float32 [K].

    count: int32 [1] on x's device; rows from it on are never read and hold anything in the result. None: all are real.
    Returns [N, K], without a gradient. Raises ValueError naming the argument that does not fit.
    """
    check_rows(x, count)
    _check_vector("inverse", inverse, x.shape[1])
    return _quantize(x, inverse, count, backend)


def fp8_linear(
    x: torch.Tensor,
    weight: Fp8Weight,
    bias: torch.Tensor | None = None,
    *,
    gelu: str | None = None,
    inverse: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    count: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """act(scale · (x @ valuesᵀ) + bias) in ``dtype``, or rounded to 8 bits for the next product where ``inverse`` is given.

    x: float8_e4m3fn [N, K]; weight: from ``quantize_weight_fp8``; bias: float32 [M] or None.
    gelu: None for the identity, ``"none"`` for exact GELU, ``"tanh"`` for that form. inverse: float32 [M], as ``fp8_quantize``
    takes it, or None. count: as there. A row has the same bits in any batch. Returns [N, M], which has no gradient: backward
    raises NotImplementedError. Raises ValueError naming the argument that does not fit.
    """
    check_rows(x, count)
    outer, inner = weight.values.shape
    if x.dtype != E4M3 or x.shape[1] != inner:
        refuse("x", f"{x.dtype} {tuple(x.shape)}", f"{E4M3} [N, {inner}], as the weight has {inner}")
    if gelu is not None and gelu not in APPROXIMATIONS:
        refuse("gelu", repr(gelu), f"None or one of {APPROXIMATIONS}")
    for name, vector in (("bias", bias), ("inverse", inverse)):
        if vector is not None:
            _check_vector(name, vector, outer)
    if weight.values.device != x.device:
        refuse("weight", weight.values.device, f"on x's device {x.device}")
    return _forward(x, *weight, bias, gelu, inverse, dtype, count, backend)


def _check_vector(name, vector, length):
    if vector.shape != (length,) or vector.dtype != torch.float32:
        refuse(name, f"{vector.dtype} {tuple(vector.shape)}", f"float32 [{length}]")


def _rounded(x):
    """x in float8_e4m3fn; torch's own conversion gives NaN beyond 448."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def fp8_quantize_ref(x, inverse, count=None):
    """The composition in plain PyTorch."""
    return _rounded(x.float() * inverse)


def fp8_linear_ref(x, values, scale, bias=None, gelu=None, inverse=None, dtype=torch.bfloat16, count=None):
    """The composition in plain PyTorch: products of what the eight bits stand for."""
    up = torch.float64 if dtype == torch.float64 else torch.float32
    y = (x.to(up) @ values.to(up).mT) * scale.to(up)
    y = y if bias is None else y + bias.to(up)
    y = y if gelu is None else F.gelu(y, approximate=gelu)
    return y.to(dtype) if inverse is None else _rounded(y.float() * inverse)


def _run(op, x, *arguments):
    *operands, backend = arguments
    return dispatch.choose(op, facts_of(x), backend).run(x, *operands)


def _quantize_fake(x, inverse, count, backend):
    return x.new_empty(x.shape, dtype=E4M3)


def _forward_fake(x, values, scale, bias, gelu, inverse, dtype, count, backend):
    return x.new_empty(x.shape[0], values.shape[0], dtype=dtype if inverse is None else E4M3)


_quantize = define(
    "fp8_quantize(Tensor x, Tensor inverse, Tensor? count, str backend) -> Tensor",
    functools.partial(_run, "fp8_quantize"),
    _quantize_fake,
)
_forward = define(
    "fp8_linear(Tensor x, Tensor values, Tensor scale, Tensor? bias, str? gelu, Tensor? inverse, ScalarType dtype, "
    "Tensor? count, str backend) -> Tensor",
    functools.partial(_run, "fp8_linear"),
    _forward_fake,
)


def refuse_gradient(ctx, *gradients):
    """The backward pass of what computes in 8-bit floating point."""
    raise NotImplementedError(
        "roberta_fast: products in fp8 have no gradient: precision='fp8' is for inference; "
        "under train() the model computes in its own dtype"
    )


def chip_without(device: torch.device | None = None) -> str | None:
    """The name of a CUDA device, by default the current one, that has no products in fp8, which came with 8.9; else None."""
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} of compute capability {major}.{minor}"
    return name if (major, minor) < (8, 9) else None


def _products_missing(facts):
    chip = chip_without() if facts.device == "cuda" else None
    return chip and f"{chip} has no products in fp8: they need 8.9"


_KERNELS = {"fp8_linear": "fp8_linear_fwd", "fp8_quantize": "fp8_quantize"}
for _name in _KERNELS:
    register_autograd(_name, refuse_gradient, lambda ctx, inputs, output: None)
register_backends("fp8_linear", _KERNELS, backends=("triton", "torch"), objection=_products_missing)
