"""Dropping a batch's padding and putting it back: rows in, rows out, and the scan of the mask, against torch's indexing."""

import pytest
import torch

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
from roberta_fast.testing import ragged_mask


def cases(device: str, sizes: shapes.OperationSizes):
    """Ragged batches at every hidden size; a backward of ``pack`` is an ``unpack`` and the reverse."""
    for hidden in dict.fromkeys(shapes.MODELS[name].hidden for name in sizes.models):
        for b, longest in sizes.ragged:
            lengths = shapes.ragged_lengths(b, longest)
            for direction in (FORWARD, BACKWARD):
                yield _case(device, f"B={b} ragged to {longest} C={hidden}", lengths, hidden, direction)


def _case(device, size, lengths, hidden, direction):
    dtype, mask = DTYPES[device], ragged_mask(lengths).to(device)
    batch, seqlen = mask.shape
    indices = mask.flatten().nonzero().squeeze(1)
    written = indices.shape[0] if direction == FORWARD else batch * seqlen

    def ours(backend):
        return Contender(lambda x: ops.pack(x, indices, backend=backend))

    def gather(x):
        return x.flatten(0, 1)[indices]

    return Case(
        operation="pack",
        size=size,
        direction=direction,
        device=device,
        work=(indices.shape[0] + written) * hidden * dtype.itemsize / 1e9,
        unit="GB/s",
        inputs=lambda: (torch.randn(batch, seqlen, hidden, device=device, dtype=dtype),),
        contenders={
            **{f"roberta_fast {backend}": ours(backend) for backend in kernels_for("pack", facts(device))},
            "torch": Contender(gather),
        },
        reference=gather,
    )


@pytest.mark.parametrize(**parameters(cases))
def test_pack(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
