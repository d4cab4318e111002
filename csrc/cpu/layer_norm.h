// LayerNorm of one row, for the operators that end in it.
#pragma once

#include <cmath>

#include "simd.h"

namespace roberta_fast {

struct RowStatistics {
  float mean, rstd;
};

// y, which holds z and whose elements add up to total, becomes (z - mean) * rstd * weight + bias; the biased variance.
template <class Isa>
ALWAYS_INLINE RowStatistics normalize_row(float* y, float total, int64_t hidden, const float* weight, const float* bias,
                                          double eps) {
  constexpr int W = Isa::WIDTH;
  const float mean = total / hidden;
  Floats<Isa> squares = {};
  int64_t c = 0;
  for (; c + W <= hidden; c += W) {
    const Floats<Isa> centred = load<Floats<Isa>>(y + c) - mean;
    squares += centred * centred;
  }
  float square_sum = sum(squares);
  for (; c < hidden; ++c) square_sum += (y[c] - mean) * (y[c] - mean);
  const float rstd = static_cast<float>(1.0 / std::sqrt(square_sum / static_cast<double>(hidden) + eps));
  for (c = 0; c < hidden; c += W) {
    const int64_t n = hidden - c;
    const Floats<Isa> normalized = (load_first<Floats<Isa>>(y + c, n) - mean) * rstd;
    store_first(y + c, normalized * load_first<Floats<Isa>>(weight + c, n) + load_first<Floats<Isa>>(bias + c, n), n);
  }
  return {mean, rstd};
}

}  // namespace roberta_fast
