"""How a run is or was, from the files of its folder: what `gatrain show FOLDER` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from gatrain import noise_advice, units
from gatrain.report.jsonl import read_lines
from gatrain.report.text import clean, decimal, number, resume_command
from gatrain.rundir import RunDir, read_json


def run_rows(run_dir: RunDir) -> list[tuple[str, str]]:
    """Label and value for each line.

    Raises:
        RunFolderError: a file of the run cannot be read, or is not one of gatrain's.
    """
    plan = run_dir.load_plan()
    lines = read_lines(run_dir.metrics)
    summary = read_json(run_dir.summary) if run_dir.summary.is_file() else {}
    last = lines[-1] if lines else {}
    status = str(summary.get("status", "running, or ended without a word"))
    total = summary.get("total_steps")
    done = f", {last.get('step', 0):,}" + (f" of {total:,} steps" if isinstance(total, int) else " steps")
    rows = [
        ("recipe", run_dir.recipe()),
        ("batch", plan.equation),
        ("status", f"{status}{done}"),
        ("loss", decimal(number(last.get("loss")))),
    ]
    if isinstance(summary.get("stopped_early"), str):
        rows.append(("ended early", summary["stopped_early"]))
    if number(summary.get("eval_loss")) is not None:
        rows.append(("held-out loss", decimal(summary["eval_loss"])))
    if isinstance(rate := number(last.get("samples_per_s")), float):
        rows.append(("speed", f"{units.rate(rate)} samples/s in the last step"))
    rows += _phases(lines)
    rows += _findings(run_dir, summary, plan.effective_batch)
    if status != "completed":
        rows.append(("resume with", resume_command(run_dir.path)))
    return [(clean(label), clean(value)) for label, value in rows]


def _phases(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The rate of each phase's optimizer at its last turn, where a task has phases."""
    rates: dict[str, object] = {}
    for line in lines:
        metrics = line.get("metrics")
        if isinstance(metrics, dict):
            rates |= {key.removesuffix(".lr"): rate for key, rate in metrics.items() if key.endswith(".lr")}
    told = [f"{name} lr {rate:.4g}" for name, rate in rates.items() if isinstance(rate, int | float)]
    return [("phases", ", ".join(told))] if told else []


def _findings(run_dir: RunDir, summary: dict[str, object], effective_batch: int) -> list[tuple[str, str]]:
    """What hooks found out; of a run that has not ended the noise scale so far."""
    found = summary.get("findings")
    if isinstance(found, dict) and found:
        return [(str(label), str(text)) for label, text in found.items()]
    noise = noise_advice.last_noise_scale(run_dir.metrics)
    if noise is None:
        return []
    return [
        ("noise scale", noise_advice.in_words(*noise)),
        ("batch advice", noise_advice.batch_advice(*noise, effective_batch)),
    ]


def row_lines(rows: Sequence[tuple[str, str]], columns: int = 80) -> list[str]:
    """Labels and values side by side; long values go on below."""
    width = max(len(label) for label, _ in rows)
    lines: list[str] = []
    for label, value in rows:
        lines += textwrap.wrap(
            f"{label:<{width}}  {value}", columns, subsequent_indent=" " * (width + 2), break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return lines
