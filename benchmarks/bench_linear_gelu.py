"""GELU(x Wᵀ + b) with the exact erf, against torch's GEMM followed by its GELU."""

import pytest
from torch.nn.functional import gelu, linear

from roberta_fast import ops
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.bench_linear import gemm_inputs
from roberta_fast.benchmarks.operations import BACKWARD, FORWARD, Case, Contender, facts, kernels_for, parameters, run_benchmark
from roberta_fast.ops.linear_gelu import linear_gelu_ref


def cases(device: str, sizes: shapes.OperationSizes):
    """The intermediate GEMM of every model at every row count."""
    for model in sizes.models:
        n, k = shapes.gemm_shapes(shapes.MODELS[model])["intermediate"]
        for rows in sizes.rows:
            for direction in (FORWARD, BACKWARD):
                yield _case(device, f"{model} M={rows} N={n} K={k}", rows, n, k, direction)


def _case(device, size, rows, n, k, direction):
    def ours(backend):
        return Contender(lambda *inputs: ops.linear_gelu(*inputs, backend=backend))

    def tanh_form(backend):  # another function, whose epilogue is what other libraries fuse
        return Contender(lambda *inputs: ops.linear_gelu(*inputs, approximate="tanh", backend=backend), checked=False)

    backends = kernels_for("linear_gelu", facts(device))
    return Case(
        operation="linear_gelu",
        size=size,
        direction=direction,
        device=device,
        work=2 * rows * n * k * (1 if direction == FORWARD else 2) / 1e12,
        unit="TFLOP/s",
        inputs=lambda: gemm_inputs(device, rows, n, k),
        contenders={
            **{f"roberta_fast {backend}": ours(backend) for backend in backends},
            **{f"roberta_fast {backend}, tanh form": tanh_form(backend) for backend in backends},
            "torch": Contender(lambda *inputs: gelu(linear(*inputs))),
            "torch, no GELU": Contender(linear, checked=False),
        },
        reference=lambda *inputs: linear_gelu_ref(*inputs)[0],
    )


@pytest.mark.parametrize(**parameters(cases))
def test_linear_gelu(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
