"""Extractive question answering: a context of any length in windows, and the best answers by the logits of all of them.

The answer's span is the one with the highest start + end logit of all windows, as in Devlin et al., "BERT" (2019), section 4.2;
whether there is none is decided as in section 4.3, by the logits of the classification token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from roberta_fast.tasks.windows import Window, Windower

MAX_LENGTH, DOC_STRIDE, MAX_ANSWER_LENGTH = 384, 128, 30


class Answer(NamedTuple):
    """A span of the context, ``context[start:end] == answer``; the empty one at 0 says that there is no answer.

    score: its probability among all spans, and no answer where that is allowed. logit: start + end logit.
    """

    answer: str
    score: float
    start: int
    end: int
    logit: float


class Prediction(NamedTuple):
    """The answers of one question, best first. null_odds: the logit of no answer less that of the best span, or None."""

    answers: list[Answer]
    null_odds: float | None


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int = MAX_LENGTH,
    doc_stride: int = DOC_STRIDE,
) -> list[Window]:
    """The windows of each (question, context), in order; ``Window.example`` says whose each is.

    max_length: tokens of a window, question and special ones included. doc_stride: tokens that neighbours share.
    Raises ValueError naming an argument, or the example whose question leaves no room for its context.
    """
    return Windower(tokenizer, max_length, doc_stride).of_pairs([question.strip() for question in questions], contexts)


def best_answers(
    context: str,
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    top_k: int = 1,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    handle_impossible_answer: bool = False,
    null_threshold: float = 0.0,
    align_to_words: bool = False,
) -> Prediction:
    """The ``top_k`` best answers of one question, no two of the same characters; fewer where there are fewer.

    windows: all of the question's. start_logits, end_logits: one array [S] for each window, or longer where it was padded.
    max_answer_length: in tokens. handle_impossible_answer: no answer counts too, by the least of the windows' logits for it, and
    comes before all spans where that exceeds the best of them by more than ``null_threshold``.
    align_to_words: answers take in the whole of the words that they begin and end in.
    Raises ValueError naming an argument that does not fit.
    """
    _check(windows, start_logits, end_logits, top_k, max_answer_length)
    spans = _span_logits(windows, start_logits, end_logits, max_answer_length)
    nulls = [float(s[w.cls_index]) + float(e[w.cls_index]) for w, s, e in zip(windows, start_logits, end_logits, strict=True)]
    best, null = spans.max(initial=-np.inf), min(nulls)
    top = max(best, null) if handle_impossible_answer else best
    total = np.exp(spans - top).sum() if np.isfinite(best) else 0.0
    if handle_impossible_answer:
        total += np.exp(null - top)
    answers = []
    for logit, start, end in _in_order(spans, windows, context, align_to_words, top_k):
        answers.append(Answer(context[start:end], float(np.exp(logit - top) / total), start, end, logit))
    if handle_impossible_answer:
        rank = sum(answer.logit + null_threshold >= null for answer in answers)
        answers.insert(rank, Answer("", float(np.exp(null - top) / total), 0, 0, null))
    return Prediction(answers[:top_k], null - float(best) if np.isfinite(best) else None)


def _check(windows, start_logits, end_logits, top_k, max_answer_length):
    for name, value in {"top_k": top_k, "max_answer_length": max_answer_length}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a whole number from 1 on")
    if not windows or len({w.example for w in windows}) > 1:
        raise ValueError(f"windows must be those of one question, got those of {sorted({w.example for w in windows})}")
    if not len(windows) == len(start_logits) == len(end_logits):
        counts = f"{len(start_logits)} and {len(end_logits)}"
        raise ValueError(f"start_logits and end_logits must have an array for each of {len(windows)} windows, got {counts}")
    for name, arrays in {"start_logits": start_logits, "end_logits": end_logits}.items():
        for i, (window, array) in enumerate(zip(windows, arrays, strict=True)):
            if array.ndim != 1 or len(array) < len(window.input_ids):
                raise ValueError(f"{name}[{i}] must be [{len(window.input_ids)}] as its window, got {list(array.shape)}")


def _span_logits(windows, start_logits, end_logits, longest):
    """float64 [tokens of the context, lengths]: the highest start + end logit of all windows that hold the span, else -inf."""
    count = max(w.first + len(w.offsets) for w in windows)
    spans = np.full((count, min(longest, max(len(w.offsets) for w in windows))), -np.inf)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        size = len(window.offsets)
        piece = slice(window.place, window.place + size)
        # White space alone neither begins an answer nor ends one.
        empty = np.array([low >= high for low, high in window.offsets], dtype=bool)
        starts, ends = (np.where(empty, -np.inf, np.asarray(x[piece], dtype=np.float64)) for x in (starts, ends))
        for length in range(1, min(longest, size) + 1):
            column = spans[window.first : window.first + size - length + 1, length - 1]
            np.maximum(column, starts[: size - length + 1] + ends[length - 1 :], out=column)
    return spans


def _in_order(spans, windows, context, align_to_words, count):
    """(logit, start, end) of the ``count`` best spans by their characters, best first."""
    offsets, words = {}, {}
    for window in windows:
        offsets.update(enumerate(window.offsets, window.first))
        words.update(enumerate(window.words, window.first))
    found, flat = {}, spans.ravel()
    candidates = min(flat.size, 16 * count)
    while flat.size:
        found.clear()
        best = np.argpartition(-flat, candidates - 1)[:candidates]
        for index in sorted(best.tolist(), key=lambda i: (-flat[i], i)):
            first, length = divmod(index, spans.shape[1])
            last = first + length
            if flat[index] == -np.inf:
                break
            if align_to_words:
                first, last = _whole_word(words, first, -1), _whole_word(words, last, 1)
            found.setdefault((offsets[first][0], offsets[last][1]), float(flat[index]))
            if len(found) == count:
                break
        if len(found) == count or candidates == flat.size:
            break
        candidates = min(flat.size, 4 * candidates)
    return [(logit, start, end) for (start, end), logit in found.items()]


def _whole_word(words, token, step):
    """The furthest token in the direction of ``step`` that is a piece of the same word."""
    while words[token] is not None and words.get(token + step) == words[token]:
        token += step
    return token
