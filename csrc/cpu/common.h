// Checks and argument handling that the operators share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <memory>
#include <new>
#include <optional>

#include "philox.h"

namespace roberta_fast {

template <class Element>
void check_elements(const at::Tensor& t, const char* name, int64_t dim) {
  constexpr at::ScalarType TYPE = c10::CppTypeToScalarType<Element>::value;
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == TYPE, name, " must be a ",
                    TYPE == at::kFloat ? "float32" : "bfloat16", " CPU tensor, got ", t.scalar_type(), " on ", t.device());
  TORCH_CHECK_VALUE(t.dim() == dim, name, " must have ", dim, " dimensions, got shape ", t.sizes());
}

inline void check_float(const at::Tensor& t, const char* name, int64_t dim) { check_elements<float>(t, name, dim); }

// A float32 or bfloat16 tensor, and the others of its type.
inline void check_same(const at::Tensor& first, std::initializer_list<std::pair<const at::Tensor*, const char*>> tensors,
                       int64_t dim) {
  const auto check = first.scalar_type() == at::kBFloat16 ? check_elements<at::BFloat16> : check_elements<float>;
  for (const auto& [tensor, name] : tensors) check(*tensor, name, dim);
}

inline void check_shape(const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

// An optional argument, checked, and contiguous where it is given; and where its elements lie.
template <class Element = float>
at::Tensor contiguous_if_given(const std::optional<at::Tensor>& t, const char* name, at::IntArrayRef shape) {
  if (!t.has_value()) return {};
  check_elements<Element>(*t, name, static_cast<int64_t>(shape.size()));
  check_shape(*t, name, shape);
  return t->contiguous();
}
template <class Element = float>
const Element* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<Element>() : nullptr;
}

// The tensor with unit stride in its last dimension; a copy only where it has another.
inline at::Tensor with_unit_stride(const at::Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

// float32 with unit stride in the last dimension: what gradients are computed in. A copy only where t is something else.
inline at::Tensor as_float(const at::Tensor& t) { return with_unit_stride(t.to(at::kFloat)); }

// Rows that may be read: all n, or as many as count says.
inline int64_t real_rows(const std::optional<at::Tensor>& count, int64_t n) {
  if (!count.has_value()) return n;
  TORCH_CHECK_VALUE(count->device().is_cpu() && count->scalar_type() == at::kInt && count->numel() == 1,
                    "count must be int32 [1] on the CPU, got ", count->scalar_type(), " ", count->sizes());
  return std::clamp<int64_t>(*count->const_data_ptr<int32_t>(), 0, n);
}

// A division of rows that depends on their number alone: at most 64 chunks of at least 16 rows.
struct RowChunks {
  int64_t rows, number;
  explicit RowChunks(int64_t n) : rows(std::max<int64_t>(16, (n + 63) / 64)), number((n + rows - 1) / rows) {}
};

// Runs task(i, scratch) for i < tasks, each thread taking the next; scratch: floats of a thread's own, 64-byte aligned.
template <class Task>
void for_each_task(int64_t tasks, int64_t scratch_floats, const Task& task) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    const std::unique_ptr<float[], Free> scratch(
        static_cast<float*>(::operator new[](scratch_floats * sizeof(float), std::align_val_t(64))));
    for (int64_t i = next++; i < tasks; i = next++) task(i, scratch.get());
  });
}

// The sum over the rows of partials [chunks, columns], in their order.
at::Tensor column_sums(const at::Tensor& partials);

inline Dropout make_dropout(double p, const std::optional<at::Tensor>& seed) {
  if (p == 0.0) return {};
  TORCH_CHECK_VALUE(p > 0.0 && p < 1.0, "dropout_p must be in [0, 1), got ", p);
  TORCH_CHECK_VALUE(seed.has_value() && seed->scalar_type() == at::kLong && seed->numel() == 1,
                    "seed must be an int64 [1] tensor where dropout_p=", p);
  return {p, *seed->const_data_ptr<int64_t>()};
}

}  // namespace roberta_fast
