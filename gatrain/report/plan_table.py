"""The plan for people: every trial, the chosen one marked, and why."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gatrain import batch, units
from gatrain.config import CHECKPOINTING, REDUCE_OVERHEAD
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, SKIPPED, Plan, Trial, compile_text
from gatrain.report import text

_OUTCOMES = {FITS: "fits", DOES_NOT_FIT: "does not fit", FAILED: "failed", SKIPPED: "skipped"}
_STYLES = {FITS: "green", DOES_NOT_FIT: "red", FAILED: "bold red", SKIPPED: "dim"}
_COMPILED: dict[bool | str, str] = {True: "yes", REDUCE_OVERHEAD: "graphs", False: "no"}
_MARK = "->"
_NO_VALUE = "-"


@dataclass(frozen=True)
class _Column:
    head: str
    cell: Callable[[Plan, Trial], str]
    justify: Literal["left", "right"] = "left"
    constant: Callable[[str], str] | None = None
    """Says the one value of all rows in a sentence; such a column is not worth its width."""
    rank: int = 0
    """The highest goes first where the terminal is too narrow; 0 stays."""
    optional: bool = False
    """Left out where no row has a value."""


_COLUMNS = (
    _Column("micro-\nbatch", lambda _, trial: f"{trial.micro_batch:,}", justify="right"),
    _Column("accum.\nsteps", lambda plan, trial: f"{_accumulation(plan, trial):,}", justify="right", rank=2),
    _Column(
        "check-\npointing",
        lambda _, trial: trial.settings.checkpointing,
        constant=lambda v: f"checkpointing {v}",
    ),
    _Column("preci-\nsion", lambda _, trial: trial.settings.precision, constant=lambda v: v),
    _Column(
        "com-\npiled",
        lambda _, trial: _COMPILED[trial.settings.compile],
        constant=lambda v: next(compile_text(value) for value, word in _COMPILED.items() if word == v),
    ),
    _Column("\nknobs", lambda _, trial: trial.settings.knob_text or _NO_VALUE, optional=True),
    _Column("\nresult", lambda _, trial: _OUTCOMES.get(trial.outcome, trial.outcome)),
    _Column(
        "peak\nmemory",
        lambda _, trial: _or_dash(trial.peak_memory_bytes, units.size),
        justify="right",
        rank=1,
    ),
    _Column(
        "samples\nper s", lambda _, trial: _or_dash(trial.samples_per_s, units.rate), justify="right", rank=3
    ),
    _Column("modelled\nstep", lambda _, trial: _or_dash(trial.step_s, units.seconds), justify="right"),
    _Column(
        "measured\nstep",
        lambda _, trial: _or_dash(trial.confirmed_step_s, units.seconds),
        justify="right",
        rank=4,
        optional=True,
    ),
)


def plan_table(plan: Plan) -> RenderableType:
    """Lay out a plan for a Rich console: the table of trials, then equation, reason and notes."""
    trials = sorted_trials(plan)
    parts: list[RenderableType] = []
    if trials:
        parts += [_TrialTable(plan, trials), Text()]
    equation, *rest = split_lines(plan)
    parts.append(Text(equation, "bold"))
    parts += [Text(line) for line in [*rest, *reason_lines(plan), *_advice(plan)]]
    return Group(*parts)


def plan_lines(plan: Plan) -> list[str]:
    """The same as plain, aligned lines without any colour or special character, for logs and pipes."""
    trials = sorted_trials(plan)
    lines: list[str] = []
    if trials:
        columns, common = _columns(plan, trials)
        chosen = chosen_trial(plan)
        widths = _widths(plan, trials, columns)
        heads = [column.head.split("\n") for column in columns]
        rows = [("", [head[0] for head in heads]), ("", [head[1] for head in heads])]
        for group in _groups(trials):
            rows += [("", [])] if len(rows) > 2 else []
            rows += [
                (
                    _MARK if trial is chosen else "",
                    [text.clean(column.cell(plan, trial)) for column in columns],
                )
                for trial in group
            ]
        lines += [common] if common else []
        for mark, cells in rows:
            parts = [
                f"{cell:>{width}}" if column.justify == "right" else f"{cell:<{width}}"
                for cell, width, column in zip(cells, widths, columns, strict=False)
            ]
            lines.append(f"{mark:<{len(_MARK)}} {'  '.join(parts)}".rstrip())
        lines.append("")
    return [*lines, *split_lines(plan), *reason_lines(plan), *_advice(plan)]


def print_plan(plan: Plan, stream: TextIO | None = None, *, trains: bool = False) -> None:
    """Print a plan to ``stream`` (standard output): the table on a terminal, plain lines elsewhere.

    Args:
        trains: the run begins now, and its head tells the split itself: print why it was chosen, and no more.
    """
    stream = sys.stdout if stream is None else stream
    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    if stream.isatty() and not console.is_dumb_terminal:
        console.print(Text("\n".join(reason_lines(plan))) if trains else plan_table(plan))
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in reason_lines(plan) if trains else plan_lines(plan):
        print(line.encode(encoding, "replace").decode(encoding), file=stream)


def chosen_trial(plan: Plan) -> Trial | None:
    """The measured trial that the plan follows; None where all was fixed by hand and nothing was tried."""
    same = [
        trial
        for trial in plan.trials
        if (trial.micro_batch, *_variant(trial)) == (plan.micro_batch, *_variant(plan))
    ]
    same.sort(key=lambda trial: (trial.outcome != FITS, trial.step_s is None, trial.step_s or 0.0))
    return same[0] if same else None


def sorted_trials(plan: Plan) -> list[Trial]:
    """All trials: the chosen way of computing first, then the other ways; in each by micro-batch."""

    def order(trial: Trial) -> tuple[bool, int, str, int, str, int]:
        way = trial.settings
        level = CHECKPOINTING.index(way.checkpointing)
        is_other = _variant(trial) != _variant(plan)
        return (
            is_other,
            level,
            way.precision,
            list(_COMPILED).index(way.compile),
            way.knob_text,
            trial.micro_batch,
        )

    return sorted(plan.trials, key=order)


class _TrialTable:
    """The table of trials; leaves out its least needed columns where the terminal is too narrow."""

    def __init__(self, plan: Plan, trials: list[Trial]) -> None:
        self._plan = plan
        self._trials = trials

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, common = _columns(self._plan, self._trials)
        gap = 2

        def width() -> int:
            return len(_MARK) + sum(gap + size for size in _widths(self._plan, self._trials, columns))

        while width() > options.max_width and any(column.rank for column in columns):
            if gap == 2:
                gap = 1
            else:
                columns.remove(max(columns, key=lambda column: column.rank))
        if common:
            yield Text(common, "dim")
        yield self._table(columns, gap)

    def _table(self, columns: list[_Column], gap: int) -> Table:
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("", no_wrap=True, min_width=len(_MARK))
        for column in columns:
            head = Text(column.head, justify=column.justify)
            table.add_column(head, justify=column.justify, vertical="bottom", no_wrap=True)
        chosen = chosen_trial(self._plan)
        for index, group in enumerate(_groups(self._trials)):
            if index:
                table.add_row()
            for trial in group:
                cells = [Text(text.clean(column.cell(self._plan, trial))) for column in columns]
                for column, cell in zip(columns, cells, strict=True):
                    if column.head.strip() == "result":
                        cell.stylize(_STYLES.get(trial.outcome, ""))
                style = "bold" if trial is chosen else "dim" if trial.outcome == SKIPPED else ""
                table.add_row(Text(_MARK if trial is chosen else "", "bold green"), *cells, style=style)
        return table


def _groups(trials: list[Trial]) -> list[list[Trial]]:
    """Sorted trials, cut where the way of computing changes."""
    return [list(group) for _, group in itertools.groupby(trials, _variant)]


def _widths(plan: Plan, trials: list[Trial], columns: list[_Column]) -> list[int]:
    return [
        max(map(len, [*column.head.split("\n"), *(text.clean(column.cell(plan, trial)) for trial in trials)]))
        for column in columns
    ]


def _columns(plan: Plan, trials: list[Trial]) -> tuple[list[_Column], str]:
    """Columns whose values differ, and one sentence for those that do not."""
    columns, common = [], []
    for column in _COLUMNS:
        values = {column.cell(plan, trial) for trial in trials}
        if column.optional and values == {_NO_VALUE}:
            continue
        if column.constant is not None and len(values) == 1:
            common.append(column.constant(values.pop()))
        else:
            columns.append(column)
    return columns, f"All trials: {', '.join(map(text.clean, common))}." if common else ""


def split_lines(plan: Plan) -> list[str]:
    """The split written out, and how each micro-batch is computed."""
    how = [
        text.clean(plan.settings.precision),
        "no checkpointing"
        if plan.settings.checkpointing == "none"
        else f"{text.clean(plan.settings.checkpointing)} checkpointing",
        plan.settings.compile_text,
        f"sync {text.clean(plan.settings.sync)}",
        *([text.clean(plan.settings.knob_text)] if plan.settings.knobs else []),
    ]
    return [text.clean(line) for line in (*stage_lines(plan), ", ".join(how))]


def stage_lines(plan: Plan) -> list[str]:
    """The split written out; of each stage, where the effective batch changes."""
    if not plan.stages:
        return [plan.equation]
    return [f"{each.begins.capitalize() or 'At first'}: {each.equation}" for each in plan.stages]


def reason_lines(plan: Plan) -> list[str]:
    """Why this plan was chosen, and what was noticed on the way."""
    lines = []
    if plan.predicted_peak_bytes is not None and plan.memory_budget_bytes is not None:
        peak, budget = units.size(plan.predicted_peak_bytes), units.size(plan.memory_budget_bytes)
        lines.append(f"Peak memory {peak}; {budget} may be used")
    if plan.reason:
        lines.append(f"Why: {text.clean(plan.reason)}")
    lines += [f"Note: {text.clean(note)}" for note in plan.notes]
    return lines + _causes(plan, sorted_trials(plan))


def _advice(plan: Plan) -> list[str]:
    return [f"Note: {text.clean(sentence)}" for sentence in plan.advice]


def _causes(plan: Plan, trials: list[Trial]) -> list[str]:
    """One sentence for each reason why candidates were not measured; equal reasons are told once."""
    telling = [column for column in _columns(plan, trials)[0] if column.constant is not None]
    causes: dict[tuple[str, str, str], list[str]] = {}
    for trial in trials:
        if not trial.error or trial.outcome == FITS:
            continue
        way = ", ".join(column.constant(column.cell(plan, trial)) for column in telling if column.constant)
        first = trial.error.strip().splitlines() or [""]
        causes.setdefault((way, trial.outcome, first[0]), []).append(f"{trial.micro_batch:,}")
    return [
        text.clean(
            f"Micro-batch {', '.join(dict.fromkeys(sizes))}{f' ({way})' if way else ''} "
            f"{_OUTCOMES.get(outcome, outcome)}: {cause}"
        )
        for (way, outcome, cause), sizes in causes.items()
    ]


def _accumulation(plan: Plan, trial: Trial) -> int:
    return -(-batch.Split(plan.effective_batch, plan.world_size).share // trial.micro_batch)


def _variant(of: Plan | Trial) -> tuple[str, str, bool | str, str]:
    way = of.settings
    return way.precision, way.checkpointing, way.compile, way.knob_text


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return _NO_VALUE if value is None else write(value)
