"""How the other nodes of a run follow node 0 through the run folder that they share.

Node 0 rewrites one small file every two seconds, first as ``preparing``, then as ``ready``. A file left over
from an earlier run looks the same but never changes, so a node trusts it only after it has seen it change:
clocks of different machines need not agree. The other nodes answer with what hardware they have, beside the beat
that they heard; and they take part in the trials on the folder that node 0 names.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gatrain import codec
from gatrain.errors import LaunchError, RunFolderError
from gatrain.hardware import Hardware
from gatrain.launch import protocol
from gatrain.launch.world import Nodes
from gatrain.rundir import RunDir, read_json, write_json

BEAT_S = 2.0
POLL_S = 0.2
SILENCE_S = 60.0
"""A node once heard of and then silent for this long is gone; network file systems show changes late."""


class Heartbeat:
    """Node 0's side. On a single node nothing is written and nobody is waited for."""

    def __init__(self, run_dir: RunDir, nodes: Nodes) -> None:
        self._run_dir, self._nodes = run_dir, nodes
        self._state: dict[str, Any] = {"state": "preparing", "run_id": nodes.run_id, "trials": None}
        self._beats: set[str] = set()
        self._changed, self._end = threading.Event(), threading.Event()

    def ready(self) -> None:
        """The run folder is complete: the others may start their ranks."""
        self._tell(state="ready", trials=None)

    def announce(self, trials: Path | None) -> None:
        """The folder of trial processes that the others shall join; None: there are none (any more)."""
        self._tell(trials=str(trials) if trials is not None else None)

    def hardware_of_others(self) -> list[Hardware]:
        """What the other nodes have, in the order of their ranks. Waits until all have answered.

        Raises:
            LaunchError: a node did not answer in time.
        """
        patience_s = protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
        deadline = time.monotonic() + patience_s
        found: dict[int, Hardware] = {}
        missing = set(range(1, self._nodes.nnodes))
        while missing:
            for node_rank in sorted(missing):
                with contextlib.suppress(RunFolderError, KeyError, TypeError, ValueError):
                    answer = read_json(_answer(self._run_dir, node_rank))
                    if answer["heard"] in self._beats:
                        found[node_rank] = codec.decode(Hardware, answer["hardware"])
            missing -= found.keys()
            if missing and time.monotonic() > deadline:
                raise LaunchError(
                    f"node rank {', '.join(map(str, sorted(missing)))} did not come within {patience_s:g} s. Start "
                    f"gatrain there with the same --nnodes and --rdzv-endpoint, each with its own --node-rank, and "
                    f"the same run.dir on a file system that all nodes share. {protocol.JOIN_TIMEOUT_S} changes "
                    "how long they wait."
                )
            time.sleep(POLL_S if missing else 0)
        return [found[node_rank] for node_rank in sorted(found)]

    def _tell(self, **what: Any) -> None:
        self._state |= what
        self._changed.set()

    def _run(self) -> None:
        until = float("inf")
        while not self._end.is_set() and time.monotonic() < until:
            if self._state["state"] == "ready" and until == float("inf"):
                # a node that comes later than this is refused by the others anyway
                until = time.monotonic() + 2 * protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
            beat = uuid.uuid4().hex
            self._beats.add(beat)
            with contextlib.suppress(OSError):
                write_json(self._run_dir.heartbeat, {**self._state, "beat": beat})
            self._changed.wait(BEAT_S)
            self._changed.clear()


@dataclass(frozen=True)
class _Beat:
    """What node 0 writes."""

    beat: str
    state: Literal["preparing", "ready"]
    run_id: str = "gatrain"
    trials: str | None = None

    @classmethod
    def read(cls, path: Path) -> _Beat:
        """
        Raises:
            RunFolderError, ValueError: it is not there, or something else.
        """
        return codec.decode(cls, read_json(path, most_bytes=2**16))

    def trials_in(self, run_dir: RunDir) -> str | None:
        """The folder of trials: node 0 makes it in the run folder, wherever the text says that it is."""
        name = Path(self.trials or "").name
        return str(run_dir.path / name) if name.startswith("gatrain_host_") else None


@contextlib.contextmanager
def beating(run_dir: RunDir, nodes: Nodes) -> Iterator[Heartbeat]:
    """Tell the other nodes that node 0 prepares, until the context ends."""
    heart = Heartbeat(run_dir, nodes)
    if nodes.nnodes == 1:
        yield heart
        return
    thread = threading.Thread(target=heart._run, name="gatrain-heartbeat", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        heart._end.set()
        heart._changed.set()
        thread.join()
        run_dir.heartbeat.unlink(missing_ok=True)
        for node_rank in range(1, nodes.nnodes):
            _answer(run_dir, node_rank).unlink(missing_ok=True)


def _answer(run_dir: RunDir, node_rank: int) -> Path:
    return run_dir.heartbeat.with_name(f".node_{node_rank}.json")


def wait_for_node_0(
    run_dir: RunDir,
    node_rank: int = 1,
    hardware: Hardware | None = None,
    join: Callable[[str | None], None] = lambda trials: None,
) -> str:
    """Wait until node 0 says that the run folder is ready; return the run's id.

    Args:
        hardware: what this node has, for node 0 to plan with.
        join: told each time which folder of trial processes this node shall be part of; None: of none.

    Raises:
        LaunchError: node 0 was not heard of in time, or went silent.
    """
    patience_s = protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
    heard: float | None = None
    first, start = None, time.monotonic()
    while True:
        now = time.monotonic()
        with contextlib.suppress(RunFolderError, ValueError):
            told = _Beat.read(run_dir.heartbeat)
            if first is None:
                first = told.beat
            elif told.beat != first:
                if told.state == "ready":
                    return told.run_id
                if heard is None and hardware is not None:
                    write_json(
                        _answer(run_dir, node_rank), {"heard": told.beat, "hardware": codec.encode(hardware)}
                    )
                first, heard = told.beat, now
                join(told.trials_in(run_dir))
        if heard is None and now - start > patience_s:
            raise LaunchError(
                f"node 0 was not heard of in {run_dir.path} within {patience_s:g} s. Does gatrain run there "
                "with --node-rank 0, and is this folder on a file system that all nodes share? "
                f"{protocol.JOIN_TIMEOUT_S} changes the wait."
            )
        if heard is not None and now - heard > max(SILENCE_S, BEAT_S):
            raise LaunchError(f"node 0 gave up while it prepared {run_dir.path}; its own output says why.")
        with contextlib.suppress(OSError):
            os.listdir(run_dir.path)  # makes a network file system look again
        time.sleep(POLL_S)
