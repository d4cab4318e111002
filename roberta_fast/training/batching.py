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
