"""Common GPUs: memory, peaks and bandwidth, for predictions where there is none.

Peaks are dense (without sparsity), with fp32 accumulation, at boost clock, as in the vendor's datasheet that
``source`` names. Memory is what a CUDA program sees (total capacity with ECC where the card has it on by
default), to the hundredth of a GiB as PyTorch's messages print it; it differs by a percent between drivers, and
the lower figure is taken.

Peaks and bandwidths of the T4, V100, A10, A40, A100, H100, H200, L40S, RTX 4090 and B200 were compared with public
specification tables; the other rows, and all memory totals, still wait for a look at the card itself.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from gatrain.errors import ConfigError
from gatrain.hardware import BF16_CAPABILITY, native_precision
from gatrain.units import GIB

PCIE_BUS = (4e9, 22e9)
NVLINK_A100, NVLINK_H100, NVLINK_B200 = (120e9, 235e9), (230e9, 450e9), (350e9, 840e9)
NVLINK_V100 = (60e9, 135e9)
"""All-reduce bus bandwidth in bytes/s within a node, (low, high): assumptions, low for small messages or busy
links, high at most what nccl-tests reaches on large ones."""


@dataclass(frozen=True)
class GpuModel:
    """One kind of GPU. Rates are per second, of one GPU."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    bf16_flops: float | None
    """Dense bf16 tensor peak; None where bf16 is not native."""
    fp16_flops: float
    fp32_flops: float
    """Outside tensor cores: gatrain's ``fp32`` never uses TF32."""
    bandwidth_bytes_s: float
    bus_bytes_s: tuple[float, float]
    """All-reduce bus bandwidth to the neighbours in a node, (low, high); an assumption."""
    source: str

    def flops(self, precision: str) -> float:
        """Peak of matrix products in ``precision``; emulated bf16 runs at about the fp32 rate."""
        if precision == "bf16":
            return self.bf16_flops or self.fp32_flops
        return self.fp16_flops if precision == "fp16" else self.fp32_flops

    @property
    def precision(self) -> str:
        """What ``precision=auto`` means on this GPU."""
        return native_precision(self.capability)


def _gpu(
    name: str,
    gib: float,
    capability: tuple[int, int],
    tensor: float,
    fp32: float,
    gb_s: float,
    bus: tuple[float, float],
    source: str,
) -> GpuModel:
    """``tensor`` and ``fp32`` in TFLOP/s."""
    bf16 = tensor * 1e12 if capability >= BF16_CAPABILITY else None
    memory = int(gib * GIB)
    return GpuModel(name, memory, capability, bf16, tensor * 1e12, fp32 * 1e12, gb_s * 1e9, bus, source)


GPUS: tuple[GpuModel, ...] = (
    _gpu("T4", 14.56, (7, 5), 65, 8.1, 320, PCIE_BUS, "NVIDIA T4 datasheet"),
    _gpu("V100 16GB", 15.77, (7, 0), 125, 15.7, 900, NVLINK_V100, "NVIDIA V100 datasheet (SXM2)"),
    _gpu("V100 32GB", 31.73, (7, 0), 125, 15.7, 900, NVLINK_V100, "NVIDIA V100 datasheet (SXM2)"),
    _gpu("A10", 22.06, (8, 6), 125, 31.2, 600, PCIE_BUS, "NVIDIA A10 datasheet"),
    _gpu("A10G", 22.06, (8, 6), 70, 35, 600, PCIE_BUS, "NVIDIA A10G datasheet"),
    _gpu("L4", 21.95, (8, 9), 121, 30.3, 300, PCIE_BUS, "NVIDIA L4 datasheet"),
    _gpu("RTX 3090", 23.67, (8, 6), 71, 35.6, 936, PCIE_BUS, "NVIDIA GA102 whitepaper"),
    _gpu("RTX 4090", 23.63, (8, 9), 165.2, 82.6, 1008, PCIE_BUS, "NVIDIA Ada whitepaper"),
    _gpu("RTX 5090", 31.36, (12, 0), 209.5, 104.8, 1792, PCIE_BUS, "NVIDIA RTX Blackwell whitepaper"),
    _gpu("A40", 44.34, (8, 6), 149.7, 37.4, 696, PCIE_BUS, "NVIDIA A40 datasheet"),
    _gpu("L40S", 44.39, (8, 9), 362, 91.6, 864, PCIE_BUS, "NVIDIA L40S datasheet"),
    _gpu("A6000", 47.53, (8, 6), 154.8, 38.7, 768, PCIE_BUS, "NVIDIA RTX A6000 datasheet"),
    _gpu("RTX 6000 Ada", 47.37, (8, 9), 364.2, 91.1, 960, PCIE_BUS, "NVIDIA RTX 6000 Ada datasheet"),
    _gpu("A100 PCIe 40GB", 39.38, (8, 0), 312, 19.5, 1555, PCIE_BUS, "NVIDIA A100 datasheet"),
    _gpu("A100 SXM 40GB", 39.38, (8, 0), 312, 19.5, 1555, NVLINK_A100, "NVIDIA A100 datasheet"),
    _gpu("A100 PCIe 80GB", 79.15, (8, 0), 312, 19.5, 1935, PCIE_BUS, "NVIDIA A100 80GB datasheet"),
    _gpu("A100 SXM 80GB", 79.15, (8, 0), 312, 19.5, 2039, NVLINK_A100, "NVIDIA A100 80GB datasheet"),
    _gpu("H100 PCIe 80GB", 79.10, (9, 0), 756, 51.2, 2000, PCIE_BUS, "NVIDIA H100 datasheet"),
    _gpu("H100 SXM 80GB", 79.10, (9, 0), 989.4, 66.9, 3350, NVLINK_H100, "NVIDIA H100 datasheet"),
    _gpu("H200", 139.72, (9, 0), 989.4, 66.9, 4800, NVLINK_H100, "NVIDIA H200 datasheet"),
    _gpu("B200", 178.35, (10, 0), 2250, 75, 7700, NVLINK_B200, "NVIDIA HGX B200 datasheet"),
)

_NOISE = {"nvidia", "tesla", "geforce", "quadro", "gpu", "hbm2", "hbm2e", "hbm3", "hbm3e", "generation", "gb"}
_SAME = {"sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "pcie4": "pcie", "nvl": "pcie"}


def find_gpu(name: str) -> GpuModel:
    """The GPU that a name means: ``h100``, ``H100 80GB``, ``NVIDIA A100-SXM4-80GB``.

    Where a short name fits several, it is the SXM one, and then the one with most memory.

    Raises:
        ConfigError: no such GPU in the table; names the nearest and lists all.
    """
    wanted = _words(name)
    matches = _fitting(wanted) or _fitting(wanted - {"sxm", "pcie"})
    if not matches:  # "T4 16GB" says the memory of a card that comes with one size only
        size = next((int(word[:-2]) for word in wanted if _SIZE.fullmatch(word)), 0)
        alone = _fitting({word for word in wanted if not _SIZE.fullmatch(word)} - {"sxm", "pcie"})
        matches = [gpu for gpu in alone if abs(size - gpu.memory_bytes / GIB) < 0.15 * size]
    if not matches:
        names = {gpu.name.lower(): gpu.name for gpu in GPUS}
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
        hint = f" Did you mean '{names[close[0]]}'?" if close else ""
        raise ConfigError(
            f"--gpu '{name}' is not in the table of GPUs.{hint} "
            f"It has: {', '.join(gpu.name for gpu in GPUS)}."
        )
    return max(matches, key=lambda gpu: ("SXM" in gpu.name, gpu.memory_bytes))


_SIZE = re.compile(r"\d+gb")


def _fitting(wanted: set[str]) -> list[GpuModel]:
    exact = [gpu for gpu in GPUS if _words(gpu.name) == wanted]
    return exact or [gpu for gpu in GPUS if wanted and wanted <= _words(gpu.name)]


def _words(name: str) -> set[str]:
    """The words that tell GPUs apart: model, memory, form factor."""
    text = re.sub(r"\brtx[\s-]*", " ", name.lower())
    text = re.sub(r"\b(\d{2,3})\s*(gib|gb|g)?\b", r"\1gb ", text)
    text = re.sub(r"\b([ahltvb])[\s-]+(\d+)(?!\d*gb)", r"\1\2", text)
    words = (_SAME.get(word, word) for word in re.split(r"[^a-z0-9]+", text))
    return {word for word in words if word and word not in _NOISE}
