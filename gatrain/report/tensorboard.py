"""TensorBoard event files, where the ``tensorboard`` package is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gatrain.config import RunConfig
from gatrain.report import scalars
from gatrain.report.sink import Logger, require
from gatrain.rundir import RunDir
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord

FLUSH_S = 30.0
BUFFER_BYTES = 2**20
MOST_WAITING = 30_000
"""Steps whose points wait in memory for a disk that takes none."""


class TensorBoardSink(Logger):
    """Writes scalars of steps (train/, speed/, memory/) and evaluations (eval/) to ``folder``.

    All points of a step are one event, and events reach the file together, every `FLUSH_S` seconds: TensorBoard's
    own writer opens the file for each of them, in a thread that holds the interpreter's lock against the training.
    Points are kept until a flush has succeeded, and after an error a new file gets them all.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        """The run folder's own by default."""
        self.missing = 0
        self._info: RunInfo | None = None
        self._writer: _EventFile | None = None
        self._kept: list[tuple[Mapping[str, float], int]] = []
        self._flushed_at = time.monotonic()
        self._failed = False

    @property
    def waiting(self) -> int:
        """Points that no file holds, after an error."""
        return sum(len(values) for values, _ in self._kept) if self._failed else 0

    def check(self, config: RunConfig) -> None:
        require("tensorboard")

    def start(self, info: RunInfo) -> None:
        self._info = info
        self.folder = self.folder or RunDir(info.run_dir).tensorboard
        with self._told():
            self._open()

    def step(self, record: StepRecord) -> None:
        self._add(scalars.of_step(record), record.step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._add(scalars.of_evaluation(metrics), step)
        self._flush()

    def end(self, summary: RunSummary) -> None:
        if self._info is not None:
            self._flush()
        self.close()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._info is None:
            return
        self._kept.append((values, step))
        if len(self._kept) > MOST_WAITING:
            self.missing += len(self._kept.pop(0)[0])
        if self._writer is not None:
            with self._told():
                self._writer.add(values, step)
        if self._writer is None or time.monotonic() > self._flushed_at + FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        with self._told():
            writer = self._writer
            if writer is None:
                writer = self._open()
                for values, step in self._kept:
                    writer.add(values, step)
            writer.flush()
        self._kept, self._failed, self._flushed_at = [], False, time.monotonic()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """After an error the writer is of no more use."""
        try:
            yield
        except Exception:
            self._failed = True
            with contextlib.suppress(Exception):
                self.close()
            raise

    def _open(self) -> _EventFile:
        assert self._info is not None
        assert self.folder is not None
        first = self._kept[0][1] if self._failed and self._kept else self._info.first_step + 1
        # Points after the step that the run goes on from belong to steps that will be trained again.
        self._writer = _EventFile(self.folder, first)
        return self._writer


class _EventFile:
    """One file of events, which TensorBoard reads beside the earlier ones of its folder.

    Args:
        first_step: points of this step and of later ones in earlier files count no more.
    """

    _made = itertools.count()

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(self._made)}"
        file = (folder / name).open("ab", buffering=BUFFER_BYTES)
        self._writer: Any = RecordWriter(file)  # which closes it
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        log = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=now, step=first_step, session_log=log))
        self.flush()

    def add(self, values: Mapping[str, float], step: int) -> None:
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=points)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def where_installed() -> TensorBoardSink | None:
    """What ``logger: auto`` stands for: TensorBoard where the ``tensorboard`` package can be imported."""
    return TensorBoardSink() if importlib.util.find_spec("tensorboard") is not None else None
