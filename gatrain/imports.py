"""Modules of the user's working folder are found by the user's own code and by ``_target_``, and by nobody else.

Python puts the folder of a program first on the import path, so that a file called ``random.py`` or
``tokenizers.py`` there takes the place of the real one in every library. Here the folder comes last, and imports
that the user's own files make, or that a ``_target_`` names, look there first.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType

SAFE_PATH = "-P"
"""Python's option that leaves the working folder out of the import path."""
_RESOLVER = "gatrain.targets"
"""The module of gatrain that imports what a ``_target_`` names."""


def use_working_folder(folder: Path | None = None) -> None:
    """Let the modules of a folder, by default of the current one, be found in a process that has `SAFE_PATH`."""
    here = os.path.realpath(folder or os.getcwd())
    put_last(here)
    if not any(isinstance(finder, _Own) and finder.folder == here for finder in sys.meta_path):
        sys.meta_path.insert(0, _Own(here))


def put_last(folder: str) -> None:
    """Move a folder to the end of the import path, in whatever spelling it is there."""
    others = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != folder]
    sys.path[:] = [*others, folder]


def hiding(owner: object) -> str:
    """For a message about a module of the working folder: which installed one its name hides; else nothing."""
    if not isinstance(owner, ModuleType) or "." in owner.__name__ or not getattr(owner, "__file__", None):
        return ""
    here = os.path.realpath(os.getcwd())
    if not os.path.realpath(str(owner.__file__)).startswith(os.path.join(here, "")):
        return ""
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry or here) != here]
    other = importlib.machinery.PathFinder.find_spec(owner.__name__, elsewhere)
    if other is None or other.loader is None:
        return ""
    return f" ({owner.__file__}, which hides the installed {owner.__name__}: rename it if that is meant)"


class _Own:
    """Finds the modules of one folder for the code that lies in it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None or "." in name or not self._is_asked_by_the_user():
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [self.folder])
        return spec if spec is not None and spec.loader is not None else None  # no mere folder

    def _is_asked_by_the_user(self) -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and _is_machinery(frame):
            frame = frame.f_back
        if frame is None:
            return False
        asker = frame.f_globals.get("__name__", "")
        if asker == _RESOLVER:
            return True
        file = frame.f_globals.get("__file__") or frame.f_code.co_filename
        return os.path.realpath(file).startswith(os.path.join(self.folder, "")) and not is_installed(file)


def _is_machinery(frame: FrameType) -> bool:
    """Whether it is Python's own code of importing, and not who asked for it."""
    name, file = frame.f_globals.get("__name__") or "", frame.f_code.co_filename
    return name.partition(".")[0] == "importlib" or file.startswith("<frozen importlib")


def is_installed(file: str | Path) -> bool:
    """Whether it is of an installed package, or one of Python's own libraries: those do not change under the user's
    hands. A virtual environment may lie in the working folder."""
    return any(part in ("site-packages", "dist-packages", "lib-dynload") for part in Path(file).parts)
