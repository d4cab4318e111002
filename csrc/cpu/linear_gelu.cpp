// y = GELU(x W^T + b) and its gradient; formulas and contract in roberta_fast/ops/linear_gelu.py.
// Forward is the product of product.h with a GELU behind it. Backward is two more products; derivative and bias gradient are
// one pass over du.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common.h"
#include "product.h"
#include "vmath.h"

namespace roberta_fast {
namespace {

struct Backward {
  const float* dy;
  const float* u;
  float* du;
  float* partials;  // [chunks, columns]: each chunk's sums of du, or null
  int64_t stride_dy, stride_u, columns, rows, chunk_rows;
};

// Which rows share a chunk depends on their number alone, so the bias gradient does not depend on the threads.
template <class Isa, bool TANH>
ALWAYS_INLINE void differentiate(const Backward& p, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk)
    for (int64_t row = chunk * p.chunk_rows; row < std::min((chunk + 1) * p.chunk_rows, p.rows); ++row)
      for (int64_t c = 0; c < p.columns; c += Isa::WIDTH) {
        const int64_t n = p.columns - c;
        const Floats<Isa> u = load_first<Floats<Isa>>(p.u + row * p.stride_u + c, n);
        const Floats<Isa> slope = TANH ? gelu_tanh_derivative<Isa>(u) : gelu_derivative<Isa>(u);
        const Floats<Isa> du = load_first<Floats<Isa>>(p.dy + row * p.stride_dy + c, n) * slope;
        store_first(p.du + row * p.columns + c, du, n);
        if (!p.partials) continue;
        float* sums = p.partials + chunk * p.columns + c;
        store_first(sums, load_first<Floats<Isa>>(sums, n) + du, n);
      }
}

template <class Isa>
ALWAYS_INLINE void differentiate_erf(const Backward& p, int64_t begin, int64_t end) {
  differentiate<Isa, false>(p, begin, end);
}
ROBERTA_FAST_KERNEL(differentiate_erf, Backward)

template <class Isa>
ALWAYS_INLINE void differentiate_tanh(const Backward& p, int64_t begin, int64_t end) {
  differentiate<Isa, true>(p, begin, end);
}
ROBERTA_FAST_KERNEL(differentiate_tanh, Backward)

// About 8k elements a task: at about a nanosecond each, less does not repay waking a thread.
int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns)); }

template <class Element>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                           Activation activation, bool save_preactivation, int64_t real, bool deterministic,
                                           const std::optional<at::Tensor>& packed) {
  const int64_t n = x.size(0), columns = weight.size(0);
  const at::Tensor shift = contiguous_if_given<Element>(bias, "bias", {columns});
  Epilogue<Element> epilogue{.bias = data_or_null<Element>(shift), .activation = activation};
  const at::Tensor y = at::empty({n, columns}, x.options());
  const at::Tensor u = save_preactivation ? at::empty({n, columns}, x.options()) : at::empty({0}, x.options());
  if (save_preactivation) epilogue.preactivation = u.mutable_data_ptr<Element>();
  at::Tensor product = y.narrow(0, 0, real);
  multiply_rows<Element>(x.narrow(0, 0, real), weight, packed, epilogue, deterministic, product);
  return {y, u};
}

std::tuple<at::Tensor, at::Tensor> linear_gelu_fwd(const at::Tensor& x, const at::Tensor& weight,
                                                   const std::optional<at::Tensor>& bias, std::string_view approximate,
                                                   bool save_preactivation, const std::optional<at::Tensor>& count,
                                                   bool deterministic, const std::optional<at::Tensor>& packed) {
  check_operands(x, weight);
  const auto run = x.scalar_type() == at::kBFloat16 ? forward<at::BFloat16> : forward<float>;
  return run(x, weight, bias, gelu_named(approximate), save_preactivation, real_rows(count, x.size(0)), deterministic, packed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gelu_bwd(const at::Tensor& dy, const at::Tensor& u, const at::Tensor& x,
                                                               const at::Tensor& weight, bool has_bias,
                                                               std::string_view approximate,
                                                               const std::optional<at::Tensor>& count) {
  check_same(x, {{&dy, "dy"}, {&u, "u"}, {&x, "x"}, {&weight, "weight"}}, 2);
  const int64_t n = x.size(0), columns = weight.size(0), real = real_rows(count, n);
  check_shape(weight, "weight", {columns, x.size(1)});
  check_shape(dy, "dy", {n, columns});
  check_shape(u, "u", {n, columns});
  const bool tanh = gelu_named(approximate) == Activation::gelu_tanh;
  const at::Tensor gradient = as_float(dy), before = as_float(u);
  const at::Tensor du = at::empty({real, columns}, before.options());
  const RowChunks chunks(real);
  const at::Tensor partials = at::zeros({has_bias ? chunks.number : 0, columns}, before.options());
  const Backward params{gradient.const_data_ptr<float>(),
                        before.const_data_ptr<float>(),
                        du.mutable_data_ptr<float>(),
                        has_bias ? partials.mutable_data_ptr<float>() : nullptr,
                        gradient.stride(0),
                        before.stride(0),
                        columns,
                        real,
                        chunks.rows};
  at::parallel_for(0, chunks.number, std::max<int64_t>(1, rows_per_task(columns) / chunks.rows), [&](int64_t begin, int64_t end) {
    tanh ? differentiate_tanh_for_cpu(params, begin, end) : differentiate_erf_for_cpu(params, begin, end);
  });
  const at::Tensor dx = at::empty({n, x.size(1)}, x.options());
  const at::Tensor factor = du.to(x.scalar_type());
  multiply_matrices(factor, weight, dx.narrow(0, 0, real));
  const at::Tensor dweight = multiply_matrices(factor.t(), x.narrow(0, 0, real));
  return {dx, dweight, has_bias ? column_sums(partials).to(x.scalar_type()) : at::empty({0}, x.options())};
}

}  // namespace

Activation gelu_named(std::string_view approximate) {
  TORCH_CHECK_VALUE(approximate == "none" || approximate == "tanh", "approximate must be 'none' or 'tanh', got '", approximate,
                    "'");
  return approximate == "none" ? Activation::gelu_erf : Activation::gelu_tanh;
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "linear_gelu_fwd(Tensor x, Tensor weight, Tensor? bias=None, str approximate=\"none\", bool save_preactivation=False, "
      "Tensor? count=None, bool deterministic=False, Tensor? packed=None) -> (Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_gelu_fwd)));
  m.def(
      "linear_gelu_bwd(Tensor dy, Tensor u, Tensor x, Tensor weight, bool has_bias, str approximate=\"none\", "
      "Tensor? count=None) -> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_gelu_bwd)));
}

}  // namespace roberta_fast
