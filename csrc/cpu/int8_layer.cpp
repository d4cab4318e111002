// A layer in 8 bits, from packed rows to packed rows: the operators of the other files, called in turn. From Python the calls
// between them take 0.1 ms a layer and more, which for one short text is a fifth of the time.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "common.h"

#if ROBERTA_FAST_X86
namespace roberta_fast {
namespace {

using Given = std::optional<at::Tensor>;
using Rows = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor linear(const at::Tensor& x, const at::Tensor* weight, const Given& bias, std::optional<int64_t> heads) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Given&,
                               std::optional<std::string_view>, const Given&, std::optional<int64_t>);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::int8_linear_fwd");
  return op.call(x, weight[0], weight[1], weight[2], bias, std::nullopt, std::nullopt, heads);
}

at::Tensor feed_forward(const at::Tensor& x, const at::Tensor* in, const Given& bias_in, std::string_view gelu,
                        const at::Tensor* out, const Given& bias_out) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Given&, std::string_view,
                 const at::Tensor&, const at::Tensor&, const at::Tensor&, const Given&, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::int8_feed_forward_fwd");
  return op.call(x, in[0], in[1], in[2], bias_in, gelu, out[0], out[1], out[2], bias_out, std::nullopt);
}

at::Tensor attention(const at::Tensor& projections, const at::Tensor& cu_seqlens, const Given& query_only, double scale) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                       const at::Tensor&, int64_t, int64_t, double, bool, const Given&, double,
                                                       const Given&, bool, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::attention_fwd");
  const int64_t heads = projections.size(0) / 3;
  const auto rows = [&](int64_t i) { return projections.narrow(0, i * heads, heads).transpose(0, 1); };
  const auto [out, lse] = op.call(rows(0), rows(1), rows(2), cu_seqlens, cu_seqlens, 0, 0, scale, false, query_only, 0.0,
                                  std::nullopt, false, std::nullopt);
  return out.view({out.size(0), -1});
}

at::Tensor add_layer_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor* norm, double eps) {
  using Signature = Rows(const at::Tensor&, const Given&, const at::Tensor&, const at::Tensor&, double, double, const Given&,
                         const Given&, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::add_layer_norm_fwd");
  return std::get<0>(op.call(x, residual, norm[0], norm[1], eps, 0.0, std::nullopt, std::nullopt, std::nullopt));
}

// weights: packed, scale and offset of the projections, of attention's output and of both products of feed-forward, whose biases
// follow each other likewise. norms: weight and bias of both.
at::Tensor int8_layer_fwd(const at::Tensor& x, const at::Tensor& cu_seqlens, const Given& query_only, int64_t heads, double scale,
                          std::vector<at::Tensor> weights, const c10::List<std::optional<at::Tensor>>& biases,
                          std::vector<at::Tensor> norms, double attention_eps, double output_eps, std::string_view gelu) {
  TORCH_CHECK_VALUE(weights.size() == 12 && biases.size() == 4 && norms.size() == 4, "a layer has 12 weights, 4 biases, 4 norms");
  const at::Tensor projections = linear(x, &weights[0], biases[0], 3 * heads);
  const at::Tensor context = attention(projections, cu_seqlens, query_only, scale);
  const at::Tensor rows = add_layer_norm(linear(context, &weights[3], biases[1], std::nullopt), x, &norms[0], attention_eps);
  const at::Tensor expanded = feed_forward(rows, &weights[6], biases[2], gelu, &weights[9], biases[3]);
  return add_layer_norm(expanded, rows, &norms[2], output_eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "int8_layer_fwd(Tensor x, Tensor cu_seqlens, Tensor? query_only, int heads, float scale, Tensor[] weights, "
      "Tensor?[] biases, Tensor[] norms, float attention_eps, float output_eps, str gelu) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_layer_fwd)));
}

}  // namespace roberta_fast
#endif
