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
template <class Element>
struct Epilogue {
  const Element* bias = nullptr;      // [m]
  const Element* residual = nullptr;  // [n, m], contiguous
  Element* preactivation = nullptr;   // [n, m], contiguous: takes xW + bias
  Activation activation = Activation::none;
};

// x [n, k] and weight [m, k] must be both float32, or both bfloat16.
void check_operands(const at::Tensor& x, const at::Tensor& weight);

// y [n, m] = epilogue(x W^T). x [n, k], weight [m, k] and the contiguous y are of Element, float or bfloat16, for which the
// processor must have instructions. Sums are in float32. packed: what prepack made of weight, or none; of floats alone.
// deterministic: a row of y has the same bits whatever rows are beside it and on any number of threads.
template <class Element>
void multiply_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& packed,
                   const Epilogue<Element>& epilogue, bool deterministic, at::Tensor& y);

// A float32 weight [m, k] as multiply_rows reads it fastest: [m / 64 rounded up, k, 64], zeros behind m.
at::Tensor prepack(const at::Tensor& weight);

// True where this product beats PyTorch's at any number of rows. MKL uses AVX-512 on Intel's processors alone: on a Zen 5 it took
// twice the time, copies of transposed operands included.
bool outruns_pytorch();

// Whether there are products of bfloat16: tests may have asked for an older instruction set.
bool multiplies_bfloat16();

// a [n, k] times b [k, m], float32 or bfloat16, by that product where it is faster than PyTorch's: float32 only. into: where it
// goes, contiguous, or nothing for a new tensor.
at::Tensor multiply_matrices(const at::Tensor& a, const at::Tensor& b, at::Tensor into = {});

}  // namespace roberta_fast
