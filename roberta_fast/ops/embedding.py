"""y = dropout(LayerNorm(word[i] + token_type[t] + position[p])), from the ids of a padded batch straight into packed rows.

Row n of the result is that of place b * S + s = indices[n] of the batch [B, S]; i, t and p are the three ids there. LayerNorm is
that of ``ops/add_layer_norm.py``. Dropout takes the place for its row coordinate, so that it drops the same whether or not the
batch is packed. Backward: the gradient goes through dropout and LayerNorm, and is then summed for each row of a table over the
places that read it; the row ``padding_idx`` gets none (``torch.nn.functional.embedding``).
"""

import torch
from torch.nn import functional

from roberta_fast import dispatch
from roberta_fast.ops import dropout
from roberta_fast.ops.registration import (
    define,
    facts_of,
    float32_or_bfloat16,
    real_rows,
    refuse,
    register_autograd,
    register_backends,
)


def embedding(
    input_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    position_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Embeddings of the tokens at ``indices``, normalized and dropped, statistics in float32.

    input_ids: integer [B, S], S >= 1. word [V, C], position [P, C], token_type [Y, C] or None: tables of one floating dtype.
    weight, bias: [C], LayerNorm's. eps: added to the variance.
    position_ids: integer [B, S]; None: s at [b, s]. ``positions_behind`` has RoBERTa's. token_type_ids: integer [B, S]; None: 0.
    padding_idx, position_padding_idx: the row of word, and of position, that gets no gradient.
    dropout_p: probability of dropping an element, in [0, 1); seed: int64 [1] on the same device, needed where it is not 0.
    indices: int64 [N], flat places b * S + s, as from ``pack_indices``; None: all in order. count: int32 [1]; indices from it on
        are never read, and rows hold anything there. None: all are real.
    Returns [N, C] in word's dtype; under CUDA's autocast float32, as from ``torch.nn.functional.layer_norm``.
    Raises ValueError naming the argument that does not fit. An id that is in no table raises IndexError on the CPU; on CUDA it is
    an assertion that fails on the device, as in torch.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        refuse("input_ids", f"shape {tuple(input_ids.shape)}", "[B, S] with S >= 1")
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is None:
            continue
        if ids.dtype not in (torch.int64, torch.int32):
            refuse(name, ids.dtype, "int64 or int32")
        if ids.shape != input_ids.shape:
            refuse(name, f"shape {tuple(ids.shape)}", f"of input_ids' shape {tuple(input_ids.shape)}")
    if token_type is None and token_type_ids is not None:
        refuse("token_type_ids", "a tensor", "None where token_type is None")
    if word.dim() != 2 or not word.is_floating_point():
        refuse("word", f"{word.dtype} {tuple(word.shape)}", "a floating-point table [V, C]")
    for name, table in (("position", position), ("token_type", token_type)):
        if table is not None and (table.dtype != word.dtype or table.dim() != 2 or table.shape[1] != word.shape[1]):
            refuse(name, f"{table.dtype} {tuple(table.shape)}", f"a {word.dtype} table of C={word.shape[1]} columns")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != word.shape[1:]:
            refuse(name, f"shape {tuple(parameter.shape)}", f"[C] with C={word.shape[1]}")
    if indices is not None and (indices.dim() != 1 or indices.dtype != torch.int64):
        refuse("indices", f"{indices.dtype} {tuple(indices.shape)}", "int64 [N]")
    if count is not None and (indices is None or count.shape != (1,) or count.dtype != torch.int32):
        refuse("count", f"{count.dtype} {tuple(count.shape)}", "int32 [1], beside indices")
    if dropout_p != 0.0 and seed is None:
        refuse("seed", seed, f"an int64 [1] tensor where dropout_p={dropout_p}")
    dropout.threshold(dropout_p)
    if word.is_cuda and torch.is_autocast_enabled("cuda") and word.dtype != torch.float64:
        word, position, token_type = (table if table is None else table.float() for table in (word, position, token_type))
    ids = input_ids, position_ids, token_type_ids, indices
    not_learned = -1 if padding_idx is None else padding_idx, -1 if position_padding_idx is None else position_padding_idx
    seed = seed if dropout_p else None
    y, _, _ = _forward(*ids, word, position, token_type, weight, bias, eps, *not_learned, dropout_p, seed, count, backend)
    return y


def positions_behind(input_ids: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """RoBERTa's positions of input_ids [B, S]: tokens count from ``padding_idx`` + 1 on, pads are at ``padding_idx``.

    Pads are known by their id, whatever a mask says: fairseq's ``make_positions``.
    """
    real = (input_ids != padding_idx).int()
    return (real.cumsum(1, dtype=torch.int32) * real).long() + padding_idx


def embedding_ref(
    input_ids, position_ids, token_type_ids, indices, word, position, token_type, weight, bias, eps, dropout_p=0.0, seed=None,
    count=None,
):  # fmt: skip
    """The composition in plain PyTorch; returns (y, mean, rstd), the statistics as [N] in float32 (float64 for float64)."""
    z = _summed(input_ids, position_ids, token_type_ids, indices, word, position, token_type)
    y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)
    return _drop(y, input_ids, indices, dropout_p, seed).to(word.dtype), mean[:, 0], rstd[:, 0]


def embedding_backward_ref(
    dy, input_ids, position_ids, token_type_ids, indices, word, position, token_type, dropout_p=0.0, seed=None, count=None
):
    """What LayerNorm's backward pass starts from: (the sum that it normalized, float32 or float64; dy through the dropout)."""
    z = _summed(input_ids, position_ids, token_type_ids, indices, word, position, token_type)
    return z, _drop(dy, input_ids, indices, dropout_p, seed).to(dy.dtype) if dropout_p else dy.new_empty(0)


def _summed(input_ids, position_ids, token_type_ids, indices, word, position, token_type):
    """The three rows' sum, in the order of Hugging Face's models, one precision up from half types."""
    z = _looked_up(word, _at(input_ids, indices))
    if token_type is not None:
        z = z + _looked_up(token_type, _at(_types(token_type_ids, input_ids), indices))
    return z + _looked_up(position, _at(_positions(position_ids, input_ids), indices))


def _looked_up(table, ids):
    rows = functional.embedding(ids, table)
    return rows if rows.dtype == torch.float64 else rows.float()


def _positions(position_ids, input_ids):
    if position_ids is not None:
        return position_ids
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)


def _types(token_type_ids, input_ids):
    return torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids


def _at(ids, indices):
    """ids [B, S] at flat indices [N], those behind the batch read 0; all of them without indices."""
    return ids.flatten() if indices is None else functional.pad(ids.flatten(), (0, 1))[indices]


def _drop(x, input_ids, indices, dropout_p, seed):
    if not dropout_p:
        return x
    places = torch.arange(input_ids.numel(), device=x.device) if indices is None else indices
    return torch.where(dropout.keep_mask(seed, dropout_p, places, x.shape[1]), x * dropout.scale(dropout_p), 0)


def _forward_implementation(
    input_ids, position_ids, token_type_ids, indices, word, position, token_type, weight, bias, eps,
    padding_idx, position_padding_idx, dropout_p, seed, count, backend,
):  # fmt: skip
    run = dispatch.choose("embedding", facts_of(word, device_rows=count is not None), backend).run
    ids = input_ids, position_ids, token_type_ids, indices
    return run(*ids, word, position, token_type, weight, bias, eps, dropout_p, seed, count)


def _forward_fake(
    input_ids, position_ids, token_type_ids, indices, word, position, token_type, weight, bias, eps,
    padding_idx, position_padding_idx, dropout_p, seed, count, backend,
):  # fmt: skip
    n = _rows(input_ids, indices)
    statistics = word.new_empty(n, dtype=_wide(word))
    return word.new_empty(n, word.shape[1]), statistics, torch.empty_like(statistics)


def _backward_implementation(
    dy, input_ids, position_ids, token_type_ids, indices, word, position, token_type, dropout_p, seed, count, backend
):
    run = dispatch.choose("embedding_backward", facts_of(word, device_rows=count is not None), backend).run
    return run(dy, input_ids, position_ids, token_type_ids, indices, word, position, token_type, dropout_p, seed, count)


def _backward_fake(
    dy, input_ids, position_ids, token_type_ids, indices, word, position, token_type, dropout_p, seed, count, backend
):
    z = word.new_empty(_rows(input_ids, indices), word.shape[1], dtype=_wide(word))
    return z, dy.new_empty(dy.shape if dropout_p else (0,))


def _rows(input_ids, indices):
    return input_ids.shape[0] * input_ids.shape[1] if indices is None else indices.shape[0]


def _wide(word):
    return torch.float64 if word.dtype == torch.float64 else torch.float32


_IDS = "Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor? indices"
_TABLES = "Tensor word, Tensor position, Tensor? token_type"
_forward = define(
    f"embedding({_IDS}, {_TABLES}, Tensor weight, Tensor bias, float eps, int padding_idx, int position_padding_idx, "
    "float dropout_p, Tensor? seed, Tensor? count, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = define(
    f"embedding_backward(Tensor dy, {_IDS}, {_TABLES}, float dropout_p, Tensor? seed, Tensor? count, str backend) "
    "-> (Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *ids_and_tables, weight, _, _, padding_idx, position_padding_idx, ctx.dropout_p, seed, count, ctx.backend = inputs
    ctx.padding_idx = padding_idx, position_padding_idx
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*ids_and_tables, weight, mean, rstd, seed, count)


def _autograd_backward(ctx, dy, _dmean, _drstd):
    *ids_and_tables, weight, mean, rstd, seed, count = ctx.saved_tensors
    (input_ids, position_ids, token_type_ids, indices), (word, position, token_type) = ids_and_tables[:4], ids_and_tables[4:]
    dy = dy.contiguous()
    z, through_dropout = _backward(dy, *ids_and_tables, ctx.dropout_p, seed, count, ctx.backend)
    dy = through_dropout if ctx.dropout_p else dy
    norm_backward = torch.ops.roberta_fast.add_layer_norm_backward.default
    dz, _, dweight, dbias = norm_backward(dy, z, None, weight, mean, rstd, 0.0, None, count, ctx.backend)
    dz = real_rows(dz.to(word.dtype), count)
    padding_idx, position_padding_idx = ctx.padding_idx

    def gradient(wanted, table, ids, skipped):
        if not wanted or table is None:
            return None
        return torch.ops.aten.embedding_dense_backward(dz, _at(ids, indices), table.shape[0], skipped, False)

    wanted = ctx.needs_input_grad[4:7]
    dword = gradient(wanted[0], word, input_ids, padding_idx)
    dposition = gradient(wanted[1], position, _positions(position_ids, input_ids), position_padding_idx)
    dtoken_type = gradient(wanted[2], token_type, _types(token_type_ids, input_ids), -1)
    return None, None, None, None, dword, dposition, dtoken_type, dweight, dbias, *[None] * 7


register_autograd("embedding", _autograd_backward, _setup_context)
register_backends("embedding", in_cpp=float32_or_bfloat16)
