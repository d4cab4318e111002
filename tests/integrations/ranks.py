"""Real processes for tests: as many ranks as asked for, joined by gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The server imports once what every child needs, and has no threads that a fork would lose.
multiprocessing.set_forkserver_preload(["roberta_fast.encoder", "roberta_fast.accelerate"])


def run_ranks(job: Callable, folder: Path, *arguments, ranks: int = 2) -> list:
    """``job(rank, *arguments)`` of each rank of a process group; raises what one of them raises."""
    mp.start_processes(_rank, (job, folder, ranks, arguments), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank, job, folder, ranks, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        torch.save(job(rank, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
