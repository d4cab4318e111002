// Dropout as a function of (seed, coordinates): the same bits as roberta_fast/ops/dropout.py, whose docstring defines it.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace roberta_fast {

// threshold: draws below it drop their element. scale: the factor on kept ones.
struct Dropout {
  uint32_t threshold = 0;
  float scale = 1.0f;
  uint32_t key[2] = {0, 0};

  Dropout() = default;
  Dropout(double p, int64_t seed)
      : threshold(static_cast<uint32_t>(std::min(std::nearbyint(p * 65536.0), 65535.0))),
        scale(static_cast<float>(65536.0 / (65536 - threshold))),
        key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)} {}

  explicit operator bool() const { return threshold != 0; }
};

constexpr int DRAWS_PER_CALL = 8;

// Low and high words of the products of a lane's 32-bit word with a constant.
template <class Isa>
ALWAYS_INLINE void multiply_wide(const Words<Isa>& a, uint32_t b, Words<Isa>& low, Words<Isa>& high) {
  using Wide = typename VectorOf<uint64_t, Isa::WIDTH / 2>::type;
  // Even and odd lanes as 64-bit products: what vpmuludq computes.
  const Wide pairs = bits_as<Wide>(a);
  const Wide even = (pairs & 0xFFFFFFFFu) * b;
  const Wide odd = (pairs >> 32) * b;
  const Wide lows = (even & 0xFFFFFFFFu) | (odd << 32);
  const Wide highs = (even >> 32) | (odd & 0xFFFFFFFF00000000u);
  low = bits_as<Words<Isa>>(lows);
  high = bits_as<Words<Isa>>(highs);
}

// Four output words in each lane, for that lane's counter (c0, c1, c2, c3), which they replace.
template <class Isa>
ALWAYS_INLINE void philox(const Dropout& dropout, Words<Isa> c[4]) {
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
  for (int round = 0; round < 10; ++round) {
    Words<Isa> low0, high0, low1, high1;
    multiply_wide<Isa>(c[0], 0xD2511F53u, low0, high0);
    multiply_wide<Isa>(c[2], 0xCD9E8D57u, low1, high1);
    c[0] = high1 ^ c[1] ^ k0;
    c[2] = high0 ^ c[3] ^ k1;
    c[1] = low1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Draws of the 8 * WIDTH columns from first_column (a multiple of 8) on, of one row, in column order.
template <class Isa>
ALWAYS_INLINE void row_draws(const Dropout& dropout, int64_t row, int64_t first_column, uint32_t head, uint32_t segment,
                             uint16_t* draws) {
  Words<Isa> c[4] = {lane_numbers<Words<Isa>>() + static_cast<uint32_t>(first_column / DRAWS_PER_CALL),
                     broadcast<Words<Isa>>(static_cast<uint32_t>(row)), broadcast<Words<Isa>>(head),
                     broadcast<Words<Isa>>(segment)};
  philox<Isa>(dropout, c);
  for (int lane = 0; lane < Isa::WIDTH; ++lane)
    for (int word = 0; word < 4; ++word) {
      draws[lane * DRAWS_PER_CALL + 2 * word] = static_cast<uint16_t>(c[word][lane]);
      draws[lane * DRAWS_PER_CALL + 2 * word + 1] = static_cast<uint16_t>(c[word][lane] >> 16);
    }
}

// x * scale where the draws keep an element, else 0.
template <class Isa>
ALWAYS_INLINE Floats<Isa> drop(const Dropout& dropout, const Floats<Isa>& x, const uint16_t* draws) {
  const auto halves = load<typename VectorOf<uint16_t, Isa::WIDTH>::type>(draws);
  const auto words = __builtin_convertvector(halves, Words<Isa>);
  return words >= dropout.threshold ? x * dropout.scale : Floats<Isa>{};
}

// Draws of a whole row, into a buffer with room for a multiple of 8 * WIDTH.
template <class Isa>
ALWAYS_INLINE void draw_row(const Dropout& dropout, int64_t row, int64_t hidden, std::vector<uint16_t>& draws) {
  if (!dropout) return;
  for (int64_t c = 0; c < hidden; c += DRAWS_PER_CALL * Isa::WIDTH) row_draws<Isa>(dropout, row, c, 0, 0, &draws[c]);
}

template <class Isa>
ALWAYS_INLINE std::vector<uint16_t> draw_buffer(const Dropout& dropout, int64_t hidden) {
  constexpr int64_t STEP = DRAWS_PER_CALL * Isa::WIDTH;
  return std::vector<uint16_t>(dropout ? (hidden + STEP - 1) / STEP * STEP : 0);
}

}  // namespace roberta_fast
