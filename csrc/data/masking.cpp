// Masking of one block: the same bits as roberta_fast/training/pretraining/masking.py, whose docstring defines them.
#include "cpu/philox.h"
#include "data/data.h"

namespace roberta_fast {
namespace {

constexpr int64_t IGNORED = -100;

// Baseline vectors: at four positions a call the draws cost less than what surrounds them.
using Four = Words<Baseline>;

struct Draws {
  Four select, kind, replacement;
};

ALWAYS_INLINE Draws draws_of(const Dropout& stream, int64_t first, uint32_t epoch, uint64_t index) {
  Four c[4] = {lane_numbers<Four>() + static_cast<uint32_t>(first), broadcast<Four>(static_cast<uint32_t>(index)),
               broadcast<Four>(epoch), broadcast<Four>(static_cast<uint32_t>(index >> 32))};
  philox<Baseline>(stream, c);
  return {c[0], c[1], c[2]};
}

}  // namespace

int64_t mask_tokens(int64_t* ids, int64_t* labels, int64_t length, const MaskingRule& rule, uint64_t seed, uint32_t epoch,
                    uint64_t index) {
  for (int64_t i = 0; i < length; ++i)
    if (ids[i] < 0 || ids[i] >= rule.vocabulary) return i;
  // Of a dropout's parts its key alone is used.
  const Dropout stream(0.0, static_cast<int64_t>(seed));
  uint32_t smallest = 0;
  int64_t likeliest = -1;
  bool any = false, selected = false, after_special = true;
  const auto replace = [&](int64_t i, uint32_t kind, uint32_t replacement) {
    labels[i] = ids[i];
    if (kind < rule.mask_below)
      ids[i] = rule.mask_id;
    else if (kind < rule.random_below)
      ids[i] = rule.replacements[(static_cast<uint64_t>(replacement) * static_cast<uint64_t>(rule.replacement_count)) >> 32];
  };
  for (int64_t first = 0; first < length; first += Baseline::WIDTH) {
    const Draws draws = draws_of(stream, first, epoch, index);
    for (int64_t lane = 0; lane < Baseline::WIDTH && first + lane < length; ++lane) {
      const int64_t i = first + lane;
      const uint8_t kind = rule.kinds[ids[i]];
      labels[i] = IGNORED;
      if (kind & SPECIAL) {
        after_special = true;
        continue;
      }
      if (!rule.whole_words || !(kind & CONTINUES) || after_special) {
        const uint32_t draw = draws.select[lane];
        selected = draw < rule.select_below;
        if (likeliest < 0 || draw < smallest) {
          smallest = draw;
          likeliest = i;
        }
      }
      after_special = false;
      any |= selected;
      if (selected) replace(i, draws.kind[lane], draws.replacement[lane]);
    }
  }
  if (any || likeliest < 0) return -1;
  for (int64_t i = likeliest; i < length; ++i) {
    if (i > likeliest && !(rule.whole_words && (rule.kinds[ids[i]] & CONTINUES))) break;
    const Draws draws = draws_of(stream, i, epoch, index);
    replace(i, draws.kind[0], draws.replacement[0]);
  }
  return -1;
}

}  // namespace roberta_fast
