"""Whether modules are still as they were when something was recorded of them.

It is asked before every replay of a CUDA graph, hence compares by iterators in C over lists made beforehand.
"""

import itertools
import operator

import torch
from torch import nn

from roberta_fast.families import layer_parts
from roberta_fast.layer import foreign_hooks
from roberta_fast.parts import LayerParts


class Snapshot:
    """What a recording took from modules: where weights lie, which modules there are, and their settings.

    encoder: a fast one. embeddings: what stands before it and was recorded too, or None. longest: sequence of the model.
    """

    def __init__(self, encoder: nn.Module, embeddings: nn.Module | None):
        parts = [layer_parts(layer) for layer in encoder.layer]
        self.longest = getattr(parts[0].attention.config, "max_position_embeddings", None)
        self._options = encoder.fast_options
        self._layers, self._embeddings = list(encoder.layer), embeddings
        self._modules = [*encoder.layer.modules(), *(embeddings.modules() if embeddings else ())]
        self._children = _Entries([encoder._modules, *(module._modules for module in self._modules)])
        self._parameters = _Entries([module._parameters for module in self._modules])
        self._copies = [layer.copies for layer in self._layers]  # kept, as what is freed leaves its id to another
        self._present = [parameter is not None for parameter in self._parameters.values()]
        self._hooks = [hooks for module in self._modules for hooks in _hooks(module)]
        self._attributes = [module.__dict__ for module in self._modules]
        self._dropouts = [m for p in parts for m in dropouts_of(p)]
        self._attentions = [p.attention for p in parts]
        self._norms = [norm for p in parts for norm in (p.attention_norm, p.output_norm)]
        if embeddings:
            self._dropouts.append(embeddings.dropout)
            self._norms.append(embeddings.LayerNorm)
        self._before = list(self._facts(encoder))

    def holds(self, encoder: nn.Module, embeddings: nn.Module | None) -> bool:
        """Whether all of it is as it was, and nothing stands in the way since."""
        if embeddings not in (None, self._embeddings):
            return False
        if any(self._hooks) and any(map(foreign_hooks, self._modules)):  # Hugging Face's recording hooks stay for good
            return False
        if any(map(dict.__contains__, self._attributes, itertools.repeat("forward"))) or any(map(TRAINS, self._dropouts)):
            return False
        return encoder.fast_options is self._options and all(map(operator.eq, self._before, self._facts(encoder)))

    def _facts(self, encoder):
        """In an order in which each can be asked where those before it are as they were."""
        yield len(encoder.layer)
        yield list(map(id, self._children.values()))
        yield list(map(type, self._modules))
        parameters = self._parameters.values()
        yield list(map(type, parameters))
        # One that changes its dtype moves as well: its old and its new memory exist beside each other for a moment.
        yield list(map(torch.Tensor.data_ptr, itertools.compress(parameters, self._present)))
        yield [id(layer.copies) for layer in self._layers]
        yield list(map(operator.attrgetter("scaling"), self._attentions))
        yield list(map(operator.attrgetter("eps"), self._norms))


class _Entries:
    """Entries of dictionaries, to be looked up again and again."""

    def __init__(self, dictionaries):
        pairs = [(dictionary, name) for dictionary in dictionaries for name in dictionary]
        self._dictionaries, self._names = [dictionary for dictionary, _ in pairs], [name for _, name in pairs]

    def values(self):
        """What stands there now, None where nothing does."""
        return list(map(dict.get, self._dictionaries, self._names))


TRAINS = operator.attrgetter("training")
"""Whether a dropout drops."""
_hooks = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def dropouts_of(parts: LayerParts) -> list[nn.Module]:
    """The dropouts of a layer."""
    return [m for m in (parts.attention_dropout, parts.attention_output_dropout, parts.output_dropout) if m is not None]
