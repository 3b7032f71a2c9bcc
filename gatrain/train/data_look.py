"""One look at a run's data: what its source says of itself, and what can be seen of any data from outside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gatrain.data.compare import class_names
from gatrain.data.report import EXAMPLES, DataRecord, DataReport, Omission
from gatrain.errors import ConfigError, GatrainError
from gatrain.tasks.base import Task
from gatrain.tasks.streams import Stream
from gatrain.train.sample_prints import Prints, spread, take_prints

SEED = 0
"""Samples are compared as they are read with this seed, whatever the run's: what is found is kept for all runs."""
SOME = 3
"""Samples that rank 0 reads to see that the data is still the same; the command that resumed has read more."""
HELD_OUT, HELD_OUT_SAMPLES = "held-out ", 2
CLASS_KEYS = ("classes", "num_classes", "n_classes", "num_labels")
"""Names under which models are told how many classes there are."""


def look_at_data(task: Task, source: Any) -> DataRecord:
    """Ask the source for its report, and read a few samples of the training data and of the held-out data.

    Args:
        source: what the task was given as its data; None where it makes its own.

    Raises:
        GatrainError: the source's own report raises it.
    """
    is_stream = isinstance(task.train_data, Stream)
    prints = take_prints(task, task.train_data, SEED)
    held_out = Prints()
    if task.eval_data is not None:
        held_out = take_prints(task, task.eval_data, SEED, spread(len(task.eval_data), HELD_OUT_SAMPLES))
    report = _own_report(task, source)
    if report is None:
        kind = type(source if source is not None else task.train_data)
        report = DataReport(
            kind=f"{kind.__module__}.{kind.__qualname__}",
            items=len(task.train_data) + _length(task.eval_data),
            item_name="samples looked at; a stream does not tell how many it has" if is_stream else "samples",
            fingerprint=_own_fingerprint(task),
        )
    unread = [*prints.unread, *(f"held-out {each}" for each in held_out.unread)]
    if unread:
        tried = sum(len(each.unread) + len(each.samples) + each.unstable for each in (prints, held_out))
        what = "tried samples could not be read"
        omission = Omission(what, len(unread), tuple(unread[:EXAMPLES]), of=tried)
        report = dataclasses.replace(report, omissions=(*report.omissions, omission))
    return DataRecord(
        report=report,
        train_samples=_train_samples(task),
        eval_samples=_length(task.eval_data),
        shapes=prints.shapes,
        samples=prints.samples | {f"{HELD_OUT}{key}": each for key, each in held_out.samples.items()},
        not_compared=_not_compared(prints) if not report.fingerprint else "",
        is_stream=is_stream,
    )


def same_data(task: Task, source: Any, before: DataRecord) -> DataRecord:
    """As `look_at_data` for data that was looked at before: only a part of what is compared is read."""
    report = _own_report(task, source)
    report = report or dataclasses.replace(before.report, fingerprint=_own_fingerprint(task))
    found: dict[str, Any] = {}
    if before.train_samples == _train_samples(task):
        numbers = [int(key) for key in before.samples if key.isdecimal()]
        some = [numbers[nth] for nth in spread(len(numbers), SOME)]
        found |= take_prints(task, task.train_data, SEED, some, again=False).samples
    if task.eval_data is not None and before.eval_samples == len(task.eval_data):
        keys = [key for key in before.samples if key.startswith(HELD_OUT)]
        numbers = [int(key.removeprefix(HELD_OUT)) for key in keys]
        held_out = take_prints(task, task.eval_data, SEED, numbers, again=False)
        found |= {f"{HELD_OUT}{key}": each for key, each in held_out.samples.items()}
    return DataRecord(report, _train_samples(task), _length(task.eval_data), samples=found)


def compare_classes(report: DataReport, model: Any) -> list[str]:
    """Compare the classes of the data with those that the model is told of.

    Returns:
        remarks: a sentence where the model has classes that the data lacks.

    Raises:
        ConfigError: the data has more classes than the model.
    """
    if report.classes is None or not isinstance(model, Mapping):
        return []
    found = len(report.classes)
    for key in CLASS_KEYS:
        told = model.get(key)
        if type(told) is not int:
            continue
        names = class_names(report)
        if told < found:
            raise ConfigError(
                f"model.{key}={told}, but the data has {found} classes: {names}. Use model.{key}={found}, or leave "
                "out what is no class."
            )
        if told > found:
            return [
                f"model.{key}={told}, but the data has only {found} classes ({names}): model.{key}={found} fits"
            ]
    return []


def _own_report(task: Task, source: Any) -> DataReport | None:
    for each in (source, task, task.train_data):
        report = getattr(each, "report", None)
        if isinstance(report, DataReport):
            return plain_report(report)
    return None


def plain_report(report: DataReport) -> DataReport:
    """As it comes back from JSON; a user's own report may hold numbers of numpy and names that are no text.

    Raises:
        GatrainError: it cannot be written as JSON.
    """
    try:
        plain = json.loads(json.dumps(report.to_dict(), default=_as_plain))
        return DataReport.from_dict(plain)
    except (TypeError, ValueError, KeyError) as error:
        raise GatrainError(f"data.report cannot be kept: {type(error).__name__}: {error}") from error


def _as_plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _own_fingerprint(task: Task) -> str:
    own = getattr(task.train_data, "fingerprint", None)
    return str(own) if isinstance(own, str | int | bytes) and own else ""


def _train_samples(task: Task) -> int:
    """Samples of the training data; 0 for a stream, which does not tell."""
    return 0 if isinstance(task.train_data, Stream) else len(task.train_data)


def _length(data: Any) -> int:
    return len(data) if data is not None else 0


def _not_compared(prints: Prints) -> str:
    if not prints.samples:
        if prints.unstable:
            return "its samples differ each time they are read"
        return "no sample could be read" if prints.unread else ""
    return f"{', '.join(prints.left_out)} in its samples cannot be compared" if prints.left_out else ""
