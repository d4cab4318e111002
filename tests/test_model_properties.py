"""Drawn cases: whole models against the stock ones, by the yardstick of ``test_properties.py``."""

import copy

import pytest
import torch
from drawn import DTYPES, NARROWEST, WITHOUT_CPP, cases, last_bits_changed, masks, sizes, values
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoModel

from roberta_fast import accelerate_model, explain
from roberta_fast.testing import assert_close_as_torch, random_inputs, randomize, tiny_config

MODEL_TYPES = ["roberta", "bert", "xlm-roberta", "camembert", "distilbert", "electra", "ernie", "data2vec-text", "roc_bert"]
MODEL_TYPES += ["bert-generation", "splinter"]


@st.composite
def configs(draw, deterministic):
    """Arguments of ``tiny_config``."""
    model_type, heads = draw(st.sampled_from(MODEL_TYPES)), draw(st.integers(1, 4))
    size = heads * draw(st.integers(16 if deterministic else -(-NARROWEST // heads), 33))
    activation = draw(st.sampled_from(["gelu", "relu"] if deterministic else ["gelu", "relu", "gelu_new", "silu"]))
    inner, act = ("hidden_dim", "activation") if model_type == "distilbert" else ("intermediate_size", "hidden_act")
    attention = "eager" if model_type == "splinter" else draw(st.sampled_from(["eager", "sdpa"]))
    return {
        "model_type": model_type,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "hidden_size": size,
        "embedding_size": size,
        inner: draw(sizes(70)),
        act: activation,
        "attn_implementation": attention,
    }


NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)


def encoded(model, inputs, weights):
    """The last hidden state, and the gradients of all that has one, as one vector."""
    model.zero_grad()
    states = model(**inputs)[0]
    (states * weights.to(states.dtype)).sum().backward()
    return states.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", [
    {}, {"backend": "torch"}, pytest.param({"deterministic": True}, marks=WITHOUT_CPP),
], ids=["auto", "torch", "deterministic"])  # fmt: skip
@cases(15)
@given(data=st.data(), mask=masks(), training=st.booleans(), seed=values)
def test_models(options, data, mask, training, seed):
    """Against the stock model, where a result is read: at real tokens and position 0, but not in a row without a token."""
    deterministic = "deterministic" in options
    config = tiny_config(**data.draw(configs(deterministic), label="config"), **NO_DROPOUT)
    dtype = torch.float32 if deterministic else DTYPES[data.draw(st.sampled_from(list(DTYPES)), label="dtype")]
    model = randomize(AutoModel.from_config(config), seed).to(dtype).train(training)
    seen = mask.bool() | (torch.arange(mask.shape[1]) == 0)
    seen[mask.sum(1) == 0] = False
    inputs, some = random_inputs(mask, model.config), mask.any(1)
    assume(some.any())
    fewer = {name: t[some] for name, t in inputs.items()}
    weights = torch.randn(*mask.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(1)) * seen[..., None]
    exact, moved = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    exact.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    moved.load_state_dict(last_bits_changed(dict(exact.state_dict()), torch.finfo(model.dtype).eps, 0) | buffers(exact))
    stock = encoded(model, fewer, weights[some])
    exactly, otherwise = (encoded(m, fewer, weights[some]) for m in (exact, moved))
    states, gradients = encoded(accelerate_model(model, **options), inputs, weights)
    assert states.isfinite().all() and explain(model).stock_calls == {}
    assert not states[~seen & (torch.arange(mask.shape[1]) > 0)].any(), "padding must come back as zeros"
    real = seen[some]
    for name, fast, factor, *others in (
        ("states", states[seen], 2.0, *(s[0][real] for s in (stock, exactly, otherwise))),
        ("gradients", gradients, 3.0, *(s[1] for s in (stock, exactly, otherwise))),
    ):
        theirs, wanted, near = others
        worst = max(theirs.double(), near, key=lambda t, wanted=wanted: (t - wanted).abs().max() if t.numel() else 0)
        assert_close_as_torch(fast, worst, wanted, factor=factor, name=name)
    if deterministic:
        with torch.no_grad():
            for row in range(len(mask)):
                alone = model(**{name: t[row : row + 1] for name, t in inputs.items()})[0]
                assert torch.equal(alone[0], states[row])


def buffers(model):
    """What no gradient reaches, as it is."""
    return {name: t for name, t in model.state_dict().items() if name in dict(model.named_buffers())}
