// Vector functions in float32: exp, log, and the two forms of GELU with their derivatives.
//
// Where a sum has two products as terms, rounded() says which is rounded first. Otherwise the compiler may fuse either with the
// addition, differently in each copy of the code that it makes, and a result would depend on where in a row it stands.
#pragma once

#include "simd.h"

// Instructions for which GCC's vector types have no expression are called by GCC's name for them: it is in the function that
// such a call ends up in, not in the template, that GCC wants the instruction set.
#if ROBERTA_FAST_X86 && !defined(__clang__)
#include <immintrin.h>
#define ROBERTA_FAST_GCC_X86 1
#else
#define ROBERTA_FAST_GCC_X86 0
#endif

namespace roberta_fast {

template <class Isa>
ALWAYS_INLINE Floats<Isa> select(const Ints<Isa>& mask, const Floats<Isa>& yes, const Floats<Isa>& no) {
  return mask ? yes : no;
}

template <class Isa>
ALWAYS_INLINE Floats<Isa> absolute(const Floats<Isa>& x) {
  return bits_as<Floats<Isa>>(bits_as<Ints<Isa>>(x) & 0x7FFFFFFF);
}

// b where it is greater than a, and a where either is no number. GCC makes a comparison and a choice of it unless it is told that
// this is what the instruction does.
template <class Isa>
ALWAYS_INLINE Floats<Isa> larger(const Floats<Isa>& a, const Floats<Isa>& b) {
#if ROBERTA_FAST_GCC_X86
  if constexpr (Isa::WIDTH == 16) return __builtin_ia32_maxps512_mask(b, a, a, -1, 4);
#endif
  return b > a ? b : a;
}

// b where it is less than a, and a where either is no number.
template <class Isa>
ALWAYS_INLINE Floats<Isa> smaller(const Floats<Isa>& a, const Floats<Isa>& b) {
#if ROBERTA_FAST_GCC_X86
  if constexpr (Isa::WIDTH == 16) return __builtin_ia32_minps512_mask(b, a, a, -1, 4);
#endif
  return b < a ? b : a;
}

// The leading 12 bits of the significand: products of two such numbers are exact.
template <class Isa>
ALWAYS_INLINE Floats<Isa> leading_bits(const Floats<Isa>& x) {
  return bits_as<Floats<Isa>>(bits_as<Ints<Isa>>(x) & ~0xFFF);
}

// e^x = 2^n (1 + fraction), with n integral and |fraction| < 0.42.
template <class Isa>
struct Exponential {
  Floats<Isa> n, fraction;
};

constexpr float LN2 = 0.693145751953125f, LN2_LOW = 1.42860682e-6f;  // LN2 has 16 bits, so n * LN2 is exact

template <class Isa>
ALWAYS_INLINE Floats<Isa> nearest_power(const Floats<Isa>& x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  return (x * 1.44269504f + ROUND) - ROUND;
}

// e^r - 1 for |r| < 0.347. The polynomial is (e^r - 1 - r) / r^2 by least squares weighted to equal ripple; e^r comes within
// 2^-28 of itself.
template <class Isa>
ALWAYS_INLINE Floats<Isa> exp_fraction(const Floats<Isa>& r) {
  const Floats<Isa> p = (((0.00138144335f * r + 0.00836879667f) * r + 0.0416683964f) * r + 0.166665196f) * r + 0.49999994f;
  return r * r * p + r;
}

// e^(x + low), low a small correction to x.
template <class Isa>
ALWAYS_INLINE Exponential<Isa> exponential(const Floats<Isa>& x, const Floats<Isa>& low) {
  const Floats<Isa> n = nearest_power<Isa>(x + low);
  return {n, exp_fraction<Isa>((x - n * LN2) + (low - n * LN2_LOW))};
}

// x * 2^n for integral n in [-252, 254]; rounds once where the result is subnormal.
template <class Isa>
ALWAYS_INLINE Floats<Isa> scaled(const Floats<Isa>& x, const Floats<Isa>& n) {
#if ROBERTA_FAST_GCC_X86
  if constexpr (Isa::WIDTH == 16) return __builtin_ia32_scalefps512_mask(x, n, x, -1, 4);
#endif
  const Ints<Isa> exponent = __builtin_convertvector(n, Ints<Isa>), half = exponent >> 1;
  return x * bits_as<Floats<Isa>>((half + 127) << 23) * bits_as<Floats<Isa>>((exponent - half + 127) << 23);
}

// e^x for x <= 0, below 1.1 ulp; results below the normal numbers become zero, and NaN stays NaN.
template <class Isa>
ALWAYS_INLINE Floats<Isa> exp_nonpositive(const Floats<Isa>& x) {
  const Floats<Isa> n = nearest_power<Isa>(x), r = (x - n * LN2) - n * LN2_LOW;
#if ROBERTA_FAST_GCC_X86
  if constexpr (Isa::WIDTH == 16) {  // one instruction scales by 2^n and leaves zeros
    constexpr int NOT_LESS = 21, TO_NEAREST = 4;
    const __mmask16 kept = __builtin_ia32_cmpps512_mask(x, Floats<Isa>{} - 87.0f, NOT_LESS, -1, TO_NEAREST);
    return __builtin_ia32_scalefps512_mask(1.0f + exp_fraction<Isa>(r), n, Floats<Isa>{}, kept, TO_NEAREST);
  }
#endif
  const Floats<Isa> power = bits_as<Floats<Isa>>((__builtin_convertvector(n, Ints<Isa>) + 127) << 23);
  return select<Isa>(x < -87.0f, Floats<Isa>{}, power * (1.0f + exp_fraction<Isa>(r)));
}

// log(x) for normal x > 0, below 1 ulp, and NaN for NaN, by the atanh series and coefficients of FreeBSD's msun (e_logf.c).
template <class Isa>
ALWAYS_INLINE Floats<Isa> log_positive(const Floats<Isa>& x) {
  const Ints<Isa> bits = bits_as<Ints<Isa>>(x);
  const Ints<Isa> exponent = (bits - 0x3F3504F3) >> 23;  // puts the significand into [sqrt(1/2), sqrt(2))
  const Floats<Isa> f = bits_as<Floats<Isa>>(bits - (exponent << 23)) - 1.0f;
  const Floats<Isa> s = f / (f + 2.0f), z = s * s, w = z * z;
  const Floats<Isa> r = w * (w * 0.24279078841f + 0.40000972152f) + rounded(z * (w * 0.28498786688f + 0.66666662693f));
  const Floats<Isa> half_square = rounded(0.5f * f * f), k = __builtin_convertvector(exponent, Floats<Isa>);
  const Floats<Isa> logarithm =
      k * 6.9313812256e-01f - ((half_square - (s * (half_square + r) + rounded(k * 9.0580006145e-06f))) - f);
  return select<Isa>(x == x, logarithm, x);
}

// Entry index[i] of a table of 16, in each lane.
template <class Isa>
ALWAYS_INLINE Floats<Isa> look_up(const float* table, const Ints<Isa>& index) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (Isa::WIDTH == 16) return __builtin_shuffle(load<Floats<Isa>>(table), index);
  if constexpr (Isa::WIDTH == 8) return __builtin_shuffle(load<Floats<Isa>>(table), load<Floats<Isa>>(table + Isa::WIDTH), index);
#endif
  Floats<Isa> values;
  for (int i = 0; i < Isa::WIDTH; ++i) values[i] = table[index[i] & 15];
  return values;
}

// G(t) = Phi(-t) e^(t^2 / 2), Phi the normal distribution, on [i, i + 1]: coefficient k of its polynomial in t - i - 1/2 is
// GAUSSIAN_TAIL[k][i]. Least squares weighted to equal ripple in relative error, which is at most 0.03 ulp beyond the first
// interval and 0.48 * 2^-24 on it.
alignas(64) inline constexpr float GAUSSIAN_TAIL[8][16] = {
    {0.349618822f, 0.20578067f, 0.14133133f, 0.106345154f, 0.084803395f, 0.0703426972f, 0.0600156747f, 0.0522930957f,
     0.0463100448f, 0.04154329f, 0.037658859f, 0.0344340578f, 0.0317149274f, 0.0293917321f, 0.0273842253f, 0.0256323908f},
    {-0.224132881f, -0.0902712792f, -0.045613952f, -0.0267342422f, -0.0173270162f, -0.0120574636f, -0.00884039048f,
     -0.00674405182f, -0.00530691398f, -0.00428103982f, -0.00352426386f, -0.00295060663f, -0.00250571081f, -0.00215390348f,
     -0.00187101518f, -0.00164021412f},
    {0.118777484f, 0.0351869799f, 0.013648239f, 0.00638765423f, 0.00341591076f, 0.00201332313f, 0.00127656804f, 0.000856353494f,
     0.000600636122f, 0.000436705974f, 0.000327044138f, 0.000251041289f, 0.000196770416f, 0.000157017843f, 0.000127252933f,
     0.000104535888f},
    {-0.0549145229f, -0.0124969818f, -0.00383112952f, -0.0014591536f, -0.000651806651f, -0.00032806219f, -0.000180899573f,
     -0.000107133579f, -6.71690286e-05f, -4.4110926e-05f, -3.0100151e-05f, -2.12105842e-05f, -1.5360185e-05f, -1.13874939e-05f,
     -8.61585522e-06f, -6.63596666e-06f},
    {0.0228039324f, 0.00410819286f, 0.00101734139f, 0.000320111809f, 0.000120686484f, 5.22431001e-05f, 2.51795555e-05f,
     1.32127007e-05f, 7.42476595e-06f, 4.41301427e-06f, 2.74812419e-06f, 1.77988636e-06f, 1.19202173e-06f, 8.21667754e-07f,
     5.80756534e-07f, 4.19600838e-07f},
    {-0.00869861897f, -0.00126603106f, -0.00025738863f, -6.77170538e-05f, -2.17345405e-05f, -8.14238228e-06f, -3.44559817e-06f,
     -1.60732657e-06f, -8.11563666e-07f, -4.37395471e-07f, -2.48939102e-07f, -1.48362773e-07f, -9.19746412e-08f, -5.89912332e-08f,
     -3.89745587e-08f, -2.64290989e-08f},
    {0.00324443704f, 0.000382221566f, 6.39927894e-05f, 1.41216851e-05f, 3.86922511e-06f, 1.25723273e-06f, 4.67924167e-07f,
     1.94310644e-07f, 8.82468356e-08f, 4.31627356e-08f, 2.24662529e-08f, 1.23272823e-08f, 7.07696346e-09f, 4.22499058e-09f,
     2.61000377e-09f, 1.66152614e-09f},
    {-0.00105747115f, -0.000104770319f, -1.48253121e-05f, -2.79368714e-06f, -6.61663591e-07f, -1.88143062e-07f, -6.19866043e-08f,
     -2.30234729e-08f, -9.43877687e-09f, -4.20118251e-09f, -2.00407846e-09f, -1.01414666e-09f, -5.39898126e-10f, -3.00350633e-10f,
     -1.7363519e-10f, -1.03866638e-10f},
};

// Phi(-t) = 2^n (1 + fraction) (value + low) for 0 <= t <= 15, low being what value was rounded by.
template <class Isa>
struct GaussianTail {
  Floats<Isa> value, low;
  Exponential<Isa> e;
};

template <class Isa>
ALWAYS_INLINE GaussianTail<Isa> gaussian_tail(const Floats<Isa>& t) {
  const Ints<Isa> interval = __builtin_convertvector(t, Ints<Isa>);
  const Floats<Isa> d = t - (__builtin_convertvector(interval, Floats<Isa>) + 0.5f);
  Floats<Isa> p = look_up<Isa>(GAUSSIAN_TAIL[7], interval);
  for (int k = 6; k > 0; --k) p = p * d + look_up<Isa>(GAUSSIAN_TAIL[k], interval);
  const Floats<Isa> first = look_up<Isa>(GAUSSIAN_TAIL[0], interval), rest = rounded(p * d), value = first + rest;
  // The square of the leading bits is exact, so the exponent's rounding, which e^x would magnify, is known.
  const Floats<Isa> t_high = leading_bits<Isa>(t);
  const Floats<Isa> exponent = rounded(-0.5f * (t_high * t_high)), exponent_low = rounded(-0.5f * ((t - t_high) * (t + t_high)));
  return {value, rest - (value - first), exponential<Isa>(exponent, exponent_low)};
}

// GELU(u) = max(u, 0) - |u| Phi(-|u|): no cancellation for u < 0, where Phi = (1 + erf) / 2 loses every digit.
template <class Isa>
ALWAYS_INLINE Floats<Isa> tail_argument(const Floats<Isa>& u, float most) {
  return smaller<Isa>(absolute<Isa>(u), Floats<Isa>{} + most);
}

template <class Isa>
ALWAYS_INLINE Floats<Isa> relu(const Floats<Isa>& u) {
  return larger<Isa>(Floats<Isa>{}, u);
}

// Below 2 ulp for every finite u with fused multiply-add, subnormal results included.
template <class Isa>
ALWAYS_INLINE Floats<Isa> gelu(const Floats<Isa>& u) {
  const Floats<Isa> t = tail_argument<Isa>(u, 15.0f);
  const GaussianTail<Isa> tail = gaussian_tail<Isa>(t);
  const Floats<Isa> product = t * tail.value + rounded(t * (tail.value * tail.e.fraction + tail.low));
  return relu<Isa>(u) - scaled<Isa>(product, tail.e.n);
}

// GELU within 4e-6, or 4e-7 |u| where that is more: for results that are about to lose more than that. Phi(t) - 1/2 is
// t times a polynomial in t^2, taken in s from -1 to 1 and least in max |error * t| on |t| <= 4.75, beyond which Phi is 0 or 1.
template <class Isa>
ALWAYS_INLINE Floats<Isa> gelu_near(const Floats<Isa>& u) {
  constexpr float MOST = 4.75f;
  constexpr float COEFFICIENTS[] = {0.148748294f,   -0.0736675709f,  0.0532352254f, -0.040567629f,
                                    0.0304028094f,  -0.0216528513f,  0.0134072648f, -0.00716244569f,
                                    0.00501159159f, -0.00377497566f, 0.00128338148f};
  const Floats<Isa> t = larger<Isa>(Floats<Isa>{} - MOST, smaller<Isa>(Floats<Isa>{} + MOST, u));
  const Floats<Isa> s = t * (t * (2.0f / (MOST * MOST))) - 1.0f;
  Floats<Isa> p = Floats<Isa>{} + COEFFICIENTS[10];
#pragma GCC unroll 10
  for (int k = 9; k >= 0; --k) p = p * s + COEFFICIENTS[k];
  return u * (t * p + 0.5f);
}

// GELU'(u) = Phi(u) + u phi(u), which for u < 0 is Phi(-|u|) - |u| phi(u), and one less that for -u.
template <class Isa>
ALWAYS_INLINE Floats<Isa> gelu_derivative(const Floats<Isa>& u) {
  const Floats<Isa> t = tail_argument<Isa>(u, 15.0f);
  const GaussianTail<Isa> tail = gaussian_tail<Isa>(t);
  const Floats<Isa> difference = (tail.value - 0.398942280f * t) + tail.low;
  const Floats<Isa> d = scaled<Isa>(difference + difference * tail.e.fraction, tail.e.n);
  return select<Isa>(u >= 0.0f, 1.0f - d, d);
}

// The tanh form is u sigma(y) with y = 2 sqrt(2 / pi) (u + 0.044715 u^3): the tail t sigma(-y(t)) takes the place of t Phi(-t).
// e^(-y), with y carried in two floats.
template <class Isa>
ALWAYS_INLINE Exponential<Isa> tanh_exponential(const Floats<Isa>& t) {
  // y = t (A + B t^2): A rounded and the remainder; B's leading 12 bits and the remainder.
  constexpr float A = 1.59576917f, A_LOW = -4.53406805e-08f;
  constexpr float B = 0.0713500977f, B_LOW = 4.71861631e-06f;
  const Floats<Isa> t_high = leading_bits<Isa>(t), t_low = t - t_high;
  const Floats<Isa> square = rounded(t_high * t_high), square_low = rounded(t_low * (t + t_high));
  const Floats<Isa> square_high = leading_bits<Isa>(square);
  const Floats<Isa> product = B * square_high;
  const Floats<Isa> product_low = B * (square - square_high) + rounded(B_LOW * square + rounded((B + B_LOW) * square_low));
  // Knuth's TwoSum of A and the product.
  const Floats<Isa> factor = product + A, part = factor - A;
  const Floats<Isa> error = (A - (factor - part)) + (product - part);
  const Floats<Isa> factor_high = leading_bits<Isa>(factor);
  const Floats<Isa> factor_low = (factor - factor_high) + (error + (product_low + A_LOW));
  const Floats<Isa> low = t_high * factor_low + rounded(t_low * (factor_high + factor_low));
  return exponential<Isa>(rounded(-(t_high * factor_high)), rounded(-low));
}

template <class Isa>
ALWAYS_INLINE Floats<Isa> gelu_tanh(const Floats<Isa>& u) {
  const Floats<Isa> t = tail_argument<Isa>(u, 11.0f);
  const Exponential<Isa> e = tanh_exponential<Isa>(t);
  const Floats<Isa> complement = 1.0f + scaled<Isa>(1.0f + e.fraction, e.n);
  return relu<Isa>(u) - scaled<Isa>((t + t * e.fraction) / complement, e.n);
}

template <class Isa>
ALWAYS_INLINE Floats<Isa> gelu_tanh_derivative(const Floats<Isa>& u) {
  const Floats<Isa> t = tail_argument<Isa>(u, 11.0f);
  const Exponential<Isa> e = tanh_exponential<Isa>(t);
  const Floats<Isa> power = scaled<Isa>(1.0f + e.fraction, e.n), sigma = 1.0f / (1.0f + power);
  // sigma(-y) = power * sigma; dy/dt = A + 3 B t^2.
  const Floats<Isa> d = power * sigma * (1.0f - t * sigma * (1.59576917f + 0.214064449f * t * t));
  return select<Isa>(u >= 0.0f, 1.0f - d, d);
}

}  // namespace roberta_fast
