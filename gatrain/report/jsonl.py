"""metrics.jsonl and evaluations.jsonl: one JSON object on each line, whole lines only.

NaN and infinity, which JSON has no words for, are written as ``null``: every reader can read every line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatrain import units
from gatrain.report.sink import Logger
from gatrain.rundir import atomic_file
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord

MOST_WAITING_BYTES = 64 * units.MIB
"""Lines that wait in memory for a disk that takes none; some 200,000 steps."""


class JsonlSink(Logger):
    """Appends a line for each step to ``path``, and one for each evaluation to evaluations.jsonl beside it.

    At ``first_step`` 0 both files start empty. Otherwise the run goes on: both are first cut, atomically, to
    the lines up to ``first_step``, so that steps which are trained again are not counted twice. Lines that a full
    disk did not take wait in memory, and are written with the next ones.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        self.evaluations_path = evaluations_path(path)
        self.first_step = first_step
        self._steps: _LineFile | None = None
        self._evaluations: _LineFile | None = None

    @property
    def missing(self) -> int:
        """Lines that are not in the files, and will not be."""
        return sum(file.lost for file in self._files())

    @property
    def waiting(self) -> int:
        """Lines that are not in the files yet."""
        return sum(len(file.waiting) for file in self._files())

    def start(self, info: RunInfo) -> None:
        self._steps = _LineFile(self.path, self.first_step)
        self._evaluations = _LineFile(self.evaluations_path, self.first_step)
        for file in self._files():
            file.open()

    def step(self, record: StepRecord) -> None:
        if self._steps is not None:
            self._steps.append(record.to_dict())

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._evaluations is None:
            return
        if (
            step == self.first_step
        ):  # evaluated again, after a resume that trained nothing: one line for a step
            self._evaluations.keep = step - 1
        self._evaluations.append({"step": step, **metrics})

    def put_back(self) -> None:
        """Write a file anew that was deleted under this sink, from what is still open of it.

        Raises:
            OSError: it cannot be written.
        """
        for file in self._files():
            file.put_back()

    def end(self, summary: RunSummary) -> None:
        for file in self._files():
            file.write()

    def close(self) -> None:
        for file in self._files():
            file.close()

    def _files(self) -> list[_LineFile]:
        return [file for file in (self._steps, self._evaluations) if file is not None]


class _LineFile:
    """A file that grows by whole lines: each goes out in one write, and a partial one is taken back.

    It is first cut to the lines up to step ``keep``; None leaves it as it is.
    """

    def __init__(self, path: Path, keep: int | None) -> None:
        self.path = path
        self.keep = keep
        self.waiting: list[bytes] = []
        self.lost = 0
        self._handle: int | None = None
        self._waiting_bytes = 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, after those that wait.

        Raises:
            OSError: it could not be written, and waits.
        """
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        self.waiting.append(line)
        self._waiting_bytes += len(line)
        while self._waiting_bytes > MOST_WAITING_BYTES:
            self._waiting_bytes -= len(self.waiting.pop(0))
            self.lost += 1
        self.write()

    def write(self) -> None:
        """Write the lines that wait.

        Raises:
            OSError: some of them still wait.
        """
        if not self.waiting:
            return
        handle = self.open()
        while self.waiting:
            line = self.waiting[0]
            before = os.fstat(handle).st_size
            try:
                written = os.write(handle, line)
                if written != len(line):  # a full disk takes a part first and raises only on the next write
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._take_back(before)
                raise
            self._waiting_bytes -= len(self.waiting.pop(0))

    def put_back(self) -> None:
        """See `JsonlSink.put_back`. Where another file stands there by now, lines go on at its end."""
        if self._handle is None:
            return
        ours = os.fstat(self._handle)
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                self.close()
            return
        with atomic_file(self.path) as temporary, open(temporary, "wb") as new:
            for place in range(0, ours.st_size, units.MIB):
                new.write(os.pread(self._handle, min(units.MIB, ours.st_size - place), place))
        self.close()

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def open(self) -> int:
        """The file's descriptor.

        Raises:
            OSError: it cannot be opened or cut.
        """
        if self.keep is not None:
            self.close()
            keep_until(self.path, self.keep)
            self.keep = None
        if self._handle is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            self._handle = os.open(self.path, flags, 0o666)
            cut_torn_end(self._handle)
        return self._handle

    def _take_back(self, size: int) -> None:
        """Leave whole lines only. The file is opened anew next time: a network file system may have lost it."""
        with contextlib.suppress(OSError):
            if self._handle is not None and os.fstat(self._handle).st_size != size:
                os.ftruncate(self._handle, size)
        with contextlib.suppress(OSError):
            self.close()


def cut_torn_end(handle: int) -> None:
    """Cut a file behind its last line break."""
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 4096)
        place = os.pread(handle, end - start, start).rfind(b"\n")
        if place >= 0:
            end = start + place + 1
            break
        end = start
    if end != size:
        os.ftruncate(handle, end)


def evaluations_path(metrics: Path) -> Path:
    """Where the evaluations lie that belong to a metrics file."""
    return metrics.with_name("evaluations.jsonl")


def keep_until(path: Path, last_step: int) -> None:
    """Cut a JSON lines file to the whole lines with ``step <= last_step``; a torn last line goes too.

    The new contents replace the old in one rename. A missing file becomes an empty one.
    """
    with atomic_file(path) as temporary:
        if last_step <= 0 or not path.exists():
            return
        with path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                record = _parse(line)
                if record is not None and record["step"] <= last_step:
                    new.write(line if line.endswith(b"\n") else line + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSON lines file that have a step; a missing file has none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [record for record in map(_parse, file) if record is not None]


def unreadable(metrics: Path) -> list[str]:
    """Every sample that was skipped as unreadable in any part of the run, each once, with the reason."""
    found = (line.get("unreadable") for line in read_lines(metrics))
    return list(dict.fromkeys(str(text) for texts in found if isinstance(texts, list) for text in texts))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _plain(value: Any) -> Any:
    """Turn a value into what strict JSON can hold: no NaN, no paths, no foreign numbers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy number
        return _plain(value.item())
    return str(value)
