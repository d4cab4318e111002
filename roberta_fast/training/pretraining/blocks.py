"""Full-sentences packing: tokenized documents into blocks of at most so many tokens.

Sentences (the lines of a document) are laid one after the other in the order of the corpus. One that does not fit into what is
left of a block begins the next one; one that is longer than a whole block is cut. So no token is lost, and no sentence that
could be whole is cut (FULL-SENTENCES, Liu et al. 2019, section 4.2, https://arxiv.org/abs/1907.11692; fairseq's
``--sample-break-mode complete``).

A block holds *pieces*, runs of tokens of one document. Its special tokens count:
    documents apart         <s> piece </s> <s> piece </s> ..., for attention that keeps the pieces apart
    across documents        <s> piece </s> piece </s> ..., the paper's form: one separator between documents
"""

from typing import NamedTuple

import numpy as np

from roberta_fast import dispatch


class Blocks(NamedTuple):
    """Blocks of a corpus; token numbers count through all of its shards.

    piece_starts: int64 [P + 1], the token at which each piece begins, and the end; pieces are gapless.
    block_starts: int64 [B + 1], the piece at which each block begins, and the end.
    """

    piece_starts: np.ndarray
    block_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.block_starts) - 1


def full_sentences(
    sentence_lengths: np.ndarray, document_sentences: np.ndarray, max_tokens: int, across_documents: bool = False
) -> Blocks:
    """Packs documents into blocks of at most ``max_tokens`` tokens, special ones included.

    sentence_lengths: uint32 [sentences], tokens of each. document_sentences: uint32 [documents], sentences of each.
    across_documents: one ``<s>`` a block and one ``</s>`` a piece, instead of both for each piece.
    Raises ValueError for a ``max_tokens`` that leaves no room, or counts that do not add up.
    """
    per_block, per_piece = (1, 1) if across_documents else (0, 2)
    if max_tokens <= 2:
        raise ValueError(f"max_tokens={max_tokens} leaves no room for a token beside <s> and </s>")
    if int(document_sentences.sum(dtype=np.int64)) != len(sentence_lengths):
        counted = int(document_sentences.sum(dtype=np.int64))
        raise ValueError(f"document_sentences counts {counted} sentences, and sentence_lengths has {len(sentence_lengths)}")
    pack = full_sentences_ref
    if dispatch.load_cpp() is None:
        from roberta_fast._C import full_sentences as pack
    lengths, counts = (np.ascontiguousarray(counts, dtype=np.uint32) for counts in (sentence_lengths, document_sentences))
    return Blocks(*pack(lengths, counts, max_tokens, per_block, per_piece))


def full_sentences_ref(
    sentence_lengths: np.ndarray, document_sentences: np.ndarray, capacity: int, per_block: int, per_piece: int
) -> tuple[np.ndarray, np.ndarray]:
    """(piece_starts, block_starts) for blocks that cost ``per_block`` tokens and ``per_piece`` for each piece beside the text."""
    piece_starts, block_starts = [0], [0]
    longest = capacity - per_block - per_piece
    token, used = 0, per_block

    def close_piece():
        if token > piece_starts[-1]:
            piece_starts.append(token)

    def close_block():
        close_piece()
        if len(piece_starts) - 1 > block_starts[-1]:
            block_starts.append(len(piece_starts) - 1)

    sentences = iter(sentence_lengths.tolist())
    for count in document_sentences.tolist():
        for _ in range(count):
            left = next(sentences)
            opens = token == piece_starts[-1]
            if left and used + per_piece * opens + left > capacity:
                close_block()
                used = per_block
            while left:
                if token == piece_starts[-1]:
                    used += per_piece
                taken = min(left, longest)
                token, used, left = token + taken, used + taken, left - taken
                if left:
                    close_block()
                    used = per_block
        close_piece()
    close_block()
    return np.array(piece_starts, dtype=np.int64), np.array(block_starts, dtype=np.int64)
