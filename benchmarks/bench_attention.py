"""Attention over packed segments, against torch's: SDPA on the padded batch, and its unpadded flash-attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from roberta_fast import ops
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.operations import (
    BACKWARD,
    DTYPES,
    FORWARD,
    Case,
    Contender,
    facts,
    kernels_for,
    parameters,
    run_benchmark,
)
from roberta_fast.ops.attention import attention_ref
from roberta_fast.testing import ragged_mask, segment_bounds

BACKWARD_FACTOR = 2.5  # five matrix products where forward has two
VERIFIED_SEGMENTS = 4

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


def cases(device: str, sizes: shapes.OperationSizes):
    """Dense and ragged batches, the head dimensions of the models, with and without dropout."""
    heads = {(s.heads, s.hidden // s.heads): None for s in (shapes.MODELS[name] for name in sizes.models)}
    batches = [(f"B={b} S={s}", [s] * b) for b, s in sizes.attention]
    batches += [(f"B={b} ragged to {s}", shapes.ragged_lengths(b, s)) for b, s in sizes.ragged]
    for name, lengths in batches:
        for h, d in heads:
            for p in sizes.dropouts:
                for direction in (FORWARD, BACKWARD):
                    size = f"{name} H={h} D={d} p={p}"
                    # The longest ones come along, so that the same kernel variant is checked that is timed.
                    few = sorted(lengths)[-VERIFIED_SEGMENTS:]
                    small = _case(device, size, few, h, d, p, direction)
                    yield _case(device, size, lengths, h, d, p, direction, verify_at=small)


def _case(device, size, lengths, h, d, p, direction, verify_at=None):
    work = 4 * h * d * sum(n * n for n in lengths) * (1 if direction == FORWARD else BACKWARD_FACTOR)
    rows = sum(lengths)
    return Case(
        operation="attention",
        size=size,
        direction=direction,
        device=device,
        work=work / 1e12,
        unit="TFLOP/s",
        inputs=lambda: tuple(torch.randn(rows, h, d, device=device, dtype=DTYPES[device]) for _ in range(3)),
        contenders=_contenders(device, tuple(lengths), d, p),
        reference=_reference(device, tuple(lengths), d, p),
        verify_at=verify_at,
    )


def _reference(device, lengths, d, p):
    def run(query, key, value):
        bounds, longest = segment_bounds(lengths, device), max(lengths)
        seed = _seed(device) if p else None
        return attention_ref(query, key, value, bounds, bounds, longest, longest, d**-0.5, dropout_p=p, seed=seed)[0]

    return run


def _contenders(device, lengths, d, p):
    contenders = {f"roberta_fast {b}": _ours(device, lengths, p, b) for b in kernels_for("attention", facts(device, head_dim=d))}
    if device == "cpu":
        return {**contenders, "torch sdpa": _padded_sdpa(device, lengths, p, None)}
    dense = len(set(lengths)) == 1
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if dense else (SDPBackend.EFFICIENT_ATTENTION,)
    for backend in backends:
        contenders[f"torch sdpa {backend.name.split('_')[0].lower()}"] = _padded_sdpa(device, lengths, p, backend)
    if varlen_attn is not None and not p:  # it has no dropout
        contenders["torch varlen_attn"] = _varlen(device, lengths)
    if flash_attn_varlen_func is not None:
        contenders["flash-attn"] = _flash_attn(device, lengths, p)
    return contenders


def _ours(device, lengths, p, backend):
    bounds, longest, seed = segment_bounds(lengths, device), max(lengths), _seed(device)

    def run(query, key, value):
        return ops.attention(
            query, key, value, bounds, bounds, longest, longest, dropout_p=p, seed=seed if p else None, backend=backend
        )

    return Contender(run)


def _varlen(device, lengths):
    bounds, longest = segment_bounds(lengths, device), max(lengths)
    return Contender(lambda query, key, value: varlen_attn(query, key, value, bounds, bounds, longest, longest))


def _flash_attn(device, lengths, p):
    bounds, longest = segment_bounds(lengths, device), max(lengths)

    def run(query, key, value):
        return flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest, dropout_p=p)

    return Contender(run, checked=not p)


def _padded_sdpa(device, lengths, p, backend):
    """[B, H, S, D] with a mask where lengths differ: what a padded model calls."""
    mask = ragged_mask(lengths).bool().to(device)
    dense = len(set(lengths)) == 1

    def to_layout(rows):
        padded = rows.new_zeros(*mask.shape, *rows.shape[1:])
        padded[mask] = rows
        return padded.transpose(1, 2)

    def run(query, key, value):
        with sdpa_kernel(backend if backend else list(SDPBackend.__members__.values())):
            return scaled_dot_product_attention(query, key, value, None if dense else mask[:, None, None, :], p)

    return Contender(run, to_layout, lambda padded: padded.transpose(1, 2)[mask], checked=not p)


def _seed(device):
    return torch.tensor([7], device=device)


@pytest.mark.parametrize(**parameters(cases))
def test_attention(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
