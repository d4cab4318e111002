"""Which backend computes an operation, and why a faster one was passed over.

Every operation registers its candidates, fastest first, per device type. ``choose`` walks them and takes the first one
that has no objection; the objections of those before it are the reasons that ``explain`` shows. It imports nothing of
this package: implementations are named by path and loaded when first chosen.
"""

import functools
import importlib
import importlib.util
import operator
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

BACKENDS = ("auto", "triton", "cpp", "torch")


class Facts(NamedTuple):
    """What a choice may depend on: static properties of the arguments, never their values.

    device: torch device type, ``"cpu"``, ``"cuda"``, ...
    dtype: name of the main tensor's dtype without ``torch.``, e.g. ``"bfloat16"``.
    head_dim: attention's head dimension; None elsewhere.
    device_rows: True where only the device knows how many rows are real (a ``count`` tensor is given).
    deterministic: True where a row must have the same bits whatever rows it is batched with.
    """

    device: str
    dtype: str
    head_dim: int | None = None
    device_rows: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operation: where it lives, and what it objects to."""

    backend: str
    device: str  # a torch device type, or "any"
    path: str  # "module:attribute.path"
    objection: Callable[[Facts], str | None]
    optional: bool = False  # where it cannot serve, the next one is no loss to speak of

    def reason_against(self, facts: Facts) -> str | None:
        """Why this implementation cannot serve ``facts``; None if it can."""
        return _backend_missing(self.backend, facts.device) or self.objection(facts)

    def load(self) -> Callable:
        """The implementation itself, imported now."""
        module, function = self.path.split(":")
        return operator.attrgetter(function)(importlib.import_module(module))


class Choice(NamedTuple):
    """The chosen backend, its function, and ``(backend, reason)`` of each faster one that was passed over."""

    backend: str
    run: Callable
    skipped: tuple[tuple[str, str], ...]


_candidates: dict[str, list[Candidate]] = {}
_warned: set[tuple[tuple[str, str], ...]] = set()


def register(
    op: str,
    backend: str,
    path: str,
    *,
    device: str = "any",
    objection: Callable[[Facts], str | None] = lambda _: None,
    optional: bool = False,
) -> None:
    """Adds an implementation of ``op``; those registered earlier are preferred.

    path: ``"module:attribute.path"``, imported when it is first chosen.
    objection: maps ``Facts`` to the reason why it cannot serve them, or None.
    optional: without being asked for by name it is passed over in silence.
    """
    _candidates.setdefault(op, []).append(Candidate(backend, device, path, objection, optional))


def operations() -> tuple[str, ...]:
    """Names of all registered operations, backward passes included."""
    return tuple(_candidates)


def choose(op: str, facts: Facts, requested: str = "auto") -> Choice:
    """The implementation that runs ``op`` on ``facts``.

    requested: ``"auto"`` takes the first able candidate (``ROBERTA_FAST_BACKEND`` overrides it) and warns once where a
        faster one was passed over. A named backend must serve, if ``op`` has it at all.
    Raises ValueError if ``requested`` is no backend, or has an implementation of ``op`` that cannot serve ``facts``.
    """
    return _choose(op, facts, _asked_for(requested))


def backends(ops: tuple[str, ...], facts: Facts, requested: str = "auto") -> tuple[str | None, ...]:
    """The backend that ``choose`` would take for each of ``ops``, None for one that nothing can run. Warns of nothing."""
    return _backends(ops, facts, _asked_for(requested))


@functools.cache
def _backends(ops, facts, requested):
    return tuple(candidate and candidate.backend for candidate, _ in (_first_able(op, facts, requested) for op in ops))


def _asked_for(requested):
    return os.environ.get("ROBERTA_FAST_BACKEND", "auto") if requested == "auto" else requested


@functools.cache
def _choose(op: str, facts: Facts, requested: str) -> Choice:
    candidate, skipped = _first_able(op, facts, requested)
    if candidate is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or f"it does not run on {facts.device} tensors"
        who = "no backend can" if requested == "auto" else f"backend={requested!r} cannot"
        how = " with deterministic=True" if facts.deterministic else ""
        raise ValueError(f"{who} run {op} on {facts.device} {facts.dtype}{how}: {reasons}")
    choice = Choice(candidate.backend, candidate.load(), skipped)
    if skipped and skipped not in _warned:
        _warned.add(skipped)
        warnings.warn(f"roberta_fast: {describe(op, facts, choice)}", RuntimeWarning, stacklevel=3)
    return choice


def _first_able(op, facts, requested):
    """The candidate that serves, or None, and ``(backend, reason)`` of each faster one."""
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is not one of {BACKENDS}")
    # Triton's interpreter runs kernels on CPU tensors: a backend for tests, taken only when asked for by name.
    able = [c for c in _candidates[op] if c.device in ("any", facts.device) or c.backend == requested == "triton"]
    if any(c.backend == requested for c in _candidates[op]):
        able = [c for c in able if c.backend == requested]
    skipped = []
    for candidate in able:
        reason = candidate.reason_against(facts)
        if reason is None:
            return candidate, tuple(skipped)
        if not candidate.optional or requested == candidate.backend:
            skipped.append((candidate.backend, reason))
    return None, tuple(skipped)


def describe(op: str, facts: Facts, choice: Choice) -> str:
    """One sentence: what runs ``op`` and why nothing faster does."""
    reasons = "; ".join(f"not {name}: {reason}" for name, reason in choice.skipped)
    return f"{op} on {facts.device} {facts.dtype} runs on {choice.backend}" + (f" ({reasons})" if reasons else "")


def forget_choices() -> None:
    """Drops remembered choices, for tests and after an extension was built in the running process."""
    _choose.cache_clear()
    _backends.cache_clear()
    load_cpp.cache_clear()
    load_cpp_for_cuda.cache_clear()


@functools.cache
def load_cpp() -> str | None:
    """Loads the C++ extension; returns None when it is there, else why it is not."""
    try:
        importlib.import_module("roberta_fast._C")
    except ImportError as error:
        if importlib.util.find_spec("roberta_fast._C") is None:
            return "the C++ extension is not built (reinstall where g++ is, see README)"
        return f"the C++ extension does not load: {error}"
    return None


@functools.cache
def load_cpp_for_cuda() -> str | None:
    """``load_cpp``, and whether the extension was built with kernels for CUDA."""
    missing = load_cpp()
    if missing is None and importlib.import_module("roberta_fast._C").build_info()["cuda"] is None:
        return "the C++ extension is built without CUDA (reinstall where nvcc and a CUDA build of torch are)"
    return missing


def triton_interpreted() -> bool:
    """True where Triton runs kernels in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _backend_missing(backend: str, device: str) -> str | None:
    if backend == "cpp":
        return load_cpp_for_cuda() if device == "cuda" else load_cpp()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device != "cuda" and not triton_interpreted():
            return f"Triton kernels need CUDA tensors, got {device}"
    return None
