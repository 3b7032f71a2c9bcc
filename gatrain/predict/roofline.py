"""How long a step may take: a range between two efficiencies of the GPU's roofline. A prediction, not a promise.

Every matrix product, convolution and attention takes the longer of its arithmetic and its memory traffic; all other
operations take their traffic. The two ends of the range differ in how close real kernels come to the peaks.

The factors are ASSUMPTIONS, chosen wide: large bf16 matrix products reach 60 to 80 % of the datasheet's peak and
small or odd-shaped ones 30 to 50 %; streaming kernels reach 80 to 92 % of the bandwidth. Two of the pessimistic
ones were widened for what ``tests/benchmarks/results/tuner_sweep_2026-11-26.json`` shows (an H100): compiled
ResNet-50 at 512 images comes down to 45 % of the bandwidth, and small eager micro-batches of it and of ViT-B/16 to
50 microseconds of the host for each kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gatrain.predict.gpus import GpuModel
from gatrain.predict.timeline import Work


@dataclass(frozen=True)
class Efficiency:
    """How close to the peaks; seconds a kernel costs the host."""

    arithmetic: float
    bandwidth: float
    launch_s: float


PESSIMISTIC = Efficiency(arithmetic=0.35, bandwidth=0.45, launch_s=50e-6)
OPTIMISTIC = Efficiency(arithmetic=0.8, bandwidth=0.92, launch_s=3e-6)
FUSED_SHARE = 0.4
"""What fusion leaves of the traffic of uncompiled operations, at best."""


@dataclass(frozen=True)
class Range:
    """Seconds (or a rate), from the optimistic to the pessimistic end."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        """Both ends times ``factor``."""
        return Range(self.low * factor, self.high * factor)

    def rate(self, count: float) -> Range:
        """``count`` per second, for a range of seconds."""
        return Range(count / self.high, count / self.low)

    @property
    def middle(self) -> float:
        """The geometric mean of the ends."""
        return math.sqrt(self.low * self.high)


def micro_step_seconds(work: Work, gpu: GpuModel, precision: str, *, may_compile: bool) -> Range:
    """Forward and backward of one micro-batch.

    Args:
        may_compile: the code may be compiled, so the optimistic end counts fusion.
    """
    share = FUSED_SHARE if may_compile else 1.0
    return Range(
        _seconds(work, gpu, precision, OPTIMISTIC, share), _seconds(work, gpu, precision, PESSIMISTIC, 1.0)
    )


def _seconds(work: Work, gpu: GpuModel, precision: str, efficiency: Efficiency, share: float) -> float:
    flops_s = gpu.flops(precision) * efficiency.arithmetic
    bytes_s = gpu.bandwidth_bytes_s * efficiency.bandwidth
    products_s = sum(max(flops / flops_s, moved / bytes_s) for flops, moved in work.products)
    device_s = products_s + share * work.other_bytes / bytes_s
    # the host runs ahead of the device: only the slower of the two shows
    launches = len(work.products) + share * work.other_kernels
    return max(device_s, launches * efficiency.launch_s)


def update_seconds(state_bytes: float, gradient_bytes: float, gpu: GpuModel, *, clips: bool) -> Range:
    """The optimizer: reads and writes parameters and state, reads gradients; clipping reads and rewrites them."""
    moved = 2 * state_bytes + (4 if clips else 3) * gradient_bytes
    return Range(*(moved / (gpu.bandwidth_bytes_s * e.bandwidth) for e in (OPTIMISTIC, PESSIMISTIC)))


def reduce_seconds(gradient_bytes: float, gpu: GpuModel, world_size: int) -> Range:
    """One all-reduce of the gradients in a node, not overlapped, with the copy into flat buckets."""
    if world_size == 1:
        return Range(0.0, 0.0)
    slow, fast = gpu.bus_bytes_s
    sent = 2 * (world_size - 1) / world_size * gradient_bytes
    copies = 3 * gradient_bytes
    return Range(
        sent / fast + copies / (gpu.bandwidth_bytes_s * OPTIMISTIC.bandwidth),
        sent / slow + copies / (gpu.bandwidth_bytes_s * PESSIMISTIC.bandwidth),
    )
