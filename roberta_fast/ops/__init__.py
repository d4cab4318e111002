"""The operations: one file each, with its formula, reference, schema, shape function and gradient."""

from roberta_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_fp8
from roberta_fast.ops.attention import attention
from roberta_fast.ops.cross_entropy import cross_entropy
from roberta_fast.ops.embedding import embedding
from roberta_fast.ops.feed_forward import feed_forward
from roberta_fast.ops.fp8_linear import fp8_linear, fp8_quantize, quantize_weight_fp8
from roberta_fast.ops.int8_linear import int8_feed_forward, int8_linear, quantize_weight
from roberta_fast.ops.linear import linear
from roberta_fast.ops.linear_gelu import linear_gelu
from roberta_fast.ops.pack import pack, pack_indices, unpack

__all__ = [
    "add_layer_norm",
    "add_layer_norm_fp8",
    "attention",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "fp8_linear",
    "fp8_quantize",
    "int8_feed_forward",
    "int8_linear",
    "linear",
    "linear_gelu",
    "pack",
    "pack_indices",
    "quantize_weight",
    "quantize_weight_fp8",
    "unpack",
]
