// LayerNorm of one row, for the operators that end in it.
#pragma once

#include <cmath>
#include <vector>

#include "simd.h"

namespace roberta_fast {

struct RowStatistics {
  float mean, rstd;
};

// y becomes (z - mean) * rstd * weight + bias of z, whose elements add up to total; the biased variance. y and z may be the same.
template <class Isa, class Element>
ALWAYS_INLINE RowStatistics normalize_row(const float* z, Element* y, float total, int64_t hidden, const float* weight,
                                          const float* bias, double eps) {
  constexpr int W = Isa::WIDTH;
  const float mean = total / hidden;
  Floats<Isa> squares = {};
  int64_t c = 0;
  for (; c + W <= hidden; c += W) {
    const Floats<Isa> centred = load<Floats<Isa>>(z + c) - mean;
    squares += centred * centred;
  }
  float square_sum = sum(squares);
  for (; c < hidden; ++c) square_sum += (z[c] - mean) * (z[c] - mean);
  const float rstd = static_cast<float>(1.0 / std::sqrt(square_sum / static_cast<double>(hidden) + eps));
  for (c = 0; c < hidden; c += W) {
    const int64_t n = hidden - c;
    const Floats<Isa> normalized = (load_first<Floats<Isa>>(z + c, n) - mean) * rstd;
    store_first(y + c, normalized * load_first<Floats<Isa>>(weight + c, n) + load_first<Floats<Isa>>(bias + c, n), n);
  }
  return {mean, rstd};
}

// Where a row's z may lie until its statistics are known: in y itself where y has floats, else in memory of its own.
struct RowBuffer {
  std::vector<float> memory;
  explicit RowBuffer(int64_t hidden) : memory(hidden) {}
  ALWAYS_INLINE float* in(float* y) { return y; }
  template <class Element>
  ALWAYS_INLINE float* in(Element*) {
    return memory.data();
  }
};

}  // namespace roberta_fast
