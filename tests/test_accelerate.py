"""One call makes a model fast and one takes it back; in between it still is the user's model."""

import copy
import filecmp
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import roberta_fast
from roberta_fast import (
    FastOptions,
    FastRobertaEncoder,
    accelerate_model,
    check_parity,
    explain,
    patch_transformers,
    restore_model,
    supported_model_types,
    unpatch_transformers,
)
from roberta_fast.testing import MASKS, random_inputs, randomize, tiny_config

MASK = MASKS["right padding"]


@pytest.fixture
def model():
    return randomize(RobertaForSequenceClassification(tiny_config())).eval()


@pytest.fixture
def inputs(model):
    return random_inputs(MASK, model.config)


def test_same_logits_keys_and_parameters(model, inputs):
    stock = model(**inputs).logits
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert accelerate_model(model) is model
    assert torch.allclose(model(**inputs).logits, stock, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def test_restore_gives_back_the_stock_model(model, inputs):
    before = {name: (type(m), dict.fromkeys(m.__dict__)) for name, m in model.named_modules()}
    stock, attention = model(**inputs).logits, model.config._attn_implementation
    accelerate_model(model)
    assert model.config._attn_implementation == attention
    assert restore_model(model) is model
    assert {name: (type(m), dict.fromkeys(m.__dict__)) for name, m in model.named_modules()} == before
    assert type(model.config._attn_implementation) is str and model.config._attn_implementation == attention
    assert torch.equal(model(**inputs).logits, stock)


def test_accelerating_twice_changes_options_only(model, inputs):
    accelerate_model(model)
    accelerate_model(model, backend="torch")
    assert model.roberta.encoder.fast_options == FastOptions(backend="torch")
    assert restore_model(restore_model(model)) is model


def test_refusals_name_the_value(model):
    with pytest.raises(ValueError, match=r"GPT2Model \(model_type='gpt2'\) has no encoder .* supported are roberta, bert"):
        accelerate_model(GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=9)))
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        accelerate_model(model, backend="cuda")
    with pytest.raises(ValueError, match=r"\['fast'\] do not exist; there are \['backend'"):
        accelerate_model(model, fast=True)
    with pytest.raises(ValueError, match="options must be FastOptions or None, got str"):
        accelerate_model(model, "fast")
    with pytest.raises(ValueError, match="on_unsupported='crash'"):
        FastOptions(on_unsupported="crash")
    with pytest.raises(ValueError, match="encoder must be the encoder of a supported family, got Linear"):
        FastRobertaEncoder.from_hf(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is not accelerated: call accelerate_model first"):
        explain(restore_model(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_replaced_by_hand(attention):
    model = randomize(BertModel(tiny_config("bert", attn_implementation=attention))).eval()
    inputs = random_inputs(MASK, model.config)
    stock = model(**inputs)
    model.encoder = FastRobertaEncoder.from_hf(model.encoder)
    output = model(**inputs)
    assert torch.allclose(output.pooler_output, stock.pooler_output, atol=1e-5)
    assert torch.allclose(output.last_hidden_state[MASK.bool()], stock.last_hidden_state[MASK.bool()], atol=1e-5)


@pytest.mark.parametrize("when", ["before hooks", "after hooks"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["accelerate_model", "from_hf"])
def test_hidden_states_are_padded_and_complete(when, by_hand, model, inputs):
    """Bypassing a layer's __call__ would lose them; handing packed rows to the recording hooks would garble them."""
    if when == "after hooks":
        model(**inputs, output_hidden_states=True)
    stock = copy.deepcopy(model) if when == "before hooks" else restore_model(model)
    expected = stock(**inputs, output_hidden_states=True).hidden_states
    if by_hand:
        model.roberta.encoder = FastRobertaEncoder.from_hf(model.roberta.encoder)
    else:
        accelerate_model(model)
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == model.config.num_hidden_layers + 1
    for state, other in zip(states, expected, strict=True):
        assert state.shape == other.shape
        assert torch.allclose(state[MASK.bool()], other[MASK.bool()], atol=1e-5)
    assert explain(model).fallbacks == (), "recording hooks, once installed, must not slow the model down"
    assert torch.allclose(model(**inputs).logits, stock(**inputs).logits, atol=1e-5)


def test_attentions_come_from_the_model_own_implementation(inputs):
    model = randomize(AutoModel.from_config(tiny_config(attn_implementation="eager"))).eval()
    expected = model(**inputs, output_attentions=True)
    accelerate_model(model)
    with pytest.warns(RuntimeWarning, match="attentions are requested"):
        output = model(**inputs, output_attentions=True)
    assert len(output.attentions) == model.config.num_hidden_layers
    for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(ours, theirs)


def test_a_user_hook_on_a_layer_sees_padded_states(model, inputs):
    seen = []
    accelerate_model(model)
    model.roberta.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(**inputs)
    assert seen == [(*MASK.shape, model.config.hidden_size)]


def test_a_user_hook_inside_a_layer_gets_the_stock_call(model, inputs):
    stock, seen = model(**inputs).logits, []
    accelerate_model(model)
    model.roberta.encoder.layer[1].attention.self.register_forward_hook(lambda m, args, output: seen.append(output[0].shape))
    assert torch.allclose(model(**inputs).logits, stock, atol=1e-5)
    assert seen == [(*MASK.shape, model.config.hidden_size)]
    assert explain(model).fallbacks == ("the stock layer runs: a hook on RobertaSelfAttention",)


def test_a_wrapped_linear_is_called(model, inputs):
    """An adapter has a ``weight`` as well; reading it instead of calling the module would ignore the adapter."""

    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2 * self.base(x)

    for layer in model.roberta.encoder.layer:
        layer.attention.self.query = Doubled(layer.attention.self.query)
        layer.intermediate.dense = Doubled(layer.intermediate.dense)
        layer.output.LayerNorm = Doubled(layer.output.LayerNorm)
    stock = model(**inputs).logits
    assert torch.allclose(accelerate_model(model)(**inputs).logits, stock, atol=1e-5)
    assert any("intermediate.dense is a Doubled" in reason for reason in explain(model).fallbacks)


def test_weights_changed_in_place_are_seen(model, inputs):
    """There are no hidden copies: an edit through .data leaves no trace in a version counter."""
    accelerate_model(model)
    before = model(**inputs).logits
    for layer in model.roberta.encoder.layer:
        layer.attention.self.value.weight.data.mul_(1.5)
        layer.intermediate.dense.weight.data.mul_(0.5)
    after = model(**inputs).logits
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, restore_model(model)(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_recomputes_the_same_dropout(reentrant, model, inputs):
    accelerate_model(model).train()
    layer, calls = model.roberta.encoder.layer[0], []
    layer._block = lambda *args: calls.append(1) or type(layer)._block(layer, *args)

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = gradients()
    assert len(calls) == 1 + 2, "the layer must run again in backward"
    # Recomputing adds the same terms in another order; other dropout would differ by far more. All are seen as one vector, since
    # a key's bias has no gradient but for rounding.
    plain, recomputed = (torch.cat([g.flatten() for g in gradients]) for gradients in (plain, recomputed))
    assert (plain - recomputed).abs().max() <= 1e-5 * plain.abs().max()
    assert explain(model).whole_calls == {}, "the hook that asks for gradients looks at nothing"


@pytest.mark.slow
def test_compiles_whole_for_every_length_mix(model):
    """fullgraph, forward and backward; one graph serves batches of any lengths."""
    model = accelerate_model(randomize(RobertaForSequenceClassification(tiny_config(hidden_dropout_prob=0.0))))
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([9, 3, 17, 2], [4, 4, 4, 19, 7], [11, 2, 30]):
        mask = roberta_fast.testing.ragged_mask(lengths)
        inputs = random_inputs(mask, model.config)
        for m in (model, eager):
            m.eval().zero_grad()
        output, expected = compiled(**inputs), eager(**inputs)
        assert torch.allclose(output.logits, expected.logits, atol=1e-5)
        graphs.append(counter.frame_count)
        for result in (output, expected):
            result.logits.square().sum().backward()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    assert len(set(graphs)) == 1, "a new length mix must not compile again"


def test_pickles_copies_and_saves(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "stock")
    expected = accelerate_model(model)(**inputs).logits
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(**inputs).logits, expected)
        assert type(again.roberta.encoder) is type(model.roberta.encoder)
    model.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "stock" / name, tmp_path / "fast" / name, shallow=False), name
    loaded = RobertaForSequenceClassification.from_pretrained(tmp_path / "fast").eval()
    assert type(loaded.roberta.encoder).__module__.startswith("transformers.")
    assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)


def test_a_pickle_loads_in_a_fresh_process(model, inputs, tmp_path):
    expected = accelerate_model(model)(**inputs).logits
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, inputs, expected = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, cwd=tmp_path)


def test_patch_transformers(tmp_path, inputs):
    stock = randomize(RobertaForMaskedLM(tiny_config())).eval()
    stock.save_pretrained(tmp_path)
    expected = stock(**inputs).logits[MASK.bool()]
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
        patch_transformers(["roberta", "gpt2"])
    try:
        patch_transformers(["roberta"], backend="auto", on_unsupported="error")
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        bert = BertModel(tiny_config("bert"))
        patch_transformers()
        assert explain(BertModel(tiny_config("bert"))).layers == 3
    finally:
        unpatch_transformers()
    assert explain(loaded).fallbacks == ()
    assert loaded.roberta.encoder.fast_options.on_unsupported == "error"
    assert torch.allclose(loaded(**inputs).logits[MASK.bool()], expected, atol=1e-4)
    for untouched in (bert, BertModel(tiny_config("bert")), RobertaForMaskedLM(tiny_config())):
        with pytest.raises(ValueError, match="is not accelerated"):
            explain(untouched)


SHAPES = {
    "roberta-base": ("roberta", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
    "MiniLM": ("bert", {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_falls_back_on_the_models_people_use(shape):
    """In eval and in training, forward and backward, and no call takes the stock path."""
    model_type, sizes = SHAPES[shape]
    model = accelerate_model(AutoModelForMaskedLM.from_config(tiny_config(model_type, **sizes, num_hidden_layers=2)))
    inputs = random_inputs(MASK, model.config)
    for train in (False, True):
        model.train(train)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    explanation = explain(model)
    assert explanation.fallbacks == ()
    assert explanation.stock_calls == {}
    assert "no fallback" in str(explanation)
    assert {backend for pair in explanation.backends.values() for backend in pair} <= {"cpp", "triton", "MKL", "cuBLAS"}


def test_explain_names_what_is_not_fused():
    model = accelerate_model(AutoModel.from_config(tiny_config(hidden_act="relu")))
    assert explain(model).fallbacks == ("linear_gelu is not used: the activation is ReLU (3 times)",)
    model = accelerate_model(AutoModel.from_config(tiny_config(num_attention_heads=8)), backend="torch")
    assert explain(model).backends["attention"] == ("torch", "torch")


def test_check_parity(model, inputs):
    with pytest.raises(ValueError, match="is not accelerated"):
        check_parity(model, inputs)
    accelerate_model(model).train()
    parity = check_parity(model, inputs)
    assert parity.max_abs_difference < 1e-5
    assert parity.cosine > 1 - 1e-6
    assert set(parity.outputs) == {"logits"}
    assert model.training and all(m.training for m in model.modules()), "modes are left as they were"
    layer_class = type(model.roberta.encoder.layer[0])
    original, layer_class._block = layer_class._block, lambda self, rows, batch, parts: original(self, rows, batch, parts) * 1.01
    try:
        assert check_parity(model, inputs).max_abs_difference > 1e-3, "a wrong layer must show"
    finally:
        del layer_class._block


def test_supported_model_types():
    assert supported_model_types()[:2] == ("roberta", "bert")
    assert {"xlm-roberta", "camembert", "distilbert", "electra", "dpr", "bert-generation"} < set(supported_model_types())


def test_import_is_light_and_touches_no_device(tmp_path):
    code = (
        "import sys, roberta_fast.ops; "
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules, 'too much is imported'; "
        "import torch; assert not torch.cuda.is_initialized(); import json; print(json.dumps(dir(roberta_fast)))"
    )
    names = json.loads(subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True).stdout)
    assert set(roberta_fast.__all__) <= set(names)
