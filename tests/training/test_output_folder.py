"""The output folder: what an earlier run left there is neither overwritten unasked nor mixed with what a new one leaves."""

import json
import shutil

import pytest
from tiny_tasks import QUICK, named_entities, reviews
from transformers import AutoModelForSequenceClassification

from roberta_fast.training import finetune, predict
from roberta_fast.training.output_folder import clear, require_free
from roberta_fast.training.training_arguments import FineTuningArguments


def given(folder, **flags):
    return FineTuningArguments(str(folder), report_to="none", use_cpu=True, **flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_checkpoint):
    """A step or two on a few reviews; flags in place of the usual ones."""
    folder = tmp_path_factory.mktemp("reviews")
    train, validation = reviews(folder / "train.tsv", 16), reviews(folder / "validation.tsv", 8, seed=1)
    flags = {"model_name_or_path": tiny_checkpoint, "train_file": train, "validation_file": validation}
    flags |= {**QUICK, "num_train_epochs": 1}
    return lambda out, **more: finetune("classification", **{**flags, "output_dir": str(out), **more})


@pytest.fixture(scope="module")
def left(run, tmp_path_factory):
    """What a run leaves."""
    folder = tmp_path_factory.mktemp("left") / "out"
    run(folder, test_file=reviews(folder.parent / "test.tsv", 4))
    return folder


@pytest.fixture
def earlier(left, tmp_path):
    """A copy of it, to overwrite."""
    return shutil.copytree(left, tmp_path / "out")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("flags", [{}, {"seeds": "1,2"}, {"search_trials": 1}], ids=["alone", "seeds", "search"])
def test_an_earlier_run_is_not_overwritten_unasked(flags, earlier, run):
    before = contents(earlier)
    with pytest.raises(
        ValueError, match=r"output_dir='.*out' is not empty: there is README.md, .* and \d+ more. --overwrite_out"
    ):
        run(earlier, **flags)
    assert contents(earlier) == before


def test_several_tasks_neither(earlier, tiny_checkpoint, tmp_path):
    tasks = [f"mood=classification,train_file={reviews(tmp_path / 'a.tsv', 8)}"]
    tasks += [f"names=ner,train_file={named_entities(tmp_path / 'a.conll', 8)}"]
    flags = {**QUICK, "max_steps": 1, "model_name_or_path": tiny_checkpoint, "output_dir": str(earlier), "task": tasks}
    del flags["max_seq_length"]
    with pytest.raises(ValueError, match="is not empty"):
        finetune("multitask", **flags)
    finetune("multitask", **flags, overwrite_output_dir=True)
    assert (earlier / "mood/model.safetensors").exists() and not list(earlier.glob("checkpoint-*"))[1:]


def test_overwriting_leaves_nothing_of_the_earlier_run(earlier, run):
    (step,) = (int(p.name.partition("-")[2]) for p in earlier.glob("checkpoint-*"))
    (earlier / f"checkpoint-{step}").rename(earlier / "checkpoint-900")
    for name in ("decoder_tokenizer", "checkpoint-mine"):
        (earlier / name).mkdir()
    (earlier / "notes.txt").write_text("mine")
    run(earlier, overwrite_output_dir=True, max_steps=1)
    assert [p.name for p in earlier.glob("checkpoint-*[0-9]")] == ["checkpoint-1"], "the other would be resumed from"
    assert not (earlier / "predictions.jsonl").exists() and not (earlier / "decoder_tokenizer").exists()
    assert (earlier / "notes.txt").read_text() == "mine" and (earlier / "checkpoint-mine").is_dir()
    assert json.loads((earlier / "metrics.json").read_text())["epoch"] < 1


def test_the_checkpoint_that_training_starts_from_is_not_deleted(earlier, run):
    (checkpoint,) = earlier.glob("checkpoint-*")
    with pytest.raises(ValueError, match=r"model_name_or_path='.*' is among what --overwrite_output_dir deletes"):
        run(earlier, overwrite_output_dir=True, model_name_or_path=str(checkpoint))
    assert checkpoint.is_dir()
    run(earlier, overwrite_output_dir=True, model_name_or_path=str(earlier))
    assert (earlier / "model.safetensors").is_file()


def test_resuming_needs_no_other_flag_and_deletes_nothing(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    for flags in ({}, {"overwrite_output_dir": True}):
        args = given(tmp_path, resume_from_checkpoint="last", **flags)
        require_free(args, None, trains=True)
        clear(args)
    assert (tmp_path / "checkpoint-3").is_dir()


LOGS = (
    "runs/host/events.out.tfevents.1.host.1.0",
    "events.out.tfevents.2",
    "train.log",
    "slurm-17.out",
    ".gitignore",
    ".git/HEAD",
)


def test_logs_do_not_fill_a_folder(tmp_path):
    for name in LOGS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    require_free(given(tmp_path), None, trains=True)
    (tmp_path / "runs/weights.bin").touch()
    with pytest.raises(ValueError, match=r"is not empty: there is runs\. "):
        require_free(given(tmp_path), None, trains=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"output_dir='.*out' is no folder"):
        require_free(given(tmp_path / "out", overwrite_output_dir=True), None, trains=True)


def test_an_evaluation_goes_beside_its_own_model_alone(earlier, run, tmp_path):
    """It adds to what training said of the model, and does not write its scores beside another one."""
    before = json.loads((earlier / "metrics.json").read_text())
    alone = {"model_name_or_path": str(earlier), "train_file": None, "do_eval": True, "max_eval_samples": 4}
    run(earlier, **alone)
    after = json.loads((earlier / "metrics.json").read_text())
    assert after["train_loss"] == before["train_loss"] and (before["eval_samples"], after["eval_samples"]) == (8, 4)
    for _ in range(2):
        run(tmp_path / "scores", **alone)
    other = shutil.copytree(earlier, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other' is not empty: there is checkpoint-\d+, model.safetensors"):
        run(other, **alone)
    run(other, **alone, overwrite_output_dir=True)
    assert (other / "model.safetensors").is_file() and list(other.glob("checkpoint-*")), "an evaluation replaces its files alone"


def test_seeds_overwrite_seeds(run, tmp_path):
    """A seed that is trained again has no earlier checkpoint, others stay, and the folder above has no model any more."""
    run(tmp_path)
    run(tmp_path, seeds="1,2", overwrite_output_dir=True)
    with pytest.raises(ValueError, match=r"there is no finetune\.json here, but in seed-1, seed-2"):
        predict(tmp_path, "new.txt")
    (tmp_path / "seed-2/checkpoint-900").mkdir()
    run(tmp_path, seeds="2,3", overwrite_output_dir=True)
    assert sorted(p.name for p in tmp_path.glob("seed-*")) == ["seed-1", "seed-2", "seed-3"]
    assert not (tmp_path / "seed-2/checkpoint-900").exists()
    assert "`seed`: 3" in (tmp_path / "seed-3/README.md").read_text(), "the card names the seed of its own run"
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "seed-3")


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("1,1", "seeds='1,1': 1 is there twice"),
        ("1,2,01", "seeds='1,2,01': 1 is there twice"),
        ("", "seeds='' must be integers"),
        ("1,", "seeds='1,' must be integers"),
        ("1,two", "seeds='1,two' must be integers"),
        ("-1", "seeds='-1' must be integers"),
        ([1, 2], r"seeds='\[1, 2\]' must be integers"),
    ],
    ids=str,
)
def test_seeds_that_do_not_fit(seeds, message):
    with pytest.raises(ValueError, match=message):
        given("out", seeds=seeds)


def test_seeds_as_people_write_them():
    assert [given("out", seeds=seeds).seeds for seeds in ("3", 3, "1, 2", None)] == ["3", "3", "1,2", None]
