"""Spans are seqeval's; entities are those of Hugging Face's pipeline on a real tokenizer and text."""

import importlib.resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, pipeline

from roberta_fast.tasks.token_classification import TokenTags, entities_of, spans_of, tags_of
from roberta_fast.tasks.windows import Windower

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = (importlib.resources.files("roberta_fast") / "sentences.txt").read_text(encoding="utf-8").splitlines()[:40]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Small and random: its tags change often, also within words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(LABELS)), initializer_range=0.4, **sizes)
    return BertForTokenClassification(config).eval()


def tags_by(model, windows):
    with torch.inference_mode():
        return [model(torch.tensor([w.input_ids])).logits[0].numpy() for w in windows]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER I-PER B-PER I-PER I-LOC", [("PER", 0, 2), ("PER", 2, 4), ("LOC", 4, 5)]),
        ("S-PER B-LOC I-LOC E-LOC E-LOC", [("PER", 0, 1), ("LOC", 1, 4), ("LOC", 4, 5)]),
        ("U-PER B-LOC I-LOC L-LOC", [("PER", 0, 1), ("LOC", 1, 4)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),
        ("DET NOUN NOUN O", [("DET", 0, 1), ("NOUN", 1, 3)]),
        ("", []),
    ],
    ids=["IOB2", "two in a row", "IOB1", "IOBES", "BILOU", "hyphens in labels", "no prefixes", "no tags"],
)
def test_spans_by_hand(tags, spans):
    assert spans_of(tags.split()) == spans


@given(st.lists(st.sampled_from(["O", *(f"{kind}-{label}" for kind in "BIES" for label in ("PER", "LOC"))]), max_size=12))
def test_spans_are_those_of_seqeval(tags):
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    assert spans_of(tags) == [(label, begin, last + 1) for label, begin, last in get_entities(tags)]


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_entities_are_those_of_the_pipeline(strategy, tokenizer, model):
    theirs = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy)
    windows = Windower(tokenizer, 128, 0).of_texts(SENTENCES)
    found = 0
    for i, (window, logits) in enumerate(zip(windows, tags_by(model, windows), strict=True)):
        got = entities_of(SENTENCES[i], tags_of([window], [logits]), model.config.id2label, strategy)
        wanted = theirs(SENTENCES[i])
        label = "entity" if strategy == "none" else "entity_group"
        assert [(e.label, e.start, e.end) for e in got] == [(e[label], e["start"], e["end"]) for e in wanted]
        np.testing.assert_allclose([e.score for e in got], [e["score"] for e in wanted], rtol=1e-5)
        assert all(e.word == SENTENCES[i][e.start : e.end] for e in got)
        found += len(got)
    assert found > 100


def test_the_strategies_differ(tokenizer, model):
    """What the test above compares is not the same whichever strategy is taken."""
    windows = Windower(tokenizer, 128, 0).of_texts(SENTENCES)
    results = set()
    for strategy in ("none", "simple", "first", "average", "max"):
        entities = [
            entities_of(SENTENCES[w.example], tags_of([w], [logits]), model.config.id2label, strategy)
            for w, logits in zip(windows, tags_by(model, windows), strict=True)
        ]
        results.add(str(entities))
    assert len(results) == 5


def test_strategies_by_hand():
    probabilities = np.array([[0.0, 0.6, 0.4], [0.1, 0.0, 0.9], [0.2, 0.8, 0.0]])
    tokens = TokenTags(probabilities, [(0, 2), (2, 4), (5, 7)], [0, 0, 1])
    id2label = {0: "O", 1: "I-PER", 2: "I-LOC"}

    def found(strategy):
        return [(e.label, round(e.score, 6), e.word) for e in entities_of("abcd ef", tokens, id2label, strategy)]

    assert found("simple") == [("PER", 0.6, "ab"), ("LOC", 0.9, "cd"), ("PER", 0.8, "ef")]
    assert found("first") == [("PER", 0.7, "abcd ef")]
    assert found("average") == [("LOC", 0.65, "abcd"), ("PER", 0.8, "ef")]
    assert found("max") == [("LOC", 0.9, "abcd"), ("PER", 0.8, "ef")]
    assert found("none") == [("I-PER", 0.6, "ab"), ("I-LOC", 0.9, "cd"), ("I-PER", 0.8, "ef")]


def test_a_long_text_in_windows(tokenizer, model):
    """Each token is taken from the window that holds most around it, once."""
    text = " ".join(SENTENCES)
    (whole,) = Windower(tokenizer, 10**6, 0).of_texts([text])
    windows = Windower(tokenizer, 64, 31).of_texts([text])
    marks = [np.eye(len(windows))[[i] * len(w.input_ids)] * 50.0 for i, w in enumerate(windows)]  # the label is the window
    tokens = tags_of(windows, marks)
    assert tokens.offsets == whole.offsets and tokens.words == whole.words
    chosen = tokens.probabilities.argmax(axis=1)
    assert (np.diff(chosen) >= 0).all() and set(chosen) == set(range(len(windows)))
    for token, index in enumerate(chosen):
        window = windows[index]
        inside = token - window.first
        if 0 < index < len(windows) - 1:
            assert min(inside, len(window.offsets) - 1 - inside) >= 15, "half of what neighbours share"


def test_white_space_is_no_token():
    """SentencePiece has tokens of white space alone; they neither make an entity nor end one."""
    from roberta_fast.tasks.windows import Window

    window = Window(0, [1, 5, 6, 7, 2], None, 1, 0, [(0, 1), (2, 2), (2, 3)], [0, 1, 2], 0)
    logits = np.array([[0, 0], [0, 9], [9, 0], [0, 9], [0, 0]], dtype=np.float32)
    (entity,) = entities_of("a b", tags_of([window], [logits]), {0: "O", 1: "I-PER"})
    assert entity[2:] == ("a b", 0, 3)


def test_an_empty_text(tokenizer, model):
    windows = Windower(tokenizer, 128, 0).of_texts([""])
    assert entities_of("", tags_of(windows, tags_by(model, windows)), model.config.id2label) == []


def test_bad_arguments(tokenizer, model):
    windows = Windower(tokenizer, 128, 0).of_texts(["Old Marley was dead."])
    tokens = tags_of(windows, tags_by(model, windows))
    with pytest.raises(ValueError, match="aggregation_strategy='last' is not one of"):
        entities_of("Old Marley was dead.", tokens, model.config.id2label, "last")
    with pytest.raises(ValueError, match=r"logits must be \[\d+, labels\] as their window, got \[2, 5\]"):
        tags_of(windows, [np.ones((2, 5))])
    with pytest.raises(ValueError, match="each with its logits, got 1 and 0"):
        tags_of(windows, [])
