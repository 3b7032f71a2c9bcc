"""The measured curve of a plan as a picture: a PNG file, or braille dots in a terminal."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain import plan as plans
from gatrain import units
from gatrain.errors import ConfigError
from gatrain.plan import Plan, compile_text
from gatrain.report import text
from gatrain.report.braille import Canvas
from gatrain.rundir import atomic_file

Point = tuple[float, float]

MARK = "*"


def check_can_draw(path: Path) -> None:
    """Refuse a picture that could not be written, before anything slow begins.

    Raises:
        ConfigError: matplotlib is missing, or the file's folder is, or its name is that of something else.
    """
    if path.suffix.lower() not in ("", ".png"):
        raise ConfigError(f"--plot {path}: the picture is a PNG file. Use --plot {path.with_suffix('.png')}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--plot {path} needs matplotlib: pip install 'gatrain[plot]'.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}. Make it first.")


def save_plan_plot(plan: Plan, path: Path) -> None:
    """Draw the plan's trials into a PNG file; nothing where none was measured.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = plan_figure(plan)
    if figure is None:
        return
    try:
        save_figure(figure, path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}.") from error


def plan_plot_lines(plan: Plan, width: int = 80, height: int = 8) -> list[str]:
    """The chosen way's samples/s and peak memory against micro-batch as lines of text, the choice marked.

    Empty with fewer than two measured sizes: there is no curve to see.
    """
    way = _way(plan)
    measured = [t for t in plan.trials if t.outcome == plans.FITS and _way(t) == way]
    lines: list[str] = []
    for title, points in (
        ("samples per s", [(t.micro_batch, t.samples_per_s) for t in measured if t.samples_per_s]),
        (
            "peak memory, GiB",
            [(t.micro_batch, t.peak_memory_bytes / units.GIB) for t in measured if t.peak_memory_bytes],
        ),
    ):
        drawn = terminal_points(sorted(points), min(width, 80), height, mark=plan.micro_batch)
        if len(points) > 1 and drawn:
            lines += ["", f"{title}, by micro-batch ({MARK} chosen)", *drawn]
    return lines


def terminal_points(points: Sequence[Point], width: int, height: int, mark: float | None = None) -> list[str]:
    """Draw (x, y) points, joined by lines, over a logarithmic x axis: ``height`` lines and the axis below.

    The y axis begins at zero, so that heights compare as the numbers do. The point at x = ``mark`` becomes a
    star. Without a point with x above zero, or room for one, the result is empty.
    """
    known = sorted((x, y) for x, y in points if x > 0 and math.isfinite(y))
    top = max((y for _, y in known), default=0.0)
    label = text.decimal(top)
    margin = len(label) + 2
    cells = width - margin
    if not known or height < 2 or cells < 8:
        return []
    low, high = math.log2(known[0][0]), math.log2(known[-1][0])

    def dot(x: float, y: float) -> tuple[int, int]:
        part = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return round(part * (cells * 2 - 1)), round(
            (1 - max(0.0, y) / top) * (height * 4 - 1)
        ) if top > 0 else 0

    canvas = Canvas(cells, height)
    for (x0, y0), (x1, y1) in zip(known, [*known[1:], known[-1]], strict=True):
        (left, upper), (right, lower) = dot(x0, y0), dot(x1, y1)
        steps = max(abs(right - left), abs(lower - upper), 1)
        for step in range(steps + 1):
            column = round(left + (right - left) * step / steps)
            row = round(upper + (lower - upper) * step / steps)
            canvas.set(column, row)
    rows = canvas.rows()
    for x, y in known:
        if x == mark:
            column, row = dot(x, y)
            rows[row // 4][column // 2] = MARK
    labels = [label, *[""] * (height - 2), "0"]
    lines = [
        f"{name:>{margin - 2}} {'┤' if name else '│'}{''.join(row)}".rstrip()
        for name, row in zip(labels, rows, strict=True)
    ]
    return [*lines, _axis([(dot(x, 0.0)[0] // 2, f"{x:g}") for x, _ in known], margin, cells)]


def _axis(ticks: Sequence[tuple[int, str]], margin: int, cells: int) -> str:
    """Names of the points below their columns; one that would touch its neighbour is left out."""
    line = [" "] * (margin + cells)
    last = -1
    for column, name in ticks:
        first = min(margin + column, margin + cells - len(name))
        if first > last:
            line[first : first + len(name)] = name
            last = first + len(name)
    return "".join(line).rstrip()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    # A name may hold characters that the font lacks: boxes in a title are no reason to complain.
    with warnings.catch_warnings(), atomic_file(path) as temporary:
        warnings.simplefilter("ignore")
        figure.savefig(temporary, format="png", dpi=150)


def new_figure(rows: int, height: float) -> tuple[Any, list[Any]]:
    """An empty figure of ``rows`` axes below each other."""
    # Without pyplot: no display is needed, and no state is shared with plots of the user's own.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axis in axes:
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plan_figure(plan: Plan) -> Any:
    """Samples/s and peak memory against micro-batch, a line for each way of computing, the choice starred; None
    where nothing was measured."""
    tried = [trial for trial in plan.trials if trial.outcome in (plans.FITS, plans.DOES_NOT_FIT)]
    measured = [trial for trial in tried if trial.outcome == plans.FITS and trial.samples_per_s]
    if not measured:
        return None
    figure, (speed, memory) = new_figure(2, 6.5)
    tops = (
        1.15 * max(trial.samples_per_s or 0.0 for trial in measured),
        1.15 * max((trial.peak_memory_bytes or units.MIB) / units.GIB for trial in measured),
    )
    chosen = _way(plan)
    ways = sorted({_way(trial) for trial in tried}, key=lambda way: (way != chosen, *map(str, way)))
    refused_label: str | None = "does not fit"
    for index, way in enumerate(ways):
        words = [way[0], f"checkpointing {way[1]}"]
        words += [compile_text(way[2])] if way[2] else []
        words += [way[3]] if way[3] else []
        color, label = f"C{index}", ", ".join(words)
        same = sorted((t for t in tried if _way(t) == way), key=lambda trial: trial.micro_batch)
        rates = [(t.micro_batch, t.samples_per_s) for t in same if t in measured]
        peaks = [
            (t.micro_batch, t.peak_memory_bytes / units.GIB)
            for t in same
            if t in measured and t.peak_memory_bytes
        ]
        refused = [t.micro_batch for t in same if t.outcome == plans.DOES_NOT_FIT]
        for axis, points in ((speed, rates), (memory, peaks)):
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), "o-", color=color, label=label)
            star = [point for point in points if (point[0], way) == (plan.micro_batch, chosen)]
            for x, y in star[:1]:
                axis.plot(
                    x, y, "*", markersize=16, color=color, markeredgecolor="black", label="chosen", zorder=5
                )
        if refused:  # its peak is not known: a cross at the upper edge, in the colour of its curve
            memory.plot(
                refused, [tops[1] * 0.95] * len(refused), "X", color=color, markersize=9, label=refused_label
            )
            refused_label = None
    ticks = sorted({trial.micro_batch for trial in tried})
    for axis, title, top in zip((speed, memory), ("samples/s", "peak memory, GiB"), tops, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(0, top)
        axis.set_ylabel(title)
    memory.set_xlabel("micro-batch, samples")
    speed.set_title(text.clean(plan.equation), parse_math=False, loc="left")
    speed.legend(frameon=False, loc="lower right")
    if refused_label is None:
        crosses = [line for line in memory.get_lines() if line.get_label() == "does not fit"]
        memory.legend(handles=crosses, frameon=False, loc="lower right")
    return figure


def _way(of: plans.Trial | Plan) -> tuple[str, str, bool | str, str]:
    way = of.settings
    return way.precision, way.checkpointing, way.compile, way.knob_text
