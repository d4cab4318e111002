"""Attention's test cases: seeded inputs, both passes on a backend, and the rule that their results are held to."""

from dataclasses import dataclass

import torch

import roberta_fast.ops  # noqa: F401 (defines the operator)
from roberta_fast.testing import assert_close_as_torch, segment_bounds

operator = torch.ops.roberta_fast.attention.default


@dataclass(frozen=True)
class Case:
    """Segments of these lengths, and what is done with them. lengths_k None: self-attention. order: of the segments' programs."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    heads: int = 1
    head_dim: int = 32
    causal: bool = False
    query_only: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    order: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu"):
        """query, key, value as views of fused projections, so strided; seeded."""
        generator = torch.Generator().manual_seed(sum(self.lengths_q) * 131 + self.head_dim)
        rows, rows_k = sum(self.lengths_q), sum(self.lengths_q if self.lengths_k is None else self.lengths_k)
        qkv = torch.randn(max(rows, rows_k), 3, self.heads, self.head_dim, generator=generator, dtype=torch.float64)
        qkv = qkv.to(self.dtype).to(device)
        return qkv[:rows, 0], qkv[:rows_k, 1], qkv[:rows_k, 2]

    def rest(self, device="cpu"):
        """The arguments of ``attention_ref`` behind query, key and value."""
        lengths_k = self.lengths_q if self.lengths_k is None else self.lengths_k
        skip = None if self.query_only is None else torch.tensor(self.query_only, dtype=torch.int32, device=device)
        seed = torch.tensor([20240229], device=device) if self.dropout_p else None
        order = None if self.order is None else torch.tensor(self.order, dtype=torch.int32, device=device)
        bounds = segment_bounds(self.lengths_q, device), segment_bounds(lengths_k, device)
        longest = max(self.lengths_q, default=0), max(lengths_k, default=0)
        return *bounds, *longest, self.head_dim**-0.5, self.causal, skip, self.dropout_p, seed, self.deterministic, order


def gradients(function, inputs, dout):
    """function(query, key, value), and the gradients of the three."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout)


def run(case, inputs, dout, backend, rest=None):
    """(out, lse, gradients) of the operator on ``backend``."""
    rest = case.rest(inputs[0].device) if rest is None else rest
    out, grads = gradients(lambda *qkv: operator(*qkv, *rest, backend)[0], inputs, dout)
    return out, operator(*inputs, *rest, backend)[1], grads


def exactly(case, inputs, dout):
    """The same by the reference in float64."""
    return run(case, [t.double() for t in inputs], dout.double(), "torch")


def dout_of(case, device="cpu"):
    generator = torch.Generator().manual_seed(9)
    shape = (sum(case.lengths_q), case.heads, case.head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype).to(device)


def check(case, fast, torch_result, exact):
    """Holds (out, lse, gradients) to the error rules; rows that saw no key must be exactly zero and -inf."""
    (out, lse, grads), (torch_out, torch_lse, torch_grads), (exact_out, exact_lse, exact_grads) = fast, torch_result, exact
    keyless = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, keyless)
    assert not out[keyless.T].any()
    assert_close_as_torch(out, torch_out, exact_out, name="out")
    real = [t.masked_fill(keyless, 0) for t in (lse, torch_lse, exact_lse)]
    assert_close_as_torch(*real, name="lse")
    for name, *tensors in zip(("dquery", "dkey", "dvalue"), grads, torch_grads, exact_grads, strict=True):
        assert_close_as_torch(*tensors, factor=3.0, name=name)
