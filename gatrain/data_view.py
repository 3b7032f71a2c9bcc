"""`gatrain show --data`: what a recipe's data is, read in a process that ends, and on request every sample of it.

The parent asks with `view`; the child (`python -m gatrain.data_view FOLDER [--check]`) makes the task with its data
and no model.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gatrain import child as child_process
from gatrain.child import Child
from gatrain.data.report import DataRecord, DataReport, Omission
from gatrain.errors import GatrainError, RunFolderError
from gatrain.rundir import read_json, write_json

CONFIG, PROGRESS = "config.yaml", "progress.json"
FAILED = "reading the data failed"
POLL_S = 0.1
TOLD_EVERY_S = 1.0
_MORE = ("checked", "broken", "remarks")
_BROKEN = re.compile(r"cannot be read|could not be read|unreadable|broken|damaged|truncated", re.IGNORECASE)


@dataclass(frozen=True)
class View:
    """What was found."""

    record: DataRecord
    checked: int | None = None
    """Samples or files that were read one by one; None where that was not asked for."""
    broken: list[str] = field(default_factory=list)
    """A line for each of them that cannot be read."""
    remarks: list[str] = field(default_factory=list)
    """Sentences on how the data fits the model."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = self.record.to_dict() | {"remarks": self.remarks}
        return found if self.checked is None else found | {"checked": self.checked, "broken": self.broken}


def view(
    config_yaml: str, cwd: Path, check: bool = False, progress: Callable[[str], None] = lambda text: None
) -> View:
    """Look at the data of a composed configuration, without a model and without training.

    Args:
        check: read every sample or file once.
        progress: told a sentence now and then.

    Raises:
        GatrainError: as found by the child, with its message.
    """
    progress("Reading the data")
    words = ["--check"] if check else []
    with Child("gatrain.data_view", {CONFIG: config_yaml}, FAILED, words=words, cwd=cwd) as child:
        shown = ""
        while child.is_running():
            time.sleep(POLL_S)
            if (text := _progress(child.folder)) not in ("", shown):
                progress(shown := text)
        result = child.result()
    return View(
        DataRecord.from_dict(result["record"]), result["checked"], result["broken"], result["remarks"]
    )


def _progress(folder: Path) -> str:
    with contextlib.suppress(RunFolderError):
        found = read_json(folder / PROGRESS) if (folder / PROGRESS).exists() else {}
        return str(found.get("text", ""))
    return ""


# --- the child ------------------------------------------------------------------------------------------


def _work(folder: Path, words: list[str]) -> dict[str, Any]:
    found = _look(folder, "--check" in words)
    return {"record": found.record.to_dict(), **{name: getattr(found, name) for name in _MORE}}


def _look(folder: Path, check: bool) -> View:
    from gatrain import build
    from gatrain.compose import load_config
    from gatrain.train.data_look import compare_classes, look_at_data

    config = load_config(folder / CONFIG)
    build.check_targets(config)
    task, source = build.build_task_and_source(config)
    record = look_at_data(task, source)
    remarks = compare_classes(record.report, config.model)
    if not check:
        return View(record, remarks=remarks)
    tell = _Teller(folder)
    own = getattr(source, "check", None)
    if callable(own):
        takes = inspect.signature(own).parameters
        found = own(progress=tell) if "progress" in takes else own()
        return replace(_of_own_check(record, found), remarks=remarks)
    count, broken = 0, []
    total = record.train_samples + record.eval_samples
    for data, part in ((task.train_data, ""), (task.eval_data, "held-out ")):
        for number in range(len(data) if data is not None else 0):
            count += 1
            tell(count, total)
            if problem := _problem(task, data, number, config.train.seed):
                broken.append(part + problem)
    return View(record, count, broken, remarks)


def _problem(task: Any, data: Any, number: int, seed: int) -> str:
    from gatrain.train.sample_prints import read_whole, why_unread

    try:
        read_whole(task, data, number, seed)
    except Exception as error:
        return why_unread(number, error)
    return ""


def _of_own_check(record: DataRecord, found: Any) -> View:
    """What the source's own ``check`` found, in the place of what its report could tell."""
    from gatrain.train.data_look import plain_report

    given = list(found) if isinstance(found, Iterable) else [found]
    if isinstance(found, DataReport):
        report = plain_report(found)
    elif all(isinstance(each, Omission) for each in given):
        report = plain_report(replace(record.report, omissions=(*record.report.omissions, *given)))
    else:
        raise GatrainError(
            f"data.check() gave a {type(found).__name__}. Let it return a gatrain.data.report.DataReport, or a "
            "list of Omissions."
        )
    known = {each.what for each in record.report.omissions}
    broken: list[str] = []
    for each in report.omissions:
        if each.what not in known and _BROKEN.search(each.what):
            broken += each.examples
            if each.count > len(each.examples):
                broken.append(f"and {each.count - len(each.examples):,} more {each.what}")
    return View(replace(record, report=report), report.files or report.items, broken)


class _Teller:
    """Leaves word for the parent, about once a second."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._next = folder, time.monotonic() + TOLD_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self._next and done != total:
            return
        self._next = time.monotonic() + TOLD_EVERY_S
        with contextlib.suppress(OSError):
            write_json(self._folder / PROGRESS, {"text": f"Reading the data: {done:,} of {total:,}"})


if __name__ == "__main__":
    child_process.main(_work, FAILED)
