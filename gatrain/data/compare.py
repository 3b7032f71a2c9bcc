"""What tells two looks at a run's data apart. Imports nothing heavy: commands compare before they start ranks."""

from __future__ import annotations

from typing import Any

from gatrain.data.report import DataRecord, DataReport

TOLERANCE = 1e-3
"""Floating numbers of a sample count as the same within this part of their size."""

Named = tuple[str, str, str]
"""Key, what it was, what it is."""


def data_differences(before: DataRecord, now: DataRecord) -> list[Named]:
    """Each difference by its key. Contents count by fingerprint, where both have one, and by samples of both."""
    found: list[Named] = []
    if before.train_samples != now.train_samples:
        old, new = (f"{each.train_samples:,} samples to train on" for each in (before, now))
        found.append(("data.samples", old, new))
    prints = {before.report.fingerprint, now.report.fingerprint}
    if len(prints) == 2 and "" not in prints:
        found.append(("data.contents", _contents(before.report), _contents(now.report)))
    if not found:  # the same files may be read in another way: another tokenizer, another transform
        found += _sample_differences(before, now)
    if before.eval_samples != now.eval_samples:
        found.append(("data.eval_samples", f"{before.eval_samples:,} held out", f"{now.eval_samples:,}"))
    old_names, new_names = before.report.classes, now.report.classes
    if old_names is not None and new_names is not None and list(old_names) != list(new_names):
        found.append(("data.classes", class_names(before.report), class_names(now.report)))
    return found


def _sample_differences(before: DataRecord, now: DataRecord) -> list[Named]:
    both = [key for key in before.samples if key in now.samples]
    other = [key for key in both if not same_print(before.samples[key], now.samples[key])]
    if not other:
        return []
    first = other[0]
    which = f"sample {first}" if first.isdecimal() else f"{first.replace(' ', ' sample ')}"
    which += f" and {len(other) - 1} more of {len(both)}" if other[1:] else ""
    old, new = (_print(each.samples[first]) for each in (before, now))
    return [("data.contents", f"{which} with {old}", new)]


def _print(sample: Any) -> str:
    try:
        sums = f" and numbers of size {sample['sums'][0][0]:.4g}" if sample["sums"] else ""
        return f"the hash {str(sample['hash'])[:8]}{sums}"
    except (KeyError, TypeError, IndexError, ValueError):
        return "an unreadable print"


def same_print(one: Any, other: Any) -> bool:
    """Whether two prints (see `gatrain.train.sample_prints`) are of the same sample."""
    try:
        if one["hash"] != other["hash"]:
            return False
        for ours, theirs in zip(one["sums"], other["sums"], strict=True):
            size = max(ours[0], theirs[0])
            if not all(abs(a - b) <= TOLERANCE * size for a, b in zip(ours, theirs, strict=True)):
                return False
        return True
    except (KeyError, TypeError, IndexError, ValueError):
        return False


def class_names(report: DataReport) -> str:
    """The names of the classes, in their order, the first five of them."""
    names = list(report.classes or {})
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _contents(report: DataReport) -> str:
    size = f" ({report.files:,} files, {report.size_bytes:,} bytes)" if report.files else ""
    return f"{report.fingerprint[:12]}{size}"
