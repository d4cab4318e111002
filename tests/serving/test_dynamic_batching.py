"""The batcher alone: budgets, turns, cancellation, overload, and failures that stay with whom they belong to."""

import asyncio
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from roberta_fast.serving.batching import Batcher
from roberta_fast.serving.engine import Feed
from roberta_fast.serving.errors import RequestError


def feeds(*lengths, token=1):
    return [Feed([token] * length, None) for length in lengths]


class Recorder:
    """Computes each sequence's length, once ``gate`` is open, and keeps what was in each batch. Token 13 cannot be computed."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, batch):
        self.gate.wait(10)
        self.batches.append([len(feed.input_ids) for feed in batch])
        if any(13 in feed.input_ids for feed in batch):
            raise ArithmeticError("thirteen")
        return enumerate(np.array([len(feed.input_ids)], dtype=np.float32) for feed in batch)


def with_batcher(scenario, compute=None, **options):
    """Runs scenario(batcher, compute) between start and close."""
    compute = compute or Recorder()

    async def main():
        batcher = Batcher(compute, **({"max_batch_tokens": 100, "max_queue": 10, "patience": 60.0} | options))
        batcher.start()
        try:
            return await scenario(batcher, compute)
        finally:
            await batcher.close()

    return asyncio.run(asyncio.wait_for(main(), 30))


async def held(batcher, compute, *requests):
    """Requests that all wait, behind one of a single token that is being computed."""
    compute.gate.clear()
    tasks = [asyncio.create_task(batcher.run(feeds(1)))]
    await asyncio.sleep(0.05)
    tasks += [asyncio.create_task(batcher.run(request)) for request in requests]
    await asyncio.sleep(0.05)
    return tasks


def test_batches_are_filled_to_the_budget_with_any_lengths():
    async def scenario(batcher, compute):
        tasks = await held(batcher, compute, *(feeds(n) for n in (60, 30, 10, 90, 20, 150, 5)))
        compute.gate.set()
        results = await asyncio.gather(*tasks)
        assert [int(result.outputs[0][0]) for result in results] == [1, 60, 30, 10, 90, 20, 150, 5]
        assert compute.batches == [[1], [60, 30, 10], [90], [20], [150], [5]]

    with_batcher(scenario)


def test_a_batch_holds_no_more_sequences_than_it_may():
    async def scenario(batcher, compute):
        tasks = await held(batcher, compute, *(feeds(1) for _ in range(5)))
        compute.gate.set()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in compute.batches] == [1, 2, 2, 1]

    with_batcher(scenario, max_batch_requests=2)


def test_a_long_request_does_not_hold_up_short_ones():
    async def scenario(batcher, compute):
        long, short = feeds(*[50] * 20), feeds(7)
        tasks = await held(batcher, compute, long, short)
        compute.gate.set()
        await tasks[2]
        assert sum(batch.count(50) for batch in compute.batches) <= 3 and not tasks[1].done()
        assert len((await tasks[1]).outputs) == 20

    with_batcher(scenario)


def test_what_is_cancelled_is_not_computed():
    async def scenario(batcher, compute):
        tasks = await held(batcher, compute, feeds(80), feeds(70, 70, 70), feeds(60))
        assert batcher.waiting_tokens == 80 + 210 + 60
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert batcher.waiting_tokens == 140
        compute.gate.set()
        await asyncio.gather(tasks[1], tasks[3])
        assert not any(70 in batch for batch in compute.batches) and batcher.waiting_tokens == 0

    with_batcher(scenario)


def test_a_failure_is_its_own_request_s_alone():
    async def scenario(batcher, compute):
        tasks = await held(batcher, compute, feeds(20), feeds(5, 6, token=13), feeds(30))
        compute.gate.set()
        good, bad, other = await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert (int(good.outputs[0][0]), int(other.outputs[0][0])) == (20, 30)
        assert isinstance(bad, RequestError) and bad.status == 424
        assert bad.message == "Inference failed: ArithmeticError", "and not what the error says"

    with_batcher(scenario)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_answer(value):
    async def scenario(batcher, compute):
        with pytest.raises(RequestError, match="Inference failed: not finite"):
            await batcher.run(feeds(3))

    with_batcher(scenario, lambda batch: enumerate([np.array([1.0, value])] * len(batch)))


def test_no_more_are_admitted_than_places():
    async def scenario(batcher, compute):
        with batcher.admitted(), batcher.admitted():
            with pytest.raises(RequestError) as error, batcher.admitted():
                pass
            assert error.value.status == 429 and error.value.retry_after >= 1
        with batcher.admitted():
            assert batcher.admitted_requests == 1

    with_batcher(scenario, max_queue=2)


def test_who_would_wait_too_long_is_told_at_once():
    def slow(batch):
        time.sleep(0.05)
        return enumerate([np.zeros(1)] * len(batch))

    async def scenario(batcher, compute):
        await batcher.run(feeds(10))  # 5 ms a token
        while not batcher._seconds_a_token:  # an answer may come before its batch is timed
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(batcher.run(feeds(100))) for _ in range(3)]
        await asyncio.sleep(0)
        assert batcher.expected_wait > 1.0
        with pytest.raises(RequestError) as error, batcher.admitted():
            pass
        assert error.value.error_type == "overloaded" and error.value.retry_after == 2
        await asyncio.gather(*waiting)
        with batcher.admitted():
            pass

    with_batcher(scenario, slow, patience=1.0)


def test_closing_computes_what_was_accepted():
    async def main():
        compute = Recorder()
        batcher = Batcher(compute, 100, 10, 60.0)
        batcher.start()
        tasks = await held(batcher, compute, feeds(40, 40, 40), feeds(9))
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError, match="shutting down"), batcher.admitted():
            pass
        compute.gate.set()
        await closing
        assert all(task.done() and task.exception() is None for task in tasks) and not batcher.is_alive

    asyncio.run(asyncio.wait_for(main(), 30))
