"""Timing, memory, and the record of where a number comes from."""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# Worker threads of ONNX Runtime were seen to spin for some 30 ms after a call, on cores that the next one needs.
SPIN_SECONDS = 0.05
L2_FLUSH_BYTES = 256 << 20  # several times the largest L2 of the GPUs that this runs on

# NVIDIA's datasheets, without sparsity. "H100" is the SXM part.
HALF_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}

# What a kernel's name says, in the order in which it is asked.
KERNEL_KINDS = {
    "optimizer": r"adam|multi_tensor_apply",
    "loss": r"cross_entropy|nll_loss|log_?softmax",
    "attention": r"attention|attn|flash|fmha|softmax|varlen",
    "norms": r"layer_?norm",
    "products": r"gemm|cutlass|cublas|nvjet|xmma|linear|feed_forward|mm\b|dnnl|mkl",
}


@dataclass(frozen=True)
class Timing:
    """Times of one function, seconds, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: int) -> float:
        """The time that ``percent`` of the runs do not exceed, interpolated."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    def times_faster(self, than: "Timing") -> float:
        """How many times faster than ``than``, the median over the rounds in which both ran: drift of the machine cancels."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, than.seconds, strict=True))

    def facts(self) -> dict:
        """What a result records of it."""
        facts = {"median": self.median, "p20": self.percentile(20), "p80": self.percentile(80), "repeats": len(self.seconds)}
        return facts | ({"p99": self.percentile(99)} if len(self.seconds) >= 100 else {})


def host_clock(function: Callable[[], object]) -> float:
    """Seconds that one call takes on the CPU."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def waiting_clock(function: Callable[[], object]) -> float:
    """Seconds from one call to its end on the GPU, as the host sees it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class CudaClock:
    """Seconds that one call takes on the GPU, between two events, with a cold L2 cache.

    The flush before the first event also gives the host time to enqueue the work, so that short kernels are timed, not
    their launch. Where the work of a call is many launches, its host time counts, as it does for the user.
    """

    def __init__(self):
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: str) -> Callable[[Callable[[], object]], float]:
    """The clock of a torch device type."""
    return CudaClock() if device == "cuda" else host_clock


def alternate(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[Callable[[], object]], float],
    warm_up_seconds: float = 0.0,
    pause_seconds: float = 0.0,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Times the functions in turn, A B A B ..., ``repeats`` rounds after a warm-up, so that all meet the same machine.

    warm_up_seconds: each function runs at least twice and at least that long before the first round. pause_seconds: idled before
    each timed call. progress: called with a function's name after its warm-up, and after each of its rounds.
    """
    for name, function in functions.items():
        spent, calls = 0.0, 0
        while calls < 2 or spent < warm_up_seconds:
            spent, calls = spent + clock(function), calls + 1
        progress(name)
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(pause_seconds)
            seconds[name].append(clock(function))
            progress(name)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def as_cuda_graph(*stages: Callable[[], object]) -> tuple[Callable[[], object], object]:
    """Captures the stages in turn, each in its own CUDA graph; returns the replay of the last one and its result.

    So a backward pass is captured, and timed alone, behind the forward pass that it belongs to.
    Raises RuntimeError where something in a stage cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for stage in stages:
                stage()
    torch.cuda.current_stream().wait_stream(stream)
    pool, graphs, result = torch.cuda.graph_pool_handle(), [], None
    for stage in stages:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
            result = stage()
    for graph in graphs:
        graph.replay()
    # The replay holds all graphs: the earlier ones own memory that the last one reads.
    return lambda: graphs[-1].replay(), result


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes that one call of ``function`` needs at its peak beyond what was in use before, what it returns included.

    CUDA: as the allocator counts them. CPU: growth of the resident set up to its peak, after freed memory went back to the
    system; None where the system does not keep such a mark (Linux does).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # "5" sets the mark of the peak resident set back to the present size (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        result = function()
        peak = _status_bytes("VmHWM")
    except (OSError, AttributeError, KeyError):
        return None
    del result
    return max(0, peak - before)


def kernel_split(function: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of one call, the second one, by kernel on CUDA and by PyTorch's operation on a CPU, named by at most 80 letters."""
    activity = torch.profiler.ProfilerActivity
    function()
    with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profile:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {}
    for event in profile.key_averages():
        seconds = getattr(event, field) / 1e6
        if seconds and not event.is_user_annotation:  # which lies around kernels that are listed themselves
            times[event.key[:80]] = times.get(event.key[:80], 0.0) + seconds
    return times


def kernel_kind(name: str) -> str:
    """Which of ``KERNEL_KINDS`` a kernel is, by its name; ``"other"`` where none."""
    return next((kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _status_bytes(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields[field].split()[0]) << 10


@contextmanager
def threads(count: int | None):
    """Runs torch's CPU kernels on ``count`` threads; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def busy() -> str | None:
    """What says that other processes compete for the CPU, which makes every number here noisy; None where nothing does."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    return f"the machine is busy: load {load:.1f} on {cores} cores" if load > 0.5 * cores else None


def environment(device: str, commit: str | None = None) -> dict:
    """Where and with what a result was measured.

    commit: the source's, for a copy that is no git checkout; None asks git.
    """
    packages = ("torch", "triton", "transformers", "numpy", "roberta_fast")
    peers = ("onnxruntime", "openvino", "nncf", "ctranslate2", "sentence-transformers")
    return {
        "device": device,
        "machine": machine(device),
        "cpu": machine("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": {name: _version(name) for name in (*packages, *peers)},
        **_source(commit),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def machine(device: str) -> str:
    """The GPU's name, or the CPU's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{' '.join(names[0].split()) if names else platform.processor() or platform.machine()} ({capability})"


def peak_tflops(device: str, dtype: str) -> float | None:
    """The datasheet's dense tensor-core rate for half types on this GPU, which MFU is reckoned from; None where not listed."""
    if device != "cuda" or dtype == "float32":
        return None
    name = machine(device)
    return next((peak for gpu, peak in HALF_PEAK_TFLOPS.items() if gpu in name), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source(commit: str | None) -> dict:
    """The commit, and whether code that a result depends on differs from it."""
    if commit:
        return {"commit": commit, "dirty": False}
    measured = ("roberta_fast", "kernels", "csrc", "setup.py", "benchmarks/*.py")
    try:
        if Path(_git("rev-parse", "--show-toplevel")) != ROOT:
            return {"commit": None, "dirty": None}
        head = _git("rev-parse", "--short=12", "HEAD")
        return {"commit": head, "dirty": bool(_git("status", "--porcelain", "--", *measured))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()
