"""Run a function on several processes of one machine, and have what one of them raises raised in the test."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 60  # seconds: a hang is a failure


def run(world: int, function: Callable[..., Any], folder: Path, *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """What a function of a test module returns on each of `world` processes that are a group.

    Not `torch.multiprocessing.spawn`, which would wait for a process that hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task").write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
    paths = os.pathsep.join(dict.fromkeys([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder), str(world)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]
    try:
        for process in processes:
            process.wait(limit)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]
    failures = [f"process {rank}:\n{text}" for rank, (failed, text) in enumerate(results) if failed]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def main(folder: Path, world: int, rank: int) -> None:
    module, name, arguments = pickle.loads((folder / "task").read_bytes())
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
    try:
        result = False, getattr(__import__(module), name)(*arguments)
    except BaseException:
        result = True, traceback.format_exc()
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    os._exit(0)  # without waiting for processes that failed


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
