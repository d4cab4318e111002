"""A fast layer's linear weights as 8-bit integers, for the CPU, and what stands for the fp32 ones where those were released."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from roberta_fast import ops
from roberta_fast.families import gelu_form
from roberta_fast.ops.int8_linear import Int8Weight, pack_weight, quantize_rows
from roberta_fast.packing import PackedBatch
from roberta_fast.parts import LINEARS, LayerParts

RELEASED = (
    "but release_weights has freed the layers' fp32 weights, and this model has its 8-bit copies alone: "
    "load the original anew to train, save, convert or restore it"
)


class Int8Linear(NamedTuple):
    """One product: its weight, and its bias float32 [M] or None, a copy as well."""

    weight: Int8Weight
    bias: torch.Tensor | None

    def __call__(self, rows: torch.Tensor, batch: PackedBatch, heads: int | None = None) -> torch.Tensor:
        """rows [N, K] to [N, M], or to [heads, N, M / heads]."""
        return ops.int8_linear(rows, self.weight, self.bias, heads=heads, count=batch.count, backend=batch.options.backend)


class Int8Linears(NamedTuple):
    """The products of one layer. sources, biases: the fp32 weights and biases of ``LINEARS`` that were copied."""

    projections: Int8Linear
    attention_output: Int8Linear
    intermediate: Int8Linear
    output: Int8Linear
    sources: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]

    precision = "int8"
    operations = ("int8_linear", "int8_feed_forward")
    reads = LINEARS
    device = torch.device("cpu")
    inverses, context_inverse = (None, None), None  # nothing but the products themselves rounds to 8 bits

    @classmethod
    def made_of(cls, parts: LayerParts, norm: nn.Module | None) -> "Int8Linears":
        """From the weights of ``parts``. Raises ValueError with the reason why there are none; norm is not asked for."""
        quantized = {}
        for name in LINEARS:
            weight = getattr(parts, name).weight
            if (weight.device.type, weight.dtype) != ("cpu", torch.float32):
                raise ValueError(f"{name} is {weight.dtype} on {weight.device}; they serve float32 on the CPU")
            try:
                quantized[name] = quantize_rows(weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return cls.of(parts, quantized)

    @classmethod
    def of(cls, parts: LayerParts, quantized: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> "Int8Linears":
        """From (integers int8 [M, K], scale float32 [M]) of every one of ``LINEARS``, and the biases that ``parts`` has now."""

        def joined(*names):
            weight = pack_weight(*(torch.cat(tensors) for tensors in zip(*(quantized[name] for name in names), strict=True)))
            weight = Int8Weight(*map(fixed, weight[:3]), weight.shape)
            return Int8Linear(weight, joined_bias([getattr(parts, name) for name in names]))

        return cls(joined("query", "key", "value"), *(joined(name) for name in LINEARS[3:]), (), ()).stands_for(parts)

    def stands_for(self, parts: LayerParts) -> "Int8Linears":
        """The same, in place of the weights and biases that ``parts`` has now."""
        modules = [getattr(parts, name) for name in LINEARS]
        return self._replace(sources=tuple(m.weight for m in modules), biases=tuple(m.bias for m in modules))

    def query_key_value(self, rows: torch.Tensor, batch: PackedBatch, head_dim: int) -> tuple[torch.Tensor, ...]:
        """rows [N, C] to the three projections [N, H, head_dim], where the rows of a head follow each other."""
        heads = self.projections.weight.shape[0] // head_dim
        return self.projections(rows, batch, heads).unflatten(0, (3, -1)).transpose(1, 2).unbind(0)

    def feed_forward(self, rows: torch.Tensor, batch: PackedBatch, parts: LayerParts) -> torch.Tensor:
        """output(activation(intermediate(rows))), one operation where the activation is a GELU."""
        form = gelu_form(parts.activation)
        if form is None:
            return self.output(parts.activation(self.intermediate(rows, batch)), batch)
        options = {"gelu": form, "count": batch.count, "backend": batch.options.backend}
        return ops.int8_feed_forward(rows, *self.intermediate, *self.output, **options)

    def quantized(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(integers, scale, bias) of every one of ``LINEARS``."""
        rows = [source.shape[0] for source in self.sources[:3]]
        integers, scale = self.projections.weight.integers().split(rows), self.projections.weight.scale.split(rows)
        biases = [None] * 3 if self.projections.bias is None else self.projections.bias.split(rows)
        found = dict(zip(LINEARS[:3], zip(integers, scale, biases, strict=True), strict=True))
        for name in LINEARS[3:]:
            linear = getattr(self, name)
            found[name] = (linear.weight.integers(), linear.weight.scale, linear.bias)
        return found

    @property
    def is_released(self) -> bool:
        """Whether the fp32 weights are gone."""
        return isinstance(self.sources[0], ReleasedWeight)


def joined_bias(linears: Sequence[nn.Module]) -> torch.Tensor | None:
    """The biases of linear modules one after the other, a copy in float32, zeros for those without; None where none has one."""
    given = [linear.bias for linear in linears if linear.bias is not None]
    if not given:
        return None
    biases = [given[0].new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias for linear in linears]
    return fixed(torch.cat(biases).detach().float())


def fixed(tensor: torch.Tensor) -> torch.Tensor:
    """As a parameter, though of no module: ``torch.compile`` takes the sizes of those, and of no other tensors, for constants."""
    return nn.Parameter(tensor, requires_grad=False)


class ReleasedWeight(torch.Tensor):
    """Stands where a weight was: its shape and dtype, no memory, and an error for whoever computes with it or copies it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, shape: Iterable[int]):
        weight = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)
        weight._is_param = True  # by which torch tells parameters of other classes than its own
        return weight

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"roberta_fast: {func} needs a weight, {RELEASED}")

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), ReleasedWeight(self.shape))

    def __reduce_ex__(self, protocol):
        return ReleasedWeight, (tuple(self.shape),)

    def __repr__(self):
        return f"ReleasedWeight({tuple(self.shape)})"
