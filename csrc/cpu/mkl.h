// Products of MKL with a matrix that was packed beforehand. PyTorch's libraries hold MKL where they were built with it; they
// export its functions and not its headers, so the functions are looked up when first needed.
#pragma once

#include <cstdint>

namespace roberta_fast {

// Whether the products are there.
bool mkl_packs();

// Floats that a packed weight [columns, depth] takes. They must lie on a boundary of 64 bytes and stay where they were packed.
int64_t mkl_packed_floats(int64_t columns, int64_t depth);

void mkl_pack(const float* weight, int64_t stride, int64_t columns, int64_t depth, float* packed);

// y [rows, columns] = x [rows, depth] W^T. x has rows of unit stride, y is contiguous. Threads: those of MKL.
void mkl_multiply_packed(const float* x, int64_t stride, const float* packed, int64_t rows, int64_t columns, int64_t depth,
                         float* y);

}  // namespace roberta_fast
