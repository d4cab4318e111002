"""The accelerated encoder computes what the reference computes, forward and backward, under every kind of mask."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModel

from roberta_fast import FastRobertaEncoder, accelerate_model, dispatch
from roberta_fast.reference import encoder_ref
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config


def stock_model(model_type="roberta", **overrides):
    return randomize(AutoModel.from_config(tiny_config(model_type, **overrides))).eval()


def embeddings_and_encoder(model, mask):
    inputs = random_inputs(mask, model.config)
    return model.get_submodule("embeddings")(input_ids=inputs["input_ids"]).detach(), model.encoder


def reference(encoder, embeddings, mask):
    config = encoder.config
    approximate = "tanh" if config.hidden_act in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh") else "none"
    return encoder_ref(
        {name: p.double() for name, p in encoder.state_dict(keep_vars=True).items()},
        embeddings.double(),
        mask,
        num_heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
        approximate=approximate,
    )


def visible(mask):
    """Where a result is read: real tokens, and position 0, which heads read."""
    return mask.bool() | (torch.arange(mask.shape[1]) == 0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_reference_is_what_hugging_face_computes(mask, attention):
    model = stock_model(attn_implementation=attention).double()
    embeddings, encoder = embeddings_and_encoder(model, mask)
    output = model(inputs_embeds=None, **random_inputs(mask, model.config)).last_hidden_state
    expected = reference(encoder, embeddings, mask)
    assert torch.allclose(output[visible(mask)], expected[visible(mask)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_forward(model_type, mask):
    model = stock_model(model_type)
    inputs = random_inputs(mask, model.config)
    stock = model(**inputs).last_hidden_state
    embeddings, encoder = embeddings_and_encoder(model, mask)
    expected = reference(encoder, embeddings, mask)
    accelerate_model(model)
    output = model(**inputs).last_hidden_state
    seen = visible(mask)
    assert_close_as_torch(output[seen], stock[seen], expected[seen])
    assert not output[~seen].any(), "padding must come back as zeros"


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"])
def test_activations(activation):
    model, mask = stock_model(hidden_act=activation), MASKS["right padding"]
    inputs = random_inputs(mask, model.config)
    double = copy.deepcopy(model).double()(**inputs).last_hidden_state
    stock = model(**inputs).last_hidden_state
    output = accelerate_model(model)(**inputs).last_hidden_state
    assert_close_as_torch(output[mask.bool()], stock[mask.bool()], double[mask.bool()])


@pytest.mark.parametrize("mask", [MASKS["right padding"], MASKS["holes"], MASKS["all ones"]], ids=["right", "holes", "ones"])
@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_gradients(model_type, mask):
    """Every parameter's gradient, and the embeddings', within 3x of the stock model's error."""
    fast = stock_model(model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stock, double = copy.deepcopy(fast), copy.deepcopy(fast).double()
    accelerate_model(fast)
    mask = mask.repeat(8, 1)  # a largest error of few terms is luck
    inputs = random_inputs(mask, fast.config)
    weights = torch.randn(*mask.shape, fast.config.hidden_size, generator=torch.Generator().manual_seed(1))
    weights[mask == 0] = 0
    for model in (fast, stock, double):
        model.train()
        output = model(**inputs).last_hidden_state
        (output * weights.to(output.dtype)).sum().backward()
    for (name, p), q, r in zip(fast.named_parameters(), stock.parameters(), double.parameters(), strict=True):
        if r.grad is not None:
            assert_close_as_torch(p.grad, q.grad, r.grad, factor=3, name=name)
    assert sum(p.grad is not None for p in fast.encoder.parameters()) == len(list(fast.encoder.parameters()))


def test_a_wrong_encoder_fails_the_rule():
    """The rule above has teeth: one forgotten bias, and it fails."""
    model, mask = stock_model(), MASKS["right padding"]
    inputs = random_inputs(mask, model.config)
    stock = model(**inputs).last_hidden_state
    embeddings, encoder = embeddings_and_encoder(model, mask)
    expected = reference(encoder, embeddings, mask)
    torch.nn.init.zeros_(encoder.layer[1].output.dense.bias[:1])
    output = accelerate_model(model)(**inputs).last_hidden_state
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_as_torch(output[mask.bool()], stock[mask.bool()], expected[mask.bool()])


def test_without_a_mask():
    model = stock_model()
    ids = random_inputs(MASKS["all ones"], model.config)["input_ids"]
    stock = model(ids).last_hidden_state
    assert torch.allclose(accelerate_model(model)(ids).last_hidden_state, stock, atol=1e-5)


def test_a_row_that_is_all_masked_is_finite():
    model, mask = accelerate_model(stock_model()), MASKS["right padding"].clone()
    alone = model(**random_inputs(mask, model.config)).last_hidden_state
    mask[1] = 0
    inputs = random_inputs(mask, model.config)
    output = model(**inputs).last_hidden_state
    assert torch.isfinite(output).all()
    others = [0, 2, 3]
    assert torch.allclose(output[others], alone[others], atol=1e-5), "a masked row must not disturb the others"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cpu(dtype):
    model, mask = stock_model(), MASKS["right padding"]
    inputs = random_inputs(mask, model.config)
    double = copy.deepcopy(model).to(dtype).double()(**inputs).last_hidden_state
    model.to(dtype)
    stock = model(**inputs).last_hidden_state
    dispatch._warned.clear()
    dispatch.forget_choices()
    warns = pytest.warns(RuntimeWarning, match="computes float32 and bfloat16") if dtype == torch.float16 else nullcontext()
    with warns:
        output = accelerate_model(model)(**inputs).last_hidden_state
    assert_close_as_torch(output[mask.bool()], stock[mask.bool()], double[mask.bool()])


def test_autocast_gives_the_stock_dtypes():
    model, mask = stock_model(), MASKS["right padding"]
    inputs = random_inputs(mask, model.config)
    double = copy.deepcopy(model).double()(**inputs).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(**inputs).last_hidden_state
        output = accelerate_model(model)(**inputs).last_hidden_state
    assert output.dtype == stock.dtype
    error, allowed = ((t[mask.bool()].double() - double[mask.bool()]).abs().max() for t in (output, stock))
    assert error <= 2 * allowed


@pytest.mark.parametrize("probability", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_trains_and_follows_the_seed(probability):
    other = {"hidden_dropout_prob", "attention_probs_dropout_prob"} - {probability}
    model = accelerate_model(stock_model(**{probability: 0.3}, **dict.fromkeys(other, 0.0))).train()
    inputs = random_inputs(MASKS["right padding"], model.config)

    def run(seed):
        torch.manual_seed(seed)
        return model(**inputs).last_hidden_state

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    run(0).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())
    assert torch.equal(model.eval()(**inputs).last_hidden_state, run(2)), "no dropout in eval mode"


def test_mean_over_dropout_is_the_model_without():
    """Rescaling keeps the first layer's expectation: with many seeds the mean of its attention output comes close."""
    config = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model = accelerate_model(stock_model(**config))
    layer = model.encoder.layer[0]
    layer.attention.output.LayerNorm = torch.nn.Identity()  # keep the map from attention to output linear
    layer.output.LayerNorm = torch.nn.Identity()
    torch.nn.init.zeros_(layer.output.dense.weight)
    inputs = random_inputs(torch.ones(2, 12, dtype=torch.int64), model.config)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.train().embeddings.eval()
        runs = torch.stack([model(**inputs).last_hidden_state for _ in range(600)])
    deviation = (runs.mean(0) - expected).abs() / (runs.std(0) / 600**0.5 + 1e-9)
    assert deviation.mean() < 1.2, "in units of the standard error"


def test_encoder_by_hand_from_config():
    """In a model of one's own: a 2D mask, no Hugging Face model around it."""
    config = tiny_config("bert")
    encoder = randomize(FastRobertaEncoder(config)).eval()
    x, mask = torch.randn(4, 17, config.hidden_size), MASKS["right padding"]
    expected = reference(encoder, x, mask)
    output = encoder(x, mask).last_hidden_state
    assert torch.allclose(output[mask.bool()].double(), expected[mask.bool()], atol=1e-4)
    bool_4d = encoder(x, mask[:, None, None, :].bool()).last_hidden_state
    assert torch.equal(bool_4d, output)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\] = \(4, 17\).*\(4, 9\)"):
        encoder(x, mask[:, :9])
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported; supported are roberta"):
        FastRobertaEncoder(tiny_config("gpt2"))


def test_an_additive_4d_mask_takes_the_stock_path():
    """A user's own mask may say anything, e.g. a bias: it is honoured by the stock path, which is counted and warned of."""
    model = stock_model()
    mask = torch.ones(4, 1, 17, 17).tril().bool()
    inputs = {**random_inputs(MASKS["right padding"], model.config), "attention_mask": mask}
    stock = model(**inputs).last_hidden_state
    accelerate_model(model)
    with pytest.warns(RuntimeWarning, match="a 4D attention mask"):
        output = model(**inputs).last_hidden_state
    assert torch.equal(output, stock)
    accelerate_model(model, on_unsupported="error")
    with pytest.raises(NotImplementedError, match="a 4D attention mask"):
        model(**inputs)
