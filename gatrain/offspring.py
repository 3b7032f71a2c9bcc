"""Processes that belong to this one: they die with it, however it ends, and stop and go on with it.

Each leads a session and a group of its own, so that a terminal's Ctrl-C or Ctrl-Z reaches the command alone, which
decides what becomes of the others, and so that whatever they start themselves can be ended with them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from gatrain import guardian, trust
from gatrain.imports import SAFE_PATH

PARENT_PID = "GATRAIN_LAUNCHER_PID"
"""In the environment of each child."""
SOCKETS = "GATRAIN_SOCKETS"
"""In a child's environment: where its sockets get their names, a folder that is removed with what it was given."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a command to end. Ignored where it was ignored at the start, as nohup and a shell's `&` do it."""

AGENT_THREAD = "gatrain-agent"
"""Name of the thread in which torchrun's agent runs."""
PATIENCE_S = 5.0
"""Seconds that ranks have to stop between two steps. One that waits for another for longer than a collective may
take, because both were stopped in the middle of a step, ends with an error when it goes on."""

_groups: set[int] = set()
_pausing: dict[int, Path] = {}
_is_stopping = False


HASH_SEED = {"PYTHONHASHSEED": "0"}
"""Sets of strings in the user's code have one order: on every rank, in every run, and in every look at the data."""


def start(
    arguments: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    said: IO[Any] | int = subprocess.DEVNULL,
    stdout: IO[Any] | int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start Python with these arguments in a group of its own; `end` it when it is over.

    The module must call `die_with_parent` first of all.

    Args:
        env: additions to the environment.
        said: where its standard error goes.
    """
    process = subprocess.Popen(
        [sys.executable, SAFE_PATH, *arguments],
        cwd=cwd,
        env={**HASH_SEED, **os.environ, **(env or {}), PARENT_PID: str(os.getpid()), **trust.environment()},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=said,
        start_new_session=True,
    )
    adopt(process.pid)
    return process


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that `start` has started, with all that it has started, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()  # not the leader of a group
    process.wait()
    dismiss(process.pid)


def adopt(pid: int, pause_file: Path | None = None) -> None:
    """This process leads a group that shall end, stop and go on with this process.

    Args:
        pause_file: the process takes SIGTSTP for a wish to stop where it is safe, as long as there is this file.
    """
    if pid not in _groups:
        _groups.add(pid)
        guardian.guard_group(pid)
        if pause_file is not None:
            _pausing[pid] = pause_file


def dismiss(pid: int) -> None:
    """The group has ended."""
    if pid in _groups:
        _groups.discard(pid)
        _pausing.pop(pid, None)
        guardian.forget_group(pid)


def handled(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """Those of the signals that were not ignored when this process started."""
    return [signum for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN]


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """In here Ctrl-Z stops the children before it stops this process, and they go on when it does."""
    takes = threading.current_thread() is threading.main_thread()
    if not takes or signal.getsignal(signal.SIGTSTP) is not signal.SIG_DFL:  # somebody does it already
        yield
        return
    signal.signal(signal.SIGTSTP, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def _stop(signum: int, frame: FrameType | None) -> None:
    global _is_stopping
    if _is_stopping:  # again: without patience
        _is_stopping = False
        return
    _is_stopping = True
    for pid, file in _pausing.items():
        with contextlib.suppress(OSError):
            file.touch()
            os.kill(pid, signal.SIGTSTP)
    until = time.monotonic() + PATIENCE_S
    while _is_stopping and time.monotonic() < until and not all(map(_is_stopped, _pausing)):
        time.sleep(0.01)
    _to_all(signal.SIGSTOP)
    # not SIGTSTP, which the kernel drops where no shell would continue the process: a batch system suspends so
    os.kill(os.getpid(), signal.SIGSTOP)
    _is_stopping = False
    for file in set(_pausing.values()):
        file.unlink(missing_ok=True)
    for _ in range(3):  # one may have been about to stop itself
        _to_all(signal.SIGCONT)
        time.sleep(0.01)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


def _to_all(signum: int) -> None:
    for pid in list(_groups):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signum)


# --- in a child -------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it is gone, even by SIGKILL (Linux).

    From that one it also takes over what ``--trust`` has named.
    """
    parent = os.environ.get(PARENT_PID)
    if parent is None:
        return
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
    else:
        follow_parent()
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(128 + signal.SIGKILL)
    trust.inherit()
    if sockets := os.environ.get(
        SOCKETS
    ):  # else what loader processes are reached by stays behind after a kill
        from multiprocessing import process

        process.current_process()._config["tempdir"] = sockets  # type: ignore[attr-defined]


def follow_parent(*_: object) -> None:
    """End this process soon after its parent, from a thread.

    For processes that a thread has forked: the kernel's own signal comes at the end of that thread already.
    """
    parent = os.getppid()

    def follow() -> None:
        try:
            handle = os.pidfd_open(parent)
        except (AttributeError, OSError):  # not Linux, or not allowed
            handle = -1
        if handle >= 0 and os.getppid() == parent:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=follow, name="gatrain-parent", daemon=True).start()
