"""Token dropout: training hides some tokens behind the mask token, others in each epoch, so that no single one is relied on.

Iyyer et al., "Deep Unordered Composition Rivals Syntactic Methods for Text Classification" (2015), section 2.2, leave words out
of an average; where places count, a token that says nothing takes theirs, as the unknown word does in Bowman et al., "Generating
Sentences from a Continuous Space" (2016), section 3.1. An encoder has learned the mask token for that.
"""

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

# The column of a data set that says, token by token, what is dropped together, as a word's pieces are; KEPT never is.
UNITS = "dropout_units"
KEPT = -1


class TokenDropout(Dataset):
    """``examples`` with each unit of tokens replaced by ``token_id`` with probability ``rate``; labels stay as they are.

    What is dropped follows (seed, epoch, index of the example) alone, so a run that resumes sees what an unbroken one does, with
    any number of worker processes. examples: a ``datasets.Dataset`` with ``input_ids`` and, under ``UNITS``, for each token the
    number of its unit, from 0 to its tokens - 1, or KEPT.
    """

    def __init__(self, examples, rate: float, token_id: int, seed: int):
        self.examples, self.rate, self.token_id, self.seed = examples, rate, token_id, seed
        # Shared, so that workers which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses what is dropped in the next pass."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        example = dict(self.examples[index])
        units = np.asarray(example.pop(UNITS))
        draws = np.random.default_rng((self.seed, self._epoch.item(), index)).random(len(units))
        is_dropped = (units != KEPT) & (draws[units] < self.rate)
        example["input_ids"] = np.where(is_dropped, self.token_id, example["input_ids"]).tolist()
        return example


class EpochOfDropout(TrainerCallback):
    """Tells the training data which epoch begins."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


def dropped_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that takes the place of others: the mask's or that of unknown words. Raises ValueError where there is neither."""
    found = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    if found is None:
        raise ValueError("token_dropout: the tokenizer has neither a mask token nor one for unknown words")
    return found


def units_of_tokens(input_ids: list[int], special_ids: set[int]) -> list[int]:
    """Each token as a unit of its own, special ones kept."""
    return [KEPT if token in special_ids else place for place, token in enumerate(input_ids)]
