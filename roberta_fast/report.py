"""What an accelerated model runs on, and how close it is to the stock one."""

import copy
import dataclasses
import inspect
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from roberta_fast import copies, dispatch, first_token
from roberta_fast.accelerate import fast_encoders, restore_model
from roberta_fast.embeddings import FastBaseModel, base_objection
from roberta_fast.encoder import encoder_objection
from roberta_fast.families import gelu_form, is_plain, layer_parts, unwrapped
from roberta_fast.first_token import FastHead
from roberta_fast.heads import FastLanguageModel, head_objection
from roberta_fast.layer import layer_objection, linears
from roberta_fast.ops.feed_forward import is_fused
from roberta_fast.ops.linear import outruns_pytorch, prepack_objection
from roberta_fast.ops.registration import facts_of
from roberta_fast.prepacked import is_packed
from roberta_fast.recorders import RECORDERS
from roberta_fast.reporting import FastModel


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What runs on which backend, and every reason why something faster does not.

    backends: ``{operation: (forward backend, backward backend)}``. fallbacks: reasons known beforehand, empty where everything
    runs on the fastest backend that there is. stock_calls: ``{reason: calls}`` that took the stock path so far. precision: which
    of the layers multiply in 8 bits. fp32_calls: ``{reason: calls}`` that should have done so and did not. prepack: how many
    weights are packed by now, None where that was not asked for. whole_calls: ``{reason: calls}`` on fast layers that
    computed rows which could have been left out: a base model's embeddings of padding, or a head's last layer.
    cuda_graphs: how many were recorded and replayed, None where none can be. eager_calls: ``{reason: calls}`` in inference that
    ran without.
    """

    encoders: int
    layers: int
    device: str
    dtype: str
    backends: dict[str, tuple[str, str]]
    fallbacks: tuple[str, ...]
    stock_calls: dict[str, int]
    precision: str = "as the model"
    fp32_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    prepack: str | None = None
    whole_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    cuda_graphs: str | None = None
    eager_calls: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        width = max(len(name) for name in self.backends)
        lines = [f"{self.encoders} fast encoder(s), {self.layers} layers, {self.dtype} on {self.device}"]
        lines += [f"  precision: {self.precision}"] if self.precision != "as the model" else []
        lines += [f"  prepack: {self.prepack}"] if self.prepack else []
        lines += [f"  CUDA graphs: {self.cuda_graphs}"] if self.cuda_graphs else []
        lines += [f"  {'operation':<{width}}  {'forward':<8} backward"]
        lines += [f"  {name:<{width}}  {forward:<8} {backward}" for name, (forward, backward) in self.backends.items()]
        lines += [f"  fallback: {reason}" for reason in self.fallbacks] or ["  no fallback"]
        lines += [f"  stock path, {calls} call(s): {reason}" for reason, calls in self.stock_calls.items()]
        lines += [f"  not in 8 bits, {calls} call(s): {reason}" for reason, calls in self.fp32_calls.items()]
        lines += [f"  all rows, {calls} call(s): {reason}" for reason, calls in self.whole_calls.items()]
        lines += [f"  without a CUDA graph, {calls} call(s): {reason}" for reason, calls in self.eager_calls.items()]
        return "\n".join(lines)


def _cpu_library(dtype):
    """Who multiplies for PyTorch."""
    name, backend = ("oneDNN", torch.backends.mkldnn) if dtype in ("bfloat16", "float16") else ("MKL", torch.backends.mkl)
    return name if backend.is_available() else "torch"


def explain(model: nn.Module) -> Explanation:
    """What each operation of the accelerated ``model`` runs on now, where its parameters are, in eval and in training.

    Raises ValueError where ``model`` is not accelerated.
    """
    encoders = _accelerated(model)
    layers = [unwrapped(layer) for encoder in encoders for layer in encoder.layer]
    weight = next(encoders[0].parameters())
    head_dim = layer_parts(layers[0]).attention.attention_head_size
    options = encoders[0].fast_options
    facts, requested = facts_of(weight, head_dim, deterministic=options.deterministic), options.backend
    skipped: dict[tuple, list[str]] = {}
    library = "cuBLAS" if weight.is_cuda else _cpu_library(facts.dtype)
    backends = {"linear": (library, library)}
    if options.deterministic or options.unpad == "device" or facts[:2] in (("cpu", "float32"), ("cpu", "bfloat16")):
        counted = facts._replace(head_dim=None, device_rows=options.unpad == "device")
        forward = dispatch.choose("linear", counted, requested).backend
        ours = counted.device_rows or (facts[:2] == ("cpu", "float32") and requested in ("auto", "cpp") and outruns_pytorch())
        backward = dispatch.choose("linear_backward", counted, requested).backend if ours else library
        backends = {"linear": (forward, backward)}
    precision, operations = "as the model", dict(_OPERATIONS)
    if options.precision:
        able = [layer for layer in layers if copies.is_released(layer) or copies.copies_of(layer, layer_parts(layer))]
        released = ", fp32 weights released" if copies.any_released(able) else ""
        precision = f"{options.precision} linear layers in {len(able)} of {len(layers)} layers{released}"
        if able:
            operations |= {name: (name, None) for name in copies.KINDS[options.precision].operations}  # in inference alone
    if is_fused(options.recompute == "gelu", weight.is_cuda, requested):
        operations["feed_forward"] = "linear_gelu", "feed_forward_backward"
    models = [module for module in model.modules() if isinstance(module, FastModel)]
    language_models = [module for module in models if isinstance(module, FastLanguageModel) and options.fuse_lm_head]
    bases = [module for module in models if isinstance(module, FastBaseModel)]
    if not all(map(base_objection, bases)):
        operations["embedding"] = "embedding", "embedding_backward"
    if language_models:
        operations["cross_entropy"] = "cross_entropy", "cross_entropy"  # which leaves products alone to the backward pass
    for name, passes in operations.items():
        chosen = []
        for op in filter(None, passes):
            choice = dispatch.choose(op, facts if name == "attention" else facts._replace(head_dim=None), requested)
            chosen.append(choice.backend)
            if choice.skipped:
                skipped.setdefault((choice.backend, choice.skipped), []).append(op)
        backends[name] = (*chosen, "none")[:2]
    reasons = Counter(
        f"{', '.join(dict.fromkeys(ops))} on {backend}, " + "; ".join(f"not {name}: {reason}" for name, reason in faster)
        for (backend, faster), ops in skipped.items()
    )
    for encoder in encoders:
        reasons.update(filter(None, [encoder_objection(encoder)]))
    for layer in layers:
        reasons.update(_layer_fallbacks(layer, options.precision))
    reasons.update(f"the head computes all logits: {reason}" for reason in filter(None, map(head_objection, language_models)))
    for base in bases:
        reasons.update(f"the embeddings of padding are computed: {reason}" for reason in filter(None, [base_objection(base)]))
    for head in models:
        reason = isinstance(head, FastHead) and first_token.head_objection(head)
        reasons.update([f"the last layer computes all rows: {reason}"] if reason else [])
    prepack = None
    if options.prepack:
        modules = [m for layer in layers for m in linears(layer_parts(layer)).values() if is_plain(m, nn.Linear)]
        prepack = f"{sum(is_packed(m.weight) for m in modules)} of {len(modules)} weights by now"
        reasons.update(f"no weight is prepacked: {reason}" for reason in filter(None, [prepack_objection(weight, requested)]))
    stock_calls, fp32_calls, whole_calls, eager_calls = Counter(), Counter(), Counter(), Counter()
    for module in models:
        whole_calls.update(module.whole_calls)
    for module in (*encoders, *language_models):
        stock_calls.update(module.stock_calls)
    for encoder in encoders:
        fp32_calls.update(encoder.fp32_calls)
        eager_calls.update(encoder.graphs.declined)
    fallbacks = tuple(reason + (f" ({n} times)" if n > 1 else "") for reason, n in reasons.items())
    return Explanation(
        encoders=len(encoders),
        layers=len(layers),
        device=facts.device,
        dtype=facts.dtype,
        backends=backends,
        fallbacks=fallbacks,
        stock_calls=dict(stock_calls),
        precision=precision,
        fp32_calls=dict(fp32_calls),
        prepack=prepack,
        whole_calls=dict(whole_calls),
        cuda_graphs=_cuda_graphs(encoders, facts.device),
        eager_calls=dict(eager_calls),
    )


# The operations of the forward and the backward pass by the name that the table gives them.
_OPERATIONS = {
    "pack": ("pack", "unpack"),
    "attention": ("attention", "attention_backward"),
    "add_layer_norm": ("add_layer_norm", "add_layer_norm_backward"),
    "linear_gelu": ("linear_gelu", "linear_gelu_backward"),
    "unpack": ("unpack", "pack"),
}


def _cuda_graphs(encoders, device):
    """How many graphs the encoders have, and how often those and earlier ones were replayed."""
    if device not in RECORDERS or not encoders[0].fast_options.cuda_graphs:
        return None
    sets = [encoder.graphs for encoder in encoders]
    kept, captures, replays = sum(map(len, sets)), sum(s.captures for s in sets), sum(s.replays for s in sets)
    return f"{kept} kept of {captures} recorded, {replays} replays"


def _layer_fallbacks(layer, precision):
    """Reasons why parts of a layer call stock modules, or compute in fp32 where 8 bits were asked for."""
    parts = layer_parts(layer)
    if precision and isinstance(layer.copies, str):
        yield f"no {precision} weights: {layer.copies}"
    reason = layer_objection(layer, parts)
    if reason:
        yield f"the stock layer runs: {reason}"
        return
    if gelu_form(parts.activation) is None:
        yield f"linear_gelu is not used: the activation is {type(parts.activation).__name__}"
    elif not is_plain(parts.intermediate, nn.Linear):
        yield f"linear_gelu is not used: intermediate.dense is a {_kind(parts.intermediate)}"
    for name, module in linears(parts).items():
        if name != "intermediate" and not is_plain(module, nn.Linear):
            yield f"{name} is called as a module: it is a {_kind(module)}"
    for norm in (parts.attention_norm, parts.output_norm, *([parts.cross.attention_norm] if parts.cross else [])):
        if not is_plain(norm, nn.LayerNorm):
            yield f"add_layer_norm is not used: the norm is a {_kind(norm)}"


def _kind(module):
    """A module's class; adapters share names with torch's, so others come with where they are defined."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__name__} ({kind.__module__})"


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far the accelerated model is from the stock one on a batch, over the outputs at real tokens.

    max_abs_difference: max |fast - stock|, in the outputs' unit. cosine: the least cosine similarity of a row of an output: of a
    token's features, of the tokens of a text where each has one number, of all texts' numbers where each has one.
    outputs: ``{name: max |fast - stock|}``.
    """

    max_abs_difference: float
    cosine: float
    outputs: dict[str, float]


def check_parity(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Parity:
    """Runs ``model`` and a stock clone that shares its parameters on the same batch, in eval mode.

    batch: keyword arguments of ``model.forward``, e.g. what a tokenizer returns, or what a SentenceTransformer takes as features;
    tensors [B, S, ...] are compared where ``attention_mask`` [B, S] is nonzero. NaN in an output makes the result NaN.
    With a ``precision`` the cosine is what to look at: 8 bits move single values far more than another order of sums does.
    Raises ValueError where ``model`` is not accelerated, or its fp32 weights were released, or batch is no mapping.
    """
    for encoder in _accelerated(model):
        copies.check_released(encoder.layer, "check_parity")
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a mapping, as a tokenizer returns it, got {type(batch).__name__}")
    stock = restore_model(stock_clone(model)).eval()
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            ours, theirs = (dict(_tensors(_call(m, batch))) for m in (model, stock))
    finally:
        for module, mode in training.items():
            module.training = mode
    mask = batch.get("attention_mask")
    differences, cosines = {}, [1.0]
    for name, value in theirs.items():
        a, b = (_rows(t, mask).double() for t in (ours[name], value))
        differences[name] = (a - b).abs().max().item() if a.numel() else 0.0
        if a.numel() and a.shape[-1] > 1:
            cosines.append(nn.functional.cosine_similarity(a, b, dim=-1).min().item())
    # numpy's max and min, unlike Python's, keep what is not a number.
    return Parity(float(np.max([0.0, *differences.values()])), float(np.min(cosines)), differences)


def _call(model, batch):
    """A Hugging Face model takes a batch as keywords, a SentenceTransformer as one argument, to which it adds its results."""
    takes_one = "input" in inspect.signature(model.forward).parameters and "input" not in batch
    return model(dict(batch)) if takes_one else model(**batch)


def stock_clone(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(made): made for made in (getattr(m, "copies", None) for m in model.modules()) if made}
    return copy.deepcopy(model, shared)


def _accelerated(model):
    encoders = fast_encoders(model)
    if not encoders:
        raise ValueError(f"model {type(model).__name__} is not accelerated: call accelerate_model first")
    return encoders


def _tensors(output, name=""):
    """(name, tensor) of every floating tensor in a model's output, those in tuples included."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
        return
    items = output.items() if hasattr(output, "items") else enumerate(output) if isinstance(output, (tuple, list)) else ()
    for key, value in items:
        yield from _tensors(value, f"{name}[{key}]" if name else str(key))


def _rows(value, mask):
    """The real tokens' features as rows [N, C]; where a token has one number, those of texts [B, S], zeros at padding; where a
    text has one, all of them [1, B]."""
    if mask is not None and value.shape[:2] == mask.shape:
        real = mask.bool()
        if value.dim() == 2:
            return value.masked_fill(~real, 0)[real.any(1)]
        value = value[real]
    return value if value.dim() > 1 and value.shape[-1] > 1 else value.reshape(1, -1)
