"""What listeners have in common: a base that hears nothing, and the fan-out that keeps training alive."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gatrain.report.text import clean
from gatrain.train.events import RunInfo, Sink


class QuietSink:
    """A sink that ignores everything: derive from it and override what is of interest."""

    for_people = False
    """True where `notice` reaches a person's eyes."""

    def start(self, info: RunInfo) -> None:
        """The run begins or goes on."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step is done."""

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The held-out split was evaluated."""

    def saved(self, step: int, path: Path) -> None:
        """The state was saved."""

    def notice(self, text: str) -> None:
        """Something that a person should know."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is over."""

    def close(self) -> None:
        """Give back files, threads and the terminal. May be called twice, and without `end`."""


class Fanout:
    """Passes every event on to all sinks; a sink that raises is dropped, told of once, and training goes on.

    A full disk or a closed pipe costs its own report, never the run. `close` (or leaving the ``with`` block)
    gives the terminal back even where training raised before `end`.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks = list(sinks)
        self.failures: list[str] = []
        """A line for each sink that was dropped, unless nobody reads what it would have written."""

    def __iter__(self) -> Iterator[Sink]:
        return iter(self.sinks)

    def start(self, info: RunInfo) -> None:
        self._tell("start", info)

    def step(self, record: Mapping[str, Any]) -> None:
        self._tell("step", record)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._tell("evaluation", step, metrics)

    def saved(self, step: int, path: Path) -> None:
        self._tell("saved", step, path)

    def notice(self, text: str) -> None:
        self._tell("notice", text)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._tell("end", summary)

    def close(self) -> None:
        """Close every sink that can be closed; what fails here is of no more use to anybody."""
        for sink in self.sinks:
            _close(sink)

    def __enter__(self) -> Fanout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, event: str, *arguments: Any) -> None:
        for sink in list(self.sinks):
            if sink not in self.sinks:  # dropped by a notice about another one
                continue
            try:
                getattr(sink, event)(*arguments)
            except Exception as error:
                self._drop(sink, event, error)

    def _drop(self, sink: Sink, event: str, error: Exception) -> None:
        self.sinks.remove(sink)
        _close(sink)
        cause = clean(str(error) or type(error).__name__)
        where = _place(error)
        text = f"{type(sink).__name__} is off after an error in {event}: {cause}{where}"
        # a terminal or a pipe whose reader is gone takes nothing with it: the files have it all
        if not (getattr(sink, "for_people", False) and isinstance(error, OSError)):
            self.failures.append(f"the logger {text}")
        text = f"{text}. Training goes on without it."
        self._tell("notice", text)
        if not any(getattr(other, "for_people", False) for other in self.sinks):
            with contextlib.suppress(OSError, ValueError):
                print(f"gatrain: {text}", file=sys.stderr, flush=True)


def _place(error: Exception) -> str:
    """Where a listener of the user's own failed; empty for those of gatrain."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent.parent)
    own = [f for f in frames if not f.filename.startswith(package)]
    inner = own[-1] if own else None
    return f" at {inner.filename}:{inner.lineno} in {inner.name}" if inner is not None else ""


def _close(sink: Sink) -> None:
    close = getattr(sink, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):
            close()
