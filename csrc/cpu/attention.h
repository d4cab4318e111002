// What the forward and the backward pass of attention share: how segments, heads and blocks are laid out.
//
// Scores are kept transposed, S^T = K Q^T with keys as rows and queries along the lanes, so that the softmax of a query needs
// no sums across lanes, a call of Philox serves eight keys of a lane's query without a shuffle, and every product of both
// passes is one of the two in gemm.h. Only queries (and output gradients) are transposed, once a block.
#pragma once

#include <vector>

#include "common.h"
#include "gemm.h"
#include "rows.h"
#include "vmath.h"

namespace roberta_fast {

constexpr int64_t BLOCK = 64;  // queries, and keys, of a block: a panel of 64 x 64 floats fills half the first-level cache

// A packed [N, H, D] tensor whose last dimension has unit stride.
template <class Element>
struct Packed {
  Element* data;
  int64_t stride_row, stride_head;

  Element* at(int64_t row, int64_t head) const { return data + row * stride_row + head * stride_head; }
};

template <class Element = float>
Packed<const Element> packed(const at::Tensor& t) {
  return {t.const_data_ptr<Element>(), t.stride(0), t.stride(1)};
}
template <class Element = float>
Packed<Element> packed_output(const at::Tensor& t) {
  return {t.mutable_data_ptr<Element>(), t.stride(0), t.stride(1)};
}

// Query rows [query, query + queries) and visible key rows [key, key + keys); skipped: leading key rows that are not seen.
struct Segment {
  int64_t index, query, queries, key, keys, skipped;
};

struct Shape {
  int64_t heads, head_dim;
  float scale;
  bool causal;
  Dropout dropout;
};

// Keys that the query of this number within its segment sees: all, or up to the one that causality aligns with it.
ALWAYS_INLINE int64_t visible_keys(const Shape& shape, const Segment& s, int64_t query) {
  return shape.causal ? std::clamp<int64_t>(query + s.keys - s.queries + 1, 0, s.keys) : s.keys;
}

// The segments in descending order of their work, which lets threads that take the next one finish together.
std::vector<Segment> make_segments(const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                   const std::optional<at::Tensor>& query_only, int64_t rows_q, int64_t rows_k);

// The queries of a head and a segment from first on, a block of them.
struct AttentionTask {
  const Segment* segment;
  int64_t head, first;
};

// Adds those of a segment. Blocks of one head follow each other, while its keys and values lie in cache.
inline void add_tasks(const Segment& segment, int64_t heads, std::vector<AttentionTask>& tasks) {
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t first = 0; first < segment.queries; first += BLOCK) tasks.push_back({&segment, head, first});
}

template <class Element>
struct AttentionForward {
  Packed<const Element> query, key, value;
  Packed<Element> out;
  float* lse;  // [H, Nq] or null
  int64_t rows;
  Shape shape;
  const AttentionTask* tasks;
  int64_t last_task, threads;
  float* scratch;
};

// Tasks [begin, end), one after the other, by the calling thread.
void attend_blocks(const AttentionForward<float>& params, int64_t begin, int64_t end);

void check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value);

// A head's width in whole vectors of any instruction set.
inline int64_t padded(int64_t head_dim) { return (head_dim + Avx512::WIDTH - 1) / Avx512::WIDTH * Avx512::WIDTH; }

// Floats of scratch of a thread.
inline int64_t attention_scratch(int64_t head_dim) { return BLOCK * (BLOCK + 3 * padded(head_dim) + 3); }

// Hides from the queries first_query + lane (lanes of one vector) the key of this number: -inf where it is too late for them.
template <class Isa>
ALWAYS_INLINE Floats<Isa> hide_later_key(const Segment& s, int64_t first_query, int64_t key, const Floats<Isa>& scores) {
  // Query i sees key j where j <= i + keys - queries.
  const int32_t first_seeing = static_cast<int32_t>(key - s.keys + s.queries - first_query);
  return select<Isa>(lane_numbers<Ints<Isa>>() >= first_seeing, scores, Floats<Isa>{} - INFINITY);
}

// Draws for eight keys of each lane's query: those of columns 8 * group ... 8 * group + 7 of its row.
template <class Isa>
struct KeyDraws {
  Words<Isa> words[4];

  ALWAYS_INLINE void draw(const Dropout& dropout, int64_t first_query, int64_t group, int64_t head, int64_t segment) {
    words[0] = broadcast<Words<Isa>>(static_cast<uint32_t>(group));
    words[1] = lane_numbers<Words<Isa>>() + static_cast<uint32_t>(first_query);
    words[2] = broadcast<Words<Isa>>(static_cast<uint32_t>(head));
    words[3] = broadcast<Words<Isa>>(static_cast<uint32_t>(segment));
    philox<Isa>(dropout, words);
  }

  // x where the draw of column 8 * group + i keeps it, else 0; the scale of kept weights goes into sums of many.
  ALWAYS_INLINE Floats<Isa> keep(const Dropout& dropout, int i, const Floats<Isa>& x) const {
    const Words<Isa> draw = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu;
    return draw >= dropout.threshold ? x : Floats<Isa>{};
  }
};

}  // namespace roberta_fast
