"""GEMMs at the models' shapes: torch's libraries, packed weights, and the kernel whose number of rows the device knows."""

import pytest
import torch
from torch.nn.functional import linear

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
from roberta_fast.ops.linear import linear_ref, prepack_objection
from roberta_fast.prepacked import packed_weight


def cases(device: str, sizes: shapes.OperationSizes):
    """The four GEMMs of a layer of every model at every row count."""
    for model in sizes.models:
        for name, (n, k) in shapes.gemm_shapes(shapes.MODELS[model]).items():
            for rows in sizes.rows:
                for direction in (FORWARD, BACKWARD):
                    yield _case(device, f"{model} {name} M={rows} N={n} K={k}", rows, n, k, direction)


def _case(device, size, rows, n, k, direction):
    count = torch.tensor([rows], dtype=torch.int32, device=device)

    def ours(backend):
        return Contender(lambda *inputs: ops.linear(*inputs, count=count, backend=backend))

    libraries = ("cublas", "cublaslt") if device == "cuda" else ()
    return Case(
        operation="linear",
        size=size,
        direction=direction,
        device=device,
        work=2 * rows * n * k * (1 if direction == FORWARD else 2) / 1e12,
        unit="TFLOP/s",
        inputs=lambda: gemm_inputs(device, rows, n, k),
        contenders={
            **{f"roberta_fast {b}, count on the device": ours(b) for b in kernels_for("linear", facts(device, device_rows=True))},
            **{f"torch {library}": Contender(_with_library(library)) for library in libraries},
            **({} if libraries else {"torch": Contender(linear)}),
            **({"roberta_fast cpp, prepacked": Contender(_prepacked)} if _prepacks(device, direction) else {}),
        },
        reference=linear_ref,
    )


def gemm_inputs(device: str, rows: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Random x [rows, k], weight [n, k] and bias [n], scaled so that results have unit variance."""
    x = torch.randn(rows, k, device=device)
    weight = torch.randn(n, k, device=device) * k**-0.5
    return tuple(t.to(DTYPES[device]) for t in (x, weight, torch.randn(n, device=device)))


def _prepacks(device, direction):
    return direction == FORWARD and prepack_objection(torch.empty(0, device=device)) is None


def _prepacked(x, weight, bias):
    return ops.linear(x, weight, bias, packed=packed_weight(weight))


def _with_library(library):
    def run(x, weight, bias):
        torch.backends.cuda.preferred_blas_library(library)
        return linear(x, weight, bias)

    return run


@pytest.mark.parametrize(**parameters(cases))
def test_linear(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
