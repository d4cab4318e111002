"""Hyper-parameter search: the best trial is what is saved, failures are recorded, and what was interrupted goes on from there."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_tasks import QUICK, named_entities, reviews
from transformers import AutoModelForSequenceClassification

from roberta_fast import explain
from roberta_fast.training import FineTuningArguments, finetune, trainer
from roberta_fast.training.search import space_of

pytest.importorskip("optuna")
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 2e-2, "log": True},
    "num_train_epochs": {"low": 1, "high": 2},
    "tokens_per_batch": [80, 160],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_checkpoint):
    """Searches on a few reviews; flags in place of the usual ones."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "space.json").write_text(json.dumps(SPACE))
    train, validation = reviews(folder / "train.tsv", 16), reviews(folder / "validation.tsv", 8, seed=1)
    flags = {"model_name_or_path": tiny_checkpoint, "train_file": train, "validation_file": validation, "search_trials": 3}
    flags |= {**QUICK, "metric_for_best_model": "loss", "search_space": str(folder / "space.json")}
    return lambda out, **more: finetune("classification", **{**flags, "output_dir": str(out), **more})


@pytest.fixture(scope="module")
def searched(run, tmp_path_factory):
    """A search that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole"))


def trials_of(folder):
    found = json.loads((Path(folder) / "search.json").read_text())
    return found, [trial["params"] for trial in found["trials"]]


def test_the_best_trial_is_trained_and_saved(searched):
    result = searched
    found, params = trials_of(result.output_dir)
    values = [trial["value"] for trial in found["trials"]]
    assert found["metric"] == "loss" and found["direction"] == "minimize" and found["space"] == SPACE
    assert len(values) == 3 and found["best"] == values.index(min(values)) and len(set(map(str, params))) == 3
    assert all(1e-4 <= p["learning_rate"] <= 2e-2 and p["num_train_epochs"] in (1, 2) for p in params)
    # The same seed, the same dropout: what is saved is the model of the trial.
    assert result.metrics["eval_loss"] == min(values) == found["trials"][found["best"]]["metrics"]["eval_loss"]
    assert result.metrics["epoch"] == params[found["best"]]["num_train_epochs"]
    assert explain(result.model).stock_calls == {}
    table = (Path(result.output_dir) / "search.txt").read_text()
    assert table.splitlines()[1].split()[:2] == [str(found["best"]), f"{min(values):.4f}"]
    card = (Path(result.output_dir) / "README.md").read_text()
    assert table in card and f"`learning_rate`: {params[found['best']]['learning_rate']}" in card
    assert AutoModelForSequenceClassification.from_pretrained(result.output_dir).config.num_labels == 2


def test_an_interrupted_search_goes_on_as_the_whole_one(run, searched, tmp_path, monkeypatch):
    train, calls = trainer.FastTrainer.train, []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trainer.FastTrainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    calls.clear()
    monkeypatch.setattr(
        trainer.FastTrainer, "train", lambda self, *args, **kwargs: calls.append(self) or train(self, *args, **kwargs)
    )
    run(tmp_path)
    assert len(calls) == 3  # two trials, and the best one's model
    whole, stopped = (trials_of(folder)[0]["trials"] for folder in (searched.output_dir, tmp_path))
    assert [(t["params"], t["value"]) for t in stopped] == [(t["params"], t["value"]) for t in whole]
    models = [Path(folder, "model.safetensors").read_bytes() for folder in (searched.output_dir, tmp_path)]
    assert models[0] == models[1]


def test_a_failed_trial_is_recorded_and_the_search_goes_on(run, tmp_path, monkeypatch):
    step, begun = trainer.FastTrainer.training_step, []

    def failing(self, model, inputs, *args, **kwargs):
        loss = step(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 0:
            begun.append(self)
        return loss * math.nan if len(begun) == 1 else loss

    monkeypatch.setattr(trainer.FastTrainer, "training_step", failing)
    result = run(tmp_path, logging_steps=1, search_trials=2)
    found, _ = trials_of(result.output_dir)
    assert [bool(trial["failed"]) for trial in found["trials"]] == [True, False]
    assert "not finite at step 1" in found["trials"][0]["failed"] and found["trials"][0]["value"] is None
    assert found["best"] == 1 and math.isfinite(result.metrics["eval_loss"])


def test_no_trial_comes_to_an_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.FastTrainer, "training_step", lambda *args, **kwargs: torch.tensor(1.0) / 0 * 0)
    with pytest.raises(ValueError, match="none of search_trials=2 came to an end: the loss or its gradient is not finite"):
        run(tmp_path, search_trials=2, logging_steps=1)


def test_another_search_in_the_same_folder_is_refused(run, tmp_path):
    run(tmp_path, search_trials=1, max_train_samples=8)
    with pytest.raises(
        ValueError, match=r"search.db holds a search with seed='42', now '7': give another output_dir, or --overwr"
    ):
        run(tmp_path, search_trials=2, max_train_samples=8, seed=7)
    run(tmp_path, search_trials=2, max_train_samples=8, seed=7, overwrite_output_dir=True)
    assert len(trials_of(tmp_path)[1]) == 2, "it begins anew"


def test_a_search_with_adapters_and_tags(tmp_path, tiny_checkpoint):
    """Another task, LoRA, a metric to maximize, the usual space."""
    pytest.importorskip("peft")
    train = named_entities(tmp_path / "train.conll", 12)
    files = {
        "model_name_or_path": tiny_checkpoint,
        "train_file": train,
        "validation_file": train,
        "output_dir": str(tmp_path / "out"),
    }
    result = finetune("ner", **{**QUICK, "max_steps": 4}, **files, lora_r=2, search_trials=1)
    found, params = trials_of(result.output_dir)
    assert (found["metric"], found["direction"]) == ("f1", "maximize")
    assert all(1e-4 <= p["learning_rate"] <= 1e-3 and "num_train_epochs" not in p for p in params)
    assert result.metrics["eval_f1"] == found["trials"][0]["value"]
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


def given(**flags):
    return FineTuningArguments("out", report_to="none", use_cpu=True, search_trials=1, **flags)


def test_a_space_of_ones_own(tmp_path):
    lines = (
        "learning_rate: {low: 1e-5, high: 1e-3, log: true}",
        "optim: [adamw_torch, adafactor]",
        "weight_decay: {low: 0, high: 1}",
    )
    (tmp_path / "space.yaml").write_text("\n".join(lines))
    assert space_of(given(search_space=str(tmp_path / "space.yaml")), False) == {
        "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "optim": ["adamw_torch", "adafactor"],
        "weight_decay": {"low": 0.0, "high": 1.0},
    }


def test_the_usual_space_follows_the_flags():
    assert set(space_of(given(), False)) == {
        "learning_rate", "layer_lr_decay", "num_train_epochs", "tokens_per_batch", "warmup_steps", "weight_decay",
    }  # fmt: skip
    by_texts = space_of(given(per_device_train_batch_size=8, max_steps=3), True)
    assert by_texts["per_device_train_batch_size"] == [16, 32] and "num_train_epochs" not in by_texts
    assert by_texts["learning_rate"]["high"] == 1e-3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"label_smoothing_factor": [0.0, 0.1]}, "space.json: label_smoothing_factor cannot be searched over; learning_rate, "),
        ({"learning_rate": 1e-5}, "space.json: learning_rate must be a list of choices, or have low and high, got 1e-05"),
        ({"learning_rate": {"low": 2, "high": 1}}, "low=2.0 is above high=1.0"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "a logarithmic scale begins above 0"),
        ({"layer_lr_decay": {"low": 0.5, "high": 1.5}}, r"layer_lr_decay must hold a number in \[1e-06, 1.0\]"),
        ({"num_train_epochs": [1.5]}, "num_train_epochs must hold a whole number in"),
        ({"optim": ["adamm"]}, "optim must hold a value of that flag"),
        ({"optim": {"low": 1, "high": 2}}, "optim must be a list of choices, got"),
        ({"per_device_train_batch_size": [8]}, "per_device_train_batch_size has no effect beside tokens_per_batch=2048"),
        ([], "expected values by flag, got"),
    ],
)
def test_a_space_that_does_not_fit(space, message, tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(space))
    with pytest.raises(ValueError, match=message):
        space_of(given(search_space=str(tmp_path / "space.json")), False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation_file": None}, "a search needs training and validation data"),
        ({"search_space": "nowhere.json"}, r"search_space='nowhere\.json' is no file"),
        ({"search_trials": 0}, "search_trials says of how many trials"),
        ({"search_trials": -1}, "search_trials=-1 must be 0 or more"),
    ],
)
def test_flags_that_do_not_fit(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
