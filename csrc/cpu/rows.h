// Rows copied into scratch, as they are or transposed (in registers).
#pragma once

#include <cstdint>

#include "simd.h"

namespace roberta_fast {

// Asks for rows ahead of their use: they lie too far apart for the processor to guess the next.
template <class Element>
ALWAYS_INLINE void prefetch_rows(const Element* from, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t LINE = 64 / sizeof(Element);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += LINE) __builtin_prefetch(from + r * stride + c);
}

// Copies rows to rows of whole vectors of floats, zeros behind their own elements.
template <class Isa, class Element>
ALWAYS_INLINE void copy_rows(const Element* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t stride_to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < columns; d += Isa::WIDTH)
      store(to + r * stride_to + d, load_first<Floats<Isa>>(from + r * stride + d, columns - d));
}

// Of each quad of lanes of a and b: a0 b0 a1 b1 where HIGH is 0, a2 b2 a3 b3 where it is 2.
template <int HIGH, class Vector, int... I>
ALWAYS_INLINE Vector interleave(const Vector& a, const Vector& b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + HIGH + I % 2 * N)...);
}
// a0 a1 b0 b1, or a2 a3 b2 b3.
template <int HIGH, class Vector, int... I>
ALWAYS_INLINE Vector interleave_pairs(const Vector& a, const Vector& b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + HIGH + I % 4 / 2 * N)...);
}
// The even quads of a and then of b, or (ODD is 1) the odd ones.
template <int ODD, class Vector, int... I>
ALWAYS_INLINE Vector quads(const Vector& a, const Vector& b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % (N / 2) / 4 * 8 + ODD * 4 + I % 4 + I / (N / 2) * N)...);
}

// Passes of the transposition of WIDTH rows: two make 4 x 4 blocks within quads, the others move the quads.
template <class Isa, int... I>
ALWAYS_INLINE void interleave_rows(Floats<Isa>* rows, std::integer_sequence<int, I...> lanes) {
  const Floats<Isa> next[] = {(I % 2 ? interleave<2>(rows[I - I % 2], rows[I - I % 2 + 1], lanes)
                                     : interleave<0>(rows[I - I % 2], rows[I - I % 2 + 1], lanes))...};
  ((rows[I] = next[I]), ...);
}
template <class Isa, int... I>
ALWAYS_INLINE void interleave_row_pairs(Floats<Isa>* rows, std::integer_sequence<int, I...> lanes) {
  const Floats<Isa> next[] = {
      (I % 2 ? interleave_pairs<2>(rows[I - I % 4 + I % 4 / 2], rows[I - I % 4 + I % 4 / 2 + 2], lanes)
             : interleave_pairs<0>(rows[I - I % 4 + I % 4 / 2], rows[I - I % 4 + I % 4 / 2 + 2], lanes))...};
  ((rows[I] = next[I]), ...);
}
template <class Isa, int DISTANCE, int... I>
ALWAYS_INLINE void exchange_quads(Floats<Isa>* rows, std::integer_sequence<int, I...> lanes) {
  const Floats<Isa> next[] = {(I / DISTANCE % 2 ? quads<1>(rows[I - DISTANCE * (I / DISTANCE % 2)], rows[I], lanes)
                                                : quads<0>(rows[I], rows[I + DISTANCE * (1 - I / DISTANCE % 2)], lanes))...};
  ((rows[I] = next[I]), ...);
}

template <class Isa, bool SCALED, class Element, int... I>
ALWAYS_INLINE void transpose_tile(const Element* from, int64_t stride, int64_t rows, int64_t columns, float factor, float* to,
                                  int64_t stride_to, std::integer_sequence<int, I...> lanes) {
  Floats<Isa> tile[] = {(I < rows ? load_first<Floats<Isa>>(from + I * stride, columns) : Floats<Isa>{})...};
  if constexpr (SCALED) ((tile[I] *= factor), ...);
  interleave_rows<Isa>(tile, lanes);
  interleave_row_pairs<Isa>(tile, lanes);
  if constexpr (Isa::WIDTH >= 8) exchange_quads<Isa, 4>(tile, lanes);
  if constexpr (Isa::WIDTH >= 16) exchange_quads<Isa, 8>(tile, lanes);
  ((I < columns ? store(to + I * stride_to, tile[I]) : void()), ...);
}

// from [rows, columns], times factor if SCALED, as to [columns, rows]; zeros fill the last vector of each row of to.
template <class Isa, bool SCALED = false, class Element>
ALWAYS_INLINE void transpose(const Element* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t stride_to,
                             float factor = 1.0f) {
  constexpr int W = Isa::WIDTH;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W)
      transpose_tile<Isa, SCALED>(from + r * stride + c, stride, rows - r, columns - c, factor, to + c * stride_to + r, stride_to,
                                  std::make_integer_sequence<int, W>());
}

}  // namespace roberta_fast
