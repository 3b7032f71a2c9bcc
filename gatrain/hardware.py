"""What this machine has: GPUs, cores, memory, versions; and what is chosen by it, the device and the precision.

Never makes a CUDA context and never imports torch, but for `rank_device`, which a rank calls for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatrain import schema
from gatrain.config import DEVICES, RunConfig
from gatrain.errors import ConfigError, LaunchError, nearest
from gatrain.main_memory import available_memory, cgroup_folders, total_memory
from gatrain.nvml import Gpu, visible_gpus
from gatrain.units import GIB

if TYPE_CHECKING:
    import torch

BF16_CAPABILITY = (8, 0)
"""Lowest compute capability that multiplies bf16 natively (Ampere); older GPUs emulate it, slowly."""


@dataclass(frozen=True)
class Hardware:
    """A snapshot of this machine, ready for JSON. ``gpus`` is empty where ``device`` is ``cpu``."""

    device: str
    reason: str
    """Why this device, for people."""
    gpus: list[Gpu] = field(default_factory=list)
    driver: str | None = None
    cuda: str | None = None
    """CUDA version that torch was built for; None for a build without CUDA."""
    cpu_cores: int = 1
    """Cores that this process may use: affinity and cgroup quota, whichever is smaller."""
    memory_bytes: int = 0
    """Main memory that can be taken now: MemAvailable or what the cgroup leaves, whichever is smaller."""
    total_memory_bytes: int = 0
    """Main memory installed, or the cgroup's limit."""
    torch: str = "unknown"
    hostname: str = ""

    def check(self) -> None:
        """
        Raises:
            ValueError: a range that no machine has.
        """
        schema.one_of(DEVICES[1:], device=self.device)
        schema.at_least(0, memory_bytes=self.memory_bytes, total_memory_bytes=self.total_memory_bytes)
        schema.at_least(1, cpu_cores=self.cpu_cores)
        for gpu in self.gpus:
            schema.at_least(0, total_bytes=gpu.total_bytes, free_bytes=gpu.free_bytes, index=gpu.index)

    def fingerprint(self) -> dict[str, Any]:
        """What a measurement depends on. Names of hosts and free memory are left out on purpose.

        Main memory counts only on a CPU, and only what is installed.
        """
        return {
            "device": self.device,
            "gpus": [[gpu.name, gpu.total_bytes] for gpu in self.gpus],
            "driver": self.driver,
            "cuda": self.cuda,
            "torch": self.torch,
            "cpu_cores": self.cpu_cores,
            "memory": round(self.total_memory_bytes / GIB) if self.device == "cpu" else None,
        }

    def describe(self) -> str:
        """One line for people, such as ``2 x NVIDIA H100 80GB HBM3`` or ``CPU (2 cores)``."""
        if not self.gpus:
            return f"CPU ({self.cpu_cores} core{'s' * (self.cpu_cores != 1)})"
        counts: dict[str, int] = {}
        for gpu in self.gpus:
            counts[gpu.name] = counts.get(gpu.name, 0) + 1
        return " + ".join(f"{count} x {name}" for name, count in counts.items())


def detect_hardware(device: str = "auto") -> Hardware:
    """Look at this machine without touching a GPU.

    Args:
        device: ``auto`` takes the GPUs if torch and the driver can use any; ``cpu`` and ``cuda`` insist.

    Raises:
        ConfigError: ``device`` is not one of auto, cpu, cuda.
        LaunchError: ``device`` is ``cuda`` and there is no usable GPU; the message says why.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"device={device} is not one of {', '.join(DEVICES)}.{nearest(str(device), DEVICES)}"
        )
    torch_version, cuda = torch_versions()
    gpus: list[Gpu] = []
    driver: str | None = None
    if device == "cpu":
        reason = "device=cpu was asked for"
    elif cuda is None:
        reason = f"torch {torch_version} was built without CUDA"
    else:
        gpus, driver, reason = visible_gpus(os.environ)
    if device == "cuda" and not gpus:
        raise LaunchError(
            f"device=cuda was asked for, but {reason}. Use device=cpu or device=auto, "
            "or make a GPU visible (nvidia-smi lists them)."
        )
    return Hardware(
        device="cuda" if gpus else "cpu",
        reason=reason,
        gpus=gpus,
        driver=driver,
        cuda=cuda,
        cpu_cores=cpu_cores(),
        memory_bytes=available_memory(),
        total_memory_bytes=total_memory(),
        torch=torch_version,
        hostname=socket.gethostname(),
    )


def weakest(own: Hardware, others: Sequence[Hardware]) -> Hardware:
    """This node's hardware as far as every other node can follow: the least memory, GPU by GPU, and all names.

    Raises:
        LaunchError: one node computes on GPUs and another on the CPU.
    """
    for node_rank, other in enumerate(others, start=1):
        if other.device != own.device:
            raise LaunchError(
                f"node 0 computes on {own.describe()} ({own.device}), but node {node_rank} on {other.describe()} "
                f"({other.device}: {other.reason}). Use device={own.device} and the same kind of node everywhere."
            )
    gpus = []
    for gpu in own.gpus:
        alike = [gpu, *(g for other in others for g in other.gpus if g.index == gpu.index)]
        gpus.append(
            dataclasses.replace(
                gpu,
                name=" / ".join(dict.fromkeys(g.name for g in alike)),
                total_bytes=min(g.total_bytes for g in alike),
                free_bytes=min(g.free_bytes for g in alike),
                capability=min(g.capability for g in alike),
            )
        )
    return dataclasses.replace(
        own,
        gpus=gpus,
        memory_bytes=min(h.memory_bytes for h in (own, *others)),
        total_memory_bytes=min(h.total_memory_bytes for h in (own, *others)),
    )


def choose_precision(config: RunConfig, hardware: Hardware) -> tuple[str, str]:
    """Resolve ``precision=auto``; return the precision and why.

    bf16 needs no loss scaling and keeps fp32's range, so it is the choice wherever every GPU computes it
    natively.
    """
    if config.precision != "auto":
        return config.precision, f"precision={config.precision} was asked for"
    if not hardware.gpus:
        return "fp32", "a CPU computes fp32 best"
    weakest = min(hardware.gpus, key=lambda gpu: gpu.capability)
    version = f"compute capability {weakest.capability[0]}.{weakest.capability[1]}"
    precision = native_precision(weakest.capability)
    if precision == "bf16":
        return precision, f"every GPU computes bf16 natively ({weakest.name}: {version})"
    return precision, f"{weakest.name} ({version}) does not compute bf16 natively"


def native_precision(capability: tuple[int, int]) -> str:
    """What ``precision=auto`` means on a GPU of this compute capability."""
    return "bf16" if capability >= BF16_CAPABILITY else "fp32"


def rank_device(wanted: str | None, local_rank: int, local_world_size: int) -> torch.device:
    """The device of one rank, made the current one where it is a GPU. Imports torch.

    Args:
        wanted: ``cpu`` or ``cuda``, as the launcher found; None takes GPUs where PyTorch sees any.
        local_rank: number of the rank on its node, and of its GPU.
        local_world_size: ranks on this node.

    Raises:
        LaunchError: there is no such device, or there are fewer GPUs than ranks.
    """
    import torch

    wanted = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if wanted != "cuda" or not visible:
        raise LaunchError(
            f"device {wanted!r} is not available here: PyTorch {torch.__version__} sees {visible} GPU(s). "
            "Use device=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    if local_rank >= visible:
        raise LaunchError(
            f"{local_world_size} processes need {local_world_size} GPUs, and {visible} are "
            f"visible. Use --nproc {visible} or less, or device=cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def torch_versions() -> tuple[str, str | None]:
    """Versions of the installed torch and of the CUDA that it was built for, read from files.

    Importing torch to ask it takes 1.5 s; the CUDA version stands in ``torch/version.py``.
    """
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed", None
    spec = importlib.util.find_spec("torch")
    cuda = None
    if spec is not None and spec.origin is not None:
        with contextlib.suppress(OSError):
            text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
            match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
            cuda = match.group(1) if match else None
    return version, cuda


def cpu_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, cut by the cgroup's quota (v2 or v1); at least 1."""
    try:
        cores: float = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        cores = os.cpu_count() or 1
    for folder in cgroup_folders(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                cores = min(cores, int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                cores = min(cores, quota_us / int((folder / "cpu.cfs_period_us").read_text()))
    return max(1, math.ceil(cores))
