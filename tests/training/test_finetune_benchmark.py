"""The benchmark of fine-tuning: every part of a case is run, recorded with its command, added to what was there, and shown."""

import json
from pathlib import Path

import pytest

from roberta_fast.benchmarks import finetune

SENTENCE = "Mr {0} NNP I-PER\nwent VBD O\nto TO O\nNew NNP I-LOC\nYork{0} NNP I-LOC\n"
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_docs_show_what_was_recorded():
    recorded = finetune.saved(finetune.RESULTS)
    assert recorded["cases"] and finetune.table(recorded) in DOCS.read_text(encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """The files that the benchmark prepares, and enough of wikigold to learn from."""
    columns = [line.split(" ") for line in SENTENCE.splitlines()]
    conll = "\n\n".join("\n".join(f"{row[0].format(i)} {row[-1]}" for row in columns) for i in range(40)) + "\n"
    for part in "abeg":
        path = tmp_path / "data" / "ner" / "btc" / f"{part}.conll"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(conll)
    files = {"ner/wikigold/wikigold.conll": conll, "mlm/en/jane_austen.txt": "A line of text.\n" * 400}
    files["zh/reviews.train.tsv"] = "sentence\tlabel\n" + "很好\t1\n不好\t0\n" * 20
    for name, text in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.slow
def test_every_part_is_recorded(data, tiny_checkpoint, tmp_path, capsys):
    results = tmp_path / "results.json"
    command = ["--data", str(data), "--model", str(tiny_checkpoint), "--work", str(tmp_path / "work"), "--results", str(results)]
    command += ["--cases", "wikigold", "--speed-steps", "2", "--threads", "1"]
    assert finetune.run([*command, "--seeds", "1"]) == 0
    assert finetune.run([*command, "--seeds", "2", "--parts", "scores", "--sides", "fast"]) == 0
    case = json.loads(results.read_text())["cases"]["wikigold"]
    assert [run["seed"] for run in case["scores"]["runs"]["fast"]] == [1, 2]
    fast, stock = (case["scores"]["runs"][side][0]["eval_f1"] for side in ("fast", "stock"))
    assert abs(fast - stock) < 0.1 and case["scores"]["environment"]["versions"]["torch"]
    assert "--model_name_or_path MODEL" in case["scores"]["command"] and str(tmp_path) not in case["scores"]["command"]
    assert len(case["speed"]["train_seconds"]["stock"]) == 1 and case["speed"]["times_faster"]["median"] > 0
    assert abs(case["int8"]["drop_in_points"]["mean"]) <= 100
    capsys.readouterr()
    assert finetune.run(["--show", "--results", str(results)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| wikigold | all | f1 |")
