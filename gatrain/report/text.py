"""Numbers, names and untrusted text as a person reads them; the words that all displays share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatrain import commands, units
from gatrain.plan import compile_text
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary

# Whatever could move the cursor, colour, retitle or reorder a terminal: C0 and C1 controls (escape sequences
# begin with one), line separators, bidirectional overrides, and lone surrogates, which no encoding can carry.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: object, *, lines: bool = False) -> str:
    """Make text from outside safe to print: control characters become visible escapes such as ``\\x1b``.

    With ``lines`` the line breaks stay and tabs become four spaces; without it the result is one line.
    """
    value = str(text)
    if not lines:
        return _UNSAFE.sub(_escape, value)
    value = value.replace("\r\n", "\n").expandtabs(4)
    return "\n".join(_UNSAFE.sub(_escape, line) for line in value.split("\n"))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def number(value: object) -> float | None:
    """Give the finite float in ``value``, or None for anything else (None, NaN, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def decimal(value: object) -> str:
    """Write a loss or a norm with about four significant digits; NaN and infinity stay visible."""
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return scientific(value)
    return f"{value:,.1f}" if size >= 100 else f"{value:.3f}" if size >= 1 else f"{value:.4f}"


def scientific(value: float) -> str:
    """Write three significant digits with a short exponent: ``2.9e-3``."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def learning_rate(value: float) -> str:
    """Write a learning rate: ``0.1``, ``0.05``, ``2.9e-3``; NaN and infinity stay visible."""
    if not math.isfinite(value):
        return str(float(value))
    return f"{value:.3g}" if value >= 0.01 or value == 0 else scientific(value)


def shown_path(path: Path, base: Path | None = None) -> str:
    """Write a path relative to ``base`` (the current folder) where it lies inside it."""
    try:
        return str(path.relative_to(Path.cwd() if base is None else base))
    except (ValueError, OSError):
        return str(path)


def resume_command(run_dir: Path) -> str:
    """The command that continues a run, quoted for a shell."""
    shown = shown_path(run_dir) if commands.is_here(Path.cwd()) else str(run_dir)
    return commands.typed("resume", shown if not shown.startswith("-") else str(run_dir))


def baseline_phrase(name: str | None, loss: float | None) -> str:
    """Write ``unigram baseline 6.140``, or nothing where there is none."""
    if loss is None:
        return ""
    words = clean(name or "")
    words = words if words.endswith("baseline") else f"{words} baseline".strip()
    return f"{words} {decimal(loss)}"


def against_baseline(loss: object, info: RunInfo) -> str:
    """Write ``1.43 below the unigram baseline 6.140``; empty without a baseline."""
    value, base = number(loss), number(info.baseline_loss)
    if value is None or base is None:
        return ""
    gap = base - value
    relation = "below" if gap >= 0 else "above"
    return f"{abs(gap):.3g} {relation} the {baseline_phrase(info.baseline_name, base)}"


def header_rows(info: RunInfo) -> list[tuple[str, str]]:
    """Label and value for each fact that stands above the progress."""
    how = [
        clean(info.precision),
        *([f"{clean(info.half_dtypes)} parameters with fp32 master weights"] if info.half_dtypes else []),
        "no checkpointing" if info.checkpointing == "none" else f"{clean(info.checkpointing)} checkpointing",
        compile_text(info.compile),
        f"sync {clean(info.sync)}",
    ]
    count = units.plural(info.train_samples, "sample") if info.train_samples else "a stream"
    data = [f"{count} to train on"]
    if info.eval_samples:
        data.append(f"{info.eval_samples:,} held out")
    steps = f"{info.total_steps:,}"
    if info.steps_per_epoch:
        epochs = info.total_steps / info.steps_per_epoch
        steps += f", {epochs:.3g} epoch{'s' * (epochs != 1)} of {units.plural(info.steps_per_epoch, 'step')}"
    if info.first_step:
        steps += f"; going on after step {info.first_step:,}"
    stages = [
        (f"from step {first + 1}: " if first else "") + clean(equation) for first, equation in info.stages
    ]
    rows = [
        ("batch", "; ".join(stages) or clean(info.equation)),
        ("device", clean(info.device)),
        ("precision", ", ".join(how)),
        ("parameters", f"{info.parameters:,}"),
        ("data", ", ".join(data)),
        ("steps", steps),
    ]
    if info.baseline_loss is not None:
        phrase = baseline_phrase(info.baseline_name, info.baseline_loss)
        rows.append(("baseline", f"{phrase} (held-out loss)"))
    return rows


def loss_terms(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The named loss terms of an evaluation; empty where there is only one, which is ``loss``."""
    terms = numbers.get("loss_terms")
    return {str(name): value for name, value in terms.items()} if isinstance(terms, Mapping) else {}


def evaluation_text(metrics: Mapping[str, Any], info: RunInfo) -> str:
    """Write one evaluation: the held-out loss, its baseline and its terms, and what else was measured."""
    return "  ".join(
        f"{label if label == HELD_OUT_LOSS else label.removeprefix('held-out ')} {value}"
        for label, value in _evaluation_rows(metrics, info)
    )


HELD_OUT_LOSS = "held-out loss"
UNREADABLE_NAMED = 3


def _evaluation_rows(metrics: Mapping[str, Any], info: RunInfo) -> list[tuple[str, str]]:
    """Label and value of what was measured on the held-out split; nothing where nothing was."""
    rows = []
    if metrics.get("loss") is not None:
        compared = against_baseline(metrics["loss"], info)
        rows.append((HELD_OUT_LOSS, decimal(metrics["loss"]) + (f", {compared}" if compared else "")))
    rows += [(f"held-out {clean(name)}", decimal(value)) for name, value in loss_terms(metrics).items()]
    if metrics.get("unreadable_samples"):
        rows.append(
            ("held out", f"{metrics['unreadable_samples']:,} samples could not be read, and were skipped")
        )
    known = ("loss", "loss_terms", "unreadable_samples", "unreadable")
    further = {name: value for name, value in metrics.items() if name not in known}
    return rows + [(f"held-out {clean(name)}", decimal(value)) for name, value in further.items()]


def summary_rows(summary: RunSummary, info: RunInfo) -> list[tuple[str, str]]:
    """Label and value for each line of the closing block, the generated sample excepted."""
    done = f"{summary.step:,} of {units.plural(info.total_steps, 'step')}"
    rows = [(clean(summary.status), f"{done} in {units.duration(summary.elapsed_s)}")]
    if summary.stopped_early:
        rows.append(("ended early", clean(summary.stopped_early)))
    if summary.loss is not None:
        rows.append(("loss", f"{decimal(summary.loss)} at the last step"))
    if summary.skipped_steps:
        rows.append(("skipped", f"{units.plural(summary.skipped_steps, 'step')} made no update"))
    rows += _evaluation_rows(summary.evaluation, info)
    rows += [(clean(label), clean(text)) for label, text in summary.findings.items()]
    if summary.unreadable_samples:
        rows.append(("not read", clean(unreadable_text(summary))))
    if summary.left_out:
        rows.append(("left out", clean(summary.left_out)))
    rows += [("failed", clean(line)) for line in summary.failed]
    rows.append(("results", clean(shown_path(info.run_dir))))
    if summary.weights:
        rows.append(("weights", clean(f"{summary.weights} (safetensors.torch.load_model reads it)")))
    rows += [(f"{clean(name)} weights", clean(path)) for name, path in summary.exported.items()]
    if summary.status == "stopped":
        rows.append(("resume with", resume_command(info.run_dir)))
    return rows


def unreadable_text(summary: RunSummary) -> str:
    """How many samples were skipped, and of which files."""
    count, listed = summary.unreadable_samples, summary.unreadable
    more = "; ..." if len(listed) > UNREADABLE_NAMED else ""
    named = f": {'; '.join(listed[:UNREADABLE_NAMED])}{more}" if listed else ""
    which = f" ({len(listed):,} different ones)" if len(listed) != count else ""
    return f"{units.plural(count, 'sample')}{which} skipped with weight zero{named}"


def showcase_lines(summary: RunSummary, limit: int = 40) -> list[str]:
    """Lines of the generated sample, safe to print; at most ``limit`` of them."""
    text = summary.showcase
    if not text:
        return []
    lines = clean(text, lines=True).strip("\n").split("\n")
    return lines if len(lines) <= limit else [*lines[:limit], f"... {len(lines) - limit} more lines"]
