"""Windows are those of Hugging Face's tokenizers; answers are found by hand, by brute force, and in any Unicode."""

import copy
import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, RobertaTokenizerFast

from roberta_fast.tasks.question_answering import Answer, best_answers, windows_of
from roberta_fast.tasks.windows import TooLong, Window, Windower

QUESTION = "Who wrote the Christmas Carol?"
CONTEXT = (
    "A Christmas Carol is a novella by Charles Dickens, first published in London in 1843. It recounts the story of Ebenezer "
    "Scrooge, an elderly miser who is visited by the ghost of his former business partner Jacob Marley.  \r\n\tBefore that, "
    "Dickens had written e\u0301clairs of 👩‍👩‍👧 prose: “naïve”, co\u0302te\u0301, 北京 and 𝔘𝔫𝔦code \u200b\x00 too."
)


@pytest.fixture(scope="module")
def wordpiece(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """RoBERTa's kind of tokenizer, with merges learnt from the text of these tests."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("bpe")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [QUESTION, CONTEXT] * 3, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    trained.save_model(str(folder))
    return RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(params=["wordpiece", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("max_length", "doc_stride"), [(384, 128), (64, 16), (60, 0), (128, 40)])
def test_windows_are_those_of_the_tokenizer(tokenizer, max_length, doc_stride):
    questions, contexts = [QUESTION, "Where?", "When, then?"], [CONTEXT, "In London.", CONTEXT * 3]
    theirs = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
    )
    ours = windows_of(tokenizer, questions, contexts, max_length, doc_stride)
    assert [w.input_ids for w in ours] == theirs["input_ids"]
    assert [w.example for w in ours] == theirs["overflow_to_sample_mapping"]
    if "token_type_ids" in tokenizer.model_input_names:
        assert [w.token_type_ids for w in ours] == theirs["token_type_ids"]
    for i, window in enumerate(ours):
        inside = [place for place, owner in enumerate(theirs.sequence_ids(i)) if owner == 1]
        assert inside == list(range(window.place, window.place + len(window.offsets)))
        assert [theirs.word_ids(i)[place] for place in inside] == window.words


@pytest.mark.parametrize("truncation_side", ["right", "left"])
@pytest.mark.parametrize("max_length", [12, 31, 40, 500])
def test_one_window_each_is_truncated_as_by_the_tokenizer(tokenizer, max_length, truncation_side):
    texts = [(CONTEXT, QUESTION), (QUESTION, CONTEXT), (CONTEXT, CONTEXT[:300]), (CONTEXT,), (QUESTION,), ("", CONTEXT)]
    windows = Windower(tokenizer, max_length).one_each(texts, truncation_side)
    theirs = copy.deepcopy(tokenizer)  # it keeps its truncation
    theirs.truncation_side = truncation_side
    wanted = [theirs(*parts, truncation="longest_first", max_length=max_length) for parts in texts]
    assert [w.input_ids for w in windows] == [encoding["input_ids"] for encoding in wanted]
    with pytest.raises(TooLong, match=r"text 0 must have at most 12 tokens, special ones included, got \d+"):
        Windower(tokenizer, 12).one_each(texts)


def test_windows_within_a_limit(tokenizer):
    tokens = sum(len(w.input_ids) for w in Windower(tokenizer, 64, 8).of_pairs([QUESTION], [CONTEXT]))
    assert Windower(tokenizer, 64, 8, max_tokens=tokens).of_pairs([QUESTION], [CONTEXT])
    with pytest.raises(TooLong, match=f"in windows of 64 that overlap by 8 there are over {tokens - 1} tokens"):
        Windower(tokenizer, 64, 8, max_tokens=tokens - 1).of_pairs([QUESTION], [CONTEXT])


def test_every_span_is_what_the_context_holds(tokenizer):
    """Each token's characters are in the context as given, without white space around, and a mark stays with its letter."""
    (window,) = windows_of(tokenizer, [QUESTION], [CONTEXT])
    pieces = [CONTEXT[start:end] for start, end in window.offsets]
    assert all(piece == piece.strip() for piece in pieces)
    assert not any(CONTEXT[end : end + 1] in ("\u0301", "\u0302") for start, end in window.offsets if start < end)
    for answer in ("Charles Dickens", "e\u0301clairs", "👩‍👩‍👧", "“naïve”", "co\u0302te\u0301", "北京", "𝔘𝔫𝔦code"):
        start = CONTEXT.index(answer)
        first, last = window.token_span(start, start + len(answer))
        assert first > window.cls_index
        found = best_answers(CONTEXT, [window], [one_hot(window, first)], [one_hot(window, last)]).answers[0]
        assert CONTEXT[found.start : found.end] == found.answer and answer in found.answer
        assert found.answer == answer or len(found.answer.split()) == len(answer.split()), "no more than the word itself"


def one_hot(window, place):
    logits = np.full(len(window.input_ids), -9.0, dtype=np.float32)
    logits[place] = 9.0
    return logits


def test_an_answer_outside_a_window_is_at_its_classification_token(wordpiece):
    windows = windows_of(wordpiece, [QUESTION], [CONTEXT], 48, 8)
    start = CONTEXT.index("Jacob Marley")
    spans = [w.token_span(start, start + len("Jacob Marley")) for w in windows]
    held = [wordpiece.decode(w.input_ids[a : b + 1]) for w, (a, b) in zip(windows, spans, strict=True) if a]
    assert set(held) == {"jacob marley"} and (0, 0) in spans


def by_hand(logits_of_windows):
    """Windows of one-character tokens "abcdef...", two special tokens before and one behind."""
    windows, starts, ends = [], [], []
    for first, start, end in logits_of_windows:
        size = len(start) - 3
        offsets = [(i, i + 1) for i in range(first, first + size)]
        windows.append(Window(0, [0] * len(start), None, 2, first, offsets, list(range(first, first + size)), 0))
        starts.append(np.array(start, dtype=np.float32))
        ends.append(np.array(end, dtype=np.float32))
    return windows, starts, ends


def test_answers_computed_by_hand():
    windows, starts, ends = by_hand(
        [
            (0, [1, 9, 0, 2, 0, 9], [1, 9, 0, 0, 3, 9]),  # "abc": b..c has 5; special tokens have more and are no answer
            (2, [0, 9, 0, 4, 0, 9], [2, 9, 0, 0, 0, 9]),  # "cde": d..d and d..e have 4
        ]
    )
    answers, null_odds = best_answers("abcde", windows, starts, ends, top_k=4)
    assert [(a.answer, a.start, a.end, a.logit) for a in answers[:3]] == [("bc", 1, 3, 5), ("d", 3, 4, 4), ("de", 3, 5, 4)]
    # All spans once: c alone is in both windows, and counts with the 3 that the first gives it.
    logits = [0, 0, 3, 2, 5, 3, 4, 4, 0, 0, 0]
    assert answers[0].score == pytest.approx(np.exp(5) / np.exp(logits).sum(), rel=1e-6)
    assert null_odds == 2 - 5


def test_no_answer_by_hand():
    windows, starts, ends = by_hand([(0, [3, 0, 0, 1, 0], [3, 0, 0, 1, 0]), (2, [2, 0, 0, 0, 0], [2, 0, 0, 0, 0])])
    options = {"handle_impossible_answer": True, "top_k": 2}
    answers, null_odds = best_answers("abcd", windows, starts, ends, **options)
    assert null_odds == 2 and answers[0] == Answer("", answers[0].score, 0, 0, 4.0), "the least of the windows' counts"
    logits = [4, 0, 2, 1, 0, 0, 0]  # none, then a, b, ab, c, d, cd
    assert answers[0].score == pytest.approx(np.exp(4) / np.exp(logits).sum(), rel=1e-6)
    answers, _ = best_answers("abcd", windows, starts, ends, **options, null_threshold=2.0)
    assert [a.answer for a in answers] == ["b", ""], "2 is not more than 2"
    answers, _ = best_answers("abcd", windows, starts, ends)
    assert answers[0].answer == "b"


def test_a_context_without_tokens(wordpiece):
    (window,) = windows_of(wordpiece, [QUESTION], [" \u200b "])
    logits = [np.ones(len(window.input_ids))]
    assert best_answers("", [window], logits, logits).answers == []
    assert best_answers("", [window], logits, logits, handle_impossible_answer=True).answers == [Answer("", 1.0, 0, 0, 2.0)]


def brute_force(context, windows, starts, ends, top_k, longest):
    """The same by plain loops over characters' spans."""
    best = {}
    for window, s, e in zip(windows, starts, ends, strict=True):
        tokens = range(len(window.offsets))
        for i, j in itertools.product(tokens, tokens):
            if i <= j < i + longest and all(window.offsets[k][0] < window.offsets[k][1] for k in (i, j)):
                span = (window.first + i, window.first + j, window.offsets[i][0], window.offsets[j][1])
                best[span] = max(best.get(span, -np.inf), float(s[window.place + i]) + float(e[window.place + j]))
    total = sum(np.exp(list(best.values())))
    found = {}
    for (*_, start, end), logit in sorted(best.items(), key=lambda item: (-item[1], item[0])):
        found.setdefault((start, end), (context[start:end], np.exp(logit) / total, start, end, logit))
    return list(found.values())[:top_k]


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_brute_force(tokenizer, seed):
    draw = random.Random(seed)
    windows = windows_of(tokenizer, [QUESTION], [CONTEXT], draw.choice([48, 64, 200]), draw.choice([0, 8]))
    numbers = np.random.default_rng(seed)
    starts, ends = ([numbers.normal(0, 3, len(w.input_ids) + 5).astype(np.float32) for w in windows] for _ in range(2))
    top_k, longest = draw.choice([1, 5, 50]), draw.choice([1, 7, 400])
    got = best_answers(CONTEXT, windows, starts, ends, top_k=top_k, max_answer_length=longest).answers
    wanted = brute_force(CONTEXT, windows, starts, ends, top_k, longest)
    assert [a[:1] + a[2:] for a in got] == [w[:1] + w[2:] for w in wanted]
    np.testing.assert_allclose([a.score for a in got], [w[1] for w in wanted], rtol=1e-9)


def test_answers_grow_to_whole_words(wordpiece):
    context = "the embeddings there"
    (window,) = windows_of(wordpiece, ["What?"], [context])
    pieces = [i for i, word in enumerate(window.words) if word == 1]
    assert len(pieces) > 1, "the word is in pieces"
    start, end = one_hot(window, window.place + pieces[-1]), one_hot(window, window.place + pieces[-1])
    assert best_answers(context, [window], [start], [end]).answers[0].answer != "embeddings"
    answers = best_answers(context, [window], [start], [end], align_to_words=True, top_k=9).answers
    assert answers[0].answer == "embeddings" and len({(a.start, a.end) for a in answers}) == len(answers)


@given(
    context=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
    seed=st.integers(0, 99),
    max_length=st.integers(16, 64),
)
def test_any_text(checkpoint, context, seed, max_length):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if not any_text_tokenizers else any_text_tokenizers[0]
    any_text_tokenizers[:] = [tokenizer]
    windows = windows_of(tokenizer, ["Why?"], [context], max_length, 4)
    numbers = np.random.default_rng(seed)
    logits = [[numbers.normal(size=len(w.input_ids)) for w in windows] for _ in range(2)]
    for answer in best_answers(context, windows, *logits, top_k=3).answers:
        assert context[answer.start : answer.end] == answer.answer != ""
        assert 0 < answer.score <= 1


any_text_tokenizers = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": ["why " * 60]}, r"text 0: a first text of 60 tokens leaves 1 places in windows of max_length=64, and 8"),
        ({"contexts": ["a", "b"]}, "as many first texts as second ones, got 1 and 2"),
        ({"contexts": ["x\ud800"]}, "text 1 holds a lone surrogate at character 1"),
        ({"contexts": [None]}, "text 1 must be a str, got NoneType"),
        ({"max_length": 0}, "max_length=0 is not a whole number from 1 on"),
        ({"doc_stride": -1}, "stride=-1 is not a whole number from 0 on"),
    ],
)
def test_bad_windows(wordpiece, change, message):
    given = {"questions": ["Who?"], "contexts": [CONTEXT], "max_length": 64, "doc_stride": 8} | change
    with pytest.raises(ValueError, match=message):
        windows_of(wordpiece, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0 is not"),
        ({"max_answer_length": 0}, "max_answer_length=0 is not"),
        ({"windows": []}, "those of one question"),
        ({"end_logits": []}, "for each of 1 windows, got 1 and 0"),
        ({"start_logits": [np.ones(3)]}, r"start_logits\[0\] must be \[\d+\] as its window, got \[3\]"),
    ],
)
def test_bad_arguments(wordpiece, change, message):
    windows = windows_of(wordpiece, ["Who?"], [CONTEXT])
    logits = [np.ones(len(windows[0].input_ids))]
    with pytest.raises(ValueError, match=message):
        best_answers(CONTEXT, **({"windows": windows, "start_logits": logits, "end_logits": logits} | change))
