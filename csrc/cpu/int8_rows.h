// Rows of floats as rows of bytes, rotated by blocks, each with a unit of its own; formulas in roberta_fast/ops/int8_linear.py.
#pragma once

#include "simd.h"

#if ROBERTA_FAST_X86
#include <immintrin.h>

#include <algorithm>

#define TARGET_VNNI __attribute__((target("avx512vnni," ROBERTA_FAST_AVX512)))

namespace roberta_fast {

constexpr int64_t ROTATED = 64;    // terms that are rotated together
constexpr float WHOLE = 0x1.8p23;  // added to a small float, it leaves the nearest integer in the lowest bits
constexpr float LEAST = 0x1p-119;  // rows of smaller values count as zeros: 127 / LEAST is still finite

using Vector = Floats<Avx512>;
using Integers = Ints<Avx512>;

// One pass of the butterfly: lanes whose numbers differ in bit H become their sum and their difference.
template <int H, int... I>
TARGET_VNNI ALWAYS_INLINE Vector sums_and_differences(const Vector& v, std::integer_sequence<int, I...>) {
  const Vector sign = {(I & H ? -1.0f : 1.0f)...};
  return v * sign + __builtin_shufflevector(v, v, (I ^ H)...);
}

TARGET_VNNI ALWAYS_INLINE Vector rotate_vector(const float* x) {
  const auto lanes = std::make_integer_sequence<int, 16>();
  const Vector v = sums_and_differences<2>(sums_and_differences<1>(load<Vector>(x), lanes), lanes);
  return sums_and_differences<8>(sums_and_differences<4>(v, lanes), lanes);
}

// The bits of the larger absolute value of each lane; those of what is infinite or no number are the largest of all.
TARGET_VNNI ALWAYS_INLINE Integers larger(const Integers& most, const Vector& v) {
  const Integers size = bits_as<Integers>(v) & 0x7FFFFFFF;
  return size > most ? size : most;
}

// A block of x times the Hadamard matrix, 8 times as long as x; most: the largest values so far.
TARGET_VNNI ALWAYS_INLINE void rotate_block(const float* x, float* to, Integers& most) {
  const Vector v0 = rotate_vector(x), v1 = rotate_vector(x + 16), v2 = rotate_vector(x + 32), v3 = rotate_vector(x + 48);
  const Vector a = v0 + v1, b = v0 - v1, c = v2 + v3, d = v2 - v3;
  const Vector rotated[] = {a + c, b + d, a - c, b - d};
  for (int i = 0; i < 4; ++i) {
    store(to + 16 * i, rotated[i]);
    most = larger(most, rotated[i]);
  }
}

// The same for the n < ROTATED terms behind the last block, in blocks of the powers of two that make up n; zeros fill a vector.
TARGET_VNNI inline void rotate_rest(const float* x, int64_t n, float* to, Integers& most) {
  for (int64_t i = n; i % 16; ++i) to[i] = 0.0f;
  float* const first = to;
  std::copy(x, x + n, to);
  for (int64_t size = ROTATED / 2; size > 0; size /= 2) {
    if (!(n & size)) continue;
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t i = 0; i < size; ++i)
        if (!(i & half)) {
          const float low = to[i], high = to[i + half];
          to[i] = low + high;
          to[i + half] = low - high;
        }
    const float unit = size >= 16 ? 2.0f : size >= 4 ? 4.0f : 8.0f;  // 8 times the power of two at or above 1 / sqrt(size)
    for (int64_t i = 0; i < size; ++i) to[i] *= unit;
    to += size;
  }
  for (int64_t i = 0; i < n; i += 16) most = larger(most, load<Vector>(first + i));
}

// The nearest integers. (The form without a mask makes GCC 12 warn of its own header.)
TARGET_VNNI ALWAYS_INLINE __m512i nearest(const Vector& v) { return _mm512_maskz_cvtps_epi32(-1, reinterpret_cast<__m512>(v)); }

// 64 floats times a factor, as bytes around 128. Packing takes from its two sources by turns, 16 bytes at a time.
TARGET_VNNI ALWAYS_INLINE Integers bytes_of(const float* x, float factor) {
  const __m512i a = nearest(load<Vector>(x) * factor), b = nearest(load<Vector>(x + 16) * factor);
  const __m512i c = nearest(load<Vector>(x + 32) * factor), d = nearest(load<Vector>(x + 48) * factor);
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const Integers bytes = reinterpret_cast<Integers>(packed) ^ static_cast<int32_t>(0x80808080);
  return __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// A row, rotated, as bytes around 128, the unit of which it returns; not a number where the row holds what no byte can stand for.
// Its blocks of ROTATED terms lie so many floats from each other.
TARGET_VNNI ALWAYS_INLINE float quantize_row(const float* row, int64_t block, int64_t depth, int64_t groups, int32_t* to,
                                             float* x) {
  Integers most = {};
  int64_t k = 0;
  for (; k + ROTATED <= depth; k += ROTATED, row += block) rotate_block(row, x + k, most);
  if (k < depth) rotate_rest(row, depth - k, x + k, most);
  int32_t bits = 0;
  for (int lane = 0; lane < 16; ++lane) bits = std::max(bits, most[lane]);
  const float largest = bits_as<float>(bits);
  const float factor = largest >= 8 * LEAST ? 127.0f / largest : 0.0f;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(to);
  for (k = 0; k + ROTATED <= depth; k += ROTATED) store(bytes + k, bytes_of(x + k, factor));
  for (; k < depth; k += 16) {
    const Vector whole = rounded(load<Vector>(x + k) * factor) + WHOLE;
    const Integers around_128 = bits_as<Integers>(whole) - (bits_as<int32_t>(WHOLE) - 128);
    store_first(bytes + k, __builtin_convertvector(around_128, typename VectorOf<uint8_t, 16>::type), 4 * groups - k);
  }
  return (largest + 0.0f * largest) * 0.125f / 127.0f;
}

}  // namespace roberta_fast
#endif
