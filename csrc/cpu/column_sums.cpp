// Sums over rows that come out the same for any number of threads.
#include <ATen/ops/empty.h>

#include "common.h"

namespace roberta_fast {
namespace {

struct Sums {
  const float* partials;
  float* sums;
  int64_t chunks, columns;
};

template <class Isa>
ALWAYS_INLINE void add_chunks(const Sums& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += Isa::WIDTH) {
    Floats<Isa> total = {};
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk)
      total += load_first<Floats<Isa>>(p.partials + chunk * p.columns + c, end - c);
    store_first(p.sums + c, total, end - c);
  }
}
ROBERTA_FAST_KERNEL(add_chunks, Sums)

}  // namespace

at::Tensor column_sums(const at::Tensor& partials) {
  const at::Tensor sums = at::empty({partials.size(1)}, partials.options());
  const Sums params{partials.const_data_ptr<float>(), sums.mutable_data_ptr<float>(), partials.size(0), partials.size(1)};
  add_chunks_for_cpu(params, 0, params.columns);
  return sums;
}

}  // namespace roberta_fast
