"""A fast layer's linear weights in 8-bit floating point, for GPUs that multiply it.

Every scale follows from parameters, by the bounds in ``ops/fp8_linear.py``: those of a layer's input and of its attention from
the LayerNorm before it, those of its feed-forward block from its own first one. So a LayerNorm hands its result on in 8 bits as
well, ``Carried`` brings it to the next product, and the feed-forward's inner activations exist in 8 bits alone.
"""

from typing import NamedTuple

import torch
from torch import nn

from roberta_fast import ops
from roberta_fast.families import gelu_form, is_plain
from roberta_fast.int8 import fixed, joined_bias
from roberta_fast.ops.fp8_linear import (
    E4M3,
    Fp8Weight,
    chip_without,
    inverse_of,
    layer_norm_bound,
    linear_bound,
    quantize_weight_fp8,
)
from roberta_fast.packing import PackedBatch
from roberta_fast.parts import LINEARS, LayerParts


class Fp8Linear(NamedTuple):
    """One product: its weight, its bias float32 [M] or None, and the factors [K] by which its input is rounded."""

    weight: Fp8Weight
    bias: torch.Tensor | None
    inverse: torch.Tensor

    @classmethod
    def of(cls, linears: tuple[nn.Module, ...], bound: torch.Tensor) -> "Fp8Linear":
        """The product with several linears at once, of rows within ``bound`` float32 [K]."""
        weight = quantize_weight_fp8(torch.cat([linear.weight for linear in linears]), bound)
        return cls(Fp8Weight(*map(fixed, weight)), joined_bias(linears), fixed(inverse_of(bound)))

    def __call__(self, rows: torch.Tensor, batch: PackedBatch, **options) -> torch.Tensor:
        """rows [N, K], in 8 bits, to [N, M]; options: those of ``ops.fp8_linear``."""
        return ops.fp8_linear(rows, self.weight, self.bias, count=batch.count, backend=batch.options.backend, **options)

    def rounded(self, rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """rows [N, K] in 8 bits, as a LayerNorm handed them on or rounded now."""
        if rows.dtype == E4M3:
            return rows
        carried = batch.carried.take(rows) if batch.carried else None
        if carried is not None:
            return carried
        return ops.fp8_quantize(rows, self.inverse, count=batch.count, backend=batch.options.backend)


class Fp8Linears(NamedTuple):
    """The products of one layer.

    context_inverse: [H, D], the factors by which its attention rounds its result; following: those of its last LayerNorm, for the
    next layer.
    sources, biases: those of the modules ``reads``, weights and biases, that scales and copies are of. before: the weight of the
    LayerNorm before the layer.
    """

    projections: Fp8Linear
    context: Fp8Linear
    intermediate: Fp8Linear
    output: Fp8Linear
    context_inverse: torch.Tensor
    following: torch.Tensor
    sources: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    before: torch.Tensor

    precision = "fp8"
    operations = ("fp8_linear", "fp8_quantize", "add_layer_norm_fp8")
    reads = (*LINEARS, "attention_norm", "output_norm")
    is_released = False

    @classmethod
    def made_of(cls, parts: LayerParts, norm: nn.Module | None) -> "Fp8Linears":
        """From the weights of ``parts``. norm: the LayerNorm before the layer. Raises ValueError why there are none."""
        if norm is None:
            raise ValueError("the LayerNorm before the first layer is not known: accelerate the model, not its encoder alone")
        for name, module in (("before the layer", norm), ("after attention", parts.attention_norm), ("last", parts.output_norm)):
            if not is_plain(module, nn.LayerNorm) or module.bias is None:
                raise ValueError(f"the LayerNorm {name} is a {type(module).__name__}, which bounds nothing by its parameters")
        if parts.cross:
            raise ValueError("the layer attends to an encoder, whose rows no LayerNorm of this one bounds")
        if gelu_form(parts.activation) is None:
            raise ValueError(f"the activation is a {type(parts.activation).__name__}, and no GELU")
        before, between = (norm.weight, norm.bias), (parts.attention_norm.weight, parts.attention_norm.bias)
        context = Fp8Linear.of((parts.attention_output,), linear_bound(parts.value.weight, parts.value.bias, *before))
        return cls(
            Fp8Linear.of((parts.query, parts.key, parts.value), layer_norm_bound(*before)),
            context,
            Fp8Linear.of((parts.intermediate,), layer_norm_bound(*between)),
            Fp8Linear.of((parts.output,), linear_bound(parts.intermediate.weight, parts.intermediate.bias, *between)),
            fixed(context.inverse.view(-1, parts.attention.attention_head_size)),
            fixed(inverse_of(layer_norm_bound(parts.output_norm.weight, parts.output_norm.bias))),
            tuple(getattr(parts, name).weight for name in cls.reads),
            tuple(getattr(parts, name).bias for name in cls.reads),
            norm.weight,
        )

    @property
    def device(self) -> torch.device:
        """Where the copies are."""
        return self.following.device

    @property
    def inverses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors by which the layer's LayerNorms, after attention and the last, round their results to 8 bits."""
        return self.intermediate.inverse, self.following

    def query_key_value(self, rows: torch.Tensor, batch: PackedBatch, head_dim: int) -> tuple[torch.Tensor, ...]:
        """rows [N, C] to the three projections [N, H, head_dim]."""
        joined = self.projections(self.projections.rounded(rows, batch), batch, dtype=rows.dtype)
        return joined.unflatten(1, (3, -1, head_dim)).unbind(1)

    def attention_output(self, context: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """context [N, C], in 8 bits as attention gives it by ``context_inverse``, or not, to [N, C]."""
        return self.context(self.context.rounded(context, batch), batch, dtype=self.sources[0].dtype)

    def feed_forward(self, rows: torch.Tensor, batch: PackedBatch, parts: LayerParts) -> torch.Tensor:
        """output(activation(intermediate(rows))), what is between the products in 8 bits alone."""
        form, inverse = gelu_form(parts.activation), self.output.inverse
        activated = self.intermediate(self.intermediate.rounded(rows, batch), batch, gelu=form, inverse=inverse)
        return self.output(activated, batch, dtype=rows.dtype)


def check_device(weight: torch.Tensor, backend: str) -> None:
    """Raises ValueError, naming the device, where 8-bit floating point would not be a gain on that of ``weight``."""
    if weight.is_cuda:
        unable = chip_without(weight.device)
    else:  # by name, to see what it does to a model's outputs; and for kernels in Triton's interpreter
        unable = None if backend in ("torch", "triton") else weight.device
    if unable:
        raise ValueError(
            f"precision='fp8' is for GPUs of compute capability 8.9 or later, and the model is on {unable}; "
            "backend='torch' computes the same numbers anywhere, slowly"
        )
