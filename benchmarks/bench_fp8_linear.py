"""Products of 8-bit floating-point numbers, GELU and rounding for the next one included, against 16-bit ones; on CUDA."""

import functools

import pytest
import torch
from torch.nn import functional as F

from roberta_fast import ops
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.bench_linear import gemm_inputs
from roberta_fast.benchmarks.operations import FORWARD, Case, Contender, facts, kernels_for, parameters, run_benchmark
from roberta_fast.ops.fp8_linear import fp8_linear_ref, inverse_of


def cases(device: str, sizes: shapes.OperationSizes):
    """The four products of a layer of every model, at every row count; the one before GELU rounds its result to 8 bits."""
    for model in sizes.models if device == "cuda" or sizes is shapes.OPERATION_SIZES["tiny"] else ():
        for rows in sizes.rows:
            for name, (n, k) in shapes.gemm_shapes(shapes.MODELS[model]).items():
                yield _product(device, f"{model} {name} M={rows} N={n} K={k}", rows, n, k, name == "intermediate")


def _product(device, size, rows, n, k, activated):
    weight = functools.cache(lambda: gemm_inputs(device, rows, n, k)[1])
    bound = functools.cache(lambda: torch.full((k,), 8.0, device=device))
    quantized = functools.cache(lambda: ops.quantize_weight_fp8(weight(), bound()))
    options = {"gelu": "none", "inverse": torch.full((n,), 32.0, device=device)} if activated else {}

    def inputs():
        x, _, bias = gemm_inputs(device, rows, n, k)
        return ops.fp8_quantize(x, inverse_of(bound())), x, bias.float(), bias

    def in_16_bits(q, x, bias, bias16):
        y = F.linear(x, weight(), bias16)
        return F.gelu(y) if activated else y

    return Case(
        operation="fp8_linear",
        size=size,
        direction=FORWARD,
        device=device,
        work=2 * rows * n * k / 1e12,
        unit="TFLOP/s",
        inputs=inputs,
        contenders={
            **{
                f"roberta_fast {b}": Contender(
                    lambda q, x, bias, _, b=b: ops.fp8_linear(q, quantized(), bias, backend=b, **options)
                )
                for b in kernels_for("fp8_linear", facts(device))
            },
            "torch 16-bit": Contender(in_16_bits, checked=False),  # more exact, so not the same function
        },
        reference=lambda q, x, bias, _: fp8_linear_ref(q, *quantized(), bias, **options),
    )


@pytest.mark.parametrize(**parameters(cases))
def test_fp8_linear(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
