"""How one operation is measured: every contender is held to the reference on the same inputs, then timed.

A ``bench_<op>.py`` yields ``Case``s; pytest-benchmark runs them one by one, ``gpu.py`` all of them.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from roberta_fast import dispatch
from roberta_fast.benchmarks import measure, shapes
from roberta_fast.testing import assert_close_as_torch

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
FORWARD, BACKWARD, STEP = "forward", "backward", "forward and backward"

# torch's own fused kernels sum in another order than its composition: held to the same function, not to the same rounding.
PEER_SLACK = 8

Layout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    run: the case's inputs to the result. to_layout, from_layout: from an input or gradient as the case has it to the form in
    which this contender takes it, and back; neither is timed. checked: False where it draws its own dropout.
    """

    run: Callable[..., torch.Tensor]
    to_layout: Layout = lambda t: t
    from_layout: Layout = lambda t: t
    checked: bool = True


@dataclass(frozen=True)
class Case:
    """One operation in one direction at one size.

    work: floating-point operations or bytes of one run, in units of 1e12 or 1e9 as ``unit`` ("TFLOP/s", "GB/s") says.
    inputs: makes the floating inputs, in the tested dtype. reference: the plain composition, right in every dtype.
    verify_at: a smaller case of the same kind on which contenders are checked, where the reference would take too long.
    """

    operation: str
    size: str
    direction: str
    device: str
    work: float
    unit: str
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    contenders: dict[str, Contender]
    reference: Callable[..., torch.Tensor]
    verify_at: "Case | None" = None

    def __str__(self) -> str:
        return f"{self.operation} {self.direction} {self.size}"

    def rate(self, seconds: float) -> float:
        """The work done in ``seconds``, in ``unit``."""
        return self.work / seconds


class Contest:
    """A case with its inputs made: verifies contenders and readies them for timing."""

    def __init__(self, case: Case):
        self.case = case
        torch.manual_seed(0)
        self._inputs = case.inputs()
        self._gradient = self._random_gradient() if case.direction == BACKWARD else None

    def verify(self, name: str) -> None:
        """Raises AssertionError where a contender's results are not as near the reference as the plain composition's are."""
        if self._smaller:
            self._smaller.verify(name)
            return
        contender = self.case.contenders[name]
        if not contender.checked:
            return
        results = self._results(contender, self._inputs, self._gradient)
        baseline, exact = self._expected
        factor = 2.0 if self.case.direction == FORWARD else 3.0
        factor *= 1 if name.startswith("roberta_fast") else PEER_SLACK
        for i, (ours, theirs, reference) in enumerate(zip(results, baseline, exact, strict=True)):
            assert_close_as_torch(ours, theirs, reference, factor=factor, name=f"{self.case}, {name}, result {i}")

    def call(self, name: str) -> Callable[[], object]:
        """What to time: on CUDA the replay of a captured graph, so that launches from Python do not count."""
        stages, _ = self._stages(self.case.contenders[name], self._inputs, self._gradient)
        if self.case.device == "cuda":
            return measure.as_cuda_graph(*stages)[0]
        for stage in stages[:-1]:
            stage()
        return stages[-1]

    def _random_gradient(self):
        contender = next(iter(self.case.contenders.values()))
        return torch.randn_like(self._results(contender, self._inputs, None)[0])

    @functools.cached_property
    def _smaller(self):
        return Contest(self.case.verify_at) if self.case.verify_at else None

    @functools.cached_property
    def _expected(self):
        plain = Contender(self.case.reference)
        wide = {torch.float32: torch.float64}.get(self._inputs[0].dtype, torch.float32)
        upcast = [t.to(wide) for t in self._inputs]
        gradient = None if self._gradient is None else self._gradient.to(wide)
        return self._results(plain, self._inputs, self._gradient), self._results(plain, upcast, gradient)

    @classmethod
    def _results(cls, contender, inputs, gradient):
        stages, restore = cls._stages(contender, inputs, gradient)
        for stage in stages:
            result = stage()
        return [restore(t) for t in (result if isinstance(result, tuple) else (result,))]

    @staticmethod
    def _stages(contender, inputs, gradient):
        """The functions to call in turn, of which the last is measured, and what brings its results to the case's layout."""
        inputs = [contender.to_layout(t.detach()) for t in inputs]
        if gradient is None:
            return [torch.no_grad()(lambda: contender.run(*inputs))], contender.from_layout
        inputs = [t.requires_grad_() for t in inputs]
        gradient, made = contender.to_layout(gradient), {}

        def forward():
            made["out"] = contender.run(*inputs)

        def backward():
            return torch.autograd.grad(made["out"], inputs, gradient, retain_graph=True)

        return [forward, backward], contender.from_layout


def kernels_for(operation: str, facts: dispatch.Facts) -> tuple[str, ...]:
    """The compiled backends that serve both directions of ``operation`` there, or ``("torch",)`` where none does."""

    def serves(backend, op):
        try:
            return dispatch.choose(op, facts, backend).backend == backend
        except ValueError:
            return False

    backends = {"cuda": ("triton", "cpp"), "cpu": ("cpp",)}[facts.device]
    ops = [op for op in (operation, f"{operation}_backward") if op in dispatch.operations()]
    return tuple(b for b in backends if all(serves(b, op) for op in ops)) or ("torch",)


def facts(device: str, **details) -> dispatch.Facts:
    """What ``kernels_for`` needs, for the dtype that a device is measured in."""
    return dispatch.Facts(device, str(DTYPES[device]).removeprefix("torch."), **details)


def measure_case(case: Case, repeats: int) -> list[dict]:
    """Verifies and times every contender of a case, in alternation; one record each, without a number where it is red."""
    contest, calls, records = Contest(case), {}, {}
    for name in case.contenders:
        records[name] = {"operation": case.operation, "direction": case.direction, "size": case.size, "contender": name}
        try:
            contest.verify(name)
            calls[name] = contest.call(name)
        except _failures() as error:
            records[name]["red"] = f"{type(error).__name__}: {error}".splitlines()[0]
    clock = measure.clock_for(case.device)
    for name, timing in measure.alternate(calls, repeats, clock, warm_up_seconds=0.02).items():
        seconds = timing.facts()
        records[name] |= {"seconds": seconds, "unit": case.unit, "rate": case.rate(seconds["median"])}
    return list(records.values())


def _failures() -> tuple[type[Exception], ...]:
    """What a contender that is wrong, does not fit or does not compile raises."""
    if importlib.util.find_spec("triton") is None:
        return AssertionError, RuntimeError
    from triton.runtime.errors import TritonError

    return AssertionError, RuntimeError, TritonError


def run_benchmark(benchmark, case: Case, name: str) -> None:
    """One pytest-benchmark run: checks, then times, and saves the rate in ``extra_info``."""
    contest = Contest(case)
    contest.verify(name)
    call = contest.call(name)
    benchmark.group = str(case)
    if case.device == "cuda":
        clock = measure.clock_for("cuda")
        benchmark.pedantic(lambda: (call(), torch.cuda.synchronize()), rounds=20, warmup_rounds=3)
        seconds = measure.alternate({name: call}, 20, clock, warm_up_seconds=0.02)[name].median
    else:
        benchmark.pedantic(call, rounds=9, warmup_rounds=2)
        seconds = benchmark.stats.stats.median if benchmark.stats else None
    if benchmark.stats:
        benchmark.extra_info.update({"unit": case.unit, "rate": round(case.rate(seconds), 3)})


def parameters(make_cases: Callable[[str, shapes.OperationSizes], Iterable[Case]]) -> dict:
    """The arguments of ``pytest.mark.parametrize`` for every contender of every case on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = [(case, name) for case in make_cases(device, shapes.OPERATION_SIZES[device]) for name in case.contenders]
    ids = [f"{case.direction} {case.size} {name}".replace(" ", "-") for case, name in pairs]
    return {"argnames": ("case", "contender"), "argvalues": pairs, "ids": ids}
