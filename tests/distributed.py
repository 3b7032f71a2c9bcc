"""Run a function on several real processes joined by gloo, and bring its results back."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank; return what each rank returned (tensors, numbers, strings).

    ``function`` must be importable from a test module. An exception on any rank fails the test.
    """
    # forked from a process that has imported torch, which is never asked to compute
    multiprocessing.set_forkserver_preload(["torch.distributed", "torch.nn.parallel", "gatrain.train.engine"])
    with tempfile.TemporaryDirectory() as folder:
        given = (world_size, _free_port(), folder, function, args)
        mp.start_processes(_run, given, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    os._exit(0)  # threads of gloo may outlive the interpreter and abort its end


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
