"""Attention on a GPU: half precision, every head dimension, long segments, huge tensors, CUDA graphs."""

import pytest
import torch
from attention_cases import Case, check, dout_of, exactly, operator, run

from roberta_fast.ops.attention import attention_backward_ref, attention_ref
from roberta_fast.testing import segment_bounds

pytestmark = pytest.mark.gpu

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTHS = {"S=30": (5, 30, 1, 17), "S=64": (64, 5, 33), "S=128": (128, 1, 77, 0, 100), "S=700": (700, 1, 333, 64, 128, 0, 129)}


def hold(case):
    inputs, dout = case.inputs("cuda"), dout_of(case, "cuda")
    check(case, run(case, inputs, dout, "triton"), run(case, inputs, dout, "torch"), exactly(case, inputs, dout))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128])
def test_head_dims(head_dim, dtype, dropout_p):
    hold(Case(LENGTHS["S=700"], heads=3, head_dim=head_dim, dropout_p=dropout_p, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_tiles_of_every_length(head_dim, lengths, dropout_p):
    hold(Case(LENGTHS[lengths], heads=3, head_dim=head_dim, dropout_p=dropout_p, dtype=torch.bfloat16))


@pytest.mark.parametrize("change", [{"causal": True}, {"query_only": (1, 0, 70, 64, 1, 0, 1)}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
def test_variants(change, dropout_p):
    hold(Case(LENGTHS["S=700"], heads=3, head_dim=64, dropout_p=dropout_p, dtype=torch.bfloat16, **change))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("lengths_k", [None, (300, 5000)], ids=["self", "cross"])
def test_long_segments(lengths_k, causal):
    lengths = (8192, 5, 4097) if lengths_k is None else (4096, 5001)
    hold(Case(lengths, lengths_k, heads=1, head_dim=64, causal=causal, dtype=torch.bfloat16))


def test_more_than_2_to_the_31_elements():
    """The last segments of tensors whose offsets do not fit 32 bits, against the reference on those segments alone."""
    heads, head_dim, length = 16, 128, 128
    segments = 2**31 // (heads * head_dim * length) + 3
    if torch.cuda.mem_get_info()[0] < 9 * segments * length * heads * head_dim * 2:
        pytest.skip("needs 40 GB of GPU memory")
    rows, tail = segments * length, 2 * length
    query, key, value, dout = (
        torch.empty(rows, heads, head_dim, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4)
    )
    bounds = segment_bounds([length] * segments, "cuda")
    local = segment_bounds([length] * 2, "cuda")
    assert query.numel() > 2**31
    for deterministic in (False, True):
        rest = (length, length, head_dim**-0.5, False, None, 0.0, None, deterministic)
        out, lse = operator(query, key, value, bounds, bounds, *rest, "triton")
        backward = torch.ops.roberta_fast.attention_backward.default
        grads = backward(dout, query, key, value, out, lse, bounds, bounds, *rest, "triton")
        ends = [t[-tail:].double() for t in (dout, query, key, value)]
        wanted, wanted_lse = attention_ref(*ends[1:], local, local, *rest)
        wanted_grads = attention_backward_ref(*ends, wanted, wanted_lse, local, local, *rest)
        for got, exact in zip((out, *grads), (wanted, *wanted_grads), strict=True):
            error = (got[-tail:].double() - exact).abs().max()
            assert error < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        del out, lse, grads


def test_one_graph_serves_every_mix_of_lengths():
    """Captured once, without a host sync, and replayed on other lengths: the same bits as a fresh launch."""
    capacity, heads, head_dim, longest = 512, 2, 64, 200
    query, key, value = torch.randn(capacity, 3, heads, head_dim, device="cuda", dtype=torch.float16).unbind(1)
    dout = torch.randn(capacity, heads, head_dim, device="cuda", dtype=torch.float16)
    bounds = segment_bounds([128, 128, 0, 0], "cuda")
    backward = torch.ops.roberta_fast.attention_backward.default
    rest = (longest, longest, head_dim**-0.5, False, None, 0.0, None, False, "triton")

    def both(bounds):
        out, lse = operator(query, key, value, bounds, bounds, *rest)
        return out, *backward(dout, query, key, value, out, lse, bounds, bounds, *rest)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")
        both(bounds)
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(bounds)
    for lengths in ([200, 1, 100, 7], [0, 0, 3, 0], [128, 128, 128, 128]):
        bounds.copy_(segment_bounds(lengths, "cuda"))
        graph.replay()
        for got, wanted in zip(captured, both(bounds), strict=True):
            assert torch.equal(got[: sum(lengths)], wanted[: sum(lengths)])


def test_runs_on_the_tensors_device():
    """Not on the current one, where they differ."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = Case((5, 70), head_dim=64, dtype=torch.float16)
    inputs, dout = case.inputs("cuda:1"), dout_of(case, "cuda:1")
    check(case, run(case, inputs, dout, "triton"), run(case, inputs, dout, "torch"), exactly(case, inputs, dout))
