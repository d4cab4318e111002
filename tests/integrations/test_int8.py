"""precision="int8": close to fp32 on a real model, in inference alone; dropped, released, saved and loaded without surprise."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
)

from roberta_fast import (
    FastOptions,
    FastRobertaEncoder,
    accelerate_model,
    check_parity,
    dispatch,
    explain,
    patch_transformers,
    release_weights,
    restore_model,
    save_quantized,
)
from roberta_fast.demo import embed_all, neighbours, read_sentences, tokenize
from roberta_fast.int8 import Int8Linears
from roberta_fast.testing import MASKS, ragged_mask, random_inputs, randomize, tiny_config

pytestmark = pytest.mark.skipif(
    dispatch.load_cpp() is not None or not torch.ops.roberta_fast_cpp.int8_linear_is_fast(),
    reason=str(dispatch.load_cpp() or "this processor has no AVX-512 VNNI"),
)
MASK = MASKS["right padding"]


def tiny(model_class=RobertaForSequenceClassification, model_type="roberta", **overrides):
    return randomize(model_class(tiny_config(model_type, **overrides)), std=0.1).eval()


@pytest.fixture
def stock():
    return tiny()


@pytest.fixture
def model(stock):
    return accelerate_model(copy.deepcopy(stock), precision="int8")


@pytest.fixture
def inputs(stock):
    return random_inputs(MASK, stock.config)


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits


def int8_layers(model):
    return sum(not isinstance(layer.copies, str) for m in model.modules() if hasattr(m, "fp32_calls") for layer in m.layer)


def test_minilm(checkpoint):
    """Every text's embedding, and the order of its neighbours wherever fp32 tells two apart by more than 0.02; where another text
    becomes the nearest, the two were as good as equally near."""
    model, tokenizer = AutoModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    texts = read_sentences(None)
    batches = tokenize(tokenizer, model.config, texts, 32, "cpu")
    wanted = embed_all(accelerate_model(model), batches)
    got = embed_all(accelerate_model(model, precision="int8", on_unsupported="error"), batches)
    cosines = (got * wanted).sum(1)
    assert cosines.min() >= 0.999 and cosines.mean() >= 0.9995
    pairs = [[{p["text"], p["nearest"]} for p in neighbours(texts, e, shown=4)] for e in (wanted, got)]
    assert pairs[0] == pairs[1]
    exact, rough = ((e @ e.T).fill_diagonal_(-1) for e in (wanted, got))
    lost = exact.amax(1) - exact.gather(1, rough.argmax(1)[:, None])[:, 0]
    assert (lost > 0).sum() <= 0.05 * len(texts) and lost.max() < 0.01
    nearer, still_nearer = (e[:, :, None] - e[:, None] for e in (exact, rough))
    assert (still_nearer[nearer > 0.02] > 0).all()
    parity = check_parity(model, batches[0])
    assert 0.995 < parity.cosine < 0.99999, "of single tokens, which vary more than their means"
    assert explain(model).fallbacks == () and explain(model).fp32_calls == {}


def test_sentence_transformers(checkpoint):
    st = pytest.importorskip("sentence_transformers", reason="the package sentence-transformers is not installed")
    model = st.SentenceTransformer(checkpoint, device="cpu")
    pair = ["A man is eating food.", "A man is eating a piece of bread."]
    accelerate_model(model, precision="int8", on_unsupported="error")
    before = model.encode(pair)
    assert model.similarity(*before).item() == pytest.approx(0.755, abs=0.005), "the published model's similarity"
    again = release_weights(model).encode(pair)
    assert (before == again).all() and "fp32 weights released" in str(explain(model))


def test_outputs_and_what_stays_as_it_was(stock, model, inputs, tmp_path):
    fp32, int8 = logits(stock, inputs), logits(model, inputs)
    assert not torch.equal(int8, fp32) and torch.allclose(int8, fp32, atol=0.1)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True))
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in stock.named_buffers()]
    for name, m in (("stock", stock), ("int8", model)):
        m.save_pretrained(tmp_path / name)
    assert (tmp_path / "stock/model.safetensors").read_bytes() == (tmp_path / "int8/model.safetensors").read_bytes()
    restored = restore_model(model)
    assert torch.equal(logits(restored, inputs), fp32)
    assert all("int8" not in m.__dict__ and "fp32_calls" not in m.__dict__ for m in restored.modules())


def test_explain(model):
    explanation = explain(model)
    assert explanation.backends["int8_linear"] == ("cpp", "none") and explanation.fallbacks == ()
    assert "precision: int8 linear layers in 3 of 3 layers" in str(explanation)
    assert "int8" not in str(explain(accelerate_model(model)))


@pytest.mark.parametrize("model_type", ["roberta", "bert", "distilbert", "electra"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_families_and_activations(model_type, activation):
    model = randomize(
        AutoModel.from_config(
            tiny_config(model_type, **{"activation" if model_type == "distilbert" else "hidden_act": activation})
        ),
        std=0.1,
    )
    inputs = random_inputs(MASK, model.config)
    parity = check_parity(accelerate_model(model.eval(), precision="int8", on_unsupported="error"), inputs)
    assert 1e-6 < 1 - parity.cosine < 5e-3


def test_deterministic_holds(stock):
    """A text has the same bits alone and in a batch."""
    model = accelerate_model(stock, precision="int8", deterministic=True, on_unsupported="error")
    inputs = random_inputs(ragged_mask([9, 3, 17, 1]), stock.config)
    together = logits(model, inputs)
    for i, length in enumerate([9, 3, 17, 1]):
        alone = {name: value[i : i + 1, :length] for name, value in inputs.items()}
        assert torch.equal(logits(model, alone), together[i : i + 1])


def train(model):
    model.train()
    model.eval()


def load(model):
    model.load_state_dict(model.state_dict())


def cast(model):
    model.bfloat16()
    model.float()


def replace_linear(model):
    for layer in model.roberta.encoder.layer:
        dense = layer.output.dense
        layer.output.dense = nn.Linear(dense.in_features, dense.out_features)
        layer.output.dense.load_state_dict(dense.state_dict())


def replace_weight(model):
    for layer in model.roberta.encoder.layer:
        layer.attention.self.key.weight = nn.Parameter(layer.attention.self.key.weight.detach().clone())


DROPS = {
    "train": (train, r"train\(\) dropped them; accelerate_model\(model, precision='int8'\) makes them again"),
    "load_state_dict": (load, r"load_state_dict\(\) dropped them"),
    "dtype": (cast, r"a move to torch.bfloat16 on cpu dropped them"),
    "another linear": (replace_linear, r"a replaced output \(Linear\) dropped them"),
    "another weight": (replace_weight, r"a replaced key \(Linear\) dropped them"),
}


@pytest.mark.parametrize("name", DROPS)
def test_what_drops_the_copies(name, stock, model, inputs):
    """Then the model computes in fp32, with a warning; explain says what dropped them, and accelerate_model makes them anew."""
    change, reason = DROPS[name]
    int8 = logits(model, inputs)
    change(model)
    if name.startswith("another"):
        logits(model, inputs)  # notices
    with pytest.warns(RuntimeWarning, match="does not compute in 8 bits: 8-bit weights: " + reason):
        fp32 = logits(model, inputs)
    rounded = copy.deepcopy(stock)
    cast(rounded) if name == "dtype" else None
    assert torch.allclose(fp32, logits(rounded, inputs), atol=1e-5)
    logits(model, inputs)
    assert list(explain(model).fp32_calls.values()) == [2]
    (fallback,) = explain(model).fallbacks
    assert fallback.startswith("no int8 weights: ") and fallback.endswith("(3 times)")
    again = logits(accelerate_model(model, precision="int8"), inputs)
    assert name == "dtype" or torch.equal(again, int8)
    assert explain(model).fallbacks == () and explain(model).fp32_calls == {}


def test_what_keeps_the_copies(model, inputs):
    int8 = logits(model, inputs)
    for change in (lambda: model.eval(), lambda: model.to("cpu"), lambda: model.float(), lambda: model.requires_grad_(False)):
        change()
        assert torch.equal(logits(model, inputs), int8)
    assert int8_layers(model) == 3


def test_copies_are_frozen(model, inputs):
    """An edit in place is not seen until accelerate_model is called again."""
    int8 = logits(model, inputs)
    for layer in model.roberta.encoder.layer:
        layer.output.dense.weight.data.mul_(1.5)
        layer.output.dense.bias.data.add_(0.5)
    assert torch.equal(logits(model, inputs), int8)
    changed = logits(accelerate_model(model, precision="int8"), inputs)
    assert not torch.allclose(changed, int8, atol=1e-3)
    assert torch.allclose(changed, logits(restore_model(model), inputs), atol=0.1)


def test_an_adapter_on_one_layer(stock, inputs):
    """That layer computes in fp32, the others go on; the adapter is not passed over."""

    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2 * self.base(x)

    model = accelerate_model(copy.deepcopy(stock), precision="int8", on_unsupported="ignore")
    for m in (stock, model):
        attention = m.roberta.encoder.layer[1].attention.self
        attention.query = Doubled(attention.query)
    assert torch.allclose(logits(model, inputs), logits(stock, inputs), atol=0.1)
    assert int8_layers(model) == 2
    assert any("a replaced query (Doubled) dropped them" in reason for reason in explain(model).fallbacks)
    accelerate_model(model, precision="int8")
    assert any("no int8 weights: query is a Doubled" in reason for reason in explain(model).fallbacks)


def test_lora(stock, inputs):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
    models = []
    for precision in (None, "int8"):
        torch.manual_seed(0)
        base = accelerate_model(copy.deepcopy(stock), precision=precision, on_unsupported="ignore")
        models.append(peft.get_peft_model(base, peft.LoraConfig(**config)).eval())
    assert torch.allclose(*(logits(m, inputs) for m in models), atol=1e-5), "every layer has an adapter, so all is fp32"
    assert int8_layers(models[1]) == 0


def test_gradients_are_the_fp32_ones(stock, model, inputs):
    """A call that records gradients, in eval or training, computes in fp32 and says so."""
    with pytest.warns(
        RuntimeWarning, match=r"does not compute in 8 bits: gradients are recorded, which torch.inference_mode\(\)"
    ):
        loss = model(**inputs).logits.square().sum()
    loss.backward()
    wanted = accelerate_model(stock)(**inputs).logits.square().sum()
    wanted.backward()
    assert torch.equal(loss, wanted)
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert int8_layers(model) == 3
    model.train()
    model(**inputs).logits.sum().backward()
    assert int8_layers(model) == 0


def test_layers_alone_that_learn_are_not_passed_over(model, inputs):
    """Frozen embeddings give states without gradients, yet the layers want theirs."""
    model.roberta.embeddings.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="gradients are recorded"):
        model(**inputs).logits.sum().backward()
    assert model.roberta.encoder.layer[0].output.dense.weight.grad is not None


@pytest.mark.filterwarnings("ignore:roberta_fast")
def test_autocast_computes_as_it_would(stock, model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model, inputs), logits(accelerate_model(stock), inputs))
    assert list(explain(model).fp32_calls) == ["autocast computes in another dtype"]


def test_errors_instead_of_fp32(model, inputs):
    accelerate_model(model, precision="int8", on_unsupported="error")
    with pytest.raises(NotImplementedError, match="layers would not compute in 8 bits, gradients are recorded"):
        model(**inputs)
    model.train()(**inputs)  # training is in fp32 by definition
    model.eval()
    with pytest.raises(NotImplementedError, match=r"layers would not compute in 8 bits, 8-bit weights: train\(\) dropped them"):
        logits(model, inputs)


@pytest.mark.parametrize(("model_class", "labels"), [(RobertaForQuestionAnswering, 2), (RobertaForSequenceClassification, 1)])
def test_parity_of_single_numbers(model_class, labels, inputs):
    """A number a token or a text has a cosine too, which stale copies lower."""
    model = accelerate_model(tiny(model_class, num_labels=labels), precision="int8")
    assert 0.99 < check_parity(model, inputs).cosine < 1
    with torch.no_grad():
        for layer in model.roberta.encoder.layer:
            layer.output.dense.weight.mul_(-3)
    assert check_parity(model, inputs).cosine < 0.9


@pytest.mark.parametrize("bias", [nn.Parameter(torch.ones(160)), None], ids=["another", "none"])
@pytest.mark.filterwarnings("ignore:roberta_fast")
def test_a_replaced_bias(stock, model, inputs, bias):
    for changed in (stock, model):
        changed.roberta.encoder.layer[1].intermediate.dense.bias = bias
    assert (logits(model, inputs) - logits(stock, inputs)).abs().max() < 0.1
    assert int8_layers(model) == 2 and "a replaced intermediate (Linear) dropped them" in str(explain(model))


@pytest.mark.filterwarnings("ignore:roberta_fast")
def test_weights_that_cannot_be_copied(stock, inputs):
    half = accelerate_model(copy.deepcopy(stock).bfloat16(), precision="int8")
    assert "query is torch.bfloat16 on cpu; they serve float32 on the CPU" in str(explain(half))
    assert not set(explain(half).backends) & set(Int8Linears.operations), "what nothing computes with has no line"
    with pytest.warns(RuntimeWarning, match="does not compute in 8 bits: 8-bit weights: query is torch.bfloat16"):
        logits(half, inputs)
    with torch.no_grad():
        stock.roberta.encoder.layer[1].intermediate.dense.weight[0, 0] = torch.nan
    broken = accelerate_model(stock, precision="int8")
    assert "intermediate: weight must be finite" in str(explain(broken)) and int8_layers(broken) == 2
    assert logits(broken, inputs).isnan().all()


REFUSALS = {
    "other": (lambda: FastOptions(precision="int4"), r"precision='int4' is not one of \(None, 'int8', 'fp8'\)"),
    "patch": (lambda: patch_transformers(precision="int8"), "precision='int8' copies weights that are loaded: call accelerate"),
    "stock": (lambda: release_weights(tiny()), r"is not accelerated: call accelerate_model\(model, precision='int8'\)"),
    "fp32": (lambda: release_weights(accelerate_model(tiny())), "a layer of .* has no 8-bit weights: none were made"),
    "save fp32": (lambda: save_quantized(accelerate_model(tiny()), "nowhere"), "has no 8-bit weights: none were made"),
    "save another": (lambda: save_quantized(nn.Linear(2, 2), "nowhere"), "model must be a Hugging Face model .* got Linear"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_value(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
    assert not Path("nowhere").exists()


def test_an_encoder_of_ones_own():
    model = tiny(BertModel, "bert")
    inputs = random_inputs(MASK, model.config)
    with torch.inference_mode():
        wanted = model(**inputs).pooler_output
        model.encoder = FastRobertaEncoder.from_hf(model.encoder, FastOptions(precision="int8", on_unsupported="error"))
        got = model(**inputs).pooler_output
    assert not torch.equal(got, wanted) and torch.allclose(got, wanted, atol=0.1)


def test_pickles_and_copies(model, inputs):
    for released in (False, True):
        model = release_weights(model) if released else model
        expected, buffer = logits(model, inputs), io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert torch.equal(logits(again, inputs), expected) and int8_layers(again) == 3
            assert ("released" in str(explain(again))) == released


def test_compiles_whole():
    """Released weights included: nothing may touch them."""
    model = release_weights(accelerate_model(tiny(num_hidden_layers=1), precision="int8"))
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([9, 3, 17, 2], [4, 4, 4, 19, 7], [11, 2, 30]):
        inputs = random_inputs(ragged_mask(lengths), model.config)
        assert torch.equal(logits(compiled, inputs), logits(model, inputs))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, "a new length mix must not compile again"
