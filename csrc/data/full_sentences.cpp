// Whole sentences into blocks: the same bounds as roberta_fast/training/pretraining/blocks.py, whose docstring defines them.
#include <algorithm>

#include "data/data.h"

namespace roberta_fast {

Packing full_sentences(const uint32_t* sentence_lengths, const uint32_t* document_sentences, int64_t documents, int64_t capacity,
                       int64_t per_block, int64_t per_piece) {
  Packing packing{{0}, {0}};
  const int64_t longest = capacity - per_block - per_piece;
  int64_t token = 0, used = per_block;
  const auto pieces = [&] { return static_cast<int64_t>(packing.piece_starts.size()) - 1; };
  const auto close_piece = [&] {
    if (token > packing.piece_starts.back()) packing.piece_starts.push_back(token);
  };
  const auto close_block = [&] {
    close_piece();
    if (pieces() > packing.block_starts.back()) packing.block_starts.push_back(pieces());
    used = per_block;
  };
  for (int64_t document = 0; document < documents; ++document) {
    for (const uint32_t* end = sentence_lengths + document_sentences[document]; sentence_lengths != end; ++sentence_lengths) {
      const bool opens = token == packing.piece_starts.back();
      if (*sentence_lengths && used + (opens ? per_piece : 0) + *sentence_lengths > capacity) close_block();
      for (int64_t left = *sentence_lengths; left > 0;) {
        if (token == packing.piece_starts.back()) used += per_piece;
        const int64_t taken = std::min(left, longest);
        token += taken;
        used += taken;
        left -= taken;
        if (left) close_block();
      }
    }
    close_piece();
  }
  close_block();
  return packing;
}

}  // namespace roberta_fast
