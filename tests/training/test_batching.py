"""Batches by token budget: every text once an epoch, equal tokens, the same in every process and after a pause."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roberta_fast.training import TokenBatchSampler

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=120)


@given(LENGTHS, st.integers(1, 600), st.integers(0, 3))
def test_every_text_is_in_one_batch_of_about_the_budget(lengths, budget, epoch):
    sampler = TokenBatchSampler(lengths, budget, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler) and all(batches)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) < budget + max(lengths)


@given(LENGTHS, st.integers(1, 600), st.integers(1, 5))
def test_processes_share_an_epoch_without_overlap(lengths, budget, processes):
    if len(lengths) < processes:
        return
    samplers = [TokenBatchSampler(lengths, budget, num_replicas=processes, rank=rank) for rank in range(processes)]
    assert len({len(sampler) for sampler in samplers}) == 1
    parts = [[i for batch in sampler for i in batch] for sampler in samplers]
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))


def test_the_order_follows_seed_and_epoch_alone():
    def batches(seed, epoch):
        sampler = TokenBatchSampler(range(1, 60), 100, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    assert len({str(batches(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_without_shuffling_the_order_is_the_data_sets():
    assert [i for batch in TokenBatchSampler([5] * 10, 12, shuffle=False) for i in batch] == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 4], 0), "tokens_per_batch=0"),
        (([], 10), "0 texts do not make a batch"),
        (([3, 0], 10), "text 1 has no token"),
    ],
)
def test_what_cannot_be_batched_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(*arguments)


def test_fewer_texts_than_processes():
    with pytest.raises(ValueError, match="2 texts do not make a batch for each of 3 processes"):
        TokenBatchSampler([3, 4], 10, num_replicas=3, rank=0)
