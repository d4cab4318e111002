"""The command: a process of its own, its workers, its signals and its complaints."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

from roberta_fast.cli import main

COMMAND = [str(Path(sys.executable).with_name("roberta-fast")), "serve"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def process(*arguments, log):
    """(the running command, its address), once it is ready."""
    with open(log, "w") as output:
        running = subprocess.Popen([*COMMAND, *arguments, "--port", "0"], stdout=output, stderr=output, env=ENVIRONMENT)
    try:
        until, address = time.monotonic() + 300, None
        while time.monotonic() < until:
            assert running.poll() is None, log.read_text()
            found = re.search(r"running on (http://\S+)", log.read_text())
            with contextlib.suppress(httpx.TransportError):
                if found and httpx.get(f"{found[1]}/ready", timeout=5).status_code == 200:
                    address = found[1]
                    break
            time.sleep(0.1)
        assert address, log.read_text()
        yield running, address
    finally:
        if running.poll() is None:
            running.terminate()
        running.wait(30)


def test_sigterm_finishes_what_was_accepted(checkpoint, sentences, tmp_path):
    key, log = tmp_path / "key", tmp_path / "log"
    key.write_text("correct-horse\n")
    texts, answers = [" ".join(sentences[i : i + 12]) for i in range(24)], []

    def post():
        with httpx.Client(headers={"authorization": "Bearer correct-horse"}, timeout=60) as client:
            answers.append(client.post(f"{address}/embed", json={"inputs": texts, "truncate": True}))

    with process("--model", checkpoint, "--api-key-file", str(key), "--threads", "1", log=log) as (running, address):
        assert httpx.post(f"{address}/embed", json={"inputs": "text"}).status_code == 401
        posts = [threading.Thread(target=post) for _ in range(4)]
        for thread in posts:
            thread.start()
        headers = {"authorization": "Bearer correct-horse"}
        while "roberta_fast_requests_in_flight 4.0" not in httpx.get(f"{address}/metrics", headers=headers).text:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        for thread in posts:
            thread.join(60)
        assert running.wait(30) == 0
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(len(answer.json()) == 24 for answer in answers)
    said = log.read_text()
    assert "no fallback" in said and "Traceback" not in said and "correct-horse" not in said
    assert not any(text[:30] in said for text in texts)


@pytest.mark.slow
def test_workers_share_the_port_and_the_metrics(checkpoint, tmp_path):
    with process("--model", checkpoint, "--workers", "2", "--precision", "int8", log=tmp_path / "log") as (_, address):
        assert httpx.get(f"{address}/info").json()["precision"] == "int8"
        for _ in range(12):
            assert len(httpx.post(f"{address}/embed", json={"inputs": "A man is eating food."}).json()[0]) == 384
        texts = {httpx.get(f"{address}/metrics").text.split("roberta_fast_batch_sequences_sum ")[1].split()[0] for _ in range(6)}
        assert texts == {"12.0"}, "whichever worker answers"
    assert not [line for line in (tmp_path / "log").read_text().splitlines() if "Traceback" in line]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(checkpoint, tmp_path):
    log = tmp_path / "log"
    with process("--model", checkpoint, "--workers", "2", log=log) as (running, address):

        def workers():
            return set(map(int, re.findall(r"Started server process \[(\d+)\]", log.read_text())))

        def waits_for(count):
            until = time.monotonic() + 300
            while len(workers()) < count and time.monotonic() < until:
                assert httpx.post(f"{address}/embed", json={"inputs": "Old Marley"}).status_code == 200
                time.sleep(0.1)
            return workers()

        os.kill(min(waits_for(2)), signal.SIGKILL)
        assert len(waits_for(3)) == 3 and running.poll() is None
        assert "roberta_fast_requests_in_flight 0.0" in httpx.get(f"{address}/metrics").text


@pytest.mark.slow
def test_a_worker_that_dies_while_it_loads_is_replaced_at_once(checkpoint, tmp_path):
    log = tmp_path / "log"
    with open(log, "w") as output:
        command = [*COMMAND, "--model", checkpoint, "--workers", "2", "--port", "0"]
        running = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT)
    try:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        until, workers = time.monotonic() + 120, []
        while len(workers) < 2 and time.monotonic() < until:
            with contextlib.suppress(OSError):  # some children are there for a moment
                lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()}
                workers = [pid for pid, line in lines.items() if b"spawn_main" in line]
        os.kill(workers[0], signal.SIGKILL)
        killed = time.monotonic()
        while "died" not in log.read_text() and time.monotonic() < killed + 60:
            time.sleep(0.1)
        assert time.monotonic() < killed + 30, "the other worker's answer is waited for, and it loads for some seconds"
    finally:
        running.terminate()
        assert running.wait(60) == 0


def test_a_port_that_is_taken_is_named(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        main(["serve", "--model", checkpoint, "--port", str(taken.getsockname()[1])])
    assert ended.value.code == 2 and "cannot be listened on: Address already in use" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_that_cannot_load_end_the_command(checkpoint):
    arguments = ["--model", checkpoint, "--task", "question-answering", "--workers", "2", "--port", "0"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert "has no weights for --task question-answering" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:roberta_fast. embedding on cpu float16:RuntimeWarning")  # before what is refused
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such-folder"], "--model no/such-folder cannot be loaded"),
        (["--model", "/no/such-folder"], "--model /no/such-folder cannot be loaded: there is no such folder"),
        (["--model", "MODEL", "--task", "summarization"], "invalid choice: 'summarization'"),
        (["--model", "MODEL", "--timeout", "0"], "'0' is not a number of seconds above 0"),
        (["--model", "MODEL", "--max-batch-tokens", "-1"], "'-1' is not a whole number from 1 on"),
        (["--model", "MODEL", "--api-key-file", "/nonexistent"], "--api-key-file: /nonexistent cannot be read"),
        (["--model", "MODEL", "--port", "66000"], "'66000' is not a port from 0 to 65535"),
        (["--model", "MODEL", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000 cannot be listened on"),
        (["--model", "MODEL", "--device", "cuda"], "--device cuda needs a CUDA device"),
        (["--model", "MODEL", "--precision", "fp8"], "precision='fp8' is for GPUs of compute capability 8.9 or later"),
        (["--model", "MODEL", "--precision", "int4"], "precision='int4' is not one of"),
        (["--model", "MODEL", "--precision", "int8", "--dtype", "bfloat16"], "--precision int8 is for --device cpu and --dtype"),
        (["--model", "MODEL", "--deterministic", "--dtype", "float16"], "deterministic"),
        (["--model", "MODEL", "--prepack", "--dtype", "bfloat16"], "--prepack is for --device cpu and --dtype float32"),
        (["--model", "MODEL", "--prepack", "--precision", "int8"], "--prepack is for weights in float32"),
        (["--model", "MODEL", "--prepack", "--stock"], "no --prepack"),
        (["--model", "MODEL", "--cuda-graphs", "on", "--device", "cpu"], "--cuda-graphs on is for --device cuda, not cpu"),
        (["--model", "MODEL", "--cuda-graphs", "on", "--stock"], "--cuda-graphs on is for --device cuda, not --stock"),
        (["--model", "MODEL", "--cuda-graphs", "yes"], "invalid choice: 'yes'"),
        (["--model", "MODEL", "--stock", "--deterministic"], "--stock serves plain Hugging Face"),
        (["--model", "MODEL", "--task", "question-answering"], "has no weights for --task question-answering: qa_outputs.bias"),
    ],
)
def test_what_cannot_be_served_is_said(checkpoint, arguments, message, capsys, monkeypatch):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        main(["serve", *(checkpoint if argument == "MODEL" else argument for argument in arguments)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    import importlib.util

    from roberta_fast.serving import server

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find_spec(name))
    assert server.run(["--model", "any"]) == 2
    assert capsys.readouterr().err == "roberta-fast serve needs fastapi: pip install 'roberta_fast[serve]'\n"


def test_nothing_of_the_extra_is_imported_by_the_package():
    code = (
        "import sys, roberta_fast; roberta_fast.accelerate_model; print([m for m in ('fastapi', 'uvicorn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
