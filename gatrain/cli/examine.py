"""What `gatrain doctor` finds out: hardware, versions, what would be chosen and why, and what looks wrong."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gatrain import codec, units
from gatrain.assets import cache_place, safe_cache
from gatrain.config import RunConfig
from gatrain.errors import GatrainError
from gatrain.fit.job import find_job
from gatrain.hardware import Hardware, choose_precision, detect_hardware
from gatrain.recorded import versions
from gatrain.report.run_view import row_lines

LOW_DISK_BYTES = 5 * units.GIB
LOW_SHARED_MEMORY_BYTES = 2**28


@dataclass(frozen=True)
class Report:
    """All findings, ready for JSON."""

    versions: dict[str, str | None]
    hardware: dict[str, Any]
    describe: str
    device: str
    device_reason: str
    precision: str
    precision_reason: str
    nproc: int
    free_memory_bytes: int
    """Main memory, or the GPU memory of the GPU that has least."""
    cache: str
    cache_bytes: int
    disk_free_bytes: int
    job: str | None
    """The scheduler's name, and the id of the job that this process runs in."""
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, columns: int = 80) -> list[str]:
        """The report as text for people."""
        rows = [(name, version or "not installed") for name, version in self.versions.items()]
        rows.append(("driver", self.hardware["driver"] or "none"))
        plural = "process" if self.nproc == 1 else "processes"
        rows += [
            ("hardware", self.describe),
            ("device", f"{self.device} ({self.device_reason})"),
            ("precision", f"{self.precision} ({self.precision_reason})"),
            ("processes", f"{self.nproc} {plural} with gatrain fit"),
            ("free memory", units.size(self.free_memory_bytes)),
            ("cache", f"{self.cache} ({units.size(self.cache_bytes)})"),
            (
                "sockets",
                "a run's take no password, PyTorch's have none: every user of this machine is trusted",
            ),
            ("free disk", f"{units.size(self.disk_free_bytes)} in the current folder"),
        ]
        for gpu in self.hardware["gpus"]:
            free, total = units.size(gpu["free_bytes"]), units.size(gpu["total_bytes"])
            rows.append((f"gpu {gpu['index']}", f"{gpu['name']}, {free} free of {total}"))
        if self.job:
            rows.append(("job", self.job))
        lines = [*row_lines(rows, columns), ""]
        for problem in self.problems:
            lines += textwrap.wrap(
                f"problem: {problem}", columns, break_long_words=False, break_on_hyphens=False
            )
        return lines if self.problems else [*lines, "No problem found."]


def examine(overrides: Sequence[str] = ()) -> Report:
    """Look around. With a recipe among the overrides, its own settings are taken into account.

    Raises:
        ConfigError: the overrides are not right. Everything else becomes a problem in the report.
    """
    config = RunConfig()
    if overrides:
        from gatrain.compose import compose

        config = compose(overrides).config
    problems: list[str] = []
    try:
        hardware = detect_hardware(config.device)
    except GatrainError as error:
        problems.append(str(error))
        hardware = detect_hardware("cpu")
    job = None
    try:
        job = find_job(config, Path.cwd().resolve())
    except GatrainError as error:
        problems.append(str(error))
    precision, precision_reason = choose_precision(config, hardware)
    free = min((gpu.free_bytes for gpu in hardware.gpus), default=hardware.memory_bytes)
    found = versions() | {"cuda": hardware.cuda, "nccl": _nccl()}
    disk = shutil.disk_usage(Path.cwd()).free
    return Report(
        versions=found,
        hardware=codec.encode(hardware),
        describe=hardware.describe(),
        device=hardware.device,
        device_reason=hardware.reason,
        precision=precision,
        precision_reason=precision_reason,
        nproc=max(1, len(hardware.gpus)),
        free_memory_bytes=free,
        cache=str(cache_place()),
        cache_bytes=_size(cache_place()),
        disk_free_bytes=disk,
        job=f"{job.scheduler} {job.id}" if job is not None else None,
        problems=problems + _problems(hardware, found, disk),
    )


def _problems(hardware: Hardware, found: dict[str, str | None], disk: int) -> list[str]:
    problems = []
    torch = re.match(r"(\d+)\.(\d+)", found.get("torch") or "")
    if torch is None:
        problems.append("torch is not installed. Install it: pip install torch.")
    elif (int(torch[1]), int(torch[2])) < (2, 10):
        problems.append(
            f"torch {found['torch']} is older than 2.10, which gatrain needs: pip install -U torch."
        )
    if hardware.device == "cpu" and Path("/proc/driver/nvidia/version").exists():
        problems.append(f"this machine has an NVIDIA driver, but no GPU is used: {hardware.reason}.")
    busy = [gpu for gpu in hardware.gpus if gpu.free_bytes < 0.9 * gpu.total_bytes]
    for gpu in busy:
        used = units.size(gpu.total_bytes - gpu.free_bytes)
        problems.append(f"GPU {gpu.index} ({gpu.name}) already has {used} in use by other processes.")
    if len({gpu.name for gpu in hardware.gpus}) > 1:
        problems.append("the GPUs are unlike; every one of them waits for the slowest.")
    if len(hardware.gpus) > 1 and Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
        if shared < LOW_SHARED_MEMORY_BYTES:
            problems.append(
                f"/dev/shm has only {units.size(shared)}, and NCCL wants more. In Docker: --shm-size=1g."
            )
    if disk < LOW_DISK_BYTES:
        problems.append(f"only {units.size(disk)} of disk are free here; saved states may not fit.")
    folder = cache_place()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        problems.append(f"the cache folder {folder} cannot be written. Set GATRAIN_CACHE to one that can.")
    try:
        safe_cache(folder)
    except GatrainError as error:
        problems.append(str(error))
    if sys.platform == "win32":
        problems.append("gatrain trains on Linux and macOS; on Windows use WSL.")
    return problems


def _nccl() -> str | None:
    """Version of the NCCL that came with torch, read without importing it."""
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total
