"""Processes of a test, found by a mark in their environment, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
MARK = "GATRAIN_TEST_MARK"


class Place:
    """A folder with a TMPDIR of its own, whose processes carry a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tmp = folder, folder / "tmp"
        self.tmp.mkdir()
        self._started: list[subprocess.Popen[str]] = []
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self.env = {
            **os.environ,
            MARK: self._mark.partition("=")[2],
            "PYTHONPATH": str(REPO),
            "TMPDIR": str(self.tmp),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self, *arguments: str, ignored: tuple[int, ...] = (), **env: str) -> subprocess.Popen[str]:
        """Start Python with these arguments, and these signals ignored. Its output is in `said`."""

        def ignore() -> None:
            for signum in ignored:
                signal.signal(signum, signal.SIG_IGN)

        with open(self.folder / "said", "w") as said:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=ignore if ignored else None,
            )
        self._started.append(process)
        return process

    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    def processes(self, having: str = "") -> dict[int, str]:
        """Command lines of the living ones by pid; zombies are dead."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if state_of(int(entry.name)) not in "ZX" and having in line:
                        found[int(entry.name)] = line
        return found

    def left(self) -> list[str]:
        """Names in TMPDIR but that of torch's own cache."""
        return sorted(path.name for path in self.tmp.glob("*") if not path.name.startswith("torchinductor_"))

    def end(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()


def state_of(pid: int) -> str:
    """The letter that ps shows; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def wait_until(done: Callable[[], Any], limit_s: float = 60) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := done()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found
