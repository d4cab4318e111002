"""Drawn cases: each operation on each backend against plain PyTorch in float64.

A result is held to the rules of ``roberta_fast.testing``. On tensors this small PyTorch's own error may be nought by chance; so
the yardstick is its error or what two units in the last place of the inputs do to the exact result, whichever is larger.
"""

import pytest
import torch
import torch.nn.functional as F
from drawn import DTYPES, NARROWEST, WITHOUT_CPP, cases, last_bits_changed, masks, sizes, values
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from roberta_fast import ops
from roberta_fast.ops import dropout
from roberta_fast.testing import assert_close_as_torch, segment_bounds

BACKENDS = pytest.mark.parametrize("backend", [pytest.param("cpp", marks=WITHOUT_CPP), "torch"])

rows, columns = sizes(150, 0), sizes(90)
probabilities = st.sampled_from([0.0, 0.1, 0.5])


def drawn_dtype(data, backend):
    """The C++ kernels compute float32, PyTorch any."""
    return torch.float32 if backend != "torch" else DTYPES[data.draw(st.sampled_from(list(DTYPES)), label="dtype")]


def normal(shapes, dtype, seed, strided=False):
    """Tensors {name: of a shape, or None for None}, rounded to ``dtype``; strided: matrices have their columns apart."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        t = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        tensors[name] = t.mT.contiguous().mT if strided and t is not None and t.dim() == 2 else t
    return tensors


def both_passes(function, tensors, dout):
    """{"out": function(**tensors), and the gradient by each tensor's name}."""
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves)
    named = {name: t for name, t in leaves.items() if t is not None}
    return {"out": out.detach(), **dict(zip(named, torch.autograd.grad(out, list(named.values()), dout), strict=True))}


def check(function, plain, tensors, dout, backend, join=lambda results: results):
    """Holds ``function`` and its gradients to the rules; ``plain`` is the same in differentiable PyTorch, in any dtype.

    join: makes of the results {name: tensor} those that are compared.
    """
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    fast = both_passes(function, {name: t if t is None else t.to(device) for name, t in tensors.items()}, dout.to(device))
    fast = {name: t.cpu() for name, t in fast.items()}
    exact = both_passes(plain, {name: t if t is None else t.double() for name, t in tensors.items()}, dout.double())
    eps = torch.finfo(dout.dtype).eps
    yardsticks = [both_passes(plain, tensors, dout)]
    for seed in range(3):
        changed = last_bits_changed(tensors | {"dout": dout}, eps, seed)
        changed_dout = changed.pop("dout")
        yardsticks.append(both_passes(plain, changed, changed_dout))
    fast, exact, *yardsticks = (join(results) for results in (fast, exact, *yardsticks))
    for name, wanted in exact.items():
        if wanted.numel():
            worst = max((y[name].double() for y in yardsticks), key=lambda t: (t - wanted).abs().max().nan_to_num())
            assert_close_as_torch(fast[name], worst, wanted, factor=2.0 if name == "out" else 3.0, name=name)


def behind_the_count(function, real, behind):
    """``function`` on rows with ``behind`` rows of NaN behind them, in the gradient as well; None: without a count."""
    if behind is None:
        return function

    def poisoned(t):
        return torch.cat([t, t.new_full((behind, t.shape[1]), torch.nan)])

    def run(**tensors):
        longer = {name: poisoned(t) if name in ("x", "residual") and t is not None else t for name, t in tensors.items()}
        out = function(**longer, count=torch.tensor([real], dtype=torch.int32, device=longer["x"].device))
        out.register_hook(lambda gradient: poisoned(gradient[:real]))
        return out[:real]

    return run


@BACKENDS
@cases(15)
@given(masks(), sizes(20, 0), st.none() | sizes(20, 0), st.sampled_from(list(DTYPES)))
def test_pack_and_unpack(backend, mask, width, spare, dtype):
    """Bitwise: the rows that plain indexing takes, back at their places, zeros elsewhere; either is the other's gradient."""
    keep = mask.bool() | (torch.arange(mask.shape[1]) == 0)
    tokens = int(keep.sum())
    capacity = None if spare is None else tokens + spare
    indices, cu_seqlens, count, query_only, order = ops.pack_indices(mask, capacity, backend=backend)
    assert indices[:tokens].tolist() == keep.flatten().nonzero().flatten().tolist()
    assert torch.equal(cu_seqlens, segment_bounds(keep.sum(1).tolist())) and count.tolist() == [tokens]
    assert query_only.tolist() == (mask[:, 0] == 0).int().tolist()
    lengths = keep.sum(1).tolist()
    assert order.tolist() == sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)) and order.dtype == torch.int32
    x = torch.arange(mask.numel() * width).view(*mask.shape, width).to(DTYPES[dtype]).requires_grad_()
    known = None if spare is None else count
    packed = ops.pack(x, indices, known, backend=backend)
    assert torch.equal(packed[:tokens], x[keep])
    longer = torch.cat([packed[:tokens], packed.new_full((spare or 0, width), torch.nan)])
    padded = ops.unpack(longer, indices, *mask.shape, known, backend=backend)
    assert torch.equal(padded, x * keep[..., None])
    if width:
        (dx,) = torch.autograd.grad(padded, x, torch.ones_like(padded))
        assert torch.equal(dx, torch.zeros_like(x) + keep[..., None])


def kept(shape, p, seed, head=0, segment=0):
    """Dropout's factors, from the coordinates."""
    return dropout.keep_mask(torch.tensor([seed]), p, torch.arange(shape[0]), shape[1], head, segment) * dropout.scale(p)


def check_linear(backend, tensors, dout, behind=None):
    def run(**tensors):
        return ops.linear(**tensors, deterministic=backend == "cpp", backend=backend)

    def plain(x, weight, bias, residual):
        return F.linear(x, weight, bias) + (0 if residual is None else residual)

    check(behind_the_count(run, len(dout), behind), plain, tensors, dout, backend)


def check_linear_gelu(backend, tensors, dout, approximate, behind=None, deterministic=False):
    def run(**tensors):
        return ops.linear_gelu(**tensors, approximate=approximate, deterministic=deterministic, backend=backend)

    def plain(x, weight, bias):
        u = F.linear(x, weight, bias)
        if approximate == "none" and u.dtype == torch.float64:  # 1 + erf would lose the far tail
            return u / 2 * torch.special.erfc(u / -(2**0.5))
        return F.gelu(u, approximate=approximate)

    check(behind_the_count(run, len(dout), behind), plain, tensors, dout, backend)


def check_add_layer_norm(backend, tensors, dout, p, eps, seed, behind=None):
    def run(**tensors):
        return ops.add_layer_norm(
            **tensors, eps=eps, dropout_p=p, seed=torch.tensor([seed], device=tensors["x"].device), backend=backend
        )

    def plain(x, residual, weight, bias):
        z = x * kept(x.shape, p, seed).to(x.dtype) + (0 if residual is None else residual)
        return F.layer_norm(z, z.shape[1:], weight, bias, eps)

    check(behind_the_count(run, len(dout), behind), plain, tensors, dout, backend)


def linear_tensors(n, inner, outer, dtype, seed, bias=True, residual=False, strided=False):
    """({"x": ..., "weight": ..., "bias": ..., and "residual" if asked for}, the result's gradient)."""
    shapes = {"x": (n, inner), "weight": (outer, inner), "bias": (outer,) if bias else None, "residual": (n, outer)}
    tensors = normal(shapes | {"dout": (n, outer)}, dtype, seed, strided)
    dout = tensors.pop("dout")
    return tensors | {"residual": tensors["residual"] if residual else None}, dout


def norm_tensors(n, hidden, dtype, seed, residual=True, strided=False):
    """({"x": ..., "residual": ..., "weight": ..., "bias": ...}, the result's gradient)."""
    shapes = {"x": (n, hidden), "residual": (n, hidden) if residual else None, "weight": (hidden,), "bias": (hidden,)}
    tensors = normal(shapes | {"dout": (n, hidden)}, dtype, seed, strided)
    return tensors, tensors.pop("dout")


def without_residual(tensors, dout):
    tensors.pop("residual")
    return tensors, dout


@BACKENDS
@cases(20)
@given(st.data(), rows, columns, columns, st.booleans(), st.booleans(), st.booleans(), st.none() | sizes(60, 0), values)
def test_linear(backend, data, n, inner, outer, bias, residual, strided, behind, seed):
    dtype = drawn_dtype(data, backend)
    check_linear(backend, *linear_tensors(n, inner, outer, dtype, seed, bias, residual, strided), behind)


@BACKENDS
@cases(25)
@given(
    st.data(), rows, columns, columns, st.booleans(), st.booleans(), st.none() | sizes(60, 0), st.sampled_from(["none", "tanh"]),
    values,
)  # fmt: skip
def test_linear_gelu(backend, data, n, inner, outer, bias, strided, behind, approximate, seed):
    dtype = drawn_dtype(data, backend)
    deterministic = backend == "cpp" and data.draw(st.booleans(), label="deterministic")
    tensors = without_residual(*linear_tensors(n, inner, outer, dtype, seed, bias, strided=strided))
    check_linear_gelu(backend, *tensors, approximate, behind, deterministic)


@BACKENDS
@cases(25)
@given(
    st.data(), rows, st.integers(NARROWEST, 300), st.booleans(), st.booleans(), st.none() | sizes(60, 0), probabilities,
    st.sampled_from([1e-5, 1e-12]), st.sampled_from([0.0, 30.0]), values,
)  # fmt: skip
def test_add_layer_norm(backend, data, n, hidden, residual, strided, behind, p, eps, mean, seed):
    tensors, dout = norm_tensors(n, hidden, drawn_dtype(data, backend), seed, residual, strided)
    check_add_layer_norm(backend, tensors | {"x": tensors["x"] + mean}, dout, p, eps, seed, behind)


@st.composite
def segments(draw, longest=130):
    """(lengths of queries, of keys, rows that are not seen) of up to four segments; keys None for self-attention."""
    length = sizes(longest, 0)
    queries = draw(st.lists(length, max_size=4))
    some = {"min_size": len(queries), "max_size": len(queries)}
    return queries, draw(st.none() | st.lists(length, **some)), draw(st.none() | st.lists(st.integers(0, 2), **some))


def plain_attention(query, key, value, lengths_q, lengths_k, skipped, causal, p, seed):
    """Segment by segment: softmax over the keys that are seen, zeros where none is, dropout from the coordinates."""
    outs = [query[:0] + key[:0] + value[:0]]
    parts = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), skipped, strict=True)
    for b, (q, k, v, skip) in enumerate(parts):
        n, m = len(q), len(k)
        visible = (torch.arange(m) >= skip).expand(n, m)
        if causal:  # the last query sees the last of the keys that are seen at all
            visible = visible & (torch.arange(m) <= torch.arange(n)[:, None] + m - n)
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible & visible.any(-1, keepdim=True), -torch.inf)
        weights = scores.softmax(-1) * visible
        if p:
            weights = weights * torch.stack([kept((n, m), p, seed, h, b) for h in range(q.shape[1])]).to(weights.dtype)
        outs.append(torch.einsum("hnm,mhd->nhd", weights, v))
    return torch.cat(outs)


def check_attention(backend, shape, heads, head_dim, causal, p, dtype, seed):
    """Views of one tensor, as fused projections give them, against ``plain_attention``."""
    lengths_q, lengths_k, query_only = shape
    keys, skipped = lengths_q if lengths_k is None else lengths_k, query_only or [0] * len(lengths_q)
    most = max(sum(lengths_q), sum(keys))
    fused = normal({"qkv": (most, 3, heads, head_dim)}, dtype, seed)["qkv"]
    dout = normal({"dout": (sum(lengths_q), heads, head_dim)}, dtype, seed + 1)["dout"]
    tensors = {"query": fused[: sum(lengths_q), 0], "key": fused[: sum(keys), 1], "value": fused[: sum(keys), 2]}
    bounds = segment_bounds(lengths_q), segment_bounds(keys)

    def run(query, key, value):
        skip = None if query_only is None else torch.tensor(query_only, dtype=torch.int32, device=query.device)
        rest = *(t.to(query.device) for t in bounds), max(lengths_q, default=0), max(keys, default=0)
        seeds = torch.tensor([seed], device=query.device)
        return ops.attention(query, key, value, *rest, causal=causal, query_only=skip, dropout_p=p, seed=seeds, backend=backend)

    def plain(query, key, value):
        return plain_attention(query, key, value, lengths_q, keys, skipped, causal, p, seed)

    # Where a query sees few keys, little but rounding is left of what is subtracted: dO Vᵀ - rowsum(dO∘O), times keys or queries.
    products = torch.einsum("nhd,mhd->hnm", dout.double(), tensors["value"].double())
    cancelled = head_dim**-0.5 * fused.double().abs().max() * products.abs().max() if products.numel() else torch.zeros(())

    def as_one(results):
        """The gradients as one vector, and the size of the terms that cancel."""
        size = cancelled.to(results["out"].dtype).reshape(1)
        return {"out": results["out"], "gradients": torch.cat([*(results[name].flatten() for name in tensors), size])}

    check(run, plain, tensors, dout, backend, as_one)


@BACKENDS
@cases(30)
@given(st.data(), segments(), st.integers(1, 3), sizes(128), st.booleans(), probabilities, values)
def test_attention(backend, data, shape, heads, head_dim, causal, p, seed):
    assume(backend != "cpp" or head_dim >= 16)
    check_attention(backend, shape, heads, head_dim, causal, p, drawn_dtype(data, backend), seed)


@pytest.mark.parametrize("op", ["linear_gelu", "add_layer_norm", "attention"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_triton(op, data):
    """A few tiny ones, as its interpreter is slow where there is no GPU."""
    n, size, behind, seed = (data.draw(s) for s in (sizes(20), st.integers(NARROWEST, 30), st.none() | sizes(9, 0), values))
    if op == "attention":
        shape, head_dim, causal, p = (data.draw(s) for s in (segments(6), st.integers(16, 32), st.booleans(), probabilities))
        check_attention("triton", shape, 1, head_dim, causal, p, torch.float32, seed)
    elif op == "linear_gelu":
        tensors = without_residual(*linear_tensors(n, size, 7, torch.float32, seed))
        check_linear_gelu("triton", *tensors, data.draw(st.sampled_from(["none", "tanh"])), behind)
    else:
        p, residual = data.draw(probabilities), data.draw(st.booleans())
        check_add_layer_norm("triton", *norm_tensors(n, size, torch.float32, seed, residual), p, 1e-5, seed, behind)


@WITHOUT_CPP
@cases(15)
@given(st.data(), sizes(150), columns, columns, values)
def test_some_rows_alone_have_the_same_bits(data, n, inner, outer, seed):
    tensors = normal({"x": (n, inner), "weight": (outer, inner), "bias": (outer,)}, torch.float32, seed)
    first = data.draw(st.integers(0, n - 1), label="first")
    some = slice(first, data.draw(st.integers(first + 1, n), label="end"))
    for op in (ops.linear, ops.linear_gelu):
        together, alone = (op(**{**tensors, "x": x}, deterministic=True) for x in (tensors["x"], tensors["x"][some]))
        assert torch.equal(together[some], alone), op.__name__


@WITHOUT_CPP
@cases(15)
@given(st.data(), st.lists(sizes(150), min_size=1, max_size=5), st.integers(1, 3), st.integers(16, 128), st.booleans(), values)
def test_a_segment_alone_has_the_same_bits(data, lengths, heads, head_dim, causal, seed):
    """Its output and its gradients."""
    shape, one = (sum(lengths), heads, head_dim), data.draw(st.integers(0, len(lengths) - 1), label="segment")
    tensors = normal(dict.fromkeys(("query", "key", "value", "dout"), shape), torch.float32, seed)
    dout = tensors.pop("dout")

    def run(lengths, tensors, dout):
        bounds, longest = segment_bounds(lengths), max(lengths)
        attention = lambda **qkv: ops.attention(**qkv, **given, causal=causal, deterministic=True)
        given = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return both_passes(attention, tensors, dout)

    together = run(lengths, tensors, dout)
    own = {name: t.split(lengths)[one] for name, t in (tensors | {"dout": dout}).items()}
    alone = run([lengths[one]], own, own.pop("dout"))
    for name, result in alone.items():
        assert torch.equal(together[name].split(lengths)[one], result), name


def bias_gradient_dropped(linear_gelu):
    return lambda bias, **rest: linear_gelu(bias=bias.detach() + 0 * bias, **rest)


def unbiased_variance(add_layer_norm):
    def mutant(x, weight, **rest):
        n = x.shape[1]
        return add_layer_norm(x, weight=weight * ((n - 1) / n) ** 0.5, **rest)

    return mutant


MUTANTS = {
    "linear: a residual is lost": ("linear", lambda f: lambda residual, **t: f(residual=residual * 0, **t)),
    "linear: inner products in half": ("linear", lambda f: lambda x, **t: f(x=x.half().float(), **t)),
    "linear_gelu: tanh for erf": ("linear_gelu", lambda f: lambda approximate, **t: f(approximate="tanh", **t)),
    "linear_gelu: no gradient of the bias": ("linear_gelu", bias_gradient_dropped),
    "add_layer_norm: unbiased variance": ("add_layer_norm", unbiased_variance),
    "add_layer_norm: another mask": ("add_layer_norm", lambda f: lambda seed, **t: f(seed=seed + 1, **t)),
    "attention: another key's value": ("attention", lambda f: lambda q, k, v, *rest, **t: f(q, k.roll(1, 0), v, *rest, **t)),
    "attention: another scale": ("attention", lambda f: lambda q, *rest, **t: f(q * 1.0001, *rest, **t)),
    "attention: sees later keys": ("attention", lambda f: lambda *rest, causal, **t: f(*rest, causal=False, **t)),
}


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, backend, monkeypatch):
    """The rule as it is used here can fail: with an ordinary case it lets the operation pass and the mutant not."""
    op, mutate = MUTANTS[name]
    single = torch.float32
    cases_of = {
        "linear": lambda: check_linear(backend, *linear_tensors(9, 20, 7, single, 0, residual=True)),
        "linear_gelu": lambda: check_linear_gelu(
            backend, *without_residual(*linear_tensors(9, 20, 7, single, 0)), approximate="none"
        ),
        "add_layer_norm": lambda: check_add_layer_norm(backend, *norm_tensors(9, 40, single, 0), p=0.1, eps=1e-5, seed=0),
        "attention": lambda: check_attention(backend, ([5, 17], None, None), 2, 16, True, 0.0, single, 0),
    }
    cases_of[op]()
    monkeypatch.setattr(ops, op, mutate(getattr(ops, op)))
    with pytest.raises(AssertionError, match=r"max\|fast - ref\| = .* exceeds"):
        cases_of[op]()
