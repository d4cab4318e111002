// Products in 8 bits behind each other, by tasks of whole rows: what lies between them never leaves the cache of the thread that
// made it. The bits are those of the products one by one.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
#include "int8_linear.h"
#include "layer_norm.h"

#if ROBERTA_FAST_X86
namespace roberta_fast {
namespace {

constexpr int64_t HIDDEN = 48;  // most rows of a task: at 3,072 columns between the products 576 KiB, for the second cache

// n rows, so far from each other, times a weight, to y by that layout. after: the panel that is wanted next.
void multiply_all(Int8Linear p, const float* x, const Layout& of_x, int64_t n, float* y, const Layout& of_y, float* memory,
                  const int32_t* after) {
  p.x = x, p.of_x = of_x, p.y = y, p.of_y = of_y;
  const Int8Scratch scratch = Int8Scratch::in(memory, p.groups, HIDDEN);
  quantize_int8(p, 0, n, scratch);
  multiply_int8(p, 0, n, 0, p.panels(), scratch, after);
}

// Rows that lie one behind the other, or so far apart.
Layout by_rows(int64_t stride) { return {ROTATED, ROTATED, stride}; }

// Both products of n rows of x. What lies between is wide, and lies by panels: whole rows of 3,072 floats would all fall to the
// same lines of the nearest cache.
void feed_forward_rows(const Int8Linear& first, const Int8Linear& second, const float* x, int64_t stride, int64_t n,
                       float* hidden, float* y, float* memory, const int32_t* after) {
  const Layout by_panels{PANEL, n * PANEL, PANEL};
  multiply_all(first, x, by_rows(stride), n, hidden, by_panels, memory, second.packed);
  multiply_all(second, hidden, by_panels, n, y, by_rows(second.columns), memory, after);
}

// Calls task(begin, end, hidden, memory) for blocks of the rows. hidden: room for a block between the products, or behind them;
// memory: for products of rows of as many groups, and more behind hidden.
template <class Task>
void for_row_blocks(int64_t rows, int64_t groups, int64_t hidden, int64_t more, const Task& task) {
  const int64_t threads = at::get_num_threads(), most = (rows + HIDDEN - 1) / HIDDEN;
  const int64_t blocks = (most + threads - 1) / threads * threads, products = Int8Scratch::floats(groups, HIDDEN);
  for_each_task(blocks, products + hidden + more, [&](int64_t block, float* memory) {
    task(rows * block / blocks, rows * (block + 1) / blocks, memory + products, memory);
  });
}

at::Tensor int8_feed_forward_fwd(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& offset,
                                 const std::optional<at::Tensor>& bias, std::string_view gelu, const at::Tensor& packed_out,
                                 const at::Tensor& scale_out, const at::Tensor& offset_out,
                                 const std::optional<at::Tensor>& bias_out, const std::optional<at::Tensor>& count) {
  check_float(x, "x", 2);
  const int64_t n = x.size(0), real = real_rows(count, n), inner = scale.size(0);
  Int8Weight first(packed, scale, offset, bias, x.size(1), gelu_named(gelu));
  Int8Weight second(packed_out, scale_out, offset_out, bias_out, inner, Activation::none);
  if (real < rows_to_share()) return int8_linear(int8_linear(x, first, real), second, real);
  const at::Tensor rows = with_unit_stride(x), y = at::empty({n, second.params.columns}, x.options());
  const float* const from = rows.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  const int64_t stride = rows.stride(0);
  const Int8Linear& p = first.params;
  Int8Linear& q = second.params;
  q.far = is_far(y);
  for_row_blocks(real, std::max(p.groups, q.groups), HIDDEN * p.panels() * PANEL, 0,
                 [&](int64_t begin, int64_t end, float* hidden, float* memory) {
                   feed_forward_rows(p, q, from + begin * stride, stride, end - begin, hidden, to + begin * q.columns, memory,
                                     p.packed);
                 });
  return y;
}

// Vectors to lines of their own, past the caches.
TARGET_AVX512 void stream(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
  _mm_sfence();
}

// A LayerNorm as normalize_rows takes it, and what it points to.
struct Norm {
  at::Tensor weight, bias;
  AddLayerNorm<float> params{};

  Norm(const at::TensorList norm, double eps, int64_t columns) : weight(norm[0].contiguous()), bias(norm[1].contiguous()) {
    check_float(weight, "a norm's weight", 1);
    check_float(bias, "a norm's bias", 1);
    check_shape(weight, "a norm's weight", {columns});
    check_shape(bias, "a norm's bias", {columns});
    params.weight = weight.const_data_ptr<float>(), params.bias = bias.const_data_ptr<float>();
    params.hidden = columns, params.eps = eps;
  }

  // LayerNorm(y + residual) in place of n rows of y.
  void apply(float* y, const float* residual, int64_t stride, int64_t n) const {
    AddLayerNorm<float> p = params;
    p.x = p.y = y, p.stride_x = p.hidden, p.residual = residual, p.stride_residual = stride;
    add_layer_norm_rows(p, 0, n);
  }
};

}  // namespace

at::Tensor int8_behind_attention(const at::Tensor& context, const at::Tensor& residual, const Int8Weight& output,
                                 const Int8Weight& first, const Int8Weight& second, at::TensorList norms, double attention_eps,
                                 double output_eps) {
  const int64_t n = context.size(0), columns = output.params.columns, wide = context.stride(0), stride = residual.stride(0);
  const Norm behind_attention(norms.slice(0, 2), attention_eps, columns), behind_output(norms.slice(2), output_eps, columns);
  const at::Tensor y = at::empty({n, columns}, residual.options());
  const bool far = is_far(y);
  const float *const from = context.const_data_ptr<float>(), *const added = residual.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  const Int8Linear &o = output.params, &p = first.params, &q = second.params;
  const int64_t between = HIDDEN * std::max(p.panels() * PANEL, columns);
  const int64_t groups = std::max({o.groups, p.groups, q.groups});
  for_row_blocks(n, groups, between, HIDDEN * columns, [&](int64_t begin, int64_t end, float* hidden, float* memory) {
    const int64_t rows = end - begin;
    float* const attended = hidden + between;
    multiply_all(o, from + begin * wide, by_rows(wide), rows, attended, by_rows(columns), memory, p.packed);
    behind_attention.apply(attended, added + begin * stride, stride, rows);
    // What comes out lies where it was between the products: that has been read by then.
    feed_forward_rows(p, q, attended, columns, rows, hidden, hidden, memory, o.packed);
    behind_output.apply(hidden, attended, columns, rows);
    if (far) {
      stream(hidden, to + begin * columns, rows * columns);
    } else {
      std::copy(hidden, hidden + rows * columns, to + begin * columns);
    }
  });
  return y;
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "int8_feed_forward_fwd(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias, str gelu, Tensor packed_out, "
      "Tensor scale_out, Tensor offset_out, Tensor? bias_out=None, Tensor? count=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_feed_forward_fwd)));
}

}  // namespace roberta_fast
#endif
