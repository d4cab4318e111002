// Linear layers, their gradients, and what is asked about their products; contracts in roberta_fast/ops/linear.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "common.h"
#include "product.h"

namespace roberta_fast {
namespace {

template <class Element>
at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const std::optional<at::Tensor>& residual, int64_t real, bool deterministic,
                   const std::optional<at::Tensor>& packed) {
  const int64_t n = x.size(0), columns = weight.size(0);
  const at::Tensor shift = contiguous_if_given<Element>(bias, "bias", {columns});
  const at::Tensor added = contiguous_if_given<Element>(residual, "residual", {n, columns});
  const at::Tensor y = at::empty({n, columns}, x.options());
  at::Tensor product = y.narrow(0, 0, real);
  const Epilogue<Element> epilogue{.bias = data_or_null<Element>(shift), .residual = data_or_null<Element>(added)};
  multiply_rows<Element>(x.narrow(0, 0, real), weight, packed, epilogue, deterministic, product);
  return y;
}

at::Tensor linear_fwd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& count, bool deterministic,
                      const std::optional<at::Tensor>& packed) {
  check_operands(x, weight);
  const auto run = x.scalar_type() == at::kBFloat16 ? forward<at::BFloat16> : forward<float>;
  return run(x, weight, bias, residual, real_rows(count, x.size(0)), deterministic, packed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                          bool has_bias, const std::optional<at::Tensor>& count) {
  check_same(x, {{&dy, "dy"}, {&x, "x"}, {&weight, "weight"}}, 2);
  const int64_t n = x.size(0), real = real_rows(count, n);
  check_shape(weight, "weight", {weight.size(0), x.size(1)});
  check_shape(dy, "dy", {n, weight.size(0)});
  const at::Tensor gradient = dy.narrow(0, 0, real), dx = at::empty({n, x.size(1)}, x.options());
  multiply_matrices(gradient, weight, dx.narrow(0, 0, real));
  return {dx, multiply_matrices(gradient.t(), x.narrow(0, 0, real)),
          has_bias ? at::sum(gradient, 0) : at::empty({0}, x.options())};
}

at::Tensor prepack_weight(const at::Tensor& weight) {
  check_float(weight, "weight", 2);
  return prepack(weight);
}

}  // namespace

void check_operands(const at::Tensor& x, const at::Tensor& weight) {
  check_same(x, {{&x, "x"}, {&weight, "weight"}}, 2);
  check_shape(weight, "weight", {weight.size(0), x.size(1)});
}

bool outruns_pytorch() {
#if ROBERTA_FAST_X86
  return active_level() == Level::avx512 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool multiplies_bfloat16() {
#if ROBERTA_FAST_X86
  return active_level() == Level::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def("multiplies_bfloat16() -> bool", TORCH_FN(multiplies_bfloat16));
  m.def("outruns_pytorch() -> bool", TORCH_FN(outruns_pytorch));
  m.def("linear_bwd(Tensor dy, Tensor x, Tensor weight, bool has_bias, Tensor? count=None) -> (Tensor, Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_bwd)));
  m.def("prepack(Tensor weight) -> Tensor", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(prepack_weight)));
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? count=None, "
      "bool deterministic=False, Tensor? packed=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_fwd)));
}

}  // namespace roberta_fast
