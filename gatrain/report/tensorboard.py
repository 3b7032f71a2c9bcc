"""TensorBoard event files, where the ``tensorboard`` package is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gatrain import units
from gatrain.report import text
from gatrain.report.sink import QuietSink
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord

_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "samples_per_s": "speed/samples_per_s",
    "tokens_per_s": "speed/tokens_per_s",
}


def has_tensorboard() -> bool:
    """True where the ``tensorboard`` package can be imported."""
    return importlib.util.find_spec("tensorboard") is not None


FLUSH_S = 30.0
MOST_WAITING = 200_000
"""Points that wait in memory for a disk that takes none."""


class TensorBoardSink(QuietSink):
    """Writes scalars of steps (train/, speed/, memory/) and evaluations (eval/) to ``folder``.

    The writer's thread ends for good at the first error of the disk. So points are kept until a flush has
    succeeded, and after an error a new writer gets them all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing = 0
        self._info: RunInfo | None = None
        self._writer: Any = None
        self._kept: list[tuple[str, float, int]] = []
        self._flushed_at = time.monotonic()
        self._failed = False

    @property
    def waiting(self) -> int:
        """Points that no file holds, after an error."""
        return len(self._kept) if self._failed else 0

    def start(self, info: RunInfo) -> None:
        self._info = info
        _keep_writers_quiet()
        with self._told():
            self._open()

    def step(self, record: StepRecord) -> None:
        step = record.step
        points = [(tag, getattr(record, name), step) for name, tag in _TAGS.items()]
        if record.peak_memory_bytes:
            points.append(("memory/peak_gib", record.peak_memory_bytes / units.GIB, step))
        points += [(f"train/loss_terms/{name}", value, step) for name, value in record.loss_terms.items()]
        points += [(f"train/{name}", value, step) for name, value in record.metrics.items()]
        self._add(points)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        points = [(f"eval/{name}", value, step) for name, value in metrics.items()]  # loss_terms is no scalar
        points += [
            (f"eval/loss_terms/{name}", value, step) for name, value in text.loss_terms(metrics).items()
        ]
        self._add(points)
        self._flush()

    def end(self, summary: RunSummary) -> None:
        if self._info is not None:
            self._flush()
        self.close()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _add(self, points: list[tuple[str, Any, int]]) -> None:
        found = [point for point in points if isinstance(point[1], int | float)]
        if self._info is None:
            return
        self._kept += found
        if (surplus := len(self._kept) - MOST_WAITING) > 0:
            del self._kept[:surplus]
            self.missing += surplus
        if self._writer is not None:
            with self._told():
                for point in found:
                    self._writer.add_scalar(*point)
        if self._writer is None or time.monotonic() > self._flushed_at + FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        with self._told():
            writer = self._writer
            if writer is None:
                writer = self._open()
                for point in self._kept:
                    writer.add_scalar(*point)
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
        first = self._kept[0][2] if self._failed and self._kept else self._info.first_step + 1
        # Points after the step that the run goes on from belong to steps that will be trained again.
        writer: Any = SummaryWriter  # untyped in torch
        self._writer = writer(log_dir=str(self.folder), purge_step=first, flush_secs=int(FLUSH_S))
        return self._writer


def _keep_writers_quiet() -> None:
    """An error of a writer's thread is raised at the next event; it need not be printed as a traceback too."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
