"""Which blocks a step trains on: a function of the step alone, so that a run resumes anywhere at no cost.

Lengths first: with a length warm-up, steps begin on shorter blocks, whose length doubles until it is the full one. Each length is
a stage with a packing of its own. Then sizes: a batch has as many tokens, whatever the length, and with a batch-size warm-up
they grow linearly (Brown et al. 2020, section B; Li et al. 2022, "The Stability-Efficiency Dilemma").
"""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
    """Steps of one block length: from ``first_step`` on, blocks of at most ``length`` tokens."""

    first_step: int
    length: int


def length_stages(max_seq_length: int, warmup_steps: int = 0, first_length: int = 64) -> list[Stage]:
    """Equally long stages of ``first_length``, twice that, ... within ``warmup_steps``, and the full length from then on.

    Raises ValueError for fewer steps than lengths, or a first length that is not between 8 and the full one.
    """
    if warmup_steps < 0:
        raise ValueError(f"length_warmup_steps={warmup_steps} must be 0 or more")
    if not warmup_steps:
        return [Stage(0, max_seq_length)]
    if not 8 <= first_length < max_seq_length:
        raise ValueError(f"length_warmup_start={first_length} must be at least 8 and below max_seq_length={max_seq_length}")
    lengths = []
    while first_length < max_seq_length:
        lengths.append(first_length)
        first_length *= 2
    if warmup_steps < len(lengths):
        raise ValueError(f"length_warmup_steps={warmup_steps} are fewer than the lengths {lengths}")
    stages = [Stage(warmup_steps * i // len(lengths), length) for i, length in enumerate(lengths)]
    return [*stages, Stage(warmup_steps, max_seq_length)]


class StepSchedule:
    """The blocks of each step, counted within its stage.

    global_batch_size: blocks of the full length in a step, over all processes. parts: micro-batches that a step is divided into,
    processes × gradient accumulation. Raises ValueError for a batch that does not give each part a block.
    """

    def __init__(
        self, stages: list[Stage], global_batch_size: int, parts: int, warmup_steps: int = 0, first_batch_size: int | None = None
    ):
        first = global_batch_size if first_batch_size is None or not warmup_steps else first_batch_size
        if warmup_steps < 0:
            raise ValueError(f"batch_size_warmup_steps={warmup_steps} must be 0 or more")
        if not parts <= first <= global_batch_size:
            raise ValueError(
                f"a step has {parts} micro-batches (processes × accumulation), and {first} to {global_batch_size} blocks: "
                f"the least must be at least {parts}, and at most the most"
            )
        self.stages, self.parts = stages, parts
        self._first, self._full, self._warmup = first, global_batch_size, warmup_steps
        # Blocks before each step of a stage, as long as batches grow.
        self._before = [
            np.cumsum([0, *self.batch_sizes(begin, max(begin, warmup_steps), i)]) for i, (begin, _) in enumerate(stages)
        ]

    def stage(self, step: int) -> int:
        """The number of the stage that ``step`` belongs to."""
        return max(i for i, stage in enumerate(self.stages) if stage.first_step <= step)

    def batch_sizes(self, first_step: int, last_step: int, stage: int) -> np.ndarray:
        """Blocks of each step in [first_step, last_step) of a stage, int64."""
        steps = np.arange(first_step, last_step, dtype=np.float64)
        share = np.minimum(steps / self._warmup, 1.0) if self._warmup else np.ones_like(steps)
        full_length = self._first + (self._full - self._first) * share
        # Shorter blocks are more of them, so that devices are as busy.
        return np.rint(full_length * (self.stages[-1].length / self.stages[stage].length)).astype(np.int64)

    def before(self, step: int, stage: int) -> int:
        """Blocks that the steps of ``stage`` before ``step`` use."""
        steps = step - self.stages[stage].first_step
        growing = min(steps, len(self._before[stage]) - 1)
        return int(self._before[stage][growing]) + (steps - growing) * int(self.batch_sizes(step, step + 1, stage)[0])

    def blocks(self, step: int, part: int) -> tuple[int, int, int]:
        """(stage, first, last): micro-batch ``part`` of ``step`` is blocks [first, last) of its stage."""
        stage = self.stage(step)
        size = int(self.batch_sizes(step, step + 1, stage)[0])
        start = self.before(step, stage)
        return stage, start + size * part // self.parts, start + size * (part + 1) // self.parts

    def steps_for(self, epochs: float, stage_blocks: list[int]) -> int:
        """The steps that see the corpus ``epochs`` times; stage_blocks: how many blocks it is in each stage."""
        seen, step = 0.0, 0
        for number, blocks in enumerate(stage_blocks):
            last = self.stages[number + 1].first_step if number + 1 < len(self.stages) else None
            while seen < epochs and (last is None or step < last):
                end = step + 1024 if last is None else min(last, step + 1024)
                shares = seen + np.cumsum(self.batch_sizes(step, end, number)) / blocks
                reached = int(np.searchsorted(shares, epochs - 1e-9))
                if reached < len(shares):
                    return step + reached + 1
                seen, step = float(shares[-1]), end
        return step
