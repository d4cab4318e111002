"""Masking: C++ is bitwise numpy, the draws have the rates that were asked for, and nothing special is ever touched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling

from roberta_fast import dispatch
from roberta_fast.training.bpe import byte_level_bpe
from roberta_fast.training.pretraining.masking import (
    CONTINUES,
    IGNORED,
    SPECIAL,
    MaskingRule,
    continuing,
    mask,
    mask_ref,
    masking_rule,
)

VOCABULARY, MASK = 1000, 999
WORDS = 1 << 32


def rule_of(probability=0.15, replaced=0.8, randomized=0.1, whole_words=False):
    """Ids 0 to 3 and the last are special; with whole words every third id continues one."""
    kinds = np.zeros(VOCABULARY, dtype=np.uint8)
    if whole_words:
        kinds[::3] = CONTINUES
    kinds[[0, 1, 2, 3, MASK]] = SPECIAL
    below = tuple(round(share * WORDS) for share in (probability, replaced, replaced + randomized))
    return MaskingRule(below, MASK, np.flatnonzero(kinds != SPECIAL).astype(np.int64), kinds, whole_words)


def block(length, seed=0, specials=0.05):
    generator = np.random.default_rng(seed)
    ids = generator.integers(4, MASK, length)
    return np.where(generator.random(length) < specials, 2, ids)


@pytest.fixture
def without_extension(monkeypatch):
    """Takes the fallback, as an install without a compiler does."""
    return lambda: monkeypatch.setattr(dispatch, "load_cpp", lambda: "absent")


@given(
    length=st.integers(0, 700),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**32 - 1),
    index=st.integers(0, 2**63 - 1),
    probability=st.sampled_from([1e-9, 0.15, 0.3, 0.999]),
    whole_words=st.booleans(),
    specials=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_the_extension_is_bitwise_numpy(length, seed, epoch, index, probability, whole_words, specials):
    if dispatch.load_cpp():
        pytest.skip(dispatch.load_cpp())
    rule, ids = rule_of(probability, whole_words=whole_words), block(length, seed % 97, specials)
    before = ids.copy()
    masked, labels = mask(ids, rule, seed, epoch, index)
    wanted, wanted_labels = mask_ref(ids, rule, seed, epoch, index)
    assert np.array_equal(masked, wanted) and np.array_equal(labels, wanted_labels)
    assert np.array_equal(ids, before), "what came in is left as it is"


def test_without_the_extension_it_is_the_same(without_extension):
    with_it = mask(block(500), rule_of(), 1, 2, 3)
    without_extension()
    without = mask(block(500), rule_of(), 1, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(with_it, without, strict=True))


def many(rule, blocks=400, length=510, ids=None):
    """(ids, masked, labels) of many blocks, each [blocks, length]."""
    ids = np.stack([block(length, i) for i in range(blocks)]) if ids is None else ids
    masked, labels = zip(*(mask(row, rule, 11, 0, i) for i, row in enumerate(ids)), strict=True)
    return ids, np.stack(masked), np.stack(labels)


@pytest.mark.parametrize(("probability", "replaced", "randomized"), [(0.15, 0.8, 0.1), (0.3, 0.8, 0.1), (0.4, 1.0, 0.0)])
def test_rates(probability, replaced, randomized):
    """Within five standard deviations of what was asked for."""
    ids, masked, labels = many(rule_of(probability, replaced, randomized))
    ordinary, selected = ids != 2, labels != IGNORED

    def check(rate, expected, count):
        assert abs(rate - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)

    check(selected.sum() / ordinary.sum(), probability, ordinary.sum())
    check((masked[selected] == MASK).mean(), replaced, selected.sum())
    changed = (masked[selected] != MASK) & (masked[selected] != ids[selected])
    # A random token may be the one that was there.
    check(changed.mean(), randomized * (1 - 1 / (VOCABULARY - 5)), selected.sum())
    assert np.array_equal(labels[selected], ids[selected]), "the label is what stood there"
    assert np.array_equal(masked[~selected], ids[~selected])


def test_selection_does_not_depend_on_the_place():
    """Each position and each pair of neighbours is selected as often as the others (chi-squared, 99.99%)."""
    rule = rule_of(0.3)
    _, _, labels = many(rule, blocks=3000, length=64, ids=np.full((3000, 64), 7))
    selected = labels != IGNORED
    expected = 3000 * 0.3
    chi = ((selected.sum(0) - expected) ** 2 / (expected * 0.7)).sum()
    assert chi < 64 + 4 * np.sqrt(2 * 64) + 16, chi
    together = (selected[:, 1:] & selected[:, :-1]).mean()
    assert abs(together - 0.09) < 5 * np.sqrt(0.09 * 0.91 / (3000 * 63))


def test_random_tokens_are_uniform_and_ordinary():
    rule = rule_of(0.9, 0.0, 1.0)
    _, masked, labels = many(rule)
    drawn = masked[labels != IGNORED]
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[rule.kinds == SPECIAL].sum() == 0
    ordinary = counts[rule.kinds != SPECIAL]
    chi = ((ordinary - ordinary.mean()) ** 2 / ordinary.mean()).sum()
    assert chi < len(ordinary) + 5 * np.sqrt(2 * len(ordinary)), chi


def test_special_tokens_are_never_selected():
    ids, masked, labels = many(rule_of(0.999))
    assert (labels[ids == 2] == IGNORED).all() and (masked[ids == 2] == 2).all()
    only_special = np.array([0, 2, 2, 1])
    masked, labels = mask(only_special, rule_of(0.999), 0, 0, 0)
    assert np.array_equal(masked, only_special) and (labels == IGNORED).all()


def test_each_key_draws_anew_and_the_same_key_again():
    rule, ids = rule_of(), block(510)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1 << 32), (1 << 32, 0, 0)]
    drawn = [tuple(mask(ids, rule, *key)[1]) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [tuple(mask(ids, rule, *key)[1]) for key in keys]


def test_a_block_always_has_a_label():
    """Where no draw selects, the smallest one does; without that rule, most blocks of three tokens would have none."""
    rule = rule_of(0.01)
    counts = [(mask(np.array([0, 7, 8, 9, 2]), rule, 0, 0, i)[1] != IGNORED).sum() for i in range(500)]
    assert min(counts) == 1 and max(counts) <= 2


def test_words_are_selected_as_a_whole():
    rule = rule_of(0.3, whole_words=True)
    ids, _, labels = many(rule, blocks=100)
    selected = labels != IGNORED
    continues = (rule.kinds[ids] == CONTINUES) & (np.roll(ids, 1, 1) != 2)
    continues[:, 0] = False
    assert continues.sum() > 5000
    assert np.array_equal(selected[continues], np.roll(selected, 1, 1)[continues])
    words = (ids != 2) & ~continues
    assert abs(selected[words].mean() - 0.3) < 5 * np.sqrt(0.21 / words.sum())
    alone = many(rule_of(0.3), blocks=100)[2] != IGNORED
    assert not np.array_equal(alone[continues], np.roll(alone, 1, 1)[continues]), "the test can fail"


@pytest.mark.parametrize(("tokens", "wanted"), [
    (["<s>", "the", "Ġcat", "s", "Ċ"], [True, True, False, True, False]),
    (["[CLS]", "cat", "##s"], [False, False, True]),
    (["<s>", "▁cat", "s"], [True, False, True]),
], ids=["byte-level BPE", "WordPiece", "SentencePiece"])  # fmt: skip
def test_what_continues_a_word(tokens, wanted):
    assert continuing(tokens).tolist() == wanted


def test_words_need_a_vocabulary_that_tells_them():
    with pytest.raises(ValueError, match="whole words cannot be told"):
        continuing(["a", "b"])


def test_as_often_as_the_collator_of_hugging_face():
    """The same shares of tokens masked, random and kept, of a real tokenizer's ids, within five standard deviations."""
    tokenizer = byte_level_bpe(["a small text of some words, which is read once more"] * 4, 300)
    ids = np.tile(tokenizer("a small text of some words " * 30)["input_ids"], (200, 1))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)
    theirs = collator([{"input_ids": row} for row in ids.tolist()])
    ours = many(masking_rule(tokenizer), ids=ids)
    shares = []
    for masked, labels in ((theirs["input_ids"].numpy(), theirs["labels"].numpy()), ours[1:]):
        selected = labels != IGNORED
        is_mask = masked[selected] == tokenizer.mask_token_id
        shares.append((selected.mean(), is_mask.mean(), (masked[selected] == ids[selected]).mean(), selected.sum()))
    for ours_share, their_share, count in zip(shares[1], shares[0], (ids.size, shares[0][3], shares[0][3]), strict=False):
        assert abs(ours_share - their_share) < 5 * np.sqrt(2 * their_share * (1 - their_share) / count)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
    ({"epoch": 1 << 32}, r"epoch must be in \[0, 2\*\*32\), got 4294967296"),
    ({"index": -5}, r"index must be in \[0, 2\*\*63\), got -5"),
    ({"ids": np.array([5, VOCABULARY])}, "id 1000 is outside of the vocabulary of 1000"),
    ({"ids": np.array([-3])}, "id -3 is outside of the vocabulary of 1000"),
])  # fmt: skip
@pytest.mark.parametrize("extension", [True, False])
def test_wrong_arguments_are_named(arguments, message, extension, without_extension):
    if not extension:
        without_extension()
    with pytest.raises(ValueError, match=message):
        mask(**{"ids": block(9), "rule": rule_of(), "seed": 0, "epoch": 0, "index": 0, **arguments})


@pytest.mark.parametrize(("options", "message"), [
    ({"probability": 0.0}, "mlm_probability must be between 0 and 1, got 0.0"),
    ({"replaced": 0.9, "randomized": 0.2}, "mask_replace_prob=0.9 and random_replace_prob=0.2 must be"),
])  # fmt: skip
def test_wrong_shares_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        masking_rule(byte_level_bpe(["a text"], 300), **options)
