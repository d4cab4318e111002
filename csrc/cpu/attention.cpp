// out = dropout(softmax(Q K^T * scale)) V of packed segments; contract in roberta_fast/ops/attention.py.
// Softmax over blocks of keys with a running maximum: Milakov and Gimelshein 2018; Dao et al. 2022.
#include "attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>
#include <type_traits>

namespace roberta_fast {

void check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  check_same(query, {{&query, "query"}, {&key, "key"}, {&value, "value"}}, 3);
  check_shape(key, "key", {key.size(0), query.size(1), query.size(2)});
  check_shape(value, "value", key.sizes());
}

std::vector<Segment> make_segments(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                   const std::optional<at::Tensor>& query_only, int64_t rows_q, int64_t rows_k) {
  const auto bounds = [](const at::Tensor& t, const char* name, int64_t rows) {
    TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == at::kInt && t.dim() == 1 && t.size(0) >= 1, name,
                      " must be int32 [B + 1] on the CPU, got ", t.scalar_type(), " ", t.sizes());
    const at::Tensor dense = t.contiguous();
    const int32_t* p = dense.const_data_ptr<int32_t>();
    const std::vector<int64_t> values(p, p + dense.size(0));
    TORCH_CHECK_VALUE(values[0] == 0 && std::is_sorted(values.begin(), values.end()) && values.back() <= rows, name,
                      " must ascend from 0 to at most ", rows);
    return values;
  };
  const std::vector<int64_t> q = bounds(cu_seqlens_q, "cu_seqlens_q", rows_q), k = bounds(cu_seqlens_k, "cu_seqlens_k", rows_k);
  const int64_t batch = static_cast<int64_t>(q.size()) - 1;
  TORCH_CHECK_VALUE(k.size() == q.size(), "cu_seqlens_k must have ", q.size(), " entries, got ", k.size());
  std::vector<int64_t> skipped(batch, 0);
  if (query_only.has_value()) {
    TORCH_CHECK_VALUE(query_only->scalar_type() == at::kInt && query_only->numel() == batch, "query_only must be int32 [", batch,
                      "], got ", query_only->scalar_type(), " ", query_only->sizes());
    const at::Tensor dense = query_only->contiguous();
    std::copy_n(dense.const_data_ptr<int32_t>(), batch, skipped.begin());
  }
  std::vector<Segment> segments;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t keys = k[b + 1] - k[b], hidden = std::clamp<int64_t>(skipped[b], 0, keys);
    segments.push_back({b, q[b], q[b + 1] - q[b], k[b] + hidden, keys - hidden, hidden});
  }
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.queries * a.keys > b.queries * b.keys; });
  return segments;
}

namespace {

constexpr int64_t OUT_ROWS = 12;  // queries whose sums, 3 KiB, are still in the nearest cache when they become results

// The largest of each lane's scores, or -inf; in four chains, as each comparison waits for the one before.
template <class Isa>
ALWAYS_INLINE Floats<Isa> largest(const float* scores, int64_t keys) {
  using Vector = Floats<Isa>;
  Vector most[] = {Vector{} - INFINITY, Vector{} - INFINITY, Vector{} - INFINITY, Vector{} - INFINITY};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
    for (int i = 0; i < 4; ++i) most[i] = larger<Isa>(most[i], load<Vector>(scores + (j + i) * BLOCK));
  for (; j < keys; ++j) most[0] = larger<Isa>(most[0], load<Vector>(scores + j * BLOCK));
  return larger<Isa>(larger<Isa>(most[0], most[1]), larger<Isa>(most[2], most[3]));
}

// Turns a block of transposed scores into weights against the new running maximum, for the queries of one vector of lanes.
// Updates maximum and sum; returns the factor that brings what was summed before to the new maximum.
template <class Isa>
ALWAYS_INLINE Floats<Isa> softmax_lanes(float* scores, int64_t keys, float* maximum, float* sum) {
  using Vector = Floats<Isa>;
  const Vector before = load<Vector>(maximum);
  const Vector now = larger<Isa>(before, largest<Isa>(scores, keys));
  // A query that has seen no key yet: subtracting -inf from its -inf scores would give NaN, subtracting 0 gives weights of 0.
  const Vector shift = now == -INFINITY ? Vector{} : now;
  const Vector factor = exp_nonpositive<Isa>(before - shift);
  Vector weights = {};
  for (int64_t j = 0; j < keys; ++j) {
    const Vector weight = exp_nonpositive<Isa>(load<Vector>(scores + j * BLOCK) - shift);
    store(scores + j * BLOCK, weight);
    weights += weight;
  }
  store(maximum, now);
  store(sum, factor * load<Vector>(sum) + weights);
  return factor;
}

// Dropout on a block of transposed weights; first_key counts visible keys.
template <class Isa>
ALWAYS_INLINE void drop_lanes(const Shape& shape, const Segment& s, int64_t first_query, int64_t first_key, int64_t keys,
                              int64_t head, float* weights) {
  const int64_t first_column = s.skipped + first_key;
  for (int64_t j = 0; j < keys;) {
    const int64_t column = first_column + j;
    KeyDraws<Isa> draws;
    draws.draw(shape.dropout, first_query, column / DRAWS_PER_CALL, head, s.index);
    for (int i = column % DRAWS_PER_CALL; i < DRAWS_PER_CALL && j < keys; ++i, ++j)
      store(weights + j * BLOCK, draws.keep(shape.dropout, i, load<Floats<Isa>>(weights + j * BLOCK)));
  }
}

// The log-sum-exp of queries, and what their sums of weighted values are to be multiplied by.
template <class Isa, class Element>
ALWAYS_INLINE void finish_lanes(const AttentionForward<Element>& p, const Segment& s, int64_t first, int64_t queries, int64_t head,
                                const float* maximum, const float* weight_sum, float* factors) {
  using Vector = Floats<Isa>;
  for (int64_t q = 0; q < queries; q += Isa::WIDTH) {
    const Vector sum = load<Vector>(weight_sum + q);
    store(factors + q, sum == 0.0f ? Vector{} : p.shape.dropout.scale / sum);
    if (p.lse) store_first(p.lse + head * p.rows + s.query + first + q,
                sum == 0.0f ? Vector{} - INFINITY : load<Vector>(maximum + q) + log_positive<Isa>(sum), queries - q);
  }
}

// Asks for a share of the rows that the thread's next task begins with, or that this one ends with: on 2,048 rows of 12 heads,
// 0.96 of the time in segments of 256 and 0.85 in those of 38.
template <class Element>
ALWAYS_INLINE void ask_for(const Packed<Element>& t, int64_t row, int64_t head, int64_t rows, int64_t columns, int64_t share,
                           int64_t shares) {
  for (int64_t r = rows * share / shares; r < rows * (share + 1) / shares; ++r)
    for (int64_t c = 0; c < columns; c += 64 / sizeof(Element)) __builtin_prefetch(t.at(row + r, head) + c, 0, 2);
}

// Rows of floats as they lie, where they are whole vectors one behind the other; else as a copy of theirs.
template <class Isa, class Element>
ALWAYS_INLINE const float* as_floats(const Element* from, int64_t stride, int64_t rows, int64_t columns, int64_t width,
                                     float* copy) {
  if constexpr (std::is_same_v<Element, float>)
    if (stride == width && columns == width) return from;
  copy_rows<Isa>(from, stride, rows, columns, copy, width);
  return copy;
}

template <class Isa, class Element>
ALWAYS_INLINE void attend(const AttentionForward<Element>& p, int64_t task, int64_t) {
  using Vector = Floats<Isa>;
  constexpr int W = Isa::WIDTH;
  constexpr bool CONVERTED = !std::is_same_v<Element, float>;
  const int64_t head_dim = p.shape.head_dim, width = padded(head_dim), head = p.tasks[task].head, first = p.tasks[task].first;
  const Segment& s = *p.tasks[task].segment;
  const int64_t queries = std::min(BLOCK, s.queries - first), lanes = vectors<Isa>(queries);
  float* query_t = p.scratch;               // [head_dim, BLOCK]
  float* scores = query_t + width * BLOCK;  // [BLOCK keys, BLOCK queries]
  float* value = scores + BLOCK * BLOCK;    // [BLOCK keys, width]
  float* sums = value + BLOCK * width;      // [BLOCK queries, width]
  float* maximum = sums + BLOCK * width;    // [BLOCK queries], as the next two
  float* weight_sum = maximum + BLOCK;
  float* factors = weight_sum + BLOCK;
  const int64_t most_keys = visible_keys(p.shape, s, first + queries - 1);
  const AttentionTask& next = p.tasks[std::min(task + p.threads, p.last_task)];
  prefetch_rows(p.key.at(s.key, head), p.key.stride_row, std::min(BLOCK, most_keys), head_dim);
  transpose<Isa, true>(p.query.at(s.query + first, head), p.query.stride_row, queries, head_dim, query_t, BLOCK, p.shape.scale);
  for (int64_t v = 0; v < lanes; ++v) {
    store(maximum + v * W, Vector{} - INFINITY);
    store(weight_sum + v * W, Vector{});
  }
  for (int64_t first_key = 0; first_key < most_keys; first_key += BLOCK) {
    const int64_t keys = std::min(BLOCK, most_keys - first_key);
    prefetch_rows(p.value.at(s.key + first_key, head), p.value.stride_row, keys, head_dim);
    const Element* keys_in_memory = p.key.at(s.key + first_key, head);
    if constexpr (CONVERTED) {  // into the place of the values, which are not wanted yet
      copy_rows<Isa>(keys_in_memory, p.key.stride_row, keys, head_dim, value, width);
      multiply<Isa>({value, width, query_t, BLOCK, scores, BLOCK, keys, lanes, head_dim, false});
    } else {
      multiply<Isa>({keys_in_memory, p.key.stride_row, query_t, BLOCK, scores, BLOCK, keys, lanes, head_dim, false});
    }
    const bool partly_hidden = first_key + keys > visible_keys(p.shape, s, first);
    for (int64_t v = 0; v < lanes; ++v) {
      float* column = scores + v * W;
      if (partly_hidden)
        for (int64_t j = 0; j < keys; ++j)
          store(column + j * BLOCK, hide_later_key<Isa>(s, first + v * W, first_key + j, load<Vector>(column + j * BLOCK)));
      store(factors + v * W, softmax_lanes<Isa>(column, keys, maximum + v * W, weight_sum + v * W));
      if (p.shape.dropout) drop_lanes<Isa>(p.shape, s, first + v * W, first_key, keys, head, column);
      if (first_key + BLOCK >= most_keys) {
        const Segment& other = *next.segment;
        ask_for(p.out, s.query + first, head, queries, head_dim, v, lanes);
        ask_for(p.query, other.query + next.first, next.head, std::min(BLOCK, other.queries - next.first), head_dim, v, lanes);
        if (next.head != head || &other != &s)
          ask_for(p.key, other.key, next.head, std::min(BLOCK, other.keys), head_dim, v, lanes);
      }
    }
    if (first_key > 0)
      for (int64_t r = 0; r < queries; ++r)
        for (int64_t d = 0; d < width; d += W) store(sums + r * width + d, load<Vector>(sums + r * width + d) * factors[r]);
    const float* values = as_floats<Isa>(p.value.at(s.key + first_key, head), p.value.stride_row, keys, head_dim, width, value);
    const bool last = first_key + BLOCK >= most_keys;
    if (last) finish_lanes<Isa>(p, s, first, queries, head, maximum, weight_sum, factors);
    for (int64_t r = 0; r < queries; r += last ? OUT_ROWS : queries) {
      const int64_t rows = last ? std::min(OUT_ROWS, queries - r) : queries;
      multiply_transposed<Isa>(
          {scores + r, BLOCK, values, width, sums + r * width, width, rows, vectors<Isa>(head_dim), keys, first_key > 0});
      for (int64_t i = r; last && i < r + rows; ++i)
        for (int64_t d = 0; d < head_dim; d += W)
          store_first(p.out.at(s.query + first + i, head) + d, load<Vector>(sums + i * width + d) * factors[i], head_dim - d);
    }
  }
  if (most_keys > 0) return;
  finish_lanes<Isa>(p, s, first, queries, head, maximum, weight_sum, factors);
  for (int64_t r = 0; r < queries; ++r)
    for (int64_t d = 0; d < head_dim; d += W) store_first(p.out.at(s.query + first + r, head) + d, Vector{}, head_dim - d);
}
ROBERTA_FAST_KERNEL(attend, AttentionForward<float>)
ROBERTA_FAST_KERNEL(attend, AttentionForward<at::BFloat16>)

template <class Element>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const std::vector<Segment>& segments, float scale, bool causal,
                                           const Dropout& dropout) {
  const int64_t rows = query.size(0), heads = query.size(1), head_dim = query.size(2);
  std::vector<AttentionTask> tasks;
  int64_t covered = 0;
  for (const Segment& s : segments) {
    covered = std::max(covered, s.query + s.queries);
    add_tasks(s, heads, tasks);
  }
  const at::Tensor q = with_unit_stride(query), k = with_unit_stride(key), v = with_unit_stride(value);
  at::Tensor out = at::empty({rows, heads, head_dim}, query.options()),
             lse = at::empty({heads, rows}, query.options().dtype(at::kFloat));
  // Rows behind the last segment belong to no task.
  if (covered < rows) {
    out.narrow(0, covered, rows - covered).zero_();
    lse.narrow(1, covered, rows - covered).fill_(-INFINITY);
  }
  const AttentionForward<Element> params{packed<Element>(q),
                                packed<Element>(k),
                                packed<Element>(v),
                                packed_output<Element>(out),
                                lse.mutable_data_ptr<float>(),
                                rows,
                                {heads, head_dim, scale, causal, dropout},
                                tasks.data(),
                                static_cast<int64_t>(tasks.size()) - 1,
                                at::get_num_threads(),
                                nullptr};
  for_each_task(static_cast<int64_t>(tasks.size()), attention_scratch(head_dim), [&](int64_t task, float* scratch) {
    AttentionForward<Element> mine = params;
    mine.scratch = scratch;
    attend_for_cpu(mine, task, task + 1);
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> attention_fwd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                                 const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t, int64_t,
                                                 double scale, bool causal, const std::optional<at::Tensor>& query_only,
                                                 double dropout_p, const std::optional<at::Tensor>& seed, bool,
                                                 const std::optional<at::Tensor>&) {
  check_attention(query, key, value);
  const std::vector<Segment> segments = make_segments(cu_seqlens_q, cu_seqlens_k, query_only, query.size(0), key.size(0));
  const auto run = query.scalar_type() == at::kBFloat16 ? forward<at::BFloat16> : forward<float>;
  return run(query, key, value, segments, static_cast<float>(scale), causal, make_dropout(dropout_p, seed));
}

}  // namespace

void attend_blocks(const AttentionForward<float>& params, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) attend_for_cpu(params, task, task + 1);
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, float scale, bool causal=False, Tensor? query_only=None, float dropout_p=0.0, Tensor? seed=None, "
      "bool deterministic=False, Tensor? order=None) -> (Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(attention_fwd)));
}

}  // namespace roberta_fast
