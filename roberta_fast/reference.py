"""The whole encoder in plain PyTorch, one padded sequence batch at a time, for tests to compare with.

It imports nothing fast and nothing of Hugging Face, and runs in any floating dtype; tests run it in float64.
BERT's post-LayerNorm block (Devlin et al. 2019; RoBERTa, Liu et al. 2019, shares it):
a = LayerNorm(x + softmax(Q Kᵀ / √D + mask) V Wₒᵀ + bₒ), y = LayerNorm(a + W₂ GELU(W₁ a + b₁) + b₂).
"""

import math

import torch
from torch.nn.functional import layer_norm, linear


def encoder_ref(
    parameters: dict[str, torch.Tensor],
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    num_heads: int,
    eps: float,
    approximate: str = "none",
) -> torch.Tensor:
    """The last hidden state [B, S, C] of an encoder without dropout; at padding it holds what padded models compute there.

    parameters: an encoder's ``state_dict()``, names ``layer.<i>.attention.self.query.weight`` and so on.
    hidden_states: [B, S, C] embeddings. mask: [B, S], nonzero at real tokens, or None. eps: LayerNorm's.
    approximate: ``"none"`` (exact GELU) or ``"tanh"``.
    """
    layers = 1 + max(int(name.split(".")[1]) for name in parameters)
    for i in range(layers):
        layer = {name.removeprefix(f"layer.{i}."): p for name, p in parameters.items() if name.startswith(f"layer.{i}.")}
        hidden_states = layer_ref(layer, hidden_states, mask, num_heads, eps, approximate)
    return hidden_states


def layer_ref(
    p: dict[str, torch.Tensor], x: torch.Tensor, mask: torch.Tensor | None, num_heads: int, eps: float, approximate: str
) -> torch.Tensor:
    """One block; p holds a layer's parameters by their names inside the layer, the rest is as in ``encoder_ref``."""
    context = attention_ref(
        *(_heads(_linear(p, f"attention.self.{name}", x), num_heads) for name in ("query", "key", "value")), mask
    )
    projected = _linear(p, "attention.output.dense", context.transpose(1, 2).flatten(2))
    x = _layer_norm(p, "attention.output.LayerNorm", x + projected, eps)
    inner = gelu_ref(_linear(p, "intermediate.dense", x), approximate)
    return _layer_norm(p, "output.LayerNorm", x + _linear(p, "output.dense", inner), eps)


def attention_ref(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(Q Kᵀ / √D) V over [B, H, S, D]; keys where mask [B, S] is zero are not seen; zeros where none is."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


def gelu_ref(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x Φ(x), by erfc, which keeps the negative tail; or the tanh form (Hendrycks and Gimpel 2016)."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def _linear(p, name, x):
    return linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _layer_norm(p, name, x, eps):
    return layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def _heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
