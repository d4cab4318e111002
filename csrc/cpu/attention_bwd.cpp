// Gradients of attention, the weights recomputed from the log-sum-exp; formulas in roberta_fast/ops/attention.py.
// Dao et al. 2022, "FlashAttention", appendix B. One task owns a head of a segment: sums have one order and need no atomics.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention.h"

namespace roberta_fast {
namespace {

struct Backward {
  Packed<const float> dout, query, key, value, out;
  const float* lse;  // [H, Nq]
  Packed<float> dquery, dkey, dvalue;
  int64_t rows;
  Shape shape;
  const Segment* segments;
  float* scratch;
};

// Keys whose gradients a thread sums at a time, in its second-level cache, while all queries pass by.
constexpr int64_t SPAN = 8 * BLOCK;

// A thread's buffers; width is the head's in whole vectors.
struct Buffers {
  int64_t width;
  float *key, *dkey, *dvalue;    // [SPAN, width]
  float *query_t, *dout_t;       // [head_dim, BLOCK]
  float *query, *dout, *dquery;  // [BLOCK, width]
  float *weights, *dscores;      // [BLOCK keys, BLOCK queries]
  float *lse, *delta;            // [BLOCK]; delta: row sums of dout * out

  ALWAYS_INLINE Buffers(float* p, int64_t head_dim) : width(padded(head_dim)) {
    for (float** buffer : {&key, &dkey, &dvalue}) {
      *buffer = p;
      p += SPAN * width;
    }
    for (float** buffer : {&query_t, &dout_t, &query, &dout, &dquery}) {
      *buffer = p;
      p += BLOCK * width;
    }
    weights = p;
    dscores = weights + BLOCK * BLOCK;
    lse = dscores + BLOCK * BLOCK;
    delta = lse + BLOCK;
  }
};

int64_t backward_scratch(int64_t head_dim) {
  return 3 * SPAN * padded(head_dim) + BLOCK * (5 * padded(head_dim) + 2 * BLOCK + 2);
}

template <class Isa>
ALWAYS_INLINE void load_queries(const Backward& p, const Segment& s, int64_t head, int64_t first, int64_t queries,
                                const Buffers& b) {
  const int64_t row = s.query + first, head_dim = p.shape.head_dim;
  const float* query = p.query.at(row, head);
  const float* dout = p.dout.at(row, head);
  transpose<Isa, true>(query, p.query.stride_row, queries, head_dim, b.query_t, BLOCK, p.shape.scale);
  transpose<Isa>(dout, p.dout.stride_row, queries, head_dim, b.dout_t, BLOCK);
  copy_rows<Isa>(query, p.query.stride_row, queries, head_dim, b.query, b.width);
  copy_rows<Isa>(dout, p.dout.stride_row, queries, head_dim, b.dout, b.width);
  for (int64_t r = 0; r < queries; ++r) {
    const float* out = p.out.at(row + r, head);
    Floats<Isa> products = {};
    for (int64_t d = 0; d < head_dim; d += Isa::WIDTH)
      products += load<Floats<Isa>>(b.dout + r * b.width + d) * load_first<Floats<Isa>>(out + d, head_dim - d);
    b.delta[r] = sum(products);
    // A query without keys: its scores are all -inf, and 0 in place of -inf keeps NaN out of the differences.
    const float lse = p.lse[head * p.rows + row + r];
    b.lse[r] = lse == -INFINITY ? 0.0f : lse;
  }
  for (int64_t r = queries; r < vectors<Isa>(queries) * Isa::WIDTH; ++r) b.delta[r] = b.lse[r] = 0.0f;
}

// From scores and dP (both transposed) to the weights that multiplied V and to dS, for the queries of one vector of lanes.
template <class Isa>
ALWAYS_INLINE void differentiate_lanes(const Backward& p, const Segment& s, int64_t head, int64_t first_query, int64_t first_key,
                                       int64_t keys, bool partly_hidden, float* weights, float* dscores, const float* lse,
                                       const float* delta) {
  using Vector = Floats<Isa>;
  const Vector shift = load<Vector>(lse), row_sums = load<Vector>(delta);
  const Dropout& dropout = p.shape.dropout;
  for (int64_t j = 0; j < keys;) {
    const int64_t column = s.skipped + first_key + j;
    const int64_t group_end = std::min(keys, j + DRAWS_PER_CALL - column % DRAWS_PER_CALL);
    KeyDraws<Isa> draws;
    if (dropout) draws.draw(dropout, first_query, column / DRAWS_PER_CALL, head, s.index);
    for (int i = column % DRAWS_PER_CALL; j < group_end; ++i, ++j) {
      Vector score = load<Vector>(weights + j * BLOCK), dweight = load<Vector>(dscores + j * BLOCK);
      if (partly_hidden) score = hide_later_key<Isa>(s, first_query, first_key + j, score);
      const Vector weight = exp_nonpositive<Isa>(score - shift);
      Vector kept = weight;
      if (dropout) {
        kept = draws.keep(dropout, i, weight);
        dweight = draws.keep(dropout, i, dweight) * dropout.scale;
      }
      store(weights + j * BLOCK, kept);
      store(dscores + j * BLOCK, weight * (dweight - row_sums));
    }
  }
}

// Rows of a head that are `factor` times those of a buffer, added to what is there or in its place.
template <class Isa>
ALWAYS_INLINE void store_rows(const float* from, int64_t width, int64_t rows, int64_t head_dim, float factor, bool add, float* to,
                              int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < head_dim; d += Isa::WIDTH) {
      float* element = to + r * stride + d;
      const Floats<Isa> v = load<Floats<Isa>>(from + r * width + d) * factor;
      store_first(element, add ? load_first<Floats<Isa>>(element, head_dim - d) + v : v, head_dim - d);
    }
}

void clear_rows(const Packed<float>& rows, int64_t first, int64_t number, int64_t head, int64_t head_dim) {
  for (int64_t r = first; r < first + number; ++r)
    for (int64_t d = 0; d < head_dim; ++d) rows.at(r, head)[d] = 0.0f;
}

// What one block of queries adds to the gradients of the keys from first_key on, and these keys to its own.
template <class Isa>
ALWAYS_INLINE void differentiate_block(const Backward& p, const Segment& s, int64_t head, int64_t first, int64_t queries,
                                       int64_t first_key, int64_t keys, bool add_to_keys, bool add_to_queries, float* key,
                                       float* dkey, float* dvalue, const Buffers& b) {
  constexpr int W = Isa::WIDTH;
  const int64_t lanes = vectors<Isa>(queries), head_dim = p.shape.head_dim, across = vectors<Isa>(head_dim);
  const float* value = p.value.at(s.key + first_key, head);
  multiply<Isa>({key, b.width, b.query_t, BLOCK, b.weights, BLOCK, keys, lanes, head_dim, false});
  multiply<Isa>({value, p.value.stride_row, b.dout_t, BLOCK, b.dscores, BLOCK, keys, lanes, head_dim, false});
  const bool partly_hidden = first_key + keys > visible_keys(p.shape, s, first);
  for (int64_t v = 0; v < lanes; ++v)
    differentiate_lanes<Isa>(p, s, head, first + v * W, first_key, keys, partly_hidden, b.weights + v * W, b.dscores + v * W,
                             b.lse + v * W, b.delta + v * W);
  multiply<Isa>({b.weights, BLOCK, b.dout, b.width, dvalue, b.width, keys, across, queries, add_to_keys});
  multiply<Isa>({b.dscores, BLOCK, b.query, b.width, dkey, b.width, keys, across, queries, add_to_keys});
  multiply_transposed<Isa>({b.dscores, BLOCK, key, b.width, b.dquery, b.width, queries, across, keys, add_to_queries});
}

template <class Isa>
ALWAYS_INLINE void differentiate(const Backward& p, int64_t task, int64_t) {
  const Segment& s = p.segments[task / p.shape.heads];
  const int64_t head = task % p.shape.heads, head_dim = p.shape.head_dim;
  const Buffers b(p.scratch, head_dim);
  clear_rows(p.dkey, s.key - s.skipped, s.skipped, head, head_dim);
  clear_rows(p.dvalue, s.key - s.skipped, s.skipped, head, head_dim);
  clear_rows(p.dquery, s.query, s.queries, head, head_dim);
  for (int64_t span = 0; span < s.keys; span += SPAN) {
    const int64_t span_end = std::min(span + SPAN, s.keys);
    copy_rows<Isa>(p.key.at(s.key + span, head), p.key.stride_row, span_end - span, head_dim, b.key, b.width);
    int64_t seen_end = span;  // keys of the span before it have been seen by a query
    for (int64_t first = 0; first < s.queries; first += BLOCK) {
      const int64_t queries = std::min(BLOCK, s.queries - first);
      const int64_t visible_end = std::min(span_end, visible_keys(p.shape, s, first + queries - 1));
      if (visible_end <= span) continue;
      load_queries<Isa>(p, s, head, first, queries, b);
      for (int64_t first_key = span; first_key < visible_end; first_key += BLOCK) {
        const int64_t keys = std::min(BLOCK, span_end - first_key), offset = (first_key - span) * b.width;
        const bool add_to_keys = first_key < seen_end, add_to_queries = first_key > span;
        differentiate_block<Isa>(p, s, head, first, queries, first_key, keys, add_to_keys, add_to_queries, b.key + offset,
                                 b.dkey + offset, b.dvalue + offset, b);
        seen_end = std::max(seen_end, first_key + keys);
      }
      store_rows<Isa>(b.dquery, b.width, queries, head_dim, p.shape.scale, span > 0, p.dquery.at(s.query + first, head),
                      p.dquery.stride_row);
    }
    store_rows<Isa>(b.dkey, b.width, seen_end - span, head_dim, p.shape.scale, false, p.dkey.at(s.key + span, head),
                    p.dkey.stride_row);
    store_rows<Isa>(b.dvalue, b.width, seen_end - span, head_dim, p.shape.dropout.scale, false, p.dvalue.at(s.key + span, head),
                    p.dvalue.stride_row);
    clear_rows(p.dkey, s.key + seen_end, span_end - seen_end, head, head_dim);
    clear_rows(p.dvalue, s.key + seen_end, span_end - seen_end, head, head_dim);
  }
}
ROBERTA_FAST_KERNEL(differentiate, Backward)

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_bwd(
    const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t, int64_t, double scale,
    bool causal, const std::optional<at::Tensor>& query_only, double dropout_p, const std::optional<at::Tensor>& seed, bool,
    const std::optional<at::Tensor>&) {
  check_attention(query, key, value);
  check_same(query, {{&dout, "dout"}, {&out, "out"}}, 3);
  check_float(lse, "lse", 2);
  check_shape(dout, "dout", query.sizes());
  check_shape(out, "out", query.sizes());
  const int64_t rows = query.size(0), heads = query.size(1), head_dim = query.size(2);
  check_shape(lse, "lse", {heads, rows});
  const std::vector<Segment> segments = make_segments(cu_seqlens_q, cu_seqlens_k, query_only, rows, key.size(0));
  const at::Tensor d = as_float(dout), q = as_float(query), k = as_float(key), v = as_float(value), o = as_float(out),
                   statistics = lse.contiguous();
  at::Tensor dquery = at::empty(q.sizes(), q.options()), dkey = at::empty(k.sizes(), k.options()),
             dvalue = at::empty(v.sizes(), v.options());
  // Rows behind the last segment belong to no task.
  int64_t covered_q = 0, covered_k = 0;
  for (const Segment& s : segments) {
    covered_q = std::max(covered_q, s.query + s.queries);
    covered_k = std::max(covered_k, s.key + s.keys);
  }
  dquery.narrow(0, covered_q, rows - covered_q).zero_();
  for (at::Tensor* gradient : {&dkey, &dvalue}) gradient->narrow(0, covered_k, key.size(0) - covered_k).zero_();
  const Backward params{packed(d),
                        packed(q),
                        packed(k),
                        packed(v),
                        packed(o),
                        statistics.const_data_ptr<float>(),
                        packed_output(dquery),
                        packed_output(dkey),
                        packed_output(dvalue),
                        rows,
                        {heads, head_dim, static_cast<float>(scale), causal, make_dropout(dropout_p, seed)},
                        segments.data(),
                        nullptr};
  for_each_task(static_cast<int64_t>(segments.size()) * heads, backward_scratch(head_dim), [&](int64_t task, float* scratch) {
    Backward mine = params;
    mine.scratch = scratch;
    differentiate_for_cpu(mine, task, task + 1);
  });
  const at::ScalarType type = query.scalar_type();
  return {dquery.to(type), dkey.to(type), dvalue.to(type)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float scale, bool causal=False, Tensor? query_only=None, "
      "float dropout_p=0.0, Tensor? seed=None, bool deterministic=False, Tensor? order=None) -> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(attention_bwd)));
}

}  // namespace roberta_fast
