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


class Windower:
    """Cuts texts, or pairs' second texts, into windows of up to ``max_length`` tokens that overlap by ``stride``.

    max_length: special tokens included. Raises ValueError naming an argument that does not fit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int):
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length={max_length!r} is not a whole number from 1 on")
        if not isinstance(stride, int) or stride < 0:
            raise ValueError(f"stride={stride!r} is not a whole number from 0 on")
        self.tokenizer, self.max_length, self.stride = tokenizer, max_length, stride
        self._frames = {False: _frame(tokenizer, "a"), True: _frame(tokenizer, "a", "a")}

    def of_texts(self, texts: Sequence[str]) -> list[Window]:
        """The windows of each text, in order; an empty text has one."""
        return [w for i, tokens in enumerate(tokenize(self.tokenizer, texts)) for w in self._cut(i, [], tokens, False)]

    def of_pairs(self, firsts: Sequence[str], seconds: Sequence[str]) -> list[Window]:
        """The windows of each pair, in order: each holds the whole first text and a piece of the second."""
        if len(firsts) != len(seconds):
            raise ValueError(f"there must be as many first texts as second ones, got {len(firsts)} and {len(seconds)}")
        tokens = tokenize(self.tokenizer, [*firsts, *seconds])
        pairs = zip(tokens[: len(firsts)], tokens[len(firsts) :], strict=True)
        return [w for i, (first, second) in enumerate(pairs) for w in self._cut(i, first.ids, second, True)]

    def _cut(self, example, first_ids, tokens, is_pair):
        (before, between, after), piece_type = self._frames[is_pair]
        head = [*before, *((token, 0) for token in first_ids), *between]
        room = self.max_length - len(head) - len(after)
        if room < 1 or (room <= self.stride and len(tokens.ids) > room):
            what = f"a first text of {len(first_ids)} tokens" if is_pair else "special tokens"
            raise ValueError(
                f"text {example}: {what} leaves {max(room, 0)} places in windows of max_length={self.max_length}, "
                f"and {self.stride} of them would overlap"
            )
        cls_index = next((i for i, (token, _) in enumerate(head) if token == self.tokenizer.cls_token_id), 0)
        begin = 0
        while True:
            end = min(begin + room, len(tokens.ids))
            framed = [*head, *((token, piece_type) for token in tokens.ids[begin:end]), *after]
            yield Window(
                example,
                [token for token, _ in framed],
                [kind for _, kind in framed] if "token_type_ids" in self.tokenizer.model_input_names else None,
                len(head),
                begin,
                tokens.offsets[begin:end],
                tokens.words[begin:end],
                cls_index,
            )
            if end == len(tokens.ids):
                return
            begin += room - self.stride


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
