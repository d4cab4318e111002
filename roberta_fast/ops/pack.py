"""Rows of a padded batch, without the padding, and back.

``pack_indices`` turns a mask [B, S] into the flat positions of its real tokens; ``pack`` gathers those rows of [B, S, C] into
[N, C], ``unpack`` scatters them back and fills the rest with zeros. Each is the other's gradient. Position 0 of every
sequence is kept even where it is padding, since heads read it: such a row asks but is not seen (``query_only``), which
is what a padded model computes there.
"""

import torch

from roberta_fast import dispatch
from roberta_fast.ops.registration import define, facts_of, real_rows, refuse, register_autograd, register_backends


def pack_indices(
    mask: torch.Tensor, capacity: int | None = None, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the real tokens of a batch are.

    mask: [B, S], any dtype, nonzero at real tokens, S >= 1; holes and left padding are fine.
    capacity: None sizes the result exactly, which on CUDA waits for the device once; a number of rows N avoids that wait
        and fails on the device where more than N are real.
    Returns indices int64 [N], flat positions b * S + s in order, B * S from ``count`` on; cu_seqlens int32 [B + 1];
    count int32 [1]; query_only int32 [B], 1 where position 0 is padding; order int32 [B], the sequences by descending number of
    rows, equal ones by ascending index. Raises ValueError naming a bad argument.
    """
    if mask.dim() != 2 or mask.shape[1] < 1:
        refuse("mask", f"shape {tuple(mask.shape)}", "[B, S] with S >= 1")
    return _indices(mask, capacity, backend)


def pack(x: torch.Tensor, indices: torch.Tensor, count: torch.Tensor | None = None, *, backend: str = "auto") -> torch.Tensor:
    """The real rows of x [B, S, C], any dtype, as [N, C]; rows from ``count`` (int32 [1]) on hold anything."""
    if x.dim() != 3:
        refuse("x", f"shape {tuple(x.shape)}", "[B, S, C]")
    return _pack(x, indices, count, backend)


def unpack(
    rows: torch.Tensor,
    indices: torch.Tensor,
    batch: int,
    seqlen: int,
    count: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The rows [N, C] back at their places in [batch, seqlen, C], zeros elsewhere; rows from ``count`` on are not read."""
    if rows.dim() != 2:
        refuse("rows", f"shape {tuple(rows.shape)}", "[N, C]")
    return _unpack(rows, indices, batch, seqlen, count, backend)


def pack_indices_ref(mask, capacity=None):
    """The composition in plain PyTorch."""
    batch, seqlen = mask.shape
    keep = mask != 0
    query_only = (~keep[:, 0]).to(torch.int32)
    keep[:, 0] = True
    lengths = keep.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    count = cu_seqlens[-1:].clone()
    order = torch.argsort(lengths, descending=True, stable=True).to(torch.int32)
    keep = keep.flatten()
    if capacity is None:
        return keep.nonzero().squeeze(1), cu_seqlens, count, query_only, order
    torch._assert_async(count <= capacity, f"mask has more real tokens than capacity={capacity}")
    # A stable sort by "is padding" lists the real positions in order; those behind them are marked as out of the batch.
    positions = torch.argsort(~keep, stable=True)
    positions = torch.nn.functional.pad(positions, (0, max(0, capacity - positions.shape[0])))[:capacity]
    real = torch.arange(capacity, device=mask.device) < count
    return torch.where(real, positions, batch * seqlen), cu_seqlens, count, query_only, order


def pack_ref(x, indices, count=None):
    """Gathers; positions out of the batch read the last row."""
    flat = x.flatten(0, 1)
    return flat.index_select(0, indices if count is None else indices.clamp(max=flat.shape[0] - 1))


def unpack_ref(rows, indices, batch, seqlen, count=None):
    """Scatters; rows from ``count`` on add zeros to the last position."""
    padded = rows.new_zeros(batch, seqlen, rows.shape[1])
    flat = padded.flatten(0, 1)  # a view of it, also where it has no columns
    if count is None:
        flat[indices] = rows
    else:
        flat.index_add_(0, indices.clamp(max=batch * seqlen - 1), real_rows(rows, count))
    return padded  # no view: autograd forbids to change a view that an operation returned


def _indices_implementation(mask, capacity, backend):
    return dispatch.choose("pack_indices", facts_of(mask, device_rows=capacity is not None), backend).run(mask, capacity)


def _indices_fake(mask, capacity, backend):
    n = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    batch = mask.shape[0]
    indices = mask.new_empty(n, dtype=torch.int64)
    return indices, *(mask.new_empty(size, dtype=torch.int32) for size in (batch + 1, 1, batch, batch))


def _pack_implementation(x, indices, count, backend):
    return dispatch.choose("pack", facts_of(x, device_rows=count is not None), backend).run(x, indices, count)


def _pack_fake(x, indices, count, backend):
    return x.new_empty(indices.shape[0], x.shape[2])


def _unpack_implementation(rows, indices, batch, seqlen, count, backend):
    run = dispatch.choose("unpack", facts_of(rows, device_rows=count is not None), backend).run
    return run(rows, indices, batch, seqlen, count)


def _unpack_fake(rows, indices, batch, seqlen, count, backend):
    return rows.new_empty(batch, seqlen, rows.shape[1])


_indices = define(
    "pack_indices(Tensor mask, SymInt? capacity, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _indices_implementation,
    _indices_fake,
)
_pack = define("pack(Tensor x, Tensor indices, Tensor? count, str backend) -> Tensor", _pack_implementation, _pack_fake)
_unpack = define(
    "unpack(Tensor rows, Tensor indices, SymInt batch, SymInt seqlen, Tensor? count, str backend) -> Tensor",
    _unpack_implementation,
    _unpack_fake,
)


def _pack_context(ctx, inputs, output):
    x, indices, count, ctx.backend = inputs
    ctx.batch, ctx.seqlen = x.shape[:2]
    ctx.save_for_backward(indices, count)


def _pack_backward(ctx, dy):
    indices, count = ctx.saved_tensors
    return _unpack(dy.contiguous(), indices, ctx.batch, ctx.seqlen, count, ctx.backend), None, None, None


def _unpack_context(ctx, inputs, output):
    _, indices, _, _, count, ctx.backend = inputs
    ctx.save_for_backward(indices, count)


def _unpack_backward(ctx, dy):
    indices, count = ctx.saved_tensors
    return _pack(dy.contiguous(), indices, count, ctx.backend), None, None, None, None, None


register_autograd("pack", _pack_backward, _pack_context)
register_autograd("unpack", _unpack_backward, _unpack_context)


def pack_indices_cuda(mask, capacity):
    """The CUDA kernel, one launch where Triton takes two."""
    return torch.ops.roberta_fast_cpp.pack_indices_and_order(mask, capacity)


dispatch.register("pack_indices", "cpp", f"{__name__}:pack_indices_cuda", device="cuda", optional=True)
register_backends("pack", {"pack_indices": "pack_indices", "pack": "pack", "unpack": "unpack"}, any_dtype=True)
