"""Dynamic batching by tokens: whenever the model is free, it gets what waits, up to a budget of real tokens.

Requests take turns, a sequence each, so that one of a thousand windows does not hold up the short ones behind it. Nothing is
delayed in the hope of a fuller batch.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from roberta_fast.serving.decoding import Continued
from roberta_fast.serving.engine import Feed
from roberta_fast.serving.errors import RequestError
from roberta_fast.serving.guards import where_it_failed

logger = logging.getLogger("roberta_fast.serving")


@dataclass
class Computed:
    """What became of a request. outputs: one for each sequence. queued, computing: seconds until its first batch, and since."""

    outputs: list
    queued: float
    computing: float


@dataclass(eq=False)
class _Request:
    feeds: Sequence[Feed]
    future: asyncio.Future
    since: float
    outputs: list = field(default_factory=list)
    next: int = 0
    missing: int = 0
    started: float | None = None

    def take(self, i: int, output: np.ndarray | Continued | Exception) -> None:
        """The output for a sequence; with the last one the request is done, as with any failure."""
        if self.future.done():
            return
        if isinstance(output, Exception) or not np.isfinite(getattr(output, "logprobs", output)).all():
            what = type(output).__name__ if isinstance(output, Exception) else "not finite"
            self.future.set_exception(RequestError("backend", f"Inference failed: {what}"))
            return
        self.outputs[i] = output
        self.missing -= 1
        if not self.missing:
            now = time.monotonic()
            self.future.set_result(Computed(self.outputs, self.started - self.since, now - self.started))


class Batcher:
    """Feeds ``compute``, in a thread of its own, with batches of what ``run`` was called with.

    compute: gives (number of a sequence, its output) for each, in any order; an output is delivered once it is given.
    max_batch_tokens: a batch's budget; a sequence that exceeds it is computed alone. max_batch_requests: sequences in a batch, or
    None. max_queue: requests that are admitted at a time. patience: seconds that a new request may have to wait.
    observe: called after each batch with (sequences, tokens, seconds).
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Feed]], Iterable[tuple[int, np.ndarray | Continued]]],
        max_batch_tokens: int,
        max_queue: int,
        patience: float,
        max_batch_requests: int | None = None,
        observe: Callable[[int, int, float], Any] = lambda *_: None,
    ):
        self._compute, self._observe = compute, observe
        self.max_batch_tokens, self.max_batch_requests = max_batch_tokens, max_batch_requests
        self.max_queue, self.patience = max_queue, patience
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._waiting: deque[_Request] = deque()
        self._wake, self._closing, self._task = asyncio.Event(), False, None
        self.admitted_requests = self.waiting_tokens = 0
        self._computing_tokens, self._seconds_a_token = 0, 0.0

    def start(self) -> None:
        """Begins to compute, on the running event loop."""
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Computes what was accepted, and ends."""
        self._closing = True
        self._wake.set()
        await self._task
        self._worker.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether requests are being computed."""
        return self._task is not None and not self._task.done()

    @property
    def expected_wait(self) -> float:
        """Seconds that a request would wait now, by the speed of the last batches."""
        return (self.waiting_tokens + self._computing_tokens) * self._seconds_a_token

    @contextmanager
    def admitted(self):
        """A place in the queue for a request, from before its text is tokenized until its answer is ready.

        Raises RequestError, overloaded, where all places are taken or the wait would be longer than ``patience``.
        """
        if self._closing:
            raise RequestError("unhealthy", "the server is shutting down")
        wait = self.expected_wait
        if self.admitted_requests >= self.max_queue or wait > self.patience:
            raise RequestError("overloaded", "Model is overloaded", retry_after=max(1, round(wait)))
        self.admitted_requests += 1
        try:
            yield
        finally:
            self.admitted_requests -= 1

    async def run(self, feeds: Sequence[Feed]) -> Computed:
        """The outputs for the sequences of one request; cancelled, those that are not yet in a batch are never computed, and
        those that are being continued get no further token.

        Raises RequestError, backend, where one of them cannot be computed.
        """
        request = _Request(feeds, asyncio.get_running_loop().create_future(), time.monotonic())
        request.outputs, request.missing = [None] * len(feeds), len(feeds)
        self.waiting_tokens += sum(feed.cost for feed in feeds)
        self._waiting.append(request)
        self._wake.set()
        try:
            return await request.future
        finally:
            self.waiting_tokens -= sum(feed.cost for feed in feeds[request.next :])
            request.next = len(feeds)
            for feed in feeds:
                if feed.continuation is not None:
                    feed.continuation.abandoned = True

    async def _serve(self):
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next_batch()
            if not batch:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            tokens = self._computing_tokens = sum(request.feeds[i].cost for request, i in batch)
            begun, deliver = time.monotonic(), functools.partial(loop.call_soon_threadsafe, self._deliver)
            await loop.run_in_executor(self._worker, self._compute_batch, batch, deliver)
            self._measure(len(batch), tokens, time.monotonic() - begun)

    def _next_batch(self) -> list[tuple[_Request, int]]:
        """(request, number of its sequence) for the next batch."""
        batch, tokens = [], 0
        while self._waiting and len(batch) != self.max_batch_requests:
            request = self._waiting[0]
            if request.next == len(request.feeds) or request.future.done():
                self._waiting.popleft()
                continue
            cost = request.feeds[request.next].cost
            if batch and tokens + cost > self.max_batch_tokens:
                break
            request.started = request.started or time.monotonic()
            batch.append((request, request.next))
            tokens += cost
            request.next += 1
            self.waiting_tokens -= cost
            self._waiting.rotate(-1)
        return batch

    def _compute_batch(self, batch, deliver):
        """Delivers what is computed, or where that fails what each gives alone, as none may suffer from another."""
        missing = dict(enumerate(batch))
        try:
            for number, output in self._compute([request.feeds[i] for request, i in batch]):
                deliver(*missing.pop(number), output)
        except Exception as error:  # whatever it is, the server must outlive it
            logger.error("a batch of %d sequences failed: %s", len(batch), where_it_failed(error))
            if len(batch) == 1:
                deliver(*batch[0], error)
                return
            for place in missing.values():
                self._compute_batch([place], deliver)

    def _deliver(self, request, i, output):
        self._computing_tokens -= request.feeds[i].cost
        request.take(i, output)

    def _measure(self, sequences, tokens, seconds):
        self._observe(sequences, tokens, seconds)
        latest = seconds / tokens
        self._seconds_a_token += (latest - self._seconds_a_token) * (0.2 if self._seconds_a_token else 1.0)
