"""What was read, for people: three lines, one more for each kind of omission; and all of it for who asks."""

from __future__ import annotations

from gatrain import units
from gatrain.data.report import DataRecord, Omission
from gatrain.errors import RunFolderError
from gatrain.report.text import clean
from gatrain.rundir import RunDir, read_json

COLUMNS = 80
KINDS_AT_END = 2
"""Kinds of omissions that the end of a run names; data.json has them all."""
HEAD, INDENT = "Data  ", "      "


def data_lines(record: DataRecord) -> list[str]:
    """Three lines of at most 80 columns, one more for each kind of omission."""
    lines = [_source(record), _contents(record), _samples(record)]
    lines += [_omission(omission) for omission in record.omissions()]
    if record.not_compared:
        lines.append(f"not compared when the run goes on: {record.not_compared}")
    return [_fit((INDENT if nth else HEAD) + clean(line)) for nth, line in enumerate(lines)]


def whole_data_lines(record: DataRecord) -> list[str]:
    """Everything that is known, one thing a line, nothing shortened."""
    report = record.report
    rows = [("source", report.kind)]
    if report.files:
        rows += [("files", f"{report.files:,}"), ("size", f"{_size(report.size_bytes)}")]
    rows.append((report.item_name, f"{report.items:,}"))
    if report.encoding:
        rows.append(("encoding", report.encoding))
    if report.classes is not None:
        rows.append(("classes", f"{len(report.classes):,}"))
    rows += [
        ("to train on", "a stream" if record.is_stream else units.plural(record.train_samples, "sample")),
        ("held out", units.plural(record.eval_samples, "sample")),
        ("a sample", record.shapes or "could not be read"),
        ("fingerprint", report.fingerprint or f"of {units.plural(len(record.samples), 'sample')}"),
    ]
    if record.not_compared:
        rows.append(("not compared", record.not_compared))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {clean(value)}" for name, value in rows]
    if report.classes is not None:
        lines.append("")
        name_width = min(40, max((len(clean(name)) for name in report.classes), default=0))
        lines += [
            f"class {nth:>4}  {clean(name):<{name_width}}  {count:,}"
            for nth, (name, count) in enumerate(report.classes.items())
        ]
    lines.append("")
    for omission in record.omissions():
        lines.append(f"{_warned(omission)}{_count(omission)}")
        lines += [f"  {clean(example)}" for example in omission.examples]
        if omission.examples and omission.count > len(omission.examples):
            lines.append(f"  and {omission.count - len(omission.examples):,} more")
    if not record.omissions():
        lines.append("Nothing was left out, cut or found unreadable, as far as the source says.")
    return lines


def checked_lines(checked: int, broken: list[str]) -> list[str]:
    """What reading everything once has shown."""
    if not broken:
        return ["", f"Read {checked:,}, one by one: all can be read."]
    return ["", f"Read {checked:,}, one by one. Cannot be read:", *(f"  {clean(line)}" for line in broken)]


def left_out(run_dir: RunDir) -> str:
    """For the end of a run: what was left out, cut or unreadable in a few words; empty where nothing was."""
    try:
        record = DataRecord.from_dict(read_json(run_dir.data))
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return ""
    omissions = sorted(record.omissions(), key=lambda omission: not omission.is_large)  # warnings first
    if not omissions:
        return ""
    words = "; ".join(f"{omission.count:,} {omission.what}" for omission in omissions[:KINDS_AT_END])
    more = units.plural(len(omissions) - KINDS_AT_END, "more kind") if len(omissions) > KINDS_AT_END else ""
    return f"{words}{f'; {more}' if more else ''} (see {run_dir.data.name})"


def _source(record: DataRecord) -> str:
    report = record.report
    parts = [units.plural(report.files, "file"), _size(report.size_bytes)] if report.files else []
    if report.encoding:
        parts.append(report.encoding)
    return f"{report.kind}: {', '.join(parts)}" if parts else report.kind


def _contents(record: DataRecord) -> str:
    report = record.report
    items = f"{report.items:,} {report.item_name}"
    if report.classes is None:
        return items
    counts = ", ".join(f"{name} {count:,}" for name, count in report.classes.items())
    return f"{items} in {len(report.classes):,} classes: {counts}"


def _samples(record: DataRecord) -> str:
    count = "a stream" if record.is_stream else units.plural(record.train_samples, "sample")
    text = f"{count} to train on, {record.eval_samples:,} held out"
    return f"{text}; {record.shapes}" if record.shapes else text


def _omission(omission: Omission) -> str:
    shown = ", ".join(omission.examples)
    if omission.examples and omission.count > len(omission.examples):
        shown += ", ..."
    return f"{_warned(omission)}{_count(omission)}{f': {shown}' if shown else ''}"


def _warned(omission: Omission) -> str:
    return "warning: " if omission.is_large else ""


def _count(omission: Omission) -> str:
    share = f" of {omission.of:,} ({omission.count / omission.of:.1%})" if omission.of else ""
    return f"{omission.count:,}{share} {clean(omission.what)}"


def _size(count: int) -> str:
    return units.size(count) if count >= units.KIB else units.plural(count, "byte")


def _fit(line: str) -> str:
    return line if len(line) <= COLUMNS else line[: COLUMNS - 3].rstrip(", ") + "..."
