"""8-bit copies of a fast layer's linear weights: made by explicit call, read in inference, dropped where they would be wrong.

They stand beside the parameters, in ``layer.int8``, which holds the reason where there are none. So ``parameters()``,
``state_dict()`` and what is saved stay the stock model's. Once the fp32 weights are released, nothing is dropped any more: what
would need them raises, and says why.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from roberta_fast import ops
from roberta_fast.families import LayerParts, gelu_form, is_plain, layer_parts, unwrapped
from roberta_fast.ops.int8_linear import Int8Weight, pack_weight, quantize_rows
from roberta_fast.options import FastOptions
from roberta_fast.packing import PackedBatch

LINEARS = ("query", "key", "value", "attention_output", "intermediate", "output")
AGAIN = "accelerate_model(model, precision='int8') makes them again"
RELEASED = (
    "but release_weights has freed the layers' fp32 weights, and this model has its 8-bit copies alone: "
    "load the original anew to train, save, convert or restore it"
)


class Int8Linear(NamedTuple):
    """One product: its weight, and its bias float32 [M] or None, a copy as well."""

    weight: Int8Weight
    bias: torch.Tensor | None

    def __call__(self, rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """rows [N, K] to [N, M]."""
        return ops.int8_linear(rows, self.weight, self.bias, count=batch.count, backend=batch.options.backend)


class Int8Linears(NamedTuple):
    """The products of one layer. sources: the fp32 weights of ``LINEARS`` that were copied."""

    query_key_value: Int8Linear
    attention_output: Int8Linear
    intermediate: Int8Linear
    output: Int8Linear
    sources: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, parts: LayerParts, quantized: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> "Int8Linears":
        """From (integers int8 [M, K], scale float32 [M]) of every one of ``LINEARS``, and the biases that ``parts`` has now."""

        def joined(*names):
            weight = pack_weight(*(torch.cat(tensors) for tensors in zip(*(quantized[name] for name in names), strict=True)))
            weight = Int8Weight(*map(_fixed, weight[:3]), weight.shape)
            biases = [getattr(parts, name).bias for name in names]
            if all(bias is None for bias in biases):
                return Int8Linear(weight, None)
            zeros = [torch.zeros(quantized[name][1].shape) if b is None else b for name, b in zip(names, biases, strict=True)]
            return Int8Linear(weight, _fixed(torch.cat([bias.detach() for bias in zeros])))

        sources = tuple(getattr(parts, name).weight for name in LINEARS)
        return cls(joined("query", "key", "value"), *(joined(name) for name in LINEARS[3:]), sources)

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
        integers, scale = self.query_key_value.weight.integers().split(rows), self.query_key_value.weight.scale.split(rows)
        biases = [None] * 3 if self.query_key_value.bias is None else self.query_key_value.bias.split(rows)
        found = dict(zip(LINEARS[:3], zip(integers, scale, biases, strict=True), strict=True))
        for name in LINEARS[3:]:
            linear = getattr(self, name)
            found[name] = (linear.weight.integers(), linear.weight.scale, linear.bias)
        return found

    @property
    def is_released(self) -> bool:
        """Whether the fp32 weights are gone."""
        return isinstance(self.sources[0], ReleasedWeight)


def _fixed(tensor):
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


class Int8Holder:
    """Mixin of the fast layer: holds the copies, and drops them where they would be wrong."""

    int8: Int8Linears | str = f"none were made: {AGAIN.removesuffix(' again')}"

    def train(self, mode: bool = True):
        if mode:
            drop(self, "train()")
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True):
        if isinstance(self.int8, str):
            return super()._apply(fn, recurse)
        before = torch.empty(0)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            drop(self, f"a move to {after.dtype} on {after.device}")
        released = [getattr(layer_parts(self), name) for name in LINEARS] if is_released(self) else []
        weights = [linear._parameters["weight"] for linear in released]
        try:
            for linear in released:
                linear._parameters["weight"] = None
            return super()._apply(fn, recurse)
        finally:
            for linear, weight in zip(released, weights, strict=True):
                linear._parameters["weight"] = weight

    def _load_from_state_dict(self, *args, **kwargs):
        drop(self, "load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs):
        if is_released(self):
            raise RuntimeError(f"roberta_fast: a state_dict holds fp32 weights, {RELEASED}; save_quantized saves this one")
        super()._save_to_state_dict(*args, **kwargs)


def is_released(layer: nn.Module) -> bool:
    """Whether a fast layer computes with its 8-bit copies or not at all."""
    return not isinstance(layer.int8, str) and layer.int8.is_released


def drop(layer: nn.Module, cause: str) -> None:
    """Drops a layer's copies. Raises RuntimeError naming ``cause`` where the fp32 weights were released."""
    if is_released(layer):
        raise RuntimeError(f"roberta_fast: {cause} needs the fp32 weights, {RELEASED}")
    if not isinstance(layer.int8, str):
        layer.int8 = f"{cause} dropped them; {AGAIN}"


def prepare(layers: Iterable[nn.Module], options: FastOptions) -> None:
    """Makes the copies that ``options`` ask for, from the weights as they are now, or takes away those that they do not."""
    for layer in map(unwrapped, layers):
        if options.precision is None:
            layer.__dict__.pop("int8", None)
        elif not is_released(layer):
            layer.int8 = _quantized(layer_parts(layer))


def check_released(layers: Iterable[nn.Module], what: str) -> None:
    """Raises ValueError where a layer cannot do ``what``, as its fp32 weights were released."""
    if any(is_released(layer) for layer in map(unwrapped, layers) if isinstance(layer, Int8Holder)):
        raise ValueError(f"{what} needs the fp32 weights, {RELEASED}")


@torch.no_grad()
def _quantized(parts):
    """The copies of one layer's weights, or why there are none."""
    quantized = {}
    for name in LINEARS:
        linear = getattr(parts, name)
        if not is_plain(linear, nn.Linear):
            return f"{name} is a {type(linear).__name__}"
        if (linear.weight.device.type, linear.weight.dtype) != ("cpu", torch.float32):
            return f"{name} is {linear.weight.dtype} on {linear.weight.device}; they serve float32 on the CPU"
        if type(linear.weight) not in (torch.Tensor, nn.Parameter):
            return f"the weight of {name} is a {type(linear.weight).__name__}"
        try:
            quantized[name] = quantize_rows(linear.weight)
        except ValueError as error:
            return f"{name}: {error}"
    return Int8Linears.of(parts, quantized)


def copies_of(layer: nn.Module, parts: LayerParts) -> Int8Linears | None:
    """What the layer computes with in 8 bits, or None. Copies of a weight that is no longer there are dropped.

    Raises RuntimeError where a linear was replaced and the fp32 weights of the others were released.
    """
    if isinstance(layer.int8, str):
        return None
    for name, source in zip(LINEARS, layer.int8.sources, strict=True):
        linear = getattr(parts, name)
        if not is_plain(linear, nn.Linear) or linear.weight is not source:
            drop(layer, f"a replaced {name} ({type(linear).__name__})")
            return None
    return layer.int8


def call_objection(encoder: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why this call computes in fp32, whatever copies there are, or None."""
    if encoder.training:
        return "the model is in training mode"
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in encoder.parameters())):
        return "gradients are recorded, which torch.inference_mode() or torch.no_grad() turns off"
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "autocast computes in another dtype"
    return None
