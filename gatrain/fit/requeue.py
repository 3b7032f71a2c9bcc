"""A command that a scheduler has started again: which run of its earlier attempts it goes on with.

A job may hold several trainings, and a folder belongs to the one whose settings it was started with. The name alone
says nothing: the first attempt may have found its first choice taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gatrain import commands
from gatrain.compose import Composed, load_config
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, RunFolderError
from gatrain.launch.schedulers import Job
from gatrain.launch.world import WorldRequest
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.secrets import redact_value

_SHOWN = 4
"""Settings that a message names."""


def settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that makes it this training, by dotted key; where it runs and is kept does not count."""
    return {
        key: redact_value(key, value)
        for key, value in _leaves(asdict(config))
        if key.partition(".")[0] not in ("run", "scheduler")
    }


def digest(config: RunConfig) -> str:
    """A hash of `settings`."""
    text = json.dumps(settings(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def own_run(parent: Path, job: Job, config: RunConfig) -> Path | None:
    """The folder below ``parent`` in which an earlier attempt of this job trained with these settings.

    Of several the first that this attempt has not yet gone on with.
    """
    wanted, found = digest(config), []
    with contextlib.suppress(OSError):
        for folder in sorted(parent.iterdir()):
            run_dir, env = RunDir(folder), _env(RunDir(folder))
            if is_of(run_dir, job) and is_same(run_dir, wanted):
                taken = env.get("job_restarts", env.get("slurm_restarts")) == job.restarts
                found.append((taken, str(env.get("started")), len(folder.name), folder))
    return min(found)[-1] if found else None


def is_of(run_dir: RunDir, job: Job) -> bool:
    """Whether the run was begun within this job."""
    env = _env(run_dir)
    known = env.get("job") or env.get("slurm_job")  # the latter of an older gatrain
    return known is not None and str(known) == job.id and env.get("scheduler", "slurm") == job.scheduler


def earlier_attempt(
    run_dir: RunDir, request: WorldRequest, composed: Composed, overwrite: bool
) -> RunDir | None:
    """The run of an earlier attempt of this command, which a scheduler has started again; None if it has none.

    Args:
        overwrite: whether a run that is older than the job is to be replaced.

    Raises:
        RunFolderError: there is a run with other settings.
    """
    if not run_dir.has_run():
        return None
    if overwrite:
        torchrun, job = request.torchrun, request.job
        if torchrun is not None and torchrun.attempt:
            is_older = not torchrun.earlier_runs()
        else:
            is_older = job is None or not is_of(run_dir, job)
        if is_older:
            return None
    check_same(run_dir, composed)
    return run_dir


def first_of(folders: Iterable[Path], config: RunConfig) -> Path | None:
    """The first of some run folders that was started with these settings."""
    wanted = digest(config)
    return next((folder for folder in folders if is_same(RunDir(folder), wanted)), None)


def is_same(run_dir: RunDir, wanted: str) -> bool:
    """Whether the run was started with settings of this `digest`."""
    if not run_dir.config.is_file():
        return False
    known = _env(run_dir).get("settings")
    if isinstance(known, str):
        return known == wanted
    with contextlib.suppress(ConfigError, OSError):  # of an older gatrain
        return digest(load_config(run_dir.config)) == wanted
    return False


def check_same(run_dir: RunDir, composed: Composed) -> None:
    """Refuse to go on with somebody else's run.

    Raises:
        RunFolderError: names the settings that differ.
    """
    if is_same(run_dir, digest(composed.config)):
        return
    differences: list[str] = []
    with contextlib.suppress(ConfigError, OSError):
        there, here = settings(load_config(run_dir.config)), settings(composed.config)
        differences = [
            f"{key} is {there.get(key)} there and {here.get(key)} here"
            for key in sorted({*there, *here})
            if there.get(key) != here.get(key)
        ]
    more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    listed = f" ({', '.join(differences[:_SHOWN])}{more})" if differences else ""
    raise RunFolderError(
        f"{run_dir.path} holds a run with other settings{listed}, so this command, which was started again, does "
        "not go on with it. Give every training of a job a folder of its own with run.dir=FOLDER. "
        f"To go on with that run: {commands.resume(run_dir)}"
    )


def mark(run_dir: RunDir, job: Job | None) -> None:
    """Note that this attempt of the job has gone on with the run."""
    if job is not None:
        with contextlib.suppress(OSError, RunFolderError):
            write_json(run_dir.env, read_json(run_dir.env) | {"job_restarts": job.restarts})


def _env(run_dir: RunDir) -> dict[str, Any]:
    with contextlib.suppress(RunFolderError):
        return read_json(run_dir.env) if run_dir.env.is_file() else {}
    return {}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
