// y = dropout(LayerNorm(word + token_type + position)) of the tokens of a batch; contract in roberta_fast/ops/embedding.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"
#include "layer_norm.h"

namespace roberta_fast {
namespace {

using Given = std::optional<at::Tensor>;

// Where a row's three summands lie, and its place in the batch, which is its row coordinate in dropout.
template <class Element>
struct Source {
  const Element* word;
  const Element* token_type;  // null where there is no such table
  const Element* position;
  int64_t place;
};

template <class Element>
struct Forward {
  const Source<Element>* sources;
  const float* weight;
  const float* bias;
  Element* y;
  float* mean;
  float* rstd;
  int64_t hidden;
  double eps;
  Dropout dropout;
};

template <class Element>
struct Backward {
  const Source<Element>* sources;
  const Element* dy;
  float* z;
  Element* through_dropout;  // null where nothing was dropped
  int64_t stride_dy, hidden;
  Dropout dropout;
};

// The n elements from column c on of the sum.
template <class Isa, class Element>
ALWAYS_INLINE Floats<Isa> summed(const Source<Element>& source, int64_t c, int64_t n) {
  Floats<Isa> z = load_first<Floats<Isa>>(source.word + c, n);
  if (source.token_type) z += load_first<Floats<Isa>>(source.token_type + c, n);
  return z + load_first<Floats<Isa>>(source.position + c, n);
}

template <class Isa, class Element>
ALWAYS_INLINE void forward_rows(const Forward<Element>& p, int64_t begin, int64_t end) {
  constexpr int W = Isa::WIDTH;
  RowBuffer buffer(p.hidden);
  std::vector<uint16_t> draws = draw_buffer<Isa>(p.dropout, p.hidden);
  for (int64_t row = begin; row < end; ++row) {
    const Source<Element> source = p.sources[row];
    Element* y = p.y + row * p.hidden;
    float* row_of_z = buffer.in(y);
    Floats<Isa> total = {};
    for (int64_t c = 0; c < p.hidden; c += W) {
      const Floats<Isa> z = summed<Isa>(source, c, p.hidden - c);
      store_first(row_of_z + c, z, p.hidden - c);
      total += z;
    }
    const float row_sum = sum(total);
    const RowStatistics statistics = p.dropout
                                         ? normalize_row<Isa>(row_of_z, row_of_z, row_sum, p.hidden, p.weight, p.bias, p.eps)
                                         : normalize_row<Isa>(row_of_z, y, row_sum, p.hidden, p.weight, p.bias, p.eps);
    p.mean[row] = statistics.mean;
    p.rstd[row] = statistics.rstd;
    if (!p.dropout) continue;
    draw_row<Isa>(p.dropout, source.place, p.hidden, draws);
    for (int64_t c = 0; c < p.hidden; c += W) {
      const int64_t n = p.hidden - c;
      store_first(y + c, drop<Isa>(p.dropout, load_first<Floats<Isa>>(row_of_z + c, n), &draws[c]), n);
    }
  }
}
ROBERTA_FAST_KERNEL(forward_rows, Forward<float>)
ROBERTA_FAST_KERNEL(forward_rows, Forward<at::BFloat16>)

template <class Isa, class Element>
ALWAYS_INLINE void backward_rows(const Backward<Element>& p, int64_t begin, int64_t end) {
  std::vector<uint16_t> draws = draw_buffer<Isa>(p.dropout, p.hidden);
  for (int64_t row = begin; row < end; ++row) {
    const Source<Element> source = p.sources[row];
    draw_row<Isa>(p.dropout, source.place, p.hidden, draws);
    for (int64_t c = 0; c < p.hidden; c += Isa::WIDTH) {
      const int64_t n = p.hidden - c;
      store_first(p.z + row * p.hidden + c, summed<Isa>(source, c, n), n);
      if (!p.through_dropout) continue;
      const Floats<Isa> dy = load_first<Floats<Isa>>(p.dy + row * p.stride_dy + c, n);
      store_first(p.through_dropout + row * p.hidden + c, drop<Isa>(p.dropout, dy, &draws[c]), n);
    }
  }
}
ROBERTA_FAST_KERNEL(backward_rows, Backward<float>)
ROBERTA_FAST_KERNEL(backward_rows, Backward<at::BFloat16>)

// Ids of the whole batch [B, S], or nothing.
class Ids {
 public:
  Ids(const Given& ids, const char* name, at::IntArrayRef shape) : name_(name) {
    if (!ids.has_value()) return;
    TORCH_CHECK_VALUE(ids->device().is_cpu() && (ids->scalar_type() == at::kLong || ids->scalar_type() == at::kInt), name,
                      " must be int64 or int32 on the CPU, got ", ids->scalar_type(), " on ", ids->device());
    check_shape(*ids, name, shape);
    ids_ = ids->to(at::kLong).contiguous();
  }

  // The row of table [rows, hidden] for the id at a place, where ids were given, or else for id.
  template <class Element>
  const Element* row_of(const at::Tensor& table, int64_t place, int64_t id) const {
    if (ids_.defined()) id = ids_.const_data_ptr<int64_t>()[place];
    TORCH_CHECK_INDEX(id >= 0 && id < table.size(0), name_, " holds ", id, ", which is out of range for a table of ",
                      table.size(0), " rows");
    return table.const_data_ptr<Element>() + id * table.size(1);
  }

 private:
  const char* name_;
  at::Tensor ids_;
};

// The arguments that both passes share, checked, and what their kernels read of them. It keeps the tables alive.
template <class Element>
struct Lookup {
  at::Tensor word, position, token_type;
  std::vector<Source<Element>> sources;
  int64_t rows, hidden;  // rows: those of the result, of which the first sources.size() are real

  Lookup(const at::Tensor& input_ids, const Given& position_ids, const Given& token_type_ids, const Given& indices,
         const at::Tensor& word_table, const at::Tensor& position_table, const Given& token_type_table, const Given& count) {
    TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.size(1) >= 1, "input_ids must be [B, S] with S >= 1, got shape ",
                      input_ids.sizes());
    check_elements<Element>(word_table, "word", 2);
    check_elements<Element>(position_table, "position", 2);
    hidden = word_table.size(1);
    check_shape(position_table, "position", {position_table.size(0), hidden});
    word = word_table.contiguous();
    position = position_table.contiguous();
    if (token_type_table.has_value()) {
      check_elements<Element>(*token_type_table, "token_type", 2);
      check_shape(*token_type_table, "token_type", {token_type_table->size(0), hidden});
      token_type = token_type_table->contiguous();
    }
    const int64_t places = input_ids.numel(), seqlen = input_ids.size(1);
    at::Tensor order;
    if (indices.has_value()) {
      TORCH_CHECK_VALUE(indices->device().is_cpu() && indices->scalar_type() == at::kLong && indices->dim() == 1,
                        "indices must be int64 [N] on the CPU, got ", indices->scalar_type(), " ", indices->sizes());
      order = indices->contiguous();
    }
    rows = order.defined() ? order.size(0) : places;
    const Ids words(input_ids, "input_ids", input_ids.sizes()), positions(position_ids, "position_ids", input_ids.sizes()),
        types(token_type_ids, "token_type_ids", input_ids.sizes());
    sources.resize(real_rows(count, rows));
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t place = order.defined() ? order.const_data_ptr<int64_t>()[i] : static_cast<int64_t>(i);
      TORCH_CHECK_INDEX(place >= 0 && place < places, "indices[", i, "]=", place, " is outside the batch's ", places, " places");
      sources[i] = {words.row_of<Element>(word, place, 0),
                    token_type.defined() ? types.row_of<Element>(token_type, place, 0) : nullptr,
                    positions.row_of<Element>(position, place, place % seqlen), place};
    }
  }

  // About 32k elements a task: less does not repay waking a thread.
  template <class Kernel>
  void for_rows(const Kernel& kernel) const {
    at::parallel_for(0, static_cast<int64_t>(sources.size()), std::max<int64_t>(1, 32768 / std::max<int64_t>(1, hidden)), kernel);
  }
};

template <class Element>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const Lookup<Element>& lookup, const at::Tensor& weight,
                                                       const at::Tensor& bias, double eps, const Dropout& dropout) {
  check_shape(weight, "weight", {lookup.hidden});
  check_shape(bias, "bias", {lookup.hidden});
  const at::Tensor scale = weight.to(at::kFloat).contiguous(), shift = bias.to(at::kFloat).contiguous();
  const at::Tensor y = at::empty({lookup.rows, lookup.hidden}, lookup.word.options());
  const at::Tensor mean = at::empty({lookup.rows}, scale.options()), rstd = at::empty({lookup.rows}, scale.options());
  const Forward<Element> params{lookup.sources.data(),
                                scale.const_data_ptr<float>(),
                                shift.const_data_ptr<float>(),
                                y.mutable_data_ptr<Element>(),
                                mean.mutable_data_ptr<float>(),
                                rstd.mutable_data_ptr<float>(),
                                lookup.hidden,
                                eps,
                                dropout};
  lookup.for_rows([&](int64_t begin, int64_t end) { forward_rows_for_cpu(params, begin, end); });
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> embedding_fwd(const at::Tensor& input_ids, const Given& position_ids,
                                                             const Given& token_type_ids, const Given& indices,
                                                             const at::Tensor& word, const at::Tensor& position,
                                                             const Given& token_type, const at::Tensor& weight,
                                                             const at::Tensor& bias, double eps, double dropout_p,
                                                             const Given& seed, const Given& count) {
  const auto with = [&](auto element) {
    const Lookup<decltype(element)> lookup(input_ids, position_ids, token_type_ids, indices, word, position, token_type, count);
    return forward(lookup, weight, bias, eps, make_dropout(dropout_p, seed));
  };
  return word.scalar_type() == at::kBFloat16 ? with(at::BFloat16()) : with(0.0f);
}

template <class Element>
std::tuple<at::Tensor, at::Tensor> backward(const Lookup<Element>& lookup, const at::Tensor& dy, const Dropout& dropout) {
  check_elements<Element>(dy, "dy", 2);
  check_shape(dy, "dy", {lookup.rows, lookup.hidden});
  const at::Tensor gradient = with_unit_stride(dy), z = at::empty(dy.sizes(), dy.options().dtype(at::kFloat));
  const at::Tensor through_dropout = dropout ? at::empty(dy.sizes(), dy.options()) : at::empty({0}, dy.options());
  const Backward<Element> params{lookup.sources.data(),
                                 gradient.const_data_ptr<Element>(),
                                 z.mutable_data_ptr<float>(),
                                 dropout ? through_dropout.mutable_data_ptr<Element>() : nullptr,
                                 gradient.stride(0),
                                 lookup.hidden,
                                 dropout};
  lookup.for_rows([&](int64_t begin, int64_t end) { backward_rows_for_cpu(params, begin, end); });
  return {z, through_dropout};
}

std::tuple<at::Tensor, at::Tensor> embedding_bwd(const at::Tensor& dy, const at::Tensor& input_ids, const Given& position_ids,
                                                 const Given& token_type_ids, const Given& indices, const at::Tensor& word,
                                                 const at::Tensor& position, const Given& token_type, double dropout_p,
                                                 const Given& seed, const Given& count) {
  const auto with = [&](auto element) {
    const Lookup<decltype(element)> lookup(input_ids, position_ids, token_type_ids, indices, word, position, token_type, count);
    return backward(lookup, dy, make_dropout(dropout_p, seed));
  };
  return word.scalar_type() == at::kBFloat16 ? with(at::BFloat16()) : with(0.0f);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def(
      "embedding_fwd(Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor? indices, Tensor word, "
      "Tensor position, Tensor? token_type, Tensor weight, Tensor bias, float eps, float dropout_p=0.0, Tensor? seed=None, "
      "Tensor? count=None) -> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(embedding_fwd)));
  m.def(
      "embedding_bwd(Tensor dy, Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor? indices, Tensor word, "
      "Tensor position, Tensor? token_type, float dropout_p=0.0, Tensor? seed=None, Tensor? count=None) -> (Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(embedding_bwd)));
}

}  // namespace roberta_fast
