"""What this machine has: GPUs, cores, memory, versions. Never makes a CUDA context, never imports torch.

GPUs come from NVML, which answers without a context: a parent that opened one would hold some 500 MB of every
GPU that its workers want. `CUDA_VISIBLE_DEVICES` is read as the CUDA driver reads it.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain import schema
from gatrain.config import DEVICES, RunConfig
from gatrain.errors import ConfigError, LaunchError, nearest
from gatrain.main_memory import available_memory as available_memory
from gatrain.main_memory import cgroup_folders, total_memory

BF16_CAPABILITY = (8, 0)
"""Lowest compute capability that multiplies bf16 natively (Ampere); older GPUs emulate it, slowly."""


@dataclass(frozen=True)
class Gpu:
    """One visible GPU. ``index`` is its CUDA number, so ``cuda:<index>``; memory is in bytes."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str
    capability: tuple[int, int]


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """Inverse of `to_dict`; unknown keys (of a newer version) are ignored.

        Raises:
            ValueError: a type or a range that no machine has.
        """
        found = schema.parse(cls, data)
        schema.one_of(DEVICES[1:], device=found.device)
        counts = {"memory_bytes": found.memory_bytes, "total_memory_bytes": found.total_memory_bytes}
        schema.at_least(0, **counts)
        schema.at_least(1, cpu_cores=found.cpu_cores)
        for gpu in found.gpus:
            schema.at_least(0, total_bytes=gpu.total_bytes, free_bytes=gpu.free_bytes, index=gpu.index)
        return found

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
            "memory": round(self.total_memory_bytes / 2**30) if self.device == "cpu" else None,
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
        gpus, driver, reason = _visible_gpus(os.environ)
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
    if weakest.capability >= BF16_CAPABILITY:
        return "bf16", f"every GPU computes bf16 natively ({weakest.name}: {version})"
    return "fp32", f"{weakest.name} ({version}) does not compute bf16 natively"


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


def visible_entries(value: str | None) -> list[str] | None:
    """Read ``CUDA_VISIBLE_DEVICES``: the entries that count, or None where it is not set.

    As the driver does: the list ends at the first entry that is not valid (``-1`` is the usual one), all
    entries are of the kind of the first (numbers, ``GPU-`` or ``MIG-`` identifiers), and a device named
    twice hides all.
    """
    if value is None:
        return None
    entries: list[str] = []
    for raw in value.split(","):
        entry = raw.strip()
        if entries and not entries[0].isdigit():
            valid = entry.startswith(entries[0][:4])
        elif entries:
            valid = entry.isdigit()
        else:
            valid = entry.isdigit() or entry.startswith(("GPU-", "MIG-"))
        if not valid:
            break
        if entry in entries:
            return []
        entries.append(entry)
    return entries


def _visible_gpus(environ: Mapping[str, str]) -> tuple[list[Gpu], str | None, str]:
    """Return the GPUs that CUDA will show, the driver's version, and a sentence about them."""
    try:
        import pynvml
    except ImportError:
        return [], None, "the package nvidia-ml-py is not installed, so GPUs cannot be counted"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], None, f"no NVIDIA driver answers ({error})"
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        present = pynvml.nvmlDeviceGetCount()
        handles = _handles(pynvml, visible_entries(environ.get("CUDA_VISIBLE_DEVICES")), present)
        gpus = [_gpu(pynvml, index, handle) for index, handle in enumerate(handles)]
    except pynvml.NVMLError as error:
        return [], None, f"the NVIDIA driver reports an error ({error})"
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    if not present:
        return [], driver, "the NVIDIA driver shows no GPU"
    if not gpus:
        shown = environ.get("CUDA_VISIBLE_DEVICES", "")
        return [], driver, f"CUDA_VISIBLE_DEVICES='{shown}' hides all {present} GPU(s)"
    return gpus, driver, f"{len(gpus)} of {present} GPU(s) visible"


def _handles(nvml: Any, entries: list[str] | None, present: int) -> list[Any]:
    """NVML handles in the order of CUDA's numbers.

    NVML counts in PCI order, CUDA puts the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID: on a machine
    with unlike GPUs the numbers may differ, and `gatrain` then plans for the weakest, which is the same set.
    """
    everyone = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(present)]
    if entries is None:
        return [_mig_or_whole(nvml, handle) for handle in everyone]
    handles: list[Any] = []
    for entry in entries:
        if entry.isdigit():
            if int(entry) >= present:
                break
            handles.append(_mig_or_whole(nvml, everyone[int(entry)]))
        elif entry.startswith("MIG-"):
            handles.append(nvml.nvmlDeviceGetHandleByUUID(entry))
        else:  # an identifier may be shortened as long as it is unique
            matches = [h for h in everyone if _text(nvml.nvmlDeviceGetUUID(h)).startswith(entry)]
            if len(matches) != 1:
                break
            handles.append(_mig_or_whole(nvml, matches[0]))
    return handles


def _mig_or_whole(nvml: Any, handle: Any) -> Any:
    """A GPU in MIG mode shows CUDA its first instance only, never the whole."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
        if current:
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)
    except nvml.NVMLError:
        pass  # a GPU without MIG says so by an error
    return handle


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:  # a MIG instance may not answer for itself
        parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        capability = nvml.nvmlDeviceGetCudaComputeCapability(parent)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        capability=(int(capability[0]), int(capability[1])),
    )


def _text(value: str | bytes) -> str:
    """Older nvidia-ml-py returns bytes."""
    return value.decode() if isinstance(value, bytes) else value


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
