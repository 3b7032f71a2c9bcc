"""Find the rank that failed first among all that failed, and say it as one error."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from gatrain import codec
from gatrain.errors import EXIT_CODES, GatrainError, OutdatedPlanError, RunFolderError, WorkerError
from gatrain.launch.protocol import LOG_START
from gatrain.rundir import RunDir, read_json

TAIL_LINES = 5

HINTS = {
    signal.SIGKILL: (
        "Most often the kernel or the scheduler does this when memory runs out: lower batch.micro or "
        "train.data_workers, or ask for more memory."
    ),
    signal.SIGBUS: (
        "Most often /dev/shm is full: lower train.data_workers, or give the container more shared memory. Or a "
        "file of the data was cut off while it was read, or its disk failed."
    ),
    signal.SIGSEGV: "A compiled library crashed; the log has the Python stack.",
    signal.SIGABRT: "A compiled library gave up; the log may say why.",
}


@dataclass(frozen=True)
class Exit:
    """A rank process that ended before its work did, as torchrun saw it, or the launcher where it ended with 0."""

    rank: int
    pid: int
    code: int
    """Exit code, or minus the signal's number."""
    time: float
    """When its end was seen (`time.time`)."""


@dataclass(frozen=True)
class Cause:
    """One failure and what decides whether it is the one to show."""

    secondary: bool
    """It only says that another rank is gone."""
    unnamed: bool
    """Not an error that gatrain raises on purpose."""
    time: float
    error: GatrainError

    @property
    def order(self) -> tuple[bool, bool, float]:
        # an error that gatrain raised on purpose says more than the crashes that it brings about
        return self.secondary, self.unnamed, self.time


def first_cause(run_dir: RunDir, exits: list[Exit], since: float, killed: set[int]) -> Cause | None:
    """Return what failed first, or None where no rank left a reason.

    Args:
        run_dir: where ranks leave their reports and logs.
        exits: this node's ranks that did not end with 0.
        since: start of the launch (`time.time`); older reports are of an earlier run.
        killed: pids that the launcher ended itself.
    """
    causes = []
    reported = set()
    for path in sorted(run_dir.logs.glob("error_rank_*.json")):
        report = _Report.read(path)
        if report is not None and report.time >= since:
            causes.append(_from_report(run_dir, report))
            reported.add(report.pid)
    causes += [_from_exit(run_dir, e) for e in exits if e.pid not in reported and e.pid not in killed]
    return min(causes, key=lambda cause: cause.order) if causes else None


def is_only_consequence(run_dir: RunDir, exits: list[Exit], killed: set[int]) -> bool:
    """Whether a stop explains every failure: ended by the launcher or a polite signal, or a lost peer."""
    polite = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGUSR1, 130, 143, 129, 138}
    for item in exits:
        report = _Report.read(run_dir.rank_error(item.rank))
        if report is not None and report.pid == item.pid:
            if not report.secondary:
                return False
        elif item.pid not in killed and item.code not in polite:
            return False
    return True


@dataclass(frozen=True)
class _Report:
    """What a failing rank writes about itself (`gatrain.rank`)."""

    rank: int
    pid: int
    time: float
    exit_code: int = WorkerError.exit_code
    kind: str = ""
    """The error's class."""
    message: str = ""
    secondary: bool = False

    @classmethod
    def read(cls, path: Path) -> _Report | None:
        """None where there is none, or something else."""
        try:
            return codec.decode(cls, read_json(path))
        except (RunFolderError, ValueError):
            return None


def _from_report(run_dir: RunDir, report: _Report) -> Cause:
    message = report.message
    unnamed = report.exit_code == WorkerError.exit_code
    if unnamed:
        message = f"rank {report.rank}: {message}\nThe whole traceback is in {run_dir.rank_log(report.rank)}"
    kind = EXIT_CODES.get(report.exit_code, WorkerError)
    if report.kind == OutdatedPlanError.__name__:
        kind = OutdatedPlanError
    error = kind(message)
    return Cause(report.secondary, unnamed, report.time, error)


def _from_exit(run_dir: RunDir, item: Exit) -> Cause:
    """A rank that died without a word."""
    log = run_dir.rank_log(item.rank)
    if item.code < 0:
        signum = -item.code
        name = signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
        text = f"rank {item.rank} (pid {item.pid}) was killed by {name}."
        hint = HINTS.get(signal.Signals(signum)) if signum in set(signal.Signals) else None
    else:
        text = f"rank {item.rank} (pid {item.pid}) ended with exit code {item.code} and left no message."
        hint = None if item.code else "It was in the middle of its work: some code called os._exit(0)."
    lines = [text, *([hint] if hint else []), *_log_tail(log)]
    # torchrun ends the others with SIGTERM after a failure: alone it says nothing about the reason
    return Cause(item.code == -signal.SIGTERM, True, item.time, WorkerError("\n".join(lines)))


def _log_tail(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return [f"It left no log at {log}"]
    starts = [index for index, line in enumerate(lines) if line.startswith(LOG_START)]
    last = lines[starts[-1] + 1 if starts else 0 :][-TAIL_LINES:]
    return (
        [f"Last lines of {log}:", *(f"  {line}" for line in last)] if last else [f"It wrote nothing to {log}"]
    )
