"""Node 0 prepares the run folder, and the other nodes of the run follow it through their rendezvous.

They give their hardware, which node 0 plans with, take part in its trials, and start their ranks when the folder is
ready. That the folder is the same one on every node shows by a mark that node 0 leaves in it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gatrain import codec
from gatrain.errors import LaunchError
from gatrain.hardware import Hardware
from gatrain.launch.rendezvous import POLL_S, Rendezvous
from gatrain.rundir import RunDir, write_text

SHARED_S = 60.0
"""Seconds after which a file that node 0 has written is seen on every node; network file systems are late."""


@dataclass(frozen=True)
class State:
    """How far node 0 is."""

    state: Literal["preparing", "ready", "complete"] = "preparing"
    """``ready``: the ranks may start; ``complete``: nothing is left to train."""
    trials: str | None = None
    """The folder of trial processes that the other nodes shall join."""

    def trials_in(self, run_dir: RunDir) -> str | None:
        """That folder: node 0 makes it in the run folder, wherever the text says that it is."""
        name = Path(self.trials or "").name
        return str(run_dir.path / name) if name.startswith("gatrain_host_") else None


class Preparation:
    """Node 0's side. A context manager; on a single node nothing is written and nobody is waited for."""

    def __init__(self, rendezvous: Rendezvous, run_dir: RunDir) -> None:
        self._rendezvous, self._run_dir, self._state = rendezvous, run_dir, State()
        self._is_alone = rendezvous.nodes.nnodes == 1

    def __enter__(self) -> Preparation:
        if not self._is_alone:
            self._rendezvous.open()
            write_text(self._run_dir.session, self._rendezvous.session)
            self._say()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_alone:
            self._run_dir.session.unlink(missing_ok=True)

    def announce(self, trials: Path | None) -> None:
        """The folder of trial processes that the others shall join; None: there are none (any more)."""
        self._say(trials=str(trials) if trials is not None else None)

    def ready(self) -> None:
        """The run folder is complete: the others may start their ranks."""
        self._say(state="ready", trials=None)

    def hardware_of_others(self) -> list[Hardware]:
        """What the other nodes have, in the order of their ranks. Waits until all have come.

        Raises:
            LaunchError: a node did not come in time, or failed, or has another --nproc.
        """
        if self._is_alone:
            return []
        given = self._rendezvous.collect("hardware", first=1)
        self._rendezvous.compare_shapes()
        return [codec.decode(Hardware, each) for each in given]

    def _say(self, **what: Any) -> None:
        self._state = replace(self._state, **what)
        if not self._is_alone:
            self._rendezvous.give("state", codec.encode(self._state))


def dismiss(rendezvous: Rendezvous) -> None:
    """On node 0: nothing is left to train, which the other nodes come to hear."""
    rendezvous.open()
    rendezvous.give("state", codec.encode(State("complete")))
    with contextlib.suppress(LaunchError):  # who does not come needs no answer
        rendezvous.collect("dismissed", first=1)


def follow(
    rendezvous: Rendezvous, run_dir: RunDir, hardware: Hardware, join: Callable[[str | None], None]
) -> bool:
    """On another node: wait until node 0 has prepared the run folder; False if nothing is left to train.

    Args:
        hardware: what this node has, for node 0 to plan with.
        join: told which folder of trial processes this node shall be part of; None: of none.

    Raises:
        LaunchError: node 0 failed or is gone, or its run folder is not this node's.
    """
    rendezvous.open()
    rendezvous.give("hardware", codec.encode(hardware))
    seen: State | None = None
    while True:
        if (reason := rendezvous.failure_elsewhere()) is not None:
            raise LaunchError(f"the run in {run_dir.path} could not be prepared: {reason}")
        state = _state(rendezvous)
        if state is not None and state.state == "complete":
            rendezvous.give("dismissed", True)
            return False
        if state is not None and seen is None:
            _check_shared(rendezvous, run_dir)
        if state is not None and state.state == "ready":
            return True
        if state is not None and state != seen:
            join(state.trials_in(run_dir))
            seen = state
        time.sleep(POLL_S)


def _state(rendezvous: Rendezvous) -> State | None:
    given = rendezvous.read("state", 0)
    try:
        return codec.decode(State, given) if given is not None else None
    except ValueError as error:
        raise LaunchError(f"what node 0 says at {rendezvous.endpoint} is not gatrain's: {error}") from error


def _check_shared(rendezvous: Rendezvous, run_dir: RunDir) -> None:
    """Compare the mark that node 0 has left in the run folder with its session."""
    deadline = time.monotonic() + SHARED_S
    while rendezvous.failure_elsewhere() is None:
        with contextlib.suppress(OSError):
            os.listdir(run_dir.path)  # makes a network file system look again
            if run_dir.session.read_text(encoding="utf-8") == rendezvous.session:
                return
        if time.monotonic() > deadline:
            raise LaunchError(
                f"node 0 prepares {run_dir.path}, and the folder of this name on node "
                f"{rendezvous.nodes.node_rank} is another. Give every node the same run.dir=FOLDER, on a file "
                "system that all of them share."
            )
        time.sleep(POLL_S)
