"""metrics.jsonl and evaluations.jsonl: one JSON object on each line, whole lines only.

NaN and infinity, which JSON has no words for, are written as ``null``: every reader can read every line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatrain.report.sink import QuietSink
from gatrain.rundir import atomic_file
from gatrain.train.events import RunInfo


class JsonlSink(QuietSink):
    """Appends a line for each step to ``path``, and one for each evaluation to evaluations.jsonl beside it.

    At ``first_step`` 0 both files start empty. Otherwise the run goes on: both are first cut, atomically, to
    the lines up to ``first_step``, so that steps which are trained again are not counted twice.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        self.evaluations_path = evaluations_path(path)
        self.first_step = first_step
        self._steps: _LineFile | None = None
        self._evaluations: _LineFile | None = None

    def start(self, info: RunInfo) -> None:
        for path in (self.path, self.evaluations_path):
            keep_until(path, self.first_step)
        self._steps = _LineFile(self.path)
        self._evaluations = _LineFile(self.evaluations_path)

    def step(self, record: Mapping[str, Any]) -> None:
        if self._steps is not None:
            self._steps.append(record)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._evaluations is None:
            return
        if (
            step == self.first_step
        ):  # evaluated again, after a resume that trained nothing: one line for a step
            self._evaluations.close()
            keep_until(self.evaluations_path, step - 1)
            self._evaluations = _LineFile(self.evaluations_path)
        self._evaluations.append({"step": step, **metrics})

    def end(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        for file in (self._steps, self._evaluations):
            if file is not None:
                file.close()
        self._steps = self._evaluations = None


class _LineFile:
    """A file that grows by whole lines: each goes out in one write, and a partial one is taken back."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        before = os.fstat(self._handle).st_size
        written = os.write(self._handle, line)
        if written != len(line):  # a full disk takes a part first and raises only on the next write
            os.ftruncate(self._handle, before)
            raise OSError(f"wrote {written} of {len(line)} bytes: is the disk full?")

    def close(self) -> None:
        os.close(self._handle)


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
    except ValueError:
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
