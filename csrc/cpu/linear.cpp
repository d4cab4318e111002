// y = x W^T + b (+ residual), and the same with a GELU behind it; contracts in roberta_fast/ops/linear.py and linear_gelu.py.
// Of few rows it is x that is transposed, once, and the weights are read once and as they lie. Of more, a task transposes a panel
// of weights into its cache and passes the rows of x along it. What follows the product happens while the sums are still in the
// nearest cache. An element of y is always the same sum, over k in ascending runs as gemm.h makes them.
// Many rows are left to PyTorch's product, unless their bits must not depend on their number. Weights that were packed beforehand
// lie as panels already: blocks of rows, which stay in the second cache, pass over them.
#include "linear.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <type_traits>

#include "common.h"
#include "gemm.h"
#include "rows.h"
#include "vmath.h"

namespace roberta_fast {
namespace {

constexpr int64_t PANEL = 64;        // columns of y that a task computes: four vectors of AVX-512
constexpr int64_t ROWS = 24;         // rows of y whose sums lie in the nearest cache: 6 KiB
constexpr int64_t STEP = 6 * DEPTH;  // terms of the sums whose weights lie in the second cache: 288 KiB; whole runs of gemm.h
constexpr int64_t CHUNK = 640;       // most rows of a task
// Up to as many rows, and floats of them, weights are read as they lie: of depth 768 (3072) 80 rows took 0.86 (0.96) of the time
// of a transposed panel, 128 0.87 (1.1), 192 0.92 (0.95 to 1.03), 256 0.97 (1.02).
constexpr int64_t FEW_ROWS = 192, FEW_FLOATS = 96 * 3072;
constexpr int64_t FEW_PANEL = 48;  // as PANEL; a multiple of the tiles of gemm.h and of all vectors
// Rows from which on PyTorch's product is faster; on AVX-512 with MKL, 32 rows took 0.6 to 0.85 of its time, 300 rows 0.9.
constexpr int64_t MANY_ROWS = 640;
// Rows of x that pass over packed weights together, about: 480 KiB of a step's terms; and what their number is a multiple of.
constexpr int64_t BLOCK = 120, TILE_ROWS = 6;

// x and weight are floats, or pairs of bfloat16 as the bits of floats: pairs are counted in depth and strides then.
template <class Element>
struct Linear {
  const float *x, *weight;
  Epilogue<Element> epilogue;
  Element* y;
  int64_t stride_x, stride_weight, rows, columns, depth, panels, chunks;
  const float* packed = nullptr;  // [panels, depth, PANEL]
  int64_t chunk_rows = 0;
  float* scratch = nullptr;
  float* transposed_x = nullptr;  // [depth, rows in whole vectors]
};

// The epilogue of rows [first_row, first_row + rows) and columns [first, first + columns), whose sums lie there or in y itself.
template <class Isa, Activation ACTIVATION, class Element>
ALWAYS_INLINE void finish(const Linear<Element>& p, const float* sums, int64_t stride, int64_t first_row, int64_t rows,
                          int64_t first, int64_t columns) {
  using Vector = Floats<Isa>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += Isa::WIDTH) {
      const int64_t n = columns - c, offset = (first_row + r) * p.columns + first + c;
      Vector y = p.depth ? load_first<Vector>(sums + r * stride + c, n) : Vector{};
      if (p.epilogue.bias) y += load_first<Vector>(p.epilogue.bias + first + c, n);
      if (p.epilogue.preactivation) store_first(p.epilogue.preactivation + offset, y, n);
      if constexpr (ACTIVATION == Activation::gelu_erf) y = gelu<Isa>(y);
      if constexpr (ACTIVATION == Activation::gelu_tanh) y = gelu_tanh<Isa>(y);
      if (p.epilogue.residual) y += load_first<Vector>(p.epilogue.residual + offset, n);
      store_first(p.y + offset, y, n);
    }
}

template <class Isa, class Element>
ALWAYS_INLINE void finish(const Linear<Element>& p, const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t first,
                          int64_t columns) {
  switch (p.epilogue.activation) {
    case Activation::none: return finish<Isa, Activation::none>(p, sums, stride, row, rows, first, columns);
    case Activation::gelu_erf: return finish<Isa, Activation::gelu_erf>(p, sums, stride, row, rows, first, columns);
    case Activation::gelu_tanh: return finish<Isa, Activation::gelu_tanh>(p, sums, stride, row, rows, first, columns);
  }
}

template <class Isa>
ALWAYS_INLINE void finish_rows(const Linear<float>& p, int64_t begin, int64_t end) {
  finish<Isa>(p, p.y + begin * p.columns, p.columns, begin, end - begin, 0, p.columns);
}
ROBERTA_FAST_KERNEL(finish_rows, Linear<float>)

template <class Isa, class Element>
ALWAYS_INLINE void multiply_panel(const Linear<Element>& p, int64_t task, int64_t) {
  const int64_t chunk = task / p.panels, begin = p.rows * chunk / p.chunks, end = p.rows * (chunk + 1) / p.chunks;
  const int64_t first = task % p.panels * PANEL, columns = std::min(PANEL, p.columns - first);
  float* weight = p.scratch;                // [STEP, PANEL]
  float* all_sums = weight + STEP * PANEL;  // [CHUNK, PANEL], or [ROWS, PANEL] where one step makes a sum
  for (int64_t k = 0; k < p.depth || k == 0; k += STEP) {
    const int64_t terms = std::min(STEP, p.depth - k);
    const bool last = k + terms == p.depth;
    transpose<Isa>(p.weight + first * p.stride_weight + k, p.stride_weight, columns, terms, weight, PANEL);
    for (int64_t row = begin; row < end; row += ROWS) {
      const int64_t rows = std::min(ROWS, end - row);
      float* sums = all_sums + (last && k == 0 ? 0 : (row - begin) * PANEL);
      if (last) prefetch_rows(p.y + row * p.columns + first, p.columns, rows, columns);  // for finish to write
      const float* x = p.x + row * p.stride_x + k;
      multiply<Isa>({x, p.stride_x, weight, PANEL, sums, PANEL, rows, vectors<Isa>(columns), terms, k > 0});
      if (last) finish<Isa>(p, sums, PANEL, row, rows, first, columns);
    }
  }
}
ROBERTA_FAST_KERNEL(multiply_panel, Linear<float>)
ROBERTA_FAST_BF16_KERNEL(multiply_panel, Linear<at::BFloat16>)

template <class Isa, class Element>
ALWAYS_INLINE void transpose_x(const Linear<Element>& p, int64_t begin, int64_t end) {
  const int64_t stride = vectors<Isa>(p.rows) * Isa::WIDTH;
  transpose<Isa>(p.x + begin, p.stride_x, p.rows, end - begin, p.transposed_x + begin * stride, stride);
}
ROBERTA_FAST_KERNEL(transpose_x, Linear<float>)
ROBERTA_FAST_BF16_KERNEL(transpose_x, Linear<at::BFloat16>)

template <class Isa, class Element>
ALWAYS_INLINE void multiply_few_rows(const Linear<Element>& p, int64_t begin, int64_t end) {
  const int64_t wide = vectors<Isa>(p.rows), stride = wide * Isa::WIDTH;
  float* transposed_sums = p.scratch;                  // [FEW_PANEL, stride]
  float* sums = transposed_sums + FEW_PANEL * stride;  // [rows, FEW_PANEL]
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * FEW_PANEL, columns = std::min(FEW_PANEL, p.columns - first);
    const float* weight = p.weight + first * p.stride_weight;
    multiply_streamed<Isa>(
        {weight, p.stride_weight, p.transposed_x, stride, transposed_sums, stride, columns, wide, p.depth, false});
    transpose<Isa>(transposed_sums, stride, columns, p.rows, sums, FEW_PANEL);
    finish<Isa>(p, sums, FEW_PANEL, 0, p.rows, first, columns);
  }
}
ROBERTA_FAST_KERNEL(multiply_few_rows, Linear<float>)
ROBERTA_FAST_BF16_KERNEL(multiply_few_rows, Linear<at::BFloat16>)

// A share of the panels, for a block of rows. Where steps make a sum, it grows in y, or in scratch where y has no whole panel.
template <class Isa>
ALWAYS_INLINE void multiply_packed(const Linear<float>& p, int64_t task, int64_t shares) {
  const int64_t begin = task / shares * p.chunk_rows, end = std::min(begin + p.chunk_rows, p.rows);
  const int64_t share = task % shares, first_panel = p.panels * share / shares, last_panel = p.panels * (share + 1) / shares;
  for (int64_t k = 0; k < p.depth || k == 0; k += STEP)
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t first = panel * PANEL, columns = std::min(PANEL, p.columns - first), terms = std::min(STEP, p.depth - k);
      const bool last = k + terms == p.depth, whole = last && k == 0;
      const float* weight = p.packed + first * p.depth + k * PANEL;
      const float* next =
          panel + 1 < last_panel ? weight + p.depth * PANEL : p.packed + first_panel * PANEL * p.depth + (k + terms) * PANEL;
      const int64_t each = terms * PANEL / (end - begin);
      for (int64_t row = begin; row < end; row += ROWS) {
        const int64_t rows = std::min(ROWS, end - row);
        const bool in_y = !whole && columns == PANEL;
        float* sums = in_y ? p.y + row * p.columns + first : p.scratch + (whole ? 0 : (row - begin) * PANEL);
        const int64_t stride = in_y ? p.columns : PANEL;
        if (last) prefetch_rows(p.y + row * p.columns + first, p.columns, rows, columns);  // for finish to write
        multiply_asking<Isa>(
            {p.x + row * p.stride_x + k, p.stride_x, weight, PANEL, sums, stride, rows, PANEL / Isa::WIDTH, terms, k > 0},
            next + (row - begin) * each, each);
        if (last) finish<Isa>(p, sums, stride, row, rows, first, columns);
      }
    }
}
// A kernel's range is (task, shares) here.
ROBERTA_FAST_KERNEL(multiply_packed, Linear<float>)

template <class Isa>
ALWAYS_INLINE void pack_panel(const Linear<float>& p, int64_t panel, int64_t) {
  const int64_t first = panel * PANEL;
  transpose<Isa>(p.weight + first * p.stride_weight, p.stride_weight, std::min(PANEL, p.columns - first), p.depth,
                 p.y + first * p.depth, PANEL);
}
ROBERTA_FAST_KERNEL(pack_panel, Linear<float>)

// weight [M, K] as panels [panels, K, PANEL], zeros behind M.
at::Tensor prepack(const at::Tensor& weight) {
  check_float(weight, "weight", 2);
  const at::Tensor columns = with_unit_stride(weight);
  const int64_t m = columns.size(0), depth = columns.size(1), panels = (m + PANEL - 1) / PANEL;
  const at::Tensor packed = at::zeros({panels, depth, PANEL}, weight.options());
  Linear<float> params{};
  params.weight = columns.const_data_ptr<float>(), params.stride_weight = columns.stride(0);
  params.y = packed.mutable_data_ptr<float>(), params.columns = m, params.depth = depth;
  for_each_task(panels, 0, [&](int64_t panel, float*) { pack_panel_for_cpu(params, panel, panel + 1); });
  return packed;
}

// The product by packed weights [panels, depth, PANEL].
void multiply_packed_rows(const Linear<float>& params, const at::Tensor& packed) {
  Linear<float> whole = params;
  whole.packed = packed.const_data_ptr<float>();
  const int64_t n = params.rows, about = std::max<int64_t>(1, (n + BLOCK / 2) / BLOCK);
  whole.chunk_rows = ((n + about - 1) / about + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  const int64_t blocks = (n + whole.chunk_rows - 1) / whole.chunk_rows;
  const int64_t shares = std::min((4 * at::get_num_threads() + blocks - 1) / blocks, params.panels);
  for_each_task(blocks * shares, std::max(whole.chunk_rows, ROWS) * PANEL, [&](int64_t task, float* scratch) {
    Linear<float> mine = whole;
    mine.scratch = scratch;
    multiply_packed_for_cpu(mine, task, shares);
  });
}

// The product of few rows, which are transposed first.
template <class Element>
void multiply_by_transposed_x(const Linear<Element>& params) {
  constexpr int64_t WIDEST = Avx512::WIDTH, LINES = 64;
  const int64_t n = params.rows, depth = params.depth, stride = (n + WIDEST - 1) / WIDEST * WIDEST;
  const at::Tensor transposed = at::empty({depth, stride}, at::kFloat);
  Linear<Element> whole = params;
  whole.transposed_x = transposed.mutable_data_ptr<float>();
  at::parallel_for(0, (depth + LINES - 1) / LINES, 1 + 8192 / (LINES * n),
                   [&](int64_t begin, int64_t end) { transpose_x_for_cpu(whole, begin * LINES, std::min(end * LINES, depth)); });
  // Of panels that follow each other, so that what a thread asks for early is its own: 0.85 of the time of panels in turn.
  const int64_t panels = (params.columns + FEW_PANEL - 1) / FEW_PANEL;
  const int64_t shares = std::min<int64_t>(2 * at::get_num_threads(), panels);
  for_each_task(shares, FEW_PANEL * (stride + n), [&](int64_t share, float* scratch) {
    Linear<Element> mine = whole;
    mine.scratch = scratch;
    multiply_few_rows_for_cpu(mine, panels * share / shares, panels * (share + 1) / shares);
  });
}

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

// True where this product beats PyTorch's at any number of rows. MKL uses AVX-512 on Intel's processors alone: on a Zen 5 it took
// twice the time, copies of transposed operands included.
bool outruns_pytorch() {
#if ROBERTA_FAST_X86
  return active_level() == Level::avx512 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool leave_to_pytorch(int64_t rows) { return active_level() != Level::avx512 || (rows > MANY_ROWS && !outruns_pytorch()); }

// Whether there are products of bfloat16: tests may have asked for an older instruction set.
bool multiplies_bfloat16() {
#if ROBERTA_FAST_X86
  return active_level() == Level::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Rows with unit stride, and where each begins and what their length is, in floats: rows of bfloat16 are cut into pairs.
struct Rows {
  at::Tensor tensor;
  const float* data;
  int64_t stride, depth;

  template <class Element>
  static Rows of(const at::Tensor& t) {
    constexpr int64_t EACH = sizeof(float) / sizeof(Element);
    at::Tensor rows = with_unit_stride(t);
    if (rows.size(1) % EACH) {
      rows = at::constant_pad_nd(rows, {0, 1});
    } else if (rows.stride(0) % EACH) {
      rows = rows.contiguous();
    }
    const auto* data = reinterpret_cast<const float*>(rows.const_data_ptr<Element>());
    return {rows, data, rows.stride(0) / EACH, rows.size(1) / EACH};
  }
};

}  // namespace

Activation gelu_named(std::string_view approximate) {
  TORCH_CHECK_VALUE(approximate == "none" || approximate == "tanh", "approximate must be 'none' or 'tanh', got '", approximate,
                    "'");
  return approximate == "none" ? Activation::gelu_erf : Activation::gelu_tanh;
}

void check_operands(const at::Tensor& x, const at::Tensor& weight) {
  check_same(x, {{&x, "x"}, {&weight, "weight"}}, 2);
  check_shape(weight, "weight", {weight.size(0), x.size(1)});
}

template <class Element>
void multiply_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& packed,
                   const Epilogue<Element>& epilogue, bool deterministic, at::Tensor& y) {
  constexpr bool FLOATS = std::is_same_v<Element, float>;
  TORCH_CHECK_NOT_IMPLEMENTED(FLOATS || multiplies_bfloat16(), "this processor has no AVX-512 BF16");
  const Rows rows = Rows::of<Element>(x), columns = Rows::of<Element>(weight);
  const int64_t n = x.size(0), m = weight.size(0), depth = rows.depth, panels = (m + PANEL - 1) / PANEL;
  if (n == 0 || m == 0) return;
  // A panel is transposed by each of its tasks, so there are no more than keep the threads busy. How many changes no result.
  const int64_t for_threads = std::min((4 * at::get_num_threads() + panels - 1) / panels, (n + ROWS - 1) / ROWS);
  const int64_t chunks = std::max(for_threads, (n + CHUNK - 1) / CHUNK);
  const Linear<Element> params{
      rows.data, columns.data, epilogue, y.mutable_data_ptr<Element>(), rows.stride, columns.stride, n, m, depth, panels, chunks};
  const bool few = n <= FEW_ROWS && n * depth <= FEW_FLOATS;
  if constexpr (FLOATS) {
    // On a Zen 5 packed weights took 0.85 of the time with 1 row, but 1.05 to 1.25 of it with 8 to 64.
    const bool as_they_lie = few && n >= 8 && outruns_pytorch();
    if (packed.has_value()) check_shape(*packed, "packed", {panels, depth, PANEL});
    if (packed.has_value() && !as_they_lie) return multiply_packed_rows(params, *packed);
    if (!deterministic && leave_to_pytorch(n)) {
      at::mm_out(y, rows.tensor, columns.tensor.t());
      // About 8k elements a task: at about a nanosecond each, less does not repay waking a thread.
      at::parallel_for(0, n, std::max<int64_t>(1, 8192 / m),
                       [&](int64_t begin, int64_t end) { finish_rows_for_cpu(params, begin, end); });
      return;
    }
  }
  if (few) return multiply_by_transposed_x(params);
  for_each_task(panels * chunks, (STEP + (n + chunks - 1) / chunks) * PANEL, [&](int64_t task, float* scratch) {
    Linear<Element> mine = params;
    mine.scratch = scratch;
    multiply_panel_for_cpu(mine, task, task + 1);
  });
}

at::Tensor multiply_matrices(const at::Tensor& a, const at::Tensor& b, at::Tensor into) {
  if (!into.defined()) into = at::empty({a.size(0), b.size(1)}, a.options());
  if (a.scalar_type() != at::kFloat || !outruns_pytorch() || a.size(1) == 0) return at::mm_out(into, a, b);
  multiply_rows<float>(a, b.t(), std::nullopt, {}, false, into);
  return into;
}

namespace {

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

}  // namespace

template void multiply_rows(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const Epilogue<float>&, bool,
                            at::Tensor&);
template void multiply_rows(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const Epilogue<at::BFloat16>&,
                            bool, at::Tensor&);

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def("multiplies_bfloat16() -> bool", TORCH_FN(multiplies_bfloat16));
  m.def("outruns_pytorch() -> bool", TORCH_FN(outruns_pytorch));
  m.def("linear_bwd(Tensor dy, Tensor x, Tensor weight, bool has_bias, Tensor? count=None) -> (Tensor, Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_bwd)));
  m.def("prepack(Tensor weight) -> Tensor", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(prepack)));
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? count=None, "
      "bool deterministic=False, Tensor? packed=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_fwd)));
}

}  // namespace roberta_fast
