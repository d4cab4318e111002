"""A base model that packs before its embeddings gives what the stock one gives, or runs as before and says why."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from model_trio import tiny_inputs, tiny_model, trio
from torch import nn
from transformers import AutoModel, BertModel, DistilBertModel, RobertaForMaskedLM, RobertaModel

from roberta_fast import accelerate_model, embeddings, explain, restore_model
from roberta_fast.embeddings import FastBaseModel
from roberta_fast.families import FAMILIES
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

RIGHT = MASKS["right padding"]
MODEL_TYPES = [family.model_types[0] for family in FAMILIES if family.base]
RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)


def base_model(model_type="roberta", **overrides):
    return tiny_model(AutoModel.from_config, model_type, **{**NO_DROPOUT, **overrides}).eval()


def assert_packed(model):
    """The operation was called where explain says so: no call took the stock forward."""
    report = explain(model)
    assert report.whole_calls == {} and "embedding" in report.backends and report.fallbacks == (), report


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_outputs(model_type, mask):
    """All of them at real tokens and position 0, zeros at padding, and of the stock types."""
    mask = MASKS[mask]
    models = trio(base_model(model_type), on_unsupported="error")
    inputs = random_inputs(mask, models.stock.config)
    fast, stock, exact = (model(**inputs) for model in models)
    assert type(fast) is type(stock) and list(fast) == list(stock)
    seen = mask.bool() | (torch.arange(mask.shape[1]) == 0)
    for name in stock:
        a, b, c = (output[name] if output[name].dim() == 2 else output[name][seen] for output in (fast, stock, exact))
        assert_close_as_torch(a, b, c, name=name)
    assert not fast.last_hidden_state[~seen].any()
    as_tuple = models.fast(**inputs, return_dict=False)
    assert type(as_tuple) is tuple and all(map(torch.equal, as_tuple, fast.to_tuple()))
    models.fast.config.return_dict = False
    assert type(models.fast(**inputs, return_dict=None)) is tuple
    assert_packed(models.fast)


@pytest.mark.parametrize("unpad", ["host", "device"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients(model_type, unpad):
    """Of all parameters as one vector; the pad's row learns nothing, which stock embeddings promise too."""
    stock = base_model(model_type).train()
    models, found = trio(stock, unpad=unpad), []
    inputs = random_inputs(RIGHT, stock.config)
    for model in models:
        states = model(**inputs).last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
        (states * weights * RIGHT[..., None]).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert_close_as_torch(*(torch.cat([g.flatten() for g in grads.values()]) for grads in found), factor=3)
    for name, table in models.fast.embeddings.named_children():
        if getattr(table, "padding_idx", None) is not None:
            assert not found[0][f"embeddings.{name}.weight"][table.padding_idx].any()
    assert_packed(models.fast)


@pytest.mark.parametrize("model_type", ["roberta", "bert", "distilbert"])
def test_given_positions_and_types(model_type):
    models = trio(base_model(model_type, type_vocab_size=3))
    places = torch.arange(17)
    given = [{"position_ids": places.flip(0).expand(4, -1) + 3}, {"position_ids": (places + 7)[None]}]
    if model_type != "distilbert":
        given += [{"token_type_ids": places.remainder(3).expand(4, -1)}, {"token_type_ids": places.remainder(3)[None]}]
    for extra in given:
        inputs = random_inputs(RIGHT, models.stock.config) | extra
        outputs = [model(**inputs).last_hidden_state[RIGHT.bool()].detach() for model in models]
        assert_close_as_torch(*outputs)
        plain = models.fast(**random_inputs(RIGHT, models.stock.config)).last_hidden_state[RIGHT.bool()]
        assert not torch.allclose(outputs[0], plain, atol=1e-2), f"{list(extra)} must count"
    assert_packed(models.fast)


@pytest.mark.parametrize("change", ["positions from 0", "the row of another type"])
def test_rules_catch_mutants(change, monkeypatch):
    models = trio(base_model(type_vocab_size=2))
    inputs = random_inputs(RIGHT, models.stock.config)
    if change == "positions from 0":
        monkeypatch.setattr(embeddings, "positions_behind", lambda ids, padding_idx: torch.arange(17).expand(4, -1))
    else:
        inputs["token_type_ids"] = torch.ones_like(RIGHT)
        monkeypatch.setattr(models.fast, "_embedded", lambda ids, positions, types, batch: FastBaseModel._embedded(
            models.fast, ids, positions, None, batch))  # fmt: skip
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_as_torch(*(model(**inputs).last_hidden_state[RIGHT.bool()].detach() for model in models))


def test_dropout_follows_the_seed_and_not_the_packing():
    """The embeddings' alone: padded or not, on the device or the host, a token keeps the same elements, a share of 0.7."""
    model = accelerate_model(base_model(**RATES)).eval()
    model.embeddings.train()
    inputs = random_inputs(RIGHT, model.config)

    def outputs(seed=0, **options):
        torch.manual_seed(seed)
        return accelerate_model(model, **options)(**inputs).last_hidden_state[RIGHT.bool()]

    first = outputs()
    assert torch.equal(outputs(), first) and not torch.allclose(outputs(seed=1), first, atol=1e-2)
    assert torch.allclose(outputs(unpad="device"), first, atol=1e-5)
    del inputs["attention_mask"]  # nothing is packed then; only row 2 has no pads, and none of them sees any
    torch.manual_seed(0)
    assert torch.allclose(model(**inputs).last_hidden_state[2], first[12:29], atol=1e-5)
    assert_packed(model)
    for seed in range(3):
        torch.manual_seed(seed)
        rows = model._embedded(
            inputs["input_ids"], None, None, embeddings.PackedBatch.of(inputs["input_ids"], None, model.fast_options)
        )
        assert 0.25 < (rows == 0).float().mean() < 0.35


class OtherEmbedding(nn.Embedding):
    """May compute anything."""


def replace(path, make):
    """A change that puts make(module) in the place of the module at ``path``."""

    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def replaced_forward(path):
    def change(model):
        module = model.get_submodule(path)
        module.forward = module.forward

    return change


def attribute(path, **values):
    return lambda model: model.get_submodule(path).__dict__.update(values)


ALWAYS = {
    "a hook on the embeddings": (hook("embeddings"), "a hook on RobertaEmbeddings"),
    "a hook on a table": (hook("embeddings.word_embeddings"), "a hook on Embedding"),
    "a hook on the norm": (hook("embeddings.LayerNorm"), "a hook on LayerNorm"),
    "a hook on the encoder": (hook("encoder"), "a hook on RobertaEncoder"),
    "a hook on a layer": (hook("encoder.layer.1"), "a hook on RobertaLayer"),
    "replaced forward of the embeddings": (replaced_forward("embeddings"), "a replaced forward of RobertaEmbeddings"),
    "replaced forward of the encoder": (replaced_forward("encoder"), "a replaced forward of RobertaEncoder"),
    "embeddings of another class": (
        replace("embeddings", lambda e: e.__class__.__new__(type("Own", (type(e),), {})).__class__(tiny_config(**NO_DROPOUT))),
        "the embeddings are a Own",
    ),
    "a table of another class": (
        replace("embeddings.word_embeddings", lambda e: OtherEmbedding(*e.weight.shape)), "the embeddings hold a OtherEmbedding"
    ),
    "a table that renormalizes": (attribute("embeddings.word_embeddings", max_norm=1.0), r"hold a Embedding\(.*max_norm=1.0"),
    "a table with sparse gradients": (attribute("embeddings.word_embeddings", sparse=True), r"hold a Embedding\(.*sparse=True"),
    "a norm of another class": (replace("embeddings.LayerNorm", lambda _: nn.Identity()), "normalized by a Identity"),
    "another dropout": (replace("embeddings.dropout", lambda _: nn.AlphaDropout().eval()), "dropout by a AlphaDropout"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALWAYS)
def test_models_that_embed_as_before(name):
    """The stock forward around the fast layers: the same numbers, no warning, and a fallback that names the cause."""
    change, reason = ALWAYS[name]
    stock = base_model()
    change(stock)
    fast = accelerate_model(copy.deepcopy(stock), on_unsupported="error")
    inputs = random_inputs(RIGHT, stock.config)
    output, expected = (model(**inputs).last_hidden_state[RIGHT.bool()] for model in (fast, stock))
    assert torch.allclose(output, expected, atol=1e-5)
    report = explain(fast)
    assert "embedding" not in report.backends and report.stock_calls == {}
    with pytest.raises(AssertionError, match=f"the embeddings of padding are computed: .*{reason}"):
        raise AssertionError("; ".join(report.fallbacks))
    assert list(report.whole_calls.values()) == [1]


@pytest.mark.parametrize("in_place", [True, False], ids=["encoder.compile()", "torch.compile(encoder)"])
def test_an_encoder_compiled_by_itself_is_called(in_place):
    model, graphs = accelerate_model(base_model()), []
    inputs, settings = random_inputs(RIGHT, model.config), {"backend": lambda graph, _: graphs.append(graph) or graph}
    expected = model(**inputs).last_hidden_state
    if in_place:
        model.encoder.compile(**settings)
    else:
        model.encoder = torch.compile(model.encoder, **settings)
    assert torch.allclose(model(**inputs).last_hidden_state, expected, atol=1e-5)
    reason = "the encoder is compiled by itself" if in_place else "the encoder is a OptimizedModule"
    assert graphs and model.whole_calls == {reason: 1}


def test_electras_projection():
    stock = base_model("electra", embedding_size=24)
    fast, inputs = accelerate_model(copy.deepcopy(stock)), random_inputs(RIGHT, stock.config)
    assert torch.allclose(
        fast(**inputs).last_hidden_state[RIGHT.bool()], stock(**inputs).last_hidden_state[RIGHT.bool()], atol=1e-5
    )
    assert explain(fast).fallbacks == ("the embeddings of padding are computed: the embeddings are projected",)


IDS = random_inputs(RIGHT, SimpleNamespace(vocab_size=120, pad_token_id=1))
CALLS = {
    "hidden states": ({"output_hidden_states": True}, "hidden states are requested"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.ones(4, 17, 64)}, "inputs_embeds"),
    "a 4D mask": ({"attention_mask": RIGHT[:, None, None].bool()}, r"an attention_mask that is not \[B, S\]"),
    "texts in a row": (
        {
            "input_ids": torch.full((1, 6), 7), "attention_mask": None, "position_ids": torch.tensor([[2, 3, 4, 2, 3, 4]]),
            "cu_seq_lens_q": torch.tensor([0, 3, 6]), "max_length_q": 3,
        },
        "cu_seq_lens_q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_embed_as_before(name):
    """Counted, not warned of: the layers are fast all the same."""
    extra, reason = CALLS[name]
    model = accelerate_model(base_model(), on_unsupported="error")
    inputs = {key: value for key, value in (IDS | extra).items() if value is not None}
    output = model(**inputs)
    assert torch.isfinite(output.last_hidden_state).all()
    assert (output.hidden_states is not None) == ("output_hidden_states" in extra)
    report = explain(model)
    assert report.stock_calls == {} and report.fallbacks == ()
    with pytest.raises(AssertionError, match=f"{reason}': 1"):
        raise AssertionError(str(report.whole_calls))
    with pytest.raises(AssertionError, match=f"all rows, 1 call.s.: {reason}"):
        raise AssertionError(str(report))


@pytest.mark.parametrize("requested", ["attentions", "a decoder", "a functorch transform", "eager set later"])
def test_calls_of_the_stock_encoder_embed_as_before_too(requested):
    stock = base_model(
        is_decoder=requested == "a decoder", attn_implementation="sdpa" if requested == "eager set later" else "eager"
    )
    fast = accelerate_model(copy.deepcopy(stock), on_unsupported="ignore")
    inputs, extra = random_inputs(RIGHT, stock.config), {"output_attentions": True} if requested == "attentions" else {}
    if requested == "eager set later":
        for model in (fast, stock):
            model.set_attn_implementation("eager")

    def call(model):
        if requested == "a functorch transform":
            return torch.func.functional_call(model, dict(model.named_parameters()), (), inputs) if model is stock else (
                torch.vmap(lambda scale: model(**inputs).last_hidden_state * scale)(torch.ones(1))[0])  # fmt: skip
        return model(**inputs, **extra)

    output, expected = call(fast), call(stock).last_hidden_state
    output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    assert torch.allclose(output[RIGHT.bool()], expected[RIGHT.bool()], atol=1e-5)
    assert sum(explain(fast).whole_calls.values()) == 1


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_more_tokens_than_positions(model_type):
    """The stock model's own error, as on a GPU an assertion that fails would end all that the process has there."""
    stock = base_model(model_type)
    errors = []
    for model in (stock, accelerate_model(copy.deepcopy(stock))):
        with pytest.raises(RuntimeError) as raised:
            model(input_ids=torch.full((1, stock.config.max_position_embeddings + 1), 7))
        errors.append(str(raised.value))
    assert errors[0] == errors[1] and explain(model).whole_calls == {"more tokens than positions": 1}


@pytest.mark.parametrize("name", ["RobertaModel", "RobertaForSequenceClassification"])
def test_an_encoder_without_layers(name):
    stock = tiny_model(getattr(transformers, name), "roberta", **NO_DROPOUT, num_hidden_layers=0).eval()
    fast, inputs = accelerate_model(copy.deepcopy(stock)), random_inputs(RIGHT, stock.config)
    got, expected = fast(**inputs)[0], stock(**inputs)[0]
    real = RIGHT.bool() if got.dim() == 3 else slice(None)
    torch.testing.assert_close(got[real], expected[real])


def test_restored_pickled_and_saved(tmp_path):
    model = base_model("bert")
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    inputs = random_inputs(RIGHT, model.config)
    stock = copy.deepcopy(model)(**inputs, output_hidden_states=True)
    expected = accelerate_model(model)(**inputs).last_hidden_state
    assert isinstance(model, FastBaseModel) and [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model) and torch.equal(again(**inputs).last_hidden_state, expected)
    model.save_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path).config.architectures == ["BertModel"]
    recorded = model(**inputs, output_hidden_states=True)
    assert len(recorded.hidden_states) == len(stock.hidden_states) == 4
    restore_model(model)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    assert not {"fast_options", "stock_calls", "whole_calls"} & set(model.__dict__)
    assert torch.equal(model(**inputs).last_hidden_state, stock.last_hidden_state)


def test_a_pickle_records_hidden_states_in_another_process(tmp_path):
    """Hugging Face finds by the class what a model can record."""
    model, path = accelerate_model(base_model()), tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, random_inputs(RIGHT, model.config))))
    program = (
        f"import pickle; model, inputs = pickle.loads(open({str(path)!r}, 'rb').read())\n"
        "print(len(model(**inputs, output_hidden_states=True).hidden_states))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4"


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "learning"])
def test_gradients_reach_checkpointed_layers_over_frozen_embeddings(frozen):
    models = trio(base_model().train())
    inputs, found = random_inputs(RIGHT, models.stock.config), []
    for model in models:
        model.embeddings.requires_grad_(not frozen)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        (model(**inputs).last_hidden_state[RIGHT.bool()] ** 3).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    assert_close_as_torch(*found, factor=3)
    assert_packed(models.fast)


def test_masked_language_models_pack_once():
    models = trio(tiny_model(RobertaForMaskedLM))
    inputs = tiny_inputs(models.stock, labels=None)
    labels = torch.where((RIGHT.bool()) & (torch.arange(17) % 3 == 0), inputs["input_ids"], -100)
    losses = [model(**inputs, labels=labels).loss.detach()[None] for model in models]
    assert_close_as_torch(*losses)
    assert_packed(models.fast)


def test_resized_embeddings_stay_packed():
    models = trio(base_model())
    for model in models:
        model.resize_token_embeddings(200, mean_resizing=False)
        nn.init.ones_(model.embeddings.word_embeddings.weight[120:].detach())  # drawn anew for each of them
    inputs = random_inputs(RIGHT, models.stock.config)
    inputs["input_ids"][0, :3] = 180
    assert_close_as_torch(*(model(**inputs).last_hidden_state[RIGHT.bool()].detach() for model in models))
    assert_packed(models.fast)


def test_half_precision_tables_under_an_encoder_of_their_own():
    """bfloat16 throughout, in plain PyTorch on the CPU: statistics are float32 as in torch's own LayerNorm."""
    stock = base_model().bfloat16()
    fast = accelerate_model(copy.deepcopy(stock), backend="torch")
    inputs, exact = random_inputs(RIGHT, stock.config), copy.deepcopy(stock).double()
    assert_close_as_torch(*(m(**inputs).last_hidden_state[RIGHT.bool()].detach() for m in (fast, stock, exact)))


def test_distilbert_built_by_hand_and_the_model_inside_another():
    pair = nn.ModuleDict({"a": DistilBertModel(tiny_config("distilbert")), "b": RobertaModel(tiny_config())})
    randomize(pair)
    accelerate_model(pair)
    assert all(isinstance(model, FastBaseModel) for model in pair.values())
    restore_model(pair)
    assert [type(model) for model in pair.values()] == [DistilBertModel, RobertaModel]
