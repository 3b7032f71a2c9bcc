"""TensorBoard event files, where the ``tensorboard`` package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatrain.report import text
from gatrain.report.sink import QuietSink
from gatrain.train.events import RunInfo

_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "samples_per_s": "speed/samples_per_s",
    "tokens_per_s": "speed/tokens_per_s",
    "peak_memory_gib": "memory/peak_gib",
}


def has_tensorboard() -> bool:
    """True where the ``tensorboard`` package can be imported."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoardSink(QuietSink):
    """Writes scalars of steps (train/, speed/, memory/) and evaluations (eval/) to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: it takes a second, and only rank 0 wants it

        # Points after the step that the run goes on from belong to steps that will be trained again.
        writer: Any = SummaryWriter  # untyped in torch
        self._writer = writer(log_dir=str(self.folder), purge_step=info.first_step + 1, flush_secs=30)

    def step(self, record: Mapping[str, Any]) -> None:
        values = dict(record)
        memory = text.number(record.get("peak_memory_bytes"))
        if memory:
            values["peak_memory_gib"] = memory / 2**30
        for key, tag in _TAGS.items():
            self._scalar(tag, values.get(key), int(record["step"]))
        for name, value in text.loss_terms(record).items():
            self._scalar(f"train/loss_terms/{name}", value, int(record["step"]))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._scalar(f"eval/{name}", value, step)  # loss_terms, a mapping, is no scalar
        for name, value in text.loss_terms(metrics).items():
            self._scalar(f"eval/loss_terms/{name}", value, step)
        if self._writer is not None:
            self._writer.flush()

    def end(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _scalar(self, tag: str, value: Any, step: int) -> None:
        if self._writer is not None and isinstance(value, int | float):
            self._writer.add_scalar(tag, value, step)
