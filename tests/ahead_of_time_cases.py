"""What ``ahead_of_time.py`` compiles: every kernel by a call of its launcher on meta tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from roberta_fast.kernels import (
    add_layer_norm,
    attention,
    cross_entropy,
    embedding,
    feed_forward,
    fp8_linear,
    linear,
    linear_gelu,
    pack,
)


@dataclass(frozen=True)
class Case:
    """A launcher call whose kernels are to be compiled.

    launch: calls the launcher on meta tensors. default: part of the short run; others need ``--all``.
    tensor_cores: its matrix products must use them (not so in float32).
    spill_bytes: most bytes a thread may spill in any of its kernels; None: ``ATTENTION_SPILL`` in attention, and 0 elsewhere.
    since: the first generation that has the instructions.
    """

    launch: Callable[[], object]
    default: bool = False
    tensor_cores: bool = True
    spill_bytes: int | None = None
    since: int = 80


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data: 16-byte aligned, as allocations on the device are."""
    return torch.empty(shape, dtype=dtype, device="meta")


COUNT, SEED = meta(1, dtype=torch.int32), meta(1, dtype=torch.int64)


def both_linear(
    dtype: torch.dtype, inner: int = 768, outer: int = 768, precision: str = "ieee", rows: int = 8192
) -> None:  # fmt: skip
    """Forward with all that it can add, and backward, with float32 products in ``precision``."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    x, weight, bias, dy = (meta(*shape, dtype=dtype) for shape in ((rows, inner), (outer, inner), (outer,), (rows, outer)))
    linear.linear_fwd(x, weight, bias, dy, COUNT)
    linear.linear_bwd(dy, x, weight, True, COUNT)
    torch.backends.cuda.matmul.fp32_precision = before


def both_linear_gelu(
    dtype: torch.dtype, approximate: str = "none", save: bool = True, inner: int = 768, rows: int = 8192
) -> None:  # fmt: skip
    """Forward, and of the backward pass the element-wise half: its GEMMs are ``linear``'s."""
    x, weight, bias, dy = (meta(*shape, dtype=dtype) for shape in ((rows, inner), (3072, inner), (3072,), (rows, 3072)))
    linear_gelu.linear_gelu_fwd(x, weight, bias, approximate, save, COUNT)
    linear_gelu.linear_gelu_bwd(dy, dy, x, weight, True, approximate, None)


def feed_forward_backward(
    dtype: torch.dtype, approximate: str = "none", recompute: bool = False, hidden: int = 768, precision: str = "ieee",
    rows: int = 8192,
) -> None:  # fmt: skip
    """All gradients, the products of which the host knows the number of rows; the others are ``linear``'s."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    inner = 4 * hidden
    x, u, weight1, weight2 = (meta(*s, dtype=dtype) for s in ((rows, hidden), (rows, inner), (inner, hidden), (hidden, inner)))
    activated = None if recompute else u
    feed_forward.feed_forward_bwd(x, u, activated, x, weight1, weight2, [True] * 5, approximate, COUNT)
    torch.backends.cuda.matmul.fp32_precision = before


def both_add_layer_norm(
    x: torch.dtype, residual: torch.dtype | None, dropout_p: float, hidden: int = 768, of_others: bool = False
) -> None:
    """Forward and backward with float32 weights; ``of_others``: of rows that were taken from among others."""
    z = None if residual is None else meta(8192, hidden, dtype=residual)
    x, dy = meta(8192, hidden, dtype=x), meta(8192, hidden, dtype=residual or x)
    weight, statistics = meta(hidden, dtype=torch.float32), meta(8192, dtype=torch.float32)
    seed, numbers = SEED if dropout_p else None, meta(8192, dtype=torch.int64) if of_others else None
    add_layer_norm.add_layer_norm_fwd(x, z, weight, weight, 1e-5, dropout_p, seed, COUNT, numbers)
    add_layer_norm.add_layer_norm_bwd(dy, x, z, weight, statistics, statistics, dropout_p, seed, COUNT, numbers)


def both_embedding(
    dtype: torch.dtype, given: bool, types: bool, dropout_p: float, hidden: int = 768, ids: torch.dtype = torch.int64
) -> None:
    """Forward, and of the backward pass what precedes LayerNorm's. given: position and type ids are; types: there is a table."""
    word, position, token_type = (meta(rows, hidden, dtype=dtype) for rows in (50265, 514, 2))
    more = meta(32, 512, dtype=ids) if given else None
    lookup = meta(32, 512, dtype=ids), more, more if types else None, meta(8192, dtype=torch.int64)
    tables, drops = (word, position, token_type if types else None), (dropout_p, SEED if dropout_p else None, COUNT)
    embedding.embedding_fwd(*lookup, *tables, meta(hidden, dtype=dtype), meta(hidden, dtype=dtype), 1e-5, *drops)
    embedding.embedding_bwd(meta(8192, hidden, dtype=dtype), *lookup, *tables, *drops)


def all_of_pack(dtype: torch.dtype, mask: torch.dtype = torch.int64) -> None:
    """Indices of a mask, rows in, rows out."""
    indices, _, count, *_ = pack.pack_indices(meta(32, 512, dtype=mask), 8192)
    rows = pack.pack(meta(32, 512, 768, dtype=dtype), indices, count)
    pack.unpack(rows, indices, 32, 512, count)


def both_attention(
    dtype: torch.dtype, head_dim: int = 64, longest: int = 512, dropout_p: float = 0.0, causal: bool = False,
    query_only: bool = False, deterministic: bool = False, precision: str = "ieee",
) -> None:  # fmt: skip
    """Forward and backward of a fused projection's views, segments of at most ``longest`` rows, begun in an order."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    qkv, out = meta(8192, 3, 12, head_dim, dtype=dtype), meta(8192, 12, head_dim, dtype=dtype)
    bounds, order = (meta(size, dtype=torch.int32) for size in (33, 32))
    skip, seed = order if query_only else None, SEED if dropout_p else None
    rest = bounds, bounds, longest, longest, 0.125, causal, skip, dropout_p, seed, deterministic, order
    attention.attention_fwd(*qkv.unbind(1), *rest)
    attention.attention_bwd(out, *qkv.unbind(1), out, meta(12, 8192, dtype=torch.float32), *rest)
    torch.backends.cuda.matmul.fp32_precision = before


def fp8_products(dtype: torch.dtype, gelu: str | None = None, inner: int = 768, outer: int = 3072) -> None:
    """LayerNorm's and attention's results in 8 bits, the product that reads them, and that product's own result in 8 bits."""
    x, vector, wide = meta(8192, inner, dtype=dtype), meta(inner, dtype=torch.float32), meta(outer, dtype=torch.float32)
    _, rows = add_layer_norm.add_layer_norm_fp8(x, x, vector, vector, 1e-5, vector, COUNT)
    qkv, bounds = meta(8192, 3, 12, 64, dtype=dtype), meta(33, dtype=torch.int32)
    for longest in (64, 128, 512):
        factors = meta(12, 64, dtype=torch.float32)
        attention.attention_fwd(*qkv.unbind(1), bounds, bounds, longest, longest, 0.125, inverse=factors)
    weight = meta(outer, inner, dtype=torch.float8_e4m3fn)
    fp8_linear.fp8_linear_fwd(rows, weight, wide, wide, gelu, wide if gelu else None, dtype, COUNT)
    fp8_linear.fp8_quantize(x, vector, COUNT)


def losses(dtype: torch.dtype, classes: int = 50265, with_gradient: bool = True) -> None:
    """A chunk of logits, its rows aligned as the operation aligns them."""
    logits = meta(1024, -(-classes // 64) * 64, dtype=dtype)[:, :classes]
    cross_entropy.cross_entropy_fwd(logits, meta(1024, dtype=torch.int64), -100, 0.0, with_gradient)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Attention holds two or three tiles at once, its gradients with dropout a mask beside them: a few values that a loop does not
# change may leave the registers. All other kernels keep theirs.
ATTENTION_SPILL = 128

# Entries are "<op>/<variant>": Case(...). The default ones must launch every kernel of kernels/, which is checked.
CASES: dict[str, Case] = {
    "linear/bfloat16": Case(lambda: both_linear(BF16), default=True),
    "linear/float16": Case(lambda: both_linear(FP16)),
    "linear/bfloat16, odd": Case(lambda: both_linear(BF16, 1023, 777), default=True),
    "linear/bfloat16, wide": Case(lambda: both_linear(BF16, 1024, 4096)),
    "linear/bfloat16, 1,792 rows": Case(lambda: both_linear(BF16, rows=1792)),
    "linear/bfloat16, 128 rows": Case(lambda: both_linear(BF16, rows=128)),
    "linear/float32": Case(lambda: both_linear(FP32), tensor_cores=False),
    "linear/float32, odd": Case(lambda: both_linear(FP32, 1023, 777), tensor_cores=False),
    "linear/tf32": Case(lambda: both_linear(FP32, precision="tf32"), tensor_cores=False),
    "linear_gelu/bfloat16": Case(lambda: both_linear_gelu(BF16), default=True),
    "linear_gelu/bfloat16, inference": Case(lambda: both_linear_gelu(BF16, save=False)),
    "linear_gelu/bfloat16, odd": Case(lambda: both_linear_gelu(BF16, inner=1023), default=True),
    "linear_gelu/bfloat16, tanh": Case(lambda: both_linear_gelu(BF16, "tanh")),
    "linear_gelu/bfloat16, 512 rows": Case(lambda: both_linear_gelu(BF16, rows=512)),
    "linear_gelu/bfloat16, 64 rows": Case(lambda: both_linear_gelu(BF16, rows=64)),
    "linear_gelu/float16": Case(lambda: both_linear_gelu(FP16)),
    "linear_gelu/float16, inference": Case(lambda: both_linear_gelu(FP16, save=False)),
    "linear_gelu/float32": Case(lambda: both_linear_gelu(FP32), tensor_cores=False),
    "linear_gelu/float32, tanh": Case(lambda: both_linear_gelu(FP32, "tanh", save=False), tensor_cores=False),
    "feed_forward/bfloat16": Case(lambda: feed_forward_backward(BF16), default=True),
    "feed_forward/bfloat16, recomputed": Case(lambda: feed_forward_backward(BF16, recompute=True), default=True),
    "feed_forward/bfloat16, tanh": Case(lambda: feed_forward_backward(BF16, "tanh")),
    "feed_forward/bfloat16, odd": Case(lambda: feed_forward_backward(BF16, recompute=True, hidden=777), default=True),
    "feed_forward/bfloat16, 512 rows": Case(lambda: feed_forward_backward(BF16, recompute=True, rows=512)),
    "feed_forward/bfloat16, 64 rows": Case(lambda: feed_forward_backward(BF16, recompute=True, rows=64)),
    "feed_forward/float16": Case(lambda: feed_forward_backward(FP16)),
    "feed_forward/float16, tanh": Case(lambda: feed_forward_backward(FP16, "tanh")),
    "feed_forward/float16, recomputed": Case(lambda: feed_forward_backward(FP16, recompute=True)),
    "feed_forward/float32": Case(lambda: feed_forward_backward(FP32, recompute=True), tensor_cores=False),
    "feed_forward/tf32": Case(lambda: feed_forward_backward(FP32, recompute=True, precision="tf32"), tensor_cores=False),
    "add_layer_norm/bfloat16, dropout": Case(lambda: both_add_layer_norm(BF16, BF16, 0.1), default=True),
    "add_layer_norm/bfloat16": Case(lambda: both_add_layer_norm(BF16, BF16, 0.0, 1024)),
    "add_layer_norm/MiniLM, no residual": Case(lambda: both_add_layer_norm(BF16, None, 0.0, 384)),
    "add_layer_norm/float32 residual": Case(lambda: both_add_layer_norm(BF16, FP32, 0.1)),
    "add_layer_norm/float32, widest": Case(lambda: both_add_layer_norm(FP32, FP32, 0.1, 4096)),
    "add_layer_norm/of others": Case(lambda: both_add_layer_norm(BF16, BF16, 0.1, of_others=True)),
    "embedding/RoBERTa, dropout": Case(lambda: both_embedding(BF16, True, True, 0.1), default=True),
    "embedding/BERT large": Case(lambda: both_embedding(BF16, False, True, 0.0, 1024)),
    "embedding/DistilBERT, int32": Case(lambda: both_embedding(FP16, False, False, 0.1, ids=torch.int32)),
    "embedding/MiniLM, float32": Case(lambda: both_embedding(FP32, False, True, 0.1, 384)),
    "attention/bfloat16": Case(lambda: both_attention(BF16)),
    "attention/bfloat16, dropout": Case(lambda: both_attention(BF16, dropout_p=0.1), default=True),
    "attention/bfloat16, dropout, S=128": Case(lambda: both_attention(BF16, longest=128, dropout_p=0.1), default=True),
    "attention/bfloat16, S=128": Case(lambda: both_attention(BF16, longest=128)),
    "attention/bfloat16, S=64": Case(lambda: both_attention(BF16, longest=64)),
    "attention/bfloat16, dropout, S=64": Case(lambda: both_attention(BF16, longest=64, dropout_p=0.1), default=True),
    "attention/bfloat16, causal, S=128": Case(lambda: both_attention(BF16, longest=128, causal=True)),
    "attention/bfloat16, causal, dropout, S=64": Case(lambda: both_attention(BF16, longest=64, dropout_p=0.1, causal=True)),
    "attention/float16, S=128": Case(lambda: both_attention(FP16, longest=128)),
    "attention/bfloat16, S=32": Case(lambda: both_attention(BF16, longest=32), tensor_cores=False),
    "attention/bfloat16, query only": Case(lambda: both_attention(BF16, query_only=True)),
    "attention/bfloat16, query only, S=128": Case(lambda: both_attention(BF16, 64, 128, 0.1, query_only=True)),
    "attention/bfloat16, causal": Case(lambda: both_attention(BF16, causal=True)),
    "attention/bfloat16, causal, dropout": Case(lambda: both_attention(BF16, dropout_p=0.1, causal=True)),
    "attention/bfloat16, deterministic": Case(lambda: both_attention(BF16, longest=32, deterministic=True)),
    "attention/float16": Case(lambda: both_attention(FP16)),
    "attention/float16, dropout": Case(lambda: both_attention(FP16, dropout_p=0.1)),
    "attention/float32": Case(lambda: both_attention(FP32), tensor_cores=False),
    "attention/float32, D=128, dropout": Case(lambda: both_attention(FP32, 128, dropout_p=0.1), False, False, spill_bytes=320),
    "attention/tf32": Case(lambda: both_attention(FP32, precision="tf32"), tensor_cores=False),
    **{f"attention/D={d}": Case(lambda d=d: both_attention(BF16, d)) for d in (16, 24, 32, 48, 80)},
    **{f"attention/D={d}, dropout": Case(lambda d=d: both_attention(BF16, d, dropout_p=0.1)) for d in (16, 24, 32, 48, 80)},
    "attention/D=128": Case(lambda: both_attention(BF16, 128)),
    "attention/D=128, dropout": Case(lambda: both_attention(BF16, 128, dropout_p=0.1)),
    **{f"attention/D={d}, S=128": Case(lambda d=d: both_attention(BF16, d, 128, 0.1)) for d in (32, 128)},
    **{f"attention/D={d}, S=64": Case(lambda d=d: both_attention(BF16, d, 64)) for d in (24, 32, 128)},
    "cross_entropy/bfloat16": Case(lambda: losses(BF16), default=True),
    "cross_entropy/bfloat16, loss alone": Case(lambda: losses(BF16, with_gradient=False)),
    "cross_entropy/float32, small vocabulary": Case(lambda: losses(FP32, 1000)),
    "fp8_linear/bfloat16": Case(lambda: fp8_products(BF16), default=True, since=90),
    "fp8_linear/bfloat16, GELU": Case(lambda: fp8_products(BF16, "none"), default=True, since=90),
    "fp8_linear/float16, wide, tanh": Case(lambda: fp8_products(FP16, "tanh", 3072, 768), since=90),
    "pack/bfloat16": Case(lambda: all_of_pack(BF16), default=True),
    "pack/float32, bool mask": Case(lambda: all_of_pack(FP32, torch.bool)),
}
