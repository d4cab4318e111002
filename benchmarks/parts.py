"""What an encoder loses between its kernels: the sum of them, each measured alone at the encoder's sizes, beside the whole.

Alone a kernel finds a cold L2 cache, as ``measure.CudaClock`` flushes it; in the encoder its input was just written. So the whole
may be faster than the sum.
"""

from collections.abc import Callable

import torch

from roberta_fast import FastOptions, ops
from roberta_fast.benchmarks import measure
from roberta_fast.benchmarks.peers import PEERS
from roberta_fast.families import layer_parts
from roberta_fast.packing import PackedBatch

SIZES = {"cuda": ((256, 128), (64, 512)), "tiny": ((2, 16),)}
WHOLES = ("roberta_fast-eager", "roberta_fast-graphs")


def run(name: str, model, size: tuple[int, int], repeats: int, commit: str | None = None) -> dict:
    """The record of a dense batch of ``size`` B, S on ``model`` of ``shapes.build_model``: times of the parts, and of the whole.

    The parts are what a layer runs where the host knows the number of rows.
    """
    environment, device = measure.environment(model.device.type, commit), model.device.type
    dtype = str(model.dtype).removeprefix("torch.")
    peers = [peer for peer in WHOLES if PEERS[peer].reason_against(device, dtype) is None]
    with torch.no_grad():
        single = parts_of(model, *size)
        states = torch.randn(*size, model.config.hidden_size, device=device, dtype=model.dtype)
        wholes = {peer: _encoder_call(PEERS[peer].build(model), states) for peer in peers}
        calls = {part: measure.as_cuda_graph(call)[0] if device == "cuda" else call for part, call in single.items()}
        timings = measure.alternate({**calls, **wholes}, repeats, measure.clock_for(device), warm_up_seconds=0.1)
    return {
        "kind": "parts",
        "model": name,
        "dtype": dtype,
        "environment": environment,
        "batches": {"dense": {"batch": size[0], "seqlen": size[1], "tokens": size[0] * size[1], "fill": 1.0}},
        "layers": model.config.num_hidden_layers,
        "parts": {part: timings[part].facts() for part in single},
        "wholes": {peer: timings[peer].facts() for peer in wholes},
    }


def parts_of(model, rows: int, seqlen: int) -> dict[str, Callable[[], torch.Tensor]]:
    """{what it is: a call of it} for everything that one layer runs on ``rows`` texts of ``seqlen`` tokens, in its order."""
    parts = layer_parts(model.base_model.encoder.layer[0])
    how = {"dtype": model.dtype, "device": model.device}
    hidden, heads = model.config.hidden_size, parts.attention.num_attention_heads
    x, residual = (torch.randn(rows * seqlen, hidden, **how) for _ in range(2))
    qkv = torch.randn(rows * seqlen, 3, heads, hidden // heads, **how).unbind(1)
    bounds = PackedBatch.of(x.view(rows, seqlen, hidden), None, FastOptions()).cu_seqlens
    projections = (parts.query, parts.key, parts.value)

    def query_key_value():
        weight, bias = torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])
        return ops.linear(x, weight, bias)

    def normed(norm):
        return lambda: ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)

    dense = (parts.intermediate, parts.output)
    weights = [tensor for module in dense for tensor in (module.weight, module.bias)]
    return {
        "query, key, value": query_key_value,
        "attention": lambda: ops.attention(*qkv, bounds, bounds, seqlen, seqlen, scale=parts.attention.scaling),
        "attention output": lambda: ops.linear(x, parts.attention_output.weight, parts.attention_output.bias),
        "add_layer_norm, attention": normed(parts.attention_norm),
        "feed_forward": lambda: ops.feed_forward(x, *weights),
        "add_layer_norm, output": normed(parts.output_norm),
    }


def _encoder_call(model, states):
    encoder = model.base_model.encoder
    return torch.no_grad()(lambda: encoder(states)[0])
