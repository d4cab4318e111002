"""The rules that results are held to, and the inputs they are held on."""

from collections.abc import Sequence

import torch


def assert_close_as_torch(
    fast: torch.Tensor, torch_result: torch.Tensor, reference: torch.Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """Holds a reduction to max|fast - ref| <= factor * max|torch - ref| + eps(dtype) * max|ref|.

    fast, torch_result: what is tested and plain PyTorch's composition, in the tested dtype. reference: the same function one
    precision up. factor: 2 for a forward pass, 3 for gradients. Raises AssertionError with the numbers.
    """
    assert fast.shape == reference.shape, f"{name}: shape {tuple(fast.shape)} is not {tuple(reference.shape)}"
    assert fast.double().isfinite().all(), f"{name}: not finite"  # torch has no isfinite of 8 bits
    if not reference.numel():
        return
    reference = reference.double()
    error = (fast.double() - reference).abs().max()
    allowed = factor * (torch_result.double() - reference).abs().max() + torch.finfo(fast.dtype).eps * reference.abs().max()
    assert error <= allowed, f"{name}: max|fast - ref| = {error:.3e} exceeds {allowed:.3e}"


def ulp_error(result: torch.Tensor, exact: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
    """The error of each element in units of ``result``'s last place.

    exact: the same values in float64. at: where the unit is taken, float64, by default at ``exact``; a sum whose terms may cancel
    is held to the unit of its largest term.
    """
    info = torch.finfo(result.dtype)
    exponent = torch.frexp((exact if at is None else at).abs().clamp(min=info.smallest_normal)).exponent - 1
    return (result.double() - exact).abs() / torch.ldexp(torch.full_like(exact, info.eps), exponent)


def segment_bounds(lengths: Sequence[int], device: str = "cpu") -> torch.Tensor:
    """cu_seqlens, int32 [len(lengths) + 1], of segments of these lengths."""
    return torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)


def ragged_mask(lengths: Sequence[int], seqlen: int | None = None) -> torch.Tensor:
    """A right-padded mask, int64 [B, S], S the longest length unless given."""
    return (torch.arange(seqlen or max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long()


def poisoned(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` [N, ...] with ``rows`` rows of NaN behind it, in one buffer: what lies behind the count must never be read."""
    buffer = x.new_full((x.shape[0] + rows, *x.shape[1:]), torch.nan)
    buffer[: x.shape[0]] = x
    return buffer


TINY = {"vocab_size": 120, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 160}

MASKS = {
    "right padding": ragged_mask([9, 3, 17, 1], 17),
    "left padding": ragged_mask([9, 3, 17, 1], 17).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "all ones": torch.ones(3, 8, dtype=torch.int64),
    "one sequence": torch.ones(1, 5, dtype=torch.int64),
    "one token": torch.ones(1, 1, dtype=torch.int64),
    "one token among padding": ragged_mask([1, 1], 6),
}


def tiny_config(model_type: str = "roberta", **overrides):
    """A Hugging Face config of ``model_type`` with ``TINY`` sizes."""
    from transformers import AutoConfig

    sizes = {**TINY, "max_position_embeddings": 64, "pad_token_id": 1}
    if model_type == "electra":  # without its projection of the embeddings
        sizes["embedding_size"] = TINY["hidden_size"]
    if model_type == "roc_bert":
        sizes |= dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), TINY["vocab_size"])
    if model_type == "distilbert":  # the one size to which it maps no common name
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    return AutoConfig.for_model(model_type, **{**sizes, **overrides})


def random_inputs(mask: torch.Tensor, config, seed: int = 0) -> dict[str, torch.Tensor]:
    """``input_ids`` [B, S] of random tokens under ``mask`` [B, S], pads where it is zero, and ``attention_mask``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, config.pad_token_id), "attention_mask": mask}


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Draws every parameter afresh, LayerNorms around one, so that no bias or scale is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.lower().replace("_", "").endswith("layernorm.weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + center)
    return model
