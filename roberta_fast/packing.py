"""What travels with packed rows: made once per forward, read by every layer."""

from typing import NamedTuple

import torch

from roberta_fast import ops
from roberta_fast.ops.registration import real_rows
from roberta_fast.options import FastOptions


class Carried:
    """Rows in 8 bits, from the LayerNorm that made them to the product that reads them. Travels with a batch."""

    def __init__(self):
        self._rows, self._rounded = None, None

    def put(self, rows: torch.Tensor, rounded: torch.Tensor) -> None:
        """Keeps ``rounded`` [N, C] for whoever gets ``rows`` [N, C]."""
        self._rows, self._rounded = rows, rounded

    def take(self, rows: torch.Tensor) -> torch.Tensor | None:
        """``rows`` in 8 bits, or None where they are not those of the last ``put``."""
        return self._rounded if rows is self._rows else None


class PackedBatch(NamedTuple):
    """A batch of B sequences of up to S tokens as N packed rows.

    indices: int64 [N], flat positions of the real tokens; None where nothing is padded, so that packing is a view.
    cu_seqlens: int32 [B + 1], where each sequence begins among the rows, and the end.
    query_only: int32 [B], 1 where position 0 is padding, hence asks but is not seen; None without padding.
    order: int32 [B], the sequences by descending length, for attention to begin with the longest; None: as they stand.
    mask: [B, S] the padding mask as it came, nonzero at real tokens, or None.
    count: int32 [1], how many of the rows are real, where only the device knows it: N is then B * S, and rows behind hold
        anything. None: all are.
    batch, seqlen: B and S. max_seqlen: an upper bound on the sequences' lengths. options: how the layers compute.
    eight_bits: whether layers that hold 8-bit weights compute with them now. carried: what brings rows in 8-bit floating point
        from one product to the next, or None. prepacked: whether packed weights are read now.
    decoding: in a decoder, a ``roberta_fast.decoding.Decoding``. first_rows: whether a layer is asked for each sequence's first
        row alone, [B, C].
    The caller may have packed: then cu_seqlens divides the one row of [1, S].
    """

    indices: torch.Tensor | None
    cu_seqlens: torch.Tensor
    query_only: torch.Tensor | None
    order: torch.Tensor | None
    mask: torch.Tensor | None
    count: torch.Tensor | None
    batch: int
    seqlen: int
    max_seqlen: int
    options: FastOptions
    eight_bits: bool = False
    carried: Carried | None = None
    prepacked: bool = False
    decoding: tuple | None = None
    first_rows: bool = False

    @classmethod
    def of(cls, hidden_states: torch.Tensor, mask: torch.Tensor | None, options: FastOptions) -> "PackedBatch":
        """The packing of ``hidden_states`` [B, S, C], or of ids [B, S], under ``mask`` [B, S] or None."""
        batch, seqlen = hidden_states.shape[:2]
        if mask is None:
            cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=hidden_states.device)
            return cls(None, cu_seqlens, None, None, None, None, batch, seqlen, seqlen, options)
        on_device = options.unpad == "device" or (options.unpad == "auto" and _is_capturing(mask))
        capacity = batch * seqlen if on_device else None
        indices, cu_seqlens, count, query_only, order = ops.pack_indices(mask, capacity, backend=options.backend)
        # A compiled graph serves every number of real tokens and cannot branch on it.
        if not on_device and not torch.compiler.is_compiling() and indices.shape[0] == batch * seqlen:
            indices = None
        count = count if on_device else None
        return cls(indices, cu_seqlens, query_only, order, mask, count, batch, seqlen, seqlen, options)

    @classmethod
    def of_flattened(
        cls, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None, options: FastOptions
    ) -> "PackedBatch":
        """Texts that the caller laid one after the other in ``hidden_states`` [1, S, C]; cu_seqlens: integer [B + 1]."""
        batch, seqlen = hidden_states.shape[:2]
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q divides one row, [1, S, C], but hidden_states is {tuple(hidden_states.shape)}")
        return cls(None, cu_seqlens.int(), None, None, None, None, batch, seqlen, min(max_seqlen or seqlen, seqlen), options)

    @property
    def is_flattened(self) -> bool:
        """Whether the texts came packed, so that a padded path would let them see each other."""
        return self.cu_seqlens.shape[0] != self.batch + 1 or self.max_seqlen != self.seqlen

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """The real rows [N, C] of x [B, S, C]."""
        return x.flatten(0, 1) if self.indices is None else ops.pack(x, self.indices, self.count, backend=self.options.backend)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [N, C] at their places in [B, S, C], zeros at padding."""
        if self.indices is None:
            return rows.view(self.batch, self.seqlen, rows.shape[-1])
        return ops.unpack(rows, self.indices, self.batch, self.seqlen, self.count, backend=self.options.backend)

    @property
    def asking(self) -> torch.Tensor | None:
        """int64 [B], which of the rows attention is asked for; None: all."""
        return self.cu_seqlens[:-1].long() if self.first_rows else None

    def real(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [N, C] with zeros where they are not real, for modules that would take what stands there into a sum."""
        return real_rows(rows, self.count)


def _is_capturing(mask):
    return not torch.compiler.is_compiling() and mask.is_cuda and torch.cuda.is_current_stream_capturing()
