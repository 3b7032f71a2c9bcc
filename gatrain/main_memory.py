"""Main memory of this machine and what may be taken of it, by the kernel's books and the cgroup's limits."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from gatrain.units import GIB

SHARED_MEMORY = Path("/dev/shm")


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int | None:
    """Bytes free in the file system through which processes pass tensors; None where there is none."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can be taken now without swapping or being killed.

    The smaller of MemAvailable and what each enclosing cgroup (v2 or v1) leaves; page cache counts as free.
    """
    available = _meminfo(root, "MemAvailable")
    for folder in cgroup_folders(root, "memory"):
        for limit_name, used_name, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit here
                left = int((folder / limit_name).read_text()) - int((folder / used_name).read_text())
                available = min(available, left + _memory_stat(folder, cache_key))
    return max(0, available)


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that are installed, or that the tightest enclosing cgroup allows."""
    total = _meminfo(root, "MemTotal")
    for folder in cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                total = min(total, int((folder / name).read_text()))
    return total


def _meminfo(root: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{key}:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no /proc: half of what is installed
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 * GIB


def _memory_stat(folder: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{key} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        if match:
            return int(match.group(1))
    return 0


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup and all that enclose it, version 2 (unified) and version 1."""
    folders: list[Path] = []
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    base = root / "sys/fs/cgroup"
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3 or (parts[1] and controller not in parts[1].split(",")):
            continue
        mount = base / controller if parts[1] else base
        inner = Path(parts[2].lstrip("/"))
        folders += [mount / inner, *(mount / parent for parent in inner.parents)]
    folders += [base, base / controller]  # inside a container the own cgroup is mounted at the root
    return list(dict.fromkeys(folders))
