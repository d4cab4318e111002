// y = LayerNorm(residual + dropout(x)) and its gradient; formulas and contract in roberta_fast/ops/add_layer_norm.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common.h"
#include "layer_norm.h"

namespace roberta_fast {
namespace {

struct Backward {
  const float* dy;
  const float* x;
  const float* residual;
  const float* weight;
  const float* mean;
  const float* rstd;
  float* dz;
  float* dx;        // null where nothing was dropped
  float* partials;  // [chunks, 2 * hidden]: each chunk's sums for dweight and dbias
  int64_t stride_dy, stride_x, stride_residual, hidden, rows, chunk_rows;
  Dropout dropout;
  const int64_t* dropout_rows;
};

// The n elements from column c on of residual + dropout(x).
template <class Isa, class Params>
ALWAYS_INLINE Floats<Isa> pre_norm(const Params& p, int64_t row, int64_t c, int64_t n, const uint16_t* draws) {
  Floats<Isa> z = load_first<Floats<Isa>>(p.x + row * p.stride_x + c, n);
  if (p.dropout) z = drop<Isa>(p.dropout, z, draws + c);
  return p.residual ? z + load_first<Floats<Isa>>(p.residual + row * p.stride_residual + c, n) : z;
}

template <class Isa, class Element>
ALWAYS_INLINE void forward_rows(const AddLayerNorm<Element>& p, int64_t begin, int64_t end) {
  constexpr int W = Isa::WIDTH;
  RowBuffer buffer(p.hidden);
  std::vector<uint16_t> draws = draw_buffer<Isa>(p.dropout, p.hidden);
  for (int64_t row = begin; row < end; ++row) {
    draw_row<Isa>(p.dropout, p.dropout_rows ? p.dropout_rows[row] : row, p.hidden, draws);
    Element* y = p.y + row * p.hidden;
    float* row_of_z = buffer.in(y);  // stays in the first-level cache between the passes
    Floats<Isa> total = {};
    for (int64_t c = 0; c < p.hidden; c += W) {
      const Floats<Isa> z = pre_norm<Isa>(p, row, c, p.hidden - c, draws.data());
      store_first(row_of_z + c, z, p.hidden - c);
      total += z;
    }
    const RowStatistics statistics = normalize_row<Isa>(row_of_z, y, sum(total), p.hidden, p.weight, p.bias, p.eps);
    if (p.mean) p.mean[row] = statistics.mean, p.rstd[row] = statistics.rstd;
  }
}
ROBERTA_FAST_KERNEL(forward_rows, AddLayerNorm<float>)
ROBERTA_FAST_KERNEL(forward_rows, AddLayerNorm<at::BFloat16>)

// Chunks of rows: which rows share a chunk depends on their number alone, so the sums do not depend on the threads.
template <class Isa>
ALWAYS_INLINE void backward_chunks(const Backward& p, int64_t begin, int64_t end) {
  constexpr int W = Isa::WIDTH;
  std::vector<uint16_t> draws = draw_buffer<Isa>(p.dropout, p.hidden);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* dweight = p.partials + 2 * chunk * p.hidden;
    float* dbias = dweight + p.hidden;
    for (int64_t row = chunk * p.chunk_rows; row < std::min((chunk + 1) * p.chunk_rows, p.rows); ++row) {
      draw_row<Isa>(p.dropout, p.dropout_rows ? p.dropout_rows[row] : row, p.hidden, draws);
      const float* dy = p.dy + row * p.stride_dy;
      float* dz = p.dz + row * p.hidden;
      const float mean = p.mean[row], rstd = p.rstd[row];
      Floats<Isa> sum_g = {}, sum_gn = {};
      for (int64_t c = 0; c < p.hidden; c += W) {
        const int64_t n = p.hidden - c;
        const Floats<Isa> normalized = (pre_norm<Isa>(p, row, c, n, draws.data()) - mean) * rstd;
        const Floats<Isa> gradient = load_first<Floats<Isa>>(dy + c, n);
        const Floats<Isa> g = rounded(gradient * load_first<Floats<Isa>>(p.weight + c, n));
        sum_g += g;
        sum_gn += g * normalized;
        store_first(dweight + c, load_first<Floats<Isa>>(dweight + c, n) + gradient * normalized, n);
        store_first(dbias + c, load_first<Floats<Isa>>(dbias + c, n) + gradient, n);
        store_first(dz + c, normalized, n);
      }
      const float mean_g = sum(sum_g) / p.hidden, mean_gn = sum(sum_gn) / p.hidden;
      for (int64_t c = 0; c < p.hidden; c += W) {
        const int64_t n = p.hidden - c;
        // Rounded as where mean_g was summed: with a fused product, g - mean_g would not vanish where all g are equal.
        const Floats<Isa> g = rounded(load_first<Floats<Isa>>(dy + c, n) * load_first<Floats<Isa>>(p.weight + c, n));
        const Floats<Isa> d = (g - mean_g - load_first<Floats<Isa>>(dz + c, n) * mean_gn) * rstd;
        store_first(dz + c, d, n);
        if (p.dx) store_first(p.dx + row * p.hidden + c, p.dropout ? drop<Isa>(p.dropout, d, &draws[c]) : d, n);
      }
    }
  }
}
ROBERTA_FAST_KERNEL(backward_chunks, Backward)

// About 32k elements a task: less does not repay waking a thread.
int64_t rows_per_task(int64_t hidden) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, hidden)); }

std::optional<at::Tensor> checked_residual(const std::optional<at::Tensor>& residual, const at::Tensor& x) {
  if (!residual.has_value()) return std::nullopt;
  check_shape(*residual, "residual", x.sizes());
  return as_float(*residual);
}

at::Tensor checked_rows(const std::optional<at::Tensor>& dropout_rows, int64_t n) {
  if (!dropout_rows.has_value()) return {};
  TORCH_CHECK_VALUE(dropout_rows->device().is_cpu() && dropout_rows->scalar_type() == at::kLong,
                    "dropout_rows must be int64 on the CPU, got ", dropout_rows->scalar_type(), " on ", dropout_rows->device());
  check_shape(*dropout_rows, "dropout_rows", {n});
  return dropout_rows->contiguous();
}

// x and residual, of one type, of which y is as well.
template <class Element>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                       const at::Tensor& weight, const at::Tensor& bias, double eps,
                                                       const Dropout& dropout, const at::Tensor& numbers, int64_t real) {
  const int64_t n = x.size(0), hidden = x.size(1);
  const at::Tensor scale = as_float(weight), shift = as_float(bias), y = at::empty({n, hidden}, x.options());
  const at::Tensor mean = at::empty({n}, scale.options()), rstd = at::empty({n}, scale.options());
  const AddLayerNorm<Element> params{x.const_data_ptr<Element>(),
                                     residual ? residual->const_data_ptr<Element>() : nullptr,
                                     scale.const_data_ptr<float>(),
                                     shift.const_data_ptr<float>(),
                                     y.mutable_data_ptr<Element>(),
                                     mean.mutable_data_ptr<float>(),
                                     rstd.mutable_data_ptr<float>(),
                                     x.stride(0),
                                     residual ? residual->stride(0) : 0,
                                     hidden,
                                     eps,
                                     dropout,
                                     numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr};
  at::parallel_for(0, real, rows_per_task(hidden), [&](int64_t begin, int64_t end) { forward_rows_for_cpu(params, begin, end); });
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_layer_norm_fwd(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                                  const at::Tensor& weight, const at::Tensor& bias, double eps,
                                                                  double dropout_p, const std::optional<at::Tensor>& seed,
                                                                  const std::optional<at::Tensor>& count,
                                                                  const std::optional<at::Tensor>& dropout_rows) {
  const bool halves = x.scalar_type() == at::kBFloat16;
  check_same(x, {{&x, "x"}}, 2);
  const int64_t n = x.size(0), hidden = x.size(1), real = real_rows(count, n);
  check_shape(weight, "weight", {hidden});
  check_shape(bias, "bias", {hidden});
  const Dropout dropout = make_dropout(dropout_p, seed);
  const at::Tensor numbers = checked_rows(dropout_rows, n);
  if (halves && (!residual || residual->scalar_type() == at::kBFloat16)) {
    std::optional<at::Tensor> added;
    if (residual) check_shape(*residual, "residual", x.sizes()), added = with_unit_stride(*residual);
    return forward<at::BFloat16>(with_unit_stride(x), added, weight, bias, eps, dropout, numbers, real);
  }
  auto [y, mean, rstd] = forward<float>(as_float(x), checked_residual(residual, x), weight, bias, eps, dropout, numbers, real);
  return {residual ? y.to(residual->scalar_type()) : y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_layer_norm_bwd(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd, double dropout_p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& count, const std::optional<at::Tensor>& dropout_rows) {
  check_same(x, {{&x, "x"}}, 2);
  const int64_t n = x.size(0), hidden = x.size(1);
  check_shape(dy, "dy", x.sizes());
  check_shape(weight, "weight", {hidden});
  check_float(mean, "mean", 1);
  check_float(rstd, "rstd", 1);
  check_shape(mean, "mean", {n});
  check_shape(rstd, "rstd", {n});
  const at::Tensor gradient = as_float(dy), rows = as_float(x), scale = as_float(weight);
  const at::Tensor means = mean.contiguous(), rstds = rstd.contiguous();
  const std::optional<at::Tensor> added = checked_residual(residual, x);
  const at::Tensor numbers = checked_rows(dropout_rows, n);
  const int64_t real = real_rows(count, n);
  const RowChunks chunks(real);
  const at::Tensor dz = at::empty({n, hidden}, rows.options());
  const at::Tensor dx = dropout_p != 0.0 ? at::empty({n, hidden}, rows.options()) : at::empty({0}, rows.options());
  const at::Tensor partials = at::zeros({chunks.number, 2 * hidden}, rows.options());
  const Backward params{gradient.const_data_ptr<float>(),
                        rows.const_data_ptr<float>(),
                        added ? added->const_data_ptr<float>() : nullptr,
                        scale.const_data_ptr<float>(),
                        means.const_data_ptr<float>(),
                        rstds.const_data_ptr<float>(),
                        dz.mutable_data_ptr<float>(),
                        dropout_p != 0.0 ? dx.mutable_data_ptr<float>() : nullptr,
                        partials.mutable_data_ptr<float>(),
                        gradient.stride(0),
                        rows.stride(0),
                        added ? added->stride(0) : 0,
                        hidden,
                        real,
                        chunks.rows,
                        make_dropout(dropout_p, seed),
                        numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr};
  at::parallel_for(0, chunks.number, std::max<int64_t>(1, rows_per_task(hidden) / chunks.rows),
                   [&](int64_t begin, int64_t end) { backward_chunks_for_cpu(params, begin, end); });
  const at::Tensor sums = column_sums(partials).to(weight.scalar_type());
  // Copies: results of an operator may not share memory.
  return {dz.to((residual ? *residual : x).scalar_type()), dx.to(x.scalar_type()), sums.narrow(0, 0, hidden).clone(),
          sums.narrow(0, hidden, hidden).clone()};
}

}  // namespace

void add_layer_norm_rows(const AddLayerNorm<float>& params, int64_t begin, int64_t end) {
  forward_rows_for_cpu(params, begin, end);
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout_p=0.0, "
      "Tensor? seed=None, Tensor? count=None, Tensor? dropout_rows=None) -> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(add_layer_norm_fwd)));
  m.def(
      "add_layer_norm_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd, "
      "float dropout_p=0.0, Tensor? seed=None, Tensor? count=None, Tensor? dropout_rows=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(add_layer_norm_bwd)));
}

}  // namespace roberta_fast
