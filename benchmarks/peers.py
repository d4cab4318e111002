"""Whom the encoder is compared with: one entry a peer, at the end of this file.

A peer is built from a stock Hugging Face model and returns a function of the model's keyword arguments whose result has the last
hidden state [B, S, C] first, or the loss where the model has a head and gets ``labels``. It must leave the model as it is; it may
share its parameters. Where it keeps working memory between calls, it has a method ``release`` that gives it back.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import roberta_fast
from roberta_fast.accelerate import fast_encoders
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.exported_peers import CTranslate2, OnnxRuntime, OpenVino, SentenceTransformers
from roberta_fast.families import layer_parts
from roberta_fast.report import stock_clone

BASELINE = "huggingface-sdpa"
OURS = "roberta_fast"


@dataclass(frozen=True)
class Peer:
    """One entry of ``PEERS``.

    build: from the stock model to the function that is measured; raises ``Unsuited`` for a model that it does not serve.
    needs: modules that it imports. calibrated: build also takes a batch, whose values set its scales.
    precision: what it computes in where that is less than the model's dtype; it is then held to another rule (``parity.py``).
    devices: torch device types that it runs on. modes: those of ``shapes.MODES`` that it serves. drops: whether it has dropout of
    attention's probabilities, without which it cannot train a model that has.
    dtypes: names of the dtypes that it computes in; None for all. default: part of a run that names no peers.
    compiled: it reuses buffers of its own, so that its memory cannot be read off one call.
    """

    build: Callable[..., Callable]
    needs: tuple[str, ...] = ()
    calibrated: bool = False
    precision: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = tuple(shapes.MODES)
    drops: bool = True
    dtypes: tuple[str, ...] | None = None
    default: bool = True
    compiled: bool = False

    def reason_against(self, device: str, dtype: str, mode: str = "eval", dropout: float = 0.0) -> str | None:
        """Why it cannot take part, with the command that changes it where there is one; None if it can.

        dropout: the model's probability of dropping attention's probabilities.
        """
        missing = [name for name in self.needs if _missing(name)]
        if missing:
            names = [_PACKAGES.get(name, name) for name in missing]
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install {' '.join(names)}"
        if device not in self.devices:
            return f"it runs on {', '.join(self.devices)}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it computes in {', '.join(self.dtypes)}, not in {dtype}"
        if mode not in self.modes:
            return f"it is not set up for this: {shapes.MODES[mode]}"
        if mode in shapes.TRAINING and dropout and not self.drops:
            return "it has no dropout of attention's probabilities, which --dropout 0 does without"
        return None


# Packages that go by another name than their module.
_PACKAGES = {
    "flash_attn": "flash-attn",
    "torch.nn.attention.varlen": "'torch>=2.11'",
    "sentence_transformers": "sentence-transformers",
}


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # a parent package is missing
        return True


def _huggingface(model: nn.Module, attention: str) -> Callable:
    clone = stock_clone(model)
    clone.set_attn_implementation(attention)
    return clone


def _compiled(model: nn.Module, mode: str) -> Callable:
    # Every batch shape gets its own graph, which is the most that compilation can do for it.
    return torch.compile(_huggingface(model, "sdpa"), mode=mode, dynamic=False)


def _ours(model: nn.Module, **options) -> Callable:
    accelerated = roberta_fast.accelerate_model(stock_clone(model), on_unsupported="error", **options)
    accelerated.release = lambda: [encoder.graphs.clear() for encoder in fast_encoders(accelerated)]
    return accelerated


def _varlen(model: nn.Module) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    return Unpadded(model, lambda *arguments, dropout_p: varlen_attn(*arguments))


def _flash_attn(model: nn.Module) -> Callable:
    from flash_attn import flash_attn_varlen_func

    return Unpadded(model, flash_attn_varlen_func)


class Unpadded(nn.Module):
    """The model with its layers on real tokens only, in plain PyTorch calls: what one writes around an unpadded attention in an
    afternoon. attend: as ``flash_attn.flash_attn_varlen_func``."""

    def __init__(self, model: nn.Module, attend: Callable):
        super().__init__()
        self.model = stock_clone(model)
        base = self.model.base_model
        base.encoder = self.encoder = _UnpaddedEncoder(base.encoder.layer, attend)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **labels: torch.Tensor):
        self.encoder.mask = attention_mask
        return self.model(input_ids=input_ids, **labels)


class _UnpaddedEncoder(nn.Module):
    def __init__(self, layers, attend):
        super().__init__()
        self.layers, self.attend, self.mask = layers, attend, None
        with torch.no_grad():
            self.projections = [self._projection(layer_parts(layer)) for layer in layers]

    @staticmethod
    def _projection(parts):
        projections = (parts.query, parts.key, parts.value)
        return torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])

    def forward(self, hidden_states, *args, **kwargs):
        indices = self.mask.flatten().nonzero().squeeze(1)
        lengths = self.mask.sum(1, dtype=torch.int32)
        bounds, longest = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), self.mask.shape[1]
        rows = hidden_states.flatten(0, 1)[indices]
        for layer, projection in zip(self.layers, self.projections, strict=True):
            parts = layer_parts(layer)
            weight, bias = self._projection(parts) if torch.is_grad_enabled() else projection
            heads = (3, parts.attention.num_attention_heads, parts.attention.attention_head_size)
            query, key, value = F.linear(rows, weight, bias).view(-1, *heads).unbind(1)
            p = parts.attention_dropout.p if parts.attention_dropout.training else 0.0
            context = self.attend(query, key, value, bounds, bounds, longest, longest, dropout_p=p)
            rows = parts.attention_norm(parts.attention_output_dropout(parts.attention_output(context.flatten(1))) + rows)
            expanded = parts.output(parts.activation(parts.intermediate(rows)))
            rows = parts.output_norm(parts.output_dropout(expanded) + rows)
        flat = torch.zeros_like(hidden_states).flatten(0, 1)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=flat.index_copy(0, indices, rows).view_as(hidden_states)
        )


_COMPILED = tuple(mode for mode in shapes.MODES if mode != "generate")  # generate() would call what was not compiled
_RUNTIME = functools.partial(Peer, devices=("cpu",), modes=("eval",), dtypes=("float32",))
_UNPADDED = functools.partial(Peer, devices=("cuda",), modes=("eval", "train", "mlm"), dtypes=("float16", "bfloat16"))

PEERS = {
    BASELINE: Peer(functools.partial(_huggingface, attention="sdpa")),
    "huggingface-eager": Peer(functools.partial(_huggingface, attention="eager")),
    "huggingface-compile": Peer(functools.partial(_compiled, mode="default"), modes=_COMPILED, default=False),
    "huggingface-compile-max-autotune": Peer(
        functools.partial(_compiled, mode="max-autotune"), modes=_COMPILED, default=False, compiled=True
    ),
    "huggingface-compile-reduce-overhead": Peer(
        functools.partial(_compiled, mode="reduce-overhead"), devices=("cuda",), modes=_COMPILED, default=False, compiled=True
    ),
    "sentence-transformers": Peer(SentenceTransformers, needs=("sentence_transformers",), modes=("eval",), default=False),
    "torch-varlen": _UNPADDED(_varlen, needs=("torch.nn.attention.varlen",), drops=False),
    "flash-attn": _UNPADDED(_flash_attn, needs=("flash_attn",)),
    "onnxruntime": _RUNTIME(OnnxRuntime, needs=("onnxruntime", "onnx")),
    "openvino": _RUNTIME(OpenVino, needs=("openvino",)),
    "ctranslate2": _RUNTIME(functools.partial(CTranslate2, compute_type="float32"), needs=("ctranslate2",)),
    "onnxruntime-int8": _RUNTIME(functools.partial(OnnxRuntime, int8=True), needs=("onnxruntime", "onnx"), precision="int8"),
    "openvino-int8": _RUNTIME(OpenVino, needs=("openvino", "nncf"), precision="int8", calibrated=True),
    "ctranslate2-int8": _RUNTIME(
        functools.partial(CTranslate2, compute_type="int8_float32"), needs=("ctranslate2",), precision="int8"
    ),
    "roberta_fast-torch": Peer(functools.partial(_ours, backend="torch"), default=False),
    OURS: Peer(_ours),
    f"{OURS}-eager": Peer(functools.partial(_ours, cuda_graphs=False), default=False),
    f"{OURS}-device": Peer(functools.partial(_ours, cuda_graphs=False, unpad="device"), default=False),
    f"{OURS}-graphs": Peer(functools.partial(_ours, cuda_graphs=True), devices=("cuda",), modes=("eval",), default=False),
    f"{OURS}-deterministic": Peer(functools.partial(_ours, deterministic=True), default=False),
    f"{OURS}-prepack": _RUNTIME(functools.partial(_ours, prepack=True)),
    f"{OURS}-int8": _RUNTIME(functools.partial(_ours, precision="int8"), precision="int8"),
    f"{OURS}-fp8": Peer(
        functools.partial(_ours, precision="fp8"),
        devices=("cuda",),
        modes=("eval",),
        dtypes=("float16", "bfloat16"),
        precision="fp8",
    ),
}
"""In the order of the table."""


def peers_named(text: str | None, device: str) -> list[str]:
    """The peers that a comma-separated list names, ``"all"``, or None for the default ones there; the baseline comes along.

    Raises ValueError naming one that does not exist.
    """
    if text is None:
        names = [name for name, peer in PEERS.items() if peer.default and device in peer.devices]
    else:
        names = list(PEERS) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(PEERS)}")
    return [name for name in PEERS if name in names or name == BASELINE]
