// Host-side work on the data of pretraining, for the module _C; roberta_fast/training/pretraining/ defines it in numpy.
#pragma once

#include <cstdint>
#include <vector>

namespace roberta_fast {

// Where pieces begin among the tokens, and where blocks begin among the pieces, each with the end behind the last.
struct Packing {
  std::vector<int64_t> piece_starts, block_starts;
};

// blocks.full_sentences_ref: sentence_lengths[sentences] tokens, document_sentences[documents] of them in each document.
Packing full_sentences(const uint32_t* sentence_lengths, const uint32_t* document_sentences, int64_t documents, int64_t capacity,
                       int64_t per_block, int64_t per_piece);

// The draws of one block, as masking.MaskingRule says; thresholds are of 32-bit words.
struct MaskingRule {
  uint64_t select_below, mask_below, random_below;
  int64_t mask_id;
  const int64_t* replacements;  // ids that a random token is drawn from
  int64_t replacement_count;
  const uint8_t* kinds;  // of each id: SPECIAL, or CONTINUES a word, or neither
  int64_t vocabulary;
  bool whole_words;
};
constexpr uint8_t SPECIAL = 1, CONTINUES = 2;

// masking.mask_ref: ids[length] in place, and their labels[length]. Returns the first position whose id is none of the
// vocabulary's, with nothing changed, or -1.
int64_t mask_tokens(int64_t* ids, int64_t* labels, int64_t length, const MaskingRule& rule, uint64_t seed, uint32_t epoch,
                    uint64_t index);

}  // namespace roberta_fast
