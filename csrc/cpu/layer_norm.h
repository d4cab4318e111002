// LayerNorm of one row, for the operators that end in it.
#pragma once

#include <cmath>
#include <vector>

#include "philox.h"

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

// y = LayerNorm(residual + dropout(x)).
template <class Element>
struct AddLayerNorm {
  const Element* x;
  const Element* residual;  // null where there is none
  const float* weight;
  const float* bias;
  Element* y;
  float* mean;  // null where nobody asks for it and rstd
  float* rstd;
  int64_t stride_x, stride_residual, hidden;
  double eps;
  Dropout dropout;
  const int64_t* dropout_rows;  // the rows' coordinates in dropout, or null where they are 0, 1, 2, ...
};

// Rows [begin, end), by the calling thread. y may lie where x does.
void add_layer_norm_rows(const AddLayerNorm<float>& params, int64_t begin, int64_t end);

}  // namespace roberta_fast
