// y = act(x W^T + b) + residual, of packed rows x; the contract is in product.h.
// Of few rows it is x that is transposed, once, and the weights are read once and as they lie. Of more, a task transposes a panel
// of weights into its cache and passes the rows of x along it. What follows the product happens while the sums are still in the
// nearest cache. An element of y is always the same sum, over k in ascending runs as gemm.h makes them.
// Many rows are left to PyTorch's product, unless their bits must not depend on their number, or ours is faster. Then the panels
// are packed first: blocks of rows, which stay in the second cache, pass over them. Weights that were packed beforehand lie so
// already.
#include "product.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <array>
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
// Rows from which on panels, if whole, are packed before they are used, and most bytes of them: on a Zen 5 0.95 of the time with
// 2,048 rows, 0.97 with 1,210, 1.03 with 605.
constexpr int64_t ROWS_TO_PACK = 1024, PACKED_BYTES = 64 << 20;
constexpr int64_t FAR = 8 << 20;  // bytes of y from which on it is written past the caches: 0.97 to 0.99 of the time
// Rows of x that pass over packed weights together, about: 480 KiB of a step's terms; and what their number is a multiple of.
constexpr int64_t BLOCK = 120, TILE_ROWS = 6;

// x and weight are floats, or pairs of bfloat16 as the bits of floats: pairs are counted in depth and strides then.
template <class Element>
struct Linear {
  const float *x, *weight;
  Epilogue<Element> epilogue;
  Element* y;
  int64_t stride_x, stride_weight, rows, columns, depth, panels, chunks;
  int64_t threads = 1;            // that take tasks in turn
  bool turned = false;            // weight is [depth, columns]
  bool far = false;               // y is written past the caches: vectors of whole lines, by AVX-512
  const float* packed = nullptr;  // [panels, depth, PANEL]
  int64_t chunk_rows = 0;
  float* scratch = nullptr;
  const float* transposed_x = nullptr;  // [depth, stride_x], rows in whole vectors
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
#if ROBERTA_FAST_X86
      if constexpr (std::is_same_v<Isa, Avx512> && std::is_same_v<Element, float>)
        if (p.far) {
          __asm__ volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(p.y + offset)) : "v"(y));
          continue;
        }
#endif
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

// What finish will read and write.
template <class Element>
ALWAYS_INLINE void prefetch_for_finish(const Linear<Element>& p, int64_t row, int64_t rows, int64_t first, int64_t columns) {
  const int64_t offset = row * p.columns + first;
  if (p.epilogue.residual) prefetch_rows(p.epilogue.residual + offset, p.columns, rows, columns);
  if (!p.far) prefetch_rows(p.y + offset, p.columns, rows, columns);
}

// What was written past the caches is there for other threads.
template <class Element>
ALWAYS_INLINE void settle(const Linear<Element>& p) {
#if ROBERTA_FAST_X86
  if (p.far) __builtin_ia32_sfence();
#endif
}

// Terms [k, k + terms) of the weights of columns [first, first + columns), as [terms, PANEL].
template <class Isa, class Element>
ALWAYS_INLINE void take_panel(const Linear<Element>& p, int64_t first, int64_t columns, int64_t k, int64_t terms, float* to) {
  if (!p.turned) return transpose<Isa>(p.weight + first * p.stride_weight + k, p.stride_weight, columns, terms, to, PANEL);
  constexpr int64_t TOGETHER = 16;
  for (int64_t t = 0; t < terms; t += TOGETHER) {
    const float* from = p.weight + (k + t) * p.stride_weight + first;
    prefetch_rows(from + TOGETHER * p.stride_weight, p.stride_weight, TOGETHER, columns);
    copy_rows<Isa>(from, p.stride_weight, std::min(TOGETHER, terms - t), columns, to + t * PANEL, PANEL);
  }
}

template <class Isa, class Element>
ALWAYS_INLINE void multiply_panel(const Linear<Element>& p, int64_t task, int64_t) {
  const int64_t chunk = task / p.panels, begin = p.rows * chunk / p.chunks, end = p.rows * (chunk + 1) / p.chunks;
  const int64_t first = task % p.panels * PANEL, columns = std::min(PANEL, p.columns - first);
  // The panel that is probably this thread's next, where its rows follow each other: 0.97 of the time with 605 rows on a Zen 5.
  const bool asks = !p.turned && p.stride_weight == p.depth && p.depth <= STEP && task % p.panels + p.threads < p.panels;
  const float* next = asks ? p.weight + (first + p.threads * PANEL) * p.depth : nullptr;
  const int64_t each = PANEL * p.depth / std::max<int64_t>(end - begin, 1);
  float* weight = p.scratch;                // [STEP, PANEL]
  float* all_sums = weight + STEP * PANEL;  // [CHUNK, PANEL], or [ROWS, PANEL] where one step makes a sum
  for (int64_t k = 0; k < p.depth || k == 0; k += STEP) {
    const int64_t terms = std::min(STEP, p.depth - k);
    const bool last = k + terms == p.depth;
    take_panel<Isa>(p, first, columns, k, terms, weight);
    for (int64_t row = begin; row < end; row += ROWS) {
      const int64_t rows = std::min(ROWS, end - row);
      float* sums = all_sums + (last && k == 0 ? 0 : (row - begin) * PANEL);
      if (last) prefetch_for_finish(p, row, rows, first, columns);
      const float* x = p.x + row * p.stride_x + k;
      const Product product{x, p.stride_x, weight, PANEL, sums, PANEL, rows, vectors<Isa>(columns), terms, k > 0};
      next ? multiply_asking<Isa>(product, next + (row - begin) * each, each) : multiply<Isa>(product);
      if (last) finish<Isa>(p, sums, PANEL, row, rows, first, columns);
    }
  }
  settle(p);
}
ROBERTA_FAST_KERNEL(multiply_panel, Linear<float>)
ROBERTA_FAST_BF16_KERNEL(multiply_panel, Linear<at::BFloat16>)

// Columns of x as rows, each with room for whole vectors.
struct Transposition {
  const float* x;
  int64_t stride_x, rows;
  float* transposed;
  int64_t stride;
};

template <class Isa>
ALWAYS_INLINE void transpose_columns(const Transposition& p, int64_t begin, int64_t end) {
  transpose<Isa>(p.x + begin, p.stride_x, p.rows, end - begin, p.transposed + begin * p.stride, p.stride);
}
ROBERTA_FAST_KERNEL(transpose_columns, Transposition)

// x [rows, columns] as [columns, rows], in rows of whole vectors.
at::Tensor transposed(const float* x, int64_t stride_x, int64_t rows, int64_t columns) {
  constexpr int64_t WIDEST = Avx512::WIDTH, LINES = 64;
  const int64_t stride = (rows + WIDEST - 1) / WIDEST * WIDEST;
  const at::Tensor result = at::empty({columns, stride}, at::kFloat);
  const Transposition params{x, stride_x, rows, result.mutable_data_ptr<float>(), stride};
  at::parallel_for(0, (columns + LINES - 1) / LINES, 1 + 8192 / (LINES * rows), [&](int64_t begin, int64_t end) {
    transpose_columns_for_cpu(params, begin * LINES, std::min(end * LINES, columns));
  });
  return result;
}

template <class Isa, class Element>
ALWAYS_INLINE void multiply_few_rows(const Linear<Element>& p, int64_t begin, int64_t end) {
  const int64_t wide = vectors<Isa>(p.rows), stride = p.stride_x;
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

// A share of the panels, for a block of rows. Where steps make a sum, it grows in scratch, [panels of the share, rows, PANEL].
template <class Isa, class Element>
ALWAYS_INLINE void multiply_packed(const Linear<Element>& p, int64_t task, int64_t shares) {
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
        float* sums = p.scratch + (whole ? 0 : ((panel - first_panel) * p.chunk_rows + row - begin) * PANEL);
        if (last) prefetch_for_finish(p, row, rows, first, columns);
        multiply_asking<Isa>(
            {p.x + row * p.stride_x + k, p.stride_x, weight, PANEL, sums, PANEL, rows, PANEL / Isa::WIDTH, terms, k > 0},
            next + (row - begin) * each, each);
        if (last) finish<Isa>(p, sums, PANEL, row, rows, first, columns);
      }
    }
  settle(p);
}
// A kernel's range is (task, shares) here.
ROBERTA_FAST_KERNEL(multiply_packed, Linear<float>)
ROBERTA_FAST_BF16_KERNEL(multiply_packed, Linear<at::BFloat16>)

template <class Isa, class Element>
ALWAYS_INLINE void pack_panel(const Linear<Element>& p, int64_t panel, int64_t) {
  const int64_t first = panel * PANEL;
  take_panel<Isa>(p, first, std::min(PANEL, p.columns - first), 0, p.depth, p.scratch + first * p.depth);
}
ROBERTA_FAST_KERNEL(pack_panel, Linear<float>)
ROBERTA_FAST_BF16_KERNEL(pack_panel, Linear<at::BFloat16>)

// The weights of params as panels [panels, depth, PANEL], zeros behind the last column.
template <class Element>
at::Tensor packed_panels(Linear<Element> params) {
  const std::array<int64_t, 3> shape{params.panels, params.depth, PANEL};
  const at::Tensor packed = params.columns % PANEL ? at::zeros(shape, at::kFloat) : at::empty(shape, at::kFloat);
  params.scratch = packed.mutable_data_ptr<float>();
  for_each_task(params.panels, 0, [&](int64_t panel, float*) { pack_panel_for_cpu(params, panel, panel + 1); });
  return packed;
}

// The product by packed weights [panels, depth, PANEL].
template <class Element>
void multiply_packed_rows(const Linear<Element>& params, const at::Tensor& packed) {
  Linear<Element> whole = params;
  whole.packed = packed.const_data_ptr<float>();
  const int64_t n = params.rows, about = std::max<int64_t>(1, (n + BLOCK / 2) / BLOCK);
  whole.chunk_rows = ((n + about - 1) / about + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  const int64_t blocks = (n + whole.chunk_rows - 1) / whole.chunk_rows;
  const int64_t shares = std::min((4 * at::get_num_threads() + blocks - 1) / blocks, params.panels);
  const int64_t kept = params.depth <= STEP ? ROWS : whole.chunk_rows * ((params.panels + shares - 1) / shares);
  for_each_task(blocks * shares, kept * PANEL, [&](int64_t task, float* scratch) {
    Linear<Element> mine = whole;
    mine.scratch = scratch;
    multiply_packed_for_cpu(mine, task, shares);
  });
}

// The product of few rows, which are transposed first.
template <class Element>
void multiply_by_transposed_x(const Linear<Element>& params) {
  const int64_t n = params.rows;
  const at::Tensor columns = transposed(params.x, params.stride_x, n, params.depth);
  Linear<Element> whole = params;
  whole.transposed_x = columns.const_data_ptr<float>(), whole.stride_x = columns.size(1);
  // Of panels that follow each other, so that what a thread asks for early is its own: 0.85 of the time of panels in turn.
  const int64_t panels = (params.columns + FEW_PANEL - 1) / FEW_PANEL;
  const int64_t shares = std::min<int64_t>(2 * at::get_num_threads(), panels);
  for_each_task(shares, FEW_PANEL * (whole.stride_x + n), [&](int64_t share, float* scratch) {
    Linear<Element> mine = whole;
    mine.scratch = scratch;
    multiply_few_rows_for_cpu(mine, panels * share / shares, panels * (share + 1) / shares);
  });
}

bool leave_to_pytorch(int64_t rows) { return active_level() != Level::avx512 || (rows > MANY_ROWS && !outruns_pytorch()); }

bool lies_by_columns(const at::Tensor& t) { return t.size(1) > 1 && t.stride(1) > 1 && t.stride(0) == 1; }

// Rows with unit stride, and where each begins and what their length is, in floats: rows of bfloat16 are cut into pairs.
struct Rows {
  at::Tensor tensor;
  const float* data;
  int64_t stride, depth;

  template <class Element>
  static Rows of(const at::Tensor& t) {
    constexpr int64_t EACH = sizeof(float) / sizeof(Element);
    at::Tensor rows;
    if (EACH == 1 && lies_by_columns(t)) {
      rows = transposed(reinterpret_cast<const float*>(t.const_data_ptr<Element>()), t.stride(1), t.size(1), t.size(0));
      return {rows, rows.const_data_ptr<float>(), rows.stride(0), t.size(1)};
    }
    rows = with_unit_stride(t);
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

template <class Element>
void multiply_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& packed,
                   const Epilogue<Element>& epilogue, bool deterministic, at::Tensor& y) {
  constexpr bool FLOATS = std::is_same_v<Element, float>;
  TORCH_CHECK_NOT_IMPLEMENTED(FLOATS || multiplies_bfloat16(), "this processor has no AVX-512 BF16");
  const int64_t n = x.size(0), m = weight.size(0);
  if (n == 0 || m == 0) return;
  Linear<Element> params{};
  params.epilogue = epilogue, params.y = y.mutable_data_ptr<Element>(), params.rows = n, params.columns = m;
  params.panels = (m + PANEL - 1) / PANEL;
  if constexpr (FLOATS) {
    if (!packed.has_value() && !deterministic && leave_to_pytorch(n)) {
      params.depth = x.size(1);
      at::mm_out(y, x, weight.t());
      // About 8k elements a task: at about a nanosecond each, less does not repay waking a thread.
      at::parallel_for(0, n, std::max<int64_t>(1, 8192 / m),
                       [&](int64_t begin, int64_t end) { finish_rows_for_cpu(params, begin, end); });
      return;
    }
  }
  params.turned = FLOATS && lies_by_columns(weight);
  const Rows rows = Rows::of<Element>(x), columns = Rows::of<Element>(params.turned ? weight.t() : weight);
  params.x = rows.data, params.stride_x = rows.stride, params.depth = rows.depth;
  params.weight = columns.data, params.stride_weight = columns.stride;
  const bool few = n <= FEW_ROWS && n * params.depth <= FEW_FLOATS && !params.turned;
  if constexpr (FLOATS) {
    const bool whole_lines = m % 16 == 0 && reinterpret_cast<uintptr_t>(params.y) % 64 == 0;
    params.far = active_level() == Level::avx512 && y.nbytes() >= FAR && whole_lines;
    // On a Zen 5 packed weights took 0.85 of the time with 1 row, but 1.05 to 1.25 of it with 8 to 64.
    const bool as_they_lie = few && n >= 8 && outruns_pytorch();
    if (packed.has_value()) check_shape(*packed, "packed", {params.panels, params.depth, PANEL});
    if (packed.has_value() && !as_they_lie) return multiply_packed_rows(params, *packed);
  }
  if (n >= ROWS_TO_PACK && m % PANEL == 0 && columns.tensor.nbytes() <= PACKED_BYTES)
    return multiply_packed_rows(params, packed_panels(params));
  if (few) return multiply_by_transposed_x(params);
  // A panel is transposed by each of its tasks, so there are no more than keep the threads busy. How many changes no result.
  const int64_t for_threads = std::min((4 * at::get_num_threads() + params.panels - 1) / params.panels, (n + ROWS - 1) / ROWS);
  params.threads = at::get_num_threads();
  params.chunks = std::max(for_threads, (n + CHUNK - 1) / CHUNK);
  for_each_task(params.panels * params.chunks, (STEP + (n + params.chunks - 1) / params.chunks) * PANEL,
                [&](int64_t task, float* scratch) {
                  Linear<Element> mine = params;
                  mine.scratch = scratch;
                  multiply_panel_for_cpu(mine, task, task + 1);
                });
}

at::Tensor prepack(const at::Tensor& weight) {
  const Rows columns = Rows::of<float>(weight);
  Linear<float> params{};
  params.weight = columns.data, params.stride_weight = columns.stride, params.depth = columns.depth;
  params.columns = weight.size(0), params.panels = (weight.size(0) + PANEL - 1) / PANEL;
  return packed_panels(params);
}

at::Tensor multiply_matrices(const at::Tensor& a, const at::Tensor& b, at::Tensor into) {
  if (!into.defined()) into = at::empty({a.size(0), b.size(1)}, a.options());
  if (a.scalar_type() != at::kFloat || !outruns_pytorch() || a.size(1) == 0) return at::mm_out(into, a, b);
  multiply_rows<float>(a, b.t(), std::nullopt, {}, false, into);
  return into;
}

template void multiply_rows(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const Epilogue<float>&, bool,
                            at::Tensor&);
template void multiply_rows(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const Epilogue<at::BFloat16>&,
                            bool, at::Tensor&);

}  // namespace roberta_fast
