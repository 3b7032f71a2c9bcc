"""The GPUs that CUDA will show, found through NVML, which answers without a context: a parent that opened one would
hold some 500 MB of every GPU that its workers want. `CUDA_VISIBLE_DEVICES` is read as the CUDA driver reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One visible GPU. ``index`` is its CUDA number, so ``cuda:<index>``; memory is in bytes."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str
    capability: tuple[int, int]


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


def visible_gpus(environ: Mapping[str, str]) -> tuple[list[Gpu], str | None, str]:
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
