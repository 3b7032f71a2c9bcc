"""The host process of trials: imports torch once and forks the ranks, which answer one request after another.

Importing torch and its compiler takes as long as many trials, so it happens once for all questions of a tuning. The
host never touches a GPU: a CUDA context does not survive a fork. Ranks are set up by `gatrain.rank`, like those of
a training, and form the same world. The parent (`gatrain.tune.processes`) starts it by
``python -m gatrain.tune.host FOLDER NODE``.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from gatrain import offspring, rank
from gatrain.errors import WorkerError
from gatrain.launch import protocol
from gatrain.launch.failure import Exit, first_cause
from gatrain.launch.net import address_towards
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.tune.protocol import FAILED, POLL_S, WORLD

WORK = "gatrain.tune.trials.session"
COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.async_compile")
SURVIVORS_S = 3.0
"""Seconds that ranks may go on after another rank died: most of them wait for it for ever."""


def main(folder: Path, node_rank: int) -> int:
    """Import, fork the ranks, wait for them. Returns the exit code; the reason of a failure is in `FAILED`."""
    offspring.die_with_parent()
    world = read_json(folder / WORLD)
    os.environ.update(_environment(world, node_rank))
    for module in ("torch", WORK, *(COMPILER if world["compiles"] else ())):
        importlib.import_module(module)
    gc.freeze()  # ranks collect between sizes: a walk over all that torch and its compiler hold takes 0.25 s
    began, ranks = time.time(), {}
    for local_rank in range(world["nproc"]):
        pid = os.fork()
        if pid == 0:
            _become_rank(local_rank, node_rank * world["nproc"] + local_rank, folder)
        ranks[pid] = node_rank * world["nproc"] + local_rank
    exits, killed = _wait(ranks)
    if not exits:
        return 0
    cause = first_cause(RunDir(folder), exits, began, killed)
    error = cause.error if cause else WorkerError("the trial processes ended without a reason.")
    if node_rank == 0:
        write_json(folder / FAILED, {"exit_code": error.exit_code, "message": str(error)})
    return 1


def _environment(world: dict[str, Any], node_rank: int) -> dict[str, str]:
    """What torchrun would tell the ranks, and what keeps this process from waking the driver."""
    nproc, address = int(world["nproc"]), str(world["address"])
    own = address if node_rank == 0 else address_towards(address, int(world["port"]))
    return protocol.defaults_for_ranks(nproc, own) | {
        "WORLD_SIZE": str(nproc * int(world["nnodes"])),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(world["port"]),
        protocol.NODE_RANK: str(node_rank),
        protocol.DEVICE: str(world["device"]),
        protocol.LAUNCHER_PID: str(os.getpid()),
        # torch then asks NVML whether there is a GPU, and not the driver, which no fork may have seen
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def _become_rank(local_rank: int, global_rank: int, folder: Path) -> NoReturn:
    os.environ |= {"RANK": str(global_rank), "LOCAL_RANK": str(local_rank)}
    sys.argv = [WORK, str(folder)]
    try:
        rank.main(importlib.import_module(WORK).work)
    finally:
        os._exit(WorkerError.exit_code)  # main never returns; the host's own code must not go on here


def _wait(ranks: dict[int, int]) -> tuple[list[Exit], set[int]]:
    """Wait for all ranks: (those that failed, pids that had to be killed)."""
    exits: list[Exit] = []
    killed: set[int] = set()
    left, end_at = dict(ranks), float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            global_rank, code = left.pop(pid), os.waitstatus_to_exitcode(status)
            if code != 0:
                exits.append(Exit(global_rank, pid, code, time.time()))
                end_at = min(end_at, time.monotonic() + SURVIVORS_S)
        elif pid == 0:
            time.sleep(POLL_S)
        if time.monotonic() > end_at:
            for other in set(left) - killed:
                killed.add(other)
                os.kill(other, signal.SIGKILL)
    return exits, killed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
