// Products of small matrices that lie in cache, for the blocks of attention.
#pragma once

#include "simd.h"

namespace roberta_fast {

// Terms that are summed up before they are added to c: as few as MKL's, whose rounding errors are so large.
constexpr int64_t DEPTH = 192;

// c[r][j] (+)= sum over k of a(r, k) * b[k][j], for r < rows, j < vectors * WIDTH, k < depth.
// a(r, k) is a[r * lda + k], or a[k * lda + r] where a is transposed; rows of b and c are whole vectors. For Avx512Bf16, which
// has no transposed a, a(r, k) and b[k][j] are pairs of bfloat16, and their product is the sum of both products.
struct Product {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t rows, vectors, depth;
  bool accumulate;
};

template <class Isa>
void multiply(const Product& p);
// multiply, where the rows of a lie one behind the other in memory, not in cache.
template <class Isa>
void multiply_streamed(const Product& p);
template <class Isa>
void multiply_transposed(const Product& p);
// multiply, which asks meanwhile for the memory that is wanted after it, as a share of what each row of c is to ask for.
template <class Isa>
void multiply_asking(const Product& p, const float* later, int64_t each);

}  // namespace roberta_fast
