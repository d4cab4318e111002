"""8-bit copies of a fast layer's linear weights: made by explicit call, read in inference, dropped where they would be wrong.

They stand beside the parameters, in ``layer.copies``, which holds the reason where there are none. So ``parameters()``,
``state_dict()`` and what is saved stay the stock model's. Once the fp32 weights are released, nothing is dropped any more: what
would need them raises, and says why.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from roberta_fast.families import is_plain, layer_parts, unwrapped
from roberta_fast.fp8 import Fp8Linears
from roberta_fast.int8 import RELEASED, Int8Linears
from roberta_fast.options import FastOptions
from roberta_fast.parts import LINEARS, LayerParts

KINDS = {kind.precision: kind for kind in (Int8Linears, Fp8Linears)}


class CopiesHolder:
    """Mixin of the fast layer: holds the copies, and drops them where they would be wrong."""

    copies: Int8Linears | Fp8Linears | str = "none were made: accelerate_model makes them where precision is given"

    def train(self, mode: bool = True):
        if mode:
            drop(self, "train()")
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True):
        if isinstance(self.copies, str):
            return super()._apply(fn, recurse)
        before = torch.empty(0, dtype=self.copies.sources[0].dtype, device=self.copies.device)
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


def refuse_training(model: nn.Module) -> None:
    """Makes ``train()`` of ``model``, and of the modules in it that hold released layers, raise before it changes anything."""
    for module in model.modules():
        if any(isinstance(part, CopiesHolder) for part in module.modules()):
            module.train = functools.partial(_train_of_released, module)


def _train_of_released(module, mode=True):
    if mode:
        raise RuntimeError(f"roberta_fast: train() needs the fp32 weights, {RELEASED}")
    return type(module).train(module, mode)


def is_released(layer: nn.Module) -> bool:
    """Whether a fast layer computes with its 8-bit copies or not at all."""
    return not isinstance(layer.copies, str) and layer.copies.is_released


def drop(layer: nn.Module, cause: str) -> None:
    """Drops a layer's copies. Raises RuntimeError naming ``cause`` where the fp32 weights were released."""
    if is_released(layer):
        raise RuntimeError(f"roberta_fast: {cause} needs the fp32 weights, {RELEASED}")
    if not isinstance(layer.copies, str):
        again = f"accelerate_model(model, precision={layer.copies.precision!r}) makes them again"
        layer.copies = f"{cause} dropped them; {again}"


def prepare(layers: Iterable[nn.Module], options: FastOptions, norm: nn.Module | None) -> None:
    """Makes the copies that ``options`` ask for, from the weights as they are now, or takes away those that they do not.

    norm: the LayerNorm whose result the first layer takes in, None where it is not known.
    """
    for layer in map(unwrapped, layers):
        if options.precision is None:
            layer.__dict__.pop("copies", None)
        elif not is_released(layer):
            layer.copies = _made(options, layer_parts(layer), norm)
        norm = layer_parts(layer).output_norm


def any_released(layers: Iterable[nn.Module]) -> bool:
    """Whether the fp32 weights of one of the layers were released."""
    return any(is_released(layer) for layer in map(unwrapped, layers) if isinstance(layer, CopiesHolder))


def check_released(layers: Iterable[nn.Module], what: str) -> None:
    """Raises ValueError where a layer cannot do ``what``, as its fp32 weights were released."""
    if any_released(layers):
        raise ValueError(f"{what} needs the fp32 weights, {RELEASED}")


@torch.no_grad()
def _made(options, parts, norm):
    """The copies of one layer's weights, or why there are none."""
    for name in LINEARS:
        linear = getattr(parts, name)
        if not is_plain(linear, nn.Linear):
            return f"{name} is a {type(linear).__name__}"
        if type(linear.weight) not in (torch.Tensor, nn.Parameter):
            return f"the weight of {name} is a {type(linear.weight).__name__}"
    try:
        return KINDS[options.precision].made_of(parts, norm)
    except ValueError as error:
        return str(error)


def copies_of(layer: nn.Module, parts: LayerParts) -> Int8Linears | Fp8Linears | None:
    """What the layer computes with in 8 bits, or None. Copies of a weight or bias that is no longer there are dropped.

    Raises RuntimeError where a linear was replaced and the fp32 weights of the others were released.
    """
    if isinstance(layer.copies, str):
        return None
    for name, weight, bias in zip(layer.copies.reads, layer.copies.sources, layer.copies.biases, strict=True):
        module = getattr(parts, name)
        plain = is_plain(module, nn.Linear if name in LINEARS else nn.LayerNorm)
        if not plain or module.weight is not weight or module.bias is not bias:
            drop(layer, f"a replaced {name} ({type(module).__name__})")
            return None
    return layer.copies


def check_bounds(layers: list[nn.Module], norm: nn.Module | None) -> None:
    """Drops the copies of layers whose input comes from another LayerNorm than the one by which they are scaled.

    norm: the LayerNorm before the first of them, None where it is not known.
    """
    for layer in layers:
        scaled_by = None if isinstance(layer.copies, str) else layer.copies.before
        if scaled_by is not None and scaled_by is not getattr(norm, "weight", None):
            drop(layer, "another LayerNorm before the layer")
        norm = layer_parts(layer).output_norm


def call_objection(encoder: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why this call computes in the model's own precision, whatever copies there are, or None."""
    if encoder.training:
        return "the model is in training mode"
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in encoder.parameters())):
        return "gradients are recorded, which torch.inference_mode() or torch.no_grad() turns off"
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "autocast computes in another dtype"
    return None
