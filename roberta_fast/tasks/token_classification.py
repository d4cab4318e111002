"""Token classification: entities from tags, and from the logits of a text's tokens, with their characters in the text."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from roberta_fast.tasks.windows import Window

STRATEGIES = ("none", "simple", "first", "average", "max")
_TAG = re.compile(r"([BIESLU])-(.+)", re.DOTALL)
_KINDS = {"L": "E", "U": "S"}  # BILOU's names of IOBES' tags


class Span(NamedTuple):
    """An entity among tags: ``tags[begin:end]``."""

    label: str
    begin: int
    end: int


class Entity(NamedTuple):
    """An entity in a text, ``text[start:end] == word``. score: the mean probability of its tokens' or words' labels."""

    label: str
    score: float
    word: str
    start: int
    end: int


class TokenTags(NamedTuple):
    """A text's tokens, those of all its windows once each, without those of white space alone.

    probabilities: float64 [tokens, labels]. offsets: (start, end) of each in characters. words: the word that each is a piece of.
    """

    probabilities: np.ndarray
    offsets: list[tuple[int, int]]
    words: list[int | None]


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The entities of a sequence of tags in BIO (IOB1, IOB2), IOBES or BILOU: those that seqeval and conlleval find in it.

    An entity ends where its label does, and a tag that continues none begins one. A tag without a prefix, such as ``"NOUN"``,
    continues a neighbour of the same kind.
    """
    spans, begin = [], 0
    kinds = [("O", ""), *map(_kind_and_label, tags), ("O", "")]
    for i, (last, this) in enumerate(pairwise(kinds)):
        if _ends(last, this):
            spans.append(Span(last[1], begin, i))
        if _begins(last, this):
            begin = i
    return spans


def tags_of(windows: Sequence[Window], logits: Sequence[np.ndarray]) -> TokenTags:
    """The tokens of one text, each as seen in that of its windows where it has most context on its poorer side.

    windows: all of the text's. logits: one array [S, labels] for each window, or longer where it was padded.
    Raises ValueError where an array does not fit its window.
    """
    if not windows or len({w.example for w in windows}) > 1 or len(windows) != len(logits):
        raise ValueError(f"windows must be those of one text, each with its logits, got {len(windows)} and {len(logits)}")
    chosen = {}
    for window, array in zip(windows, logits, strict=True):
        size = len(window.offsets)
        if array.ndim != 2 or len(array) < len(window.input_ids):
            raise ValueError(f"logits must be [{len(window.input_ids)}, labels] as their window, got {list(array.shape)}")
        for i in range(size):
            token = (min(i, size - 1 - i), array[window.place + i], window.offsets[i], window.words[i])
            if window.first + i not in chosen or chosen[window.first + i][0] < token[0]:
                chosen[window.first + i] = token
    chosen = {i: token for i, token in chosen.items() if token[2][0] < token[2][1]}
    rows = np.array([row for _, row, _, _ in chosen.values()], dtype=np.float64).reshape(len(chosen), logits[0].shape[1])
    powers = np.exp(rows - rows.max(axis=1, keepdims=True, initial=-np.inf))
    return TokenTags(
        powers / powers.sum(axis=1, keepdims=True),
        [offset for _, _, offset, _ in chosen.values()],
        [word for _, _, _, word in chosen.values()],
    )


def entities_of(
    text: str,
    tokens: TokenTags,
    id2label: dict[int, str],
    strategy: str = "simple",
    ignore_labels: Sequence[str] = ("O",),
) -> list[Entity]:
    """The entities of ``text``, in order, by one of the strategies of Hugging Face's ``TokenClassificationPipeline``.

    strategy: ``"none"`` gives each token with its whole tag; the others join tokens as ``spans_of`` does. ``"simple"`` takes each
    token's own tag. The rest give all pieces of a word, by the tokenizer's division, one tag: that of its ``"first"`` piece, of
    their ``"average"`` probabilities, or of the piece with the ``"max"`` probability.
    Raises ValueError naming an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"aggregation_strategy={strategy!r} is not one of {STRATEGIES}")
    units = [  # (label, score, start, end)
        (*_best(tokens.probabilities[group], id2label, strategy), tokens.offsets[group[0]][0], tokens.offsets[group[-1]][1])
        for group in _groups(tokens.words, strategy)
    ]
    if strategy == "none":
        return [Entity(label, p, text[a:b], a, b) for label, p, a, b in units if label not in ignore_labels]
    entities = []
    for span in spans_of([label for label, *_ in units]):
        inside = units[span.begin : span.end]
        start, end = inside[0][2], inside[-1][3]
        entities.append(Entity(span.label, sum(p for _, p, _, _ in inside) / len(inside), text[start:end], start, end))
    return [entity for entity in entities if entity.label not in ignore_labels]


def _kind_and_label(tag):
    if tag == "O":
        return "O", ""
    match = _TAG.fullmatch(tag)
    return (_KINDS.get(match[1], match[1]), match[2]) if match else ("I", tag)


def _ends(last, this):
    """Whether an entity that ``last`` is in ends with it."""
    if last[0] == "O":
        return False
    return last[0] in "ES" or this[0] in "BSO" or last[1] != this[1]


def _begins(last, this):
    """Whether an entity begins with ``this``."""
    if this[0] == "O":
        return False
    return this[0] in "BS" or last[0] in "ESO" or last[1] != this[1]


def _groups(words, strategy):
    """The tokens' numbers, those of a word together where the strategy decides by words."""
    groups = []
    for i, word in enumerate(words):
        if strategy not in ("none", "simple") and groups and word is not None and words[i - 1] == word:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _best(probabilities, id2label, strategy):
    """The label that stands for the pieces of a word, and its probability. probabilities: [pieces, labels]."""
    if strategy == "average":
        row = probabilities.mean(axis=0)
    elif strategy == "max":
        row = probabilities[probabilities.max(axis=1).argmax()]
    else:
        row = probabilities[0]
    return id2label[int(row.argmax())], float(row.max())
