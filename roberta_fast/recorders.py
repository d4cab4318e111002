"""How a device records calls, to run them again without the host: by CUDA graphs on CUDA."""

import contextlib
import threading
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

WARM_UPS = 3  # compile kernels and let libraries make their workspaces


class Recorder(Protocol):
    """How one device records calls, and keeps those that share buffers apart."""

    def warm_up(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Calls ``compute`` as often as recording it needs; returns its last result."""

    def record(self, compute: Callable[[], object]) -> Callable[[], None]:
        """Returns what runs again, on the same memory, all that ``compute`` runs on the device now."""

    def turn(self, *tensors: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """What is enqueued inside, on ``tensors``, runs behind what was enqueued in earlier turns, on whatever stream."""


class CudaRecorder:
    """Records by ``torch.cuda.CUDAGraph``; all of its graphs share one memory pool, as they never run at once.

    Other threads may go on while one records, but for waiting on the whole device, as by ``torch.cuda.synchronize``: there CUDA
    raises as long as a capture is under way.
    """

    _one_at_a_time = threading.Lock()  # of all captures of the process, as torch demands
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}  # one a device: torch hands the same 32 out again and again

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = self._streams.get(device) or self._streams.setdefault(device, torch.cuda.Stream(device))
        self._pool = torch.cuda.graph_pool_handle()
        self._done, self._last = torch.cuda.Event(), None

    def warm_up(self, compute):
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                result = compute()
        current.wait_stream(self._stream)
        return result

    def record(self, compute):
        graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back where the inner one fails to leave. Only this thread is held to what a
        # capture allows; others go on.
        with self._one_at_a_time, torch.cuda.stream(torch.cuda.current_stream(self._device)):
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    compute()
            except RuntimeError:
                self._pool = torch.cuda.graph_pool_handle()  # a capture that failed may leave its pool unfit
                raise
        return graph.replay

    @contextlib.contextmanager
    def turn(self, *tensors):
        stream = torch.cuda.current_stream(self._device)
        if self._last not in (None, stream):
            stream.wait_event(self._done)
        for tensor in tensors:
            tensor.record_stream(stream)  # so that its memory outlives what is enqueued, whenever it is dropped
        try:
            yield
        finally:
            self._done.record(stream)
            self._last = stream


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By device type."""
