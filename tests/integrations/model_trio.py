"""The same model three times (accelerated, stock, stock in float64), and the rules that holds the first to the others."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from roberta_fast import accelerate_model
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MASK = MASKS["right padding"]
LABELS = torch.tensor([0, 1, 1, 0])


class Trio(NamedTuple):
    fast: nn.Module
    stock: nn.Module
    exact: nn.Module


def trio(stock: nn.Module, **options) -> Trio:
    """``stock`` itself and two copies of it."""
    return Trio(accelerate_model(copy.deepcopy(stock), **options), stock, copy.deepcopy(stock).double())


def tiny_model(model_class, model_type: str = "roberta", seed: int = 0, **overrides) -> nn.Module:
    """A small model with random parameters and, unless overridden, no dropout, in training mode."""
    return randomize(model_class(tiny_config(model_type, **{**NO_DROPOUT, **overrides})), seed)


def tiny_inputs(model: nn.Module, mask: torch.Tensor = MASK, labels: torch.Tensor | None = LABELS, seed: int = 0) -> dict:
    """A ragged batch with labels for a classifier, or none."""
    inputs = random_inputs(mask, model.config, seed)
    return inputs if labels is None else {**inputs, "labels": labels}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients by parameter name, of those that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_outputs(models: Trio, inputs: dict) -> None:
    """Holds the logits of the fast model to twice the stock model's own error."""
    fast, stock, exact = (model(**inputs).logits.detach() for model in models)
    assert_close_as_torch(fast, stock, exact, name="logits")


def assert_same_gradients(fast: Mapping, stock: Mapping, exact: Mapping) -> None:
    """Holds tensors by name to three times the stock ones' error, all of them seen as one vector.

    Taken one by one, a gradient that is zero but for rounding, as a key bias has it, would be compared with noise.
    """
    assert fast.keys() == stock.keys() == exact.keys(), f"other gradients: {sorted(fast.keys() ^ exact.keys())}"
    allowed = 3 * max((stock[name].double() - exact[name]).abs().max().item() for name in exact)
    for name, gradient in exact.items():
        error = (fast[name].double() - gradient).abs().max().item()
        assert error <= allowed, f"{name}: max|fast - ref| = {error:.3e} exceeds {allowed:.3e}"


def assert_same_training_step(models: Trio, inputs: dict) -> None:
    """One loss, its gradients, and what one step of SGD makes of the parameters that learn."""
    for model in models:
        model.zero_grad()
        model(**inputs).loss.backward()
    assert_same_gradients(*(gradients(model) for model in models))
    for model in models:
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert_same_gradients(*({n: p.detach() for n, p in model.named_parameters() if p.requires_grad} for model in models))
