"""What a run tells people and files: console, JSON lines, TensorBoard, pictures. No training code."""

from __future__ import annotations

from typing import TextIO

from gatrain.report.console import console_sink
from gatrain.report.jsonl import JsonlSink
from gatrain.report.plain import PlainSink
from gatrain.report.plan_table import plan_lines, plan_table, print_plan
from gatrain.report.plot import save_plots, terminal_plot
from gatrain.report.sink import Fanout, QuietSink
from gatrain.report.tensorboard import TensorBoardSink, has_tensorboard
from gatrain.rundir import RunDir
from gatrain.train.events import Sink

__all__ = [
    "Fanout",
    "JsonlSink",
    "PlainSink",
    "QuietSink",
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
    tensorboard: bool = True,
) -> Fanout:
    """Make the usual sinks of a run: console, metrics.jsonl and, where it is installed, TensorBoard.

    They come behind one `Fanout`, which is a sink itself. Close it (or use it in a ``with`` block) when
    training is over, however it ended.

    Args:
        run_dir: The run folder; None for a rank that reports nothing.
        first_step: Steps already done (0 unless resumed): records after it are cut from the files.
        log_every: ``train.log_every``, so that plain lines show the newest of the steps that arrive together.
        stream: Where the console writes; standard output by default.
        tensorboard: Whether TensorBoard files are wanted.
    """
    if run_dir is None:
        return Fanout([])
    sinks: list[Sink] = [
        console_sink(stream, log_every=log_every),
        JsonlSink(run_dir.metrics, first_step),
    ]
    if tensorboard and has_tensorboard():
        sinks.append(TensorBoardSink(run_dir.tensorboard))
    return Fanout(sinks)
