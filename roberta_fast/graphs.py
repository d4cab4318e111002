"""CUDA graphs of an encoder's forward pass in inference: recorded once for a capacity, replayed for every mix of lengths.

A recording packs, runs the layers and unpacks over buffers of [Bc, Sc] places, B and S rounded up, under a mask that is zero at
what a batch does not fill. Rows are counted on the device (``unpad="device"``), so a replay costs what its real tokens cost. A
sequence that is not there costs one row, as position 0 is always kept: at most B/2 rows in all. Results are those of an eager
call with ``unpad="device"`` on the batch padded to [Bc, Sc]: against other eager calls, whose products and tiles are chosen by
exact sizes, they hold the error rules, and with ``deterministic=True`` they have the same bits.

Weights are read where they lie, so one that is written in place is seen. What else a recording took from the host is compared
before every replay (``_Snapshot``), and all is recorded anew where something differs.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import dataclasses
import itertools
import math
import operator
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection

import torch
from torch import nn

from roberta_fast.families import gelu_form, is_plain, layer_parts
from roberta_fast.int8 import LINEARS
from roberta_fast.layer import FastLayer, foreign_hooks, layer_objection
from roberta_fast.packing import PackedBatch
from roberta_fast.recorders import RECORDERS

AUTO_ROWS = 8192  # capacity up to which "auto" records: above, kernels are long enough to hide their launches
MOST_GRAPHS = 64
# A recording takes as long as some ten eager calls. Where more capacities are in use than graphs may be kept, each new one would
# push out one that is needed again soon; so a graph stays while it served one of so many last calls.
PATIENCE = 1024
MOST_FAILURES = 3  # of captures, each of which may cost memory; what made one fail mostly makes all of them fail
SHORTEST = 32  # of the lengths that capacities are rounded up to
NORMS = ("attention_norm", "output_norm")
CAPTURE_FAILED = "the capture failed"


@dataclasses.dataclass
class _Graph:
    """A recording and its buffers. hidden_states [Bc, Sc, C] and mask bool [Bc, Sc] are read, states [Bc, Sc, C] is written.

    filled: the B and S of the batch that the mask is of. used: the number of the call that it served last.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor
    replay: Callable[[], None]
    filled: tuple[int, int] = (0, 0)
    used: int = 0

    def run(self, hidden_states, mask):
        """The result for a batch that fits, in memory of its own: the buffers are overwritten by the next call."""
        batch, seqlen = hidden_states.shape[:2]
        self.hidden_states[:batch, :seqlen].copy_(hidden_states)
        if self.filled != (batch, seqlen):
            self.mask.zero_()
            self.filled = (batch, seqlen)
        self.mask[:batch, :seqlen].copy_(mask) if mask is not None else self.mask[:batch, :seqlen].fill_(True)
        self.replay()
        return self.states[:batch, :seqlen].clone(memory_format=torch.contiguous_format)


class GraphSet:
    """The graphs of one encoder, at most ``MOST_GRAPHS``, those used least recently dropped first. Safe to call from threads.

    Buffers are shared by all of them, so that memory follows the largest capacity. Copies and pickles are empty.
    declined: ``{reason: calls}`` that ran without. captures, replays: how many there were.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.declined: dict[str, int] = {}
        self.captures = self.replays = self._calls = 0
        self._forget()

    def __reduce__(self):
        return GraphSet, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drops all graphs and what they hold."""
        with self._lock:
            self._forget()

    def run(self, encoder: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | str:
        """The encoder's last hidden state by a replay, after recording where there is none yet, or the reason against it."""
        with self._lock:
            self._calls += 1
            if self._snapshot is None or not self._snapshot.holds(encoder):
                self._forget()
                reason = _encoder_objection(encoder, hidden_states.device)
                if reason:
                    return reason
                self._snapshot = _Snapshot(encoder)
                self._recorder = RECORDERS[hidden_states.device.type](hidden_states.device)
            capacity = capacity_for(*hidden_states.shape[:2], self._snapshot.longest)
            key = capacity, hidden_states.shape[2], hidden_states.dtype, *_settings(hidden_states.device.type)
            graph = self._graphs.get(key) or self._failed.get(key) or self._room_for(capacity, encoder)
            if graph is None:
                try:
                    graph = self._graphs[key] = self._recorded(encoder, capacity, hidden_states)
                except (RuntimeError, ValueError) as error:
                    graph = self._failed[key] = f"{CAPTURE_FAILED}: {type(error).__name__}: {error}".splitlines()[0]
            if isinstance(graph, str):
                return graph
            self._graphs.move_to_end(key)
            graph.used, self.replays = self._calls, self.replays + 1
            with self._recorder.turn(graph.hidden_states, graph.mask, graph.states):
                return graph.run(hidden_states, mask)

    def _forget(self):
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._failed: dict[tuple, str] = {}
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._snapshot = self._recorder = None

    def _room_for(self, capacity, encoder):
        """Makes room for one more graph, or returns why there is none."""
        reason = _size_objection(encoder, capacity)
        if reason:
            return reason
        if len(self._failed) == MOST_FAILURES:
            return next(reversed(self._failed.values()))
        if len(self._graphs) >= MOST_GRAPHS:
            oldest, graph = next(iter(self._graphs.items()))
            if self._calls - graph.used <= PATIENCE:
                return f"all {MOST_GRAPHS} graphs are in use"
            del self._graphs[oldest]
        return None

    def _recorded(self, encoder, capacity, hidden_states):
        device = hidden_states.device
        options = dataclasses.replace(encoder.fast_options, unpad="device")
        dtype = _autocast_dtype(device.type)
        # Buffers outlive the inference mode that they may be made in. Autocast's cache would hand a recording casts of weights
        # that are freed, or stale, later.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            rows = self._buffer("read", hidden_states.dtype, (*capacity, hidden_states.shape[2]), device)
            mask = torch.zeros(capacity, dtype=torch.bool, device=device)

            def compute():
                batch = PackedBatch.of(rows, mask, options)
                packed = batch.pack(rows)
                for layer in encoder.layer:
                    packed = layer(packed, batch)
                return batch.unpack(packed)

            result = self._recorder.warm_up(compute)
            states = self._buffer("written", result.dtype, result.shape, device)
            del result
            replay = self._recorder.record(lambda: states.copy_(compute()))
        self.captures += 1
        return _Graph(rows, mask, states, replay)

    def _buffer(self, use, dtype, shape, device):
        """A view of a buffer, which is at most twice as large as the largest view was; finite, whatever is not written."""
        size = math.prod(shape)
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[use, dtype] = torch.zeros(1 << (size - 1).bit_length(), dtype=dtype, device=device)
        return buffer[:size].view(shape)


class _Snapshot:
    """What a recording took from an encoder's modules: where weights lie, which modules there are, and their settings.

    It is compared before every replay, hence by iterators in C over lists made beforehand. longest: sequence of the model.
    """

    def __init__(self, encoder):
        parts = [layer_parts(layer) for layer in encoder.layer]
        self.longest = getattr(parts[0].attention.config, "max_position_embeddings", None)
        self._options = encoder.fast_options
        self._modules = list(encoder.layer.modules())
        self._children = _Entries([encoder._modules, *(module._modules for module in self._modules)])
        self._parameters = _Entries([module._parameters for module in self._modules])
        self._present = [parameter is not None for parameter in self._parameters.values()]
        self._hooks = [hooks for module in self._modules for hooks in _hooks(module)]
        self._attributes = [module.__dict__ for module in self._modules]
        self._dropouts = [m for p in parts for m in _dropouts(p)]
        self._attentions = [p.attention for p in parts]
        self._norms = [norm for p in parts for norm in (p.attention_norm, p.output_norm)]
        self._before = list(self._facts(encoder))

    def holds(self, encoder):
        """Whether all of it is as it was, and nothing stands in the way since."""
        if any(self._hooks) and any(map(foreign_hooks, self._modules)):  # Hugging Face's recording hooks stay for good
            return False
        if any(map(dict.__contains__, self._attributes, itertools.repeat("forward"))) or any(map(_TRAINS, self._dropouts)):
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


class GraphHolder:
    """Mixin of the fast encoder: drops its graphs where nobody will replay them, and their memory with them."""

    graphs: GraphSet

    def train(self, mode: bool = True):
        if mode:
            self._drop_graphs()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True):
        self._drop_graphs()
        return super()._apply(fn, recurse)

    def _drop_graphs(self):
        if "graphs" in self.__dict__:  # not while it is made
            self.graphs.clear()


def replayed(
    encoder: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor | None, collected: Collection[str]
) -> torch.Tensor | None:
    """The last hidden state [B, S, C] of a fast ``encoder`` by a CUDA graph, or None where the call does without one.

    hidden_states: [B, S, C]. mask: [B, S], nonzero at real tokens, or None. collected: what Hugging Face records in this call.
    """
    asked = encoder.fast_options.cuda_graphs
    if not asked or encoder.training or torch.compiler.is_compiling() or not hidden_states.shape[0]:
        return None
    if hidden_states.device.type not in RECORDERS:
        if asked is True:
            _decline(encoder, f"hidden_states are on {hidden_states.device.type}")
        return None
    if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # the caller's own graph serves
    reason = _call_objection(encoder, hidden_states, mask, collected)
    result = reason or encoder.graphs.run(encoder, hidden_states, mask)
    if isinstance(result, torch.Tensor):
        return result
    _decline(encoder, result)
    return None


def capacity_for(batch: int, seqlen: int, longest: int | None = None) -> tuple[int, int]:
    """The least (Bc, Sc) that holds [batch, seqlen]: powers of two and 1.5 times those, Sc from 32 to ``longest``."""
    places = max(SHORTEST, _rounded_up(seqlen))
    return _rounded_up(batch), places if longest is None else max(seqlen, min(places, longest))


def _rounded_up(number):
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 else power


def _settings(device_type):
    """What operations ask the process for, not their arguments."""
    matmul = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    return (
        _autocast_dtype(device_type),
        *matmul,
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("ROBERTA_FAST_BACKEND"),
    )


def _autocast_dtype(device_type):
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _decline(encoder, reason):
    """Counts a call without a graph; it is reported where graphs were asked for, and a failed capture is in any case."""
    declined, options = encoder.graphs.declined, encoder.fast_options
    if options.cuda_graphs is True:
        encoder._report(declined, "runs without a CUDA graph", "layers would run without a CUDA graph", reason)
        return
    if reason.startswith(CAPTURE_FAILED) and reason not in declined and options.on_unsupported != "ignore":
        warnings.warn(f"roberta_fast: {type(encoder).__name__} runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=4)
    declined[reason] = declined.get(reason, 0) + 1


def _size_objection(encoder, shape):
    """Why a batch or a capacity of ``shape`` [B, S] is too large, or None."""
    is_bound = encoder.fast_options.cuda_graphs == "auto"
    return f"a capacity above {AUTO_ROWS} rows" if is_bound and math.prod(shape) > AUTO_ROWS else None


def _call_objection(encoder, hidden_states, mask, collected):
    """Why a graph cannot stand for this call, or None."""
    if getattr(encoder, "_is_replica", False):  # which has the graphs of the one that it was made from, and other parameters
        return "a replica of DataParallel"
    if collected:
        return "hidden states are requested"
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in encoder.parameters())):
        return "gradients are recorded, which torch.inference_mode() or torch.no_grad() turns off"
    if type(hidden_states) is not torch.Tensor or type(mask) not in (torch.Tensor, type(None)):
        return "a tensor of another class than torch's"
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing() or nn.modules.module._has_any_global_hook():
        return "a mode of torch, or a hook on all modules, that would not see its operations"
    return _size_objection(encoder, hidden_states.shape[:2])


def _encoder_objection(encoder, device):
    """Why no graph can stand for this encoder now, or None. A replay passes over Python code, so only our own may be in it."""
    if encoder.fast_options.precision is not None:
        return f"precision={encoder.fast_options.precision!r}"
    for layer in encoder.layer:
        if not isinstance(layer, FastLayer):
            return f"a {type(layer).__name__} around a layer"
        parts = layer_parts(layer)
        if foreign_hooks(layer):
            return f"a hook on {type(layer).__name__}"
        reason = layer_objection(layer, parts)
        if reason:
            return reason
        for name, kind in {**dict.fromkeys(LINEARS, nn.Linear), **dict.fromkeys(NORMS, nn.LayerNorm)}.items():
            if not is_plain(getattr(parts, name), kind):
                return f"{name} is called as a module"
        if gelu_form(parts.activation) is None and not type(parts.activation).__module__.startswith("torch.nn."):
            return f"the activation is a {type(parts.activation).__name__}"
        if any(map(_TRAINS, _dropouts(parts))):
            return "a dropout is in training mode"
    for name, parameter in encoder.named_parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.device != device:
            return f"{name} is a {type(parameter).__name__} on {parameter.device}"
    return None


_TRAINS = operator.attrgetter("training")
_hooks = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _dropouts(parts):
    return [m for m in (parts.attention_dropout, parts.attention_output_dropout, parts.output_dropout) if m is not None]
