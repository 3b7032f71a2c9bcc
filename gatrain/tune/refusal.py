"""Why there is no plan, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping

from gatrain import units
from gatrain.errors import DoesNotFitError, WorkerError
from gatrain.plan import DOES_NOT_FIT, FAILED, StepSettings
from gatrain.tune import knobs
from gatrain.tune.curve import Curve
from gatrain.tune.knobs import SearchSpace


def why(used: Mapping[StepSettings, Curve], space: SearchSpace) -> DoesNotFitError | WorkerError:
    """The error to raise: memory, with what was tried and what to type next; or all sizes crashed or gave wrong
    results.

    Args:
        used: all that was measured or remembered.
    """
    asked = [each for way, each in used.items() if way.compile == space.base.compile]
    tried = [m for each in asked for m in each.measurements]
    refused = [m for m in tried if m.outcome == DOES_NOT_FIT]
    if not refused:
        first = next((m for m in tried if m.outcome == FAILED), None)
        text = f"micro-batch {first.micro_batch}: {first.error}" if first else "no trial gave an answer"
        return WorkerError(
            f"no micro-batch could be computed. {text} Correct it, or set batch.micro to try one size."
        )
    smallest = min(refused, key=lambda m: m.micro_batch)
    ways = "; ".join(knobs.describe(way) for way in used)
    peak = f" (peak {units.size(smallest.peak_memory_bytes)})" if smallest.peak_memory_bytes else ""
    return DoesNotFitError(
        f"the model does not fit at micro-batch {smallest.micro_batch}{peak}: {units.size(space.free_bytes)} were "
        f"free per rank, of which tune.memory_fraction={space.config.tune.memory_fraction:g} may be "
        f"used. Tried: {ways}. {smallest.error or ''} Use {', or '.join(_ways_out(used, space))}."
    )


def _ways_out(used: Mapping[StepSettings, Curve], space: SearchSpace) -> list[str]:
    tried = {way.checkpointing for way in used}
    modes: Mapping[str, None] = dict.fromkeys(mode for each in used.values() for mode in each.modes)
    found = ["checkpointing=full"] if "full" in modes and "full" not in tried else []
    if space.fixed_micro_batch is not None and space.fixed_micro_batch > 1:
        found.append("batch.micro=auto")
    if space.base.precision == "fp32" and space.device == "cuda":
        found.append("precision=bf16")
    return [*found, "smaller samples (a shorter context, a lower resolution)", "a smaller model"]
