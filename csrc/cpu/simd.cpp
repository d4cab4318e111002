// Which instruction set the kernels use: found once, and lowered by tests and comparisons.
#include "simd.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>

namespace roberta_fast {
namespace {

const char* const NAMES[] = {"baseline", "avx2", "avx512"};

Level best_level() {
#if ROBERTA_FAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::baseline;
#else
  return Level::baseline;
#endif
}

std::atomic<Level>& level() {
  static std::atomic<Level> current{best_level()};
  return current;
}

std::string instruction_set() { return NAMES[static_cast<int>(active_level())]; }

void set_instruction_set(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(best_level()); ++i)
    if (name == NAMES[i]) return level().store(static_cast<Level>(i));
  TORCH_CHECK_VALUE(false, "instruction set '", name, "' is unknown or not on this processor, whose best is ",
                    NAMES[static_cast<int>(best_level())]);
}

}  // namespace

Level active_level() { return level().load(std::memory_order_relaxed); }

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def("instruction_set() -> str", TORCH_FN(instruction_set));
  m.def("set_instruction_set(str name) -> ()", TORCH_FN(set_instruction_set));
}

}  // namespace roberta_fast
