// The product of rows and weights, with what follows it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace roberta_fast {

enum class Activation { none, gelu_erf, gelu_tanh };

// The GELU that an operation's argument names.
Activation gelu_named(std::string_view approximate);

// What becomes of a product xW before it is stored: act(xW + bias) + residual. Any pointer may be null.
struct Epilogue {
  const float* bias = nullptr;      // [m]
  const float* residual = nullptr;  // [n, m], contiguous
  float* preactivation = nullptr;   // [n, m], contiguous: takes xW + bias
  Activation activation = Activation::none;
};

// y [n, m] = epilogue(x W^T). x [n, k] and weight [m, k] are float32 with rows of unit stride, y is contiguous.
// packed: what prepack made of weight, or none; it is multiplied in place of weight where that is faster.
// deterministic: a row of y has the same bits whatever rows are beside it and on any number of threads.
void multiply_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& packed,
                   const Epilogue& epilogue, bool deterministic, at::Tensor& y);

}  // namespace roberta_fast
