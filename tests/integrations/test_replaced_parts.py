"""A model whose layers were changed by hand computes what it did before: such layers run as they are, and ``explain`` says so."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import RobertaForSequenceClassification
from transformers.models.roberta.modeling_roberta import RobertaIntermediate, RobertaOutput, RobertaSelfAttention

from roberta_fast import FastRobertaEncoder, accelerate_model, check_parity, explain, patch_transformers, restore_model
from roberta_fast.testing import ragged_mask, random_inputs, randomize, tiny_config


class Output(RobertaOutput):
    def forward(self, states, residual):
        return super().forward(states, residual) * 2 + 1


class Intermediate(RobertaIntermediate):
    def forward(self, states):
        return super().forward(states) + 0.5


class Attention(RobertaSelfAttention):
    def forward(self, *args, **kwargs):
        states, *rest = super().forward(*args, **kwargs)
        return states * 1.5, *rest


class Gelu(nn.GELU):
    def forward(self, x):
        return super().forward(x) * 1.25


class Noise(nn.Dropout):
    def forward(self, x):
        return x * 1.5


def of_class(part, replacement):
    def change(layer):
        layer.get_submodule(part).__class__ = replacement

    return change


def by(part, replacement):
    def change(layer):
        parent, _, name = part.rpartition(".")
        setattr(layer.get_submodule(parent) if parent else layer, name, replacement())

    return change


def doubled(name):
    def change(layer):
        before = getattr(layer, name)

        def with_arguments(*args, **kwargs):
            return before(*args, **kwargs) * 2

        # Hugging Face counts the chunk function's arguments.
        setattr(layer, name, (lambda attention_output: before(attention_output) * 2) if "chunk" in name else with_arguments)

    return change


CHANGES = {
    "output": (of_class("output", Output), "Output is no class of Hugging Face's"),
    "intermediate": (of_class("intermediate", Intermediate), "Intermediate is no class of Hugging Face's"),
    "attention": (of_class("attention.self", Attention), "Attention is no class of Hugging Face's"),
    "activation": (by("intermediate.intermediate_act_fn", Gelu), "the activation is Gelu"),
    "dropout": (by("output.dropout", Noise), "dropout by a Noise"),
    "dropout with an adapter": (
        by("output.dropout", lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(64, 64))), "dropout by a Sequential"
    ),
    "norm without bias": (by("output.LayerNorm", lambda: nn.LayerNorm(64, bias=False)), None),
    "chunk function": (doubled("feed_forward_chunk"), "a replaced feed_forward_chunk of RobertaLayer"),
    "forward": (doubled("forward"), "a replaced forward of RobertaLayer"),
}  # fmt: skip


@pytest.fixture
def model():
    return randomize(RobertaForSequenceClassification(tiny_config())).eval()


@pytest.fixture
def inputs(model):
    return random_inputs(ragged_mask([3, 9, 5]), model.config)


@pytest.mark.filterwarnings("ignore:roberta_fast. RobertaEncoder takes the stock path:RuntimeWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_computes_what_it_did(name, model, inputs):
    change, reason = CHANGES[name]
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(**inputs).logits
        change(model.roberta.encoder.layer[1])
        wanted = model(**inputs).logits
        assert not torch.allclose(before, wanted, atol=1e-3) or name == "norm without bias", "the change must show"
        got = accelerate_model(model)(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert reason is None or reason in str(explain(model))


def exchange(layer):
    attention = layer.attention.self
    attention.query, attention.value = attention.value, attention.query


LATER = {
    "activation": (by("intermediate.intermediate_act_fn", nn.ReLU), False),
    "function": (by("intermediate.intermediate_act_fn", lambda: torch.relu), False),
    "norm": (by("output.LayerNorm", lambda: nn.LayerNorm(64, eps=0.5)), True),
    "linear": (by("attention.self.key", lambda: nn.Linear(64, 64)), True),
    "exchanged": (exchange, True),
}


@pytest.mark.filterwarnings("ignore:roberta_fast:RuntimeWarning")
@pytest.mark.parametrize("name", LATER)
def test_what_is_replaced_after_a_call_is_seen(name, model, inputs):
    change, stays_fast = LATER[name]
    stock = copy.deepcopy(model)
    accelerate_model(model)
    with torch.no_grad():
        before = model(**inputs).logits
        for changed in (stock, model):
            torch.manual_seed(1)
            layer = changed.roberta.encoder.layer[1]
            if name == "function":
                del layer.intermediate.intermediate_act_fn
            change(layer)
        wanted, got = stock(**inputs).logits, model(**inputs).logits
    assert not torch.allclose(before, wanted, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not (stays_fast and explain(model).stock_calls)


def test_layers_that_are_gone_are_forgotten(inputs):
    model = accelerate_model(RobertaForSequenceClassification(tiny_config()))
    with torch.no_grad():
        model(**inputs)
    layer = weakref.ref(model.roberta.encoder.layer[0])
    del model
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("probability", ["identity", 1.0])
def test_dropouts_that_drop_nothing_or_all_train(probability, model, inputs):
    for layer in model.roberta.encoder.layer:
        for part in (layer.attention.output, layer.output):
            part.dropout = nn.Identity() if probability == "identity" else nn.Dropout(probability)
    stock = copy.deepcopy(model)
    for m in (stock, accelerate_model(model)):
        m.roberta.encoder.train()
        for layer in m.roberta.encoder.layer:
            layer.attention.self.dropout.p = 0.0
            layer.attention.self.dropout.train(False)
    wanted, got = stock(**inputs).logits, model(**inputs).logits
    if probability == "identity":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert got.isfinite().all()


def test_a_mask_for_all_rows(model, inputs):
    ids, row = inputs["input_ids"], torch.tensor([[1] * 6 + [0] * 3])
    ones = torch.ones(9, dtype=torch.int64)
    with torch.no_grad():
        wanted, unmasked = model(ids, attention_mask=row.expand(3, -1)).logits, model(ids, attention_mask=ones).logits
        accelerate_model(model, on_unsupported="error")
        got, got_unmasked = model(ids, attention_mask=row).logits, model(ids, attention_mask=ones).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_unmasked, unmasked, rtol=1e-4, atol=1e-4)


def test_parity_keeps_what_is_not_a_number(model, inputs):
    accelerate_model(model)
    with torch.no_grad():
        model.classifier.out_proj.bias[0] = torch.nan
    parity = check_parity(model, inputs)
    assert parity.max_abs_difference != parity.max_abs_difference and parity.cosine != parity.cosine


def test_parity_looks_into_tuples_and_at_no_token(model, inputs):
    accelerate_model(model)
    parity = check_parity(model, {**inputs, "output_hidden_states": True})
    assert len(parity.outputs) == model.config.num_hidden_layers + 2 and parity.max_abs_difference < 1e-4
    nothing = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
    assert check_parity(model, nothing).max_abs_difference < 1.0


NO_MODELS = {
    "a name": (lambda: accelerate_model("roberta-base"), "model must be a loaded model, .* got 'roberta-base'"),
    "nothing": (lambda: restore_model(None), "model must be a loaded model, .* got None"),
    "a number": (lambda: explain(3), "model must be a loaded model, .* got 3"),
    "a type alone": (lambda: patch_transformers("roberta"), r"model_types must be a list, such as \['roberta'\]"),
    "options": (
        lambda: FastRobertaEncoder(tiny_config(), {"backend": "torch"}),
        "options must be FastOptions or None, got {'backend'",
    ),
    "no config": (lambda: FastRobertaEncoder(None), "model_type=None is not supported"),
    "flat states": (
        lambda: FastRobertaEncoder(tiny_config())(torch.zeros(3, 64)),
        r"hidden_states must be \[B, S, C\].* got \(3, 64\)",
    ),
    "no position": (lambda: FastRobertaEncoder(tiny_config())(torch.zeros(3, 0, 64)), r"with S >= 1, got \(3, 0, 64\)"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_refused_by_name(name):
    call, message = NO_MODELS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_that_is_no_mapping(model):
    with pytest.raises(ValueError, match=r"batch must be a mapping, .* got Tensor"):
        check_parity(accelerate_model(model), torch.zeros(2, 3))
