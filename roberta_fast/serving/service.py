"""What happens to a request between its route and the model: admission, threads, deadline, disconnection."""

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from roberta_fast.serving import generation
from roberta_fast.serving.batching import Batcher
from roberta_fast.serving.engine import Engine
from roberta_fast.serving.errors import RequestError
from roberta_fast.serving.metrics import Metrics

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is there to read it
NOT_BUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's
PREPARING_THREADS = 2
PATIENCE = 0.5  # of a request's time may pass in the queue; where more would, it is told at once


class Service:
    """One worker's engine and its queue."""

    def __init__(self, engine: Engine, metrics: Metrics):
        self.engine, self.settings, self.metrics = engine, engine.settings, metrics
        self.batcher: Batcher | None = None
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")

    @asynccontextmanager
    async def computing(self):
        """Computes what is asked for; at the end everything that was accepted."""
        settings = self.settings
        self.batcher = Batcher(
            self.engine.outputs,
            self.engine.max_batch_tokens,
            settings.max_queue,
            settings.timeout * PATIENCE,
            settings.max_batch_requests,
            self.metrics.observe_batch,
        )
        self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.close()
            self._threads.shutdown()

    def check_health(self) -> None:
        """Raises RequestError, unhealthy, where nothing is being computed."""
        if self.batcher is None or not self.batcher.is_alive:
            raise RequestError("unhealthy", "unhealthy")

    def check_task(self, task: str) -> None:
        """Raises RequestError, backend, where the model is of another task."""
        if self.engine.task != task:
            raise RequestError("backend", f"model is not one for {task}, but for {self.engine.task}")

    async def respond(
        self, request: Request, count: int, prepare: Callable, *arguments, shape: Callable[[Any], Any] = lambda result: result
    ) -> Response:
        """The response whose body is ``shape(result)``, of the result of the job that ``prepare(engine, *arguments)`` gives.

        count: texts in the request. Nothing of it is computed any more once the client is gone or the deadline has passed.
        Raises RequestError.
        """
        if count > self.settings.max_client_batch_size:
            limit = self.settings.max_client_batch_size
            raise RequestError("validation", f"batch size {count} > maximum allowed batch size {limit}")
        work = asyncio.ensure_future(self._work(prepare, arguments, shape))
        try:
            if not await self._is_there(work, request):
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return work.result()
        finally:
            work.cancel()

    async def stream(self, request: Request, prepare: Callable, *arguments) -> Response:
        """A response of the events that the job of ``prepare(engine, *arguments, send)`` sends, begun with the first of them.

        What fails before that has a status of its own; what fails later is the last event. Raises RequestError.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def send(event):
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = asyncio.ensure_future(self._work(prepare, (*arguments, send), lambda results: None))
        work.add_done_callback(lambda _: events.put_nowait(None))
        first = asyncio.ensure_future(events.get())
        is_taken_on = False
        try:
            if not await self._is_there(first, request):
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            if first.result() is None:
                return work.result()
            is_taken_on = True
            return _EventStream(self._events(work, first.result(), events), work, self.metrics.disconnects.inc)
        finally:
            first.cancel()
            if not is_taken_on:
                work.cancel()

    async def _events(self, work, event, events):
        while event is not None:
            yield event
            event = await events.get()
        if error := work.exception():
            yield generation.sse({"error": error.message, "error_type": error.error_type})

    async def _is_there(self, awaited, request):
        """Whether ``awaited`` is done before the client is gone."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({awaited, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not awaited.done():
            self.metrics.disconnects.inc()
        return awaited.done()

    async def _work(self, prepare, arguments, shape):
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        with self.batcher.admitted(), self.metrics.in_flight.track_inprogress():
            try:
                async with asyncio.timeout(self.settings.timeout):
                    job = await loop.run_in_executor(self._threads, prepare, self.engine, *arguments)
                    prepared = time.monotonic()
                    computed = await self.batcher.run(job.feeds)
                    body = await loop.run_in_executor(self._threads, _body, job, computed.outputs, shape)
            except TimeoutError:
                raise RequestError("timeout", f"not computed within {self.settings.timeout:g} seconds") from None
        self.metrics.queue_seconds.observe(computed.queued)
        times = {
            "x-total-time": time.monotonic() - begun,
            "x-tokenization-time": prepared - begun,
            "x-queue-time": computed.queued,
            "x-inference-time": computed.computing,
        }
        headers = {"x-compute-type": self.engine.device, "x-compute-tokens": str(job.tokens)}
        headers |= {name: str(round(1e3 * seconds)) for name, seconds in times.items()}
        return Response(body, media_type="application/json", headers=headers)


class _EventStream(StreamingResponse):
    """Ends ``work`` with the connection, even with one that is gone before the first event is sent."""

    def __init__(self, events, work, disconnected):
        super().__init__(events, media_type="text/event-stream", headers=NOT_BUFFERED)
        self._work, self._disconnected = work, disconnected

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._work.done():
                self._disconnected()
            self._work.cancel()


def _body(job, outputs, shape):
    return json.dumps(shape(job.finish(outputs)), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
