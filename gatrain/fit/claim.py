"""The run folder of a new run: which it is, that nobody else has it, and that no remains are left."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from gatrain import guardian
from gatrain.compose import Composed
from gatrain.errors import ConfigError, ExactnessError, GatrainError, RunFolderError, WorkerError
from gatrain.launch import slurm
from gatrain.launch.nodes import Nodes
from gatrain.launch.torchrun import GivenWorld
from gatrain.rundir import RunDir, locked


def choose_folder(
    composed: Composed, nodes: Nodes, cwd: Path, given: GivenWorld | None = None
) -> tuple[Path, bool]:
    """Return the run folder, and whether its name is fixed (a name of ours may be changed to be free).

    Args:
        given: the torchrun that started these processes, which may do so again for the same run.

    Raises:
        ConfigError: a name that is none, or several nodes without a folder that they share.
    """
    run = composed.config.run
    if run.dir is not None:
        if not str(run.dir).strip():
            raise ConfigError("run.dir= is empty. Give a folder, or leave it out.")
        return cwd / Path(run.dir).expanduser(), True
    if given is not None and (earlier := given.earlier_run()) is not None:
        return earlier, True
    parent = cwd / "outputs" / composed.recipe
    if run.name is not None:
        if not re.fullmatch(r"[^/\\\0]+", run.name) or run.name in (".", ".."):
            raise ConfigError(f"run.name={run.name!r} must be a plain name. Use run.dir=FOLDER for a path.")
        return parent / run.name, True
    job = slurm.detect(os.environ)
    if job is not None:
        # a requeued job keeps its number, and every node of a job must come to the same name
        return parent / f"job-{job.job_id}", nodes.nnodes > 1 or job.restarts > 0
    if nodes.nnodes > 1 and given is not None and re.fullmatch(r"[\w.-]+", given.run_id) and given.is_named:
        return parent / f"torchrun-{given.run_id}", True
    if nodes.nnodes > 1:
        raise ConfigError(
            f"{nodes.nnodes} nodes need a run folder that all of them see and name alike. "
            "Add run.dir=FOLDER, on a file system that they share, to the command of every node."
        )
    return parent / time.strftime("%Y-%m-%d_%H-%M-%S"), False


@contextlib.contextmanager
def claimed(path: Path, named: bool) -> Iterator[RunDir]:
    """Create and lock the run folder; take it away again if the run ends before it has anything to keep.

    Raises:
        RunFolderError: it holds a run, is in use, or cannot be written.
    """
    if named and _has_trained(RunDir(path)) and not RunDir(path).lock.exists():
        raise _holds_a_run(RunDir(path))  # without touching the folder of someone else's run
    run_dir, created = _create(path, named)
    before = _names(run_dir.path) if not created else set()
    try:
        run_dir.refuse_links()
        with locked(run_dir):
            if _has_trained(run_dir):
                raise _holds_a_run(run_dir)
            if run_dir.has_run():
                remove_run(run_dir)  # it was refused or failed before its first step: it may be tried again
            guardian.guard_claim(run_dir.path, before, created)
            try:
                yield run_dir
            except BaseException as error:
                # what a rank says about code of the user's own is in the logs: they stay
                told = isinstance(error, WorkerError | ExactnessError) or type(error) is GatrainError
                keeps = told and run_dir.config.exists()
                if not keeps and not run_dir.saved_entries() and not _has_content(run_dir.metrics):
                    guardian.clear_claim(run_dir.path, before, ())
                raise
            finally:
                guardian.forget_claim(run_dir.path)
    finally:
        for folder in created:  # deepest first; those that are not empty stay
            with contextlib.suppress(OSError):
                folder.rmdir()


def _has_trained(run_dir: RunDir) -> bool:
    """Whether there is anything that another run would lose: of a run, or of someone's own by the same names."""
    is_ours = run_dir.env.is_file() and run_dir.plan.is_file()
    return run_dir.has_run() and (
        not is_ours or bool(run_dir.saved_entries()) or _has_content(run_dir.metrics)
    )


def _holds_a_run(run_dir: RunDir) -> RunFolderError:
    quoted = shlex.quote(str(run_dir.path))
    return RunFolderError(
        f"{run_dir.path} already holds a run. Go on with it: gatrain resume {quoted}. "
        "For a new run choose another folder with run.dir=FOLDER."
    )


def _create(path: Path, named: bool) -> tuple[RunDir, list[Path]]:
    """Make the folder and its parents; return those that were made, deepest first."""
    if not named:
        stem, number = path.name, 1
        while path.exists():
            number += 1
            path = path.with_name(f"{stem}-{number}")
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise RunFolderError(
            f"the run folder {path} cannot be written: {error.strerror}. Choose another with run.dir=FOLDER."
        ) from error
    return RunDir(path.resolve()), created


def _names(folder: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {entry.name for entry in folder.iterdir()}
    return set()


def remove_run(run_dir: RunDir) -> None:
    """Clear what makes the folder look like a run's, so that another may start there."""
    for path in (run_dir.config, run_dir.metrics, run_dir.saved, run_dir.summary, run_dir.plan, run_dir.data):
        guardian.remove(path)


def set_aside(run_dir: RunDir) -> Path | None:
    """Keep what a run has come to beside the place where it starts from step 0; return where its states are now.

    Nothing is deleted: states, metrics and evaluations get the first number that is free.
    """
    kept = [run_dir.saved, run_dir.metrics, run_dir.evaluations]
    number = 1
    while any(_numbered(path, number).exists() for path in kept):
        number += 1
    for path in kept:
        if path.exists():
            path.rename(_numbered(path, number))
    run_dir.summary.unlink(missing_ok=True)
    moved = _numbered(run_dir.saved, number)
    return moved if moved.exists() else None


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.before-{number}{path.suffix}")


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
