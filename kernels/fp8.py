"""Rounding to float8_e4m3fn: four bits of exponent, three of mantissa, from 2⁻⁹ to 448, no infinity (OCP 8-bit Floating Point
Specification, revision 1.0)."""

import triton
import triton.language as tl

# The interpreter's own conversion loses carries and subnormal numbers. Like here, it is chosen when a kernel is defined.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST = tl.constexpr(448.0)


@triton.jit
def to_e4m3(x):
    """A float32 tile rounded to the nearest, ties to even; what is larger becomes ±448, and NaN stays NaN."""
    x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if not INTERPRETED:
        return x.to(tl.float8e4nv)
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    # Of a normal number, 20 bits of mantissa are rounded away and the exponent's bias falls from 127 to 7; below 2⁻⁶ numbers
    # are multiples of 2⁻⁹, which stand in the last bits of their sum with 1.5 · 2²³.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (tl.abs(x) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(bits < 0x3C800000, subnormal, normal)
    code = tl.where(x != x, 0x7F, code) | tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
