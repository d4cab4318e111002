"""Dynamic masking as a function of (seed, epoch, index, position): no state, so that a resumed run draws as an unbroken one.

One call of Philox4x32-10 (``ops/dropout.py``) with the seed as key and the counter (position, index's low word, epoch, index's
high word) gives a token three 32-bit draws. The first selects it where it is below p * 2**32. By the second a selected token
becomes ``<mask>`` (80%), another ordinary token (10%, which one by the third), or stays as it is (10%); these are the tokens that
have labels (BERT, Devlin et al. 2018, section 3.1; anew in every epoch as in RoBERTa, Liu et al. 2019, section 4.1).

Special tokens are never selected and never drawn. With whole words, the draw of a word's first token selects all of it; what
becomes of each token is its own draw, as in BERT's whole-word models. A block in which nothing is selected gives up the token
with the smallest draw, so that every block has a label.
"""

from typing import NamedTuple

import numpy as np

from roberta_fast import dispatch
from roberta_fast.ops.dropout import philox

IGNORED = -100
SPECIAL, CONTINUES = np.uint8(1), np.uint8(2)
_WORDS = 1 << 32


class MaskingRule(NamedTuple):
    """How a block is masked.

    below: the thresholds of the first draw (selected), and of the second (``<mask>``, and random tokens), in [0, 2**32].
    mask_id: of ``<mask>``. replacements: int64 [R], the ids of ordinary tokens. kinds: uint8 [V], ``SPECIAL`` for ids that are
    never masked, ``CONTINUES`` for those that continue a word, 0 for others. whole_words: whether words are selected as a whole.
    """

    below: tuple[int, int, int]
    mask_id: int
    replacements: np.ndarray
    kinds: np.ndarray
    whole_words: bool


def masking_rule(
    tokenizer, probability: float = 0.15, replaced: float = 0.8, randomized: float = 0.1, whole_words: bool = False
) -> MaskingRule:
    """The rule for the vocabulary of a Hugging Face ``tokenizer``.

    probability: of a token to be selected. replaced, randomized: the shares of these that become ``<mask>``, and a random token.
    Raises ValueError naming a probability outside of its range, or a tokenizer without ``<mask>``.
    """
    if not 0.0 < probability < 1.0:
        raise ValueError(f"mlm_probability must be between 0 and 1, got {probability}")
    if min(replaced, randomized) < 0.0 or replaced + randomized > 1.0:
        raise ValueError(
            f"mask_replace_prob={replaced} and random_replace_prob={randomized} must be at least 0 and at most 1 together"
        )
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no mask token")
    kinds = np.zeros(len(tokenizer), dtype=np.uint8)
    if whole_words:
        kinds[continuing(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))] = CONTINUES
    kinds[[i for i in tokenizer.all_special_ids if i < len(kinds)]] = SPECIAL
    ordinary = np.flatnonzero(kinds != SPECIAL).astype(np.int64)
    if not len(ordinary):
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has special tokens only")
    shares = (probability, replaced, replaced + randomized)
    return MaskingRule(tuple(round(share * _WORDS) for share in shares), tokenizer.mask_token_id, ordinary, kinds, whole_words)


def continuing(tokens: list[str]) -> np.ndarray:
    """Which ``tokens`` of a vocabulary continue a word, bool [V].

    WordPiece marks those that do, by ``##``; byte-level BPE and SentencePiece those that do not, by a space (``Ġ`` or ``▁``), and
    there punctuation right behind a word belongs to it, as in fairseq. Raises ValueError for a vocabulary with neither mark.
    """
    if any(token.startswith("##") for token in tokens):
        return np.array([token.startswith("##") for token in tokens])
    # Line breaks and tabs, as byte-level BPE writes them, begin a word as a space does.
    starts = np.array([token.startswith(("Ġ", "▁", "Ċ", "ĉ", "č")) for token in tokens])
    if not starts.any():
        raise ValueError("whole words cannot be told: no token of the vocabulary begins with 'Ġ', '▁' or '##'")
    return ~starts


def mask(ids: np.ndarray, rule: MaskingRule, seed: int, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(masked ids, labels) of a block: labels are the ids where the model is to predict them, and -100 elsewhere.

    ids: int64 [N] with special tokens, not changed. seed and index, the block's number: in [0, 2**63). epoch: in [0, 2**32).
    Raises ValueError for an id outside of the vocabulary, or a seed or epoch outside of its range.
    """
    for name, value, bits in (("seed", seed, 63), ("epoch", epoch, 32), ("index", index, 63)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be in [0, 2**{bits}), got {value}")
    masked, labels = np.array(ids, dtype=np.int64), np.empty(len(ids), dtype=np.int64)
    if dispatch.load_cpp() is None:
        from roberta_fast._C import mask_tokens

        mask_tokens(masked, labels, seed, epoch, index, *rule)
        return masked, labels
    return mask_ref(masked, rule, seed, epoch, index)


def mask_ref(ids: np.ndarray, rule: MaskingRule, seed: int, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """``mask`` in numpy."""
    wrong = (ids < 0) | (ids >= len(rule.kinds))
    if wrong.any():
        raise ValueError(f"id {ids[wrong][0]} is outside of the vocabulary of {len(rule.kinds)}")
    # Arrays, as numpy warns where a product of scalars wraps.
    low, high, epoch = (np.array([word]) for word in (index & 0xFFFFFFFF, index >> 32, epoch))
    select, kind, replacement, _ = philox(seed, (np.arange(len(ids)), low, epoch, high))
    special = rule.kinds[ids] & SPECIAL != 0
    leads = ~special
    if rule.whole_words:
        behind_special = np.concatenate(([True], special[:-1]))
        leads &= (rule.kinds[ids] & CONTINUES == 0) | behind_special
    # The token whose draw speaks for each one: its word's first. Those before any such token are special.
    leader = np.maximum.accumulate(np.where(leads, np.arange(len(ids)), 0))
    below, masked_below, random_below = rule.below
    selected = ~special & (select[leader] < below)
    if not selected.any() and leads.any():
        likeliest = np.flatnonzero(leads)[select[leads].argmin()]
        selected = ~special & (leader == likeliest)
    labels = np.where(selected, ids, IGNORED)
    random = rule.replacements[(replacement * len(rule.replacements)) >> 32]
    masked = np.where(selected & (kind < random_below), random, ids)
    return np.where(selected & (kind < masked_below), rule.mask_id, masked), labels
