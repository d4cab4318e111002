"""Killed at any moment, on a full disk, with damaged checkpoints or a loss that is none: nothing is lost, and it is said."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from runs import TINY, command, finish, start
from safetensors.torch import load_file

from roberta_fast import dispatch
from roberta_fast.cli import main
from roberta_fast.training.checkpoints import damage_of, last_complete_checkpoint, write_checksums

pytestmark = pytest.mark.skipif(dispatch.load_cpp() is not None, reason="--deterministic needs the C++ extension")

STEPS = 18
FLAGS = {
    "max_steps": STEPS,
    "max_seq_length": 16,
    "deterministic": True,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "gradient_accumulation_steps": 2,
    "batch_size_warmup_steps": 10,
    "length_warmup_steps": 6,
    "length_warmup_start": 8,
    "max_eval_samples": 8,
}


def state(folder):
    """The bytes of the last checkpoint's model and optimizer, and of the saved model."""
    checkpoint = folder / f"checkpoint-{STEPS}"
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{number}.{name}": value for number, entry in optimizer.items() for name, value in entry.items()}
    return {**load_file(checkpoint / "model.safetensors"), **moments, **load_file(folder / "model.safetensors")}


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """(its output folder, seconds that it trained) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(command(corpus, folder / "out", **FLAGS), folder / "log")
    return folder / "out", json.loads((folder / "out" / "metrics.json").read_text())["metrics"]["train_runtime"]


def killed_and_resumed(corpus, folder, moments):
    """Kills the run so many seconds after it began to train; returns its kills, and the steps of the last checkpoint then."""
    argv = command(corpus, folder / "out", resume_from_checkpoint="last", **FLAGS)
    kills, steps = 0, []
    for number, seconds in enumerate(moments):
        log = folder / f"log.{number}"
        process = start(argv, log)
        while process.exitcode is None and not (log.exists() and "a step: " in log.read_text()):
            time.sleep(0.01)
        process.join(seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        checkpoint = last_complete_checkpoint(folder / "out")
        steps.append(int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
        assert steps == sorted(steps), "a checkpoint that was there is gone"
    finish(argv, folder / "log")
    return kills, steps


def assert_same_bits(folder, unbroken):
    ours, theirs = state(folder), state(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_killed_at_random_moments_it_ends_with_the_same_bits(corpus, unbroken, tmp_path):
    """Model, optimizer and what is saved; batches, lengths, masks and dropout go on where the run was."""
    folder, seconds = unbroken
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    kills, _ = killed_and_resumed(corpus, tmp_path, [generator.uniform(0.1, 0.7) * seconds for _ in range(2)])
    assert kills
    assert_same_bits(tmp_path / "out", folder)


@pytest.mark.slow
def test_killed_many_times(corpus, unbroken, tmp_path):
    folder, seconds = unbroken
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    kills, steps = killed_and_resumed(corpus, tmp_path, [generator.uniform(0.0, 0.3 * number) * seconds for number in range(12)])
    assert kills >= 3 and len(set(steps)) >= 2
    assert_same_bits(tmp_path / "out", folder)


def test_killed_while_it_saves(corpus, unbroken, tmp_path):
    """What was half written is neither taken for a checkpoint nor in the way of the next."""
    argv = command(corpus, tmp_path / "out", **FLAGS)
    process = start(argv, tmp_path / "log")
    try:
        while not list((tmp_path / "out" / ".saving").glob("checkpoint-*/model.safetensors")):
            assert process.exitcode is None, (tmp_path / "log").read_text()
            time.sleep(0.001)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert all(damage_of(checkpoint) is None for checkpoint in (tmp_path / "out").glob("checkpoint-*"))
    finish([*argv, "--resume_from_checkpoint", "last"], tmp_path / "log")
    assert_same_bits(tmp_path / "out", unbroken[0])


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of the unbroken run, to damage."""
    shutil.copytree(unbroken[0], tmp_path / "out")
    return tmp_path / "out"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda c: flip(c / "model.safetensors"), "model.safetensors is not what was written"),
    (lambda c: (c / "optimizer.pt").write_bytes((c / "optimizer.pt").read_bytes()[:99]), "optimizer.pt is not what was written"),
    (lambda c: (c / "trainer_state.json").write_text("{"), "trainer_state.json cannot be read"),
    (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth cannot be read"),
], ids=["a flipped bit", "truncated", "no json", "missing"])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(finished, damage, reason):
    last = finished / f"checkpoint-{STEPS}"
    damage(last)
    with pytest.warns(RuntimeWarning, match=f"checkpoint-{STEPS} is passed over: .*{reason}"):
        assert last_complete_checkpoint(finished) == str(finished / f"checkpoint-{STEPS - 3}")


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(corpus, finished, capsys):
    flip(finished / f"checkpoint-{STEPS}" / "optimizer.pt")
    flags = {**FLAGS, "resume_from_checkpoint": finished / f"checkpoint-{STEPS}"}
    assert main(command(corpus, finished, **flags)) == 1
    assert f"checkpoint-{STEPS}: optimizer.pt is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ({}, "holds checkpoints: go on from them with --resume_from_checkpoint last, or choose another folder"),
    ({"resume_from_checkpoint": "last", "seed": 7}, "seed is 7, and was 42"),
    ({"resume_from_checkpoint": "last", "max_seq_length": 32}, "max_seq_length is 32, and was 16"),
], ids=["not asked", "another seed", "another length"])  # fmt: skip
def test_a_run_is_not_mixed_with_another(corpus, finished, change, message, capsys):
    assert main(command(corpus, finished, **{**FLAGS, **change})) == 1
    assert message in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_good_checkpoint(corpus, tmp_path):
    """The system refuses the growing file: optimizer.pt is the first that is larger than what it allows."""
    flags = {**FLAGS, "max_steps": 6, "gradient_accumulation_steps": 1, "batch_size_warmup_steps": 0}
    finish(command(corpus, tmp_path / "out", **{**flags, "max_steps": 6}), tmp_path / "log")
    limit = (tmp_path / "out" / "checkpoint-6" / "model.safetensors").stat().st_size + 1000
    argv = command(corpus, tmp_path / "out", **{**flags, "max_steps": 12, "resume_from_checkpoint": "last"})
    process = start(argv, tmp_path / "full", file_limit=limit)
    process.join(240)
    said = (tmp_path / "full").read_text()
    assert process.exitcode == 1 and "Traceback" not in said
    last = tmp_path / "out" / "checkpoint-6"
    assert "the checkpoint of step 9 cannot be written: " in said and f"the last good checkpoint is {last}" in said, said
    assert last_complete_checkpoint(tmp_path / "out") == str(last) and not (tmp_path / "out" / ".saving").exists()
    finish(argv, tmp_path / "log")
    assert (tmp_path / "out" / "checkpoint-12").is_dir()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(corpus, tmp_path, capsys):
    """At an absurd learning rate from the second step on."""
    flags = {"max_seq_length": 16, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_eval_samples": 8}
    assert main(command(corpus, tmp_path / "out", max_steps=2, **flags)) == 0
    last = tmp_path / "out" / "checkpoint-2"
    scheduler = torch.load(last / "scheduler.pt", weights_only=True)
    torch.save({**scheduler, "base_lrs": [1e30] * 2, "_last_lr": [1e30] * 2}, last / "scheduler.pt")
    write_checksums(last)
    capsys.readouterr()
    assert main(command(corpus, tmp_path / "out", max_steps=40, resume_from_checkpoint="last", **flags)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the loss or its gradient is not finite at step" in error and "A lower learning_rate" in error
    failed = int(re.search(r"at step (\d+)", error)[1])
    good = last_complete_checkpoint(tmp_path / "out", before=failed - 1)
    assert f"the last good checkpoint is {good}. " in error and failed < 12
    assert all(value.isfinite().all() for value in load_file(f"{good}/model.safetensors").values())


def test_a_truncated_shard_is_named_before_anything_is_trained(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.tokens.bin"
    with open(shard, "r+b") as file:
        file.truncate(1000)
    assert main(command(tmp_path / "data", tmp_path / "out", max_steps=1)) == 1
    assert f"{shard} has 1,000 bytes and should have" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_another_tokenizer_in_the_corpus_is_refused(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "data")
    path = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    changed = json.loads(path.read_text())
    vocabulary = changed["model"]["vocab"]
    a, b = (vocabulary["a"], vocabulary["b"])
    vocabulary["a"], vocabulary["b"] = b, a
    path.write_text(json.dumps(changed))
    assert main(command(tmp_path / "data", tmp_path / "out", config_overrides=TINY, max_steps=1)) == 1
    assert "is not the tokenizer that the corpus was prepared with" in capsys.readouterr().err
