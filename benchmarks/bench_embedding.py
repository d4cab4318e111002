"""Embeddings of a ragged batch as packed rows, against torch's: three lookups of all places, two sums, LayerNorm, packing."""

import pytest
import torch
from torch.nn import functional

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
from roberta_fast.ops.embedding import positions_behind
from roberta_fast.testing import ragged_mask

EPS, PAD = 1e-5, 1


def cases(device: str, sizes: shapes.OperationSizes):
    """Ragged batches of every model, RoBERTa's positions, with and without dropout."""
    for model in dict.fromkeys(shapes.MODELS[name] for name in sizes.models):
        for b, longest in sizes.ragged:
            lengths = shapes.ragged_lengths(b, min(longest, model.positions - 2))
            for p in sizes.dropouts:
                for direction in (FORWARD, BACKWARD):
                    yield _case(device, model, lengths, p, direction)


def _case(device, model, lengths, p, direction):
    dtype, hidden, mask = DTYPES[device], model.hidden, ragged_mask(lengths).to(device)
    ids = torch.where(mask != 0, torch.randint(PAD + 1, model.vocabulary, mask.shape, device=device), PAD)
    positions, indices = positions_behind(ids, PAD), mask.flatten().nonzero().squeeze(1)
    seed = torch.tensor([7], device=device) if p else None
    rows = (model.vocabulary, model.positions + 2, 1)
    # forward: a row of word in for each row out. backward: dy in, that row again, and the whole gradient of word out.
    elements = 2 * len(indices) * hidden + (0 if direction == FORWARD else model.vocabulary * hidden)
    given = {"position_ids": positions, "padding_idx": PAD, "position_padding_idx": PAD, "indices": indices}

    def ours(backend):
        return Contender(lambda *tensors: ops.embedding(ids, *tensors, EPS, **given, dropout_p=p, seed=seed, backend=backend))

    def in_torch(word, position, token_type, weight, bias):
        z = functional.embedding(ids, word, PAD) + functional.embedding(torch.zeros_like(ids), token_type)
        z = z + functional.embedding(positions, position, PAD)
        y = functional.dropout(functional.layer_norm(z, (hidden,), weight, bias, EPS), p)
        return y.flatten(0, 1)[indices]

    def reference(*tensors):
        return ops.embedding(ids, *tensors, EPS, **given, dropout_p=p, seed=seed, backend="torch")

    return Case(
        operation="embedding",
        size=f"B={len(lengths)} ragged to {mask.shape[1]} C={hidden} V={model.vocabulary} p={p}",
        direction=direction,
        device=device,
        work=elements * dtype.itemsize / 1e9,
        unit="GB/s",
        inputs=lambda: tuple(
            torch.randn(*s, device=device, dtype=dtype) for s in (*((n, hidden) for n in rows), *[(hidden,)] * 2)
        ),
        contenders={
            **{f"roberta_fast {backend}": ours(backend) for backend in kernels_for("embedding", facts(device))},
            "torch": Contender(in_torch, checked=not p),
        },
        reference=reference,
    )


@pytest.mark.parametrize(**parameters(cases))
def test_embedding(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
