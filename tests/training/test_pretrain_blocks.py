"""Full-sentences packing: C++ is bitwise Python; no token is lost, no sentence cut that fits, no block too long."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roberta_fast import dispatch
from roberta_fast.training.pretraining.blocks import full_sentences, full_sentences_ref

documents = st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=9)


def packed(texts, max_tokens, across):
    lengths = np.array([length for text in texts for length in text], dtype=np.uint32)
    counts = np.array([len(text) for text in texts], dtype=np.uint32)
    return full_sentences(lengths, counts, max_tokens, across), lengths, counts


@given(texts=documents, max_tokens=st.integers(3, 40), across=st.booleans())
def test_the_extension_is_bitwise_python(texts, max_tokens, across):
    if dispatch.load_cpp():
        pytest.skip(dispatch.load_cpp())
    blocks, lengths, counts = packed(texts, max_tokens, across)
    wanted = full_sentences_ref(lengths, counts, max_tokens, *((1, 1) if across else (0, 2)))
    assert all(np.array_equal(got, want) and got.dtype == want.dtype for got, want in zip(blocks, wanted, strict=True))


@given(texts=documents, max_tokens=st.integers(3, 40), across=st.booleans())
def test_what_blocks_promise(texts, max_tokens, across):
    """Against what the words say, from the sentences' and documents' bounds alone."""
    blocks, lengths, counts = packed(texts, max_tokens, across)
    per_block, per_piece = (1, 1) if across else (0, 2)
    pieces, starts = blocks
    assert pieces[0] == 0 and pieces[-1] == lengths.sum() and (np.diff(pieces) > 0).all(), "every token is in one piece"
    assert starts[0] == 0 and starts[-1] == len(pieces) - 1 and (np.diff(starts) > 0).all(), "every piece is in one block"
    ends = np.cumsum(lengths)
    sentence_starts = set((ends - lengths).tolist()) | {int(lengths.sum())}
    document_starts = {int(ends[:n].max(initial=0)) for n in np.cumsum([0, *counts])}
    assert document_starts <= set(pieces.tolist()), "a piece is of one document"
    block_bounds = pieces[starts].tolist()
    assert set(pieces.tolist()) <= set(block_bounds) | document_starts, "and ends with it or with its block"
    room = max_tokens - per_block - per_piece
    for first, last, begin, end in zip(starts, starts[1:], block_bounds, block_bounds[1:], strict=False):
        cost = per_block + per_piece * (last - first) + end - begin
        assert cost <= max_tokens
        following = next((int(n) for e, n in zip(ends, lengths, strict=True) if n and e - n == end), None)
        if end not in sentence_starts:
            sentence = next((e - n, e) for e, n in zip(ends.tolist(), lengths.tolist(), strict=True) if e - n < end < e)
            assert sentence[1] - sentence[0] > room, "only a sentence longer than a block is cut"
            assert cost == max_tokens, "and only where a block is full"
        elif following is not None:
            assert cost + following + per_piece * (end in document_starts) > max_tokens, "what fits is taken in"


def test_a_block_by_hand():
    """Of ten tokens: documents of sentences 3 and 2, then 4, then a sentence longer than a block."""
    (pieces, starts), _, _ = packed([[3, 2], [4], [11]], 10, across=False)
    assert pieces.tolist() == [0, 5, 9, 17, 20] and starts.tolist() == [0, 1, 2, 3, 4]
    (pieces, starts), _, _ = packed([[3, 2], [1], [4]], 10, across=False)
    assert pieces.tolist() == [0, 5, 6, 10] and starts.tolist() == [0, 2, 3]
    (pieces, starts), _, _ = packed([[3, 2], [1], [4]], 10, across=True)
    assert pieces.tolist() == [0, 5, 6, 10] and starts.tolist() == [0, 2, 3]


@pytest.mark.parametrize("extension", [True, False])
def test_wrong_arguments_are_named(extension, monkeypatch):
    if not extension:
        monkeypatch.setattr(dispatch, "load_cpp", lambda: "absent")
    with pytest.raises(ValueError, match="max_tokens=2 leaves no room"):
        packed([[1]], 2, False)
    with pytest.raises(ValueError, match="document_sentences counts 3 sentences, and sentence_lengths has 2"):
        full_sentences(np.array([1, 2], dtype=np.uint32), np.array([3], dtype=np.uint32), 10)
