// The product of 8-bit weights and a task's rows, for the operators that are made of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "attention.h"
#include "int8_rows.h"
#include "product.h"

#if ROBERTA_FAST_X86
namespace roberta_fast {

constexpr int64_t PANEL = 64;  // columns of y: four vectors
constexpr int64_t ROWS = 192;  // most rows of y that a task computes: it quantizes them once, for all of its panels
constexpr int64_t SUMS = 24;   // rows of y whose sums lie in the nearest cache: 6 KiB

// Where element (r, c) lies: in blocks of columns, c / width * block + r * row + c % width.
struct Layout {
  int64_t width, block, row;
  ALWAYS_INLINE int64_t at(int64_t r, int64_t c) const { return c / width * block + r * row + c % width; }
};

struct Int8Linear {
  const float* x;
  const int32_t* packed;  // [panels, groups, PANEL], four weights each
  const float* scale;     // [columns]
  const int32_t* offset;  // [columns]
  const float* bias;      // [columns] or null
  float* y;
  Layout of_x, of_y;  // blocks of ROTATED columns of x, of whole vectors of y
  int64_t columns, depth, groups;
  Activation activation;
  bool far = false;  // y is written past the caches; only without a GELU

  // The same with these columns alone, whole panels.
  Int8Linear part(int64_t first, int64_t count) const {
    Int8Linear p = *this;
    p.packed += first * groups, p.scale += first, p.offset += first, p.columns = count;
    if (bias) p.bias += first;
    return p;
  }
  int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
};

// A weight as the operators take it, checked; keeps alive what params points to. params lacks x and y.
struct Int8Weight {
  at::Tensor scale, bias;
  Int8Linear params;

  Int8Weight(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& offset, const std::optional<at::Tensor>& shift,
             int64_t depth, Activation activation);
};

// A thread's memory for products: its rows of x as bytes, for all the panels that it passes over.
struct Int8Scratch {
  int32_t* sums;   // [SUMS, PANEL]
  int32_t* x;      // [rows, groups]: four shifted bytes each
  float* scale;    // [rows]
  float* rotated;  // [4 * groups]: a row

  // Whole lines, so that what lies behind begins one.
  static int64_t floats(int64_t groups, int64_t rows) { return (SUMS * PANEL + rows * (groups + 1) + 4 * groups + 31) / 16 * 16; }
  static Int8Scratch in(float* memory, int64_t groups, int64_t rows) {
    int32_t* const sums = reinterpret_cast<int32_t*>(memory);
    float* const scale = memory + SUMS * PANEL + rows * groups;
    return {sums, sums + SUMS * PANEL, scale, scale + rows};
  }
};

// Rows [begin, end) of x into scratch.
void quantize_int8(const Int8Linear& p, int64_t begin, int64_t end, const Int8Scratch& scratch);

// Rows [begin, end) of y by those of x in scratch; panels [first, last). after: the panel that is wanted next. Nothing reads x
// any more, so that y may lie there.
void multiply_int8(const Int8Linear& p, int64_t begin, int64_t end, int64_t first, int64_t last, const Int8Scratch& scratch,
                   const int32_t* after);

// y = act(x W^T + b) for a packed x [n, k], of which as many rows are real.
at::Tensor int8_linear(const at::Tensor& x, Int8Weight& weight, int64_t real, std::optional<int64_t> heads = std::nullopt);

// Whether y is written past the caches: where much is written, they would read it first and lose it before its turn, 0.97 of the
// time of 12 layers of 768 columns on 2,048 rows of one thread. Such vectors must lie on lines of their own.
bool is_far(const at::Tensor& y);

// Rows from which on threads get rows of their own, not columns.
int64_t rows_to_share();

// Whether int8_attention serves: heads must be whole vectors and fill panels, and segments fit a cache.
bool attends_by_tasks(int64_t heads, int64_t head_dim, const std::vector<Segment>& segments);

// The attention [n, heads * d] of packed rows x [n, k] over their projections to query, key and value, which never leave the
// cache of the thread that made them.
at::Tensor int8_attention(const at::Tensor& x, const Int8Weight& projections, const std::vector<Segment>& segments, int64_t heads,
                          float scale);

// What a layer does behind its attention, context [n, k] to rows [n, c], by tasks of whole rows, n at least rows_to_share():
// r = LayerNorm(residual + x W_o^T + b_o), then LayerNorm(r + GELU(r W_1^T + b_1) W_2^T + b_2).
// weights: the three, whose GELU is the second one's activation. norms: weight and bias of both.
at::Tensor int8_behind_attention(const at::Tensor& context, const at::Tensor& residual, const Int8Weight& output,
                                 const Int8Weight& first, const Int8Weight& second, at::TensorList norms, double attention_eps,
                                 double output_eps);

}  // namespace roberta_fast
#endif
