"""Which files a path names: the one way in which folders are walked, for text, images and whatever comes next.

Every file once, in an order that follows from the names alone; what is left out is counted.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Any

from gatrain.data.report import Omissions
from gatrain.errors import ConfigError, DataError, nearest

HIDDEN_FILES = "hidden files left out"
HIDDEN_FOLDERS = "hidden folders left out, with all that is in them"
SYSTEM_FILES = "files of the operating system left out"
SYSTEM_FOLDERS = "folders of the operating system left out, with all that is in them"
NOWHERE = "links that point nowhere"
FOLDER_TWICE = "further links to a folder that is read already"
ABOVE = "links to a folder above them, not followed"
FILE_TWICE = "further names of a file that is read already"
OUTSIDE = "files read through links that leave the folder"
SPECIAL = "sockets, pipes and devices, not opened"
VANISHED = "files that vanished meanwhile"

_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_SYSTEM_FOLDERS = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}

_Key = tuple[tuple[str, str], ...]
State = frozenset[int]
"""Where in a pattern one may be: places in its list of parts, of which `**` may leave several open."""


def require_path(value: Any, option: str = "data.path") -> Path:
    """The path that ``value`` names, with ``~`` replaced; it need not exist.

    Raises:
        ConfigError: it is unset, empty, the whole file system, or a variable or user that was not replaced.
    """
    write = f"Write {option}=FOLDER"
    if value is None:
        raise ConfigError(f"{option} is not set. {write}, the file or folder to read.")
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{option}={value!r} is a {type(value).__name__}, not a path. {write}.")
    given = os.fspath(value)
    text = os.fsdecode(given)
    if not text.strip():
        raise ConfigError(
            f"{option}= is empty, as it is after {option}=$NAME where NAME is not set. {write}, or "
            f"{option}=. for the current folder."
        )
    if "\0" in text:
        raise ConfigError(f"{option}={shown(text)} holds a null character, which no path can. {write}.")
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        if os.path.realpath(path) == os.path.realpath(os.sep):
            raise ConfigError(
                f"{option}={shown(text)} is the whole file system, as it is after {option}=$NAME/ where NAME is "
                f"not set. {write}."
            )
        return Path(path)
    if re.match(r"[a-zA-Z][\w+.-]*://", text):
        raise ConfigError(
            f"{option}={shown(text)} is an address, and gatrain reads files. Download or mount what is there, and "
            f"write {option}=FOLDER."
        )
    if path.startswith("~"):
        user = re.split(r"[/\\]", path)[0]
        known = "its home folder is not known" if user == "~" else "there is no such user"
        raise ConfigError(
            f"{option}={shown(text)} begins with {shown(user)}, but {known}. Write the path in full."
        )
    if found := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise ConfigError(
            f"{option}={shown(text)} holds {shown(found[0])}, which nothing has replaced: quoted with '...' the "
            f"shell leaves it. Quote with \"...\", or write {option}='${{oc.env:{found[1].strip('{}')}}}'."
        )
    if set(_literal_base(path)[0].strip()) <= {os.sep} and glob.has_magic(path):
        raise ConfigError(
            f"{option}={shown(text)} goes through the whole file system, as it does after {option}=$NAME/... where "
            f"NAME is not set. Begin the pattern with a folder."
        )
    return Path(path)


def shown(path: str | os.PathLike[str]) -> str:
    """The path as it may be printed and kept: characters that a terminal or UTF-8 cannot take are escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii")
        for each in os.fsdecode(path)
    )


def by_name(name: str) -> tuple[str, str]:
    """Sorts names in the same way on every machine, however it spells accents."""
    return name if name.isascii() else unicodedata.normalize("NFC", name), name


def find(value: Any, omissions: Omissions, option: str = "data.path") -> list[Path]:
    """The files that a path names: one file, all below a folder (see `walk`), or those that match a pattern.

    A pattern gives those of the folder's files whose names match it: links are followed in the same way, and
    hidden names need a pattern that spells the dot. A name that exists is no pattern.

    Raises:
        ConfigError: see `require_path`.
        DataError: nothing is there, or nothing but what is left out.
    """
    path = require_path(value, option).absolute()
    if os.path.isdir(path):
        found = walk(path, omissions)
        if not found:
            raise DataError(f"{option}={shown(value)} is a folder with no files in it{omissions.told()}.")
        return found
    if _is_there(path):
        check_regular(path, option)
        return [path]
    if glob.has_magic(str(path)):
        base, parts = _literal_base(str(path))
        if os.path.isdir(base):
            found = [Path(name) for name in _Walk(Path(base), omissions, parts).names()]
            if not found:
                raise DataError(
                    f"{option}={shown(value)} matches no file below {shown(base)}{omissions.told()}."
                )
            return found
    raise DataError(f"{option}={shown(value)} does not exist.{similar(path)}")


def walk(root: Path, omissions: Omissions) -> list[Path]:
    """Every regular file below the folder, once, sorted by name.

    Links are followed once: a folder or file that has been reached already, or that lies above the link, is
    counted and not read again; where a link and a real folder name the same, the real one counts. Hidden files
    and folders, those of operating systems, links that point nowhere, and what is neither file nor folder are left
    out and counted. No file is opened.

    Raises:
        DataError: it is no folder, or a folder cannot be read.
    """
    return [Path(name) for name in walk_names(root, omissions)[0]]


def walk_names(root: Path, omissions: Omissions) -> tuple[list[str], dict[Any, str]]:
    """As `walk`, quickly for millions of files: their paths as text, and each path under what the file system knows
    the file by, to compare with another walk."""
    if not os.path.isdir(root):
        raise DataError(f"{shown(root)} is not a folder.")
    found = _Walk(root, omissions, None)
    return found.names(), found.known


def subfolders(root: Path) -> list[Path]:
    """The folders in ``root`` that `walk` would go into, links among them, sorted by name. Nothing is read twice
    here: two names of one folder are two folders."""
    found = []
    for entry in _listing(root):
        if _is_folder(entry) and not _left_out_name(entry.name, True):
            found.append(root / entry.name)
    return found


def check_regular(path: Path, option: str) -> None:
    """Refuse what can be named and not read: a link to nowhere, a pipe, a socket, a device.

    Raises:
        DataError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            raise DataError(f"{option}={_link(path, shown(path))}, is a link that points nowhere.") from None
        raise unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{option}={shown(path)} is a pipe, socket or device. Write what it gives to a file, and name that."
        )


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that the operating system refuses to read."""
    what = "folder" if os.path.isdir(path) else "file"
    return DataError(
        f"cannot read {shown(path)}: {error.strerror or error}. Check the {what} and its permissions."
    )


def written_to(path: Path, kind: str) -> DataError:
    """The error for a file that another program wrote to under a run; ``kind`` as in ``token files``."""
    return DataError(
        f"{shown(path)} was written to while it was in use: what was read of it last may be other data. "
        f"Leave {kind} alone while a run reads them; put new ones {KEEP_OLD[kind]}. "
        "gatrain resume compares what the file holds now with what it held."
    )


KEEP_OLD = {"token files": "beside them or in their place by mv", "images": "into another folder"}
"""Where new files do no harm: a mapped file stays where another takes its name, an image is opened anew."""


# --- the walk -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    path: Path
    through_link: bool
    outside: bool
    state: State
    key: _Key


class _Walk:
    """One walk: real folders first, then links in the order of their names, so that no order of the disk counts."""

    def __init__(self, root: Path, omissions: Omissions, pattern: Sequence[str] | None) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._omissions = omissions
        self._pattern = _Pattern(pattern) if pattern is not None else None
        self._folders: set[tuple[Any, State]] = set()
        self.known: dict[Any, str] = {}
        self._found: list[tuple[_Key, str]] = []
        self._links: deque[tuple[Path, _Folder]] = deque()

    def names(self) -> list[str]:
        start = self._pattern.start if self._pattern is not None else frozenset()
        self._go(_Folder(self._root, False, False, start, ()))
        while self._links:
            self._follow(*self._links.popleft())
        return [path for _, path in sorted(self._found)]

    def _go(self, top: _Folder) -> None:
        """Everything below ``top`` without links, which wait."""
        waiting = [top]
        while waiting:
            folder = waiting.pop(0)
            try:
                reached = (_identity(folder.path, folder.path.stat()), folder.state)
            except OSError as error:
                raise unreadable(folder.path, error) from None
            if reached in self._folders:
                self._omissions.add(FOLDER_TWICE, _link(folder.path, self._name(folder.path)))
                continue
            self._folders.add(reached)
            for entry in _listing(folder.path):
                is_folder = _is_folder(entry)
                states, is_match = self._states(folder.state, entry.name, is_folder)
                if not (states or is_match) or self._leave_out(entry, is_folder, folder.state):
                    continue
                if entry.is_symlink():
                    self._links.append((folder.path / entry.name, folder))
                elif is_folder:
                    waiting.append(self._inside(folder, folder.path / entry.name, states))
                else:
                    key = (*folder.key, by_name(entry.name))
                    self._take(entry, entry.path, key, folder.through_link, folder.outside)

    def _inside(self, folder: _Folder, path: Path, states: State) -> _Folder:
        return _Folder(path, folder.through_link, folder.outside, states, (*folder.key, by_name(path.name)))

    def _follow(self, path: Path, folder: _Folder) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise unreadable(path, error) from None
            self._omissions.add(NOWHERE, _link(path, self._name(path)))
            return
        real = os.path.realpath(path)
        outside = not _is_below(real, self._real_root)
        key = (*folder.key, by_name(path.name))
        if not stat.S_ISDIR(mode):
            self._take(path, str(path), key, True, outside)
            return
        if _is_below(os.path.realpath(path.parent), real) or _is_below(self._real_root, real):
            self._omissions.add(ABOVE, _link(path, self._name(path)))
            return
        states, _ = self._states(folder.state, path.name, True)
        self._go(_Folder(path, True, outside, states, key))

    def _take(
        self, file: os.DirEntry[str] | Path, path: str, key: _Key, through_link: bool, outside: bool
    ) -> None:
        try:
            status = file.stat()
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise unreadable(Path(path), error) from None
            self._omissions.add(VANISHED, self._name(path))
            return
        if not stat.S_ISREG(status.st_mode):
            self._omissions.add(SPECIAL, self._name(path))
            return
        identity = _identity(path, status)
        if (through_link or status.st_nlink > 1) and identity in self.known:
            self._omissions.add(FILE_TWICE, f"{self._name(path)} = {self._name(self.known[identity])}")
            return
        self.known[identity] = path
        if outside:
            self._omissions.add(OUTSIDE, f"{self._name(path)} -> {shown(os.path.realpath(path))}")
        self._found.append((key, path))

    def _states(self, state: State, name: str, is_folder: bool) -> tuple[State, bool]:
        """Where the pattern goes on in a folder of this name, and whether a file of this name matches it."""
        if self._pattern is None:
            return state, True
        states, is_match = self._pattern.step(state, name)
        return (states, False) if is_folder else (frozenset(), is_match)

    def _leave_out(self, entry: os.DirEntry[str], is_folder: bool, state: State) -> bool:
        kind = _left_out_name(entry.name, is_folder)
        if kind is None or (self._pattern is not None and self._pattern.spells(state, entry.name)):
            return False
        self._omissions.add(kind, self._name(entry.path))
        return True

    def _name(self, path: str | Path) -> str:
        return shown(os.path.relpath(path, self._root))


class _Pattern:
    """A glob pattern, part by part. Hidden names are not left out here but by the walk, which counts them."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = list(parts)
        if self._parts[-1] == "**":  # all files below
            self._parts.append("*")
        self._matchers: list[Callable[[str], Any]] = [
            re.compile(translate(part)).match for part in self._parts
        ]
        self.start = self._closed({0})

    def step(self, state: State, name: str) -> tuple[State, bool]:
        last = len(self._parts) - 1
        further: set[int] = set()
        is_match = False
        for place in state:
            if self._parts[place] == "**":
                further.add(place)
            elif self._matchers[place](name):
                is_match = is_match or place == last
                if place < last:
                    further.add(place + 1)
        return self._closed(further), is_match

    def spells(self, state: State, name: str) -> bool:
        """Whether the pattern itself names what is left out otherwise: `.cache/*.txt`, `.*`, `Thumbs.db`."""
        dotted = name.startswith(".")
        return any(
            part == name or (dotted and part.startswith(".") and part != "**" and self._matchers[place](name))
            for place, part in ((place, self._parts[place]) for place in state)
        )

    def _closed(self, places: set[int]) -> State:
        """`**` stands for no folder, too."""
        found = set(places)
        for place in sorted(places):
            while self._parts[place] == "**":
                place += 1
                found.add(place)
        return frozenset(found)


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: by_name(entry.name))
    except OSError as error:
        raise unreadable(folder, error) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _left_out_name(name: str, is_folder: bool) -> str | None:
    """The kind of thing to leave out that bears such a name, or None."""
    if name.startswith("."):
        return HIDDEN_FOLDERS if is_folder else HIDDEN_FILES
    if is_folder:
        return SYSTEM_FOLDERS if name.lower() in _SYSTEM_FOLDERS else None
    return SYSTEM_FILES if name.lower() in _SYSTEM_FILES else None


def _identity(path: str | Path, status: os.stat_result) -> Any:
    """The same for two names of one file; some file systems give no inode numbers."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_there(path: Path) -> bool:
    """Whether something bears this name.

    Raises:
        DataError: the operating system does not tell.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def _link(path: Path, name: str) -> str:
    try:
        return f"{name} -> {shown(os.readlink(path))}"
    except OSError:  # no link
        return name


def _literal_base(path: str) -> tuple[str, list[str]]:
    """A pattern cut into the folder before its first wildcard and the parts from there. Brackets in the name of a
    folder that exists are no wildcard."""
    parts = Path(path).parts
    base = Path(parts[0]) if Path(path).is_absolute() else Path()
    for place, part in enumerate(parts):
        if glob.has_magic(part) and not (base / part).is_dir():
            return str(base), list(parts[place:])
        base = base / part
    return str(base), []


def similar(path: Path) -> str:
    """A file or folder of nearly that name."""
    folder = path.parent
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return f" There is no folder {shown(folder)} either." if not folder.exists() else ""
    return nearest(path.name, [shown(name) for name in names])
