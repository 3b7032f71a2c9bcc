"""TensorBoard event files, where the ``tensorboard`` package is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
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
MOST_WAITING = 30_000
"""Steps whose points wait in memory for a disk that takes none."""


class TensorBoardSink(Logger):
    """Writes scalars of steps (train/, speed/, memory/) and evaluations (eval/) to ``folder``.

    The writer's thread ends for good at the first error of the disk. So points are kept until a flush has
    succeeded, and after an error a new writer gets them all.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        """The run folder's own by default."""
        self.missing = 0
        self._info: RunInfo | None = None
        self._writer: Any = None
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
        _keep_writers_quiet()
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
                _write(self._writer, values, step)
        if self._writer is None or time.monotonic() > self._flushed_at + FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        with self._told():
            writer = self._writer
            if writer is None:
                writer = self._open()
                for values, step in self._kept:
                    _write(writer, values, step)
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

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # late: it takes a second, and only rank 0 wants it

        assert self._info is not None
        first = self._kept[0][1] if self._failed and self._kept else self._info.first_step + 1
        # Points after the step that the run goes on from belong to steps that will be trained again.
        writer: Any = SummaryWriter  # untyped in torch
        self._writer = writer(log_dir=str(self.folder), purge_step=first, flush_secs=int(FLUSH_S))
        return self._writer


def _write(writer: Any, values: Mapping[str, float], step: int) -> None:
    """All points of a step in one event: the writer's thread, which holds the interpreter's lock against the
    training, opens the file for each event."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    writer._get_file_writer().add_summary(Summary(value=points), step)


def where_installed() -> TensorBoardSink | None:
    """What ``logger: auto`` stands for: TensorBoard where the ``tensorboard`` package can be imported."""
    return TensorBoardSink() if importlib.util.find_spec("tensorboard") is not None else None


def _keep_writers_quiet() -> None:
    """An error of a writer's thread is raised at the next event; it need not be printed as a traceback too."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
