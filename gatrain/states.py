"""Saved states as folders of files: which there are, which are whole, which may go, and how one comes into place.

A state is a folder ``step_00000100`` with safetensors, JSON and a manifest of sizes and SHA-256 sums. What is in
it is not believed: names, types and ranges are looked at, and what is odd counts as damaged. No torch in here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatrain import codec, commands, schema
from gatrain.errors import RunFolderError, SavedStateError
from gatrain.rundir import STATE_NAME as STATE_NAME
from gatrain.rundir import RunDir, fsync, list_states, make_folders, open_to_read, read_json

MODEL, OPTIMIZER, PROGRESS, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "manifest.json",
)
FILES = (MODEL, OPTIMIZER, PROGRESS)
"""What every state has; parts and further weights come beside them."""
FURTHER_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
RESERVED = (
    "model",
    "optimizer",
    "optimizer_groups",
    "batch_rule",
    "progress",
    "manifest",
    "hooks",
    "data",
    "gradient",
)
"""Names of files and parts that no further weights have."""
_FURTHER = re.compile(rf"{FURTHER_NAME.pattern}\.(safetensors|json)")
MOST_FURTHER = 64
TEMPORARY = ".writing-"
MOST_MANIFEST_BYTES = 2**16


@dataclass(frozen=True)
class Progress:
    """How far a run has come. ``step`` (consumed windows) is the only position in the data."""

    step: int
    samples: int
    tokens: int
    effective_batch: int
    seed: int
    data_samples: int
    """Size of the training data: the permutation depends on it."""
    scaler: dict[str, float] | None = None
    drop_last: bool = False
    """Whether epochs end with their last full window: the windows depend on it."""
    updates: int = 0
    """Updates of the parameters: the position in the learning-rate schedule."""
    skipped: int = 0
    """Windows that made no update: not finite, or without any label."""
    skipped_in_row: int = 0
    """Those of them at the end."""
    nonfinite_in_row: int = 0
    """Windows at the end that were not finite."""
    moved: bool = False
    """Some gradient was not zero."""
    unreadable: int = 0
    """Samples that could not be read and were skipped, counted in every epoch."""
    order: str = ""
    """Fingerprint of the weights or lengths that the order follows from: the windows depend on them."""
    stages: str = ""
    """First window and effective batch of each stage, where it changes: ``0:64,1000:256``; or the tokens of a
    window and the fingerprint of the samples' lengths."""
    stream: dict[str, Any] | None = None
    """Of data that is a stream: where the next window begins. ``step`` alone does not tell it."""


@dataclass(frozen=True)
class Contents:
    """All that progress.json holds."""

    progress: Progress
    aliases: dict[str, str]
    """Second and further names of tied tensors, and the name under which each is in the file."""
    optimizer: str
    """The optimizer's class."""
    values: dict[str, Any]
    """Its state that is no tensor, as ``<parameter>/<key>``."""
    tensors: int | None
    """How many tensors its state has; None in states of before this was written down."""
    parts: tuple[str, ...] = ()
    """Names of the further parts, each with a JSON file and a safetensors file."""


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


# --- reading --------------------------------------------------------------------------------------------


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest saved state whose files are all whole, and what is wrong with each newer one."""
    problems: list[str] = []
    for _, path in reversed(list_states(folder)):
        problem = find_damage(path)
        if problem is None:
            return path, problems
        problems.append(f"{path.name}: {problem}")
    return None, problems


def find_damage(path: Path, name: str | None = None) -> str | None:
    """Compare a saved state with its manifest, and its progress with what is possible; None if it is whole.

    Args:
        name: what the folder is called once it is in place.
    """
    before = _signature(path)
    problem = damage_at_a_glance(path, name)
    if problem is not None:
        return problem
    try:
        manifest = _manifest(path)
        for file, known in manifest.items():
            if known.sha256 != fingerprint(path / file)["sha256"]:
                return f"{file} does not match its checksum"
    except (OSError, RunFolderError, ValueError) as error:
        return _unreadable(error)
    if before is not None and before == _signature(path):
        _known_whole[path] = before
    return None


def damage_at_a_glance(path: Path, name: str | None = None) -> str | None:
    """What is wrong with a saved state as far as it can be seen without reading its tensors."""
    if path.is_symlink():
        return "is a symbolic link"
    if not path.is_dir():
        return "is no folder"
    try:
        manifest = _manifest(path)
        for file, known in manifest.items():
            with open(open_to_read(path / file), "rb") as opened:
                if os.fstat(opened.fileno()).st_size != known.bytes:
                    return f"{file} does not match its checksum, nor its size"
    except (OSError, RunFolderError, ValueError) as error:
        return _unreadable(error)
    # contents that do not match their checksum are damaged, whatever they say
    try:
        if manifest[PROGRESS].sha256 != fingerprint(path / PROGRESS)["sha256"]:
            return f"{PROGRESS} does not match its checksum"
        contents = read_contents(path, name)
        if absent := [file for part in contents.parts for file in _files_of(part) if file not in manifest]:
            return f"{absent[0]} is missing"
    except (OSError, RunFolderError, ValueError) as error:
        return _unreadable(error)
    return None


def read_contents(path: Path, name: str | None = None) -> Contents:
    """Read progress.json.

    Raises:
        RunFolderError: it is missing or no JSON.
        ValueError: something in it is not possible.
    """
    data = read_json(path / PROGRESS)
    parts = codec.decode(list[str], data.pop("parts", []))
    if len(parts) > MOST_FURTHER or not all(_FURTHER.fullmatch(tensors_file(part)) for part in parts):
        raise ValueError(f"{PROGRESS} names parts that no state has")
    aliases = codec.decode(dict[str, str], data.pop("aliases", None))
    optimizer = codec.decode(dict[str, Any], data.pop("optimizer", None))
    # states of before there were updates: one each step
    progress = codec.decode(
        Progress, {"updates": data.get("step"), "moved": True, **data}, unknown_keys=False
    )
    _check(progress)
    if (name or path.name) != f"step_{progress.step:08d}":
        raise ValueError(f"{PROGRESS} is of step {progress.step}")
    tensors = codec.decode(int | None, optimizer.get("tensors"))  # type: ignore[arg-type]
    values = codec.decode(dict[str, Any], optimizer.get("values"))
    return Contents(
        progress, aliases, codec.decode(str, optimizer.get("class")), values, tensors, tuple(parts)
    )


def _check(progress: Progress) -> None:
    """
    Raises:
        ValueError: a number is out of range, or two contradict each other.
    """
    schema.at_least(1, effective_batch=progress.effective_batch, data_samples=progress.data_samples)
    counts = {"step": progress.step, "samples": progress.samples, "tokens": progress.tokens}
    counts |= {"seed": progress.seed, "updates": progress.updates, "skipped": progress.skipped}
    counts |= {"skipped_in_row": progress.skipped_in_row, "nonfinite_in_row": progress.nonfinite_in_row}
    schema.at_least(0, **counts, unreadable=progress.unreadable)
    given = progress.samples + progress.unreadable
    if given > progress.step * progress.effective_batch:
        raise ValueError(f"it counts {given} samples in {progress.step} steps of {progress.effective_batch}")
    if progress.updates + progress.skipped > progress.step:
        raise ValueError(
            f"it counts {progress.updates} updates and {progress.skipped} skipped in {progress.step} steps"
        )
    if not progress.nonfinite_in_row <= progress.skipped_in_row <= progress.skipped:
        raise ValueError("its counts of skipped steps contradict each other")


def _manifest(path: Path) -> dict[str, _File]:
    """
    Raises:
        RunFolderError: it is missing or no JSON.
        ValueError: something else is in it, or something is missing.
    """
    found = read_json(path / MANIFEST, MOST_MANIFEST_BYTES)
    further = [file for file in found if file not in FILES]
    if len(further) > MOST_FURTHER or not all(map(_FURTHER.fullmatch, further)):
        raise ValueError(f"{MANIFEST} names files that no state has")
    return {file: codec.decode(_File, found.get(file)) for file in (*FILES, *further)}


def tensors_file(part: str) -> str:
    """The file with the tensors of a further part, or with further weights of that name."""
    return f"{part}.safetensors"


def text_file(part: str) -> str:
    """The file with what a further part has beside tensors."""
    return f"{part}.json"


def _files_of(part: str) -> tuple[str, str]:
    return text_file(part), tensors_file(part)


def read_part(path: Path, name: str) -> Any:
    """What a part has beside its tensors.

    Raises:
        RunFolderError: it is missing or no JSON.
    """
    return read_json(path / text_file(name))


def _unreadable(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RunFolderError) else error
    if isinstance(cause, FileNotFoundError):
        return f"{Path(str(cause.filename)).name} is missing"
    if isinstance(cause, OSError):
        is_link = cause.errno == errno.ELOOP
        why = "is a symbolic link" if is_link else f"cannot be read ({cause.strerror})"
        return f"{Path(str(cause.filename)).name} {why}"
    return f"cannot be read ({error})"


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a regular file.

    Raises:
        OSError: it cannot be read, or is a link or a pipe.
    """
    with open(open_to_read(path), "rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def check_same_run(progress: Progress, expected: Progress) -> None:
    """Refuse to go on from a state whose windows are not this run's windows.

    Raises:
        SavedStateError: names each number that differs.
    """
    names = {
        "effective_batch": "batch.effective",
        "seed": "train.seed",
        "data_samples": "the number of training samples",
        "drop_last": "train.drop_last",
        "stages": "batch.effective, by window,",
        "order": "the fingerprint of the weights or lengths of the order",
    }
    differences = [
        f"{label} was {getattr(progress, name)} and is {getattr(expected, name)}"
        for name, label in names.items()
        if getattr(progress, name) != getattr(expected, name)
    ]
    if differences:
        raise SavedStateError(
            f"the saved state of step {progress.step} belongs to other windows: {'; '.join(differences)}. "
            "Restore those values, or start a new run."
        )


def none_usable(folder: Path, problems: list[str]) -> SavedStateError:
    """What to say where there are states and none can be gone on from."""
    which = "the only saved state" if len(problems) == 1 else f"none of the {len(problems)} saved states"
    verb = "cannot" if len(problems) == 1 else "can"
    begin_again = commands.resume(RunDir(folder.parent), "--from-start")
    return SavedStateError(
        "\n".join(
            [
                f"{which} in {folder} {verb} be gone on from:",
                *(f"  {problem}" for problem in problems),
                "Nothing was changed. To begin again at step 0, with all of this kept under other names: "
                + begin_again,
            ]
        )
    )


def past_the_end(path: Path, step: int, total_steps: int) -> SavedStateError:
    """What to say where the newest state is of a later step than the run is to have."""
    steps = "1 step" if total_steps == 1 else f"{total_steps} steps"
    return SavedStateError(
        f"{path} is of step {step}, and this run is to have {steps}. To go on from it give train.steps={step} or "
        "more; if it is not of this run, remove it."
    )


# --- keeping --------------------------------------------------------------------------------------------

_Signature = tuple[tuple[int, int, int, int], ...]
_known_whole: dict[Path, _Signature] = {}
"""States whose sums were found right in this process, by what the file system told of their files then."""


def is_whole(path: Path) -> bool:
    """As `find_damage`, without reading again what has not been written to since."""
    known = _known_whole.get(path)
    return (known is not None and known == _signature(path)) or find_damage(path) is None


def remember_whole(path: Path) -> None:
    """A state that this process has just written."""
    signature = _signature(path)
    if signature is not None:
        _known_whole[path] = signature


def _signature(path: Path) -> _Signature | None:
    found = []
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return None
    if not {MANIFEST, *FILES} <= set(names):
        return None
    for name in names:
        try:
            each = os.lstat(path / name)
        except OSError:
            return None
        if not stat.S_ISREG(each.st_mode):
            return None
        found.append((each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns))
    return None if path.is_symlink() else tuple(found)


def remove_old(folder: Path, newest: int, keep: int) -> None:
    """Remove what is older than the ``keep`` newest whole states up to step ``newest``, which was just written.

    What has a higher number was passed over when the run went on: it counts for nothing, and stays.
    """
    whole = 0
    for step, path in reversed(list_states(folder)):
        if step > newest:
            continue
        if whole < keep:
            whole += is_whole(path)
        elif path.is_dir() and not path.is_symlink():
            _known_whole.pop(path, None)
            shutil.rmtree(path, ignore_errors=True)


# --- writing --------------------------------------------------------------------------------------------


def put_in_place(temporary: Path, final: Path, tell: Callable[[str], None]) -> None:
    """Give a whole state its name. At no moment is there less than what was there before.

    Args:
        tell: hears of what stood there and was no state.

    Raises:
        OSError: it cannot be renamed.
    """
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
        number = 1
        while os.path.lexists(aside := final.with_name(f"{final.name}.was-{number}")):
            number += 1
        final.rename(aside)
        tell(f"{final} was no folder but a file or a link; it is called {aside.name} now")
    if not final.is_dir():
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        # a kill between these two leaves both whole, under names that `finish_interrupted` knows
        aside = temporary.with_name(f"{temporary.name}-old")
        os.rename(final, aside)
        os.rename(temporary, final)
        temporary = aside
    fsync(final.parent)
    shutil.rmtree(temporary, ignore_errors=True)


def keep_state(state: Path, folder: Path) -> None:
    """Let a saved state stay in ``folder`` as the only one there, whatever becomes of ``state``: by hard links, so
    that it takes no space of its own while both are there, or by copies where the file system has no links.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    temporary, final = folder / f"{TEMPORARY}{state.name}", folder / state.name
    make_folders(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for file in sorted(state.iterdir()):
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copyfile(file, temporary / file.name)
        fsync(temporary)
        put_in_place(temporary, final, lambda text: None)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for _, path in list_states(folder):
        if path != final and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def finish_interrupted(folder: Path) -> None:
    """A process that was killed while writing leaves a temporary folder: a whole one gets its name, others go.

    Only one run writes here.
    """
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        match = re.match(rf"{re.escape(TEMPORARY)}(step_[0-9]{{8,}})-", path.name)
        final = folder / match[1] if match else None
        with contextlib.suppress(OSError):
            if final is not None and not os.path.lexists(final) and find_damage(path, final.name) is None:
                os.rename(path, final)
                continue
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one go, where system and file system can (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return bool(rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)
