// Losses of rows of logits, and their gradient in place; formulas and contract in roberta_fast/ops/cross_entropy.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
#include "vmath.h"

namespace roberta_fast {
namespace {

struct CrossEntropy {
  float* logits;
  const int64_t* labels;
  float* losses;
  int64_t stride, classes, ignore_index;
  double smoothing;
  bool with_gradient;
};

template <class Isa>
ALWAYS_INLINE float largest(const float* z, int64_t n) {
  constexpr int W = Isa::WIDTH;
  Floats<Isa> lanes = z[0] - Floats<Isa>{};
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    const Floats<Isa> v = load<Floats<Isa>>(z + c);
    lanes = lanes >= v ? lanes : v;
  }
  float most = z[0];
  for (int i = 0; i < W; ++i) most = most >= lanes[i] ? most : lanes[i];
  for (; c < n; ++c) most = most >= z[c] ? most : z[c];
  return most;
}

// A row's logits become its exponentials, and then the gradient: each is computed once.
template <class Isa>
ALWAYS_INLINE void loss_rows(const CrossEntropy& p, int64_t begin, int64_t end) {
  constexpr int W = Isa::WIDTH;
  for (int64_t row = begin; row < end; ++row) {
    float* z = p.logits + row * p.stride;
    const int64_t label = p.labels[row];
    if (label == p.ignore_index) {
      p.losses[row] = 0.0f;
      if (p.with_gradient) std::fill(z, z + p.classes, 0.0f);
      continue;
    }
    const float at_label = z[label], most = largest<Isa>(z, p.classes);
    // Two sums a lane: with one, its additions would wait for each other.
    Floats<Isa> sums[2] = {}, totals[2] = {};
    for (int64_t c = 0, i = 0; c < p.classes; c += W, i ^= 1) {
      const int64_t n = p.classes - c;
      const Floats<Isa> v = load_first<Floats<Isa>>(z + c, n);
      Floats<Isa> power = exp_nonpositive<Isa>(v - most);
      if (n < W) power = select<Isa>(lane_numbers<Ints<Isa>>() < static_cast<int32_t>(n), power, Floats<Isa>{});
      sums[i] += power;
      totals[i] += v;
      if (p.with_gradient) store_first(z + c, power, n);
    }
    const double exponentials = sum(sums[0] + sums[1]), mean = sum(totals[0] + totals[1]) / static_cast<double>(p.classes);
    double loss = (1.0 - p.smoothing) * (static_cast<double>(most) - at_label) + std::log(exponentials);
    if (p.smoothing) loss += p.smoothing * (most - mean);  // else logits of -inf would make a NaN of the mean's nothing
    p.losses[row] = static_cast<float>(loss);
    if (!p.with_gradient) continue;
    const float scale = static_cast<float>(1.0 / exponentials), spread = static_cast<float>(p.smoothing / p.classes);
    for (int64_t c = 0; c < p.classes; c += W) {
      const int64_t n = p.classes - c;
      store_first(z + c, load_first<Floats<Isa>>(z + c, n) * scale - spread, n);
    }
    z[label] -= static_cast<float>(1.0 - p.smoothing);
  }
}
ROBERTA_FAST_KERNEL(loss_rows, CrossEntropy)

at::Tensor cross_entropy_fwd(const at::Tensor& logits, const at::Tensor& labels, int64_t ignore_index, double label_smoothing,
                             bool with_gradient) {
  check_float(logits, "logits", 2);
  TORCH_CHECK_VALUE(logits.stride(1) == 1, "logits must be contiguous in its last dimension, got strides ", logits.strides());
  TORCH_CHECK_VALUE(labels.device().is_cpu() && labels.scalar_type() == at::kLong, "labels must be an int64 CPU tensor, got ",
                    labels.scalar_type(), " on ", labels.device());
  const int64_t n = logits.size(0), classes = logits.size(1);
  check_shape(labels, "labels", {n});
  const at::Tensor classes_of_rows = labels.contiguous(), losses = at::empty({n}, logits.options());
  const int64_t* label = classes_of_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_VALUE((label[i] >= 0 && label[i] < classes) || label[i] == ignore_index, "labels must be classes from 0 to ",
                      classes - 1, " or ignore_index=", ignore_index, ", got ", label[i]);
  const CrossEntropy params{logits.mutable_data_ptr<float>(),
                            label,
                            losses.mutable_data_ptr<float>(),
                            logits.stride(0),
                            classes,
                            ignore_index,
                            label_smoothing,
                            with_gradient};
  at::parallel_for(0, n, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, classes)),
                   [&](int64_t begin, int64_t end) { loss_rows_for_cpu(params, begin, end); });
  return losses;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "cross_entropy_fwd(Tensor(a!) logits, Tensor labels, int ignore_index=-100, float label_smoothing=0.0, "
      "bool with_gradient=False) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(cross_entropy_fwd)));
}

}  // namespace roberta_fast
