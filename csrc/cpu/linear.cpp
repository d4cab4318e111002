// y = x W^T + b (+ residual), row by row; contract in roberta_fast/ops/linear.py.
// PyTorch's product is faster, but the order in which it sums depends on the number of rows and of threads. Here an element of y
// is always the same sum, over k in ascending runs as gemm.h makes them.
#include "linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
#include "gemm.h"
#include "rows.h"

namespace roberta_fast {
namespace {

constexpr int64_t PANEL = 64;   // columns of y that a task computes: four vectors of AVX-512
constexpr int64_t ROWS = 48;    // rows of y, and
constexpr int64_t STEP = 64;    // terms of their sums at a time: 12 KiB of sums, 12 of x and 16 of weights, in the nearest caches
constexpr int64_t CHUNK = 384;  // most rows of a task: so many repay the transposition of its weights, and more leave the cache

struct Linear {
  const float *x, *weight, *bias, *residual;
  float* y;
  int64_t stride_x, stride_weight, rows, columns, depth, panels, chunks;
  float* scratch;
};

template <class Isa>
ALWAYS_INLINE void multiply_panel(const Linear& p, int64_t task, int64_t) {
  using Vector = Floats<Isa>;
  const int64_t chunk = task / p.panels, begin = p.rows * chunk / p.chunks, end = p.rows * (chunk + 1) / p.chunks;
  const int64_t first = task % p.panels * PANEL, columns = std::min(PANEL, p.columns - first);
  float* sums = p.scratch;          // [ROWS, PANEL]
  float* x = sums + ROWS * PANEL;   // [ROWS, STEP], as rows of x lie too far apart for the few ways of a cache
  float* weight = x + ROWS * STEP;  // [depth, PANEL]
  transpose<Isa>(p.weight + first * p.stride_weight, p.stride_weight, columns, p.depth, 1.0f, weight, PANEL);
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t rows = std::min(ROWS, end - row);
    for (int64_t k = 0; k < p.depth; k += STEP) {
      const int64_t terms = std::min(STEP, p.depth - k);
      copy_rows<Isa>(p.x + row * p.stride_x + k, p.stride_x, rows, terms, x, STEP);
      multiply<Isa>({x, STEP, weight + k * PANEL, PANEL, sums, PANEL, rows, vectors<Isa>(columns), terms, k > 0});
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += Isa::WIDTH) {
        const int64_t n = columns - c, offset = (row + r) * p.columns + first + c;
        Vector y = p.depth ? load<Vector>(sums + r * PANEL + c) : Vector{};
        if (p.bias) y += load_first<Vector>(p.bias + first + c, n);
        if (p.residual) y += load_first<Vector>(p.residual + offset, n);
        store_first(p.y + offset, y, n);
      }
  }
}
ROBERTA_FAST_KERNEL(multiply_panel, Linear)

at::Tensor linear_fwd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& count) {
  check_float(x, "x", 2);
  check_float(weight, "weight", 2);
  const int64_t n = x.size(0), columns = weight.size(0), real = real_rows(count, n);
  check_shape(weight, "weight", {columns, x.size(1)});
  at::Tensor shift, added;
  if (bias.has_value()) {
    check_float(*bias, "bias", 1);
    check_shape(*bias, "bias", {columns});
    shift = bias->contiguous();
  }
  if (residual.has_value()) {
    check_float(*residual, "residual", 2);
    check_shape(*residual, "residual", {n, columns});
    added = residual->contiguous();
  }
  const at::Tensor y = at::empty({n, columns}, x.options());
  at::Tensor product = y.narrow(0, 0, real);
  multiply_rows(x.narrow(0, 0, real), weight, shift.defined() ? shift.const_data_ptr<float>() : nullptr,
                added.defined() ? added.const_data_ptr<float>() : nullptr, product);
  return y;
}

}  // namespace

void multiply_rows(const at::Tensor& x, const at::Tensor& weight, const float* bias, const float* residual, at::Tensor& y) {
  const at::Tensor rows = with_unit_stride(x), columns = with_unit_stride(weight);
  const int64_t n = rows.size(0), m = columns.size(0), depth = rows.size(1), panels = (m + PANEL - 1) / PANEL;
  if (n == 0 || m == 0) return;
  // How the rows are divided changes no result.
  const int64_t for_threads = std::min((4 * at::get_num_threads() + panels - 1) / panels, (n + ROWS - 1) / ROWS);
  const int64_t chunks = std::max(for_threads, (n + CHUNK - 1) / CHUNK);
  const Linear params{rows.const_data_ptr<float>(), columns.const_data_ptr<float>(), bias, residual, y.mutable_data_ptr<float>(),
                      rows.stride(0), columns.stride(0), n, m, depth, panels, chunks, nullptr};
  for_each_task(panels * chunks, ROWS * (PANEL + STEP) + depth * PANEL, [&](int64_t task, float* scratch) {
    Linear mine = params;
    mine.scratch = scratch;
    multiply_panel_for_cpu(mine, task, task + 1);
  });
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? count=None) "
      "-> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_fwd)));
}

}  // namespace roberta_fast
