// A layer from packed rows to packed rows in inference: the operators of the other files, called in turn. From Python the calls
// between them take 0.1 ms a layer and more, which for one short text is a tenth of the time, in 8 bits a fifth. Many rows in
// 8 bits go through all that is behind attention by tasks.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "common.h"
#include "int8_linear.h"

namespace roberta_fast {
namespace {

using Given = std::optional<at::Tensor>;

// A layer's LayerNorms: weight and bias behind attention, then behind feed-forward; and their eps.
struct Norms {
  at::TensorList tensors;
  double eps[2];
};

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const Given& bias, bool deterministic) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const Given&, const Given&, const Given&, bool, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::linear_fwd");
  return op.call(x, weight, bias, std::nullopt, std::nullopt, deterministic, std::nullopt);
}

at::Tensor linear_gelu(const at::Tensor& x, const at::Tensor& weight, const Given& bias, std::string_view gelu,
                       bool deterministic) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const Given&, std::string_view, bool,
                                                       const Given&, bool, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::linear_gelu_fwd");
  return std::get<0>(op.call(x, weight, bias, gelu, false, std::nullopt, deterministic, std::nullopt));
}

// query, key and value [n, heads, d] to [n, heads * d].
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens,
                     const Given& query_only, double scale) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                       const at::Tensor&, int64_t, int64_t, double, bool, const Given&, double,
                                                       const Given&, bool, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::attention_fwd");
  const auto [out, lse] =
      op.call(query, key, value, cu_seqlens, cu_seqlens, 0, 0, scale, false, query_only, 0.0, std::nullopt, false, std::nullopt);
  return out.flatten(1);
}

at::Tensor add_layer_norm(const at::Tensor& x, const at::Tensor& residual, const Norms& norms, int which) {
  using Signature =
      std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const Given&, const at::Tensor&, const at::Tensor&,
                                                     double, double, const Given&, const Given&, const Given&);
  static const auto op = operator_named<Signature>("roberta_fast_cpp::add_layer_norm_fwd");
  return std::get<0>(op.call(x, residual, norms.tensors[2 * which], norms.tensors[2 * which + 1], norms.eps[which], 0.0,
                             std::nullopt, std::nullopt, std::nullopt));
}

// weights and biases: of query, key, value, attention's output, and both products of feed-forward.
at::Tensor layer_fwd(const at::Tensor& x, const at::Tensor& cu_seqlens, const Given& query_only, int64_t heads, double scale,
                     at::TensorList weights, const c10::List<Given>& biases, at::TensorList norms, double attention_eps,
                     double output_eps, std::string_view gelu, bool deterministic) {
  TORCH_CHECK_VALUE(weights.size() == 6 && biases.size() == 6 && norms.size() == 4, "a layer has 6 weights, 6 biases, 4 norms");
  const auto product = [&](const at::Tensor& rows, int i) { return linear(rows, weights[i], biases[i], deterministic); };
  const auto by_heads = [&](const at::Tensor& rows) { return rows.view({rows.size(0), heads, rows.size(1) / heads}); };
  const Norms of_layer{norms, {attention_eps, output_eps}};
  at::Tensor rows =
      attention(by_heads(product(x, 0)), by_heads(product(x, 1)), by_heads(product(x, 2)), cu_seqlens, query_only, scale);
  rows = add_layer_norm(product(rows, 3), x, of_layer, 0);
  return add_layer_norm(product(linear_gelu(rows, weights[4], biases[4], gelu, deterministic), 5), rows, of_layer, 1);
}

#if ROBERTA_FAST_X86
// weights: packed, scale and offset of the joined projections, of attention's output and of both products of feed-forward, whose
// biases follow each other likewise.
at::Tensor int8_layer_fwd(const at::Tensor& x, const at::Tensor& cu_seqlens, const Given& query_only, int64_t heads, double scale,
                          at::TensorList weights, const c10::List<Given>& biases, at::TensorList norms, double attention_eps,
                          double output_eps, std::string_view gelu) {
  TORCH_CHECK_VALUE(weights.size() == 12 && biases.size() == 4 && norms.size() == 4, "a layer has 12 weights, 4 biases, 4 norms");
  check_float(x, "x", 2);
  const auto weight = [&](int i, int64_t depth, Activation activation = Activation::none) {
    return Int8Weight(weights[3 * i], weights[3 * i + 1], weights[3 * i + 2], biases[i], depth, activation);
  };
  const int64_t n = x.size(0);
  const at::Tensor rows = with_unit_stride(x);
  Int8Weight projections = weight(0, x.size(1)), output = weight(1, projections.params.columns / 3);
  Int8Weight first = weight(2, output.params.columns, gelu_named(gelu)), second = weight(3, first.params.columns);
  TORCH_CHECK_VALUE(heads > 0 && projections.params.columns % (3 * heads) == 0, "heads=", heads, " do not divide a third of ",
                    projections.params.columns, " columns");
  TORCH_CHECK_VALUE(output.params.columns == x.size(1) && second.params.columns == x.size(1), "weights must give back rows of ",
                    x.size(1), ", got ", output.params.columns, " and ", second.params.columns);
  const int64_t head_dim = projections.params.columns / 3 / heads;
  const std::vector<Segment> segments = make_segments(cu_seqlens, cu_seqlens, query_only, n, n);
  at::Tensor context;
  if (n >= rows_to_share() && attends_by_tasks(heads, head_dim, segments)) {
    context = int8_attention(rows, projections, segments, heads, static_cast<float>(scale));
  } else {
    const at::Tensor projected = int8_linear(rows, projections, n, 3 * heads);
    const auto part = [&](int64_t i) { return projected.narrow(0, i * heads, heads).transpose(0, 1); };
    context = attention(part(0), part(1), part(2), cu_seqlens, query_only, scale);
  }
  if (n >= rows_to_share()) return int8_behind_attention(context, rows, output, first, second, norms, attention_eps, output_eps);
  const Norms of_layer{norms, {attention_eps, output_eps}};
  const at::Tensor attended = add_layer_norm(int8_linear(context, output, n), rows, of_layer, 0);
  return add_layer_norm(int8_linear(int8_linear(attended, first, n), second, n), attended, of_layer, 1);
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "int8_layer_fwd(Tensor x, Tensor cu_seqlens, Tensor? query_only, int heads, float scale, Tensor[] weights, "
      "Tensor?[] biases, Tensor[] norms, float attention_eps, float output_eps, str gelu) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_layer_fwd)));
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "layer_fwd(Tensor x, Tensor cu_seqlens, Tensor? query_only, int heads, float scale, Tensor[] weights, Tensor?[] biases, "
      "Tensor[] norms, float attention_eps, float output_eps, str gelu, bool deterministic=False) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(layer_fwd)));
}

}  // namespace roberta_fast
