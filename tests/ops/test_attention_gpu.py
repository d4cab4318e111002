"""Attention on a GPU: half precision, every head dimension, long segments, huge tensors, CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, check, dout_of, exactly, operator, run

from roberta_fast.kernels import tuning
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
        rest = (length, length, head_dim**-0.5, False, None, 0.0, None, deterministic, None)
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


@pytest.mark.parametrize("change", [{}, {"causal": True}, {"dropout_p": 0.1}], ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("longest", [32, 64, 128])
def test_several_heads_a_program(longest, head_dim, change):
    """So many segments that programs take several heads of each, the longest first."""
    lengths = tuple(longest - i % 7 if i % 20 == 0 else 1 + i % 9 for i in range(800))
    order = tuple(sorted(range(800), key=lambda b: -lengths[b]))
    case = Case(lengths, heads=12, head_dim=head_dim, dtype=torch.bfloat16, order=order, **change)
    inputs, dout = case.inputs("cuda"), dout_of(case, "cuda")
    name = "forward_dropout" if case.dropout_p else "forward"
    for kernel in (name, "backward"):
        tile = tuning.short_attention_tile(kernel, inputs[0], (longest, longest))
        assert tile is None or tuning.heads_per_program(tile, inputs[0], len(lengths)) > 1
    fast = run(case, inputs, dout, "triton")
    check(case, fast, run(case, inputs, dout, "torch"), exactly(case, inputs, dout))
    in_order = run(replace(case, order=None), inputs, dout, "triton")
    assert all(map(torch.equal, (*fast[:2], *fast[2]), (*in_order[:2], *in_order[2])))


@pytest.mark.parametrize("lengths", [(30, 5), (64, 33), (128, 77), (300, 5)], ids=str)
def test_deterministic_bits_alone_and_in_any_batch(lengths):
    """Whatever the longest segment is, and with it what other kernels would be chosen."""
    together = Case((*lengths, 700, 64), heads=3, head_dim=64, dtype=torch.bfloat16, deterministic=True, order=(2, 0, 3, 1))
    inputs, dout = together.inputs("cuda"), dout_of(together, "cuda")
    out, _, grads = run(together, inputs, dout, "triton")
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = replace(together, lengths_q=(length,), order=None)
        one_out, _, one_grads = run(alone, [t[rows] for t in inputs], dout[rows], "triton")
        assert all(torch.equal(whole[rows], one) for whole, one in zip((out, *grads), (one_out, *one_grads), strict=True))
        begin += length


def test_one_graph_serves_every_mix_of_lengths():
    """Captured once, without a host sync, and replayed on other lengths in another order: the same bits as a fresh launch."""
    capacity, heads, head_dim, longest = 512, 2, 64, 200
    query, key, value = torch.randn(capacity, 3, heads, head_dim, device="cuda", dtype=torch.float16).unbind(1)
    dout = torch.randn(capacity, heads, head_dim, device="cuda", dtype=torch.float16)
    bounds, order = segment_bounds([128, 128, 0, 0], "cuda"), torch.arange(4, dtype=torch.int32, device="cuda")
    backward = torch.ops.roberta_fast.attention_backward.default
    rest = (longest, longest, head_dim**-0.5, False, None, 0.0, None, False, order, "triton")

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
        order.copy_(torch.tensor(lengths).argsort(descending=True, stable=True))
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
