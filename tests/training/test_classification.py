"""Classification: learns each of GLUE's forms, loads in stock Hugging Face, and stops before training at what is wrong."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from tiny_tasks import BAD, GOOD, QUICK, csv_file, jsonl_file, reviews, run_card
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from roberta_fast import explain
from roberta_fast.cli import main
from roberta_fast.training import Classification, DataError, finetune, predict
from roberta_fast.training.classification import MULTI, REGRESSION, SINGLE, classification_metrics


def run(folder, checkpoint, train, validation=None, **flags):
    return finetune(
        "classification",
        **{**QUICK, **flags},
        model_name_or_path=checkpoint,
        train_file=train,
        validation_file=validation,
        output_dir=str(folder / "out"),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint):
    """A classifier of reviews, trained on the fast encoder."""
    folder = tmp_path_factory.mktemp("sentiment")
    train, validation = reviews(folder / "train.tsv"), reviews(folder / "validation.tsv", 16, seed=1)
    return run(folder, tiny_checkpoint, train, validation, num_train_epochs=10, seed=1), validation


def test_learns(trained):
    result, _ = trained
    assert result.metrics["eval_accuracy"] == 1.0 and result.metrics["eval_f1"] == 1.0 and result.metrics["eval_mcc"] == 1.0
    assert explain(result.model).stock_calls == {}


def test_loads_in_stock_hugging_face(trained):
    result, _ = trained
    classify = pipeline("text-classification", result.output_dir)
    assert type(classify.model.roberta.encoder).__module__.startswith("transformers.")
    assert [found["label"] for found in classify([GOOD[0], BAD[0]])] == ["1", "0"]


def test_what_a_run_leaves(trained):
    folder = Path(trained[0].output_dir)
    assert json.loads((folder / "metrics.json").read_text())["eval_accuracy"] == 1.0
    assert (folder / "report.txt").read_text().splitlines()[-2:] == ["0                 8  0", "1                 0  8"]
    assert (folder / "mistakes.txt").read_text() == "no mistakes\n"
    for figure in ("learning_curves.png", "confusion_matrix.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert (
        "pipeline_tag: text-classification" in card and "| eval_accuracy | 1.0000 |" in card and "`learning_rate`: 0.005" in card
    )
    assert "- `train_file`: train.tsv" in card and str(folder.parent) not in card, "paths of this machine say nothing to others"
    assert run_card(folder)["predict"](GOOD[0])[0]["label"] == "1"


def test_predicts_new_texts(trained, tmp_path):
    file = tmp_path / "new.txt"
    file.write_text(f"{GOOD[1]}\n\n{BAD[1]}\n", encoding="utf-8")
    rows = predict(trained[0].output_dir, file, use_cpu=True, disable_tqdm=True)
    assert [(row["text"], row["label"]) for row in rows] == [(GOOD[1], "1"), (BAD[1], "0")]
    assert all(0.5 < row["score"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [(b"a warm film\r\n\r\nwooden acting", None), (b"caf\xe9", "stdin.txt, line 1: byte 0xe9 is not UTF-8"), (b"", "is empty")],
    ids=["texts", "other bytes", "nothing"],
)
def test_predicts_what_comes_by_standard_input(given, message, trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(["predict", "--model", trained[0].output_dir, "--file", "-"]) == (0 if message is None else 1)
    said = capsys.readouterr()
    if message is None:
        assert [json.loads(line)["text"] for line in said.out.splitlines()] == ["a warm film", "wooden acting"]
    else:
        assert message in said.err.splitlines()[-1]


def test_stock_and_fast_learn_the_same(tmp_path, tiny_checkpoint):
    """Without dropout, with equal seeds: the same steps within rounding."""
    config = json.loads((Path(tiny_checkpoint) / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    train, validation = reviews(tmp_path / "train.tsv"), reviews(tmp_path / "validation.tsv", 16, seed=1)
    shared = {"config_name": str(tmp_path / "config.json"), "tokenizer_name": tiny_checkpoint, "logging_steps": 1}
    logits = []
    for fast in (True, False):
        result = run(tmp_path / str(fast), tiny_checkpoint, train, validation, fast=fast, learning_rate=1e-3, **shared)
        model = AutoModelForSequenceClassification.from_pretrained(result.output_dir).eval()
        batch = AutoTokenizer.from_pretrained(result.output_dir)([*GOOD, *BAD], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-3 * logits[1].abs().max()


def test_pairs_with_names_for_labels(tmp_path, tiny_checkpoint):
    rows = [(a, b, "same" if (a in GOOD) == (b in GOOD) else "other") for a in (*GOOD, *BAD) for b in (GOOD[0], BAD[0])]
    train = csv_file(tmp_path / "train.csv", ("premise", "hypothesis", "label"), rows * 2)
    result = run(tmp_path, tiny_checkpoint, train, train, num_train_epochs=1)
    assert result.model.config.label2id == {"other": 0, "same": 1}
    assert "    " + GOOD[0] in (Path(result.output_dir) / "mistakes.txt").read_text()


def test_several_labels_a_text(tmp_path, tiny_checkpoint):
    rows = [
        {"text": a + " . " + b, "labels": sorted({"good" if t in GOOD else "bad" for t in (a, b)})}
        for a in GOOD + BAD
        for b in GOOD + BAD
    ]
    train = jsonl_file(tmp_path / "train.jsonl", rows)
    result = run(tmp_path, tiny_checkpoint, train, train, num_train_epochs=20)
    assert result.model.config.problem_type == MULTI
    assert result.metrics["eval_f1_micro"] > 0.9
    assert set(predict(result.output_dir, train, use_cpu=True, disable_tqdm=True)[0]) == {"text", "labels", "scores"}


def test_a_number(tmp_path, tiny_checkpoint):
    train = csv_file(tmp_path / "train.csv", ("text", "label"), [(t, 0.5 + 2 * (t in GOOD)) for t in (GOOD + BAD) * 4])
    result = run(tmp_path, tiny_checkpoint, train, train, num_train_epochs=30)
    assert result.model.config.problem_type == REGRESSION and result.model.config.num_labels == 1
    assert result.metrics["eval_pearson"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(result.output_dir)
    assert model.config.problem_type == REGRESSION


def test_a_text_may_have_no_label_of_several(tmp_path, tiny_checkpoint):
    """In a csv file as in json; where the kind is not said, an empty label is a missing one."""
    rows = [("warm", "good,long"), ("dull", "bad"), ("so so", ""), ("splendid", "good")] * 3
    train = csv_file(tmp_path / "train.csv", ("text", "label"), rows)
    result = run(tmp_path, tiny_checkpoint, train, train, num_train_epochs=1, problem_type=MULTI)
    assert list(result.model.config.id2label.values()) == ["bad", "good", "long"]
    with pytest.raises(DataError, match=r"train.csv, line 4: label is empty"):
        run(tmp_path / "again", tiny_checkpoint, train, train)


def test_pairs_are_what_a_model_of_pairs_reads(tmp_path, tiny_checkpoint):
    rows = [("warm", "so warm", "1"), ("dull", "bright", "0")] * 4
    train = csv_file(tmp_path / "train.csv", ("sentence1", "sentence2", "label"), rows)
    folder = run(tmp_path, tiny_checkpoint, train, None, num_train_epochs=1).output_dir
    (tmp_path / "new.txt").write_text("one text alone\n", encoding="utf-8")
    quiet = {"use_cpu": True, "disable_tqdm": True}
    with pytest.raises(DataError, match=r"new.txt: .* columns hold the pair of texts that the model reads: text$"):
        predict(folder, tmp_path / "new.txt", **quiet)
    named = csv_file(tmp_path / "new.csv", ("question1", "question2"), [("warm", "cold")])
    assert predict(folder, named, **quiet)[0].keys() == {"question1", "question2", "label", "score"}


def test_other_labels_than_the_heads_are_told(trained, tmp_path):
    folder = trained[0].output_dir
    three = csv_file(tmp_path / "three.csv", ("text", "label"), [("a", "x"), ("b", "y"), ("c", "z")] * 3)
    two = csv_file(tmp_path / "two.csv", ("text", "label"), [("a", "x"), ("b", "y")] * 3)
    for file, begins in ((three, "a new head begins"), (two, "the head begins with the weights of as many other labels")):
        with pytest.warns(UserWarning, match=f"has labels that the trained head lacks, which has 0, 1: {begins}"):
            run(tmp_path / Path(file).stem, folder, file, None, num_train_epochs=1)


def test_seeds_have_a_mean_and_a_spread(tmp_path, tiny_checkpoint, capsys):
    train = reviews(tmp_path / "train.tsv", 12)
    run(tmp_path, tiny_checkpoint, train, train, seeds="1,2,3", num_train_epochs=1)
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    values = [saved[f"seed-{seed}"]["eval_loss"] for seed in (1, 2, 3)]
    assert len(set(values)) == 3
    assert saved["summary"]["eval_loss"] == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1))}
    said = capsys.readouterr().out
    assert "over 3 seeds" in said and f"all of them: {tmp_path / 'out'}; the best one:" in said


@pytest.mark.parametrize(
    ("targets", "changed"),
    [("query", {"query"}), ("all-linear", {"query", "key", "value", "dense"})],
)
def test_what_gets_adapters(targets, changed, tmp_path, tiny_checkpoint):
    pytest.importorskip("peft")
    result = run(tmp_path, tiny_checkpoint, reviews(tmp_path / "t.tsv", 8), lora_r=2, lora_target_modules=targets, max_steps=2)
    before = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint).roberta.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(result.output_dir).roberta.state_dict()
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == changed


def test_adapters_are_trained_and_merged(tmp_path, tiny_checkpoint):
    pytest.importorskip("peft")
    train = reviews(tmp_path / "train.tsv")
    result = run(tmp_path, tiny_checkpoint, train, train, lora_r=4, num_train_epochs=8, learning_rate=2e-2)
    assert (Path(result.output_dir) / "adapter/adapter_model.safetensors").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(result.output_dir)
    before = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint)
    changed = {
        n
        for (n, p), q in zip(model.roberta.named_parameters(), before.roberta.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed == {f"encoder.layer.{i}.attention.self.{name}.weight" for i in (0, 1) for name in ("query", "value")}
    assert result.metrics["eval_accuracy"] > 0.9


def test_early_stopping_and_the_best_model(tmp_path, tiny_checkpoint):
    train = reviews(tmp_path / "train.tsv")
    run(tmp_path, tiny_checkpoint, train, train, num_train_epochs=40, early_stopping_patience=2)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["epoch"] < 40 and state["best_metric"] == 1.0


def test_chinese_by_words(tmp_path, tiny_checkpoint):
    pytest.importorskip("jieba")
    train = csv_file(tmp_path / "train.csv", ("text", "label"), [("这本书很好看", 1), ("房间又小又脏", 0)] * 6)
    result = run(tmp_path, tiny_checkpoint, train, train, jieba=True, num_train_epochs=1)
    assert json.loads((Path(result.output_dir) / "finetune.json").read_text())["data"]["jieba"] is True


@pytest.mark.parametrize("weights", ["balanced", "0.2,1"])
def test_class_weights(weights, tmp_path, tiny_checkpoint):
    train = reviews(tmp_path / "train.tsv", 12)
    result = run(tmp_path, tiny_checkpoint, train, class_weights=weights, num_train_epochs=1, optim="adafactor")
    assert result.metrics["train_loss"] and len(predict(result.output_dir, train)) == 12, "they are for training"


@pytest.mark.parametrize("kind", ["dict", "files"])
def test_a_data_set_by_name(kind, tmp_path, tiny_checkpoint):
    """A folder, as ``--dataset_name`` takes it: by its splits, with the names of its labels."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    rows = [{"text": text, "label": text in GOOD} for text in GOOD + BAD]
    splits = {name: datasets.Dataset.from_list(rows * 8, features=features) for name in ("train", "validation", "test")}
    if kind == "dict":
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        for name, split in splits.items():
            split.to_parquet(tmp_path / "data" / f"{name}.parquet")
    result = run(tmp_path, tiny_checkpoint, None, dataset_name=str(tmp_path / "data"), num_train_epochs=10, seed=1)
    assert result.model.config.label2id == {"bad": 0, "good": 1} and result.metrics["eval_accuracy"] > 0.9
    assert [row["label"] for row in result.predictions[:6]] == ["good"] * 3 + ["bad"] * 3


def test_a_label_outside_the_head(trained, tmp_path):
    file = csv_file(tmp_path / "more.csv", ("text", "label"), [(GOOD[0], 1), (BAD[0], 2)])
    with pytest.raises(DataError, match=r"more.csv, line 3: label '2' is none of the head's labels: 0, 1"):
        finetune(
            "classification", **QUICK, model_name_or_path=trained[0].output_dir, validation_file=file, output_dir=str(tmp_path)
        )


def test_a_model_without_a_head_is_not_evaluated(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="has no classification head yet"):
        finetune(
            "classification",
            **QUICK,
            model_name_or_path=tiny_checkpoint,
            validation_file=reviews(tmp_path / "v.tsv"),
            output_dir="x",
        )


def test_a_model_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    train = reviews(tmp_path / "train.tsv", 4)
    with pytest.raises(ValueError, match=f"model_name_or_path='{tmp_path}': the folder has no model that can be read: "):
        finetune("classification", **QUICK, model_name_or_path=str(tmp_path), train_file=train, output_dir="x")


def test_a_flag_that_does_not_exist(tiny_checkpoint):
    with pytest.raises(ValueError, match="'batchsize': the task classification has no such flag"):
        finetune("classification", model_name_or_path=tiny_checkpoint, batchsize=3)


@pytest.mark.parametrize("labels", [2, 4])
def test_metrics_are_those_of_scikit_learn(labels):
    generator = np.random.default_rng(labels)
    logits, targets = generator.normal(size=(60, labels)), generator.integers(0, labels, 60)
    found, chosen = classification_metrics(logits, targets, SINGLE), logits.argmax(-1)
    average = "binary" if labels == 2 else "macro"
    assert found["f1"] == pytest.approx(oracle.f1_score(targets, chosen, average=average))
    assert found["mcc"] == pytest.approx(oracle.matthews_corrcoef(targets, chosen))
    assert Classification.metric in found
