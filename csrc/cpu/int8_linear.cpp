// y = act(x W^T + b) by 8-bit products; formulas and layout in roberta_fast/ops/int8_linear.py.
// The dot product of VNNI takes unsigned by signed bytes: x comes shifted by 128, and offset takes 128 times the weights' sums
// off again. A task quantizes its rows of x once, and passes over panels of weights that are stored as the instruction reads
// them; while it multiplies by one, it asks for the next (0.87 of the time).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
#include "linear.h"
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
#include <immintrin.h>

#define TARGET_VNNI __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl," ROBERTA_FAST_AVX2)))

namespace roberta_fast {
namespace {

constexpr int64_t PANEL = 64;      // columns of y: four vectors
constexpr int64_t ROWS = 192;      // most rows of y that a task computes: it quantizes them once, for all of its panels
constexpr int64_t HIDDEN = 48;     // most rows between two products: at 3,072 columns 576 KiB, for the second cache
constexpr int64_t SUMS = 24;       // rows of y whose sums lie in the nearest cache: 6 KiB
constexpr int64_t BLOCK = 64;      // terms that are rotated together
constexpr int64_t TILE_ROWS = 6;   // 6 x 4 vectors of sums, 4 of weights and one of x fit 32 registers
constexpr int64_t FAR = 8 << 20;   // bytes of y from which on it is written past the caches
constexpr float WHOLE = 0x1.8p23;  // added to a small float, it leaves the nearest integer in the lowest bits
constexpr float LEAST = 0x1p-119;  // rows of smaller values count as zeros: 127 / LEAST is still finite

using Vector = Floats<Avx512>;
using Integers = Ints<Avx512>;
using Modular = Words<Avx512>;  // for sums that may wrap around before the offset is taken off again

// Where element (r, c) lies: in blocks of columns, c / width * block + r * row + c % width.
struct Layout {
  int64_t width, block, row;
  ALWAYS_INLINE int64_t at(int64_t r, int64_t c) const { return c / width * block + r * row + c % width; }
};

struct Int8Linear {
  const float* x;
  const int32_t* packed;  // [panels, groups, PANEL], four weights each
  const float* scale;     // [columns]
  const int32_t* offset;  // [columns]
  const float* bias;      // [columns] or null
  float* y;
  Layout of_x, of_y;  // blocks of BLOCK columns of x, of whole vectors of y
  int64_t columns, depth, groups;
  Activation activation;
  bool far = false;  // y is written past the caches; only without a GELU
};

struct Scratch {
  int32_t* x;      // [ROWS, groups]: four shifted bytes each
  int32_t* sums;   // [SUMS, PANEL]
  float* scale;    // [ROWS]
  float* rotated;  // [4 * groups]: a row
};

// One pass of the butterfly: lanes whose numbers differ in bit H become their sum and their difference.
template <int H, int... I>
TARGET_VNNI ALWAYS_INLINE Vector sums_and_differences(const Vector& v, std::integer_sequence<int, I...>) {
  const Vector sign = {(I & H ? -1.0f : 1.0f)...};
  return v * sign + __builtin_shufflevector(v, v, (I ^ H)...);
}

TARGET_VNNI ALWAYS_INLINE Vector rotate_vector(const float* x) {
  const auto lanes = std::make_integer_sequence<int, 16>();
  const Vector v = sums_and_differences<2>(sums_and_differences<1>(load<Vector>(x), lanes), lanes);
  return sums_and_differences<8>(sums_and_differences<4>(v, lanes), lanes);
}

// The bits of the larger absolute value of each lane; those of what is infinite or no number are the largest of all.
TARGET_VNNI ALWAYS_INLINE Integers larger(const Integers& most, const Vector& v) {
  const Integers size = bits_as<Integers>(v) & 0x7FFFFFFF;
  return size > most ? size : most;
}

// A block of x times the Hadamard matrix, 8 times as long as x; most: the largest values so far.
TARGET_VNNI ALWAYS_INLINE void rotate_block(const float* x, float* to, Integers& most) {
  const Vector v0 = rotate_vector(x), v1 = rotate_vector(x + 16), v2 = rotate_vector(x + 32), v3 = rotate_vector(x + 48);
  const Vector a = v0 + v1, b = v0 - v1, c = v2 + v3, d = v2 - v3;
  const Vector rotated[] = {a + c, b + d, a - c, b - d};
  for (int i = 0; i < 4; ++i) {
    store(to + 16 * i, rotated[i]);
    most = larger(most, rotated[i]);
  }
}

// The same for the n < BLOCK terms behind the last block, in blocks of the powers of two that make up n; zeros fill a vector.
TARGET_VNNI void rotate_rest(const float* x, int64_t n, float* to, Integers& most) {
  for (int64_t i = n; i % 16; ++i) to[i] = 0.0f;
  float* const first = to;
  std::copy(x, x + n, to);
  for (int64_t size = BLOCK / 2; size > 0; size /= 2) {
    if (!(n & size)) continue;
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t i = 0; i < size; ++i)
        if (!(i & half)) {
          const float low = to[i], high = to[i + half];
          to[i] = low + high;
          to[i + half] = low - high;
        }
    const float unit = size >= 16 ? 2.0f : size >= 4 ? 4.0f : 8.0f;  // 8 times the power of two at or above 1 / sqrt(size)
    for (int64_t i = 0; i < size; ++i) to[i] *= unit;
    to += size;
  }
  for (int64_t i = 0; i < n; i += 16) most = larger(most, load<Vector>(first + i));
}

// The nearest integers. (The form without a mask makes GCC 12 warn of its own header.)
TARGET_VNNI ALWAYS_INLINE __m512i nearest(const Vector& v) { return _mm512_maskz_cvtps_epi32(-1, reinterpret_cast<__m512>(v)); }

// 64 floats times a factor, as bytes around 128. Packing takes from its two sources by turns, 16 bytes at a time.
TARGET_VNNI ALWAYS_INLINE Integers bytes_of(const float* x, float factor) {
  const __m512i a = nearest(load<Vector>(x) * factor), b = nearest(load<Vector>(x + 16) * factor);
  const __m512i c = nearest(load<Vector>(x + 32) * factor), d = nearest(load<Vector>(x + 48) * factor);
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const Integers bytes = reinterpret_cast<Integers>(packed) ^ static_cast<int32_t>(0x80808080);
  return __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// A row, rotated, as bytes around 128, the unit of which it returns; not a number where the row holds what no byte can stand for.
// Its blocks of BLOCK terms lie so many floats from each other.
TARGET_VNNI ALWAYS_INLINE float quantize_row(const float* row, int64_t block, int64_t depth, int64_t groups, int32_t* to,
                                             float* x) {
  Integers most = {};
  int64_t k = 0;
  for (; k + BLOCK <= depth; k += BLOCK, row += block) rotate_block(row, x + k, most);
  if (k < depth) rotate_rest(row, depth - k, x + k, most);
  int32_t bits = 0;
  for (int lane = 0; lane < 16; ++lane) bits = std::max(bits, most[lane]);
  const float largest = bits_as<float>(bits);
  const float factor = largest >= 8 * LEAST ? 127.0f / largest : 0.0f;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(to);
  for (k = 0; k + BLOCK <= depth; k += BLOCK) store(bytes + k, bytes_of(x + k, factor));
  for (; k < depth; k += 16) {
    const Vector whole = rounded(load<Vector>(x + k) * factor) + WHOLE;
    const Integers around_128 = bits_as<Integers>(whole) - (bits_as<int32_t>(WHOLE) - 128);
    store_first(bytes + k, __builtin_convertvector(around_128, typename VectorOf<uint8_t, 16>::type), 4 * groups - k);
  }
  return (largest + 0.0f * largest) * 0.125f / 127.0f;
}

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
TARGET_VNNI ALWAYS_INLINE void finish_panel(const Int8Linear& p, const Scratch& s, int64_t first, int64_t row, int64_t rows,
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
TARGET_VNNI ALWAYS_INLINE void finish_rest(const Int8Linear& p, const Scratch& s, int64_t first, int64_t row, int64_t rows,
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
TARGET_VNNI void finish(const Int8Linear& p, const Scratch& s, int64_t first, int64_t row, int64_t rows, int64_t column) {
  if (column + PANEL > p.columns) return finish_rest<ACTIVATION>(p, s, first, row, rows, column);
  constexpr auto vectors = std::make_integer_sequence<int, PANEL / 16>();
  if constexpr (ACTIVATION == Activation::none)
    if (p.far) return finish_panel<ACTIVATION, true>(p, s, first, row, rows, column, vectors);
  finish_panel<ACTIVATION, false>(p, s, first, row, rows, column, vectors);
}

// Rows [begin, end), at most ROWS, and panels [first, last). after: the panel that is wanted next.
TARGET_VNNI void multiply_block(const Int8Linear& p, int64_t begin, int64_t end, int64_t first, int64_t last, const Scratch& s,
                                const int32_t* after) {
  for (int64_t r = 0; r < end - begin; ++r)
    s.scale[r] = quantize_row(p.x + p.of_x.at(begin + r, 0), p.of_x.block, p.depth, p.groups, s.x + r * p.groups, s.rotated);
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

// A weight as the operators take it, checked; keeps alive what params points to. params lacks x and y.
struct Weight {
  at::Tensor scale, bias;
  Int8Linear params;

  Weight(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& offset, const std::optional<at::Tensor>& shift,
         int64_t depth, Activation activation)
      : scale(scales.contiguous()) {
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
};

// Floats of scratch for rows of as many groups, and where its parts lie.
int64_t scratch_floats(int64_t groups) { return SUMS * PANEL + ROWS * (groups + 1) + 4 * groups + 16; }

Scratch divide(float* scratch, int64_t groups) {
  float* const x = scratch + SUMS * PANEL;
  float* const scales = x + ROWS * groups;
  return {reinterpret_cast<int32_t*>(x), reinterpret_cast<int32_t*>(scratch), scales, scales + ROWS};
}

void multiply_all(const Int8Linear& p, int64_t rows) {
  if (rows == 0 || p.columns == 0) return;
  // Threads share the rows, or the columns where there are few rows. The sums are exact, so how does not matter.
  const int64_t threads = at::get_num_threads(), most = (rows + ROWS - 1) / ROWS, panels = (p.columns + PANEL - 1) / PANEL;
  const int64_t blocks = rows >= threads * SUMS ? (most + threads - 1) / threads * threads : most;
  const int64_t shares = std::min((threads + blocks - 1) / blocks, panels);
  for_each_task(blocks * shares, scratch_floats(p.groups), [&](int64_t task, float* scratch) {
    const int64_t block = task / shares, share = task % shares;
    const int64_t first = panels * share / shares, last = panels * (share + 1) / shares;
    multiply_block(p, rows * block / blocks, rows * (block + 1) / blocks, first, last, divide(scratch, p.groups),
                   p.packed + first * PANEL * p.groups);
  });
}

// Where much is written, caches would read it first and lose it before its turn: past them, 0.97 of the time of 12 layers of 768
// columns on 2,048 rows of one thread. Such vectors must lie on lines of their own.
bool is_far(const at::Tensor& y) {
  return y.nbytes() >= FAR && y.size(-1) % 16 == 0 && reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 64 == 0;
}

at::Tensor int8_linear_fwd(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& offset,
                           const std::optional<at::Tensor>& bias, std::optional<std::string_view> gelu,
                           const std::optional<at::Tensor>& count, std::optional<int64_t> heads) {
  TORCH_CHECK_NOT_IMPLEMENTED(__builtin_cpu_supports("avx512vnni"), "this processor has no AVX-512 VNNI");
  check_float(x, "x", 2);
  Weight weight(packed, scale, offset, bias, x.size(1), gelu.has_value() ? gelu_named(*gelu) : Activation::none);
  const int64_t n = x.size(0), columns = scale.size(0);
  TORCH_CHECK_VALUE(!heads || (*heads > 0 && columns % *heads == 0), "heads=", heads.value_or(0), " do not divide ", columns,
                    " columns");
  const int64_t width = columns / heads.value_or(1);
  const bool apart = heads && width % 16 == 0;
  const at::Tensor rows = with_unit_stride(x);
  const at::Tensor y = apart ? at::empty({*heads, n, width}, x.options()) : at::empty({n, columns}, x.options());
  Int8Linear& p = weight.params;
  p.x = rows.const_data_ptr<float>(), p.of_x = {BLOCK, BLOCK, rows.stride(0)}, p.y = y.mutable_data_ptr<float>();
  if (apart) p.of_y = {width, n * width, width};
  p.far = is_far(y);
  multiply_all(p, real_rows(count, n));
  return heads && !apart ? y.view({n, *heads, width}).transpose(0, 1).contiguous() : y;
}

// Two products with a GELU between them. What lies between is wide, and never leaves the cache of the thread that made it, where
// it lies by panels: rows of 3,072 floats would all fall to the same lines of the nearest cache.
at::Tensor int8_feed_forward_fwd(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& offset,
                                 const std::optional<at::Tensor>& bias, std::string_view gelu, const at::Tensor& packed_out,
                                 const at::Tensor& scale_out, const at::Tensor& offset_out,
                                 const std::optional<at::Tensor>& bias_out, const std::optional<at::Tensor>& count) {
  const int64_t n = x.size(0), real = real_rows(count, n), inner = scale.size(0);
  const int64_t threads = at::get_num_threads();
  if (real < threads * SUMS) {  // too few rows to share them
    const at::Tensor hidden = int8_linear_fwd(x, packed, scale, offset, bias, gelu, count, std::nullopt);
    return int8_linear_fwd(hidden, packed_out, scale_out, offset_out, bias_out, std::nullopt, count, std::nullopt);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(__builtin_cpu_supports("avx512vnni"), "this processor has no AVX-512 VNNI");
  check_float(x, "x", 2);
  const Weight first(packed, scale, offset, bias, x.size(1), gelu_named(gelu));
  const Weight second(packed_out, scale_out, offset_out, bias_out, inner, Activation::none);
  const at::Tensor rows = with_unit_stride(x), y = at::empty({n, scale_out.size(0)}, x.options());
  const float* const from = rows.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  const int64_t stride = rows.stride(0), groups = std::max(first.params.groups, second.params.groups);
  const int64_t most = (real + HIDDEN - 1) / HIDDEN, blocks = (most + threads - 1) / threads * threads;
  const int64_t panels = (inner + PANEL - 1) / PANEL, panels_out = (second.params.columns + PANEL - 1) / PANEL;
  for_each_task(blocks, scratch_floats(groups) + HIDDEN * panels * PANEL, [&](int64_t block, float* scratch) {
    const int64_t begin = real * block / blocks, n = real * (block + 1) / blocks - begin;
    float* const hidden = scratch + scratch_floats(groups);
    const Layout by_panels{PANEL, n * PANEL, PANEL};
    Int8Linear p = first.params, q = second.params;
    p.x = from + begin * stride, p.of_x = {BLOCK, BLOCK, stride}, p.y = hidden, p.of_y = by_panels;
    q.x = hidden, q.of_x = by_panels, q.y = to + begin * q.columns, q.far = is_far(y);
    multiply_block(p, 0, n, 0, panels, divide(scratch, p.groups), q.packed);
    multiply_block(q, 0, n, 0, panels_out, divide(scratch, q.groups), p.packed);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "int8_linear_fwd(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias=None, str? gelu=None, "
      "Tensor? count=None, int? heads=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_linear_fwd)));
  m.def(
      "int8_feed_forward_fwd(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias, str gelu, Tensor packed_out, "
      "Tensor scale_out, Tensor offset_out, Tensor? bias_out=None, Tensor? count=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_feed_forward_fwd)));
}

}  // namespace roberta_fast
#endif
