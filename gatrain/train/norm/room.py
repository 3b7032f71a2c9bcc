"""How much memory there is for the activations of a window."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from gatrain.main_memory import available_memory
from gatrain.train.step import Step
from gatrain.units import MIB

TRANSIENT = 1.25
"""What a forward and backward take at the most, in units of what is kept between them."""
HOST_SHARE = 0.5
"""Of main memory that is available: pinned blocks are rounded up to powers of two, and others need some, too."""
THREAD_BYTES = 40 * MIB
"""On a GPU, by thread that computes: cuBLAS has a workspace for each (32 MiB on Hopper)."""


class Room(NamedTuple):
    """Bytes of this rank that activations may take."""

    device: float
    host: float
    """Main memory beside a GPU; 0 where the device is a CPU."""

    def away(self, needed: float) -> float | None:
        """How many of ``needed`` bytes must go to main memory; None where they do not fit."""
        away = max(0.0, needed - self.device)
        return away if away <= self.host else None


def room_now(step: Step, micro_batches: int, fraction: float) -> Room:
    """Before a window, when nothing of it is in memory.

    Args:
        fraction: of free memory that may be used, as ``tune.memory_fraction`` says.
    """
    host = available_memory() * min(HOST_SHARE, fraction) / _ranks_here(step)
    if step.device.type != "cuda":
        return Room(host / TRANSIENT, 0.0)
    free, _ = torch.cuda.mem_get_info(step.device)
    cached = torch.cuda.memory_reserved(step.device) - torch.cuda.memory_allocated(step.device)
    # gradients, and what an optimizer keeps from its first update on
    trained = 3 * sum(p.numel() * p.element_size() for p in step.parallel.parameters)
    left = (free + cached) * fraction - trained - THREAD_BYTES * micro_batches
    return Room(max(0.0, left / TRANSIENT), host)


def _ranks_here(step: Step) -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", step.ranks.world_size)))
