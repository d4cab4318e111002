"""CUDA graphs of the forward pass in inference: recorded once for a capacity, replayed for every mix of lengths.

A recording packs, embeds where a base model does so on packed rows, runs the layers and unpacks, over buffers of [Bc, Sc]
places, B and S rounded up, under a mask that is zero at what a batch does not fill. Rows are counted on the device
(``unpad="device"``), so a replay costs what its real tokens cost. A sequence that is not there costs one row, as position 0 is
always kept: at most B/2 rows in all. Results are those of an eager call with ``unpad="device"`` on the batch padded to [Bc, Sc]:
against other eager calls, whose products and tiles are chosen by exact sizes, they hold the error rules, and with
``deterministic=True`` they have the same bits.

Weights are read where they lie, so one that is written in place is seen. What else a recording took from the host is compared
before every replay (``Snapshot``), and all is recorded anew where something differs.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import dataclasses
import functools
import itertools
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import nn

from roberta_fast.families import gelu_form, is_plain, layer_parts
from roberta_fast.layer import FastLayer, foreign_hooks, layer_objection
from roberta_fast.options import FastOptions
from roberta_fast.parts import LINEARS
from roberta_fast.recorders import RECORDERS
from roberta_fast.snapshots import TRAINS, Snapshot, dropouts_of

AUTO_ROWS = 8192  # capacity up to which "auto" records: above, kernels are long enough to hide their launches
MOST_GRAPHS = 64
# A recording takes as long as some ten eager calls. Where more capacities are in use than graphs may be kept, each new one would
# push out one that is needed again soon; so a graph stays while it served one of so many last calls.
PATIENCE = 1024
MOST_FAILURES = 3  # of captures, each of which may cost memory; what made one fail mostly makes all of them fail
SHORTEST = 32  # of the lengths that capacities are rounded up to
NORMS = ("attention_norm", "output_norm")
CAPTURE_FAILED = "the capture failed"


class Call(NamedTuple):
    """A call that a graph may stand for.

    inputs: tensors [B, S, ...] by name. mask: [B, S], nonzero at real tokens, or None. compute: from such inputs, a mask and
    options to the result, [B, S, C], or [B, C] of first rows alone. embeddings: the module whose tables it reads beside the
    encoder's layers, or None. kind: what else tells its recordings from others of the same inputs.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    compute: Callable[[dict[str, torch.Tensor], torch.Tensor, FastOptions], torch.Tensor]
    embeddings: nn.Module | None = None
    kind: str = ""

    @property
    def first(self) -> torch.Tensor:
        """One of the inputs, by which to know batch, length and device."""
        return next(iter(self.inputs.values()))


@dataclasses.dataclass
class _Graph:
    """A recording and its buffers: inputs [Bc, Sc, ...] and mask bool [Bc, Sc] are read, states [Bc, Sc, C] or [Bc, C] written.

    filled: the B and S of the batch that the mask is of. used: the number of the call that it served last.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor
    states: torch.Tensor
    replay: Callable[[], None]
    filled: tuple[int, int] = (0, 0)
    used: int = 0

    def run(self, inputs, mask):
        """The result for a batch that fits, in memory of its own: the buffers are overwritten by the next call."""
        batch, seqlen = next(iter(inputs.values())).shape[:2]
        for name, tensor in inputs.items():
            self.inputs[name][:batch, :seqlen].copy_(tensor)
        if self.filled != (batch, seqlen):
            self.mask.zero_()
            self.filled = (batch, seqlen)
        self.mask[:batch, :seqlen].copy_(mask) if mask is not None else self.mask[:batch, :seqlen].fill_(True)
        self.replay()
        states = self.states[:batch, :seqlen] if self.states.dim() == 3 else self.states[:batch]
        return states.clone(memory_format=torch.contiguous_format)


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

    def run(self, encoder: nn.Module, call: Call) -> torch.Tensor | str:
        """The call's result by a replay, after recording where there is none yet, or the reason against it."""
        device = call.first.device
        with self._lock:
            self._calls += 1
            if self._snapshot is None or not self._snapshot.holds(encoder, call.embeddings):
                self._forget()
                reason = _encoder_objection(encoder, device) or _embeddings_objection(call.embeddings, device)
                if reason:
                    return reason
                snapshot = Snapshot(encoder, call.embeddings)
                if not snapshot.holds(encoder, call.embeddings):  # it would not before the next call either
                    return "a hook or a replaced forward somewhere inside a layer"
                self._snapshot = snapshot
                self._recorder = RECORDERS[device.type](device)
            capacity = capacity_for(*call.first.shape[:2], self._snapshot.longest)
            kinds = tuple((name, tensor.shape[2:], tensor.dtype) for name, tensor in call.inputs.items())
            key = capacity, call.kind, kinds, *_settings(device.type)
            graph = self._graphs.get(key) or self._failed.get(key) or self._room_for(capacity, encoder)
            if graph is None:
                try:
                    graph = self._graphs[key] = self._recorded(encoder, capacity, call)
                except (RuntimeError, ValueError) as error:
                    graph = self._failed[key] = f"{CAPTURE_FAILED}: {type(error).__name__}: {error}".splitlines()[0]
            if isinstance(graph, str):
                return graph
            self._graphs.move_to_end(key)
            graph.used, self.replays = self._calls, self.replays + 1
            with self._recorder.turn(*graph.inputs.values(), graph.mask, graph.states):
                return graph.run(call.inputs, call.mask)

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

    def _recorded(self, encoder, capacity, call):
        device = call.first.device
        options = dataclasses.replace(encoder.fast_options, unpad="device")
        dtype = _autocast_dtype(device.type)
        # Buffers outlive the inference mode that they may be made in. Autocast's cache would hand a recording casts of weights
        # that are freed, or stale, later.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            inputs = {
                name: self._buffer(name, tensor.dtype, (*capacity, *tensor.shape[2:]), device)
                for name, tensor in call.inputs.items()
            }
            mask = torch.zeros(capacity, dtype=torch.bool, device=device)
            compute = functools.partial(call.compute, inputs, mask, options)
            result = self._recorder.warm_up(compute)
            states = self._buffer("written", result.dtype, result.shape, device)
            del result
            replay = self._recorder.record(lambda: states.copy_(compute()))
        self.captures += 1
        return _Graph(inputs, mask, states, replay)

    def _buffer(self, use, dtype, shape, device):
        """A view of a buffer, which is at most twice as large as the largest view was; what no batch has written is zero."""
        size = math.prod(shape)
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[use, dtype] = torch.zeros(1 << (size - 1).bit_length(), dtype=dtype, device=device)
        return buffer[:size].view(shape)


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


def replayed(encoder: nn.Module, call: Call, collected: Collection[str] = ()) -> torch.Tensor | None:
    """The result of a call on a fast ``encoder``, or on a base model around it, by a CUDA graph; None where it does without one.

    collected: what Hugging Face records in this call.
    """
    inputs = call.first
    asked = encoder.fast_options.cuda_graphs
    if not asked or encoder.training or torch.compiler.is_compiling() or not inputs.shape[0]:
        return None
    if inputs.device.type not in RECORDERS:
        if asked is True:
            _decline(encoder, f"{next(iter(call.inputs))} are on {inputs.device.type}")
        return None
    if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # the caller's own graph serves
    reason = _call_objection(encoder, call, collected)
    result = reason or encoder.graphs.run(encoder, call)
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
    return (
        _autocast_dtype(device_type),
        torch.backends.cuda.matmul.fp32_precision,  # torch.get_float32_matmul_precision() raises where this one was set
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


def _call_objection(encoder, call, collected):
    """Why a graph cannot stand for this call, or None."""
    if getattr(encoder, "_is_replica", False):  # which has the graphs of the one that it was made from, and other parameters
        return "a replica of DataParallel"
    if collected:
        return "hidden states are requested"
    if torch.is_grad_enabled():
        read = itertools.chain(call.inputs.values(), *(m.parameters() for m in (encoder, call.embeddings) if m is not None))
        if any(tensor.requires_grad for tensor in read):
            return "gradients are recorded, which torch.inference_mode() or torch.no_grad() turns off"
    if any(type(tensor) is not torch.Tensor for tensor in (*call.inputs.values(), *([] if call.mask is None else [call.mask]))):
        return "a tensor of another class than torch's"
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing() or nn.modules.module._has_any_global_hook():
        return "a mode of torch, or a hook on all modules, that would not see its operations"
    return _size_objection(encoder, call.first.shape[:2])


def _encoder_objection(encoder, device):
    """Why no graph can stand for this encoder now, or None. A replay passes over Python code, so only our own may be in it."""
    if not len(encoder.layer):
        return "there are no layers"
    for layer in encoder.layer:
        if not isinstance(layer, FastLayer):
            return f"a {type(layer).__name__} around a layer"
        if "forward" in layer.__dict__:
            return f"a replaced forward of {type(layer).__name__}"
        if layer._compiled_call_impl is not None:
            return f"a {type(layer).__name__} is compiled by itself"
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
        if any(map(TRAINS, dropouts_of(parts))):
            return "a dropout is in training mode"
    for name, parameter in encoder.named_parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.device != device:
            return f"{name} is a {type(parameter).__name__} on {parameter.device}"
    return None


def _embeddings_objection(embeddings, device):
    """Why no graph can stand for these embeddings now, or None; that they are the stock ones, the base model has made sure of."""
    if embeddings is None:
        return None
    for module in embeddings.modules():
        if foreign_hooks(module):
            return f"a hook on {type(module).__name__}"
    if embeddings.dropout.training:
        return "a dropout is in training mode"
    return next((f"{n} of the embeddings is on {p.device}" for n, p in embeddings.named_parameters() if p.device != device), None)
