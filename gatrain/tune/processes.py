"""The parent's handle on warm trial processes, which answer one request after another.

Importing torch and its compiler takes as long as many trials. So that happens once for all questions of a tuning,
and may start while the parent still looks at the model and the data (`TrialHost.start`).

    parent            TrialHost: FOLDER/requests, one line for each folder that holds a trial spec
    host process      python -m gatrain.tune.host FOLDER NODE: imports, forks this node's ranks
    ranks             gatrain.tune.trials.session.work: measure; rank 0 leaves `answered` in the request's folder

With several nodes the folders lie in the run folder that all share, and each other node starts a host process on
the folder that node 0 announces (`Follower`). Nothing of `gatrain.tune.trials` is imported here: it is started by
name.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from gatrain import offspring, scratch
from gatrain.assets import cache_dir
from gatrain.errors import EXIT_CODES, GatrainError, LaunchError, RunFolderError
from gatrain.launch.net import LOOPBACK, listen
from gatrain.launch.world import Nodes, parse_endpoint
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.tune.protocol import ANSWERED, FAILED, POLL_S, REQUESTS, WORLD

HOST = "gatrain.tune.host"
"""The module that a host process runs."""
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
        arguments = ["-m", HOST, str(folder), str(node_rank)]
        env = {offspring.SOCKETS: str(scratch.sockets_of(folder))}
        return offspring.start(arguments, cwd=cwd, env=env, stdout=log, said=log)


def _log(folder: Path, node_rank: int) -> Path:
    return folder / f"host_{node_rank}.log"


def _meeting_place(nodes: Nodes) -> dict[str, object]:
    """Where the ranks meet: an address of node 0, as the user gave it, and a port that is free there now."""
    host = parse_endpoint(nodes.endpoint)[0] if nodes.endpoint and nodes.nnodes > 1 else LOOPBACK
    with contextlib.closing(listen("" if nodes.nnodes > 1 else LOOPBACK, 0)) as free:
        return {"address": host, "port": free.getsockname()[1]}
