"""The attention implementation ``"roberta_fast"`` in Hugging Face's registries.

A config that names it lets the padding mask reach the encoder as it is, [B, S], instead of expanded to 4D. Where the stock
path must run, its attention goes on to the implementation that the model had before.
"""

import sys
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

NAME = "roberta_fast"


def switch_on(modules: Iterable[nn.Module]) -> None:
    """Makes the config of every module of ``modules`` name this implementation; each remembers the one that it had."""
    for module in modules:
        if module.config._attn_implementation != NAME:
            module._stock_attention = module.config._attn_implementation or "sdpa"
        elif "_stock_attention" not in module.__dict__:
            module._stock_attention = "sdpa"
    for module in modules:
        module.config._attn_implementation = NAME


def switch_off(modules: Iterable[nn.Module]) -> None:
    """Undoes ``switch_on``."""
    for module in modules:
        name = module.__dict__.pop("_stock_attention", None)
        if name and module.config._attn_implementation == NAME:
            module.config._attn_implementation = name


def stock_name(attention: nn.Module) -> str:
    """The implementation that an attention module runs on where it is called as the stock one."""
    name = attention.config._attn_implementation
    if name != NAME:  # changed since, by set_attn_implementation
        return name
    if "_stock_attention" in attention.__dict__:
        return attention._stock_attention
    # A stock model that was built from an accelerated model's config: only eager attention gives attention weights.
    return "eager" if "attentions" in (_active_collector.get() or ()) else "sdpa"


def stock_mask(attention: nn.Module, mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """What the stock implementation of ``attention`` expects for the padding mask [B, S] of ``hidden_states`` [B, S, C]."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[stock_name(attention)]
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
        config=attention.config,
        use_vmap=False,
        device=hidden_states.device,
    )


def _padding_mask(batch_size, q_length, kv_length, *args, mask_function=None, attention_mask=None, **kwargs):
    plain = mask_function is bidirectional_mask_function and q_length == kv_length
    if plain and (attention_mask is None or attention_mask.dim() == 2):
        return attention_mask
    kwargs["allow_is_causal_skip"] = False  # what runs on this mask may be eager attention, which knows no implied one
    return sdpa_mask(batch_size, q_length, kv_length, *args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _stock_attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    name = stock_name(module)
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = stock_mask(module, attention_mask, query.transpose(1, 2).flatten(2))
    elif attention_mask is not None and attention_mask.dtype == torch.bool and name == "eager":
        attention_mask = torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    eager = getattr(sys.modules[_stock_module(module)], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, query, key, value, attention_mask, **kwargs)


def _stock_module(module: nn.Module) -> str:
    return next(c.__module__ for c in type(module).__mro__ if c.__module__.startswith("transformers."))


AttentionInterface.register(NAME, _stock_attention)
AttentionMaskInterface.register(NAME, _padding_mask)
