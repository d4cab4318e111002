"""Attention: the reference against PyTorch's, the kernels against the reference, and mutants that the rule must catch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, check, dout_of, exactly, gradients, operator, run

from roberta_fast import dispatch
from roberta_fast.ops import attention, dropout
from roberta_fast.ops.attention import attention_backward_ref, attention_ref
from roberta_fast.testing import poisoned

# Segments of at most 32 rows, the interpreter's tile, have the backward kernel that takes whole segments: the "short" ones.
CASES = {
    "ragged": Case((5, 40, 1, 33), heads=2),
    "short": Case((5, 32, 1, 17), heads=2),
    "ragged, float16": Case((5, 40, 1, 33), dtype=torch.float16),
    "short, float16": Case((5, 31), dtype=torch.float16),
    "no tokens": Case((0, 0)),
    "no segments": Case(()),
    "empty segments": Case((0, 7, 0, 9, 0)),
    "one long": Case((107,)),
    "cross": Case((3, 40, 0, 8), (38, 5, 4, 0)),
    "cross, short": Case((3, 30, 0, 8), (31, 5, 4, 0)),
    "causal": Case((35, 1), causal=True),
    "causal, longer keys": Case((3, 40), (37, 61), causal=True),
    "causal, rows without keys": Case((50, 9), (40, 0), causal=True),
    "causal, rows without keys, short": Case((30, 9), (20, 0), causal=True),
    "query only": Case((1, 5, 34), query_only=(1, 1, 0)),
    "query only, short": Case((1, 5, 30), query_only=(1, 1, 0)),
    "query only, many rows": Case((70, 40), query_only=(33, 32)),
    "dropout": Case((5, 40, 33), heads=2, dropout_p=0.2),
    "dropout, short": Case((5, 31), heads=2, dropout_p=0.2),
    "dropout, everything at once": Case(
        (33, 40), (50, 35), head_dim=24, causal=True, query_only=(1, 33), dropout_p=0.4, dtype=torch.float16
    ),
    "dropout, everything at once, short": Case(
        (20, 32), (31, 25), head_dim=24, causal=True, query_only=(1, 23), dropout_p=0.4, dtype=torch.float16
    ),
    "head dim 16": Case((5, 33), head_dim=16),
    "head dim 24": Case((5, 31), head_dim=24),
    "head dim 80": Case((5, 33), head_dim=80),
    "head dim 128": Case((5, 31), head_dim=128),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, backend):
    case = backend.fitted(CASES[name])
    inputs, dout = case.inputs(backend.device), dout_of(case, backend.device)
    check(case, run(case, inputs, dout, backend.name), run(case, inputs, dout, "torch"), exactly(case, inputs, dout))


def composition(q, k, v, scale, causal, keep, p):
    """One segment [H, n, D] by softmax and two products; keep: bool [H, n, m] or None."""
    scores = q @ k.mT * scale
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(torch.arange(m) > torch.arange(n)[:, None] + m - n, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()
    return (weights if keep is None else weights * keep * dropout.scale(p)) @ v


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 33, 1)),
        Case((3, 7), (20, 4), head_dim=24),
        Case((6, 4), (6, 9), causal=True),
        Case((6, 4), query_only=(2, 0)),
        Case((6, 9), dropout_p=0.5, query_only=(1, 0)),
    ],
    ids=["bidirectional", "cross", "causal", "query only", "dropout"],
)
def test_reference_is_softmax_attention(case):
    """Forward against PyTorch's own kernel (dropout: the written-out product), backward against autograd, in float64."""
    inputs = [t.double() for t in case.inputs()]
    bounds_q, bounds_k, _, _, scale, causal, skip, p, seed, _, _ = rest = case.rest()

    def by_segment(q, k, v):
        out = []
        for b in range(len(bounds_q) - 1):
            first_key = int(bounds_k[b]) + (0 if skip is None else int(skip[b]))
            keys = slice(first_key, int(bounds_k[b + 1]))
            q_b, k_b, v_b = (t[s].transpose(0, 1) for t, s in ((q, slice(bounds_q[b], bounds_q[b + 1])), (k, keys), (v, keys)))
            keep = None
            if p:
                rows, columns = torch.arange(q_b.shape[1]), int(bounds_k[b + 1] - bounds_k[b])
                masks = [dropout.keep_mask(seed, p, rows, columns, h, b)[:, columns - k_b.shape[1] :] for h in range(q.shape[1])]
                keep = torch.stack(masks)
            written_out = composition(q_b, k_b, v_b, scale, causal, keep, p)
            if not p and not causal:
                torch.testing.assert_close(written_out, F.scaled_dot_product_attention(q_b, k_b, v_b), atol=1e-12, rtol=0)
            if causal and q_b.shape[1] == k_b.shape[1]:
                whole = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=True)
                torch.testing.assert_close(written_out, whole, atol=1e-12, rtol=0)
            out.append(written_out.transpose(0, 1))
        return torch.cat(out)

    dout = dout_of(case).double()
    expected, expected_grads = gradients(by_segment, inputs, dout)
    out, lse = attention_ref(*inputs, *rest)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    for grad, wanted in zip(attention_backward_ref(dout, *inputs, out, lse, *rest), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


def with_rest(case, inputs, dout, *, bounds_k=None, scale=None):
    """The reference under other key bounds or another scale; its lse is the right one, so that only the rest can be caught."""
    bounds_q, old_bounds_k, *longest, old_scale = case.rest()[:5]
    rest = bounds_q, old_bounds_k if bounds_k is None else bounds_k, *longest, scale or old_scale, *case.rest()[5:]
    out, _, grads = run(case, inputs, dout, "torch", rest)
    return out, attention_ref(*inputs, *case.rest())[1], grads


def neighbour_seen(case, inputs, dout):
    return with_rest(case, inputs, dout, bounds_k=case.rest()[1] + torch.tensor([0, 1, 0, 0], dtype=torch.int32))


def last_key_missing(case, inputs, dout):
    return with_rest(case, inputs, dout, bounds_k=case.rest()[1] - torch.tensor([0, 0, 0, 1], dtype=torch.int32))


def scale_missing(case, inputs, dout):
    return with_rest(case, inputs, dout, scale=1.0)


def rescaling_missing(case, inputs, dout):
    out, lse, grads = run(case, inputs, dout, "torch")
    return out / dropout.scale(case.dropout_p), lse, grads


def another_mask_backward(case, inputs, dout):
    out, lse, _ = run(case, inputs, dout, "torch")
    *rest, seed, deterministic, order = case.rest()
    return out, lse, attention_backward_ref(dout, *inputs, out, lse, *rest, seed + 1, deterministic, order)


def row_sums_missing(case, inputs, dout):
    out, lse, _ = run(case, inputs, dout, "torch")
    return out, lse, attention_backward_ref(dout, *inputs, torch.zeros_like(out), lse, *case.rest())


MUTANTS = {
    "a segment sees its neighbour": (neighbour_seen, "out"),
    "the last key is missing": (last_key_missing, "out"),
    "the scale is missing": (scale_missing, "out"),
    "dropout does not rescale": (rescaling_missing, "out"),
    "backward draws another mask": (another_mask_backward, "dquery"),
    "backward lacks the row sums": (row_sums_missing, "dquery"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", MUTANTS)
def test_rule_catches_mutants(name, dtype):
    mutant, caught_in = MUTANTS[name]
    case = replace(CASES["dropout"], dtype=dtype)
    inputs, dout = case.inputs(), dout_of(case)
    torch_result, exact = run(case, inputs, dout, "torch"), exactly(case, inputs, dout)
    check(case, torch_result, torch_result, exact)
    with pytest.raises(AssertionError, match=f"{caught_in}: max"):
        check(case, mutant(case, inputs, dout), torch_result, exact)


def test_one_token(backend):
    """Alone in its segment it sees itself: the output is its value, and query and key, which do not matter, get no gradient."""
    for deterministic in (False, True):
        case = Case((1,), deterministic=deterministic)
        inputs, dout = case.inputs(backend.device), dout_of(case, backend.device)
        out, lse, (dquery, dkey, dvalue) = run(case, inputs, dout, backend.name)
        torch.testing.assert_close(out, inputs[2], rtol=1e-6, atol=0)
        torch.testing.assert_close(lse[:, 0], (inputs[0] * inputs[1]).sum(-1)[0] * case.head_dim**-0.5, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dvalue, dout, rtol=1e-6, atol=0)
        # What is left is the rounding of two equal sums over the head dimension.
        terms = torch.finfo(out.dtype).eps * case.head_dim * dout.abs().max() * inputs[2].abs().max()
        assert dquery.abs().max() <= terms * inputs[1].abs().max()
        assert dkey.abs().max() <= terms * inputs[0].abs().max()


@pytest.mark.parametrize("longest", [30, 40])
def test_rows_behind_the_end_are_not_read(longest, backend):
    """NaN there changes no bit of what is before."""
    case = Case((5, longest))
    inputs, dout = case.inputs(backend.device), dout_of(case, backend.device)
    rows = dout.shape[0]
    clean, _, clean_grads = run(case, inputs, dout, backend.name)
    out, _, grads = run(case, [poisoned(t, 40) for t in inputs], poisoned(dout, 40), backend.name)
    for name, got, wanted in zip(("out", "dquery", "dkey", "dvalue"), (out, *grads), (clean, *clean_grads), strict=True):
        assert torch.equal(got[:rows], wanted), name


def test_deterministic_results_do_not_depend_on_the_batch(backend):
    """A segment gives bitwise the same alone as among others, forward and backward."""
    case = Case((5, 40, 1), deterministic=True)
    inputs, dout = case.inputs(backend.device), dout_of(case, backend.device)
    out, _, grads = run(case, inputs, dout, backend.name)
    begin = 0
    for length in case.lengths_q:
        rows = slice(begin, begin + length)
        alone = replace(case, lengths_q=(length,))
        one_out, _, one_grads = run(alone, [t[rows] for t in inputs], dout[rows], backend.name)
        assert all(torch.equal(whole[rows], one) for whole, one in zip((out, *grads), (one_out, *one_grads), strict=True))
        begin += length


def test_results_repeat_bitwise(backend):
    case = Case((5, 33), dropout_p=0.2)
    inputs, dout = case.inputs(backend.device), dout_of(case, backend.device)
    (out, _, grads), (again, _, grads_again) = (run(case, inputs, dout, backend.name) for _ in range(2))
    assert torch.equal(out, again) and all(map(torch.equal, grads, grads_again))


ORDERED = {
    "ragged": Case((5, 40, 0, 1, 33), heads=2, dropout_p=0.2, query_only=(1, 0, 0, 1, 0)),
    "short": Case((5, 32, 0, 1, 17), heads=2, dropout_p=0.2, query_only=(1, 0, 0, 1, 0)),
    "cross": Case((5, 40, 0, 1, 3), (7, 3, 4, 0, 50), heads=2, dropout_p=0.2),
    "deterministic": Case((5, 40, 0, 1, 33), heads=2, deterministic=True),
}


@pytest.mark.parametrize("head_dim", [24, 32, 64])
def test_how_rows_lie_changes_no_bit(head_dim, backend):
    """Heads within rows, a head's rows one behind the other, as 8-bit projections come, and those apart from each other."""
    case = Case((70, 3, 130), head_dim=head_dim, heads=2)
    inputs = case.inputs(backend.device)
    by_heads = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    within_wider = [torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, :head_dim] for t in by_heads]
    for results in zip(
        *(operator(*given, *case.rest(backend.device), backend.name) for given in (inputs, by_heads, within_wider)), strict=True
    ):
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ORDERED)
def test_order_changes_no_bit(name, backend):
    """Not even of dropout's mask, which belongs to the segment and not to its place in the order."""
    case = ORDERED[name]
    inputs, dout = case.inputs(backend.device), dout_of(case, backend.device)
    out, lse, grads = run(case, inputs, dout, backend.name)
    for order in ((1, 4, 0, 3, 2), (2, 3, 0, 4, 1)):
        ordered = run(replace(case, order=order), inputs, dout, backend.name)
        assert torch.equal(ordered[0], out) and torch.equal(ordered[1], lse)
        assert all(map(torch.equal, ordered[2], grads))


@pytest.mark.parametrize("longest", [30, 40])
def test_kernels_work_on_the_segments_that_the_order_names(longest, triton_device):
    """One that it leaves out keeps what its memory held, in every result; all others are computed."""
    case = Case((5, longest, 17), heads=2, order=(1, 0, 1))
    inputs, dout = case.inputs(triton_device), dout_of(case, triton_device)
    wanted_out, wanted_lse, wanted_grads = run(replace(case, order=None), inputs, dout, "triton")
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        out, lse, grads = run(case, inputs, dout, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    named = 5 + longest
    for got, wanted in zip((out, lse.T, *grads), (wanted_out, wanted_lse.T, *wanted_grads), strict=True):
        assert torch.equal(got[:named], wanted[:named]) and got[named:].isnan().all()


def test_dropout_mask_forward_and_backward(backend):
    """With uniform weights and unit values the output is the mask, and the gradient of the values is its transpose."""
    length, p = 32, 0.3
    case = Case((length, length), heads=1, head_dim=length, dropout_p=p)
    query, key = torch.zeros(2, 2 * length, 1, length, device=backend.device)
    value = torch.eye(length, device=backend.device).repeat(2, 1)[:, None]
    dout = torch.eye(length, device=backend.device).repeat(2, 1)[:, None]
    out, _, (_, _, dvalue) = run(case, (query, key, value), dout, backend.name)
    seed = case.rest()[-3]
    for segment, rows in enumerate((slice(0, length), slice(length, 2 * length))):
        keep = dropout.keep_mask(seed, p, torch.arange(length), length, 0, segment)
        weights = keep * dropout.scale(p) / length
        torch.testing.assert_close(out[rows, 0].cpu(), weights, rtol=1e-6, atol=0)
        torch.testing.assert_close(dvalue[rows, 0].cpu(), weights.T, rtol=1e-6, atol=0)


def test_large_scores_do_not_overflow(backend):
    """Scores of hundreds, of either sign, where exponentials without the maximum would be infinite or zero."""
    case = Case((40,))
    query, key, value = case.inputs(backend.device)
    dout = dout_of(case, backend.device)
    for sign in (1, -1):
        # One dominant component makes every score of a row large and of one sign.
        large = [t.clone() for t in (query, key)]
        large[0][..., 0], large[1][..., 0] = 60.0, sign * 60.0
        inputs = (*large, value)
        check(case, run(case, inputs, dout, backend.name), run(case, inputs, dout, "torch"), exactly(case, inputs, dout))


@pytest.mark.parametrize(
    "case",
    [Case((3, 2), head_dim=16), Case((3, 2), (4, 1), head_dim=16, dropout_p=0.5, query_only=(1, 0))],
    ids=["plain", "cross, dropout, query only"],
)
def test_opcheck(case, backend):
    inputs = [t.clone().requires_grad_() for t in case.inputs(backend.device)]
    rest = case.rest(backend.device)
    torch.library.opcheck(operator, (*inputs, *rest, backend.name))
    out, lse = operator(*(t.detach() for t in inputs), *rest, backend.name)
    backward = torch.ops.roberta_fast.attention_backward.default
    saved = *(t.detach() for t in inputs), out, lse
    torch.library.opcheck(backward, (dout_of(case, backend.device), *saved, *rest, backend.name))


def test_what_is_kept(backend):
    """For the backward pass no scores, weights or mask, but one statistic a row and head."""
    case = Case((3, 2, 40), heads=2, dropout_p=0.5, order=(2, 0, 1))
    inputs = [t.requires_grad_() for t in case.inputs(backend.device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operator(*inputs, *case.rest(backend.device), backend.name)
    shapes = [tuple(t.shape) for t in kept if t.is_floating_point()]
    assert sorted(shapes) == [(2, 45)] + [(45, 2, 32)] * 4


HALF, INTEGERS = (torch.zeros(4, 2, 32, dtype=dtype) for dtype in (torch.float16, torch.int64))
BAD_ARGUMENTS = {
    "query of two dimensions": ({"query": torch.zeros(4, 32)}, r"query must be a packed .* got shape \(4, 32\)"),
    "integer query": ({"query": INTEGERS}, "query must be a floating-point tensor, got torch.int64"),
    "key of another head dim": ({"key": torch.zeros(4, 2, 16)}, r"key must be .* got shape \(4, 2, 16\)"),
    "value of another dtype": ({"value": HALF}, "value must be .* got torch.float16"),
    "fewer values than keys": ({"value": torch.zeros(3, 2, 32)}, "value must be key's 4 rows, got 3 rows"),
    "strided last dimension": ({"key": torch.zeros(4, 2, 64)[..., ::2]}, "key must be contiguous .* got stride 2"),
    "int64 bounds": ({"cu_seqlens_q": torch.tensor([0, 4])}, r"cu_seqlens_q must be int32 .* got torch.int64 \(2,\)"),
    "unequal bounds": ({"cu_seqlens_k": torch.tensor([0, 2, 4], dtype=torch.int32)}, r"cu_seqlens_k must be \(2,\), got \(3,\)"),
    "negative scale": ({"scale": -1.0}, r"scale must be positive, got -1\.0"),
    "dropout without seed": ({"dropout_p": 0.1}, "seed must be .* got None"),
    "order of another length": ({"order": torch.zeros(2, dtype=torch.int32)}, r"order must be .* got torch.int32 \(2,\)"),
    "int64 order": ({"order": torch.tensor([0])}, r"order must be int32 \[B\], got torch.int64 \(1,\)"),
    "dropout of everything": ({"dropout_p": 1.0, "seed": torch.tensor([1])}, r"dropout_p must be in \[0, 1\), got 1\.0"),
    "unknown backend": ({"backend": "cudnn"}, "backend='cudnn' is not one of"),
    "head dim beyond the kernels": (
        {name: torch.zeros(4, 2, 136) for name in ("query", "key", "value")} | {"backend": "triton"},
        "backend='triton' cannot run attention .* head_dim=136 is outside 16..128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_errors_name_argument_and_value(name):
    change, message = BAD_ARGUMENTS[name]
    arguments = {n: torch.zeros(4, 2, 32) for n in ("query", "key", "value")}
    arguments |= {n: torch.tensor([0, 4], dtype=torch.int32) for n in ("cu_seqlens_q", "cu_seqlens_k")}
    with pytest.raises(ValueError, match=message):
        attention(**{**arguments, "max_seqlen_q": 4, "max_seqlen_k": 4, **change})


def test_fallback_warns_with_the_reason(triton_device):
    """A head dim that kernels do not serve is computed by PyTorch, and says so."""
    dispatch.forget_choices()
    dispatch._warned.clear()
    case = Case((3, 2), head_dim=8)
    if triton_device == "cpu" and dispatch.load_cpp() is not None:
        pytest.skip("no kernel to fall back from: " + dispatch.load_cpp())
    inputs = case.inputs(triton_device)
    with pytest.warns(RuntimeWarning, match="head_dim=8 is outside 16..128"):
        out = attention(*inputs, *case.rest(triton_device)[:4])
    assert torch.equal(out, attention_ref(*inputs, *case.rest(triton_device))[0])
