"""Every served family computes what its stock model computes, whatever it calls its parts; every other one is refused."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput

from roberta_fast import (
    FastRobertaEncoder,
    accelerate_model,
    explain,
    patch_transformers,
    restore_model,
    supported_model_types,
    unpatch_transformers,
)
from roberta_fast import encoder as fast
from roberta_fast.families import FAMILIES, family_of, family_of_encoder
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

RIGHT, LEFT = MASKS["right padding"], MASKS["left padding"]
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)
# Text encoders of larger models, for which AutoModel has no name of its own.
CLASSES = {
    "align_text_model": "AlignTextModel",
    "clap_text_model": "ClapTextModel",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
}


def model_class(model_type):
    return getattr(transformers, CLASSES[model_type])._from_config if model_type in CLASSES else AutoModel.from_config


def stock_model(model_type, **overrides):
    return randomize(model_class(model_type)(tiny_config(model_type, **{**NO_DROPOUT, **overrides}))).eval()


def encoder_of(model):
    return next(m for m in model.modules() if family_of_encoder(m) or isinstance(m, fast.FastEncoder))


def encoded(model, inputs):
    """What the encoder inside ``model`` returns, [B, S, C]."""
    seen = []
    hook = encoder_of(model).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right padding", "left padding"])
@pytest.mark.parametrize("model_type", supported_model_types())
def test_forward(model_type, mask):
    model = stock_model(model_type)
    inputs = random_inputs(mask, model.config)
    stock, exact = encoded(model, inputs), encoded(copy.deepcopy(model).double(), inputs)
    output = encoded(accelerate_model(model), inputs)
    seen = mask.bool() | (torch.arange(mask.shape[1]) == 0)
    assert_close_as_torch(output[seen], stock[seen], exact[seen])
    assert not output[~seen].any(), "padding must come back as zeros, or the fast path did not run"
    assert explain(model).stock_calls == {}


@pytest.mark.parametrize("model_type", ["distilbert", "bert-generation", "dpr", "splinter"])
def test_gradients(model_type):
    """Of all parameters as one vector, within 3x of the stock model's error."""
    stock = stock_model(model_type).train()
    models = {"fast": accelerate_model(copy.deepcopy(stock)), "stock": stock, "exact": copy.deepcopy(stock).double()}
    inputs, gradients = random_inputs(RIGHT, stock.config), {}
    for name, model in models.items():
        first = model(**inputs)[0]
        weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).to(first.dtype)
        (first * (weights if first.dim() == 2 else weights * RIGHT[..., None])).sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert_close_as_torch(gradients["fast"], gradients["stock"], gradients["exact"], factor=3)


def test_distilbert_drops_nothing_before_its_first_norm():
    """Its residual of the attention knows no dropout: with nothing behind the feed-forward's, training changes nothing."""
    model = accelerate_model(stock_model("distilbert", dropout=0.5, attention_dropout=0.0))
    inputs = random_inputs(RIGHT, model.config)
    for layer in model.transformer.layer:
        nn.init.zeros_(layer.ffn.lin2.weight)
        nn.init.zeros_(layer.ffn.lin2.bias)
    expected = model(**inputs).last_hidden_state
    model.transformer.train()
    assert torch.allclose(model(**inputs).last_hidden_state, expected, atol=1e-6)
    nn.init.normal_(model.transformer.layer[0].ffn.lin2.weight)
    torch.manual_seed(0)
    first = model(**inputs).last_hidden_state
    assert not torch.allclose(model(**inputs).last_hidden_state, first, atol=1e-2), "the feed-forward's dropout must draw"


def test_distilbert_returns_what_its_stock_encoder_does():
    model = stock_model("distilbert")
    inputs = random_inputs(RIGHT, model.config)
    stock = model(**inputs)
    output = accelerate_model(model)(**inputs)
    assert type(output) is type(stock) is BaseModelOutput
    assert list(output) == list(stock)


@pytest.mark.parametrize("model_type", supported_model_types())
def test_names_pickle_and_restore(model_type):
    model = stock_model(model_type)
    stock_classes = [type(m) for m in model.modules()]
    inputs = random_inputs(RIGHT, model.config)
    expected = encoded(accelerate_model(model), inputs)
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in stock_classes], "FSDP wraps by these names"
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(encoded(again, inputs), expected)
    assert [type(m) for m in restore_model(model).modules()] == stock_classes


def test_two_families_with_an_encoder_class_of_the_same_name():
    bert, generation = (fast.fast_class(family_of(model_type), "encoder") for model_type in ("bert", "bert-generation"))
    assert bert.__name__ == generation.__name__ == "BertEncoder"
    assert bert is fast.BertEncoder is not generation
    names = [fast._global_name(family, role) for family in FAMILIES for role in ("layer", "encoder")]
    assert len(set(names)) == len(names), "a name stands for one class"


@pytest.mark.parametrize("model_type", ["distilbert", "bert-generation", "splinter"])
def test_encoder_built_and_replaced_by_hand(model_type):
    model = stock_model(model_type)
    inputs = random_inputs(RIGHT, model.config)
    expected = encoded(model, inputs)
    name = next(name for name, child in model.named_children() if child is encoder_of(model))
    replaced = copy.deepcopy(model)
    setattr(replaced, name, FastRobertaEncoder.from_hf(encoder_of(replaced)))
    built = copy.deepcopy(model)
    setattr(built, name, FastRobertaEncoder(built.config))
    built.load_state_dict(model.state_dict())
    for fast_model in (replaced, built.eval()):
        assert torch.allclose(encoded(fast_model, inputs)[RIGHT.bool()], expected[RIGHT.bool()], atol=1e-5)
        assert explain(fast_model).stock_calls == {}
        assert torch.equal(encoded(restore_model(fast_model), inputs), expected)


@pytest.mark.parametrize("model_type", ["distilbert", "bert-generation", "dpr"])
def test_patch_transformers(model_type):
    try:
        patch_transformers([model_type])
        patched = stock_model(model_type)
        again = FastRobertaEncoder(patched.config)
    finally:
        unpatch_transformers()
    assert explain(patched).layers == len(again.layer) == 3
    assert encoder_of(restore_model(patched)).__class__ is encoder_of(stock_model(model_type)).__class__


@pytest.mark.parametrize("name", ["DPRContextEncoder", "DPRQuestionEncoder", "DPRReader"])
def test_dpr(name):
    """Its models hold a BERT, whose config is their own."""
    model = randomize(getattr(transformers, name)(tiny_config("dpr", projection_dim=0 if name == "DPRReader" else 24))).eval()
    inputs = random_inputs(RIGHT, model.config)
    stock, hidden = model(**inputs), model(**inputs, output_hidden_states=True).hidden_states
    output = accelerate_model(model)(**inputs)
    for key, value in stock.items():
        real = RIGHT.bool() if value.shape == RIGHT.shape else slice(None)
        assert torch.allclose(output[key][real], value[real], atol=1e-4), key
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == len(hidden) == 4
    assert explain(model).stock_calls == {}


def test_a_text_encoder_inside_a_larger_model():
    config = transformers.ChineseCLIPConfig(
        text_config=tiny_config("chinese_clip_text_model", **NO_DROPOUT).to_dict(),
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    )
    model = randomize(transformers.ChineseCLIPModel(config)).eval()
    inputs = random_inputs(RIGHT, config.text_config) | {"pixel_values": torch.ones(4, 3, 8, 8)}
    stock = model(**inputs).logits_per_text
    assert explain(accelerate_model(model)).encoders == 1
    assert torch.allclose(model(**inputs).logits_per_text, stock, atol=1e-4)
    assert explain(model).stock_calls == {}


REFUSED = (
    "albert", "big_bird", "canine", "deberta", "deberta-v2", "esm", "layoutlm", "layoutlmv3", "lilt", "longformer", "markuplm",
    "megatron-bert", "mobilebert", "modernbert", "mpnet", "rembert", "roberta-prelayernorm", "roformer", "tapas", "visual_bert",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type):
    """Another layer, or one whose encoder is told of padding in a form that could as well be a bias."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=1, vocab_size=40, pad_token_id=1)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"model_type='{model_type}'.* has no encoder .* supported are roberta, bert, dpr"):
        accelerate_model(model)
    with pytest.raises(ValueError, match=f"model_type='{model_type}' is not supported; supported are roberta"):
        patch_transformers([model_type])
    assert [type(m) for m in model.modules()] == classes


class OtherLayer(transformers.models.roberta.modeling_roberta.RobertaLayer):
    """What a user has made of a stock layer may compute anything."""


def test_a_layer_of_another_class_is_refused_before_anything_changes():
    two = nn.ModuleList(stock_model("roberta") for _ in range(2))
    two[1].encoder.layer[2] = OtherLayer(two[1].config)
    with pytest.raises(ValueError, match="OtherLayer, which is no layer of a supported family"):
        accelerate_model(two)
    assert not any(isinstance(m, (fast.FastEncoder, fast.FastLayer)) for m in two.modules())
    assert type(two[0].config._attn_implementation) is str
