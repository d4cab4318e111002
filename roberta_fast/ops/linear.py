"""y = x Wᵀ + b (+ residual) over packed rows.

On CUDA, where the host knows the number of rows, and in training this is ``torch.nn.functional.linear``, which nothing beats for
a plain GEMM: bias and all it is one call of cuBLASLt. With a residual too it is that in inference, by a kernel in C++ where one
is built. Where only the device knows the number (``count``), the GEMM reads it there; where a row must have the same bits in
any batch (``deterministic``), it is a GEMM that sums every element in one order. On the CPU that one is also faster for few rows,
and for any number, in training too, on processors that MKL has no AVX-512 for.
Backward: dx = dy W, dW = dyᵀ x, db = sum(dy) over the real rows.
"""

import torch
import torch.nn.functional as F

from roberta_fast import dispatch
from roberta_fast.ops.registration import (
    autocast_to,
    check_rows,
    define,
    facts_of,
    float32_or_bfloat16,
    is_plain_call,
    is_transformed,
    real_rows,
    refuse,
    register_autograd,
    register_backends,
)

CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weightᵀ + bias (+ residual).

    x: [N, K]; weight: [M, K]; bias: [M] or None; residual: [N, M] or None, added in float32 before rounding by kernels.
    count: int32 [1] on x's device; rows from it on are never read and hold anything in the result. None: all are real.
    deterministic: a row gives bitwise the same whatever it is batched with; the backward pass is the same from run to run.
    packed: what ``prepack`` makes of weight, or None; the CPU's kernel multiplies it in place of weight.
    Under autocast computes in its dtype. Returns [N, M]. Raises ValueError naming the argument that does not fit.
    """
    check_rows(x, count)
    check_weight(x, weight, bias)
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0]):
        refuse("residual", f"shape {tuple(residual.shape)}", f"[N, M] = {(x.shape[0], weight.shape[0])}")
    if count is None and not deterministic:
        operands = x, weight, bias, residual
        if is_plain_call(operands) and _kernel_pays(x, residual):
            return _forward.unwatched(*operands, None, False, backend, packed)
        if is_plain_call(operands, records=False) and backend in ("auto", "cpp") and _trains_faster(x, weight):
            return _forward(*operands, None, False, backend, packed)
        return linear_ref(*operands)
    x, weight, bias, residual = autocast_to(x, weight, bias, residual)
    return _forward(x, weight, bias, residual, count, deterministic, backend, packed)


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """weight, float32 [M, K] on the CPU, as the kernel reads it: float32 [panels, K, 64], 64 output channels a panel.

    Zeros are behind M. It takes as much memory as weight once more. Raises NotImplementedError where ``prepack_objection`` has
    a reason.
    """
    reason = prepack_objection(weight)
    if reason:
        raise NotImplementedError(f"roberta_fast: no weight can be prepacked: {reason}")
    return torch.ops.roberta_fast_cpp.prepack(weight)


def prepack_objection(weight: torch.Tensor, backend: str = "auto") -> str | None:
    """Why ``weight`` cannot be prepacked for ``backend``, or None."""
    if backend not in ("auto", "cpp"):
        return f"packed ones are read by the C++ kernel alone, and backend={backend!r}"
    if (weight.device.type, weight.dtype) != ("cpu", torch.float32):
        return f"weights are {weight.dtype} on {weight.device}, and packed ones serve float32 on the CPU"
    return dispatch.load_cpp()


def _kernel_pays(x, residual):
    """Where the kernel of the CPU serves, or on CUDA the one that adds a residual, in x's own dtype."""
    device = x.device.type
    if device == "cuda":
        serves = residual is not None and x.dtype in CUDA_DTYPES and dispatch.load_cpp_for_cuda() is None
    else:
        serves = device == "cpu" and (x.dtype == torch.float32 or _multiplies_bfloat16(x))
    return serves and not torch.is_autocast_enabled(device)


def _multiplies_bfloat16(x):
    is_one = x.dtype == torch.bfloat16 and dispatch.load_cpp() is None
    return is_one and torch.ops.roberta_fast_cpp.multiplies_bfloat16()


def _trains_faster(x, weight):
    """Where both factors want gradients, and PyTorch's float32 products are slow on this processor."""
    trains = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    is_one = trains and (x.device.type, x.dtype) == ("cpu", torch.float32) and not torch.is_autocast_enabled("cpu")
    return is_one and not is_transformed() and outruns_pytorch()


def outruns_pytorch() -> bool:
    """Whether the float32 kernel is faster than PyTorch's products on this processor for any number of rows, hence trains too."""
    return dispatch.load_cpp() is None and torch.ops.roberta_fast_cpp.outruns_pytorch()


def check_weight(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Checks that ``weight`` [M, K] and ``bias`` [M] fit ``x`` [N, K] in shape and, outside autocast, in dtype."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        refuse("weight", f"shape {tuple(weight.shape)}", f"[M, {x.shape[1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        refuse("bias", f"shape {tuple(bias.shape)}", f"[{weight.shape[0]}]")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            refuse(name, parameter.dtype, f"of x's dtype {x.dtype}")


def linear_ref(x, weight, bias=None, residual=None, count=None, deterministic=False):
    """The composition in plain PyTorch."""
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def linear_backward_ref(dy, x, weight, has_bias, count=None):
    """Gradients (dx, dweight, dbias); dbias is empty where there is no bias."""
    dy, x = real_rows(dy, count), real_rows(x, count)
    return dy @ weight, dy.mT @ x, dy.sum(0) if has_bias else dy.new_empty(0)


def _forward_implementation(x, weight, bias, residual, count, deterministic, backend, packed=None):
    choice = dispatch.choose("linear", facts_of(x, device_rows=count is not None, deterministic=deterministic), backend)
    return choice.run(x, weight, bias, residual, count, deterministic, *only_cpp(choice, packed))


def only_cpp(choice: dispatch.Choice, packed: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The argument ``packed`` of a kernel in C++, which others do not take."""
    return () if packed is None or choice.backend != "cpp" else (packed,)


def _forward_fake(x, weight, bias, residual, count, deterministic, backend, packed=None):
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward_implementation(dy, x, weight, has_bias, count, backend):
    facts = facts_of(x, device_rows=count is not None)
    return dispatch.choose("linear_backward", facts, backend).run(dy, x, weight, has_bias, count)


def _backward_fake(dy, x, weight, has_bias, count, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1] if has_bias else (0,))


_forward = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? count, bool deterministic, str backend, "
    "Tensor? packed=None) -> Tensor",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool has_bias, Tensor? count, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, count, _, ctx.backend, _ = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight, count)


def _autograd_backward(ctx, dy):
    x, weight, count = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy.contiguous(), x, weight, ctx.has_bias, count, ctx.backend)
    return dx, dweight, dbias if ctx.has_bias else None, dy if ctx.has_residual else None, *[None] * 4


register_autograd("linear", _autograd_backward, _setup_context)


def _cublaslt_objection(facts):
    if facts.device_rows or facts.deterministic:
        return "cuBLASLt takes the number of rows from the host, and chooses by it"
    names = [str(dtype).removeprefix("torch.") for dtype in CUDA_DTYPES]
    return None if facts.dtype in names else f"cuBLASLt multiplies {', '.join(names)}, not {facts.dtype}"


def product_objection(facts: dispatch.Facts) -> str | None:
    """The objection of the CPU's products: those of bfloat16 take instructions that not every processor has."""
    missing = facts.dtype == "bfloat16" and not torch.ops.roberta_fast_cpp.multiplies_bfloat16()
    return "this processor has no AVX-512 BF16" if missing else float32_or_bfloat16(facts)


dispatch.register(
    "linear",
    "cpp",
    "torch:ops.roberta_fast_cpp.linear_fwd.default",
    device="cuda",
    objection=_cublaslt_objection,
    optional=True,
)
register_backends("linear", {"linear": "linear_fwd"}, in_cpp=product_objection)
register_backends("linear", {"linear_backward": "linear_bwd"}, in_cpp=float32_or_bfloat16)
