"""Real text that every machine has: the source code of Python's own standard library, about 11 MB."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from gatrain.errors import DataError

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "__pycache__"}
)


def stdlib_files() -> list[Path]:
    """All ``.py`` files of the standard library but tests and installed packages, in a fixed order.

    The order is that of a hash of the names: neighbours in the alphabet are alike, and the last part of the
    list serves as a held-out split.

    Raises:
        DataError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - SKIPPED_FOLDERS  # installed packages have tens of thousands of files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(
            f"no Python sources under {root}, which is the text used when data.path is not given. "
            "Name your own text: data.path=/path/to/file.txt."
        )
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def stdlib_fingerprint(files: list[Path]) -> str:
    """A hash of the files' contents: equal on two machines exactly if the text is equal."""
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()
