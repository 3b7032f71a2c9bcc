"""What is known about memory before anything runs: parameters, gradients and optimizer state alone."""

from __future__ import annotations

from gatrain import units
from gatrain.config import RunConfig
from gatrain.errors import DoesNotFitError
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected


def state_bytes(info: Inspected) -> int:
    """Bytes of parameters, gradients and optimizer state on every rank, whatever the micro-batch.

    A frozen parameter has no gradient; a trained 16-bit one has an fp32 master weight and an fp32 gradient. What
    the optimizer keeps, and gradients that are not all there at once, were counted when the model was inspected.
    """
    half_bytes = 2 * info.half_parameters
    gradients = info.gradient_bytes
    if gradients is None:
        gradients = info.parameter_bytes - info.frozen_bytes - half_bytes + 4 * info.half_parameters
    return info.parameter_bytes + 4 * info.half_parameters + gradients + info.optimizer_bytes


def memory_per_rank(hardware: Hardware, local_ranks: int) -> int:
    """Bytes that the weakest rank here can take: its GPU's free memory, or its part of main memory."""
    if hardware.device == "cuda" and hardware.gpus:
        return min(gpu.free_bytes for gpu in hardware.gpus[:local_ranks])
    return hardware.memory_bytes // max(local_ranks, 1)


def check_state_fits(config: RunConfig, info: Inspected, hardware: Hardware, local_ranks: int) -> int:
    """Refuse in no time what cannot fit whatever the micro-batch; return the bytes that always are in use.

    Raises:
        DoesNotFitError: parameters, gradients and optimizer state exceed the memory of the weakest rank.
    """
    needed = state_bytes(info)
    free = memory_per_rank(hardware, local_ranks)
    allowed = int(free * config.tune.memory_fraction)
    if needed <= allowed:
        return needed
    per_parameter = needed / max(info.parameters, 1)
    where = f"of the {units.size(free)} free on " + (
        f"the fullest GPU ({min(hardware.gpus[:local_ranks], key=lambda g: g.free_bytes).name})"
        if hardware.gpus
        else f"this machine for each of {local_ranks} process(es)"
    )
    advice = ["a smaller model"]
    if info.optimizer_bytes:
        without = units.size(needed - info.optimizer_bytes)
        advice.append(f"optimizer=sgd (which needs {without} without momentum)")
    if hardware.gpus and free < 0.9 * max(gpu.total_bytes for gpu in hardware.gpus):
        advice.append("a GPU that no other process uses")
    raise DoesNotFitError(
        f"parameters, gradients and optimizer state alone take {units.size(needed)} "
        f"({info.parameters:,} parameters x {per_parameter:.0f} bytes), but only {units.size(allowed)} "
        f"({config.tune.memory_fraction:.0%}) {where} may be used. "
        f"No micro-batch and no checkpointing can change that. Use {' or '.join(advice)}."
    )
