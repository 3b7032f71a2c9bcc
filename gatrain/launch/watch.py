"""The launcher's main thread while the ranks work: passes signals on, notices deaths, ends what would hang.

torchrun's agent runs in another thread, so it installs no signal handlers: its own would kill the ranks 30 s
after a signal (before torch 2.14), in the middle of a long step or a large save.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gatrain import offspring
from gatrain.errors import Interrupted
from gatrain.launch import protocol
from gatrain.launch.protocol import RankState
from gatrain.launch.rendezvous import Rendezvous

SCAN_S = 0.05
PEERS_S = 1.0
"""Seconds between two looks at the other nodes."""
SURVIVORS_S = 10.0
"""Seconds that ranks may go on after another rank died; without an answer from it most of them hang."""
DOUBLE_S = 0.5
"""Two signals closer than this are one: some parents pass on what the terminal or a scheduler already sent."""
AFTERMATH_S = 0.5
"""Seconds that torchrun's agent has to notice that its ranks were ended."""
SCHEDULERS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID", "_CONDOR_SCRATCH_DIR")
"""Set within a job. Schedulers go from a polite signal to a stronger one, and wait for the save in between."""


@dataclass
class Watch:
    """State of one launch. Times are `time.monotonic` seconds, except in ``died``."""

    state_folder: Path
    rendezvous: Rendezvous
    grace_s: float
    in_job: bool = False
    """Whether a scheduler's job is known, whatever the environment says."""
    stop_signal: int | None = None
    stop_since: float = 0.0
    kill_signal: int | None = None
    """The second signal: the ranks end at once."""
    started: bool = False
    """Set by the agent's thread once all nodes are here."""
    lost: str | None = None
    """Why ranks of this node were ended although none of them failed: what another node reported."""
    states: dict[int, RankState] = field(default_factory=dict)
    died: dict[int, float] = field(default_factory=dict)
    """When a rank's process vanished without having said that it was done; pid to `time.time`."""
    killed: set[int] = field(default_factory=set)
    """Processes ended by this launcher: never the cause of anything."""
    _seen: dict[int, float] = field(default_factory=dict)
    """When a rank's process was seen first."""
    _signalled: dict[int, int] = field(default_factory=dict)
    _gone: set[int] = field(default_factory=set)
    _end_at: float | None = None
    _peers_at: float = 0.0
    _previous: dict[int, Any] = field(default_factory=dict)
    _terminals: list[int] = field(default_factory=lambda: [fd for fd in (1, 2) if os.isatty(fd)])

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            for signum in offspring.handled():
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def follow(self, agent: threading.Thread) -> None:
        """Return when the agent's thread has ended.

        Raises:
            Interrupted: a second Ctrl-C or SIGTERM, or a stop while the nodes were still gathering.
        """
        while agent.is_alive():
            agent.join(SCAN_S)
            self._scan()
            if self.kill_signal is not None:
                self._end_at_once(agent)
                name = name_of(self.kill_signal)
                which = (
                    "the second"
                    if self.kill_signal == self.stop_signal
                    else f"{name_of(self.stop_signal)}, then"
                )
                text = f"Ended at once by {which} {name}; nothing was saved."
                raise interrupted(self.kill_signal, text)
            if self.stop_signal is not None and not self.started:
                raise interrupted(
                    self.stop_signal, f"Stopped by {name_of(self.stop_signal)} before the start."
                )
        self._scan()

    def _end_at_once(self, agent: threading.Thread) -> None:
        """Kill the ranks, also those that torchrun may start meanwhile, and let its thread end if it will."""
        until = time.monotonic() + AFTERMATH_S
        while time.monotonic() < until and agent.is_alive():
            self._scan()
            self._kill(self._alive())
            agent.join(SCAN_S)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        for fd in self._terminals if signum == signal.SIGHUP else []:
            if not os.isatty(fd):  # closed: whatever is said at the end must not fail on it
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        if self.stop_signal is not None and now - self.stop_since >= DOUBLE_S and self._is_second(signum):
            self.kill_signal = signum
        elif self.stop_signal in (None, signal.SIGUSR1, signal.SIGHUP):
            is_news = self.stop_signal != signum
            self.stop_signal, self.stop_since = signum, now if is_news else self.stop_since
            if signum == signal.SIGINT and sys.stderr.isatty():
                with contextlib.suppress(OSError):
                    os.write(2, b"\r\nStopping after this step, then saving. Ctrl-C again ends at once.\r\n")

    def _is_second(self, signum: int) -> bool:
        """Whether a signal after another means: at once. Only where a person, or a program, insists."""
        if signum not in (signal.SIGINT, signal.SIGTERM):
            return False
        if (
            self.stop_signal == signal.SIGHUP
        ):  # a closed terminal, then the end of the session or of the machine
            return signum == signal.SIGINT
        if self.in_job or any(name in os.environ for name in SCHEDULERS):
            return signum == self.stop_signal  # one of another kind is the limit after its early notice
        return True

    def _alive(self) -> list[int]:
        return [pid for pid in self.states if pid not in self._gone]

    def _scan(self) -> None:
        now = time.monotonic()
        # states are read after the check for life: a rank writes its last state before it ends
        gone = {pid for pid in self._alive() if not process_exists(pid)}
        self.states = protocol.read_rank_states(self.state_folder)
        for pid in self.states:
            self._seen.setdefault(pid, now)
        for pid in self.states.keys() - self._gone - gone:
            offspring.adopt(pid, self.state_folder / protocol.PAUSE)
        for pid in gone:
            offspring.dismiss(pid)
        self._gone |= gone
        for pid in gone:
            if self.states[pid].state == protocol.RUNNING and pid not in self.killed:
                self.died[pid] = time.time()
                self._end_at = self._end_at or now + SURVIVORS_S
        if not self._alive():
            self._end_at = None  # torchrun may start another set of ranks
        self._pass_signal_on()
        if now >= self._peers_at + PEERS_S and self.started and self.lost is None:
            self._peers_at, self.lost = now, self.rendezvous.failure_elsewhere()
            if self.lost is not None:
                self._end_at = self._end_at or now + 1.0
        if self.stop_signal in (signal.SIGTERM, signal.SIGHUP) and now > self.stop_since + self.grace_s:
            self._end_at = now
        if self._end_at is not None and now >= self._end_at:
            self._kill(self._alive())

    def vanished(self) -> list[RankState]:
        """Ranks of the last start whose processes are gone, by nobody here, and never said that they were done."""
        newest = {}
        for pid in sorted(self.states, key=self._seen.__getitem__):
            newest[self.states[pid].rank] = self.states[pid]
        return [
            state for state in newest.values() if state.state == protocol.RUNNING and state.pid in self.died
        ]

    def _pass_signal_on(self) -> None:
        # Ranks live in sessions of their own: a terminal's Ctrl-C reaches this process alone. Only the rank
        # itself is told, not its data loading processes, which it needs to finish the step.
        for pid in self._alive() if self.stop_signal is not None else []:
            if self._signalled.get(pid) != self.stop_signal and self.states[pid].state == protocol.RUNNING:
                self._signalled[pid] = int(self.stop_signal or 0)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self._signalled[pid])

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            if pid not in self.killed:
                self.killed.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # with the rank's own children; each rank leads a group


def interrupted(signum: int, message: str) -> Interrupted:
    """An `Interrupted` with the exit code of its signal: 130 for SIGINT, 143 for the others."""
    error = Interrupted(message)
    error.exit_code = 130 if signum == signal.SIGINT else 143
    return error


def name_of(signum: int | None) -> str:
    """For people: ``Ctrl-C`` or the signal's name."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum or 0).name


def process_exists(pid: int) -> bool:
    """Whether there is such a process, be it another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
