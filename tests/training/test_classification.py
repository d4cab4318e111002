"""Classification: learns each of GLUE's forms, loads in stock Hugging Face, and stops before training at what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from tiny_tasks import BAD, GOOD, QUICK, csv_file, jsonl_file, reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from roberta_fast import explain
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


def test_predicts_new_texts(trained, tmp_path):
    file = tmp_path / "new.txt"
    file.write_text(f"{GOOD[1]}\n\n{BAD[1]}\n", encoding="utf-8")
    rows = predict(trained[0].output_dir, file, use_cpu=True, disable_tqdm=True)
    assert [(row["text"], row["label"]) for row in rows] == [(GOOD[1], "1"), (BAD[1], "0")]
    assert all(0.5 < row["score"] <= 1 for row in rows)


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


def test_seeds_have_a_mean_and_a_spread(tmp_path, tiny_checkpoint, capsys):
    train = reviews(tmp_path / "train.tsv", 12)
    run(tmp_path, tiny_checkpoint, train, train, seeds="1,2,3", num_train_epochs=1)
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    values = [saved[f"seed-{seed}"]["eval_loss"] for seed in (1, 2, 3)]
    assert len(set(values)) == 3
    assert saved["summary"]["eval_loss"] == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1))}
    assert "over 3 seeds" in capsys.readouterr().out


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


BAD_INPUT = [
    (
        "no such column",
        "a,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {},
        "text_column_names must say which of its columns holds the text: a, label",
    ),
    (
        "a column by name",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"text_column_names": "body"},
        "there is no column 'body'",
    ),
    ("no label column", "text,label\nx,1\ny,0\n", "text,other\nx,1\n", {}, "validation.csv: there is no column 'label'"),
    (
        "unknown label",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\ny,7\n",
        {},
        "validation.csv, line 3: label '7' is in no training example: 0, 1",
    ),
    ("empty label", "text,label\nx,1\ny,\n", "text,label\nx,1\n", {}, "train.csv, line 3: label is empty"),
    ("empty text", "text,label\nx,1\n ,0\n", "text,label\nx,1\n", {}, "train.csv, line 3: text is empty"),
    ("one label", "text,label\nx,1\ny,1\n", "text,label\nx,1\n", {}, "label has one value only: '1'"),
    (
        "no number",
        "text,label\nx,1.5\ny,2.5\n",
        "text,label\nx,1.5\ny,high\n",
        {},
        "validation.csv, line 3: label 'high' is no number",
    ),
    (
        "too long",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"max_seq_length": 200},
        "max_seq_length=200, but the model has 128 positions",
    ),
    (
        "too short",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"max_seq_length": 2},
        "max_seq_length=2 leaves no room for a text: it must be at least 3",
    ),
    (
        "no samples",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"max_eval_samples": 0},
        "max_eval_samples=0 must be at least 1",
    ),
    (
        "no epochs",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"num_train_epochs": -1},
        "num_train_epochs=-1 must be above 0",
    ),
    (
        "one label that is no number",
        "text,label\n" + "".join(f"x,{i}.5\n" for i in range(10)) + 'y,"4,5"\n',
        "text,label\nx,1.5\n",
        {},
        "train.csv, line 12: label '4,5' is no number, as the others are",
    ),
    (
        "weights",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"class_weights": "1,2,3"},
        "class_weights='1,2,3' has 3 weights, but there are 2 labels",
    ),
    (
        "missing number",
        "text,label\nx,1.5\ny,nan\n",
        "text,label\nx,1\n",
        {},
        "train.csv, line 3: label 'nan' is no number, as the others are",
    ),
    ("spaces for a label", "text,label\nx,1\ny, \n", "text,label\nx,1\n", {}, "train.csv, line 3: label is empty"),
    (
        "negative weights",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"class_weights": "1,-1"},
        "class_weights='1,-1' must be finite, none below 0, and not all 0",
    ),
    (
        "weights that are no numbers",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"class_weights": "1,nan"},
        "class_weights='1,nan' must be finite",
    ),
    (
        "no weights",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"class_weights": "0,0"},
        "class_weights='0,0' must be finite, none below 0, and not all 0",
    ),
    (
        "smoothed numbers",
        "text,label\nx,1.5\ny,0.5\n",
        "text,label\nx,1\n",
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor=0.1 is not for classification of this kind",
    ),
    (
        "too smooth",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"label_smoothing_factor": 1.5},
        "label_smoothing_factor=1.5 must lie in",
    ),
    (
        "the label as text",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"text_column_names": "label"},
        "text_column_names: 'label' is the column with the label",
    ),
    (
        "no separator",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"problem_type": "multi_label_classification", "label_separator": ""},
        "label_separator='' divides nothing",
    ),
    (
        "no evaluations to stop by",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"early_stopping_patience": 1, "eval_strategy": "no"},
        "early_stopping_patience=1 has no effect with eval_strategy='no'",
    ),
    (
        "an empty batch of evaluation",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"per_device_eval_batch_size": 0},
        "per_device_eval_batch_size=0 must be at least 1",
    ),
    (
        "a checkpoint that is not there",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"resume_from_checkpoint": "nowhere"},
        "resume_from_checkpoint='nowhere': there is no such folder",
    ),
    (
        "a checkpoint for two seeds",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"resume_from_checkpoint": "nowhere", "seeds": "1,2"},
        "resume_from_checkpoint='nowhere' is of one seed",
    ),
]


@pytest.mark.parametrize(
    ("train", "validation", "flags", "message"), [case[1:] for case in BAD_INPUT], ids=[c[0] for c in BAD_INPUT]
)
def test_stops_before_training(train, validation, flags, message, tmp_path, tiny_checkpoint):
    for name, text in (("train.csv", train), ("validation.csv", validation)):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(tmp_path, tiny_checkpoint, str(tmp_path / "train.csv"), str(tmp_path / "validation.csv"), **flags)
    assert not list(tmp_path.glob("out/checkpoint*"))


def test_a_list_among_labels(tmp_path, tiny_checkpoint):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": ["x", "y"]}]
    with pytest.raises(DataError, match=r"train.jsonl, line 3: label \['x', 'y'\] is not one label, as others are"):
        run(tmp_path, tiny_checkpoint, jsonl_file(tmp_path / "train.jsonl", rows))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": 5, "label": 1}', '{"text": "b", "label": 0}'], "line 1: text 5 is no text"),
        (['{"text": "a", "label": 1}', '{"text": "b", "text": "c", "label": 0}'], "line 2: an object has 'text' twice"),
        (
            ['{"text": "\\ud83d\\ude42", "label": 1}', r'{"text": "b\uD83D", "label": 0}'],
            r"line 2: \\ud83d is half of a character",
        ),
        (['{"text": "a", "labels": []}', '{"text": "b", "labels": []}'], "train.jsonl: there is no label in labels"),
    ],
    ids=["a number for a text", "a name twice", "half a character", "no label at all"],
)
def test_json_that_does_not_fit(lines, message, tmp_path, tiny_checkpoint):
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        run(tmp_path, tiny_checkpoint, str(tmp_path / "train.jsonl"))
    assert not (tmp_path / "out").exists()


def test_early_stopping_needs_something_to_evaluate(tmp_path, tiny_checkpoint):
    with pytest.raises(ValueError, match="early_stopping_patience=1 needs validation data"):
        run(tmp_path, tiny_checkpoint, reviews(tmp_path / "train.tsv", 4), early_stopping_patience=1)


def test_spaces_around_a_label_make_no_other_one(tmp_path, tiny_checkpoint):
    train = csv_file(tmp_path / "train.csv", ("text", "label"), [("a", "good"), ("b", "bad"), ("c", " good ")])
    result = run(tmp_path, tiny_checkpoint, train, max_steps=1)
    assert result.model.config.label2id == {"bad": 0, "good": 1}


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
