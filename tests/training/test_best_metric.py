"""The metric that chooses the best model: what each task can name is known before training, and which direction is better."""

import json

import pytest
from tiny_tasks import BAD, ENGLISH, GOOD, NAMES, QUICK, csv_file, jsonl_file, named_entities, questions, reviews, translations

from roberta_fast.training import FineTuningArguments, finetune
from roberta_fast.training.trainer import UnknownMetricError


def numbers(path):
    return csv_file(path, ("text", "label"), [(text, 0.5 + 2 * (text in GOOD)) for text in (GOOD + BAD) * 2])


def lists(path):
    return jsonl_file(path, [{"text": text, "labels": ["good"] if text in GOOD else []} for text in GOOD + BAD])


def parts_of_speech(path):
    return jsonl_file(path, [{"tokens": name.split(), "tags": ["GIVEN", "FAMILY"]} for name in NAMES["PER"]])


def text(path):
    path.write_text("\n".join([*GOOD, *BAD, *ENGLISH] * 3))
    return str(path)


KINDS = {
    "one label": ("classification", reviews, "a.tsv", {}),
    "several labels": ("classification", lists, "a.jsonl", {}),
    "a number": ("classification", numbers, "a.csv", {}),
    "entities": ("ner", named_entities, "a.conll", {}),
    "parts of speech": ("ner", parts_of_speech, "a.jsonl", {}),
    "answers": ("qa", questions, "a.json", {"max_seq_length": 48, "doc_stride": 8}),
    "answers and none": (
        "qa",
        lambda path: questions(path, without_answer=4),
        "a.json",
        {"max_seq_length": 48, "doc_stride": 8, "version_2_with_negative": True},
    ),
    "translation": (
        "translation",
        lambda path: translations(path, 12),
        "a",
        {"max_source_length": 16, "max_target_length": 8, "num_beams": 1},
    ),
    "generation": ("generation", text, "a.txt", {"block_size": 16}),
}


@pytest.mark.filterwarnings("ignore:roberta_fast.*decoder mode:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_to_choose_by_are_those_that_are_measured(kind, tmp_path, tiny_checkpoint):
    task, write, name, flags = KINDS[kind]
    path = write(tmp_path / name)
    flags = {**QUICK, "model_name_or_path": tiny_checkpoint, "train_file": path, "validation_file": path, "max_steps": 1, **flags}
    if task in ("translation", "generation"):
        del flags["max_seq_length"]
    with pytest.raises(UnknownMetricError, match=r"metric_for_best_model='f2' is none of what is measured: loss") as error:
        finetune(task, **flags, output_dir=str(tmp_path / "out"), metric_for_best_model="f2")
    assert not (tmp_path / "out").exists(), "nothing is computed before"
    listed = str(error.value).partition("measured: ")[2].split(", ")
    finetune(task, **flags, output_dir=str(tmp_path / "out"), metric_for_best_model=listed[-1])
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    found = {name.removeprefix("eval_") for entry in history for name in entry if name.startswith("eval_")}
    assert set(listed) == {name for name in found if not name.endswith(("runtime", "_per_second"))}


def test_several_tasks_name_theirs(tmp_path, tiny_checkpoint):
    files = reviews(tmp_path / "a.tsv", 8), named_entities(tmp_path / "a.conll", 8)
    tasks = [
        f"{name}={task},train_file={file},validation_file={file}"
        for name, task, file in zip(("mood", "names"), ("classification", "ner"), files, strict=True)
    ]
    flags = {**QUICK, "model_name_or_path": tiny_checkpoint, "output_dir": str(tmp_path / "out"), "task": tasks, "max_steps": 1}
    del flags["max_seq_length"]
    with pytest.raises(UnknownMetricError, match=r"measured: mean, mood_loss, mood_accuracy, .*, names_loss, names_precision, "):
        finetune("multitask", **flags, metric_for_best_model="f1")
    assert not (tmp_path / "out").exists()
    finetune("multitask", **flags, metric_for_best_model="names_f1")


@pytest.mark.parametrize(("metric", "is_greater"), [("mse", False), ("eval_mae", False), ("grade_mse", False), ("pearson", True)])
def test_an_error_is_better_where_it_is_smaller(metric, is_greater):
    def chosen(**flags):
        return FineTuningArguments("out", report_to="none", use_cpu=True, metric_for_best_model=metric, **flags)

    assert chosen().greater_is_better is is_greater
    assert chosen(greater_is_better=True).greater_is_better is True
