"""Micro-batches of blocks, masked and laid one after the other in one row, as a fast encoder takes them without padding."""

import numpy as np
import torch
from torch.utils.data import Dataset

from roberta_fast.training.pretraining.blocks import Blocks, full_sentences
from roberta_fast.training.pretraining.corpus import Corpus
from roberta_fast.training.pretraining.masking import MaskingRule, mask
from roberta_fast.training.pretraining.schedule import StepSchedule


class BlockReader:
    """Blocks of a corpus as rows of tokens.

    max_tokens: of a block, special ones included. first_position: of a sequence's first token, ``padding_idx + 1`` for RoBERTa.
    across_documents: attention sees a whole block, whose positions count through, instead of one document's piece.
    """

    def __init__(
        self, corpus: Corpus, max_tokens: int, rule: MaskingRule, seed: int, first_position: int, across_documents: bool = False
    ):
        self.corpus, self.rule, self.seed = corpus, rule, seed
        self.first_position, self.across_documents = first_position, across_documents
        self.bos, self.eos = corpus.index["tokenizer"]["bos"], corpus.index["tokenizer"]["eos"]
        self.blocks: Blocks = full_sentences(corpus.sentences, corpus.documents, max_tokens, across_documents)

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [N] with special tokens, lengths of the sequences that see each other)."""
        first, last = self.blocks.block_starts[number : number + 2]
        bounds = self.blocks.piece_starts[first : last + 1]
        tokens = self.corpus.tokens(int(bounds[0]), int(bounds[-1]))
        pieces, sizes = last - first, np.diff(bounds)
        between = np.cumsum(sizes)
        # Where special tokens go, among the tokens without any.
        if self.across_documents:
            ids = np.insert(tokens.astype(np.int64), [0, *between], [self.bos, *[self.eos] * pieces])
            return ids, np.array([len(ids)])
        places = np.stack([between - sizes, between], 1).ravel()
        return np.insert(tokens.astype(np.int64), places, [self.bos, self.eos] * pieces), sizes + 2

    def batch(self, numbers: list[int], epoch: int) -> dict:
        """The model's inputs for blocks ``numbers``, masked for ``epoch``: one row, int64 [1, N] each.

        input_ids, labels (-100 where nothing is predicted), position_ids; cu_seq_lens_q and _k, int32, where its sequences begin,
        and the end; max_length_q and _k.
        """
        ids, labels, lengths = [], [], []
        for number in numbers:
            tokens, sizes = self.block(number)
            masked, wanted = mask(tokens, self.rule, self.seed, epoch, number)
            ids.append(masked)
            labels.append(wanted)
            lengths.append(sizes)
        lengths = np.concatenate(lengths)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths) + self.first_position
        bounds = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
        longest = int(lengths.max())
        row = {"input_ids": np.concatenate(ids), "labels": np.concatenate(labels), "position_ids": positions}
        return {
            **{name: torch.from_numpy(values)[None] for name, values in row.items()},
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


class TrainingBatches(Dataset):
    """The micro-batches of a run: number ``step * parts + part`` is part ``part`` of ``step``.

    Each pass over a stage's blocks has an order of its own by (seed, stage, pass), and its own masks.
    readers: one for each stage of the schedule.
    """

    def __init__(self, readers: list[BlockReader], schedule: StepSchedule, steps: int, seed: int):
        self.readers, self.schedule, self.steps, self.seed = readers, schedule, steps, seed
        self._orders = {}

    def __len__(self) -> int:
        return self.steps * self.schedule.parts

    def __getitem__(self, number: int) -> dict:
        stage, first, last = self.schedule.blocks(*divmod(number, self.schedule.parts))
        reader, blocks = self.readers[stage], []
        for place in range(first, last):
            turn, position = divmod(place, len(reader))
            blocks.append((turn, int(self._order(stage, turn)[position])))
        turns = sorted({turn for turn, _ in blocks})
        parts = [reader.batch([block for of, block in blocks if of == turn], turn) for turn in turns]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def epoch(self, step: int) -> float:
        """How often the corpus has been seen before ``step``, stages by their share of it."""
        seen = 0.0
        for number in range(self.schedule.stage(step) + 1):
            later = [stage.first_step for stage in self.schedule.stages[number + 1 :]]
            seen += self.schedule.before(min([step, *later]), number) / len(self.readers[number])
        return seen

    def _order(self, stage, turn):
        if (stage, turn) not in self._orders:
            if len(self._orders) > 1:  # a micro-batch may reach from one pass into the next
                self._orders.pop(min(self._orders))
            order = np.random.default_rng((self.seed, stage, turn)).permutation(len(self.readers[stage]))
            self._orders[stage, turn] = order.astype(np.uint32)
        return self._orders[stage, turn]


class EvaluationBatches(Dataset):
    """All blocks in their order, ``size`` a micro-batch, with the same masks each time."""

    def __init__(self, reader: BlockReader, size: int, limit: int | None = None):
        self.reader, self.size = reader, size
        self.count = len(reader) if limit is None else min(limit, len(reader))

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, number: int) -> dict:
        return self.reader.batch(list(range(number * self.size, min((number + 1) * self.size, self.count))), 0)


def _joined(parts: list[dict]) -> dict:
    """Micro-batches one after the other."""
    offsets = np.cumsum([0, *(int(part["cu_seq_lens_q"][-1]) for part in parts)])
    bounds = torch.cat(
        [parts[0]["cu_seq_lens_q"], *(p["cu_seq_lens_q"][1:] + int(o) for p, o in zip(parts[1:], offsets[1:], strict=False))]
    )
    longest = max(part["max_length_q"] for part in parts)
    return {
        **{name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "labels", "position_ids")},
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
