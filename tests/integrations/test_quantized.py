"""Models without fp32 weights: released, saved in 8 bits, loaded from there; what would need the weights says so."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from model_trio import MASK, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertForMaskedLM,
    BertModel,
    DistilBertForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from roberta_fast import accelerate_model, check_parity, load_quantized, release_weights, restore_model, save_quantized
from roberta_fast.quantized import FILE, VERSION
from roberta_fast.testing import random_inputs

# Without the instruction the reference runs, warns of it, and is as right.
pytestmark = pytest.mark.filterwarnings("ignore:roberta_fast. int8_.* on cpu")


def tiny(model_class=RobertaForSequenceClassification, model_type="roberta", **overrides):
    return tiny_model(model_class, model_type, **overrides).eval()


@pytest.fixture
def model():
    return accelerate_model(tiny(), precision="int8")


@pytest.fixture
def inputs(model):
    return random_inputs(MASK, model.config)


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits


WITHOUT_FP32 = {
    "train": (lambda m, i: m.train(), RuntimeError, r"train\(\) needs the fp32 weights, but release_weights"),
    "train of a part": (lambda m, i: m.roberta.train(), RuntimeError, r"train\(\) needs the fp32 weights"),
    "train of a layer": (lambda m, i: m.roberta.encoder.layer[1].train(), RuntimeError, r"train\(\) needs the fp32 weights"),
    "attentions": (
        lambda m, i: m(**i, output_attentions=True), RuntimeError, "stock path would run, attentions are requested, but release_w"
    ),
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
        lambda m, i: torch.autocast("cpu", torch.bfloat16)(m)(**i), RuntimeError, "not compute in 8 bits, autocast .* but release"
    ),
    "another linear": (
        lambda m, i: (replace_output(m), logits(m, i)), RuntimeError, r"a replaced output \(Linear\) needs the fp32 weights"
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
    if name not in ("another linear", "dtype", "device"):  # a move has reached the embeddings before
        assert torch.equal(logits(model, inputs), expected), "what was refused changed nothing"


def test_released_models_still_do_what_needs_no_weights(model, inputs):
    expected = logits(model, inputs)
    sizes = [p.shape for p in model.parameters()]
    assert release_weights(release_weights(model)) is model
    model.to("cpu").float().eval()
    accelerate_model(model, precision="int8", backend="auto")
    assert torch.equal(model(**inputs).logits, expected), "no gradients are asked for, with inference_mode or without"
    assert [p.shape for p in model.parameters()] == sizes and "ReleasedWeight" in repr(list(model.parameters()))


def test_memory_falls(tmp_path):
    """Of the process, by what the weights took."""
    code = """
import gc, torch
from transformers import AutoModel
from roberta_fast import accelerate_model, release_weights
from roberta_fast.testing import tiny_config

def mib():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 2}
model = AutoModel.from_config(tiny_config(**sizes)).eval()
accelerate_model(model, precision="int8")
gc.collect()
before = mib()
release_weights(model)
print(before - mib())
"""
    fell = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path).stdout)
    assert fell > 0.9 * 2 * 12 * 768**2 * 4 / 2**20


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns, on devices that have memory."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def test_loading_makes_no_fp32_weights(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "vocab_size": 50}
    model = accelerate_model(tiny(**sizes), precision="int8")
    save_quantized(model, tmp_path)
    with Largest() as loading:
        load_quantized(tmp_path)
    with Largest() as quantizing:
        accelerate_model(model, precision="int8")
    assert loading.bytes < 2 * 64 * 1024 < 4 * 64 * 1024 <= quantizing.bytes


def test_nothing_holds_the_old_weights(model):
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
    loaded = model
    for folder in (tmp_path, tmp_path / "again"):
        save_quantized(loaded, folder)
        assert {p.name for p in folder.iterdir()} - {"again", "tokenizer.json"} == {FILE, "config.json"}
        loaded = load_quantized(folder, on_unsupported="error")
        assert isinstance(loaded, model_class) and not loaded.training
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
        names = set(model.state_dict()) - set(file.keys())
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
