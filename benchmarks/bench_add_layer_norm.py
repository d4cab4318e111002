"""LayerNorm(residual + dropout(x)), against torch's three calls and against what a copy of the same bytes takes."""

import pytest
import torch
from torch.nn.functional import dropout, layer_norm

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
from roberta_fast.ops.add_layer_norm import add_layer_norm_ref

EPS = 1e-5


def cases(device: str, sizes: shapes.OperationSizes):
    """Every row count at every hidden size, with and without dropout."""
    for hidden in dict.fromkeys(shapes.MODELS[name].hidden for name in sizes.models):
        for rows in sizes.rows:
            for p in sizes.dropouts:
                for direction in (FORWARD, BACKWARD):
                    yield _case(device, rows, hidden, p, direction)


def _case(device, rows, hidden, p, direction):
    dtype = DTYPES[device]
    # forward: x and residual in, y out; backward: dy, x and residual in, dz out, and dx where dropout makes it another.
    tensors = 3 if direction == FORWARD else 4 + bool(p)
    seed = torch.tensor([7], device=device) if p else None

    def ours(backend):
        return Contender(lambda *inputs: ops.add_layer_norm(*inputs, EPS, dropout_p=p, seed=seed, backend=backend))

    def in_torch(x, residual, weight, bias):
        return layer_norm(residual + dropout(x, p), (hidden,), weight, bias, EPS)

    backends = kernels_for("add_layer_norm", facts(device))
    return Case(
        operation="add_layer_norm",
        size=f"N={rows} C={hidden} p={p}",
        direction=direction,
        device=device,
        work=tensors * rows * hidden * dtype.itemsize / 1e9,
        unit="GB/s",
        inputs=lambda: tuple(torch.randn(s, device=device, dtype=dtype) for s in ((rows, hidden),) * 2 + ((hidden,),) * 2),
        contenders={
            **{f"roberta_fast {backend}": ours(backend) for backend in backends},
            "torch": Contender(in_torch, checked=not p),
            **({"copy": Contender(_copy(tensors), checked=False)} if direction == FORWARD else {}),
        },
        reference=lambda *inputs: add_layer_norm_ref(*inputs, EPS, p, seed)[0],
    )


def _copy(tensors):
    """A function that reads and writes as many bytes as ``tensors`` of x's size: the limit that memory sets."""
    made = {}

    def run(x, *_):
        if "source" not in made:
            made["source"] = x.new_ones(tensors * x.numel() // 2)
            made["target"] = torch.empty_like(made["source"])
        return made["target"].copy_(made["source"])

    return run


@pytest.mark.parametrize(**parameters(cases))
def test_add_layer_norm(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
