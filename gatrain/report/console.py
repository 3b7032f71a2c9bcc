"""The run as a person watches it: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from gatrain.report.plain import PlainSink
from gatrain.train.events import Sink


def console_sink(stream: TextIO | None = None, *, log_every: int = 1) -> Sink:
    """Choose the display for ``stream`` (standard output): live on a capable terminal, plain lines elsewhere.

    ``FORCE_COLOR`` does not make a terminal of a pipe: a moving display would fill a log file.
    """
    stream = sys.stdout if stream is None else stream
    if is_live_terminal(stream):
        from gatrain.report.live import LiveSink, make_console

        return LiveSink(make_console(stream))
    return PlainSink(stream, log_every=log_every)


def is_live_terminal(stream: TextIO) -> bool:
    """True where ``stream`` is a terminal that can move its cursor and draw block characters."""
    try:
        terminal = stream.isatty()
    except ValueError:  # closed
        return False
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    return terminal and not dumb and (getattr(stream, "encoding", None) or "").lower().startswith("utf")
