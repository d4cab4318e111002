"""Losses of rows of logits, and their gradient in place: the formulas of ``roberta_fast/ops/cross_entropy.py``.

A program owns a row. It reads the logits once for their maximum, sum of exponentials and mean, carried along as in online softmax
(Milakov and Gimelshein 2018), and a second time, from the second-level cache, to put the gradient in their place.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, losses_ptr, V, stride_logits_n, ignore_index, label_smoothing,
    WITH_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row. logits_ptr: [n, V], rows stride_logits_n elements apart. labels_ptr: int64 [n]. losses_ptr: float32 [n]."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride_logits_n
    label = tl.load(labels_ptr + row)
    ignored = label == ignore_index
    if ignored:
        tl.store(losses_ptr + row, 0.0)
    else:
        maxima = tl.full([BLOCK_V], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_V], tl.float32)
        totals = tl.zeros([BLOCK_V], tl.float32)
        for first in tl.range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(maxima, z)
            # A lane that has seen nothing but -inf keeps a sum of zero.
            known = tl.where(larger == float("-inf"), 0.0, larger)
            sums = sums * tl.exp(maxima - known) + tl.exp(z - known)
            maxima = larger
            totals += tl.where(columns < V, z, 0.0)
        largest = tl.max(maxima, axis=0)
        exponentials = tl.sum(sums * tl.exp(maxima - largest), axis=0)
        is_class = (label >= 0) & (label < V)
        at_label = tl.load(logits_ptr + label, mask=is_class, other=float("nan")).to(tl.float32)
        loss = (1.0 - label_smoothing) * (largest - at_label) + tl.log(exponentials)
        if label_smoothing > 0.0:  # else logits of -inf would make a NaN of the mean's nothing
            loss += label_smoothing * (largest - tl.sum(totals, axis=0) / V)
        tl.store(losses_ptr + row, loss)
        if WITH_GRADIENT:
            tl.debug_barrier()  # every thread has read the logit at the label
            for first in tl.range(0, V, BLOCK_V):
                columns = first + tl.arange(0, BLOCK_V)
                z = tl.load(logits_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
                target = tl.where(columns == label, 1.0 - label_smoothing, 0.0) + label_smoothing / V
                tl.store(logits_ptr + columns, tl.exp(z - largest) * (1.0 / exponentials) - target, mask=columns < V)
    if WITH_GRADIENT and ignored:
        for first in tl.range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            tl.store(logits_ptr + columns, tl.zeros([BLOCK_V], tl.float32), mask=columns < V)


def cross_entropy_fwd(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, with_gradient: bool
) -> torch.Tensor:
    """The losses of rows of logits [n, V], contiguous in V, float32 [n]; where asked, logits become their gradient."""
    n, classes = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    if n:
        block = min(2048, triton.next_power_of_2(classes))
        cross_entropy_fwd_kernel[(n,)](
            logits, labels, losses, classes, logits.stride(0), ignore_index, label_smoothing,
            WITH_GRADIENT=with_gradient, BLOCK_V=block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return losses
