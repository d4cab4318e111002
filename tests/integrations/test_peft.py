"""Adapters of PEFT on an accelerated model compute and train what they do on the stock one."""

import copy

import pytest
import torch
from model_trio import (
    LABELS,
    MASK,
    Trio,
    assert_same_gradients,
    assert_same_outputs,
    assert_same_training_step,
    gradients,
    tiny_inputs,
    tiny_model,
)
from transformers import RobertaForSequenceClassification

from roberta_fast import accelerate_model, explain, restore_model

peft = pytest.importorskip("peft", reason="the package peft is not installed")

LORA = {"r": 4, "init_lora_weights": False, "modules_to_save": ["classifier"]}
INTERMEDIATE = ["intermediate.dense"]
ADAPTERS = {
    "LoRA on query and value": peft.LoraConfig(**LORA, target_modules=["query", "value"]),
    "LoRA on every linear of the encoder": peft.LoraConfig(**LORA, target_modules=["query", "key", "value", "dense"]),
    "LoRA, weight-decomposed": peft.LoraConfig(**LORA, target_modules=["key", "output.dense"], use_dora=True),
    "IA3": peft.IA3Config(
        init_ia3_weights=False, target_modules=["key", "value", *INTERMEDIATE], feedforward_modules=INTERMEDIATE
    ),
}


def adapted(model, adapter):
    """``model`` with a random adapter, the same one each time."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, copy.deepcopy(adapter)).train()


@pytest.fixture
def base():
    return tiny_model(RobertaForSequenceClassification)


@pytest.fixture
def inputs(base):
    """So many texts that the largest error of their logits says something about errors, on any processor."""
    return tiny_inputs(base, MASK.repeat(16, 1), LABELS.repeat(16))


@pytest.fixture(params=["accelerated before", "accelerated after"])
def models(request, base, adapter):
    stock, exact = adapted(copy.deepcopy(base), adapter), adapted(copy.deepcopy(base), adapter).double()
    if request.param == "accelerated before":
        return Trio(adapted(accelerate_model(copy.deepcopy(base)), adapter), stock, exact)
    return Trio(accelerate_model(adapted(copy.deepcopy(base), adapter)), stock, exact)


@pytest.fixture(params=ADAPTERS.values(), ids=ADAPTERS)
def adapter(request):
    return request.param


def test_an_adapter_computes_and_trains_as_on_the_stock_model(models, base, inputs):
    assert_same_outputs(models, inputs)
    plain = base(**inputs).logits
    assert (models.fast(**inputs).logits - plain).abs().max() > 0.1, "the adapter must count"
    with models.fast.disable_adapter():
        assert torch.allclose(models.fast(**inputs).logits, plain, atol=1e-5)
    assert_same_training_step(models, inputs)
    assert explain(models.fast).stock_calls == {}


def test_only_the_adapter_learns(models, inputs):
    before = {name: p.detach().clone() for name, p in models.fast.named_parameters()}
    assert_same_training_step(models, inputs)
    learned = {name for name, p in models.fast.named_parameters() if not torch.equal(p, before[name])}
    assert (
        learned
        == set(gradients(models.fast))
        == {name for name in before if any(mark in name for mark in ("lora_", "ia3_", "modules_to_save"))}
    )


def test_merging_leaves_a_fast_plain_model(models, inputs):
    for model in models:
        model.eval()
    expected = models.exact(**inputs).logits
    merged = Trio(*(model.merge_and_unload() for model in models))
    assert_same_outputs(merged, inputs)
    assert torch.allclose(merged.fast(**inputs).logits.double(), expected, atol=1e-4)
    assert explain(merged.fast).fallbacks == ()
    assert explain(merged.fast).stock_calls == {}
    assert torch.allclose(restore_model(merged.fast)(**inputs).logits.double(), expected, atol=1e-4)


def test_explain_names_what_is_called_as_a_module(base):
    model = accelerate_model(adapted(base, ADAPTERS["LoRA on query and value"]))
    assert explain(model).fallbacks == (
        "query is called as a module: it is a Linear (peft.tuners.lora.layer) (3 times)",
        "value is called as a module: it is a Linear (peft.tuners.lora.layer) (3 times)",
    )
    assert explain(model.merge_and_unload()).fallbacks == ()
    model = accelerate_model(adapted(base, ADAPTERS["LoRA on every linear of the encoder"]))
    assert (
        "linear_gelu is not used: intermediate.dense is a Linear (peft.tuners.lora.layer) (3 times)" in explain(model).fallbacks
    )


def test_an_adapter_is_saved_and_loaded(base, inputs, tmp_path):
    trained = accelerate_model(adapted(copy.deepcopy(base), ADAPTERS["LoRA on query and value"])).eval()
    trained.save_pretrained(tmp_path)
    expected = trained(**inputs).logits
    for model in (copy.deepcopy(base), accelerate_model(copy.deepcopy(base))):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_an_adapter_under_gradient_checkpointing(reentrant, base, inputs):
    """Nothing before the first layer needs a gradient: PEFT makes the embeddings' output need one, by a hook."""
    base = accelerate_model(base)
    checkpointed, exact = copy.deepcopy(base), restore_model(copy.deepcopy(base))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    models = [adapted(model, ADAPTERS["LoRA on query and value"]) for model in (checkpointed, base, exact)]
    models[2].double()
    for model in models:
        model(**inputs).loss.backward()
    assert_same_gradients(*(gradients(model) for model in models))


def prompted(base, method):
    """A trio that learns 5 virtual tokens before each text."""
    method = method(num_virtual_tokens=5, task_type="SEQ_CLS")
    stock, fast = adapted(copy.deepcopy(base), method), adapted(accelerate_model(copy.deepcopy(base)), method)
    fast.load_state_dict(stock.state_dict())
    return Trio(fast, stock, copy.deepcopy(stock).double())


def test_prefix_tuning_takes_the_stock_path(base, inputs):
    """It hands each layer cached keys and values, and a mask that is longer than the text."""
    with pytest.warns(RuntimeWarning, match="takes the stock path: a key-value cache"):
        models = prompted(base, peft.PrefixTuningConfig)
        models.fast(**inputs)
    assert_same_training_step(models, inputs)
    assert (models.fast(**inputs).logits - base(**inputs).logits).abs().max() > 0.1, "the prefix must count"
    assert explain(models.fast).stock_calls == {"a key-value cache": 3}
    accelerate_model(models.fast, on_unsupported="error")
    with pytest.raises(NotImplementedError, match="a key-value cache"):
        models.fast(**inputs)


def test_prompt_tuning_runs_fast(base, inputs):
    """It prepends embeddings; the mask grows with the text."""
    models = prompted(base, peft.PromptTuningConfig)
    assert_same_training_step(models, inputs)
    assert (models.fast(**inputs).logits - base(**inputs).logits).abs().max() > 0.1, "the prompt must count"
    assert explain(models.fast).stock_calls == {}


def frozen_below(name):
    return not name.startswith(("roberta.embeddings", "roberta.encoder.layer.0", "roberta.encoder.layer.1"))


TRAINED = {
    "the last layer and the head": frozen_below,
    "the head": lambda name: name.startswith("classifier"),
    "biases": lambda name: name.endswith("bias"),
    "LayerNorms": lambda name: "LayerNorm" in name,
    "a layer in the middle": lambda name: name.startswith("roberta.encoder.layer.1"),
    "the embeddings": lambda name: name.startswith("roberta.embeddings"),
}


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_frozen_parameters(trained, base, inputs):
    models = Trio(accelerate_model(copy.deepcopy(base)), base, copy.deepcopy(base).double())
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained(name))
    assert_same_training_step(models, inputs)
    assert set(gradients(models.fast)) == {name for name, p in base.named_parameters() if trained(name)}


def test_a_frozen_encoder_saves_nothing_for_backward(base, inputs):
    """Where only the head learns, no operation of the encoder may keep its activations."""
    model = accelerate_model(base).requires_grad_(False)
    model.classifier.requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(**inputs).loss.backward()
    tokens = int(inputs["attention_mask"].sum())
    assert saved and not [shape for shape in saved if shape[:1] == (tokens,)]
