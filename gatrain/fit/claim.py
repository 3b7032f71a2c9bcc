"""The run folder of a new run: which it is, that nobody else has it, and that no remains are left."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gatrain import commands, guardian
from gatrain.commands import OVERWRITE, Again
from gatrain.compose import Composed
from gatrain.errors import ConfigError, ExactnessError, GatrainError, RunFolderError, WorkerError
from gatrain.fit import requeue
from gatrain.fit.overwrite import completed_at, described, is_ours, remove
from gatrain.launch.schedulers import Job
from gatrain.launch.world import Nodes, WorldRequest
from gatrain.rundir import RunDir, locked

LONGEST_INSIDE_BYTES = 200
"""Of what is written below a run folder: TensorBoard's files bear the host's name."""


def choose_folder(
    composed: Composed, nodes: Nodes, cwd: Path, request: WorldRequest | None = None
) -> tuple[Path, bool]:
    """Return the run folder, and whether it must be that one (a name made here may get a number to be free).

    Args:
        request: with the job or the torchrun of this process, which may start it again for the same run.

    Raises:
        ConfigError: a name that is none, or several nodes without a folder that they share.
        RunFolderError: the path is longer than a file system takes.
    """
    path, named = _choose(composed, nodes, cwd, request or WorldRequest())
    check_length(path)
    return path, named


def check_length(path: Path) -> None:
    """Tell before anything is read that the files of a run could not be written.

    Raises:
        RunFolderError: a part of the path is too long, or the whole with the files that come below it.
    """
    name_max, path_max = 255, 4096
    with contextlib.suppress(OSError, ValueError):
        name_max, path_max = os.pathconf("/", "PC_NAME_MAX"), os.pathconf("/", "PC_PATH_MAX")
    for part in path.parts:
        if (size := len(os.fsencode(part))) > name_max:
            raise RunFolderError(
                f"the run folder's name {part[:40]}... has {size} bytes, and a file system takes {name_max}. "
                "Choose a shorter one with run.name=NAME or run.dir=FOLDER."
            )
    if (size := len(os.fsencode(path))) + LONGEST_INSIDE_BYTES > path_max:
        raise RunFolderError(
            f"the run folder's path has {size} bytes, and with the names of the files in it this is more than the "
            f"{path_max} that the system takes. Choose one of at most {path_max - LONGEST_INSIDE_BYTES} bytes with "
            "run.dir=FOLDER."
        )


def _choose(composed: Composed, nodes: Nodes, cwd: Path, request: WorldRequest) -> tuple[Path, bool]:
    run, job, given = composed.config.run, request.job, request.torchrun
    if run.dir is not None:
        if not str(run.dir).strip():
            raise ConfigError("run.dir= is empty. Give a folder, or leave it out.")
        return _again_at(cwd / _home(run.dir), composed, nodes, job), True
    if given is not None and (earlier := requeue.first_of(given.earlier_runs(), composed.config)) is not None:
        return earlier, True
    parent = cwd / "outputs" / composed.recipe
    if run.name is not None:
        if not re.fullmatch(r"[^/\\\0]+", run.name) or run.name in (".", ".."):
            raise ConfigError(f"run.name={run.name!r} must be a plain name. Use run.dir=FOLDER for a path.")
        return _again_at(parent / run.name, composed, nodes, job), True
    if job is not None:
        # a requeued job keeps its number, and every node of a job must come to the same name
        if job.restarts and (own := requeue.own_run(parent, job, composed.config)) is not None:
            return own, True
        return parent / job.run_name, nodes.nnodes > 1
    if nodes.nnodes > 1 and given is not None and re.fullmatch(r"[\w.-]+", given.run_id) and given.is_named:
        return parent / f"torchrun-{given.run_id}", True
    if nodes.nnodes > 1:
        raise ConfigError(
            f"{nodes.nnodes} nodes need a run folder that all of them see and name alike. "
            "Add run.dir=FOLDER, on a file system that they share, to the command of every node."
        )
    return parent / time.strftime("%Y-%m-%d_%H-%M-%S"), False


def folder_for_job(composed: Composed, job: Job, cwd: Path) -> Path | None:
    """The folder for a run on all nodes of a job, chosen once before it starts there; None where it is named."""
    if composed.config.run.dir is not None or composed.config.run.name is not None:
        return None
    path, named = choose_folder(composed, Nodes(1), cwd, WorldRequest(job=job))
    return path if named else _free(path)


def _home(folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"run.dir={folder}: nobody here has that home folder. Write the path in full."
        ) from error


def _again_at(path: Path, composed: Composed, nodes: Nodes, job: Job | None) -> Path:
    """A folder that is named by the clock has another name at each start, and on each node."""
    if not {"run.dir", "run.name"} & set(composed.timed):
        return path
    if nodes.nnodes > 1:
        raise ConfigError(
            f"{nodes.nnodes} nodes need a run folder that all of them name alike, and ${{now:...}} differs between "
            "them. Give run.dir=FOLDER without it."
        )
    own = requeue.own_run(path.parent, job, composed.config) if job is not None and job.restarts else None
    return own or path


@contextlib.contextmanager
def acquire_run_dir(path: Path, named: bool, again: Again, overwrite: bool = False) -> Iterator[Claim]:
    """Create and lock the run folder; take it away again if the run ends before it has anything to keep.

    Args:
        again: the command that asks for the folder, for messages.
        overwrite: whether a run of gatrain's may be there; it stays until `Claim.clear`.

    Raises:
        RunFolderError: it holds a run, is in use, or cannot be written.
    """
    if named and not overwrite and _has_trained(RunDir(path)) and not RunDir(path).lock.exists():
        raise _holds_a_run(RunDir(path), again)  # without touching the folder of someone else's run
    run_dir, created = _create(path, named)
    before = _names(run_dir.path) if not created else set()
    try:
        run_dir.refuse_links()
        with locked(run_dir):
            claim = Claim(run_dir)
            try:
                guardian.guard_claim(run_dir.path, before, created)
                if _has_trained(run_dir) and not (overwrite and is_ours(run_dir)):
                    raise _holds_a_run(run_dir, again)
                yield claim
            except BaseException as error:
                # what a rank says about code of the user's own is in the logs: they stay
                told = isinstance(error, WorkerError | ExactnessError) or type(error) is GatrainError
                keeps = claim.is_clear and ((told and run_dir.config.exists()) or _has_trained(run_dir))
                if not keeps:
                    guardian.clear_claim(run_dir.path, before, ())
                raise
            finally:
                guardian.forget_claim(run_dir.path)
    finally:
        if created and _names(run_dir.path) == {run_dir.lock.name}:  # a signal came as soon as it was there
            guardian.remove(run_dir.lock)
        for folder in created:  # deepest first; those that are not empty stay
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_free(run_dir: RunDir, again: Again, overwrite: bool) -> None:
    """Tell before anything is submitted that a job would be refused the folder.

    Raises:
        RunFolderError: it holds a run that is not to be replaced, or one that is under way.
    """
    if _has_trained(run_dir) and not (overwrite and is_ours(run_dir)):
        raise _holds_a_run(run_dir, again)
    if run_dir.lock.exists():
        with locked(run_dir):
            pass


@dataclass
class Claim:
    """A locked run folder, which may still hold an earlier run."""

    run_dir: RunDir
    is_clear: bool = False

    def clear(self) -> str | None:
        """Remove the earlier run, now that the next one is ready; say what it was where anything is lost.

        Raises:
            RunFolderError: it cannot be removed.
        """
        lost = described(self.run_dir) if _has_trained(self.run_dir) else None
        if self.run_dir.has_run():  # without a loss: it was refused or failed before its first step
            remove(self.run_dir)
        self.is_clear = True
        return lost


def _has_trained(run_dir: RunDir) -> bool:
    """Whether there is anything that another run would lose: of a run, or of someone's own by the same names."""
    return run_dir.has_run() and (
        not is_ours(run_dir) or bool(run_dir.saved_entries()) or _has_content(run_dir.metrics)
    )


def _holds_a_run(run_dir: RunDir, again: Again) -> RunFolderError:
    """Say what lies there, and what works from here: to go on with it, or to begin again in its place."""
    path, elsewhere = run_dir.path, "choose another folder with run.dir=FOLDER."
    if not is_ours(run_dir):
        return RunFolderError(
            f"{path} holds a config.yaml, metrics or saved states that are not of a run that gatrain began there. "
            f"They are left alone: {elsewhere}"
        )
    lines = [f"{path} already holds {described(run_dir)}."]
    if run_dir.config.is_file() and run_dir.saved_steps():
        if (end := completed_at(run_dir)) is not None:
            lines.append(f"To train it further: {commands.resume(run_dir, f'train.steps={2 * end}')}")
        else:
            lines.append(f"To go on with it: {commands.resume(run_dir)}")
    lines.append(f"To replace it: {again.text() if again.is_whole else f'the same command with {OVERWRITE}'}")
    return RunFolderError("\n".join([*lines, f"For a new run beside it {elsewhere}"]))


def _create(path: Path, named: bool) -> tuple[RunDir, list[Path]]:
    """Make the folder and its parents; return those that were made, deepest first."""
    wanted = path
    if not named:
        path = _free(wanted)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir(exist_ok=named)
                break
            except FileExistsError:
                if named:
                    raise
                created[0] = path = _free(wanted)  # another run took the name just now
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = error.strerror
        if path.is_symlink() and not path.exists():
            reason = f"it is a link to {os.readlink(path)}, which is not there"
        elif path.exists() and not path.is_dir():
            reason = "it is a file, not a folder"
        raise RunFolderError(
            f"the run folder {path} cannot be written: {reason}. Choose another with run.dir=FOLDER."
        ) from error
    return RunDir(path.resolve()), created


def _free(path: Path) -> Path:
    """The path, or the first with a number that nobody has."""
    stem, number = path.name, 1
    while os.path.lexists(path):
        number += 1
        path = path.with_name(f"{stem}-{number}")
    return path


def _names(folder: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {entry.name for entry in folder.iterdir()}
    return set()


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
