"""The attention implementation ``"roberta_fast"`` in Hugging Face's registries.

A config that names it lets the padding mask reach the encoder as it is, [B, S], instead of expanded to 4D. Where the stock
path must run, its attention goes on to the implementation that the model had before.
"""

import sys

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "roberta_fast"


def switch_on(config, modules) -> None:
    """Makes ``config`` name this implementation, and every module of ``modules`` remember the one it had."""
    for module in modules:
        module._stock_attention = config._attn_implementation if config._attn_implementation != NAME else "sdpa"
    config._attn_implementation = NAME


def switch_off(config, modules) -> None:
    """Undoes ``switch_on``."""
    for module in modules:
        config._attn_implementation = module.__dict__.pop("_stock_attention", config._attn_implementation)


def stock_mask(name: str, mask: torch.Tensor | None, hidden_states: torch.Tensor, config) -> torch.Tensor | None:
    """What the implementation ``name`` expects for the padding mask [B, S] of ``hidden_states`` [B, S, C]."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[name]
    batch, seqlen = hidden_states.shape[:2]
    return make(
        batch_size=batch,
        q_length=seqlen,
        kv_length=seqlen,
        q_offset=0,
        kv_offset=0,
        mask_function=bidirectional_mask_function,
        attention_mask=None if mask is None else mask.bool(),
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
        dtype=hidden_states.dtype,
        config=config,
        use_vmap=False,
        device=hidden_states.device,
    )


def _padding_mask(batch_size, q_length, kv_length, *args, mask_function=None, attention_mask=None, **kwargs):
    plain = mask_function is bidirectional_mask_function and q_length == kv_length
    if plain and (attention_mask is None or attention_mask.dim() == 2):
        return attention_mask
    return sdpa_mask(batch_size, q_length, kv_length, *args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _stock_attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    name = getattr(module, "_stock_attention", "sdpa")
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = stock_mask(name, attention_mask, query.transpose(1, 2).flatten(2), module.config)
    eager = getattr(sys.modules[_stock_module(module)], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, query, key, value, attention_mask, **kwargs)


def _stock_module(module: nn.Module) -> str:
    return next(c.__module__ for c in type(module).__mro__ if c.__module__.startswith("transformers."))


AttentionInterface.register(NAME, _stock_attention)
AttentionMaskInterface.register(NAME, _padding_mask)
