// y = act(x W^T + b) by 8-bit products; formulas and layout in roberta_fast/ops/int8_linear.py.
// The dot product of VNNI takes unsigned by signed bytes: x comes shifted by 128, and offset takes 128 times the weights' sums
// off again. A task quantizes its rows of x once, and passes over panels of weights that are stored as the instruction reads
// them; while it multiplies by one, it asks for the next (0.87 of the time).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
#include "int8_linear.h"
#include "vmath.h"

namespace roberta_fast {
namespace {

// False where a build or a processor lacks the instruction, or tests have asked for an older one.
bool int8_linear_is_fast() {
#if ROBERTA_FAST_X86
  return active_level() == Level::avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) { m.def("int8_linear_is_fast() -> bool", TORCH_FN(int8_linear_is_fast)); }

}  // namespace roberta_fast

#if ROBERTA_FAST_X86

namespace roberta_fast {
namespace {

constexpr int64_t TILE_ROWS = 6;  // 6 x 4 vectors of sums, 4 of weights and one of x fit 32 registers
constexpr int64_t FAR = 8 << 20;  // bytes of y from which on it is written past the caches

using Modular = Words<Avx512>;  // for sums that may wrap around before the offset is taken off again

// sum + x . weights, of four unsigned by four signed bytes in each lane.
TARGET_VNNI ALWAYS_INLINE Integers dot(const Integers& sum, const Integers& x, const Integers& weights) {
  return reinterpret_cast<Integers>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(weights)));
}

template <int... I, int... V>
TARGET_VNNI ALWAYS_INLINE void tile(const int32_t* x, const int32_t* panel, int32_t* sums, int64_t groups, const int32_t* later,
                                    int64_t step, std::integer_sequence<int, I...>, std::integer_sequence<int, V...>) {
  Integers sum[sizeof...(I)] = {};
  for (int64_t group = 0; group < groups; ++group) {
    const Integers weights[] = {load<Integers>(panel + V * 16)...};
    __builtin_prefetch(later, 0, 2);
    ((sum[I] = dot(sum[I], x[I / 4 * groups] - Integers{}, weights[I % 4])), ...);
    ++x;
    panel += PANEL;
    later += step;
  }
  (store(sums + I / 4 * PANEL + I % 4 * 16, sum[I]), ...);
}

// HEIGHT rows of x [., groups] times a panel [groups, PANEL]. Each group asks for what lies at later, and a step on for the next.
template <int HEIGHT>
TARGET_VNNI void tile_of(const int32_t* x, const int32_t* panel, int32_t* sums, int64_t groups, const int32_t* later,
                         int64_t step) {
  tile(x, panel, sums, groups, later, step, std::make_integer_sequence<int, HEIGHT * 4>(), std::make_integer_sequence<int, 4>());
}

constexpr decltype(&tile_of<1>) TILES[] = {nullptr, tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>, tile_of<5>, tile_of<6>};

template <Activation ACTIVATION>
TARGET_VNNI ALWAYS_INLINE Vector activated(const Vector& v) {
  if constexpr (ACTIVATION == Activation::gelu_erf) return gelu_near<Avx512>(v);
  if constexpr (ACTIVATION == Activation::gelu_tanh) return gelu_tanh<Avx512>(v);
  return v;
}

// Sums to y, for the rows from first on and all of a panel's columns: whole vectors, in the order in which they lie.
template <Activation ACTIVATION, bool FAR_AWAY, int... V>
TARGET_VNNI ALWAYS_INLINE void finish_panel(const Int8Linear& p, const Int8Scratch& s, int64_t first, int64_t row, int64_t rows,
                                            int64_t column, std::integer_sequence<int, V...>) {
  const Modular offset[] = {load<Modular>(p.offset + column + V * 16)...};
  const Vector scale[] = {load<Vector>(p.scale + column + V * 16)...};
  const Vector bias[] = {p.bias ? load<Vector>(p.bias + column + V * 16) : Vector{}...};
  float* const y[] = {p.y + p.of_y.at(first + row, column + V * 16)...};
  for (int64_t r = 0, at = 0; r < rows; ++r, at += p.of_y.row) {
    const int32_t* const sums = s.sums + r * PANEL;
    const float unit = s.scale[row + r];
    const Integers sum[] = {bits_as<Integers>(load<Modular>(sums + V * 16) - offset[V])...};
    const Vector v[] = {__builtin_convertvector(sum[V], Vector) * (scale[V] * unit) + bias[V]...};
    if constexpr (FAR_AWAY) (_mm512_stream_ps(y[V] + at, reinterpret_cast<__m512>(v[V])), ...);
    if constexpr (!FAR_AWAY) (store(y[V] + at, activated<ACTIVATION>(v[V])), ...);
  }
}

// The same for a panel with fewer columns.
template <Activation ACTIVATION>
TARGET_VNNI ALWAYS_INLINE void finish_rest(const Int8Linear& p, const Int8Scratch& s, int64_t first, int64_t row, int64_t rows,
                                           int64_t column) {
  for (int64_t c = column; c < p.columns; c += 16) {
    const int64_t n = p.columns - c;
    const Modular offset = bits_as<Modular>(load_first<Integers>(p.offset + c, n));
    const Vector scale = load_first<Vector>(p.scale + c, n);
    const Vector bias = p.bias ? load_first<Vector>(p.bias + c, n) : Vector{};
    float* const y = p.y + p.of_y.at(first + row, c);
    for (int64_t r = 0; r < rows; ++r) {
      const Integers sum = bits_as<Integers>(load<Modular>(s.sums + r * PANEL + c - column) - offset);
      const Vector v = __builtin_convertvector(sum, Vector) * (scale * s.scale[row + r]) + bias;
      store_first(y + r * p.of_y.row, activated<ACTIVATION>(v), n);
    }
  }
}

template <Activation ACTIVATION>
TARGET_VNNI void finish(const Int8Linear& p, const Int8Scratch& s, int64_t first, int64_t row, int64_t rows, int64_t column) {
  if (column + PANEL > p.columns) return finish_rest<ACTIVATION>(p, s, first, row, rows, column);
  constexpr auto vectors = std::make_integer_sequence<int, PANEL / 16>();
  if constexpr (ACTIVATION == Activation::none)
    if (p.far) return finish_panel<ACTIVATION, true>(p, s, first, row, rows, column, vectors);
  finish_panel<ACTIVATION, false>(p, s, first, row, rows, column, vectors);
}

at::Tensor int8_linear_fwd(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& offset,
                           const std::optional<at::Tensor>& bias, std::optional<std::string_view> gelu,
                           const std::optional<at::Tensor>& count, std::optional<int64_t> heads) {
  check_float(x, "x", 2);
  Int8Weight weight(packed, scale, offset, bias, x.size(1), gelu.has_value() ? gelu_named(*gelu) : Activation::none);
  return int8_linear(x, weight, real_rows(count, x.size(0)), heads);
}

}  // namespace

Int8Weight::Int8Weight(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& offset,
                       const std::optional<at::Tensor>& shift, int64_t depth, Activation activation)
    : scale(scales.contiguous()) {
  TORCH_CHECK_NOT_IMPLEMENTED(__builtin_cpu_supports("avx512vnni"), "this processor has no AVX-512 VNNI");
  check_float(scale, "scale", 1);
  const int64_t columns = scale.size(0), groups = (depth + 3) / 4, panels = (columns + PANEL - 1) / PANEL;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kChar && packed.is_contiguous() && packed.device().is_cpu(),
                    "packed must be a contiguous int8 CPU tensor, got ", packed.scalar_type(), " on ", packed.device());
  check_shape(packed, "packed", {panels, groups, PANEL, 4});
  TORCH_CHECK_VALUE(offset.scalar_type() == at::kInt && offset.is_contiguous() && offset.device().is_cpu(),
                    "offset must be a contiguous int32 CPU tensor, got ", offset.scalar_type(), " on ", offset.device());
  check_shape(offset, "offset", {columns});
  bias = contiguous_if_given(shift, "bias", {columns});
  params = {.x = nullptr,
            .packed = reinterpret_cast<const int32_t*>(packed.const_data_ptr<int8_t>()),
            .scale = scale.const_data_ptr<float>(),
            .offset = offset.const_data_ptr<int32_t>(),
            .bias = data_or_null(bias),
            .y = nullptr,
            .of_x = {},
            .of_y = {columns, 0, columns},
            .columns = columns,
            .depth = depth,
            .groups = groups,
            .activation = activation};
}

TARGET_VNNI void quantize_int8(const Int8Linear& p, int64_t begin, int64_t end, const Int8Scratch& s) {
  for (int64_t r = 0; r < end - begin; ++r)
    s.scale[r] = quantize_row(p.x + p.of_x.at(begin + r, 0), p.of_x.block, p.depth, p.groups, s.x + r * p.groups, s.rotated);
}

TARGET_VNNI void multiply_int8(const Int8Linear& p, int64_t begin, int64_t end, int64_t first, int64_t last, const Int8Scratch& s,
                               const int32_t* after) {
  const int64_t step = PANEL * TILE_ROWS / (end - begin + TILE_ROWS - 1);  // a panel, shared among the tiles
  for (int64_t column = first * PANEL; column < last * PANEL; column += PANEL) {
    const int32_t *const panel = p.packed + column * p.groups, *later = panel + PANEL * p.groups;
    if (column + PANEL == last * PANEL) later = after;
    for (int64_t row = 0; row < end - begin; row += SUMS) {
      const int64_t rows = std::min(SUMS, end - begin - row);
      for (int64_t r = 0; r < rows; r += TILE_ROWS, later += step * p.groups)
        TILES[std::min(TILE_ROWS, rows - r)](s.x + (row + r) * p.groups, panel, s.sums + r * PANEL, p.groups, later, step);
      switch (p.activation) {
        case Activation::none: finish<Activation::none>(p, s, begin, row, rows, column); break;
        case Activation::gelu_erf: finish<Activation::gelu_erf>(p, s, begin, row, rows, column); break;
        case Activation::gelu_tanh: finish<Activation::gelu_tanh>(p, s, begin, row, rows, column);
      }
    }
  }
  if (p.far) _mm_sfence();  // other threads may read y
}

bool is_far(const at::Tensor& y) {
  return y.nbytes() >= FAR && y.size(-1) % 16 == 0 && reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 64 == 0;
}

int64_t rows_to_share() { return at::get_num_threads() * SUMS; }

at::Tensor int8_linear(const at::Tensor& x, Int8Weight& weight, int64_t real, std::optional<int64_t> heads) {
  Int8Linear& p = weight.params;
  TORCH_CHECK_VALUE(!heads || (*heads > 0 && p.columns % *heads == 0), "heads=", heads.value_or(0), " do not divide ", p.columns,
                    " columns");
  const int64_t n = x.size(0), width = p.columns / heads.value_or(1);
  const bool apart = heads && width % 16 == 0;
  const at::Tensor rows = with_unit_stride(x);
  const at::Tensor y = apart ? at::empty({*heads, n, width}, x.options()) : at::empty({n, p.columns}, x.options());
  p.x = rows.const_data_ptr<float>(), p.of_x = {ROTATED, ROTATED, rows.stride(0)}, p.y = y.mutable_data_ptr<float>();
  if (apart) p.of_y = {width, n * width, width};
  p.far = is_far(y);
  // Threads share the rows, or the columns where there are few rows. The sums are exact, so how does not matter.
  const int64_t threads = at::get_num_threads(), most = (real + ROWS - 1) / ROWS, panels = p.panels();
  const int64_t blocks = real >= rows_to_share() ? (most + threads - 1) / threads * threads : most;
  const int64_t shares = blocks ? std::min((threads + blocks - 1) / blocks, panels) : 0;
  for_each_task(blocks * shares, Int8Scratch::floats(p.groups, ROWS), [&](int64_t task, float* memory) {
    const int64_t block = task / shares, share = task % shares;
    const int64_t begin = real * block / blocks, end = real * (block + 1) / blocks;
    const int64_t first = panels * share / shares, last = panels * (share + 1) / shares;
    const Int8Scratch scratch = Int8Scratch::in(memory, p.groups, ROWS);
    quantize_int8(p, begin, end, scratch);
    multiply_int8(p, begin, end, first, last, scratch, p.packed + first * PANEL * p.groups);
  });
  return heads && !apart ? y.view({n, *heads, width}).transpose(0, 1).contiguous() : y;
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "int8_linear_fwd(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias=None, str? gelu=None, "
      "Tensor? count=None, int? heads=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_linear_fwd)));
}

}  // namespace roberta_fast
#endif
