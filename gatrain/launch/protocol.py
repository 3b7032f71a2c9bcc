"""What launcher and ranks agree on besides the run folder: environment names, one small file for each rank.

Each rank keeps a file in a private folder of its launcher, so that the launcher knows its pid (to pass
signals on) and how it ended (torchrun tells only of failures):

    state    running -> done | stopped      (a rank that is gone while ``running`` died)
    signal   what it was asked to stop with, or null

A rank that stopped as asked exits with 0: any other code would make torchrun end the ranks that still save.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from gatrain.errors import LaunchError
from gatrain.launch.net import interface_of
from gatrain.offspring import HASH_SEED, PARENT_PID

LAUNCHER_PID = PARENT_PID
NODE_RANK = "GATRAIN_NODE_RANK"
RANK_STATE = "GATRAIN_RANK_STATE"
"""Folder of the files described above."""
PAUSE = "pause"
"""A file in that folder: the launcher is about to stop, as at Ctrl-Z, and the ranks with it."""
DEVICE = "GATRAIN_DEVICE"
"""``cpu`` or ``cuda``; unset means CUDA where it is visible."""
TIMEOUT_S = "GATRAIN_TIMEOUT_S"
"""Seconds that a collective may take before the run fails; 600 when unset."""
JOIN_TIMEOUT_S = "GATRAIN_JOIN_TIMEOUT_S"
"""Seconds that a node waits for the others to start; 300 when unset."""
GRACE_S = "GATRAIN_GRACE_S"
"""Seconds that the ranks have to stop and save after SIGTERM or SIGHUP; 120 when unset."""

LOG_START = "=== started"
"""First words of each start in a rank's log, to which later starts append."""
RUNNING, DONE, STOPPED = "running", "done", "stopped"


@dataclass(frozen=True)
class RankState:
    """The contents of one rank's file."""

    pid: int
    rank: int
    state: str
    signal: int | None = None


def write_rank_state(folder: Path, state: RankState) -> None:
    """Write a rank's file; the rename makes it whole for the launcher, which polls it."""
    path = folder / f"{state.pid}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(vars(state)))
    os.replace(temporary, path)


def read_rank_states(folder: Path) -> dict[int, RankState]:
    """Return the newest state of each rank process that ever started, by pid."""
    states = {}
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            state = RankState(**json.loads(path.read_text()))
            states[state.pid] = state
    return states


def defaults_for_ranks(nproc: int, own_address: str) -> dict[str, str]:
    """What the ranks of this node find in their environment, unless it is set already.

    Args:
        nproc: ranks of this node.
        own_address: this node's, on the way to the others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {
        # without it each rank would use all cores, and torchrun's own default is 1
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        **HASH_SEED,
        # libtorch's warnings (host names without reverse look-up, and the like) help nobody at a terminal
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    interface = interface_of(own_address)
    if interface is not None:
        # gloo otherwise takes the host name's address, on Debian 127.0.1.1, which no other node reaches
        wanted["GLOO_SOCKET_IFNAME"] = interface
    return {name: value for name, value in wanted.items() if name not in os.environ}


def seconds(name: str, default: float) -> float:
    """Read a number of seconds from the environment.

    Raises:
        LaunchError: the value is not a positive number.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise LaunchError(
        f"{name}={text!r} is not a positive number of seconds. Set for example {name}={default:g}."
    )
