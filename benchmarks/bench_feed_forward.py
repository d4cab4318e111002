"""GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂, whose backward pass has GELU′ in a product's epilogue, against its two halves and torch's."""

import pytest
from torch.nn.functional import gelu, linear

from roberta_fast import ops
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.bench_linear import gemm_inputs
from roberta_fast.benchmarks.operations import (
    BACKWARD,
    FORWARD,
    Case,
    Contender,
    facts,
    kernels_for,
    parameters,
    run_benchmark,
)
from roberta_fast.ops.feed_forward import feed_forward_ref


def cases(device: str, sizes: shapes.OperationSizes):
    """The feed-forward block of every model at every row count."""
    for model in sizes.models:
        m, k = shapes.gemm_shapes(shapes.MODELS[model])["intermediate"]
        for rows in sizes.rows:
            for direction in (FORWARD, BACKWARD):
                yield _case(device, f"{model} M={rows} {k}→{m}→{k}", rows, m, k, direction)


def _case(device, size, rows, m, k, direction):
    def inputs():
        (x, weight1, bias1), (_, weight2, bias2) = gemm_inputs(device, rows, m, k), gemm_inputs(device, 1, k, m)
        return x, weight1, bias1, weight2, bias2

    def ours(backend, **options):
        return Contender(lambda *tensors: ops.feed_forward(*tensors, backend=backend, **options))

    def halves(backend):
        def run(x, weight1, bias1, weight2, bias2):
            return ops.linear(ops.linear_gelu(x, weight1, bias1, backend=backend), weight2, bias2, backend=backend)

        return Contender(run)

    contenders = {}
    for backend in kernels_for("feed_forward_backward", facts(device)):
        contenders[f"roberta_fast {backend}"] = ours(backend)
        if direction == FORWARD:
            continue
        contenders[f"roberta_fast {backend}, recompute"] = ours(backend, recompute=True)
        contenders[f"roberta_fast {backend}, in halves"] = halves(backend)
    return Case(
        operation="feed_forward",
        size=size,
        direction=direction,
        device=device,
        work=(4 if direction == FORWARD else 8) * rows * m * k / 1e12,
        unit="TFLOP/s",
        inputs=inputs,
        contenders={
            **contenders,
            "torch": Contender(lambda x, w1, b1, w2, b2: linear(gelu(linear(x, w1, b1)), w2, b2)),
        },
        reference=feed_forward_ref,
    )


@pytest.mark.parametrize(**parameters(cases))
def test_feed_forward(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
