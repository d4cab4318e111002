// Vectors whose width is a property of the instruction set, and the choice of that set at run time.
//
// A kernel is written once, as a function template over an instruction set, from GCC's vector types. ROBERTA_FAST_KERNEL
// compiles it for each set under a target attribute, so one binary runs anywhere and uses AVX-512 where the processor has
// it. Everything such a template calls must be ALWAYS_INLINE: code that is not inlined keeps the baseline's instructions
// (lambdas too, which do not inherit the attribute).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace roberta_fast {

#if defined(__x86_64__) && defined(__GNUC__)
#define ROBERTA_FAST_X86 1
#else
#define ROBERTA_FAST_X86 0
#endif

// WIDTH: floats in a vector. REGISTERS: vectors that fit in registers, which sizes the tiles of matrix products.
struct Baseline {
  static constexpr int WIDTH = 4;
  static constexpr int REGISTERS = ROBERTA_FAST_X86 ? 16 : 32;
};
struct Avx2 {
  static constexpr int WIDTH = 8;
  static constexpr int REGISTERS = 16;
};
struct Avx512 {
  static constexpr int WIDTH = 16;
  static constexpr int REGISTERS = 32;
};
// AVX-512 where products are of bfloat16: the bits of a float of their operands are a pair of those.
struct Avx512Bf16 : Avx512 {};

enum class Level : int { baseline, avx2, avx512 };

// The instruction set in use: the best that the processor has, unless set_level asked for less.
Level active_level();

template <class Element, int N>
struct VectorOf {
  typedef Element type __attribute__((vector_size(N * sizeof(Element))));
};
template <class Isa>
using Floats = typename VectorOf<float, Isa::WIDTH>::type;
template <class Isa>
using Ints = typename VectorOf<int32_t, Isa::WIDTH>::type;
template <class Isa>
using Words = typename VectorOf<uint32_t, Isa::WIDTH>::type;

// Vectors that hold so many elements.
template <class Isa>
ALWAYS_INLINE int64_t vectors(int64_t elements) {
  return (elements + Isa::WIDTH - 1) / Isa::WIDTH;
}

template <class Vector, class Element>
ALWAYS_INLINE Vector load(const Element* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector, class Element>
ALWAYS_INLINE void store(Element* p, const Vector& v) {
  std::memcpy(p, &v, sizeof v);
}

template <class Vector>
constexpr int LANES = sizeof(Vector) / sizeof(std::declval<Vector>()[0]);

// The same bits as another type of the same size.
template <class To, class From>
ALWAYS_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A number of two bytes that are the upper half of a float's; PyTorch's type, which not all that includes this knows.
template <class Element>
constexpr bool IS_BFLOAT16 = sizeof(Element) == 2 && std::is_convertible_v<Element, float> && std::is_class_v<Element>;

// A vector of floats from and to bfloat16; rounds to nearest, to even on a tie.
template <class Vector, class Element>
  requires IS_BFLOAT16<Element>
ALWAYS_INLINE Vector load(const Element* p) {
  typename VectorOf<uint16_t, LANES<Vector>>::type upper;
  std::memcpy(&upper, p, sizeof upper);
  return bits_as<Vector>(__builtin_convertvector(upper, typename VectorOf<uint32_t, LANES<Vector>>::type) << 16);
}

template <class Vector, class Element>
  requires IS_BFLOAT16<Element>
ALWAYS_INLINE void store(Element* p, const Vector& v) {
  typedef typename VectorOf<uint32_t, LANES<Vector>>::type Bits;
  const Bits bits = bits_as<Bits>(v), odd = (bits >> 16) & 1u;
  const Bits upper = (v == v ? bits + 0x7FFFu + odd : bits | 0x400000u) >> 16;  // a number that is none stays so
  const auto halves = __builtin_convertvector(upper, typename VectorOf<uint16_t, LANES<Vector>>::type);
  std::memcpy(p, &halves, sizeof halves);
}

// The first n elements of a vector, n at most its width, and zeros behind them.
template <class Vector, class Element>
ALWAYS_INLINE Vector load_first(const Element* p, int64_t n) {
  if (n >= LANES<Vector>) return load<Vector>(p);
  Vector v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class Vector, class Element>
ALWAYS_INLINE void store_first(Element* p, const Vector& v, int64_t n) {
  if (n >= LANES<Vector>) return store(p, v);
  const Vector in_memory = v;  // only this copy, so that v itself stays in a register
  for (int64_t i = 0; i < n; ++i) p[i] = in_memory[i];
}

template <class Vector, class Element>
ALWAYS_INLINE Vector broadcast(Element x) {
  return x - Vector{};
}

// The value as rounded to its type: the compiler may not fuse the product that made it into a later sum.
template <class Vector>
ALWAYS_INLINE Vector rounded(Vector v) {
#if ROBERTA_FAST_X86
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// 0, 1, 2, ... in the lanes.
template <class Vector>
ALWAYS_INLINE Vector lane_numbers() {
  Vector v;
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) v[i] = i;
  return v;
}

template <class Half, class Vector, int... I>
ALWAYS_INLINE Half add_halves(const Vector& v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + static_cast<int>(sizeof...(I)))...);
}

template <class Vector>
ALWAYS_INLINE float sum(const Vector& v) {
  constexpr int N = sizeof(Vector) / sizeof(float);
  if constexpr (N == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return sum(add_halves<typename VectorOf<float, N / 2>::type>(v, std::make_integer_sequence<int, N / 2>()));
  }
}

}  // namespace roberta_fast

#if ROBERTA_FAST_X86
#define ROBERTA_FAST_AVX2 "avx2,fma,bmi,bmi2,lzcnt,f16c,popcnt"
#define TARGET_AVX2 __attribute__((target(ROBERTA_FAST_AVX2)))
#define ROBERTA_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl," ROBERTA_FAST_AVX2
#define TARGET_AVX512 __attribute__((target(ROBERTA_FAST_AVX512)))
#define TARGET_AVX512BF16 __attribute__((target("avx512bf16," ROBERTA_FAST_AVX512)))
#endif

// Defines <kernel>_for_cpu(const Params&, begin, end), which runs kernel<Isa>(params, begin, end) for the active set.
#if ROBERTA_FAST_X86
#define ROBERTA_FAST_KERNEL(kernel, Params)                                                                                     \
  TARGET_AVX512 static void kernel##_avx512(const Params& params, int64_t begin, int64_t end) {                                 \
    kernel<Avx512>(params, begin, end);                                                                                         \
  }                                                                                                                             \
  TARGET_AVX2 static void kernel##_avx2(const Params& params, int64_t begin, int64_t end) { kernel<Avx2>(params, begin, end); } \
  static void kernel##_for_cpu(const Params& params, int64_t begin, int64_t end) {                                              \
    const Level level = active_level();                                                                                         \
    if (level == Level::avx512) return kernel##_avx512(params, begin, end);                                                     \
    if (level == Level::avx2) return kernel##_avx2(params, begin, end);                                                         \
    kernel<Baseline>(params, begin, end);                                                                                       \
  }
#else
#define ROBERTA_FAST_KERNEL(kernel, Params) \
  static void kernel##_for_cpu(const Params& params, int64_t begin, int64_t end) { kernel<Baseline>(params, begin, end); }
#endif

// The same for a kernel whose products are of bfloat16, of which that set is the only one.
#if ROBERTA_FAST_X86
#define ROBERTA_FAST_BF16_KERNEL(kernel, Params)                                                     \
  TARGET_AVX512BF16 static void kernel##_for_cpu(const Params& params, int64_t begin, int64_t end) { \
    kernel<Avx512Bf16>(params, begin, end);                                                          \
  }
#else
#define ROBERTA_FAST_BF16_KERNEL(kernel, Params) \
  static void kernel##_for_cpu(const Params&, int64_t, int64_t) {}
#endif
