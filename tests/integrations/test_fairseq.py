"""Real fairseq checkpoints become Hugging Face models that fill masks as they should; wrong and hostile files are refused."""

import argparse
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import roberta_fast
from roberta_fast.cli import main
from roberta_fast.fairseq import from_fairseq, tokenizer_of

# Germline human variable regions (IGHV3-23*01 with IGHJ4, IGKV1-39*01 with IGKJ1; IMGT), which a model of antibodies knows.
GERMLINE = {
    "checkpoint_vh.pt": "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    "WGQGTLVTVSS",
    "checkpoint_vl.pt": "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQSYSTP"
    "WTFGQGTKVEIK",
}
# Of logits, by three bits of mantissa in each factor of the encoder's products; measured 0.9995 and 0.9987.
FP8_COSINE = {"checkpoint_vh.pt": 0.999, "checkpoint_vl.pt": 0.998}


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec("sapiens")
    if spec is None:
        pytest.skip("not installed: sapiens, which carries fairseq checkpoints")
    return Path(spec.origin).parent / "models" / "v1"


@pytest.mark.parametrize("name", GERMLINE)
def test_a_real_checkpoint_fills_masks(name, folder, tmp_path, capsys):
    """Each residue masked in turn: the stock model of the written folder gives back most of them, and the fast ones the same."""
    assert main(["convert", str(folder / name), str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: RobertaForMaskedLM, 4 layers × 128, with a tokenizer\n"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    residues = GERMLINE[name]
    ids = tokenizer(" ".join(residues), return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, -1] == tokenizer.eos_token_id and ids.shape[1] == len(residues) + 2
    place = torch.arange(len(residues))
    rows = ids.repeat(len(residues), 1)
    rows[place, place + 1] = tokenizer.mask_token_id
    with torch.no_grad():
        stock = model(rows).logits
        fast = roberta_fast.accelerate_model(model)(rows).logits
        fp8 = roberta_fast.accelerate_model(roberta_fast.restore_model(model), precision="fp8", backend="torch")(rows).logits
    assert (stock[place, place + 1].argmax(-1) == ids[0, 1:-1]).float().mean() > 0.9
    torch.testing.assert_close(fast, stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(fp8.argmax(-1), stock.argmax(-1))
    assert torch.cosine_similarity(fp8, stock, dim=-1).mean() > FP8_COSINE[name]


@pytest.fixture
def checkpoint(folder, tmp_path):
    """Saves a real checkpoint with changes made to it by ``change(saved)``; returns the file."""

    def changed(change):
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(folder / "checkpoint_vh.pt", map_location="cpu", weights_only=True)
        change(saved)
        torch.save(saved, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    return changed


def test_older_and_newer_layouts(checkpoint, folder):
    """Joined projections; ``encoder.`` names and a ``cfg``; a fine-tuned head and buffers beside the parameters."""
    wanted = from_fairseq(folder / "checkpoint_vh.pt").state_dict()

    def join(saved):
        state = saved["model"]
        for layer in range(4):
            prefix = f"decoder.sentence_encoder.layers.{layer}.self_attn."
            for kind in ("weight", "bias"):
                state[f"{prefix}in_proj_{kind}"] = torch.cat([state.pop(f"{prefix}{role}_proj.{kind}") for role in "qkv"])
        state["decoder.sentence_encoder.version"] = torch.tensor([3.0])

    def renew(saved):
        state = {name.replace("decoder.", "encoder.", 1): tensor for name, tensor in saved["model"].items()}
        state["encoder.sentence_encoder.layernorm_embedding.weight"] = state.pop("encoder.sentence_encoder.emb_layer_norm.weight")
        state["encoder.sentence_encoder.layernorm_embedding.bias"] = state.pop("encoder.sentence_encoder.emb_layer_norm.bias")
        state["classification_heads.mnli.dense.weight"] = torch.zeros(3, 128)
        saved["model"], saved["cfg"] = state, {"model": saved.pop("args")}

    for change in (join, renew):
        got = from_fairseq(checkpoint(change)).state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


class Hostile:
    """What a pickle may carry."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


CHANGES = {
    "code": (lambda c: c.update(extra=Hostile()), r"holds \S*mkdir, which could run code: it is not loaded"),
    "activation": (lambda c: setattr(c["args"], "activation_fn", "swish"), "activation_fn='swish' is not one of"),
    "unknown parameter": (
        lambda c: c["model"].update({"decoder.sentence_encoder.layer_norm.weight": torch.ones(128)}),
        "the parameter decoder.sentence_encoder.layer_norm.weight is in no RoBERTa",
    ),
    "lost parameter": (
        lambda c: c["model"].pop("decoder.sentence_encoder.layers.2.fc2.bias"),
        "encoder.layer.2.output.dense.bias does not fit",
    ),
    "wrong shape": (lambda c: c["model"].update({"decoder.lm_head.bias": torch.ones(7)}), "lm_head.*bias.* does not fit"),
    "no model": (lambda c: c.pop("model"), "it has no 'model'"),
    "no arguments": (lambda c: c.pop("args"), "it has neither 'args' nor 'cfg'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_file_is_refused_by_name(name, checkpoint, tmp_path, capsys, monkeypatch):
    change, message = CHANGES[name]
    monkeypatch.chdir(tmp_path)
    file = checkpoint(change)
    with pytest.raises(ValueError, match=message):
        from_fairseq(file)
    assert main(["convert", str(file), "out"]) == 1
    assert capsys.readouterr().err.startswith("roberta-fast convert: ")
    assert not Path("out").exists() and not Path("it-ran").exists()


@pytest.mark.parametrize("content", [b"", b"some text\n", b"PK\x03\x04 cut off"], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_checkpoint(content, tmp_path, capsys):
    file = tmp_path / "model.pt"
    file.write_bytes(content)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"roberta-fast convert: {file} ")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["convert", str(folder / "checkpoint_vh.pt"), str(tmp_path / "out")]) == 1
    assert "File exists" in capsys.readouterr().err
    assert main(["convert", str(folder / "checkpoint_vh.pt"), str(tmp_path / "new"), "--dict", "nowhere.txt"]) == 1
    assert "argument --dict: 'nowhere.txt' is no file" in capsys.readouterr().err


def test_the_command_overwrites_nothing(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert main(["convert", str(folder / "checkpoint_vh.pt"), str(tmp_path)]) == 1
    assert "holds a model already" in capsys.readouterr().err
    assert main(["convert", "nowhere.pt", str(tmp_path / "new")]) == 1
    assert "'nowhere.pt' is no file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_dictionary_that_does_not_fit(folder, tmp_path, capsys):
    dictionary = tmp_path / "dict.txt"
    dictionary.write_text("A 1\nC 1\n")
    assert main(["convert", str(folder / "checkpoint_vh.pt"), str(tmp_path / "out"), "--dict", str(dictionary)]) == 1
    assert "has 7 symbols, and the model 25" in capsys.readouterr().err
    dictionary.write_text("A 1\nC\n")
    with pytest.raises(ValueError, match=r"line 2, is not 'symbol count': 'C'"):
        tokenizer_of(dictionary, 10)
