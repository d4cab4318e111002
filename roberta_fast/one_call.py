"""A whole layer by one call into C++: in inference on the CPU, where all of its operations would run there and nobody watches.

From Python the calls between the operations take 0.1 ms a layer and more; of one short text's time that is a tenth, in 8 bits a
fifth. The result has the bits that the operations give one by one.
"""

import torch
from torch import nn

from roberta_fast import dispatch
from roberta_fast.families import gelu_form, is_plain, is_plain_norm
from roberta_fast.int8 import Int8Linears
from roberta_fast.ops.registration import facts_of, is_plain_call
from roberta_fast.packing import PackedBatch
from roberta_fast.parts import LINEARS, LayerParts

OPERATIONS = ("attention", "add_layer_norm", "linear", "linear_gelu")
IN_8_BITS = ("attention", "add_layer_norm", *Int8Linears.operations)


def by_one_call(
    rows: torch.Tensor, batch: PackedBatch, parts: LayerParts, copies: Int8Linears | None = None
) -> torch.Tensor | None:
    """A layer without dropout, rows [N, C] to rows [N, C]; None where its operations have to be called one by one.

    copies: the 8-bit weights that it computes with, or None.
    """
    if torch.compiler.is_compiling() or rows.is_cuda:
        return None
    norms = (parts.attention_norm, parts.output_norm)
    if batch.decoding or batch.first_rows or batch.count is not None or not all(map(is_plain_norm, norms)):
        return None
    form, attention = gelu_form(parts.activation), parts.attention
    facts = facts_of(rows, attention.attention_head_size, deterministic=batch.options.deterministic)
    chosen = dispatch.backends(IN_8_BITS if copies else OPERATIONS, facts, batch.options.backend)
    if form is None or set(chosen) != {"cpp"}:
        return None
    of_norms = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    if copies:
        products = copies[:4]
        weights, biases = [t for product in products for t in product.weight[:3]], [product.bias for product in products]
        heads, serves = products[0].weight.shape[0] // facts.head_dim // 3, is_plain_call((rows, *of_norms))
        run, how = torch.ops.roberta_fast_cpp.int8_layer_fwd, ()
    else:
        modules = [getattr(parts, name) for name in LINEARS]
        if batch.prepacked or torch.is_autocast_enabled("cpu") or not all(is_plain(module, nn.Linear) for module in modules):
            return None
        weights, biases = [module.weight for module in modules], [module.bias for module in modules]
        heads, serves = weights[0].shape[0] // facts.head_dim, is_plain_call((rows, *weights, *biases, *of_norms))
        run, how = torch.ops.roberta_fast_cpp.layer_fwd, (batch.options.deterministic,)
    if not serves:
        return None
    eps = (norm.eps for norm in norms)
    return run.default(
        rows, batch.cu_seqlens, batch.query_only, heads, attention.scaling, weights, biases, of_norms, *eps, form, *how
    )
