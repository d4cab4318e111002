"""Every way to call a Hugging Face model gives what it gives on the stock one, on the fast path wherever that is promised."""

import copy

import pytest
import torch
from model_trio import Trio, tiny_inputs, tiny_model, trio
from torch import nn
from transformers import AutoModel, BertModel, EncoderDecoderConfig, EncoderDecoderModel, RobertaForCausalLM
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.models.auto import modeling_auto

from roberta_fast import accelerate_model, explain, supported_model_types
from roberta_fast.encoder import FastEncoder
from roberta_fast.testing import MASKS, assert_close_as_torch, ragged_mask, random_inputs, randomize, tiny_config

RIGHT = MASKS["right padding"]
HEADS = (
    "MASKED_LM",
    "CAUSAL_LM",
    "PRETRAINING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
)


@pytest.fixture(params=["sdpa", "eager"])
def models(request):
    return trio(tiny_model(BertModel, "bert", attn_implementation=request.param).eval(), on_unsupported="error")


def real(tensor, mask):
    """The rows of ``tensor`` at real tokens; all of it where it has no such rows."""
    return tensor[mask.bool()] if tensor.shape[: mask.dim()] == mask.shape else tensor


def outputs(models: Trio, inputs, mask=RIGHT, exact_inputs=None):
    """Every floating tensor that a call of each model returns, at real tokens, in units of the exact tensor's largest value."""
    calls = zip(models, (inputs, inputs, exact_inputs or inputs), strict=True)
    fast, stock, exact = (model(**arguments) for model, arguments in calls)
    assert type(fast) is type(stock) and len(fast) == len(stock)
    for name in stock if hasattr(stock, "keys") else range(len(stock)):
        several = [[output[name]] if torch.is_tensor(output[name]) else output[name] for output in (fast, stock, exact)]
        for trio_of_tensors in zip(*several, strict=True):
            a, b, c = (real(tensor, mask).detach() for tensor in trio_of_tensors)
            assert a.dtype == b.dtype and a.shape == b.shape == c.shape
            yield tuple((tensor / c.abs().max().to(tensor.dtype)).flatten() for tensor in (a, b, c))


def assert_same(models: Trio, inputs, mask=RIGHT, exact_inputs=None):
    """By the rule for reductions, all outputs seen as one vector: few numbers, as a head may return, may be exact by luck."""
    assert_close_as_torch(*map(torch.cat, zip(*outputs(models, inputs, mask, exact_inputs), strict=True)))


@pytest.mark.parametrize(
    "extra",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_hidden_states": True, "return_dict": False},
        {"token_type_ids": torch.arange(17).remainder(2).expand(4, -1)},
        {"position_ids": torch.arange(17).flip(0).expand(4, -1)},
    ],
    ids=["return_dict=False", "hidden states", "hidden states as a tuple", "token types", "position ids"],
)
def test_arguments(models, extra):
    assert_same(models, random_inputs(RIGHT, models.stock.config) | extra)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_dtypes_of_the_mask(models, dtype):
    inputs = random_inputs(RIGHT, models.stock.config)
    assert_same(models, inputs | {"attention_mask": RIGHT.to(dtype)})
    assert explain(models.fast).stock_calls == {}


def test_embeddings_instead_of_ids(models):
    embeds = torch.randn(*RIGHT.shape, models.stock.config.hidden_size)
    inputs = {"inputs_embeds": embeds, "attention_mask": RIGHT}
    assert_same(models, inputs, exact_inputs=inputs | {"inputs_embeds": embeds.double()})


@pytest.mark.parametrize(
    "mask",
    [None, torch.ones(3, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64)],
    ids=["no mask", "all ones", "ones for all"],
)
def test_nothing_padded(models, mask):
    ids = random_inputs(torch.ones(3, 8, dtype=torch.int64), models.stock.config)["input_ids"]
    assert_same(models, {"input_ids": ids, "attention_mask": mask}, torch.ones(3, 8))


def test_one_mask_for_all_texts(models):
    """The stock model reads the masks of texts that have none and raises, unless nothing is padded."""
    mask = RIGHT[-1:]
    inputs = random_inputs(mask.expand(3, -1), models.stock.config)
    assert_same(models, inputs, mask.expand(3, -1))
    expected = models.fast(**inputs).last_hidden_state
    assert torch.equal(models.fast(inputs["input_ids"], attention_mask=mask).last_hidden_state, expected)


def test_chunked_feed_forward():
    """It saves memory in the stock layer and changes no value; here nothing is left to save."""
    mask = torch.cat([RIGHT, torch.zeros(4, 3, dtype=RIGHT.dtype)], 1)
    models = trio(tiny_model(BertModel, "bert", chunk_size_feed_forward=5).eval())
    assert_same(models, random_inputs(mask, models.stock.config), mask)
    assert explain(models.fast).stock_calls == {}


def bands(seqlen):
    """Which key a query sees: those at most three places away."""
    places = torch.arange(seqlen)
    return ((places[:, None] - places).abs() <= 3).expand(4, 1, -1, -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_ones_own(attention):
    """Values between visible and masked are a bias; the stock path honours any 4D mask but one that only marks padding."""
    models = trio(tiny_model(BertModel, "bert", attn_implementation=attention).eval(), on_unsupported="warn")
    inputs = random_inputs(torch.ones_like(RIGHT), models.stock.config)
    bias = {
        "banded": torch.where(bands(17), 0.0, torch.finfo(torch.float32).min),
        "a bias of each key": torch.linspace(-2, 2, 17).expand(4, 1, 1, -1),
    }
    with pytest.warns(RuntimeWarning, match="a 4D attention mask"):
        for mask in bias.values():
            stock, output = (model(**inputs | {"attention_mask": mask}) for model in (models.stock, models.fast))
            assert torch.equal(output.last_hidden_state, stock.last_hidden_state)
        if attention == "sdpa":
            stock, output = (model(**inputs | {"attention_mask": bands(17)}) for model in (models.stock, models.fast))
            assert torch.equal(output.last_hidden_state, stock.last_hidden_state)
    plain = models.stock(**inputs).last_hidden_state
    assert not torch.allclose(output.last_hidden_state, plain, atol=1e-2), "the mask must count"
    calls = explain(models.fast).stock_calls
    assert calls == {"a 4D attention mask": 3 if attention == "sdpa" else 2}
    if attention == "sdpa":
        assert_same(models, random_inputs(RIGHT, models.stock.config) | {"attention_mask": RIGHT[:, None, None].bool()})
        assert explain(models.fast).stock_calls == calls, "a bool [B, 1, 1, S] says no more than [B, S]"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_that_are_not_the_encoders_are_made_as_before(attention):
    """One laid over the padding, to be joined with another, of other keys than queries, or of a window."""
    stock = tiny_config("bert", attn_implementation=attention)
    config = accelerate_model(BertModel(copy.deepcopy(stock))).config
    embeds = torch.zeros(*RIGHT.shape, 8)
    others = {
        "overlaid": {"and_mask_function": lambda batch, head, query, key: key <= query + 2},
        "to be joined": {"allow_is_bidirectional_skip": False},
        "of other keys": {"encoder_hidden_states": torch.zeros(4, 9, 8), "attention_mask": ragged_mask([9, 2, 3, 4])},
    }
    for name, arguments in others.items():
        arguments = {"inputs_embeds": embeds, "attention_mask": RIGHT, **arguments}
        theirs, ours = (create_bidirectional_mask(config=c, **arguments) for c in (stock, config))
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours), name
    for c in (stock, config):
        c.sliding_window = 3
    arguments = {"inputs_embeds": embeds, "attention_mask": RIGHT}
    assert torch.equal(*(create_bidirectional_sliding_window_mask(config=c, **arguments) for c in (stock, config)))
    padding, short = (create_bidirectional_mask(config=c, inputs_embeds=embeds, attention_mask=RIGHT) for c in (stock, config))
    assert short.shape == (4, 1, 1, 17)
    assert torch.equal(short.expand_as(padding), padding), "a stock layer must understand it"


def test_an_attention_implementation_set_later_is_said(models):
    other = "eager" if models.fast.config._attn_implementation == "sdpa" else "sdpa"
    inputs = random_inputs(RIGHT, models.stock.config)
    accelerate_model(models.fast)
    for model in models[:2]:
        model.set_attn_implementation(other)
    with pytest.warns(RuntimeWarning, match=f"set to '{other}' after acceleration"):
        output = models.fast(**inputs)
    assert torch.equal(output.last_hidden_state, models.stock(**inputs).last_hidden_state)
    accelerate_model(models.fast, on_unsupported="error")
    assert_same(models, inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_compiled_model_runs_the_fast_operations(attention):
    """Fallbacks are silent in compiled code, so the graph itself must show them."""
    model = accelerate_model(tiny_model(BertModel, "bert", attn_implementation=attention).eval())
    inputs, graphs = random_inputs(RIGHT, model.config), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    assert torch.allclose(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state, atol=1e-5)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    for op in ("pack_indices", "attention", "unpack"):
        assert any(target.startswith(f"roberta_fast.{op}") for target in targets), f"no {op} among {sorted(set(targets))}"
    assert not any("scaled_dot_product_attention" in target for target in targets)


def test_a_row_that_is_all_masked_trains_finitely():
    model = accelerate_model(tiny_model(AutoModel.from_config))
    mask = RIGHT.clone()
    mask[1] = 0
    output = model(**random_inputs(mask, model.config)).last_hidden_state
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())


@pytest.mark.parametrize(("model_type", "longest"), [("roberta", 62), ("bert", 64), ("distilbert", 64)])
def test_the_longest_text_and_one_token_more(model_type, longest):
    """RoBERTa counts positions from padding_idx + 1 on, so of 64 it has 62. One more fails as in the stock model, loudly."""
    models = trio(tiny_model(AutoModel.from_config, model_type, num_hidden_layers=1).eval())
    mask = ragged_mask([longest, 3])
    assert_same(models, random_inputs(mask, models.stock.config), mask)
    for model in models:
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|must match"):
            model(**random_inputs(ragged_mask([longest + 1, 3]), model.config))


@pytest.mark.parametrize("mask", [MASKS["right padding"], MASKS["left padding"]], ids=["right padding", "left padding"])
@pytest.mark.parametrize("model_type", [t for t in supported_model_types() if not t.endswith("_text_model") and t != "dpr"])
def test_heads(model_type, mask):
    """Every head that Hugging Face has for the family, at real tokens."""
    config, heads, found = tiny_config(model_type), 0, []
    for head in HEADS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING")
        if type(config) not in mapping or (model_type, head) == ("splinter", "PRETRAINING"):  # that one predicts no tokens
            continue
        models = trio(tiny_model(mapping[type(config)], model_type).eval(), on_unsupported="error")
        inputs, tokens = random_inputs(mask, config), mask
        if head == "MULTIPLE_CHOICE":
            inputs, tokens = {name: value.unflatten(0, (2, 2)) for name, value in inputs.items()}, mask.unflatten(0, (2, 2))
        exact_inputs = inputs | {"attention_mask": inputs["attention_mask"].double()}
        found += outputs(models, inputs, tokens, exact_inputs)
        heads += 1
    assert heads >= (1 if model_type in ("bert-generation", "splinter") else 5)
    assert_close_as_torch(*map(torch.cat, zip(*found, strict=True)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_decoder_generates_what_the_stock_one_does(attention):
    """With a cache, whose mask of one query looks like a padding mask."""
    decoder = tiny_model(RobertaForCausalLM, is_decoder=True, attn_implementation=attention).eval()
    models = trio(decoder, on_unsupported="ignore")
    padded = random_inputs(MASKS["left padding"][:2], models.stock.config)
    fast, stock = (model.generate(**padded, max_new_tokens=6, do_sample=False) for model in models[:2])
    assert torch.equal(fast, stock)
    ids = random_inputs(torch.ones(2, 5, dtype=torch.int64), models.stock.config)["input_ids"]
    assert explain(models.fast).stock_calls == {}
    cached, uncached = (models.fast(ids, use_cache=use_cache) for use_cache in (True, False))
    assert cached.past_key_values is not None and uncached.past_key_values is None
    step = models.fast(ids[:, :1], past_key_values=cached.past_key_values, attention_mask=torch.ones(2, 6)).logits
    assert torch.allclose(step[:, -1], models.stock(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1], atol=1e-4)


def translator(built_before):
    """An encoder-decoder of two BERTs; with parts that were ``built_before``, their configs are copies of the model's."""
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_config("bert"), tiny_config("bert", is_decoder=True, add_cross_attention=True)
    )
    parts = {}
    if built_before:
        parts["encoder"] = BertModel(copy.deepcopy(config.encoder))
        parts["decoder"] = modeling_auto.AutoModelForCausalLM.from_config(copy.deepcopy(config.decoder))
    model = randomize(EncoderDecoderModel(config=config, **parts)).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 1
    return model


@pytest.mark.parametrize("built_before", [False, True], ids=["built whole", "built of parts"])
@pytest.mark.parametrize("part", ["whole model", "encoder"])
def test_encoder_decoder(part, built_before):
    stock = translator(built_before)
    models = Trio(copy.deepcopy(stock), stock, copy.deepcopy(stock).double())
    accelerate_model(models.fast if part == "whole model" else models.fast.encoder, on_unsupported="ignore")
    inputs = tiny_inputs(models.stock.encoder, labels=None)
    mask = ragged_mask([6, 4, 5, 6])
    labels = random_inputs(mask, models.stock.encoder.config, seed=1)["input_ids"]
    fast, stock, exact = (model(**inputs, labels=labels) for model in models)
    assert_close_as_torch(*(output.logits[mask.bool()] for output in (fast, stock, exact)))
    fast.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in models.fast.encoder.encoder.parameters())
    generated = [
        model.generate(**inputs, max_new_tokens=5, do_sample=False, decoder_start_token_id=2, pad_token_id=1, eos_token_id=3)
        for model in models[:2]
    ]
    assert torch.equal(*generated)
    calls = [m.stock_calls for m in models.fast.modules() if isinstance(m, FastEncoder)]
    assert calls[0] == {}, "the encoder must be fast"
    assert calls[1:] == ([{}] if part == "whole model" else []), "and so must the decoder"


def test_a_shared_config_does_not_make_a_decoder_of_an_encoder():
    """Two models of one config object: what is done to one does not slow or garble the other."""
    config = tiny_config("bert")
    pair = nn.ModuleList(randomize(BertModel(config)).eval() for _ in range(2))
    inputs = random_inputs(RIGHT, config)
    expected = pair[1](**inputs).last_hidden_state
    accelerate_model(pair[0], on_unsupported="error")
    assert torch.allclose(pair[1](**inputs).last_hidden_state[RIGHT.bool()], expected[RIGHT.bool()], atol=1e-5)
    accelerate_model(pair[1], on_unsupported="error")
    for model in pair:
        assert torch.allclose(model(**inputs).last_hidden_state[RIGHT.bool()], expected[RIGHT.bool()], atol=1e-5)
