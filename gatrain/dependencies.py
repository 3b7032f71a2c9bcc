"""What an answer about a configuration depends on, found without importing what the configuration names.

Three kinds: the source text behind its ``_target_``s, the files and folders that its values name, and, while the
user's code runs in a child, the files that it is seen to read. Standard library only.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.machinery
import os
import stat
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

MAX_SOURCE_FILES = 200
MAX_ENTRIES = 20_000
MAX_WALK_S = 0.15
"""Limits of a look at the folders that one configuration names, all of them together."""
MAX_READS = 1000
"""Files that user code may read for its answer to be remembered: each is looked at again before it is used."""

State = list[int] | None
"""Size (of a folder 0), mtime, ctime and inode; None where there is neither file nor folder. The ctime also tells
of a file replaced by one that was given the old one's mtime."""


# --- source text ----------------------------------------------------------------------------------------


def targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` inside nested configuration nodes."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


def source_hash(target: str, cwd: Path | None = None) -> str:
    """Hash the source that ``target`` names, found on the path without importing anything.

    Of the user's own work the whole package counts, or the module's file and those beside it that the name of
    an import may reach; of an installed package the one file, for its version is in that text often enough.
    """
    names = target.split(".")
    search = [str(cwd or Path.cwd()), *sys.path]
    with contextlib.suppress(ImportError, ValueError, OSError, AttributeError):
        spec = importlib.machinery.PathFinder.find_spec(names[0], search)
        if spec is None or spec.origin is None:
            return "not found"
        origin = Path(spec.origin)
        if origin.name != "__init__.py":
            return hash_files(_siblings(origin))
        if names[0] == "gatrain":  # the part that is named; the caller knows what it is used with
            return hash_files(sorted(_deepest_file(origin, names[1:]).parent.glob("*.py")))
        if not _is_installed(origin):
            return hash_files(sorted(origin.parent.rglob("*.py"))[:MAX_SOURCE_FILES])
        return hash_files([_deepest_file(origin, names[1:])])
    return "not found"


def hash_files(paths: Iterable[Path]) -> str:
    """Hash names and contents.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _siblings(origin: Path) -> list[Path]:
    if _is_installed(origin):
        return [origin]
    return [origin, *sorted(path for path in origin.parent.glob("*.py") if path != origin)[:MAX_SOURCE_FILES]]


def _is_installed(origin: Path) -> bool:
    """Installed packages do not change under the user's hands; Python's own library neither."""
    return any(part in ("site-packages", "dist-packages", "lib-dynload") for part in origin.parts)


def _deepest_file(origin: Path, names: Iterable[str]) -> Path:
    """Follow ``a.b.c`` from a package's folder to the last file or package that exists."""
    deepest, folder = origin, origin.parent
    for name in names:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
        if not (folder / name / "__init__.py").is_file():
            break
        folder = folder / name
        deepest = folder / "__init__.py"
    return deepest


# --- files and folders that values name -----------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """A value that names something on disk. ``depth``: how many levels of it a pattern reaches; None is all."""

    text: str
    path: Path
    depth: int | None = None


def named_paths(node: Any, cwd: Path) -> list[Named]:
    """Every value in nested nodes that is the path of a file or folder, or a pattern that begins in one.

    Where gatrain's own data keeps its copies is left out: those are made of the data and never change.
    """
    found = []
    for text in sorted(set(_texts(node))):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long, a null byte, no such user
            path = cwd / Path(text).expanduser()
            parts = Path(text).parts
            plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
            if path.exists():
                found.append(Named(text, path))
            elif plain < len(parts) and (base := cwd / Path(*parts[:plain]).expanduser()).exists():
                found.append(Named(text, base, None if "**" in parts else len(parts) - plain))
    return found


def named_state(node: Any, cwd: Path) -> list[Any]:
    """The state on disk of everything that `named_paths` finds, within `MAX_ENTRIES` and `MAX_WALK_S`.

    Beyond these limits a file may be rewritten, or one added in a folder that was not reached, without a
    difference here. Folders nearer to the root are looked at first, so that of a usual folder of images those of
    all classes count with their mtimes, which change when an image is added or removed.
    """
    walk = _Walk()
    return [
        [each.text, walk.folder(each.path, each.depth) if each.path.is_dir() else file_state(str(each.path))]
        for each in named_paths(node, cwd)
    ]


def file_state(path: str) -> State:
    """What changes when a file does, or when something enters or leaves a folder; nothing is read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return None
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    return [size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        if node:
            yield node
    elif isinstance(node, dict):
        ours = str(node.get("_target_")).startswith("gatrain.data.")
        for key, value in node.items():
            if key != "_target_" and not (ours and key == "cache_dir"):
                yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)


class _Walk:
    """Looks into folders, breadth first, until the limits are reached."""

    def __init__(self) -> None:
        self.left = MAX_ENTRIES
        self.until = time.monotonic() + MAX_WALK_S

    def folder(self, root: Path, depth: int | None) -> list[Any]:
        """The folder's own state, how many entries below it were seen, and a hash of their states."""
        seen: list[str] = []
        self.left, room = 0, self.left
        for line in self._entries(root, depth, room):
            seen.append(line)
            if time.monotonic() > self.until:
                # A slow disk: how far a look gets depends on the moment, so what counts is rounded down to a
                # power of two, and two looks mostly agree. Where they do not, nothing worse happens than that
                # the answer is not found.
                del seen[1 << (len(seen).bit_length() - 1) :]
                break
        else:
            self.left = room - len(seen)
        text = "\n".join(seen).encode("utf-8", "surrogateescape")
        return [file_state(str(root)), len(seen), hashlib.sha256(text).hexdigest()]

    def _entries(self, root: Path, depth: int | None, room: int) -> Iterator[str]:
        folders = deque([(str(root), 0)])
        known = set()
        while folders and room > 0:
            folder, level = folders.popleft()
            try:
                found = os.stat(folder)
                with os.scandir(folder) as listing:
                    entries = sorted(islice(listing, room), key=lambda entry: entry.name)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) in known:  # links may lead round in a circle
                continue
            known.add((found.st_dev, found.st_ino))
            room -= len(entries)
            for entry in entries:
                try:
                    state = entry.stat()
                except OSError:  # a link to nothing
                    yield entry.path
                    continue
                if stat.S_ISDIR(state.st_mode):
                    yield f"{entry.path} {state.st_mtime_ns}"
                    if depth is None or level + 1 < depth:
                        folders.append((entry.path, level + 1))
                else:
                    yield f"{entry.path} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


# --- files that code is seen to read --------------------------------------------------------------------

_ELSEWHERE = frozenset(
    {
        "socket.connect", "sqlite3.connect", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty",
        "os.posix_spawn", "os.startfile",
    }
)  # fmt: skip
"""Python's audit events of code that asks another process or machine, whose answer has no state on disk."""


class Watch:
    """Notes what this process reads from now on, for as long as it lives.

    Python tells of every file that it opens and every folder that it lists. Libraries that open files in C are
    not heard, nor is what reads the clock or a GPU: what is learned here lowers the risk of an answer that is
    out of date, and a time limit has to bound it.
    """

    def __init__(self) -> None:
        self.began_ns = time.time_ns()
        self._paths: set[str] = set()
        self._elsewhere = False
        sys.addaudithook(self._hear)

    def reads(self, apart_from: Iterable[Path]) -> dict[str, State] | None:
        """State of every file that was read and of every module's file; None if that does not say enough.

        Args:
            apart_from: files and folders that are known to count.
        """
        if self._elsewhere:
            return None
        known = [(str(path), os.path.join(str(path), "")) for path in apart_from]
        heard = {
            path for path in self._paths if not any(path == p or path.startswith(below) for p, below in known)
        }
        paths = sorted(heard | set(_module_files()))
        states = {path: file_state(path) for path in paths}
        # what changed meanwhile may have been read before it did
        changed = any(max(state[1:3]) >= self.began_ns for state in states.values() if state)
        return None if changed or len(states) > MAX_READS else states

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _ELSEWHERE:
            self._elsewhere = True
        if event not in ("open", "os.listdir", "os.scandir") or not args:
            return
        given = args[0] if args[0] is not None else "."
        if not isinstance(given, str | bytes | os.PathLike):
            return  # an open file's number
        if event == "open":
            if args[2] & (os.O_WRONLY | os.O_TRUNC | os.O_EXCL):
                return  # nothing that was there is read
        elif sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
            return  # looking for a module; what it found is in `sys.modules`
        with contextlib.suppress(OSError, ValueError):
            path = os.path.abspath(os.fsdecode(given))
            if (
                not path.startswith(_UNCHANGING)
                and not path.endswith(".pyc")
                and not _is_installed(Path(path))
            ):
                self._paths.add(path)
        if len(self._paths) > 100 * MAX_READS:
            self._elsewhere = True  # too many to keep


_PACKAGE = str(Path(__file__).resolve().parent)
_PYTHON = (sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))
_UNCHANGING = tuple(os.path.join(folder, "") for folder in ("/proc", "/sys", _PACKAGE, *_PYTHON))
"""Installed files and gatrain's own; versions stand for them."""


def _module_files() -> Iterator[str]:
    """The files of the user's own modules that are imported, and the first file of each installed package."""
    for name, module in list(sys.modules.items()):
        try:
            path = vars(module).get("__file__")
        except TypeError:  # something else that was put there
            continue
        if not isinstance(path, str) or path.startswith(os.path.join(_PACKAGE, "")):
            continue
        path = os.path.abspath(path)
        if "lib-dynload" in path:
            continue  # of Python itself
        if "." not in name if _is_installed(Path(path)) else not path.startswith(_UNCHANGING):
            yield path


def own_modules() -> list[str]:
    """The files of the modules that this process has imported and that are no installed package's, nor Python's."""
    found = set()
    for name, module in list(sys.modules.items()):
        try:
            path = vars(module).get("__file__")
        except TypeError:
            continue
        if not isinstance(path, str) or name in ("sitecustomize", "usercustomize"):
            continue
        path = os.path.abspath(path)
        if not path.startswith(_UNCHANGING) and not _is_installed(Path(path)):
            found.add(path)
    return sorted(found)
