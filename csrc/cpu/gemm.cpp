// Register-blocked products: a tile of c stays in registers while rows of b stream past it.
#include "gemm.h"

#include <algorithm>
#include <utility>

namespace roberta_fast {
namespace {

constexpr int TILE_ROWS = 6;
constexpr int AHEAD = 4;  // rows of b that are asked for early, as those of a large b come from the second cache

// How a lies: in cache by rows or by columns, or by rows that come from memory, through all caches or past the outer ones;
// asking: by rows, where memory is asked for.
enum class Order { rows, transposed, streamed, passing, asking };

// Memory that each row of c asks for so many floats of.
struct Later {
  const float* memory = nullptr;
  int64_t each = 0;
};

// With 32 registers 6 x 4 vectors of c, 4 of b and one broadcast element of a fit; with 16, 6 x 2.
template <class Isa>
constexpr int TILE_VECTORS = Isa::REGISTERS >= 32 ? 4 : 2;

// sum + a * b, a the same in each lane.
template <class Isa>
ALWAYS_INLINE Floats<Isa> add_product(Floats<Isa> sum, const float& a, Floats<Isa> b) {
  return sum + a * b;
}
#if ROBERTA_FAST_X86
// The sum of both products of a pair, in float32; subnormal numbers count as zeros. As instructions, for intrinsics are not
// inlined into templates that name no instruction set.
template <>
ALWAYS_INLINE Floats<Avx512> add_product<Avx512Bf16>(Floats<Avx512> sum, const float& a, Floats<Avx512> b) {
  Floats<Avx512> pair;
  __asm__("vbroadcastss %1, %0" : "=v"(pair) : "m"(a));
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(b));
  return sum;
}
#endif

// Tile I of ROWS * VECTORS is row I / VECTORS, vector I % VECTORS. Unrolled by pack expansion, as the compiler keeps an array
// in registers only where every index is a constant before its loop passes run.
template <class Isa, Order ORDER, int VECTORS, int... I, int... V>
ALWAYS_INLINE void tile(const Product& p, const Later& wanted, int64_t row, int64_t column, std::integer_sequence<int, I...>,
                        std::integer_sequence<int, V...>) {
  using Vector = Floats<Isa>;
  constexpr int W = Isa::WIDTH;
  constexpr bool TRANSPOSED = ORDER == Order::transposed, STREAMED = ORDER == Order::streamed || ORDER == Order::passing;
  const int64_t lda = p.lda, ldb = p.ldb, ldc = p.ldc;
  const float* a = p.a + row * (TRANSPOSED ? 1 : lda);
  const float* b = p.b + column;
  float* c = p.c + row * ldc + column;
  // Streamed, these are the rows of a of the next tile, asked for in the order in which they lie.
  const float* later = ORDER == Order::asking ? wanted.memory + row * wanted.each : p.a + (row + TILE_ROWS) * lda;
  constexpr uint64_t UNIT = ORDER == Order::asking ? 64 : 1;  // parts of a float: each row asks for less than one with each term
  const int64_t height = sizeof...(I) / VECTORS;
  const uint64_t step = ORDER == Order::asking ? UNIT * height * wanted.each / std::max<int64_t>(p.depth, 1) : TILE_ROWS;
  uint64_t asked = 0;
  // Summed in runs of DEPTH terms, so that rounding errors grow with the length of a run and the number of runs, not both.
  for (int64_t done = 0; done < p.depth; done += DEPTH) {
    Vector sums[sizeof...(I)] = {};
    if constexpr (!TRANSPOSED) {  // where the next run begins, which no stream of reads leads to
      const float* next = done + DEPTH < p.depth ? a + DEPTH : p.a + (row + TILE_ROWS) * lda;
      for (int r = 0; r < TILE_ROWS; ++r) __builtin_prefetch(next + r * lda);
    }
    for (int64_t k = std::min<int64_t>(DEPTH, p.depth - done); k > 0; --k) {
      const Vector row_of_b[] = {load<Vector>(b + V * W)...};
      if constexpr (ORDER != Order::asking) (__builtin_prefetch(b + AHEAD * ldb + V * W), ...);
      if constexpr (STREAMED || ORDER == Order::asking)
        __builtin_prefetch(later + (asked += step) / UNIT, 0, ORDER == Order::passing ? 0 : 2);
      ((sums[I] = add_product<Isa>(sums[I], a[I / VECTORS * (TRANSPOSED ? 1 : lda)], row_of_b[I % VECTORS])), ...);
      a += TRANSPOSED ? lda : 1;
      b += ldb;
    }
    if (p.accumulate || done > 0) ((sums[I] += load<Vector>(c + I / VECTORS * ldc + I % VECTORS * W)), ...);
    (store(c + I / VECTORS * ldc + I % VECTORS * W, sums[I]), ...);
  }
}

template <class Isa, Order ORDER, int ROWS, int VECTORS>
ALWAYS_INLINE void tile(const Product& p, const Later& later, int64_t row, int64_t column) {
  tile<Isa, ORDER, VECTORS>(p, later, row, column, std::make_integer_sequence<int, ROWS * VECTORS>(),
                            std::make_integer_sequence<int, VECTORS>());
}

// All rows of VECTORS vectors of columns, in tiles of nearly equal heights.
template <class Isa, Order ORDER, int VECTORS>
ALWAYS_INLINE void stripe(const Product& p, const Later& later, int64_t column) {
  int64_t row = 0;
  for (int64_t tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS; tiles > 0; --tiles) {
    const int64_t height = (p.rows - row + tiles - 1) / tiles;
    switch (height) {
      case 6: tile<Isa, ORDER, 6, VECTORS>(p, later, row, column); break;
      case 5: tile<Isa, ORDER, 5, VECTORS>(p, later, row, column); break;
      case 4: tile<Isa, ORDER, 4, VECTORS>(p, later, row, column); break;
      case 3: tile<Isa, ORDER, 3, VECTORS>(p, later, row, column); break;
      case 2: tile<Isa, ORDER, 2, VECTORS>(p, later, row, column); break;
      default: tile<Isa, ORDER, 1, VECTORS>(p, later, row, column);
    }
    row += height;
  }
}

template <class Isa, Order ORDER>
ALWAYS_INLINE void multiply_all(const Product& p, const Later& later = {}) {
  constexpr int MOST = TILE_VECTORS<Isa>;
  for (int64_t v = 0; v < p.vectors; v += MOST) {
    const int64_t column = v * Isa::WIDTH, wide = std::min<int64_t>(p.vectors - v, MOST);
    if (wide == MOST) {
      stripe<Isa, ORDER, MOST>(p, later, column);
    } else if (wide == 1) {
      stripe<Isa, ORDER, 1>(p, later, column);
    } else if (wide == 2) {
      stripe<Isa, ORDER, std::min(2, MOST)>(p, later, column);
    } else {
      stripe<Isa, ORDER, std::min(3, MOST)>(p, later, column);
    }
  }
}

#if ROBERTA_FAST_X86
// On a Zen 5 lines that passed the second and third cache took 0.92 of the time: there a line leaves the second for the third.
template <class Isa>
ALWAYS_INLINE void multiply_from_memory(const Product& p) {
  static const bool past_caches = __builtin_cpu_is("amd");
  past_caches ? multiply_all<Isa, Order::passing>(p) : multiply_all<Isa, Order::streamed>(p);
}
#endif

}  // namespace

#if ROBERTA_FAST_X86
template <>
TARGET_AVX512 void multiply<Avx512>(const Product& p) {
  multiply_all<Avx512, Order::rows>(p);
}
template <>
TARGET_AVX512 void multiply_streamed<Avx512>(const Product& p) {
  multiply_from_memory<Avx512>(p);
}
template <>
TARGET_AVX512 void multiply_transposed<Avx512>(const Product& p) {
  multiply_all<Avx512, Order::transposed>(p);
}
template <>
TARGET_AVX512 void multiply_asking<Avx512>(const Product& p, const float* later, int64_t each) {
  multiply_all<Avx512, Order::asking>(p, {later, each});
}
template <>
TARGET_AVX512BF16 void multiply<Avx512Bf16>(const Product& p) {
  multiply_all<Avx512Bf16, Order::rows>(p);
}
template <>
TARGET_AVX512BF16 void multiply_streamed<Avx512Bf16>(const Product& p) {
  multiply_from_memory<Avx512Bf16>(p);
}
template <>
TARGET_AVX512BF16 void multiply_asking<Avx512Bf16>(const Product& p, const float* later, int64_t each) {
  multiply_all<Avx512Bf16, Order::asking>(p, {later, each});
}
template <>
TARGET_AVX2 void multiply<Avx2>(const Product& p) {
  multiply_all<Avx2, Order::rows>(p);
}
template <>
TARGET_AVX2 void multiply_streamed<Avx2>(const Product& p) {
  multiply_all<Avx2, Order::streamed>(p);
}
template <>
TARGET_AVX2 void multiply_transposed<Avx2>(const Product& p) {
  multiply_all<Avx2, Order::transposed>(p);
}
template <>
TARGET_AVX2 void multiply_asking<Avx2>(const Product& p, const float* later, int64_t each) {
  multiply_all<Avx2, Order::asking>(p, {later, each});
}
#endif
template <>
void multiply<Baseline>(const Product& p) {
  multiply_all<Baseline, Order::rows>(p);
}
template <>
void multiply_streamed<Baseline>(const Product& p) {
  multiply_all<Baseline, Order::streamed>(p);
}
template <>
void multiply_transposed<Baseline>(const Product& p) {
  multiply_all<Baseline, Order::transposed>(p);
}
template <>
void multiply_asking<Baseline>(const Product& p, const float* later, int64_t each) {
  multiply_all<Baseline, Order::asking>(p, {later, each});
}

}  // namespace roberta_fast
