"""Run a function on several processes of one machine, and have what one of them raises raised in the test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 60  # seconds: a hang is a failure
FORKS = multiprocessing.get_context("forkserver")
# What takes long to import is imported once, and forked. Threads would not be: nothing is computed there.
FORKS.set_forkserver_preload(["numpy", "pytest", "torch._dynamo", "torch.distributed.fsdp"])
SHARDS = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 has `fully_shard` for GPUs only


def run(world: int, function: Callable[..., Any], folder: Path, *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """What a function of a test module returns on each of `world` processes that are a group.

    Not `torch.multiprocessing.spawn`, which would wait for a process that hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = pickle.dumps((function.__module__, function.__name__, arguments))  # imported by whoever has the path
    processes = [FORKS.Process(target=main, args=(folder, world, rank, task), daemon=True) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    results = [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]
    failures = [f"process {rank}:\n{text}" for rank, (failed, text) in enumerate(results) if failed]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def main(folder: Path, world: int, rank: int, task: bytes) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
    try:
        module, name, arguments = pickle.loads(task)
        result = False, getattr(__import__(module), name)(*arguments)
    except BaseException:
        result = True, traceback.format_exc()
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    os._exit(0)  # without waiting for processes that failed
