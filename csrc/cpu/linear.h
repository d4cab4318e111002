// A product whose rows have the same bits whatever rows are beside them and on any number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace roberta_fast {

// y = x W^T + bias + residual, for y's rows of as many rows of x. x [n, k] and weight [m, k] are float32 with rows of unit stride,
// y [n, m] is contiguous; bias [m] and residual [n, m], contiguous, may be null.
void multiply_rows(const at::Tensor& x, const at::Tensor& weight, const float* bias, const float* residual, at::Tensor& y);

}  // namespace roberta_fast
