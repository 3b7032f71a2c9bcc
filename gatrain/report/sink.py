"""What listeners have in common: a base that hears nothing, and the fan-out that keeps training alive."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gatrain import disk, units
from gatrain.errors import ConfigError, RunFolderError
from gatrain.report.text import clean
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.secrets import hide_known
from gatrain.train.events import RunInfo, Sink
from gatrain.train.records import RunSummary, StepRecord


class Logger:
    """A sink that ignores everything: derive from it and override what is of interest."""

    for_people = False
    """True where `notice` reaches a person's eyes."""

    def start(self, info: RunInfo) -> None:
        """The run begins or goes on."""

    def step(self, record: StepRecord) -> None:
        """One optimizer step is done."""

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The held-out split was evaluated."""

    def saved(self, step: int, path: Path) -> None:
        """The state was saved."""

    def notice(self, text: str) -> None:
        """Something that a person should know."""

    def end(self, summary: RunSummary) -> None:
        """The run is over."""

    def close(self) -> None:
        """Give back files, threads and the terminal. May be called twice, and without `end`."""


def require(package: str) -> None:
    """
    Raises:
        ConfigError: the logger's package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"logger: {package} is not installed. Install it: pip install 'gatrain[{package}]'")


def stored_id(run_dir: Path, key: str, make: Callable[[], str]) -> str:
    """The id that a tracker knows the run by: the same after a resume.

    Args:
        make: gives the id where the run has none yet.
    """
    path = RunDir(run_dir).loggers
    try:
        known = read_json(path)
    except RunFolderError:
        known = {}
    if not isinstance(known.get(key), str):
        known[key] = make()
        write_json(path, known, exact=True)
    return str(known[key])


class Fanout:
    """Passes every event on to all sinks, and training goes on whatever they raise.

    An `OSError` may pass: the disk was full, and has space again. The sink is told of once and tried again at each
    event; one with ``waiting`` and ``missing`` (numbers of lines) says itself what it still has to write. After any
    other error, or where its reader is gone, a sink is dropped. `close` (or leaving the ``with`` block) gives the
    terminal back even where training raised before `end`.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks = list(sinks)
        self.failures: list[str] = []
        """A line for each sink that lost something, unless nobody reads what it would have written."""
        self._stuck: dict[int, _Stuck] = {}
        """By the identity of a sink."""

    def __iter__(self) -> Iterator[Sink]:
        return iter(self.sinks)

    def start(self, info: RunInfo) -> None:
        self._tell("start", info)

    def step(self, record: StepRecord) -> None:
        self._tell("step", record)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._tell("evaluation", step, metrics)

    def saved(self, step: int, path: Path) -> None:
        self._tell("saved", step, path)

    def notice(self, text: str) -> None:
        self._tell("notice", hide_known(text))

    def end(self, summary: RunSummary) -> None:
        self._tell("end", summary)
        for sink in self.sinks:
            stuck = self._stuck.pop(id(sink), None)
            lost = getattr(sink, "waiting", 0) + getattr(sink, "missing", 0)
            if (stuck is not None or lost) and not _is_for_people(sink):
                lines = f", {units.plural(lost, 'line')} missing" if lost else ""
                why = (
                    f"{stuck.event} failed to the end: {stuck.cause}"
                    if stuck is not None
                    else "the disk was full"
                )
                self.failures.append(f"the logger {type(sink).__name__}: {why}{lines}")

    def watch(self, finished: Callable[[], int]) -> None:
        """Let displays that move look at the last finished step, whose metrics may come much later."""
        for sink in self.sinks:
            if (watch := getattr(sink, "watch", None)) is not None:
                watch(finished)

    def put_back(self) -> None:
        """Let sinks write their files anew that were deleted.

        Raises:
            OSError: one cannot be written.
        """
        for sink in self.sinks:
            if (put_back := getattr(sink, "put_back", None)) is not None:
                put_back()

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
                if isinstance(error, OSError) and disk.known(error).errno in disk.PASSING:
                    self._is_stuck(sink, event, error)
                else:
                    self._drop(sink, event, error)
            else:
                self._may_be_free(sink, event)

    def _is_stuck(self, sink: Sink, event: str, error: OSError) -> None:
        known = self._stuck.get(id(sink))
        if known is not None:
            known.missed += 1
            return
        self._stuck[id(sink)] = _Stuck(event, disk.reason(error), 1)
        waits = "What it has to write waits in memory" if hasattr(sink, "waiting") else "It is tried again"
        self._say(
            f"{type(sink).__name__} cannot write ({event}): {disk.reason(error)}{_place(error)}. {waits}; "
            "training goes on."
        )

    def _may_be_free(self, sink: Sink, event: str) -> None:
        stuck = self._stuck.get(id(sink))
        if stuck is None or getattr(sink, "waiting", event != stuck.event):
            return
        del self._stuck[id(sink)]
        missing = getattr(sink, "missing", stuck.missed)
        lines = units.plural(missing, "line") if missing else "no line is"
        self._say(f"{type(sink).__name__} writes again; {lines} missing.")

    def _drop(self, sink: Sink, event: str, error: Exception) -> None:
        self.sinks.remove(sink)
        _close(sink)
        cause = clean(str(error) or type(error).__name__)
        where = _place(error)
        text = f"{type(sink).__name__} is off after an error in {event}: {cause}{where}"
        # a terminal or a pipe whose reader is gone takes nothing with it: the files have it all
        if not (_is_for_people(sink) and isinstance(error, OSError)):
            self.failures.append(f"the logger {text}")
        self._say(f"{text}. Training goes on without it.")

    def _say(self, text: str) -> None:
        text = hide_known(text)
        self._tell("notice", text)
        if not any(map(_is_for_people, self.sinks)):
            with contextlib.suppress(OSError, ValueError):
                print(f"gatrain: {text}", file=sys.stderr, flush=True)


@dataclass
class _Stuck:
    """A sink that could not write."""

    event: str
    cause: str
    missed: int
    """Events that it has not written."""


def _is_for_people(sink: Sink) -> bool:
    return bool(getattr(sink, "for_people", False))


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
