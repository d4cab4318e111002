"""The ``torch.ops.roberta_fast`` library: each schema is defined here once, from Python, so that every install has it."""

import functools
from collections.abc import Callable
from typing import NoReturn

import torch
from torch.autograd import forward_ad

from roberta_fast import dispatch

_library = torch.library.Library("roberta_fast", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Defines ``roberta_fast::<schema>`` for every device, with its shape function, and returns a function that calls it. Its
    attribute ``unwatched`` is for callers that know that theirs ``is_plain_call``.

    implementation: picks a backend by ``dispatch.choose`` and runs it; its results never alias its arguments.
    fake: returns empty tensors of the right shapes, dtypes and strides, for tracing and compilation.
    Calling it raises NotImplementedError inside forward-mode differentiation.
    """
    name = schema.split("(", 1)[0]

    def run(*arguments):
        # torch drops the tangents of an operation without a rule for them, and says nothing.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"roberta_fast::{name} has no forward-mode derivative")
        first = arguments[0]
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current one
                return implementation(*arguments)
        return implementation(*arguments)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"roberta_fast::{name}", fake, lib=_library)
    operator = getattr(torch.ops.roberta_fast, name).default

    def call(*arguments):
        return run(*arguments) if is_plain_call(arguments) else operator(*arguments)

    call.unwatched = run
    return call


def is_plain_call(arguments: tuple, records: bool | None = None) -> bool:
    """True where nobody watches: no gradient, transform, mode or subclass. There torch's dispatcher, about 25 µs a call for an
    operation written in Python, would only find its way to the implementation.

    records: whether gradients are recorded; None: as torch says.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    records = torch.is_grad_enabled() if records is None else records
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN:
            if records and argument.requires_grad:
                return False
        elif kind not in _VALUES and isinstance(argument, torch.Tensor):
            return False
    return True


def is_transformed() -> bool:
    """True inside a torch.func transform and in forward-mode differentiation, for which the operations have no rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


TRANSFORMED = "a torch.func transform or forward-mode differentiation"
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_VALUES = {type(None), bool, int, float, str}  # known to be no tensors, which asking torch takes longer


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attaches a backward formula, itself made of operations of this library, to ``roberta_fast::<name>``.

    The gradients have no derivative: under ``create_graph=True``, differentiating them raises NotImplementedError.
    """

    def once(ctx, *gradients):
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        return _OnceDifferentiable.apply(name, *(r if r is None else r.requires_grad_() for r in results))

    torch.library.register_autograd(f"roberta_fast::{name}", once, setup_context=setup_context, lib=_library)


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on, and raises where someone differentiates them."""

    @staticmethod
    def forward(ctx, name, *gradients):
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"roberta_fast::{ctx.name} cannot be differentiated twice; restore_model(model) can")


def float32_or_bfloat16(facts: dispatch.Facts) -> str | None:
    """The objection of C++ kernels that compute both."""
    return _other_dtype(facts, "float32", "bfloat16")


def _float32(facts):
    return _other_dtype(facts, "float32")


def _other_dtype(facts, *dtypes):
    return None if facts.dtype in dtypes else f"the C++ kernel computes {' and '.join(dtypes)}, not {facts.dtype}"


def register_backends(
    stem: str,
    kernels: dict[str, str] | None = None,
    *,
    backends: tuple[str, ...] = ("triton", "cpp", "torch"),
    cpp: str = "torch:ops.roberta_fast_cpp.{kernel}.default",
    any_dtype: bool = False,
    in_cpp: Callable[[dispatch.Facts], str | None] = _float32,
    objection: Callable[[dispatch.Facts], str | None] = lambda _: None,
) -> None:
    """Registers the candidates of the operations in ``ops/<stem>.py`` by the naming rule that all of them share.

    kernels: operation to kernel name, by default ``<stem>`` to ``<stem>_fwd`` and ``<stem>_backward`` to ``<stem>_bwd``.
    cpp: the path of what serves in C++. Triton serves CUDA tensors, C++ CPU tensors, the reference composition ``<op>_ref``
    any. Kernels take every floating dtype but float64, unless ``any_dtype``; ``objection`` adds what else they cannot do, and
    ``in_cpp`` what those in C++ cannot.
    """

    def triton_objection(facts):
        return "float64 is not a kernel dtype" if facts.dtype == "float64" and not any_dtype else objection(facts)

    def cpp_objection(facts):
        return (None if any_dtype else in_cpp(facts)) or objection(facts)

    for op, kernel in (kernels or {stem: f"{stem}_fwd", f"{stem}_backward": f"{stem}_bwd"}).items():
        for backend, path, device, reason in (
            ("triton", f"roberta_fast.kernels.{stem}:{kernel}", "cuda", triton_objection),
            ("cpp", cpp.format(kernel=kernel), "cpu", cpp_objection),
            ("torch", f"roberta_fast.ops.{stem}:{op}_ref", "any", _torch_objection),
        ):
            if backend in backends:
                dispatch.register(op, backend, path, device=device, objection=reason)


def _torch_objection(facts):
    return "PyTorch's products do not have the same bits in every batch" if facts.deterministic else None


def facts_of(
    tensor: torch.Tensor, head_dim: int | None = None, device_rows: bool = False, deterministic: bool = False
) -> dispatch.Facts:
    """The static facts that ``dispatch.choose`` needs, read off an operation's main tensor."""
    return dispatch.Facts(tensor.device.type, _dtype_name(tensor.dtype), head_dim, device_rows, deterministic)


@functools.cache
def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def refuse(argument: str, value: object, expected: object) -> NoReturn:
    """Raises ValueError naming ``argument``, what was expected and the value that came instead.

    Called behind an ``if``: a message costs more than the check, and under ``torch.compile`` it would fix the sizes it names.
    """
    raise ValueError(f"{argument} must be {expected}, got {value}")


def check_rows(x: torch.Tensor, count: torch.Tensor | None, argument: str = "x") -> None:
    """Checks that ``x`` is a floating [N, C] tensor and ``count``, if given, an int32 [1] tensor beside it."""
    if x.dim() != 2:
        refuse(argument, f"shape {tuple(x.shape)}", "a packed [N, C] tensor")
    if not x.is_floating_point():
        refuse(argument, x.dtype, "a floating-point tensor")
    if count is not None and (count.shape != (1,) or count.dtype != torch.int32):
        refuse("count", f"{count.dtype} {tuple(count.shape)}", "int32 [1]")
    if count is not None and count.device != x.device:
        refuse("count", count.device, f"on {x.device}, as {argument}")


def autocast_to(x: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Under autocast, the tensors cast to its dtype, as ``torch.nn.functional.linear`` would; else unchanged."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return [t if t is None else t.to(dtype) for t in (x, *tensors)]
    return [x, *tensors]


def real_rows(x: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """``x`` [N, C] with the rows from ``count`` on replaced by zeros, whatever they hold, without a host sync."""
    if count is None:
        return x
    return torch.where(torch.arange(x.shape[0], device=x.device)[:, None] < count, x, 0)
