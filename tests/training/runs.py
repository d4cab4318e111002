"""What the tests of pretraining share: real text that every Python brings along, a tiny model, runs in their own processes."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import torch

multiprocessing.set_forkserver_preload(["roberta_fast.training.pretraining.run"])
FORKSERVER = multiprocessing.get_context("forkserver")

TINY = "num_hidden_layers=2,hidden_size=64,num_attention_heads=2,intermediate_size=128,initializer_range=0.1"
FLAGS = {
    "config_name": "tiny",
    "config_overrides": TINY,
    "max_seq_length": 64,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 3e-3,
    "warmup_steps": 5,
    "logging_steps": 5,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def write_text(path: Path, documents: int | None = None) -> Path:
    """Python's own language reference, a paragraph a document; it comes with every Python, for ``help()``."""
    from pydoc_data.topics import topics

    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p) > 40]
    path.write_text("\n\n".join(paragraphs[:documents]), encoding="utf-8")
    return path


def command(data: Path, output: Path, **flags) -> list[str]:
    """The arguments of ``roberta-fast``; flags take the place of ``FLAGS``, None leaves one out."""
    flags = {"data": data, "output_dir": output, **FLAGS, **flags}
    return ["pretrain", *(str(part) for name, value in flags.items() if value is not None for part in (f"--{name}", value))]


def start(argv: list[str], log: Path, file_limit: int | None = None, environment: dict[str, str] | None = None):
    """A process that runs ``roberta-fast`` with these arguments; its output goes to ``log``. file_limit: bytes of a file."""
    process = FORKSERVER.Process(target=_run, args=(argv, log, file_limit, environment or {}))
    process.start()
    return process


def finish(argv: list[str], log: Path, **kwargs) -> str:
    """Runs to its end with status 0; returns what it said."""
    process = start(argv, log, **kwargs)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def finish_ranks(argv: list[str], log: Path, ranks: int = 2) -> None:
    """As ``torchrun`` starts them: one process a rank, which find each other by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(ranks)]
    processes = [
        start(argv, logs[rank], environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
    ]
    try:
        for process, said in zip(processes, logs, strict=True):
            process.join(240)
            assert process.exitcode == 0, said.read_text()
    finally:
        for process in processes:
            process.kill()


def _run(argv, log, file_limit, environment):
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    from roberta_fast.cli import main

    sys.exit(main(argv))
