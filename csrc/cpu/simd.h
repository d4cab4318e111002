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

// The first n elements of a vector, n at most its width, and zeros behind them.
template <class Vector, class Element>
ALWAYS_INLINE Vector load_first(const Element* p, int64_t n) {
  if (n >= static_cast<int64_t>(sizeof(Vector) / sizeof(Element))) return load<Vector>(p);
  Vector v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class Vector, class Element>
ALWAYS_INLINE void store_first(Element* p, const Vector& v, int64_t n) {
  if (n >= static_cast<int64_t>(sizeof(Vector) / sizeof(Element))) return store(p, v);
  const Vector in_memory = v;  // only this copy, so that v itself stays in a register
  for (int64_t i = 0; i < n; ++i) p[i] = in_memory[i];
}

template <class Vector, class Element>
ALWAYS_INLINE Vector broadcast(Element x) {
  return x - Vector{};
}

// The same bits as another type of the same size.
template <class To, class From>
ALWAYS_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
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
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl," ROBERTA_FAST_AVX2)))
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
