"""What a run tells people and files: console, JSON lines, TensorBoard, pictures. No training code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from gatrain.report.console import console_sink
from gatrain.report.jsonl import JsonlSink
from gatrain.report.plain import PlainSink
from gatrain.report.plan_table import plan_lines, plan_table, print_plan
from gatrain.report.plot import save_plots, terminal_plot
from gatrain.report.sink import Fanout, Logger
from gatrain.report.tensorboard import TensorBoardSink, where_installed
from gatrain.rundir import RunDir
from gatrain.train.events import Sink

__all__ = [
    "Fanout",
    "JsonlSink",
    "Logger",
    "PlainSink",
    "TensorBoardSink",
    "console_sink",
    "make_sinks",
    "plan_lines",
    "plan_table",
    "print_plan",
    "save_plots",
    "terminal_plot",
]


def make_sinks(
    run_dir: RunDir | None,
    first_step: int,
    *,
    log_every: int = 1,
    stream: TextIO | None = None,
    loggers: Sequence[Sink] | None = None,
) -> Fanout:
    """Make the sinks of a run: console, metrics.jsonl, and loggers.

    They come behind one `Fanout`, which is a sink itself. Close it (or use it in a ``with`` block) when
    training is over, however it ended.

    Args:
        run_dir: The run folder; None for a rank that reports nothing.
        first_step: Steps already done (0 unless resumed): records after it are cut from the files.
        log_every: ``train.log_every``, so that plain lines show the newest of the steps that arrive together.
        stream: Where the console writes; standard output by default.
        loggers: What the metrics go to beside metrics.jsonl; TensorBoard, where it is installed, by default.
    """
    if run_dir is None:
        return Fanout([])
    if loggers is None:
        loggers = [logger for logger in (where_installed(),) if logger is not None]
    return Fanout(
        [console_sink(stream, log_every=log_every), JsonlSink(run_dir.metrics, first_step), *loggers]
    )
