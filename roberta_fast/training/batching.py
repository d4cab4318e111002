"""Batches by token budget: what a step costs follows its real tokens, so they are what batches are equal in."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of about ``tokens_per_batch`` real tokens, in an order of its own in each epoch.

    The shuffled texts are laid one after the other and cut at equal distances: every epoch has the same number of batches, each
    text is in one of them, and a batch exceeds the budget by less than one text. The order follows (seed, epoch) alone, so a run
    that resumes sees the batches of an unbroken one; each of ``num_replicas`` processes takes every num_replicas-th batch.
    lengths: real tokens of each text. Raises ValueError where there is no text, a budget below 1, or fewer texts than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} must be at least 1")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} is not one of num_replicas={num_replicas}")
        if len(self.lengths) < max(num_replicas, 1):
            raise ValueError(f"{len(self.lengths)} texts do not make a batch for each of {num_replicas} processes")
        if self.lengths.min() < 1:
            raise ValueError(f"text {int(self.lengths.argmin())} has no token")
        wanted = max(-(-int(self.lengths.sum()) // tokens_per_batch), 1)
        rounds = min(-(-wanted // num_replicas), len(self.lengths) // num_replicas)
        self.batches = rounds * num_replicas
        self.seed, self.shuffle, self.num_replicas, self.rank = seed, shuffle, num_replicas, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self.lengths)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(count) if self.shuffle else np.arange(count)
        ends = np.cumsum(self.lengths[order])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, self.batches) / self.batches, side="left") + 1
        # A text longer than a batch would leave others empty: at least one text each, taken from those behind, then before.
        places = np.arange(1, self.batches)
        cuts = np.maximum.accumulate(cuts - places) + places
        cuts = np.minimum(cuts, count - self.batches + places)
        for batch in np.split(order, cuts)[self.rank :: self.num_replicas]:
            yield batch.tolist()


class TaskBatchSampler(Sampler[list[int]]):
    """Batches of several data sets laid one after the other, each batch of one of them; sizes ** alpha are their shares.

    An epoch has as many batches as all sets together. With alpha = 1 it sees each text once; below 1 it sees texts of small sets
    more often and leaves out some of large ones, which come first in the next: Devlin et al. take 0.7 for the languages of
    multilingual BERT, and Raffel et al., "T5" (2020), section 3.5.2, call 1 / alpha the temperature. The order of sets is drawn
    anew in each epoch by (seed, epoch); within a set, batches are those of ``TokenBatchSampler``, pass after pass.
    lengths: real tokens of each text, a set after the other. Raises ValueError as that does, and for an alpha outside [0, 1].
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        tokens_per_batch: int,
        *,
        alpha: float,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must lie in [0, 1]")
        options = {"seed": seed, "num_replicas": num_replicas, "rank": rank}
        self.samplers = [TokenBatchSampler(of_set, tokens_per_batch, **options) for of_set in lengths]
        self.offsets = np.cumsum([0, *map(len, lengths)])
        sizes = np.array([len(sampler) for sampler in self.samplers])
        wanted = sizes.sum() * sizes**alpha / (sizes**alpha).sum()
        # Rounded so that their sum stays what it is; every set has a batch.
        self.counts = np.maximum(np.diff(np.rint(np.cumsum([0, *wanted]))).astype(int), 1)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        streams = [self._batches(index) for index in range(len(self.samplers))]
        for index in order:
            yield next(streams[index])

    def _batches(self, index):
        """The batches of a set from where the epochs before this one have stopped."""
        sampler, offset = self.samplers[index], self.offsets[index]
        number = self.epoch * self.counts[index]
        while True:
            sampler.set_epoch(int(number // len(sampler)))
            for batch in list(sampler)[number % len(sampler) :]:
                yield [int(offset) + text for text in batch]
                number += 1
