"""Products of 8-bit integers, quantization of the rows included, against torch's in float32; on CPU, where they are served."""

import functools

import pytest
import torch
from torch.nn import functional as F

from roberta_fast import ops
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.bench_linear import gemm_inputs
from roberta_fast.benchmarks.operations import FORWARD, Case, Contender, facts, kernels_for, parameters, run_benchmark
from roberta_fast.ops.int8_linear import int8_feed_forward_ref, int8_linear_ref


def cases(device: str, sizes: shapes.OperationSizes):
    """The four products of a layer of every model, and its feed-forward block as one, at every row count."""
    for model in sizes.models if device == "cpu" else ():
        products = shapes.gemm_shapes(shapes.MODELS[model])
        for rows in sizes.rows:
            for name, (n, k) in products.items():
                yield _product(device, f"{model} {name} M={rows} N={n} K={k}", rows, n, k)
            yield _feed_forward(device, f"{model} feed-forward M={rows}", rows, *products["intermediate"])


def _product(device, size, rows, n, k):
    weight = functools.cache(lambda: gemm_inputs(device, rows, n, k)[1])
    quantized = functools.cache(lambda: ops.quantize_weight(weight()))
    return _case(
        device,
        size,
        2 * rows * n * k,
        lambda: gemm_inputs(device, rows, n, k)[::2],
        lambda backend: lambda x, bias: ops.int8_linear(x, quantized(), bias, backend=backend),
        lambda x, bias: F.linear(x, weight(), bias),
        lambda x, bias: int8_linear_ref(x, *quantized()[:3], bias),
    )


def _feed_forward(device, size, rows, n, k):
    weights = functools.cache(lambda: (gemm_inputs(device, rows, n, k)[1], gemm_inputs(device, rows, k, n)[1]))
    quantized = functools.cache(lambda: tuple(map(ops.quantize_weight, weights())))

    def ours(backend):
        def run(x, bias, bias_out):
            inner, outer = quantized()
            return ops.int8_feed_forward(x, inner, bias, outer, bias_out, gelu="none", backend=backend)

        return run

    def in_float32(x, bias, bias_out):
        inner, outer = weights()
        return F.linear(F.gelu(F.linear(x, inner, bias)), outer, bias_out)

    def reference(x, bias, bias_out):
        inner, outer = quantized()
        return int8_feed_forward_ref(x, *inner[:3], bias, "none", *outer[:3], bias_out)

    inputs = lambda: (*gemm_inputs(device, rows, n, k)[::2], torch.randn(k, device=device))
    return _case(device, size, 4 * rows * n * k, inputs, ours, in_float32, reference)


def _case(device, size, work, inputs, ours, in_float32, reference):
    return Case(
        operation="int8_linear",
        size=size,
        direction=FORWARD,
        device=device,
        work=work / 1e12,
        unit="TFLOP/s",
        inputs=inputs,
        contenders={
            **{f"roberta_fast {b}": Contender(ours(b)) for b in kernels_for("int8_linear", facts(device))},
            "torch float32": Contender(in_float32, checked=False),  # more exact, so not the same function
        },
        reference=reference,
    )


@pytest.mark.parametrize(**parameters(cases))
def test_int8_linear(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
