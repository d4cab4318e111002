"""The loss of a vocabulary's logits and its gradients on labelled rows, against torch's linear followed by its cross_entropy."""

import pytest
import torch
from torch.nn import functional as F

from roberta_fast import ops
from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.bench_linear import gemm_inputs
from roberta_fast.benchmarks.operations import STEP, Case, Contender, facts, kernels_for, parameters, run_benchmark

LABELLED = 0.15  # of the tokens, as masked-language-model training has it


def cases(device: str, sizes: shapes.OperationSizes):
    """The head of every model over the labelled share of every row count."""
    for model in sizes.models:
        shape = shapes.MODELS[model]
        for rows in sizes.rows:
            labelled = max(1, int(rows * LABELLED))
            yield _case(device, f"{model} M={labelled} V={shape.vocabulary} C={shape.hidden}", labelled, shape)


def _case(device, size, rows, shape):
    labels = torch.randint(0, shape.vocabulary, (rows,), device=device)
    backends = kernels_for("cross_entropy", facts(device))
    return Case(
        operation="cross_entropy",
        size=size,
        direction=STEP,
        device=device,
        work=6 * rows * shape.vocabulary * shape.hidden / 1e12,
        unit="TFLOP/s",
        inputs=lambda: gemm_inputs(device, rows, shape.vocabulary, shape.hidden),
        contenders={
            **{f"roberta_fast {b}": _step(lambda *t, b=b: ops.cross_entropy(*t, labels, backend=b)) for b in backends},
            "torch": _step(lambda *t: _composed(*t, labels)),
        },
        reference=_step(lambda *t: _composed(*t, labels)).run,
    )


def _step(loss):
    """The loss and its gradients: where they are computed, forward or backward, is up to the contender."""

    @torch.enable_grad()
    def run(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return Contender(run)


def _composed(hidden, weight, bias, labels):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


@pytest.mark.parametrize(**parameters(cases))
def test_cross_entropy(benchmark, case, contender):
    run_benchmark(benchmark, case, contender)
