"""How the other nodes of a run follow node 0 through the run folder that they share.

Node 0 rewrites one small file every two seconds, first as ``preparing``, then as ``ready``. A file left over
from an earlier run looks the same but never changes, so a node trusts it only after it has seen it change:
clocks of different machines need not agree.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from gatrain.errors import LaunchError, RunFolderError
from gatrain.launch import protocol
from gatrain.launch.nodes import Nodes
from gatrain.rundir import RunDir, read_json, write_json

BEAT_S = 2.0
SILENCE_S = 60.0
"""A node once heard of and then silent for this long is gone; network file systems show changes late."""


@contextlib.contextmanager
def beating(run_dir: RunDir, nodes: Nodes) -> Iterator[Callable[[], None]]:
    """Tell the other nodes that node 0 prepares; call what is yielded when the run folder is ready.

    On a single node nothing is written.
    """
    if nodes.nnodes == 1:
        yield lambda: None
        return
    state: dict[str, Any] = {"state": "preparing", "run_id": nodes.run_id, "beat": uuid.uuid4().hex}
    changed, end = threading.Event(), threading.Event()

    def beat() -> None:
        until = float("inf")
        while not end.is_set() and time.monotonic() < until:
            if state["state"] == "ready" and until == float("inf"):
                # a node that comes later than this is refused by the others anyway
                until = time.monotonic() + 2 * protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
            state["beat"] = uuid.uuid4().hex
            with contextlib.suppress(OSError):
                write_json(run_dir.heartbeat, state)
            changed.wait(BEAT_S)
            changed.clear()

    def ready() -> None:
        state["state"] = "ready"
        changed.set()

    thread = threading.Thread(target=beat, name="gatrain-heartbeat", daemon=True)
    thread.start()
    try:
        yield ready
    finally:
        end.set()
        changed.set()
        thread.join()
        run_dir.heartbeat.unlink(missing_ok=True)


def wait_for_node_0(run_dir: RunDir) -> str:
    """Wait until node 0 says that the run folder is ready; return the run's id.

    Raises:
        LaunchError: node 0 was not heard of in time, or went silent.
    """
    patience_s = protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
    heard: float | None = None
    first, start = None, time.monotonic()
    while True:
        now = time.monotonic()
        with contextlib.suppress(RunFolderError):
            told = read_json(run_dir.heartbeat)
            if first is None:
                first = told.get("beat")
            elif told.get("beat") != first:
                if told.get("state") == "ready":
                    return str(told.get("run_id", "gatrain"))
                first, heard = told.get("beat"), now
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
        time.sleep(0.2)
