"""Pictures of a run: PNG files where matplotlib is installed, and small plots of characters for terminals."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gatrain.errors import RunFolderError
from gatrain.report import plan_plot, text
from gatrain.report.braille import Canvas
from gatrain.report.jsonl import evaluations_path, read_lines
from gatrain.rundir import RunDir, read_json

_BARS = "▁▂▃▄▅▆▇█"


def save_plots(run_folder: Path, baseline: tuple[str, float] | None = None) -> list[Path]:
    """Write loss.png and plan.png into a run folder from its metrics and its plan; return what was written.

    Args:
        run_folder: A run folder. A missing or empty file there means that its picture is left out.
        baseline: Name and held-out loss of the baseline; by default the ``baseline`` of the
            run's summary.json, where it has one.

    Without matplotlib nothing is written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    run_dir = RunDir(Path(run_folder))
    figures = {
        "loss.png": _loss_figure(run_dir, baseline or _saved_baseline(run_dir)),
        "plan.png": _plan_figure(run_dir),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = run_dir.path / name
            plan_plot.save_figure(figure, path)
            written.append(path)
    return written


def _saved_baseline(run_dir: RunDir) -> tuple[str, float] | None:
    try:
        baseline = read_json(run_dir.summary).get("baseline")
    except RunFolderError:
        return None
    if not isinstance(baseline, dict):
        return None
    loss = text.number(baseline.get("loss"))
    return None if loss is None else (str(baseline.get("name") or ""), loss)


def _plan_figure(run_dir: RunDir) -> Any:
    try:
        plan = run_dir.load_plan()
    except (RunFolderError, TypeError):
        return None
    return plan_plot.plan_figure(plan)


def _loss_figure(run_dir: RunDir, baseline: tuple[str, float] | None) -> Any:
    points = _points(read_lines(run_dir.metrics))
    if not points:
        return None
    evaluations = _points(read_lines(evaluations_path(run_dir.metrics)))
    figure, (axis,) = plan_plot.new_figure(1, 4.5)
    steps, losses = zip(*points, strict=True)
    axis.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="training, each step")
    axis.plot(steps, _smooth(losses), color="C0", linewidth=1.8, label="training, smoothed")
    if evaluations:
        axis.plot(*zip(*evaluations, strict=True), "o-", color="C1", markersize=5, label="held out")
    if baseline is not None:
        phrase = text.baseline_phrase(*baseline)
        axis.axhline(baseline[1], color="0.4", linestyle="--", linewidth=1.2, label=phrase)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    name = text.clean(f"{run_dir.path.parent.name}/{run_dir.path.name}".strip("/"))
    axis.set_title(name, parse_math=False, loc="left")
    for entry in axis.legend(frameon=False).get_texts():
        entry.set_parse_math(False)
    return figure


def _points(records: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Steps with a finite loss; NaN is null in the file and leaves a gap."""
    pairs = ((record["step"], text.number(record.get("loss"))) for record in records)
    return [(step, loss) for step, loss in pairs if loss is not None]


def _smooth(values: Sequence[float]) -> list[float]:
    """Average over about a twentieth of the curve, centred, so that it does not lag behind."""
    sums = [0.0, *itertools.accumulate(values)]
    reach = min(100, len(values) // 40)
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return result


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as one row of block characters, averaged down to at most ``width`` of them.

    >>> sparkline([3, 2, 1, 0], 4)
    '█▅▃▁'
    """
    columns = _bins(values, width)
    known = [value for value in columns if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BARS[int((value - low) * scale)] for value in columns)


def terminal_plot(values: Sequence[float], width: int, height: int) -> str:
    """Draw a curve in braille dots with its scale at the left: ``height`` lines of at most ``width`` cells.

    Values that are not finite leave gaps. Without any value, or room for one, the result is empty.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or height < 1:
        return ""
    low, high = min(known), max(known)
    labels = [""] * height
    labels[0], labels[-1] = text.decimal(high), text.decimal(low)
    margin = max(map(len, labels)) + 2
    cells = width - margin
    if cells < 1:
        return ""
    columns = _bins(values, cells * 2)
    canvas = Canvas(cells, height)
    previous: int | None = None
    scale = (height * 4 - 1) / (high - low) if high > low else 0.0
    for x, value in enumerate(columns):
        if value is None:
            previous = None
            continue
        y = height * 4 - 1 - round((value - low) * scale)
        start = y if previous is None else previous + (y > previous) - (y < previous)
        for row in range(min(start, y), max(start, y) + 1):  # join the columns, or a steep curve falls apart
            canvas.set(x, row)
        previous = y
    lines = []
    for label, row_cells in zip(labels, canvas.rows(), strict=True):
        lines.append(f"{label:>{margin - 2}} {'┤' if label else '│'}{''.join(row_cells)}".rstrip())
    return "\n".join(lines)


def _bins(values: Sequence[float], width: int) -> list[float | None]:
    """Average ``values`` down to at most ``width`` columns; a column of nothing finite is None."""
    columns = max(0, min(width, len(values)))
    result: list[float | None] = []
    for column in range(columns):
        part = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        known = [value for value in part if math.isfinite(value)]
        result.append(sum(known) / len(known) if known else None)
    return result
