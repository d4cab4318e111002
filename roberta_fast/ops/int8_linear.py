"""y = act(x Wᵀ + b) by products of 8-bit integers, for inference.

Both factors are symmetric (no zero points). W is quantized beforehand, with a scale for each output channel m; x on the way in,
with a scale for each row n, so that a row's result does not depend on the rows beside it (Dettmers et al. 2022, "LLM.int8()",
section 2.1, "vector-wise quantization"). A few channels of a LayerNorm's output are tens of times as large as the others, which
would leave those with few of the 255 steps; so both factors are rotated first, by an orthogonal R that spreads a channel over the
64 of its block (Ashkboos et al. 2024, "QuaRot"), as x Wᵀ = (x R)(W R)ᵀ:
    u[m] = max|(W R)[m]| / 127, Q[m, k] = round((W R)[m, k] / u[m])
    s[n] = max|(x R)[n]| / 127, q[n, k] = round((x R)[n, k] / s[n]), ties to even
    y[n, m] = act(u[m] s[n] Σₖ q[n, k] Q[m, k] + b[m]), act the identity or GELU.
R is block-diagonal: Hadamard matrices of 64 / 8, and for what is left of K those of the powers of two that make it up.
The sums are exact, in any order and on any number of threads: the same bits in any batch. Rounding moves a factor by at most half
its scale, hence |y - (x Wᵀ + b)| <= s/2 Σₖ|W R| + u/2 Σₖ|x R| + K s u/4 before act.

Packed weights are [panels, groups, 64, 4]: 64 output channels a panel, 4 terms a group, zeros behind both, as the instruction
VPDPBUSD reads them. It multiplies unsigned by signed bytes; q + 128 is unsigned, and ``offset`` is what that adds to a sum.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops.linear_gelu import APPROXIMATIONS
from roberta_fast.ops.registration import check_rows, define, facts_of, refuse, register_autograd, register_backends

PANEL, GROUP, BLOCK = 64, 4, 64
LONGEST_SUM = 2**17  # of 128 times 127: more could leave 32 bits
LEAST = 2.0**-119  # rows of smaller values count as zeros, as 127 / max would come near float32's end
_EXACT_IN_FLOAT32 = 1040  # so many products of 127 by 127 sum to less than 2^24


class Int8Weight(NamedTuple):
    """A quantized weight [M, K]. packed: int8 [panels, groups, 64, 4]; scale: float32 [M], u above; offset: int32 [M], 128 Σₖ Q.

    shape: (M, K).
    """

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    shape: tuple[int, int]

    def integers(self) -> torch.Tensor:
        """Q, int8 [M, K]."""
        return _unpacked(self.packed, self.shape)

    def dequantized(self) -> torch.Tensor:
        """u Q Rᵀ, float32 [M, K]: the weight that products with this one come close to."""
        return rotate(self.integers() * self.scale[:, None])


def quantize_weight(weight: torch.Tensor) -> Int8Weight:
    """A copy of ``weight`` [M, K], floating, in 8 bits. Raises ValueError where a value is not finite or K exceeds 131072."""
    return pack_weight(*quantize_rows(weight))


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q int8 [M, K], u float32 [M]) of ``weight`` [M, K], floating. Raises ValueError where a value is not finite."""
    if weight.dim() != 2 or not weight.is_floating_point():
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", "floating [M, K]")
    integers, scale = _quantized_rows(rotate(weight.detach().float(), inverse=True))
    if not scale.isfinite().all():
        refuse("weight", "infinite or no numbers", "finite")
    return integers.to(torch.int8), scale


def pack_weight(integers: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
    """The weight scale · integers as kernels read it. integers: int8 [M, K]; scale: float32 [M].

    Raises ValueError where a shape or dtype does not fit, an integer is -128, or K exceeds 131072.
    """
    if integers.dim() != 2 or integers.dtype != torch.int8:
        refuse("integers", f"{integers.dtype} {tuple(integers.shape)}", "int8 [M, K]")
    outer, inner = integers.shape
    if scale.shape != (outer,) or scale.dtype != torch.float32:
        refuse("scale", f"{scale.dtype} {tuple(scale.shape)}", f"float32 [{outer}]")
    if inner > LONGEST_SUM:
        refuse("integers", f"{inner} columns", f"of at most {LONGEST_SUM}, whose sums fit 32 bits")
    if (integers == -128).any():
        refuse("integers", -128, "from -127 to 127")
    padded = F.pad(integers, (0, -inner % GROUP, 0, -outer % PANEL))
    panels, groups = padded.shape[0] // PANEL, padded.shape[1] // GROUP
    packed = padded.view(panels, PANEL, groups, GROUP).transpose(1, 2).contiguous()
    return Int8Weight(packed, scale.clone(), 128 * integers.sum(1, dtype=torch.int32), (outer, inner))


def int8_linear(
    x: torch.Tensor,
    weight: Int8Weight,
    bias: torch.Tensor | None = None,
    *,
    gelu: str | None = None,
    heads: int | None = None,
    count: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """act(x @ weightᵀ + bias) by 8-bit products.

    x: [N, K] floating; a row that holds an infinity or no number gives no numbers. weight: from ``quantize_weight``.
    bias: [M] of x's dtype, or None. gelu: None for the identity, ``"none"`` for exact GELU, ``"tanh"`` for that form.
    heads: a divisor of M, where the columns of each head shall lie together, as attention reads them; or None.
    count: int32 [1] on x's device; rows from it on are never read and hold anything in the result. None: all are real.
    A row has the same bits in any batch. Autocast changes nothing. Returns [N, M] of x's dtype, or [heads, N, M / heads], which
    has no gradient: backward raises NotImplementedError. Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, bias, gelu, count)
    if heads is not None and (heads < 1 or weight.shape[0] % heads):
        refuse("heads", heads, f"a divisor of the weight's {weight.shape[0]} rows")
    return _forward(x, *weight[:3], bias, gelu, count, heads, backend)


def int8_feed_forward(
    x: torch.Tensor,
    weight: Int8Weight,
    bias: torch.Tensor | None,
    weight_out: Int8Weight,
    bias_out: torch.Tensor | None,
    *,
    gelu: str,
    count: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """int8_linear(int8_linear(x, weight, bias, gelu=gelu), weight_out, bias_out), the same bits; the middle stays in cache.

    x: [N, K] floating; weight: of [I, K]; weight_out: of [M, I]; bias [I] and bias_out [M] of x's dtype, or None.
    gelu, count, backend, gradients and errors as in ``int8_linear``. Returns [N, M] of x's dtype.
    """
    _check(x, weight, bias, gelu, count)
    if weight_out.shape[1] != weight.shape[0]:
        refuse("weight_out", f"of shape {weight_out.shape}", f"of shape [M, {weight.shape[0]}]")
    _check_operands(x, weight_out, bias_out, "_out")
    if gelu is None:
        refuse("gelu", gelu, f"one of {APPROXIMATIONS}")
    return _feed_forward(x, *weight[:3], bias, gelu, *weight_out[:3], bias_out, count, backend)


def _check(x, weight, bias, gelu, count):
    check_rows(x, count)
    inner = weight.shape[1]
    if x.shape[1] != inner:
        refuse("x", f"{x.shape[1]} columns", f"[N, {inner}], as the weight has {inner}")
    if gelu is not None and gelu not in APPROXIMATIONS:
        refuse("gelu", repr(gelu), f"None or one of {APPROXIMATIONS}")
    _check_operands(x, weight, bias)


def _check_operands(x, weight, bias, suffix=""):
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        refuse(f"bias{suffix}", f"{bias.dtype} {tuple(bias.shape)}", f"{x.dtype} [{weight.shape[0]}]")
    if weight.packed.device != x.device:
        refuse(f"weight{suffix}", weight.packed.device, f"on x's device {x.device}")


def int8_linear_ref(x, packed, scale, offset, bias=None, gelu=None, count=None, heads=None):
    """The composition in plain PyTorch, with the same exact sums: products of small integers in float32, added up in int32."""
    dtype = x.dtype
    x = x if dtype == torch.float64 else x.float()
    integers, row_scale = _quantized_rows(rotate(x))
    weight = _unpacked(packed, (scale.shape[0], x.shape[1])).float()
    sums = torch.zeros(x.shape[0], scale.shape[0], dtype=torch.int32, device=x.device)
    for terms, weights in zip(integers.float().split(_EXACT_IN_FLOAT32, 1), weight.split(_EXACT_IN_FLOAT32, 1), strict=True):
        sums += (terms @ weights.mT).to(torch.int32)
    y = sums.to(x.dtype) * (scale.to(x.dtype) * row_scale[:, None])
    y = y if bias is None else y + bias.to(x.dtype)
    y = (y if gelu is None else F.gelu(y, approximate=gelu)).to(dtype)
    return y if heads is None else y.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()


def int8_feed_forward_ref(x, packed, scale, offset, bias, gelu, packed_out, scale_out, offset_out, bias_out=None, count=None):
    """The composition of two of ``int8_linear_ref``."""
    hidden = int8_linear_ref(x, packed, scale, offset, bias, gelu, count)
    return int8_linear_ref(hidden, packed_out, scale_out, offset_out, bias_out, None, count)


def rotate(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """x R of x [N, K], or x R⁻ᵀ. They are the same but for the factors of blocks whose size is no power of four: those are powers
    of two as well, so that neither rounds."""
    inner = x.shape[1]
    sizes = [BLOCK] * (inner // BLOCK) + [1 << bit for bit in reversed(range(BLOCK.bit_length() - 1)) if inner >> bit & 1]
    rotated = []
    for block in x.split(sizes, 1):
        size, half = block.shape[1], 1
        while half < size:
            low, high = block.reshape(-1, size // (2 * half), 2, half).unbind(2)
            block, half = torch.stack([low + high, low - high], 2).view(block.shape), 2 * half
        bits = size.bit_length() - 1
        rotated.append(block * 2.0 ** -((bits + inverse) // 2))
    return torch.cat(rotated, 1) if rotated else x


def _quantized_rows(x):
    """(integers from -127 to 127 in x's dtype, scale [N]) of the rows of x [N, K]; a row's scale is NaN where a value is not
    finite, as its integers then mean nothing."""
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    factor = torch.where(largest >= LEAST, 127 / largest, 0)
    finite = largest.isfinite()
    integers = torch.where(finite[:, None], (x * factor[:, None]).round(), 0)
    return integers, torch.where(finite, largest / 127, torch.nan)


def _unpacked(packed, shape):
    panels, groups = packed.shape[:2]
    return packed.transpose(1, 2).reshape(panels * PANEL, groups * GROUP)[: shape[0], : shape[1]]


def _run(op, x, *arguments):
    # That only the device may know the number of rows, and that bits must not depend on the batch, is no matter here.
    *operands, backend = arguments
    return dispatch.choose(op, facts_of(x), backend).run(x, *operands)


def _forward_fake(x, packed, scale, offset, bias, gelu, count, heads, backend):
    n, m = x.shape[0], scale.shape[0]
    return x.new_empty(n, m) if heads is None else x.new_empty(heads, n, m // heads)


_forward = define(
    "int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias, str? gelu, Tensor? count, "
    "int? heads, str backend) -> Tensor",
    functools.partial(_run, "int8_linear"),
    _forward_fake,
)


def _feed_forward_fake(x, packed, scale, offset, bias, gelu, packed_out, scale_out, offset_out, bias_out, count, backend):
    return x.new_empty(x.shape[0], scale_out.shape[0])


_feed_forward = define(
    "int8_feed_forward(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias, str gelu, Tensor packed_out, "
    "Tensor scale_out, Tensor offset_out, Tensor? bias_out, Tensor? count, str backend) -> Tensor",
    functools.partial(_run, "int8_feed_forward"),
    _feed_forward_fake,
)


def _autograd_backward(ctx, dy):
    raise NotImplementedError(
        "roberta_fast::int8_linear and int8_feed_forward have no gradient: precision='int8' is for inference; "
        "under train() the model computes in fp32"
    )


def _instruction_missing(facts):
    if not torch.ops.roberta_fast_cpp.int8_linear_is_fast():
        return "this processor, or the instruction set asked for, has no AVX-512 VNNI"
    return None


_KERNELS = {"int8_linear": "int8_linear_fwd", "int8_feed_forward": "int8_feed_forward_fwd"}
for _name in _KERNELS:
    register_autograd(_name, _autograd_backward, lambda ctx, inputs, output: None)
register_backends("int8_linear", _KERNELS, backends=("cpp", "torch"), objection=_instruction_missing)
