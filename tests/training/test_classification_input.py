"""Classification stops before training at what is wrong in its files and flags, and says where."""

import pytest
from test_classification import run
from tiny_tasks import csv_file, jsonl_file, reviews

from roberta_fast.training import DataError

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
        "validation data twice",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"validation_split_percentage": 10},
        "validation_split_percentage=10 beside validation_file",
    ),
    (
        "stopping early without checkpoints",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"early_stopping_patience": 1, "save_strategy": "no"},
        "early_stopping_patience=1 ends with the last model, not the best, with save_strategy='no'",
    ),
    (
        "a checkpoint for two seeds",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"resume_from_checkpoint": "nowhere", "seeds": "1,2"},
        "resume_from_checkpoint='nowhere' is of one seed",
    ),
    (
        "no step",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps=0 must be at least 1",
    ),
    (
        "a negative batch",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"per_device_train_batch_size": -3},
        "per_device_train_batch_size=-3 must be at least 0",
    ),
    (
        "negative decay",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"weight_decay": -1.0},
        "weight_decay=-1.0 must be at least 0",
    ),
    (
        "epochs that are no number",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"num_train_epochs": float("nan")},
        "num_train_epochs=nan must be above 0",
    ),
    ("negative rank", "text,label\nx,1\ny,0\n", "text,label\nx,1\n", {"lora_r": -4}, "lora_r=-4 must be 0 or more"),
    (
        "adapters without effect",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"lora_r": 2, "lora_alpha": 0},
        "lora_alpha=0 must be above 0",
    ),
    (
        "dropout of all",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"lora_r": 2, "lora_dropout": 1.0},
        "lora_dropout=1.0 must lie in",
    ),
    (
        "no predictions",
        "text,label\nx,1\ny,0\n",
        "text,label\nx,1\n",
        {"prediction_loss_only": True},
        "prediction_loss_only=True leaves no predictions",
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
