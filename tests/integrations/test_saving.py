"""What an accelerated model saves and shares is a stock model's: files, keys, config; what it pickles stays fast."""

import copy
import filecmp
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from model_trio import tiny_model
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertModel, RobertaForCausalLM

from roberta_fast import (
    FastRobertaEncoder,
    accelerate_model,
    explain,
    patch_transformers,
    restore_model,
    supported_model_types,
    unpatch_transformers,
)
from roberta_fast.testing import MASKS, random_inputs, randomize, tiny_config

RIGHT = MASKS["right padding"]
REAL = RIGHT.bool()
TYPES = [model_type for model_type in supported_model_types() if not model_type.endswith("_text_model")]


def is_stock(model):
    return all(type(m).__module__.startswith(("transformers.", "torch.")) for m in model.modules())


def assert_same_files(first: Path, second: Path):
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors"} <= set(names)
    for name in names:
        assert filecmp.cmp(first / name, second / name, shallow=False), name


@pytest.fixture(params=["sdpa", "eager"])
def stock(request):
    return tiny_model(BertModel, "bert", attn_implementation=request.param).eval()


@pytest.fixture
def inputs(stock):
    return random_inputs(RIGHT, stock.config)


@pytest.mark.parametrize("model_type", TYPES)
def test_saved_files_are_the_stock_ones(model_type, tmp_path):
    """Byte for byte, and what is loaded from them is a stock model; also where the model was built while patched."""
    model = randomize(AutoModel.from_config(tiny_config(model_type))).eval()
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path / "stock")
    accelerate_model(model).save_pretrained(tmp_path / "fast")
    assert list(model.state_dict()) == keys
    try:
        patch_transformers([model_type])
        loaded = AutoModel.from_pretrained(tmp_path / "stock")
    finally:
        unpatch_transformers()
    assert explain(loaded).layers == 3
    loaded.save_pretrained(tmp_path / "patched")
    for folder in ("fast", "patched"):
        assert_same_files(tmp_path / "stock", tmp_path / folder)
    again = AutoModel.from_pretrained(tmp_path / "fast")
    assert is_stock(again)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def test_shards_and_other_options_of_save_pretrained(stock, tmp_path):
    for folder, model in (("stock", stock), ("fast", accelerate_model(copy.deepcopy(stock)))):
        model.save_pretrained(tmp_path / folder, max_shard_size="100KB")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    for name in names:
        assert filecmp.cmp(tmp_path / "stock" / name, tmp_path / "fast" / name, shallow=False), name


def test_safetensors_and_torch_save(stock, inputs, tmp_path):
    model = accelerate_model(copy.deepcopy(stock))
    expected = model(**inputs).last_hidden_state
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    states = [load_file(tmp_path / f"{name}.safetensors") for name in ("state", "model")]
    for state in (*states, torch.load(tmp_path / "state.pt", weights_only=True)):
        loaded = BertModel(tiny_config("bert")).eval()
        loaded.load_state_dict(state)
        assert torch.equal(accelerate_model(loaded)(**inputs).last_hidden_state, expected)


def test_a_hub_folder_says_nothing_of_this_package(stock, tmp_path):
    """What push_to_hub uploads is what save_pretrained writes."""
    accelerate_model(stock).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert b"roberta_fast" not in path.read_bytes(), path.name
    for text in (stock.config.to_json_string(use_diff=False), json.dumps(stock.config.to_dict()), repr(stock.config)):
        assert "roberta_fast" not in text


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_copies_stay_fast_and_can_be_restored(protocol, stock, inputs):
    model = accelerate_model(copy.deepcopy(stock), on_unsupported="error")
    expected, buffer = model(**inputs).last_hidden_state, io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model, protocol)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(again(**inputs).last_hidden_state, expected)
        assert again.config is again.encoder.config is not model.config
        assert again.encoder.fast_options == model.encoder.fast_options
        assert torch.equal(restore_model(again)(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
        assert is_stock(again)
    assert explain(model).stock_calls == {}, "a copy's config is its own"


def test_an_encoder_of_ones_own_pickles(stock, inputs):
    stock.encoder = FastRobertaEncoder.from_hf(stock.encoder)
    again = pickle.loads(pickle.dumps(stock))
    assert type(again.encoder) is FastRobertaEncoder
    assert torch.equal(again(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)


CONFIGS = {
    "the object itself": lambda config, _: config,
    "a deep copy": lambda config, _: copy.deepcopy(config),
    "through pickle": lambda config, _: pickle.loads(pickle.dumps(config)),
    "through a dictionary": lambda config, _: type(config).from_dict(config.to_dict()),
    "through a file": lambda config, path: config.save_pretrained(path) or AutoConfig.from_pretrained(path),
}


@pytest.mark.parametrize("take", CONFIGS.values(), ids=CONFIGS)
def test_another_model_of_the_same_config_is_stock(take, stock, inputs, tmp_path):
    """It is stock in class and in what it computes, its attention weights and compiled form included."""
    state, weights = stock.state_dict(), stock.config._attn_implementation == "eager"
    expected = stock(**inputs, output_attentions=weights)
    model = accelerate_model(copy.deepcopy(stock))
    config = take(model.config, tmp_path)
    if config._attn_implementation is None:  # a dictionary or file does not say
        config._attn_implementation = stock.config._attn_implementation
    for build in (BertModel, AutoModel.from_config):
        other = build(config).eval()
        other.load_state_dict(state)
        output = other(**inputs, output_attentions=weights)
        assert is_stock(other)
        assert other.config._attn_implementation == stock.config._attn_implementation
        assert torch.allclose(output.last_hidden_state[REAL], expected.last_hidden_state[REAL], atol=1e-5)
        for ours, theirs in zip(output.attentions or (), expected.attentions or (), strict=True):
            assert torch.allclose(ours.transpose(1, 2)[REAL], theirs.transpose(1, 2)[REAL], atol=1e-6)
    assert len(output.attentions or ()) == (3 if weights else 0)


def test_a_decoder_of_the_same_config_is_stock():
    config = copy.deepcopy(accelerate_model(tiny_model(AutoModel.from_config)).config)
    config.is_decoder = True
    ids = random_inputs(torch.ones(2, 7, dtype=torch.int64), config)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for attention in ("sdpa", "eager"):
        config._attn_implementation = type(config._attn_implementation)(attention)
        decoder = randomize(RobertaForCausalLM(config)).eval()
        plain = randomize(RobertaForCausalLM(tiny_config(is_decoder=True, attn_implementation=attention))).eval()
        for arguments in ({}, {"attention_mask": mask}):
            assert torch.equal(decoder(ids, **arguments).logits, plain(ids, **arguments).logits)


def test_attention_settings_of_the_config_work_as_before(stock, inputs):
    """The config names the implementation that it named, so what depends on the name goes on to do so."""
    eager = stock.config._attn_implementation == "eager"
    model = accelerate_model(copy.deepcopy(stock), on_unsupported="ignore")
    assert model.config._attn_implementation == stock.config._attn_implementation
    if eager:
        for m in (model, stock):
            m.config.output_attentions = True
        ours, theirs = (m(**inputs).attentions for m in (model, stock))
        assert len(ours) == 3 and all(map(torch.equal, ours, theirs))
    else:
        with pytest.raises(ValueError, match="not supported when using the `attn_implementation` set to sdpa"):
            model.config.output_attentions = True


def test_a_checkpoint_with_another_head(tmp_path):
    """Save the accelerated base model, load a classifier from it, as fine-tuning does."""
    base = accelerate_model(tiny_model(AutoModel.from_config).eval())
    base.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert is_stock(classifier)
    inputs = random_inputs(RIGHT, base.config)
    states = accelerate_model(classifier).roberta(**inputs).last_hidden_state
    assert torch.allclose(states, base(**inputs).last_hidden_state, atol=1e-6)
