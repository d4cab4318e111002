// y = act(x W^T + b) by 8-bit products; formulas and layout in roberta_fast/ops/int8_linear.py.
// The dot product of VNNI takes unsigned by signed bytes: x comes shifted by 128, and offset takes 128 times the weights' sums off
// again. A task quantizes its rows of x once, and passes over panels of weights that are stored as the instruction reads them.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
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
constexpr int64_t ROWS = 48;       // rows of y that a task computes
constexpr int64_t STEP = 64;       // groups of four terms at a time: 16 KiB of a panel
constexpr int64_t BLOCK = 64;      // terms that are rotated together
constexpr int64_t TILE_ROWS = 6;   // 6 x 4 vectors of sums, 4 of weights and one of x fit 32 registers
constexpr float WHOLE = 0x1.8p23;  // added to a small float, it leaves the nearest integer in the lowest bits
constexpr float LEAST = 0x1p-119;  // rows of smaller values count as zeros: 127 / LEAST is still finite

using Vector = Floats<Avx512>;
using Integers = Ints<Avx512>;

enum class Activation { none, erf, tanh };

struct Int8Linear {
  const float* x;
  const int32_t* packed;  // [panels, groups, PANEL], four weights each
  const float* scale;     // [columns]
  const int32_t* offset;  // [columns]
  const float* bias;      // [columns] or null
  float* y;
  int64_t stride_x, columns, depth, groups;
  Activation activation;
};

struct Scratch {
  int32_t* x;      // [ROWS, groups]: four shifted bytes each
  int32_t* sums;   // [ROWS, PANEL]
  float* scale;    // [ROWS]
  float* rotated;  // [4 * groups]: a row
};

// One pass of the butterfly: lanes whose numbers differ in bit H become their sum and their difference.
template <int H, int... I>
TARGET_VNNI ALWAYS_INLINE Vector sums_and_differences(const Vector& v, std::integer_sequence<int, I...>) {
  const Vector other = __builtin_shufflevector(v, v, (I ^ H)...);
  const Integers upper = {(I & H ? -1 : 0)...};
  return upper ? other - v : other + v;
}

// A block of x times the Hadamard matrix / 8.
TARGET_VNNI ALWAYS_INLINE void rotate_block(const float* x, float* to) {
  const auto lanes = std::make_integer_sequence<int, 16>();
  Vector v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = sums_and_differences<1>(load<Vector>(x + 16 * i), lanes);
    v[i] = sums_and_differences<2>(v[i], lanes);
    v[i] = sums_and_differences<4>(v[i], lanes);
    v[i] = sums_and_differences<8>(v[i], lanes);
  }
  const Vector a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
  store(to, (a + c) * 0.125f);
  store(to + 16, (b + d) * 0.125f);
  store(to + 32, (a - c) * 0.125f);
  store(to + 48, (b - d) * 0.125f);
}

// The same for the n < BLOCK terms behind the last block, in blocks of the powers of two that make up n.
TARGET_VNNI void rotate_rest(const float* x, int64_t n, float* to) {
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
    const float unit = size >= 16 ? 0.25f : size >= 4 ? 0.5f : 1.0f;  // the power of two at or above 1 / sqrt(size)
    for (int64_t i = 0; i < size; ++i) to[i] *= unit;
    to += size;
  }
}

// A row, rotated, as bytes around 128, the unit of which it returns; not a number where the row holds what no byte can stand for.
TARGET_VNNI ALWAYS_INLINE float quantize_row(const float* row, int64_t depth, int64_t groups, int32_t* to, float* x) {
  for (int64_t k = 0; k < depth; k += BLOCK)
    depth - k >= BLOCK ? rotate_block(row + k, x + k) : rotate_rest(row + k, depth - k, x + k);
  Vector most = {}, poison = {};
  for (int64_t k = 0; k < depth; k += 16) {
    const Vector v = load_first<Vector>(x + k, depth - k), size = v < 0.0f ? -v : v;
    most = size > most ? size : most;
    poison += v * 0.0f;
  }
  float largest = 0.0f;
  for (int lane = 0; lane < 16; ++lane) largest = std::max(largest, most[lane]);
  const float factor = largest >= LEAST ? 127.0f / largest : 0.0f;
  typename VectorOf<uint8_t, 16>::type bytes;
  for (int64_t k = 0; k < 4 * groups; k += 16) {
    const Vector v = k < depth ? load_first<Vector>(x + k, depth - k) : Vector{};
    const Vector whole = rounded(v * factor) + WHOLE;
    bytes = __builtin_convertvector(bits_as<Integers>(whole) - (bits_as<int32_t>(WHOLE) - 128), decltype(bytes));
    store_first(reinterpret_cast<uint8_t*>(to) + k, bytes, 4 * groups - k);
  }
  return largest / 127.0f + sum(poison);
}

// sum + x . weights, of four unsigned by four signed bytes in each lane.
TARGET_VNNI ALWAYS_INLINE Integers dot(const Integers& sum, const Integers& x, const Integers& weights) {
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x),
                                                        reinterpret_cast<__m512i>(weights)));
}

template <int... I, int... V>
TARGET_VNNI ALWAYS_INLINE void tile(const int32_t* x, int64_t stride_x, const int32_t* panel, int32_t* sums, int64_t groups,
                                    bool accumulate, std::integer_sequence<int, I...>, std::integer_sequence<int, V...>) {
  Integers sum[sizeof...(I)] = {};
  if (accumulate) ((sum[I] = load<Integers>(sums + I / 4 * PANEL + I % 4 * 16)), ...);
  for (int64_t group = 0; group < groups; ++group) {
    const Integers weights[] = {load<Integers>(panel + V * 16)...};
    ((sum[I] = dot(sum[I], x[I / 4 * stride_x] - Integers{}, weights[I % 4])), ...);
    ++x;
    panel += PANEL;
  }
  (store(sums + I / 4 * PANEL + I % 4 * 16, sum[I]), ...);
}

template <int HEIGHT>
TARGET_VNNI void tile_of(const int32_t* x, int64_t stride_x, const int32_t* panel, int32_t* sums, int64_t groups, bool accumulate) {
  tile(x, stride_x, panel, sums, groups, accumulate, std::make_integer_sequence<int, HEIGHT * 4>(),
       std::make_integer_sequence<int, 4>());
}

constexpr decltype(&tile_of<1>) TILES[] = {nullptr,    tile_of<1>, tile_of<2>, tile_of<3>,
                                           tile_of<4>, tile_of<5>, tile_of<6>};

// Rows [begin, end), at most ROWS, and panels [first, last).
TARGET_VNNI void multiply_block(const Int8Linear& p, int64_t begin, int64_t end, int64_t first, int64_t last, const Scratch& s) {
  const int64_t rows = end - begin;
  for (int64_t r = 0; r < rows; ++r)
    s.scale[r] = quantize_row(p.x + (begin + r) * p.stride_x, p.depth, p.groups, s.x + r * p.groups, s.rotated);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * PANEL;
    const int32_t* weights = p.packed + column * p.groups;
    for (int64_t group = 0; group == 0 || group < p.groups; group += STEP)  // once where there are none: it stores zeros
      for (int64_t r = 0; r < rows; r += TILE_ROWS)
        TILES[std::min(TILE_ROWS, rows - r)](s.x + r * p.groups + group, p.groups, weights + group * PANEL, s.sums + r * PANEL,
                                             std::min(STEP, p.groups - group), group > 0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = column; c < std::min(column + PANEL, p.columns); c += 16) {
        const int64_t n = p.columns - c;
        const Integers sum = load<Integers>(s.sums + r * PANEL + c - column) - load_first<Integers>(p.offset + c, n);
        Vector y = __builtin_convertvector(sum, Vector) * (load_first<Vector>(p.scale + c, n) * s.scale[r]);
        if (p.bias) y += load_first<Vector>(p.bias + c, n);
        if (p.activation == Activation::erf) y = gelu<Avx512>(y);
        if (p.activation == Activation::tanh) y = gelu_tanh<Avx512>(y);
        store_first(p.y + (begin + r) * p.columns + c, y, n);
      }
  }
}

Activation activation_of(std::optional<std::string_view> name) {
  if (!name.has_value()) return Activation::none;
  TORCH_CHECK_VALUE(*name == "none" || *name == "tanh", "gelu must be None, 'none' or 'tanh', got '", *name, "'");
  return *name == "none" ? Activation::erf : Activation::tanh;
}

at::Tensor int8_linear_fwd(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& offset,
                           const std::optional<at::Tensor>& bias, std::optional<std::string_view> gelu,
                           const std::optional<at::Tensor>& count) {
  TORCH_CHECK_NOT_IMPLEMENTED(__builtin_cpu_supports("avx512vnni"), "this processor has no AVX-512 VNNI");
  check_float(x, "x", 2);
  check_float(scale, "scale", 1);
  const int64_t n = x.size(0), depth = x.size(1), columns = scale.size(0), real = real_rows(count, n);
  const int64_t groups = (depth + 3) / 4, panels = (columns + PANEL - 1) / PANEL;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kChar && packed.is_contiguous() && packed.device().is_cpu(),
                    "packed must be a contiguous int8 CPU tensor, got ", packed.scalar_type(), " on ", packed.device());
  check_shape(packed, "packed", {panels, groups, PANEL, 4});
  TORCH_CHECK_VALUE(offset.scalar_type() == at::kInt && offset.is_contiguous() && offset.device().is_cpu(),
                    "offset must be a contiguous int32 CPU tensor, got ", offset.scalar_type(), " on ", offset.device());
  check_shape(offset, "offset", {columns});
  at::Tensor shift;
  if (bias.has_value()) {
    check_float(*bias, "bias", 1);
    check_shape(*bias, "bias", {columns});
    shift = bias->contiguous();
  }
  const at::Tensor rows = with_unit_stride(x), scales = scale.contiguous(), y = at::empty({n, columns}, x.options());
  const Int8Linear params{rows.const_data_ptr<float>(),
                          reinterpret_cast<const int32_t*>(packed.const_data_ptr<int8_t>()),
                          scales.const_data_ptr<float>(),
                          offset.const_data_ptr<int32_t>(),
                          bias.has_value() ? shift.const_data_ptr<float>() : nullptr,
                          y.mutable_data_ptr<float>(),
                          rows.stride(0),
                          columns,
                          depth,
                          groups,
                          activation_of(gelu)};
  if (real == 0 || columns == 0) return y;
  const int64_t blocks = (real + ROWS - 1) / ROWS;
  // Where there are few rows, threads share their columns; the sums are exact, so how does not matter.
  const int64_t shares = std::clamp<int64_t>((4 * at::get_num_threads() + blocks - 1) / blocks, 1, panels);
  for_each_task(blocks * shares, ROWS * (groups + PANEL + 1) + 4 * groups, [&](int64_t task, float* scratch) {
    int32_t* sums = reinterpret_cast<int32_t*>(scratch);
    const Scratch mine{sums + ROWS * PANEL, sums, scratch + ROWS * (PANEL + groups),
                       scratch + ROWS * (PANEL + groups + 1)};
    const int64_t block = task / shares, share = task % shares;
    multiply_block(params, real * block / blocks, real * (block + 1) / blocks, panels * share / shares,
                   panels * (share + 1) / shares, mine);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "int8_linear_fwd(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias=None, str? gelu=None, "
      "Tensor? count=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(int8_linear_fwd)));
}

}  // namespace roberta_fast
#endif
