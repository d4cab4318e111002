"""How the padding mask reaches a fast encoder: unexpanded, and without a wait for the device.

Hugging Face's models make their encoder's mask by a function that is registered for the config's attention implementation:
[B, 1, S, S], or nothing where the values say that nothing is padded. A ``Marked`` name in the config, which equals the plain
one everywhere else, says that a fast encoder will read the mask: it then is [B, 1, 1, S], which stock layers understand as
well, and the padding mask [B, S] can be had back from it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function


class Marked(str):
    """The name of an attention implementation, in the config of a model whose encoder is fast."""

    def __reduce__(self):
        return _marked, (str(self),)  # where a process loads a pickle, nothing may have been marked before


def mark(modules: Iterable[nn.Module]) -> None:
    """Marks the attention implementation in the config of every module."""
    for module in modules:
        module.config._attn_implementation = _marked(module.config._attn_implementation or "sdpa")


def unmark(modules: Iterable[nn.Module]) -> None:
    """Undoes ``mark``."""
    for module in modules:
        module.config._attn_implementation = str(module.config._attn_implementation)


def is_marked(config) -> bool:
    """Whether ``config`` names a marked implementation; a name that was set after ``mark`` is not."""
    return type(config._attn_implementation) is Marked


def padding_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The padding mask [B, S] that an encoder's ``mask`` stands for; what stands for none is returned as it is."""
    if not isinstance(mask, torch.Tensor):
        return mask
    if hasattr(mask, "_padding"):
        return mask._padding
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0]
    return mask


def stock_mask(attention: nn.Module, mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """What a stock ``attention`` module is given for the padding mask [B, S] of ``hidden_states`` [B, S, C]."""
    name = attention.config._attn_implementation
    make = _originals.get(name) or ALL_MASK_ATTENTION_FUNCTIONS[name]
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


def _marked(name: str) -> Marked:
    """``name``, marked, for mask functions that know what that means."""
    for known in _SHORT_FORMS:
        if known not in _originals:
            _originals[known] = ALL_MASK_ATTENTION_FUNCTIONS[known]
            AttentionMaskInterface.register(known, _short_where_marked(known))
    return Marked(name)


def _short_where_marked(name: str) -> Callable:
    """The mask function for ``name``: the one that stood there, or the short form where the config is marked."""
    original, short_form = _originals[name], _SHORT_FORMS[name]

    def mask(batch_size, q_length, kv_length, *args, **kwargs):
        padding, function = kwargs.get("attention_mask"), kwargs.get("mask_function")
        plain = (padding is None or padding.dim() == 2) and is_marked(kwargs["config"])
        of_rows = q_length == kv_length or getattr(kwargs["config"], "is_decoder", False)  # those attend to an encoder's keys
        if plain and of_rows and function is bidirectional_mask_function and kwargs.get("allow_is_bidirectional_skip"):
            return None if padding is None else short_form(padding, kwargs["dtype"])
        made = original(batch_size, q_length, kv_length, *args, **kwargs)
        if plain and function is causal_mask_function and made is not None:
            made._padding = padding
        return made

    return mask


def _for_sdpa(padding, dtype):
    return padding[:, None, None, :]


def _for_eager(padding, dtype):
    visible = padding[:, None, None, :]
    mask = torch.where(visible, torch.zeros((), dtype=dtype, device=visible.device), torch.finfo(dtype).min)
    mask._padding = padding  # its values alone could as well be a bias of the user's own
    return mask


_SHORT_FORMS = {"sdpa": _for_sdpa, "eager": _for_eager}
_originals: dict[str, Callable] = {}
