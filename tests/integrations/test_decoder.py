"""Decoders: causal, attending to an encoder, generating with a cache, all as the stock model does."""

import copy

import pytest
import torch
from model_trio import NO_DROPOUT, Trio, assert_same_gradients, gradients
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DynamicCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    StaticCache,
)

from roberta_fast import accelerate_model, explain, restore_model
from roberta_fast.testing import MASKS, random_inputs, randomize, tiny_config

TYPES = ["roberta", "bert", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text", "roc_bert", "bert-generation"]
RIGHT, LEFT, FULL = (MASKS[name] for name in ("right padding", "left padding", "all ones"))


def trio_of(stock, **options):
    return Trio(accelerate_model(copy.deepcopy(stock), **options), stock, copy.deepcopy(stock).double())


def causal_models(model_type="roberta", **options):
    config = tiny_config(model_type, **NO_DROPOUT, is_decoder=True)
    return trio_of(randomize(AutoModelForCausalLM.from_config(config), std=0.1).eval(), **options)


def encoder_decoder(**options):
    sizes = {name: value for name, value in tiny_config("bert").to_dict().items() if not name.startswith(("_", "model_type"))}
    encoder, decoder = (BertConfig(**{**sizes, **NO_DROPOUT, "num_hidden_layers": layers}) for layers in (2, 3))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 5, 1, 6
    model = randomize(EncoderDecoderModel(config), std=0.1).eval()
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 5, 1
    return trio_of(model, **options)


def assert_same(models, run, names=("loss", "logits"), real=None):
    """Holds what ``run(model)`` returns, and the gradients of its loss, to the stock model's error."""
    outputs = [run(model) for model in models]
    for name in names:
        fast, stock, exact = (getattr(output, name).detach().double() for output in outputs)
        if name == "logits" and real is not None:
            fast, stock, exact = (t[real] for t in (fast, stock, exact))
        allowed = 2 * (stock - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (fast - exact).abs().max() <= allowed, name
    for model, output in zip(models, outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    assert_same_gradients(*map(gradients, models))


def assert_nothing_fell_back(model):
    assert explain(model).stock_calls == {}
    assert explain(model).fallbacks == ()


@pytest.mark.parametrize("mask", ["right padding", "left padding", "all ones"])
@pytest.mark.parametrize("model_type", TYPES)
def test_causal(model_type, mask):
    models, mask = causal_models(model_type), MASKS[mask]
    inputs = random_inputs(mask, models.stock.config)
    # A token behind padding is predicted from padding, where stock hidden states mean nothing.
    known = mask.bool() & mask.roll(1, 1).bool()
    labels = torch.where(known, inputs["input_ids"], -100)
    assert_same(models, lambda model: model(**inputs, labels=labels, use_cache=False), real=mask.bool())
    assert_nothing_fell_back(models.fast)


def test_a_later_token_changes_nothing_before_it():
    model = causal_models().fast
    inputs = random_inputs(FULL, model.config)
    before = model(**inputs).logits
    inputs["input_ids"][:, 5] += 1
    after = model(**inputs).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
    assert (after[:, 5:] != before[:, 5:]).any()


def test_without_causality_the_test_fails(monkeypatch):
    models = causal_models()
    inputs = random_inputs(RIGHT, models.stock.config)
    labels = torch.where(RIGHT.bool(), inputs["input_ids"], -100)
    monkeypatch.setattr("roberta_fast.decoding.DecoderCall.decoding", lambda *_: (None, None))
    with pytest.raises(AssertionError, match="loss"):
        assert_same(models, lambda model: model(**inputs, labels=labels), real=RIGHT.bool())


@pytest.mark.parametrize("mask", ["right padding", "left padding", "holes", "all ones"])
def test_encoder_and_decoder(mask):
    models, mask = encoder_decoder(), MASKS[mask]
    inputs = random_inputs(mask, models.stock.config.encoder)
    targets = random_inputs(MASKS["right padding"][: len(mask), :11], models.stock.config.decoder, seed=1)
    labels = torch.where(targets["attention_mask"].bool(), targets["input_ids"], -100)
    more = {"labels": labels, "decoder_attention_mask": targets["attention_mask"]}
    assert_same(models, lambda model: model(**inputs, **more), real=targets["attention_mask"].bool())
    assert_nothing_fell_back(models.fast)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reaches_the_encoder(reentrant):
    models = encoder_decoder()
    inputs = random_inputs(RIGHT, models.stock.config.encoder)
    labels = random_inputs(FULL[[0, 1, 2, 2]], models.stock.config.decoder)["input_ids"]
    for model in models:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(models, lambda model: model(**inputs, labels=labels, use_cache=False))


def test_what_a_cache_is_given():
    models = causal_models()
    inputs = random_inputs(LEFT, models.stock.config)
    caches = [model(**inputs, use_cache=True).past_key_values for model in models]
    for fast, stock in zip(caches[0].layers, caches[1].layers, strict=True):
        for ours, theirs in ((fast.keys, stock.keys), (fast.values, stock.values)):
            real = LEFT.bool()[:, None, :, None]
            torch.testing.assert_close(ours * real, theirs * real, rtol=1e-4, atol=1e-5)
    assert models.fast(**inputs, use_cache=False).past_key_values is None


@pytest.mark.parametrize("tokens", [1, 4])
def test_steps_with_a_cache(tokens):
    """The same logits as from all tokens at once, one or several tokens a step."""
    models = causal_models()
    inputs = random_inputs(LEFT, models.stock.config)
    expected, cache = models.stock(**inputs).logits, DynamicCache(config=models.stock.config)
    positions = (LEFT.cumsum(1) - 1).clamp(min=0) + models.stock.config.pad_token_id + 1
    for begin in range(0, LEFT.shape[1], tokens):
        end = min(begin + tokens, LEFT.shape[1])
        step = {"input_ids": inputs["input_ids"][:, begin:end], "position_ids": positions[:, begin:end]}
        logits = models.fast(**step, attention_mask=LEFT[:, :end], past_key_values=cache, use_cache=True).logits
        real = LEFT[:, begin:end].bool()
        torch.testing.assert_close(logits[real], expected[:, begin:end][real], rtol=1e-4, atol=1e-4)
    assert_nothing_fell_back(models.fast)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams, sampled": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_generates_what_the_stock_model_generates(kind, way):
    models = causal_models("bert") if kind == "causal" else encoder_decoder()
    config = models.stock.config if kind == "causal" else models.stock.config.encoder
    inputs, generated = random_inputs(LEFT if kind == "causal" else RIGHT, config), []
    for model in models[:2]:
        torch.manual_seed(0)
        generated.append(model.generate(**inputs, max_new_tokens=12, **GENERATION[way]))
    assert torch.equal(*generated)
    assert generated[0].unique().numel() > 3, "something is generated"
    assert_nothing_fell_back(models.fast)


@pytest.mark.parametrize("case", ["static cache", "padding on the right", "attentions", "a hook"])
def test_what_takes_the_stock_path_says_why(case):
    models = causal_models()
    inputs = random_inputs(FULL, models.stock.config)
    more = {}
    if case == "static cache":
        more, reason = (
            {"past_key_values": lambda: StaticCache(models.stock.config, max_cache_len=32)},
            "cache of type StaticCache",
        )
    elif case == "padding on the right":
        padded = random_inputs(MASKS["right padding"][:3], models.stock.config)

        def cache():
            return models.stock(**padded, use_cache=True).past_key_values

        inputs["attention_mask"] = torch.cat([padded["attention_mask"], inputs["attention_mask"]], 1)
        more, reason = {"past_key_values": cache}, "padding that is not on the left, with a cache"
    elif case == "attentions":
        more, reason = {"output_attentions": lambda: True}, "attentions are requested"
        for model in models[:2]:
            model.set_attn_implementation("eager")
        accelerate_model(models.fast)
    else:
        reason = "a hook on Linear"
        for model in models[:2]:
            model.roberta.encoder.layer[1].intermediate.dense.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(RuntimeWarning, match=reason):
        fast = models.fast(**inputs, **{name: make() for name, make in more.items()}).logits
    torch.testing.assert_close(fast, models.stock(**inputs, **{name: make() for name, make in more.items()}).logits)


def test_masks_that_do_not_fit_are_named():
    model = encoder_decoder().fast.decoder
    hidden, states = torch.zeros(2, 5, 64), torch.zeros(2, 7, 64)
    encoder = model.bert.encoder
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\] = \(2, 5\) as hidden_states has it, got \(2, 4\)"):
        encoder(hidden, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"encoder_attention_mask must be \[B, S\] = \(2, 7\) as encoder_hidden_states has it"):
        encoder(hidden, None, states, torch.ones(2, 5))


def test_restored():
    models = encoder_decoder()
    restored = restore_model(models.fast)
    assert [type(m) for m in restored.modules()] == [type(m) for m in models.stock.modules()]
    inputs = random_inputs(RIGHT, models.stock.config.encoder)
    assert torch.equal(*(model.generate(**inputs, max_new_tokens=5) for model in (restored, models.stock)))
