"""`--overwrite`: a run folder is made free for another run. Only what gatrain itself wrote there is removed."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from gatrain.errors import RunFolderError
from gatrain.rundir import RunDir, read_json

_STATES = r"step_\d+|\.writing-step_.*"
_LOGS = r"rank_\d+\.log|error_rank_\d+\.json|launcher_\d+\.log"
_TENSORBOARD = r"events\.out\.tfevents\..*"
_FILES = (
    "metrics.jsonl", "evaluations.jsonl", "summary.json", "loss.png", "plan.png", "data.json", "hardware.json",
    "overrides.txt", "recorded.json", "loggers.json",
)  # fmt: skip


def is_ours(run_dir: RunDir) -> bool:
    """Whether gatrain began a run here: others, too, have a config.yaml or a folder called saved."""
    try:
        recipe = read_json(run_dir.env).get("recipe")
    except RunFolderError:
        return False
    return isinstance(recipe, str) and run_dir.plan.is_file()


def completed_at(run_dir: RunDir) -> int | None:
    """The last step of a run that came to its end with nothing amiss."""
    with contextlib.suppress(RunFolderError):
        summary = read_json(run_dir.summary)
        step = summary.get("step")
        if summary.get("status") == "completed" and not summary.get("failed") and isinstance(step, int):
            return step
    return None


def described(run_dir: RunDir) -> str:
    """What the folder holds, in a phrase: how far the run came and what of it is kept."""
    steps, lines = run_dir.saved_steps(), _lines(run_dir.metrics)
    parts = []
    if (end := completed_at(run_dir)) is not None:
        parts.append(f"complete at step {end}")
    elif lines:
        parts.append(f"{lines} line{'s' * (lines > 1)} of metrics")
    if not steps:
        parts.append("no whole saved state")
    else:
        states = "1 saved state, that" if len(steps) == 1 else f"{len(steps)} saved states, the newest"
        parts.append(f"{states} of step {steps[-1]}")
    return f"a run of recipe {run_dir.recipe()} ({', '.join(parts)})"


def remove(run_dir: RunDir) -> None:
    """Remove a run: its states, metrics, logs and pictures. What gatrain did not write stays.

    The configuration goes first: what a kill leaves is no run that could be gone on with. The lock stays, and with
    it env.json and plan.json, by which the rest is known to be gatrain's own until another run writes its own.

    Raises:
        RunFolderError: something could not be removed.
    """
    try:
        for path in _written(run_dir):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"the earlier run in {run_dir.path} cannot be removed: {error.strerror}: {error.filename}. "
            "Choose another folder with run.dir=FOLDER."
        ) from error
    for folder in (run_dir.saved, run_dir.logs, run_dir.tensorboard, *_kept(run_dir), run_dir.kept):
        with contextlib.suppress(OSError):
            folder.rmdir()  # where files of somebody's own lie it stays


def _written(run_dir: RunDir) -> list[Path]:
    found = [run_dir.config]
    for folder, names in (
        (run_dir.saved, _STATES),
        (run_dir.logs, _LOGS),
        (run_dir.tensorboard, _TENSORBOARD),
        *((folder, _STATES) for folder in _kept(run_dir)),
    ):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        found += [path for path in inside if re.fullmatch(names, path.name)]
    return found + [run_dir.path / name for name in _FILES]


def _kept(run_dir: RunDir) -> list[Path]:
    return sorted(path for path in run_dir.kept.iterdir() if path.is_dir()) if run_dir.kept.is_dir() else []


def _lines(path: Path) -> int:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return sum(1 for _ in file)
    return 0
