"""GELU and its derivative, element-wise in registers, for epilogues and element-wise kernels.

With a = |x|, both forms are GELU(x) = max(x, 0) - a d r, and GELU′(x) = v for x < 0, 1 - v for x >= 0, v = d (r - a s), where
- exact: d = exp(-a²/2), r = Φ(-a)/d ≈ t P(t) at t = 1/(1 + p a), s = 1/√(2π);
- tanh form: d = exp(-y), y = 2√(2/π)(a + 0.044715 a³), r = 1/(1 + d), s = r² y′.
Nothing cancels in the negative tail: the error there is P's, relative, until the result underflows, and the derivative shares
the exponential. ``benchmarks/fit_gelu.py`` fits P, one per output type, and compares other forms: for bfloat16 this one takes
12 instructions an element and is within 0.06 units of the last place before the final rounding.
NaN stays NaN; an infinite x gives NaN.
"""

import triton
import triton.language as tl

# The interpreter has no inline assembly. Like here, it is chosen when a kernel is defined.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
HALF_LOG2_E_HIGH = tl.constexpr(0.72119140625)  # its leading 12 bits
HALF_LOG2_E_LOW = tl.constexpr(0.0001561141944816935)
INVERSE_ROOT_2_PI = tl.constexpr(0.3989422804014327)
TANH_SLOPE = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu(x, DTYPE: tl.constexpr, TANH: tl.constexpr):
    """GELU of a float32 tile, accurate enough to be rounded to DTYPE; the tanh form where TANH."""
    decay, ratio, _ = _tail(tl.abs(x), DTYPE, TANH)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - (tl.abs(x) * decay) * ratio


@triton.jit
def gelu_derivative(x, DTYPE: tl.constexpr, TANH: tl.constexpr):
    """GELU′ of a float32 tile, accurate enough to be rounded to DTYPE; of the tanh form where TANH."""
    decay, ratio, slope = _tail(tl.abs(x), DTYPE, TANH)
    v = decay * (ratio - tl.abs(x) * slope)
    return tl.where(x < 0, v, 1 - v)


@triton.jit
def _tail(a, DTYPE: tl.constexpr, TANH: tl.constexpr):
    """(d, r, s) of a >= 0."""
    slope = INVERSE_ROOT_2_PI
    if TANH:
        # Where the square is cut off the decay is zero; uncut, it could be infinite and meet that zero.
        square = tl.minimum(a * a, 1e4)
        decay = tl.exp2(a * (1 + TANH_CUBIC * square) * (-LOG2_E * TANH_SLOPE))
        ratio = _reciprocal(1 + decay)
        slope = ratio * ratio * TANH_SLOPE * (1 + 3 * TANH_CUBIC * square)
    elif DTYPE.is_bf16():
        decay = tl.exp2(a * a * -HALF_LOG2_E)
        t = _reciprocal(1 + 0.3 * a)
        ratio = (((0.208844898 * t + 0.0355874894) * t + 0.137478318) * t + 0.118204361) * t
    elif DTYPE.is_fp16():
        decay = tl.exp2(a * a * -HALF_LOG2_E)
        t = _reciprocal(1 + 0.38 * a)
        ratio = ((((-0.0899282635 * t + 0.188876283) * t + 0.0919798834) * t + 0.15782943) * t + 0.151225141) * t
    else:
        decay = _gauss(a)
        t = _reciprocal(1 + 0.44 * a)
        u = 0.44 * a * t  # 1 - t, without its rounding error
        ratio = (((-0.039208022 * u + 0.146199089) * u - 0.197615637) * u + 0.138522141) * u - 0.0924373449
        ratio = (((ratio * u + 0.0153221578) * u + 0.0402717878) * u + 0.0932411383) * u - 0.0220758874
        ratio = ((ratio * u - 0.406686473) * u + 0.499999998) * t
    return decay, ratio, slope


@triton.jit
def _gauss(a):
    """exp(-a²/2) to a few units in float32's last place, also where the exponent is large: it is carried in two parts."""
    a = tl.minimum(a, 15.0, propagate_nan=tl.PropagateNan.ALL)  # there it is zero
    a_high = _leading_bits(a)
    square = a_high * a_high
    square_high = _leading_bits(square)
    rest = (square - square_high) + (a - a_high) * (a + a_high)
    return tl.exp2(-square_high * HALF_LOG2_E_HIGH) * tl.exp2(-square_high * HALF_LOG2_E_LOW - rest * HALF_LOG2_E)


@triton.jit
def _leading_bits(x):
    """x with its last 12 bits cleared: products of two such numbers are exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(x):
    """1/x to a unit in the last place; Triton's division takes seven instructions more."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
