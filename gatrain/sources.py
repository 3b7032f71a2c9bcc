"""The files behind a configuration, found without importing what it names. Standard library only.

The source text of its ``_target_``s, the files and folders that its values name, and, in a process that has
imported the user's code, the files of their own modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gatrain.imports import is_installed

MAX_SOURCE_FILES = 200


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
            return hash_files(sorted(_deepest_file(origin, names[1:]).parent.rglob("*.py")))
        if not is_installed(origin):
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
    if is_installed(origin):
        return [origin]
    return [origin, *sorted(path for path in origin.parent.glob("*.py") if path != origin)[:MAX_SOURCE_FILES]]


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


def file_states(paths: Iterable[str]) -> dict[str, list[int]]:
    """Size and mtime (ns) of each file or folder; -1 where there is none."""
    states = {}
    for path in paths:
        try:
            found = os.stat(path)
            states[path] = [found.st_size, found.st_mtime_ns]
        except (OSError, ValueError):
            states[path] = [-1, -1]
    return states


def named_files(node: Any, cwd: Path) -> list[str]:
    """Every file or folder that a value in nested configuration nodes names."""
    found = set()
    for text in filter(None, _texts(node)):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long, a null byte, no such user
            if (path := cwd / Path(text).expanduser()).exists():
                found.add(str(path))
    return sorted(found)


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if key not in ("_target_", "cache_dir"):  # prepared copies are made while the data is read
                yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)


_PACKAGE = str(Path(__file__).resolve().parent)
_PYTHON = (sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))
_NOT_OWN = tuple(os.path.join(folder, "") for folder in (_PACKAGE, *_PYTHON))


def own_modules() -> list[str]:
    """The files of the modules that this process has imported and that are no installed package's, nor Python's."""
    found = set()
    for name, module in list(sys.modules.items()):
        try:
            path = vars(module).get("__file__")
        except TypeError:  # something else that was put there
            continue
        if not isinstance(path, str) or name in ("sitecustomize", "usercustomize"):
            continue
        path = os.path.abspath(path)
        if not path.startswith(_NOT_OWN) and not is_installed(path):
            found.add(path)
    return sorted(found)
