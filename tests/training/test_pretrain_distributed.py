"""Two processes, by DDP and by FSDP2, give the loss curve and the model of one process at an equal global batch."""

import json

import pytest
import torch
from runs import command, finish, finish_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# Odd sizes: micro-batches and processes get different numbers of blocks and of predictions.
FLAGS = {
    "global_batch_size": 13,
    "per_device_train_batch_size": 4,
    "max_seq_length": 16,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "max_eval_samples": 37,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "adam_epsilon": 1e-4,  # so that rounding is not blown up where gradients are next to nothing
}


def curve(folder):
    history = json.loads((folder / "metrics.json").read_text())["log_history"]
    return torch.tensor([entry[name] for entry in history for name in ("loss", "grad_norm", "eval_loss") if name in entry])


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    finish(command(corpus, folder / "out", **FLAGS), folder / "log")
    return folder / "out"


def assert_as_one(folder, one):
    ours, theirs = curve(folder), curve(one)
    assert len(ours) == 2 * FLAGS["max_steps"] + 1
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    weights, wanted = (load_file(path / "model.safetensors") for path in (folder, one))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_are_as_one(flags, corpus, one, tmp_path):
    argv = [*command(corpus, tmp_path / "out", **FLAGS), *flags]
    finish_ranks(argv, tmp_path / "log")
    assert_as_one(tmp_path / "out", one)
    said = (tmp_path / "log.0").read_text()
    assert "13 blocks, 2 × 2 micro-batches" in said and "unigram entropy" not in (tmp_path / "log.1").read_text()


@pytest.mark.slow
def test_one_process_resumes_what_two_began(corpus, one, tmp_path):
    """The data of a step does not depend on how many processes share it."""
    finish_ranks(command(corpus, tmp_path / "out", **{**FLAGS, "max_steps": 3}), tmp_path / "log")
    finish(command(corpus, tmp_path / "out", **FLAGS, resume_from_checkpoint="last"), tmp_path / "log")
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_test_can_fail(corpus, one, tmp_path):
    """Another global batch is another curve."""
    finish(command(corpus, tmp_path / "out", **{**FLAGS, "global_batch_size": 12}), tmp_path / "log")
    with pytest.raises(AssertionError):
        assert_as_one(tmp_path / "out", one)
