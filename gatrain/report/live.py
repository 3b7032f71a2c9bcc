"""The live display: facts once at the top, a few lines that move at the bottom, events in between.

Everything is built of `Text`, which never reads markup, one object for each line. So nothing from outside
can style or hide anything, and the display knows how wide its lines are, which a resize needs (`_Region`).
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.segment import ControlType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gatrain import units
from gatrain.report import text
from gatrain.report.averages import Averages
from gatrain.report.plain import silence, step_values
from gatrain.report.plot import sparkline, terminal_plot
from gatrain.report.sink import Logger
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord

_WIDEST = 120
_LABEL, _NUMBER, _GOOD, _WARN = "dim", "bold", "green", "yellow"


class _Console(Console):
    """A console that reports a closed pipe; Rich's own would end the process, and with it the training."""

    def on_broken_pipe(self) -> None:
        silence(self.file)
        raise BrokenPipeError("the terminal is gone")


def make_console(stream: TextIO) -> Console:
    """A console that takes every string as it is: no markup, no emoji codes, no guessed highlights."""
    return _Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=False)


class _Region(Live):
    """A live region that survives a narrower terminal.

    Terminals fold the lines that no longer fit, so the region covers more rows than Rich remembers, and its
    upper rows would stay behind as debris. Before anything is drawn, move to where Rich believes to be.
    """

    def __init__(self, console: Console, lines: Callable[[int], list[Text]]) -> None:
        self._broken = False
        self._moving = _Lines(lines)
        super().__init__(
            self._moving,
            console=console,
            refresh_per_second=4,
            transient=True,
            vertical_overflow="crop",
        )

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        drawn, width = self._moving.widths, self.console.width
        rows = sum(max(1, -(-cells // width)) for cells in drawn)
        folded: list[ConsoleRenderable] = []
        if rows > len(drawn):
            up = (ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)
            erase = Control(
                ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up * (rows - len(drawn))
            )
            folded.append(erase)
        return [*folded, *super().process_renderables(renderables)]

    def refresh(self) -> None:
        if self._broken:
            return
        try:
            super().refresh()
        except OSError:
            # The terminal is gone. In the refreshing thread nobody would hear it: be silent from here on, and
            # let the next event meet the same error in the thread that trains, where the fan-out handles it.
            self._broken = True
            if threading.current_thread() is threading.main_thread():
                raise


class _Lines:
    """Renders lines made anew at each drawing, and remembers their widths."""

    def __init__(self, lines: Callable[[int], list[Text]]) -> None:
        self._lines = lines
        self.widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width)
        lines = self._lines(width)[: max(1, options.size.height - 1)]
        for line in lines:
            line.rstrip()
            line.truncate(width, overflow="ellipsis")
        self.widths = [line.cell_len for line in lines]
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
            yield line


class LiveSink(Logger):
    """Header, events and closing block scroll by; progress, loss and rates stay at the bottom and move."""

    for_people = True

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._lock = threading.Lock()  # the refreshing thread reads while the training thread adds
        self._meter: Averages | None = None
        self._region: _Region | None = None
        self._finished: Callable[[], int] = lambda: 0
        self._started = self._updated_at = clock()

    def start(self, info: RunInfo) -> None:
        self._meter = Averages(info)
        self._started = self._updated_at = self._clock()
        self._say(Text.assemble(("gatrain ", "bold cyan"), (text.clean(info.recipe), "bold")))
        self._rows([*text.header_rows(info), ("results", text.clean(text.shown_path(info.run_dir)))])
        self._console.line()
        self._region = _Region(self._console, self._moving_lines)
        atexit.register(self.close)  # shows the cursor again, however the process ends
        self._region.start(refresh=True)

    def watch(self, finished: Callable[[], int]) -> None:
        """Let the bar move with each finished step, and not with the metrics, which come several at once.

        Args:
            finished: the last finished step; asked from another thread.
        """
        self._finished = finished

    def step(self, record: StepRecord) -> None:
        if self._meter is not None:
            with self._lock:
                self._meter.add(record)
                self._updated_at = self._clock()

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._meter is not None:
            self._event(step, Text(text.evaluation_text(metrics, self._meter.info), "cyan"))

    def saved(self, step: int, path: Path) -> None:
        if self._meter is not None:
            where = text.clean(text.shown_path(path, self._meter.info.run_dir))
            self._event(step, Text(f"state saved in {where}", _LABEL))

    def notice(self, text_: str) -> None:
        self._say(Text(f"note: {text.clean(text_)}", _WARN))

    def end(self, summary: RunSummary) -> None:
        self.close()
        meter = self._meter
        if meter is None:
            return
        losses = meter.losses()
        if len(losses) >= 8 and self._console.width >= 40:
            self._console.line()
            self._say(Text("loss", _LABEL))
            self._say(Text(terminal_plot(losses, min(self._console.width - 1, 78), 8), "cyan"))
            self._console.line()
        sample = text.showcase_lines(summary)
        if sample:
            body = Text("\n".join(sample))
            self._say(
                Panel(body, title=Text("sample"), title_align="left", border_style="dim", width=self._wide())
            )
        rows = text.summary_rows(summary, meter.info)
        self._rows(rows, first=_GOOD if summary.status == "completed" else _WARN)

    def close(self) -> None:
        atexit.unregister(self.close)
        region, self._region = self._region, None
        if region is not None:
            region.stop()

    def _moving_lines(self, width: int) -> list[Text]:
        meter = self._meter
        if meter is None:
            return []
        with self._lock:
            width = min(width, _WIDEST)
            now = self._clock()
            left = meter.seconds_left
            if left is not None:
                left = max(0.0, left - (now - self._updated_at))
            step = max(meter.step, self._finished())
            lines = [Text(), _progress(meter, step, now - self._started, left, width)]
            if meter.last is None:
                return [*lines, Text("waiting for the first steps", _LABEL)]
            return [*lines, _loss_line(meter, width), *_pack(_facts(meter), width)]

    def _event(self, step: int, what: Text) -> None:
        total = self._meter.info.total_steps if self._meter else step
        label = f"step {step:>{len(str(total))}}/{total}  "
        self._say(_side_by_side(Text(label, _LABEL), len(label), what))

    def _rows(self, rows: list[tuple[str, str]], first: str = "") -> None:
        width = max(len(label) for label, _ in rows)
        for index, (label, value) in enumerate(rows):
            name = Text(f"  {label:<{width}}  ", f"bold {first}" if first and index == 0 else _LABEL)
            if label in (
                "results",
                "resume with",
            ):  # to be copied: in one piece, wherever the terminal folds it
                self._console.print(name.append(value, Style(dim=False, bold=True)), soft_wrap=True)
                continue
            self._say(_side_by_side(name, width + 4, Text(value)))

    def _say(self, what: ConsoleRenderable | Text) -> None:
        self._console.print(what)

    def _wide(self) -> int:
        return min(self._console.width, _WIDEST)


def _side_by_side(label: Text, width: int, value: Text) -> Table:
    """A label with its value, whose further lines stay beside the label."""
    table = Table.grid()
    table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(label, value)
    return table


def _progress(meter: Averages, step: int, elapsed: float, left: float | None, width: int) -> Text:
    info = meter.info
    done = step / info.total_steps if info.total_steps else 1.0
    before = f"step {step:>{len(str(info.total_steps))}}/{info.total_steps} "
    after = f" {done:>4.0%}  {units.duration(elapsed)}"
    after += f", {units.duration(left)} left" if left is not None else ""
    room = width - len(before) - len(after)
    line = Text(before, _NUMBER)
    if room >= 8:
        halves = int(done * room * 2)
        full, half = divmod(min(halves, room * 2), 2)
        line.append("━" * full + "╸" * half, _GOOD)
        # Without colour the rest must look different, so it is a different character and not only dim.
        line.append("─" * (room - full - half), _LABEL)
    return line.append(after)


def _loss_line(meter: Averages, width: int) -> Text:
    line = Text.assemble(("loss ", _LABEL), (text.decimal(meter.smooth_loss), _NUMBER))
    line.append(f" smoothed, {text.decimal(meter.last.loss if meter.last else None)} last  ", _LABEL)
    room = width - line.cell_len
    return line.append(sparkline(meter.losses(), room), "cyan") if room >= 4 else line


def _facts(meter: Averages) -> list[str]:
    values = step_values(meter)
    values.pop("loss")
    terms = [name for name in values if name.startswith("loss_terms.")]
    measured = [name for name in values if name.startswith("metrics.")]
    order = (
        *terms,
        "stage",
        "samples",
        "tokens",
        "memory",
        "lr",
        "grad_norm",
        *measured,
        "loss_scale",
        "skipped",
    )
    return [values[name].replace("_", " ") for name in order if name in values]


def _pack(parts: list[str], width: int) -> list[Text]:
    """Lay parts side by side, and below where the terminal is narrow."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return [Text(line) for line in lines]
