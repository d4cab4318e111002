"""The gate before every encoder table: a peer whose results are not the stock model's is not timed.

Peers in 8 bits cannot pass it. They are held to the rounding error of a plain 8-bit model instead, measured on the same batch.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from roberta_fast.benchmarks.shapes import Batch
from roberta_fast.report import stock_clone
from roberta_fast.testing import assert_close_as_torch

NEXT_PRECISION = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
ZERO_BUT_FOR_ROUNDING = 1e-5  # of the largest gradient; that of a key's bias is zero, for softmax does not see shifts

# Other runtimes sum in another order than torch: held to the same function, not to the same rounding.
PEER_SLACK = 4.0
# On MiniLM, trained and with random weights, 8-bit peers come to 0.7 to 2.9 times the yardstick's distance from 1; with one
# layer's attention left out, two layers swapped, or padding attended to, it is 20 to 75 times.
EIGHT_BIT_SLACK = 5.0


@dataclass(frozen=True)
class Nearness:
    """How near a peer's results are to the baseline's.

    max_abs: the largest difference. cosine: the least cosine similarity of a token's hidden state, or that of the whole gradient.
    Both are NaN where a result is.
    """

    max_abs: float
    cosine: float


class Gate:
    """Holds peers to a model's results on one batch: hidden states at real tokens or, with labels, every gradient.

    model: the stock model, in the measured dtype. baseline: the stock peer, whose rounding error sets the tolerance around the
    same model one precision up: 2 times for hidden states, 3 times for gradients. Dropout is off in both.
    """

    def __init__(self, model: nn.Module, baseline: Callable, batch: Batch, labels: torch.Tensor | None = None):
        self._model, self._batch, self._labels, self._parameters = model, batch, labels, dict(model.named_parameters())
        wide, wider = stock_clone(model), {}
        for module in wide.modules():  # parameters of its own, where the clone shared them; tied ones stay tied
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    wider.setdefault(id(parameter), nn.Parameter(parameter.detach().to(NEXT_PRECISION[parameter.dtype])))
                    module._parameters[name] = wider[id(parameter)]
        wide.set_attn_implementation("sdpa")
        wide.eval().training = model.training  # without dropout, as the peers are
        self._exact = self._results(wide, dict(wide.named_parameters()))
        self._baseline = self._results(baseline)
        # A parameter of few elements may come out nearly exact by luck, which is no measure for another implementation.
        self._errors = {name: _relative_error(self._baseline[name], exact) for name, exact in self._exact.items()}
        self._usual_error = statistics.median(self._errors.values())

    def check(self, peer: Callable, slack: float = 1.0) -> Nearness:
        """How near ``peer`` is. Raises AssertionError with the numbers where it is not near enough.

        slack: how many times the tolerance it may have.
        """
        results = self._results(peer)
        without = sorted(self._exact.keys() - results.keys())
        assert not without, f"no gradient reaches {without[0]}"
        largest = max(exact.abs().max() for exact in self._exact.values())
        for name, exact in self._exact.items():
            ours, theirs = results[name], self._baseline[name]
            if exact.abs().max() < ZERO_BUT_FOR_ROUNDING * largest:
                ours, theirs, exact = (torch.cat([t.flatten(), largest[None].to(t)]) for t in (ours, theirs, exact))
            elif self._errors[name] < self._usual_error:
                theirs = exact + self._usual_error * exact.abs().max()
            factor = slack * (2.0 if self._labels is None else 3.0)
            assert_close_as_torch(ours, theirs, exact, factor=factor, name=name)
        return self._nearness(results)

    def measure(self, peer: Callable) -> Nearness:
        """How near ``peer`` is, however far that may be."""
        return self._nearness(self._results(peer))

    @functools.cached_property
    def eight_bit_floor(self) -> float:
        """The least cosine that a token may have in 8 bits: 1 - ``EIGHT_BIT_SLACK`` (1 - c), c that of ``eight_bit_clone``."""
        return 1 - EIGHT_BIT_SLACK * (1 - self.measure(eight_bit_clone(self._model)).cosine)

    def _nearness(self, results):
        differences = [(results[name].double() - theirs.double()).abs().max() for name, theirs in self._baseline.items()]
        return Nearness(torch.stack(differences).max().item(), self._cosine(results))

    def _results(self, function, parameters=None):
        """Hidden states [T, C] at real tokens, or the gradients by parameter name."""
        if self._labels is None:
            with torch.no_grad():
                hidden = function(**self._batch.inputs())[0]
            return {"last_hidden_state": hidden[self._batch.attention_mask.bool()].clone()}
        parameters = parameters or self._parameters
        clear_gradients(parameters.values())
        function(**self._batch.inputs(), labels=self._labels)[0].backward()
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        clear_gradients(parameters.values())
        return gradients

    def _cosine(self, results):
        if self._labels is None:
            pairs = ((results[name].double(), theirs.double()) for name, theirs in self._baseline.items())
            return torch.stack([cosine_similarity(ours, theirs, dim=-1).min() for ours, theirs in pairs]).min().item()
        flat = [torch.cat([r[name].flatten().double() for name in self._baseline]) for r in (results, self._baseline)]
        return cosine_similarity(*flat, dim=0).item()


def eight_bit_clone(model: nn.Module) -> nn.Module:
    """The stock model with every linear layer's inputs and weights, and all embeddings, rounded to 8 bits, symmetrically, with a
    scale for each row: the yardstick of what 8 bits cost."""
    clone = stock_clone(model).eval()
    for module in clone.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(_in_eight_bits(module.weight.detach()))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_in_eight_bits(inputs[0]),))
    return clone


def _in_eight_bits(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round() * scale


def _relative_error(result, exact):
    exact = exact.double()
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).item()


def clear_gradients(parameters) -> None:
    """Frees the gradients, so that the next backward pass allocates them."""
    for parameter in parameters:
        parameter.grad = None
