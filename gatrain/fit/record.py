"""What a run folder tells about how the run was started, without secrets from the command line."""

from __future__ import annotations

import platform
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain.commands import Again
from gatrain.compose import Composed
from gatrain.fit import requeue
from gatrain.launch.schedulers import Job
from gatrain.recorded import versions
from gatrain.rundir import RunDir, write_json, write_text
from gatrain.secrets import redact


def write_start(run_dir: RunDir, composed: Composed, again: Again, job: Job | None) -> None:
    """Keep how a new run was started: ``env.json`` and the override words."""
    words = [f"recipe={composed.recipe}", *map(redact, composed.overrides)]
    env = environment(composed.recipe, composed.recipe_file, words, again, job)
    write_json(run_dir.env, env | {"settings": requeue.digest(composed.config)})
    write_text(run_dir.overrides, "\n".join(words) + "\n")


def environment(
    recipe: str, recipe_file: Path, overrides: Sequence[str], again: Again, job: Job | None
) -> dict[str, Any]:
    """Return the contents of ``env.json``.

    Args:
        again: the command that starts the run, and where.
        job: the job that the command runs in.
    """
    return {
        "recipe": recipe,
        "recipe_file": str(recipe_file),
        "overrides": [redact(word) for word in overrides],
        "working_dir": str(again.cwd),
        "command": [redact(word) for word in again.words],
        "scheduler": job.scheduler if job is not None else None,
        "job": job.id if job is not None else None,
        "job_restarts": job.restarts if job is not None else None,
        "argv": [redact(word) for word in sys.argv],
        "versions": versions(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "commit": commit_of(again.cwd),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def commit_of(cwd: Path) -> str | None:
    """Commit that is checked out at ``cwd``, read from the repository's files; None outside of one."""
    for folder in (cwd, *cwd.parents):
        if (folder / ".git").exists():
            try:
                return _head(folder / ".git")
            except (OSError, UnicodeDecodeError):
                return None
    return None


def _head(git: Path) -> str | None:
    if git.is_file():  # a worktree: the file names the real folder
        git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    common = git
    if (git / "commondir").is_file():
        common = (git / (git / "commondir").read_text(encoding="utf-8").strip()).resolve()
    if (common / name).is_file():
        return (common / name).read_text(encoding="utf-8").strip()
    for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
        if line.endswith(f" {name}"):
            return line.split()[0]
    return None
