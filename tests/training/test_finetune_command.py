"""The commands themselves: help, config files, wrong flags and files, interrupted runs, two processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_tasks import reviews

from roberta_fast.cli import main
from roberta_fast.training import FineTuningArguments, arguments
from roberta_fast.training.checkpoints import last_complete_checkpoint
from roberta_fast.training.cli import TASKS, run

BIN = Path(sys.executable).parent
QUICK = [
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
    "--use_cpu",
    "true",
    "--tokens_per_batch",
    "80",
    "--learning_rate",
    "5e-3",
]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*args, **kwargs):
    return subprocess.run([*map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, check=False, **kwargs)


@pytest.mark.parametrize("task", TASKS)
def test_help_names_every_flag_and_loads_nothing_heavy(task):
    code = f"import sys; from roberta_fast.training.cli import run\ntry: run([{task!r}, '--help'])\nexcept SystemExit: pass\n"
    done = command(sys.executable, "-c", code + "print('torch' in sys.modules)")
    *text, heavy = done.stdout.splitlines()
    assert heavy == "False", done.stderr
    for name in (
        "model_name_or_path",
        "tokens_per_batch",
        "seeds",
        *(f.name for f in dataclasses.fields(TASKS[task][0])),
    ):
        assert f"--{name}" in "\n".join(text)


def test_the_short_help_is_true():
    known = {field.name for field in dataclasses.fields(FineTuningArguments)}
    assert set(arguments.MAIN_TRAINING_FLAGS) <= known


def test_tasks_are_listed(capsys):
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(task in listed for task in TASKS)
    assert run(["sentiment"]) == 2 and "'sentiment' is not one of classification" in capsys.readouterr().err


def parsed(*argv):
    return arguments.parse(
        "finetune classification",
        "",
        argv,
        arguments.ModelArguments,
        arguments.ClassificationArguments,
        training="roberta_fast.training.training_arguments:FineTuningArguments",
    )


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_command_line_overrides_the_config(suffix, tmp_path):
    import yaml

    values = {
        "model_name_or_path": "m",
        "learning_rate": 1e-4,
        "fast": False,
        "output_dir": "o",
        "lr_scheduler_kwargs": {"a": 1},
        "seeds": None,
    }
    (tmp_path / f"run.{suffix}").write_text(yaml.safe_dump(values) if suffix == "yaml" else json.dumps(values))
    model, data, training = parsed(
        "--config", str(tmp_path / f"run.{suffix}"), "--learning_rate", "3e-4", "--max_seq_length", "64"
    )
    assert (model.model_name_or_path, model.fast, data.max_seq_length) == ("m", False, 64)
    assert (training.learning_rate, training.output_dir, training.lr_scheduler_kwargs) == (3e-4, "o", {"a": 1})


def test_a_list_in_a_config_is_what_the_command_line_has_with_commas(tmp_path):
    (tmp_path / "run.yaml").write_text("seeds: [1, 2]\ntext_column_names: [question, sentence]\n")
    _, data, training = parsed("--config", str(tmp_path / "run.yaml"))
    assert (training.seeds, data.text_column_names) == ("1,2", "question,sentence")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "learning_rte: 1", "a.yaml: 'learning_rte' is no flag of this command"),
        ("a.yaml", "x: 1\ny: [", "a.yaml, line "),
        ("a.json", '{"seed": 1\n"x"}', "a.json, line 2: "),
        ("a.json", "[1]", "a.json: expected flags by name, got a list"),
        ("a.toml", "", "a.toml: a config file ends in .json, .yaml or .yml"),
        ("a.yaml", None, "--config: "),
    ],
)
def test_a_config_that_does_not_fit(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="roberta-fast finetune classification: .*" + message.split(", line")[0]):
        parsed("--config", str(tmp_path / name))


def test_a_flag_that_does_not_exist():
    for flag in ("--learning_rte", "--learning_rat"):
        with pytest.raises(SystemExit, match=f"finetune classification: '{flag}' is no flag of this command"):
            parsed(flag, "3")


def test_a_missing_extra_is_one_line():
    with pytest.raises(SystemExit, match=r"training needs no_such_module: pip install .*roberta_fast\[train\]"):
        arguments.require_extra("no_such_module")


def test_wrong_input_is_one_line_and_no_traceback(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "bad.tsv").write_text("sentence\tlabel\na\t1\nb\n")
    files = ["--train_file", tmp_path / "bad.tsv", "--output_dir", tmp_path / "out"]
    done = command(BIN / "roberta-fast", "finetune", "classification", "--model_name_or_path", tiny_checkpoint, *files, *QUICK)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("bad.tsv, line 3: 1 fields, but the header has 2: sentence, label")
    with pytest.raises(SystemExit):
        main(["predict", "--model", tiny_checkpoint, "--file", str(tmp_path / "bad.tsv"), "--output", str(tmp_path)])
    assert f"--output {tmp_path} is a folder" in capsys.readouterr().err
    missing = command(BIN / "roberta-fast", "predict", "--model", tmp_path, "--file", tmp_path / "bad.tsv")
    assert missing.returncode == 1 and "there is no finetune.json" in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_model(tmp_path, tiny_checkpoint):
    train = reviews(tmp_path / "train.tsv", 200)
    flags = [
        "--model_name_or_path",
        tiny_checkpoint,
        "--train_file",
        train,
        "--save_steps",
        "5",
        "--save_strategy",
        "steps",
        *QUICK,
    ]

    def arguments_of(out):
        return [str(BIN / "roberta-fast"), "finetune", "classification", *flags, "--output_dir", str(tmp_path / out)]

    assert command(*arguments_of("whole")).returncode == 0
    # With as many threads: another number of them rounds otherwise.
    process = subprocess.Popen(arguments_of("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    end = time.monotonic() + 120
    while last_complete_checkpoint(tmp_path / "killed") is None and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/model.safetensors").exists(), "the run ended before it was killed"
    assert command(*arguments_of("killed"), "--resume_from_checkpoint", "last").returncode == 0
    models = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "killed")]
    assert models[0] == models[1]


@pytest.mark.slow
def test_two_processes_train_on_every_text_once(tmp_path, tiny_checkpoint):
    train = reviews(tmp_path / "train.tsv", 60)
    flags = [
        "--model_name_or_path",
        tiny_checkpoint,
        "--train_file",
        train,
        "--validation_file",
        train,
        "--output_dir",
        tmp_path / "out",
    ]
    launch = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "29611", "--no_python", BIN / "roberta-fast"]
    done = command(*launch, "finetune", "classification", *flags, *QUICK, "--ddp_backend", "gloo", "--num_train_epochs", "8")
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    from transformers import AutoTokenizer

    sentences = [line.split("\t")[0] for line in Path(train).read_text().splitlines()[1:]]
    tokens = sum(map(len, AutoTokenizer.from_pretrained(tiny_checkpoint)(sentences)["input_ids"]))
    assert state["num_input_tokens_seen"] == 8 * tokens
    assert json.loads((tmp_path / "out/metrics.json").read_text())["eval_accuracy"] > 0.9
