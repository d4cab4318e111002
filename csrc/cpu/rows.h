// Rows copied into scratch, as they are or transposed (in registers, by passes of the perfect shuffle).
#pragma once

#include <cstdint>

#include "simd.h"

namespace roberta_fast {

// Copies rows to rows of whole vectors, zeros behind their own elements.
template <class Isa>
ALWAYS_INLINE void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t stride_to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < columns; d += Isa::WIDTH)
      store(to + r * stride_to + d, load_first<Floats<Isa>>(from + r * stride + d, columns - d));
}

template <class Vector, int... I>
ALWAYS_INLINE Vector low_halves(const Vector& a, const Vector& b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * static_cast<int>(sizeof...(I)))...);
}
template <class Vector, int... I>
ALWAYS_INLINE Vector high_halves(const Vector& a, const Vector& b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(a, b, (N / 2 + I / 2 + I % 2 * N)...);
}

// One pass: row i meets row i + WIDTH / 2. WIDTH = 2^k rows are transposed after k passes.
template <class Isa, int... I>
ALWAYS_INLINE void shuffle_rows(Floats<Isa>* rows, std::integer_sequence<int, I...>) {
  const auto lanes = std::make_integer_sequence<int, Isa::WIDTH>();
  const Floats<Isa> shuffled[] = {(I % 2 ? high_halves(rows[I / 2], rows[I / 2 + Isa::WIDTH / 2], lanes)
                                         : low_halves(rows[I / 2], rows[I / 2 + Isa::WIDTH / 2], lanes))...};
  ((rows[I] = shuffled[I]), ...);
}

template <class Isa, int... I>
ALWAYS_INLINE void transpose_tile(const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, float* to,
                                  int64_t stride_to, std::integer_sequence<int, I...> lanes) {
  Floats<Isa> tile[] = {(I < rows ? load_first<Floats<Isa>>(from + I * stride, columns) * factor : Floats<Isa>{})...};
  shuffle_rows<Isa>(tile, lanes);
  shuffle_rows<Isa>(tile, lanes);
  if constexpr (Isa::WIDTH >= 8) shuffle_rows<Isa>(tile, lanes);
  if constexpr (Isa::WIDTH >= 16) shuffle_rows<Isa>(tile, lanes);
  ((I < columns ? store(to + I * stride_to, tile[I]) : void()), ...);
}

// from [rows, columns], times factor, as to [columns, rows]; zeros fill the last vector of each row of to.
template <class Isa>
ALWAYS_INLINE void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, float* to,
                             int64_t stride_to) {
  constexpr int W = Isa::WIDTH;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W)
      transpose_tile<Isa>(from + r * stride + c, stride, rows - r, columns - c, factor, to + c * stride_to + r, stride_to,
                          std::make_integer_sequence<int, W>());
}

}  // namespace roberta_fast
