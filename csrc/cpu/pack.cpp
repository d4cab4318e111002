// Rows of a padded batch, without the padding, and back; contract in roberta_fast/ops/pack.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>

#include "common.h"

namespace roberta_fast {
namespace {

constexpr int64_t TASK_BYTES = 65536;  // less does not repay waking a thread

int64_t items_per_task(int64_t bytes_per_item) { return std::max<int64_t>(1, TASK_BYTES / std::max<int64_t>(1, bytes_per_item)); }

// The mask as bytes that are zero at padding.
at::Tensor mask_bytes(const at::Tensor& mask) { return (mask.scalar_type() == at::kBool ? mask : mask.ne(0)).contiguous(); }

void check_indices(const at::Tensor& indices) {
  TORCH_CHECK_VALUE(indices.device().is_cpu() && indices.scalar_type() == at::kLong && indices.dim() == 1,
                    "indices must be int64 [N] on the CPU, got ", indices.scalar_type(), " ", indices.sizes());
}

void check_place(const int64_t* indices, int64_t i, int64_t places) {
  TORCH_CHECK_INDEX(indices[i] >= 0 && indices[i] < places, "indices[", i, "]=", indices[i], " is outside the batch's ", places,
                    " places");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack_indices(const at::Tensor& mask,
                                                                                   std::optional<int64_t> capacity) {
  TORCH_CHECK_VALUE(mask.dim() == 2 && mask.size(1) >= 1, "mask must be [B, S] with S >= 1, got shape ", mask.sizes());
  const int64_t batch = mask.size(0), seqlen = mask.size(1);
  const at::Tensor bytes = mask_bytes(mask);
  const bool* keep = bytes.const_data_ptr<bool>();
  const auto ints = mask.options().dtype(at::kInt);
  const at::Tensor cu_seqlens = at::zeros({batch + 1}, ints), count = at::empty({1}, ints);
  const at::Tensor query_only = at::empty({batch}, ints), order = at::empty({batch}, ints);
  int32_t* bounds = cu_seqlens.mutable_data_ptr<int32_t>();
  int32_t* only = query_only.mutable_data_ptr<int32_t>();
  at::parallel_for(0, batch, items_per_task(seqlen), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const bool* row = keep + b * seqlen;
      int32_t length = 1;
      for (int64_t s = 1; s < seqlen; ++s) length += row[s];
      bounds[b + 1] = length;
      only[b] = !row[0];
    }
  });
  int32_t* sequences = order.mutable_data_ptr<int32_t>();
  std::iota(sequences, sequences + batch, 0);
  std::stable_sort(sequences, sequences + batch, [&](int32_t a, int32_t b) { return bounds[a + 1] > bounds[b + 1]; });
  for (int64_t b = 0; b < batch; ++b) bounds[b + 1] += bounds[b];
  const int64_t real = bounds[batch], n = capacity.value_or(real);
  TORCH_CHECK(real <= n, "mask has more real tokens than capacity=", n);
  *count.mutable_data_ptr<int32_t>() = static_cast<int32_t>(real);
  const at::Tensor indices = at::empty({n}, mask.options().dtype(at::kLong));
  int64_t* positions = indices.mutable_data_ptr<int64_t>();
  at::parallel_for(0, batch, items_per_task(seqlen), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t* next = positions + bounds[b];
      *next++ = b * seqlen;
      for (int64_t s = 1; s < seqlen; ++s)
        if (keep[b * seqlen + s]) *next++ = b * seqlen + s;
    }
  });
  std::fill(positions + real, positions + n, batch * seqlen);
  return {indices, cu_seqlens, count, query_only, order};
}

at::Tensor pack(const at::Tensor& x, const at::Tensor& indices, const std::optional<at::Tensor>& count) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must be [B, S, C], got shape ", x.sizes());
  check_indices(indices);
  const at::Tensor source = x.contiguous(), order = indices.contiguous();
  const int64_t n = indices.size(0), places = x.size(0) * x.size(1), row_bytes = x.size(2) * x.element_size();
  const at::Tensor rows = at::empty({n, x.size(2)}, x.options());
  const int64_t* index = order.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  at::parallel_for(0, real_rows(count, n), items_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      check_place(index, i, places);
      if (row_bytes) std::memcpy(to + i * row_bytes, from + index[i] * row_bytes, row_bytes);
    }
  });
  return rows;
}

at::Tensor unpack(const at::Tensor& rows, const at::Tensor& indices, int64_t batch, int64_t seqlen,
                  const std::optional<at::Tensor>& count) {
  TORCH_CHECK_VALUE(rows.dim() == 2, "rows must be [N, C], got shape ", rows.sizes());
  check_indices(indices);
  check_shape(indices, "indices", {rows.size(0)});
  const at::Tensor source = rows.contiguous(), order = indices.contiguous();
  const int64_t real = real_rows(count, rows.size(0)), places = batch * seqlen, row_bytes = rows.size(1) * rows.element_size();
  const int64_t* index = order.const_data_ptr<int64_t>();
  bool ascending = true;
  for (int64_t i = 0; i < real; ++i) {
    check_place(index, i, places);
    ascending &= i == 0 || index[i - 1] < index[i];
  }
  const at::Tensor x = at::empty({batch, seqlen, rows.size(1)}, rows.options());
  if (x.numel() == 0) return x;
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(x.mutable_data_ptr());
  if (!ascending) {
    std::memset(to, 0, places * row_bytes);
    for (int64_t i = 0; i < real; ++i) std::memcpy(to + index[i] * row_bytes, from + i * row_bytes, row_bytes);
    return x;
  }
  // Row i also clears the gap before it, and the last one that behind it: every place is written once.
  at::parallel_for(0, real, items_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t gap = i ? index[i - 1] + 1 : 0;
      std::memset(to + gap * row_bytes, 0, (index[i] - gap) * row_bytes);
      std::memcpy(to + index[i] * row_bytes, from + i * row_bytes, row_bytes);
    }
  });
  const int64_t tail = real ? index[real - 1] + 1 : 0;
  std::memset(to + tail * row_bytes, 0, (places - tail) * row_bytes);
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def("pack_indices(Tensor mask, int? capacity=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(pack_indices)));
  m.def("pack(Tensor x, Tensor indices, Tensor? count=None) -> Tensor", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(pack)));
  m.def("unpack(Tensor rows, Tensor indices, int batch, int seqlen, Tensor? count=None) -> Tensor",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(unpack)));
}

}  // namespace roberta_fast
