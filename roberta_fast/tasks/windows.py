"""Texts of any length as windows that a model takes, each token with its characters in the text as it was given.

Texts are tokenized whole, without truncation, and the tokens are cut into windows here. These are the windows of Hugging Face's
fast tokenizers with ``return_overflowing_tokens`` and ``stride``; but a tokenizer that never truncates is never reconfigured, so
that threads may share it, and a question that leaves no room for the stride is an error of this one text.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """One text's tokens, without special ones.

    ids: int, n of them. offsets: (start, end) of each in characters of the text; white space at the edges is left out, and marks
    that combine with the last character are taken in. words: for each the number of the word that it is a piece of, by the
    tokenizer's own division.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    words: list[int | None]


class Window(NamedTuple):
    """What a model is fed for a piece of one text, or of a pair's second text behind its whole first.

    example: which of the texts. input_ids, token_type_ids: int, S of them, special tokens included; the types are None where the
    tokenizer has none. place: where in ``input_ids`` the piece begins. first: the number of its first token in its text.
    offsets, words: of the piece's tokens, as in ``Tokens``. cls_index: where the classification token is.
    """

    example: int
    input_ids: list[int]
    token_type_ids: list[int] | None
    place: int
    first: int
    offsets: list[tuple[int, int]]
    words: list[int | None]
    cls_index: int

    def token_span(self, start: int, end: int) -> tuple[int, int]:
        """The first and last index in ``input_ids`` of the text's characters [start, end); cls_index where not all are here."""
        inside = [i for i, (low, high) in enumerate(self.offsets) if low < end and high > start]
        if not inside or self.offsets[0][0] > start or self.offsets[-1][1] < end:
            return self.cls_index, self.cls_index
        return self.place + inside[0], self.place + inside[-1]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each text, by a fast tokenizer.

    Raises ValueError naming a text that is no str or holds a lone surrogate, which no tokenizer can encode, and a slow tokenizer.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} does not know the characters of its tokens; a fast one does")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {i} holds a lone surrogate at character {error.start}") from None
    if not texts:
        return []
    encodings = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False).encodings
    return [
        Tokens(e.ids, [_visible(text, *offset) for offset in e.offsets], e.word_ids)
        for text, e in zip(texts, encodings, strict=True)
    ]


class TooLong(ValueError):
    """A text has more tokens than it may have."""


class Windower:
    """Cuts texts, or pairs' second texts, into windows of up to ``max_length`` tokens that overlap by ``stride``.

    max_length: special tokens included. max_tokens: how many all windows of a call may hold, or None.
    Raises ValueError naming an argument that does not fit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int = 0, max_tokens: int | None = None):
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length={max_length!r} is not a whole number from 1 on")
        if not isinstance(stride, int) or stride < 0:
            raise ValueError(f"stride={stride!r} is not a whole number from 0 on")
        self.tokenizer, self.max_length, self.stride, self.max_tokens = tokenizer, max_length, stride, max_tokens
        self._frames = {False: _frame(tokenizer, "a"), True: _frame(tokenizer, "a", "a")}

    def of_texts(self, texts: Sequence[str]) -> list[Window]:
        """The windows of each text, in order; an empty text has one. Raises TooLong where they hold more than max_tokens."""
        return self._within_limit(
            window for i, tokens in enumerate(tokenize(self.tokenizer, texts)) for window in self._cut(i, [], tokens, False)
        )

    def of_pairs(self, firsts: Sequence[str], seconds: Sequence[str]) -> list[Window]:
        """The windows of each pair, in order: each holds the whole first text and a piece of the second.

        Raises TooLong naming the pair whose first text leaves no room, or where all hold more than max_tokens.
        """
        if len(firsts) != len(seconds):
            raise ValueError(f"there must be as many first texts as second ones, got {len(firsts)} and {len(seconds)}")
        tokens = tokenize(self.tokenizer, [*firsts, *seconds])
        pairs = zip(tokens[: len(firsts)], tokens[len(firsts) :], strict=True)
        return self._within_limit(
            window for i, (first, second) in enumerate(pairs) for window in self._cut(i, first.ids, second, True)
        )

    def one_each(self, texts: Sequence[tuple[str, ...]], truncation: str | None = None) -> list[Window]:
        """One window of each text ``(text,)`` or pair ``(first, second)``.

        truncation: ``"right"`` or ``"left"`` says where what does not fit is cut off, off the longer of a pair until both are as
        long, as Hugging Face's ``"longest_first"`` does; None raises TooLong naming the text and its tokens.
        """
        tokens = iter(tokenize(self.tokenizer, [part for parts in texts for part in parts]))
        windows = []
        for i, parts in enumerate(texts):
            pieces = [next(tokens) for _ in parts]
            room = self.max_length - sum(map(len, self._frames[len(parts) == 2][0]))
            total = sum(len(piece.ids) for piece in pieces)
            if total > room and truncation is None:
                length = self.max_length - room + total
                raise TooLong(f"text {i} must have at most {self.max_length} tokens, special ones included, got {length}")
            kept = _longest_first([len(piece.ids) for piece in pieces], room)
            pieces = [_end_of(piece, count, truncation) for piece, count in zip(pieces, kept, strict=True)]
            windows.append(self._framed(i, [] if len(parts) == 1 else pieces[0].ids, pieces[-1], 0, len(parts) == 2))
        return windows

    def _within_limit(self, windows):
        kept, total = [], 0
        for window in windows:
            total += len(window.input_ids)
            if self.max_tokens is not None and total > self.max_tokens:
                raise TooLong(
                    f"in windows of {self.max_length} that overlap by {self.stride} there are over {self.max_tokens} tokens"
                )
            kept.append(window)
        return kept

    def _cut(self, example, first_ids, tokens, is_pair):
        room = self.max_length - len(first_ids) - sum(map(len, self._frames[is_pair][0]))
        if room < 1 or (room <= self.stride and len(tokens.ids) > room):
            what = f"a first text of {len(first_ids)} tokens leaves" if is_pair else "special tokens leave"
            raise TooLong(
                f"text {example}: {what} {max(room, 0)} places in windows of max_length={self.max_length}, "
                f"and {self.stride} of them would overlap"
            )
        begin = 0
        while True:
            end = begin + room
            piece = Tokens(*(part[begin:end] for part in tokens))
            yield self._framed(example, first_ids, piece, begin, is_pair)
            if end >= len(tokens.ids):
                return
            begin += room - self.stride

    def _framed(self, example, first_ids, piece, first, is_pair):
        (before, between, after), piece_type = self._frames[is_pair]
        head = [*before, *((token, 0) for token in first_ids), *between]
        framed = [*head, *((token, piece_type) for token in piece.ids), *after]
        types = [kind for _, kind in framed] if "token_type_ids" in self.tokenizer.model_input_names else None
        cls_index = next((i for i, (token, _) in enumerate(head) if token == self.tokenizer.cls_token_id), 0)
        return Window(example, [token for token, _ in framed], types, len(head), first, piece.offsets, piece.words, cls_index)


def _longest_first(lengths, room):
    """How many tokens of one or two texts are kept, so that they fit into ``room``."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(lengths)
    if 2 * short <= room:
        kept = [short, room - short]
    else:
        kept = [room // 2, room - room // 2]
    return kept if lengths[0] <= lengths[1] else kept[::-1]


def _end_of(tokens, count, truncation):
    cut = slice(len(tokens.ids) - count, None) if truncation == "left" else slice(count)
    return Tokens(*(part[cut] for part in tokens))


def _visible(text, start, end):
    """The characters of a token without white space at its edges, and with the marks that change its last character."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    # Tokenizers that strip accents leave decomposed ones out of the token.
    while start < end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return start, end


def _frame(tokenizer, *texts):
    """([(special token, its type)] before the first text, before the second and after the last, the type of the last text)."""
    encoding = tokenizer(*texts, return_token_type_ids=True, return_attention_mask=False, verbose=False)
    special, place, last_type = ([], [], []), 0, 0
    for token, kind, owner in zip(encoding["input_ids"], encoding["token_type_ids"], encoding.sequence_ids(0), strict=True):
        if owner is None:
            special[place].append((token, kind))
        else:
            place, last_type = (1 if len(texts) == 2 and owner == 0 else 2), kind
    return special, last_type
