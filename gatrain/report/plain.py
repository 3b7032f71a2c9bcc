"""A line for each logging interval: the run as log files and pipes see it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TextIO

from gatrain import units
from gatrain.report import text
from gatrain.report.averages import Averages
from gatrain.report.sink import Logger
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord


class PlainSink(Logger):
    """One line for each logging interval, for log files and pipes.

    At most one line a second, and after some minutes fewer (one in ten seconds at the least), beside the
    first and the last step. ``log_every`` only serves to print the newest of the steps that arrive together.
    """

    for_people = True

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        log_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._log_every = log_every
        self._clock = clock
        self._meter: Averages | None = None
        self._started = clock()
        self._printed_at: float | None = None
        self._printed_step: int | None = None
        self._widths: dict[str, int] = {}

    def start(self, info: RunInfo) -> None:
        self._meter = Averages(info)
        self._started = self._clock()
        title = f"gatrain {text.clean(info.recipe)}  {text.clean(text.shown_path(info.run_dir))}"
        self._print(title)
        self._rows(text.header_rows(info))

    def step(self, record: StepRecord) -> None:
        meter = self._meter
        if meter is None:
            return
        meter.add(record)
        first, last = self._printed_at is None, meter.step == meter.info.total_steps
        interval_end = meter.step % self._log_every == 0
        if first or last or (interval_end and self._is_time()):
            self._step_line(meter)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._meter is not None:
            self._print(
                f"{self._step_label(self._meter, step)}  {text.evaluation_text(metrics, self._meter.info)}"
            )

    def saved(self, step: int, path: Path) -> None:
        if self._meter is not None:
            where = text.clean(text.shown_path(path, self._meter.info.run_dir))
            self._print(f"{self._step_label(self._meter, step)}  state saved in {where}")

    def notice(self, text_: str) -> None:
        self._print(f"note: {text.clean(text_)}")

    def end(self, summary: RunSummary) -> None:
        meter = self._meter
        if meter is None:
            return
        if meter.last is not None and meter.step != self._printed_step:
            self._step_line(meter)
        self._print("")
        sample = text.showcase_lines(summary)
        if sample:
            self._print("sample output:")
            for line in sample:
                self._print(f"  | {line}".rstrip())
            self._print("")
        self._rows(text.summary_rows(summary, meter.info), indent="")

    def _is_time(self) -> bool:
        now = self._clock()
        gap = min(10.0, max(1.0, (now - self._started) / 60))
        return self._printed_at is None or now - self._printed_at >= gap

    def _step_line(self, meter: Averages) -> None:
        self._printed_at, self._printed_step = self._clock(), meter.step
        values = step_values(meter)
        values["left"] = (
            f"left {units.duration(meter.seconds_left)}" if meter.seconds_left is not None else ""
        )
        parts = [self._step_label(meter, meter.step)]
        for name, value in values.items():
            width = self._widths[name] = max(len(value), self._widths.get(name, 0))
            if width:
                parts.append(_stretch(value, width))
        self._print("  ".join(parts).rstrip())

    def _step_label(self, meter: Averages, step: int) -> str:
        total = meter.info.total_steps
        return f"step {step:>{len(str(total))}}/{total}"

    def _rows(self, rows: list[tuple[str, str]], indent: str = "  ") -> None:
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            self._print(f"{indent}{label:<{width}}  {value}".rstrip())

    def _print(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            silence(self._stream)
            raise


def step_values(meter: Averages) -> dict[str, str]:
    """The newest numbers, written out, by a fixed name; what was not measured is left out."""
    record, values = meter.last, {}
    if record is None:
        return {}
    values["loss"] = f"loss {text.decimal(record.loss)}"
    for name, value in record.loss_terms.items():
        values[f"loss_terms.{name}"] = f"{text.clean(name)} {text.decimal(value)}"
    values["grad_norm"] = f"grad_norm {text.decimal(record.grad_norm)}"
    if record.lr is not None:
        values["lr"] = f"lr {text.learning_rate(record.lr)}"
    for name, value in record.metrics.items():
        is_rate = name.rpartition(".")[2] == "lr"  # of a phase
        written = text.learning_rate if is_rate else text.decimal
        values[f"metrics.{name}"] = f"{text.clean(name)} {written(value)}"
    if stages := meter.info.stages:
        nth = sum(record.step > first for first, _ in stages)
        values["stage"] = f"stage {nth}/{len(stages)}"
    if record.loss_scale is not None:
        values["loss_scale"] = f"loss_scale {record.loss_scale:g}"
    if record.skipped_steps:
        values["skipped"] = f"skipped {record.skipped_steps:,}"
    if meter.samples_per_s is not None:
        values["samples"] = f"{units.rate(meter.samples_per_s)} samples/s"
    if meter.tokens_per_s is not None:
        values["tokens"] = f"{units.rate(meter.tokens_per_s)} tokens/s"
    if meter.peak_memory_bytes:
        values["memory"] = f"mem {units.size(meter.peak_memory_bytes)}"
    return values


def silence(stream: IO[str]) -> None:
    """Point a stream whose reader is gone at nothing: Python's own flush at exit would fail again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # not a real file: nothing will flush it
        pass


def _stretch(value: str, width: int) -> str:
    """Pad before the number, so that the lines stay aligned when it has fewer digits."""
    label, space, figure = value.partition(" ")
    return f"{label}{space}{figure:>{width - len(label) - 1}}" if label.isidentifier() else value.rjust(width)
