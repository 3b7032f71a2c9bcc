"""Warm trial processes: one process imports torch once and forks the ranks, which answer one request after another.

Importing torch and its compiler takes as long as many trials. So that happens once for all questions of a tuning,
and may start while the parent still looks at the model and the data (`TrialHost.start`).

    parent            TrialHost: FOLDER/requests, one line for each folder that holds a trial spec
    host process      python -m gatrain.tune.host FOLDER NODE: imports, forks one rank for each process of this node
    ranks             gatrain.tune.trial.work: measure; rank 0 leaves `answered` in the request's folder

The host never touches a GPU: a CUDA context does not survive a fork. Ranks are set up by `gatrain.rank`, like those
of a training, and form the same world: with several nodes the folders lie in the run folder that all share, and
each other node starts a host process on the folder that node 0 announces (`Follower`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from gatrain import offspring, rank, scratch
from gatrain.assets import cache_dir
from gatrain.errors import EXIT_CODES, GatrainError, LaunchError, RunFolderError, WorkerError
from gatrain.launch import protocol
from gatrain.launch.failure import Exit, first_cause
from gatrain.launch.net import LOOPBACK, address_towards, listen
from gatrain.launch.nodes import Nodes, parse_endpoint
from gatrain.rundir import RunDir, read_json, write_json

WORLD, REQUESTS, ANSWERED, FAILED = "world.json", "requests", "answered", "failed.json"
WORK = "gatrain.tune.trial"
COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.async_compile")
SURVIVORS_S = 3.0
"""Seconds that ranks may go on after another rank died: most of them wait for it for ever."""
POLL_S = 0.01
KEPT_FAILURES = 10
"""Failed trials whose logs are kept."""


class TrialHost:
    """The parent's handle: started on the first request or by `start`, restarted after a crash. A context manager.

    Args:
        nodes: the world; this is node 0.
        device: ``cpu`` or ``cuda``.
        cwd: working directory of the ranks, first on their import path; None is the current one.
        compiles: import torch's compiler, too.
        shared: with several nodes, a folder that all can read and write.
        announce: told the folder that the other nodes shall `join`, and None when it is over.
    """

    def __init__(
        self,
        nodes: Nodes,
        device: str,
        cwd: Path | None = None,
        *,
        compiles: bool = False,
        shared: Path | None = None,
        announce: Callable[[Path | None], None] = lambda folder: None,
    ) -> None:
        self._nodes = nodes
        self._world = {"nproc": nodes.nproc, "nnodes": nodes.nnodes, "device": device, "compiles": compiles}
        self._cwd = cwd
        self.shared = shared
        """Where the folders of requests must lie; None where any place will do."""
        self._announce = announce
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TrialHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the imports; returns at once. Does nothing if it runs already."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._folder = scratch.make("gatrain_host_", self.shared)
        write_json(self._folder / WORLD, self._world | _meeting_place(self._nodes))
        (self._folder / REQUESTS).touch()
        self._process = join(self._folder, 0, self._cwd)
        self._announce(self._folder)

    def __call__(self, folder: Path) -> None:
        """Let the ranks answer one request and wait for it.

        Raises:
            GatrainError: the error of the rank that failed first, of the class that the rank raised.
            WorkerError: a rank died.
        """
        try:
            # ranks that a GPU error has spoilt leave with 0 after their answer, perhaps just now: ask others
            while not self._ask(folder):
                pass
        except BaseException:
            self.close()
            raise

    def _ask(self, folder: Path) -> bool:
        """Put the request and wait; False if the processes had left before they saw it."""
        self.start()
        assert self._process is not None
        assert self._folder is not None
        with open(self._folder / REQUESTS, "a", encoding="utf-8") as file:
            file.write(f"{folder.resolve()}\n")
        while not (folder / ANSWERED).exists():
            status = self._process.poll()
            if status is not None and not (folder / ANSWERED).exists():
                if status == 0:
                    return False
                self._raise()
            time.sleep(POLL_S)
        return True

    def close(self) -> None:
        """Kill all processes and wait until they are gone, so that their memory is free: they have said all that
        anybody will read."""
        process, folder = self._process, self._folder
        self._process = self._folder = None
        if process is None or folder is None:
            return
        offspring.end(process)
        self._announce(None)
        scratch.remove(folder)

    def _raise(self) -> NoReturn:
        """Say why the host has failed."""
        assert self._folder is not None
        assert self._process is not None
        try:
            failed = read_json(self._folder / FAILED)
        except RunFolderError:
            lines = _log(self._folder, 0).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            text = f"the trial processes ended with status {self._process.returncode}."
            raise LaunchError("\n".join([text, *(f"  {line}" for line in lines[-3:])])) from None
        message = str(failed["message"])
        if str(self._folder) in message and (kept := _keep_logs(self._folder)) is not None:
            message = message.replace(str(self._folder), str(kept))
        raise EXIT_CODES.get(failed["exit_code"], GatrainError)(message)


def _keep_logs(folder: Path) -> Path | None:
    """A copy of the ranks' logs that outlives the processes, for a message that names one; None without a place."""
    kept = cache_dir() / "failed_trials" / time.strftime("%Y-%m-%d_%H-%M-%S")
    with contextlib.suppress(OSError):
        shutil.copytree(
            folder / RunDir(folder).logs.name, kept / RunDir(folder).logs.name, dirs_exist_ok=True
        )
        for old in sorted(kept.parent.iterdir())[:-KEPT_FAILURES]:
            shutil.rmtree(old, ignore_errors=True)
        return kept
    return None


class Follower:
    """Another node's part in the trials of node 0. A context manager."""

    def __init__(self, node_rank: int, cwd: Path | None) -> None:
        self._node_rank, self._cwd = node_rank, cwd
        self._folder: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exception: object) -> None:
        self.join(None)

    def join(self, folder: str | None) -> None:
        """Take part in the trials of this folder and of no other; a folder is joined once."""
        if folder == self._folder:
            return
        if self._process is not None and self._folder is not None:
            offspring.end(self._process)
            # node 0 has removed it, but this node's ranks may have written their last words since
            scratch.remove(Path(self._folder))
        self._folder = folder
        self._process = join(Path(folder), self._node_rank, self._cwd) if folder is not None else None


def join(folder: Path, node_rank: int, cwd: Path | None) -> subprocess.Popen[bytes]:
    """Start this node's host process, which leads the group of its ranks, on a folder.

    `gatrain.offspring.end` it when it is over: that waits until their memory is free.
    """
    with open(_log(folder, node_rank), "ab") as log:
        arguments = ["-m", "gatrain.tune.host", str(folder), str(node_rank)]
        env = {offspring.SOCKETS: str(scratch.sockets_of(folder))}
        return offspring.start(arguments, cwd=cwd, env=env, stdout=log, said=log)


def _log(folder: Path, node_rank: int) -> Path:
    return folder / f"host_{node_rank}.log"


def _meeting_place(nodes: Nodes) -> dict[str, object]:
    """Where the ranks meet: an address of node 0, as the user gave it, and a port that is free there now."""
    host = parse_endpoint(nodes.endpoint)[0] if nodes.endpoint and nodes.nnodes > 1 else LOOPBACK
    with contextlib.closing(listen("" if nodes.nnodes > 1 else LOOPBACK, 0)) as free:
        return {"address": host, "port": free.getsockname()[1]}


def requests(folder: Path, seen: int = 0) -> Iterator[str | None]:
    """Requests in their order, each once; None about once a second while there is none."""
    while True:
        until = time.monotonic() + 1.0
        found = None
        while found is None and time.monotonic() < until:
            lines = (folder / REQUESTS).read_text(encoding="utf-8").split("\n")[:-1]  # a torn line has no end
            if len(lines) > seen:
                found, seen = lines[seen], seen + 1
            else:
                time.sleep(POLL_S)
        yield found


# --- the host process -----------------------------------------------------------------------------------


def main(folder: Path, node_rank: int) -> int:
    """Import, fork the ranks, wait for them. Returns the exit code; the reason of a failure is in `FAILED`."""
    offspring.die_with_parent()
    world = read_json(folder / WORLD)
    os.environ.update(_environment(world, node_rank))
    for module in ("torch", WORK, *(COMPILER if world["compiles"] else ())):
        importlib.import_module(module)
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
