"""Will it fit, and on what? Memory and time of a recipe on a GPU that is not here. No CUDA context is ever made.

A child process traces the recipe's real step without data (`gatrain.predict.trace`); the peak follows from a model
of the caching allocator (`gatrain.predict.allocator`), the time from a roofline (`gatrain.predict.roofline`).
Everything that comes out is a prediction and says so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatrain import batch, units
from gatrain.compose import Composed
from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.predict.child import trace_in_child
from gatrain.predict.forecast import Forecaster, GpuForecast, ModeForecast, SizeForecast
from gatrain.predict.gpus import GPUS, GpuModel, find_gpu
from gatrain.predict.request import TraceResult, request_for
from gatrain.predict.roofline import Range

__all__ = [
    "GPUS", "GpuForecast", "GpuModel", "ModeForecast", "Prediction", "Range", "SizeForecast", "find_gpu", "predict",
    "trace_in_child",
]  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What is expected of a recipe on one or several kinds of GPU."""

    recipe: str
    effective_batch: int
    world_size: int
    parameters: int
    gpus: list[GpuForecast]
    """One for each GPU that was asked about."""
    checkpointing_offered: list[str]
    trace_s: float
    notes: list[str]
    refusal: str | None = None
    """What is missing and where it would fit, if a single kind of GPU was asked about and nothing fits on it."""

    @property
    def fits(self) -> bool:
        """Whether it fits on any of the GPUs."""
        return any(gpu.fits for gpu in self.gpus)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "refusal"}
        return {"label": "predicted", **data, "gpus": [gpu.to_dict() for gpu in self.gpus]}


def predict(
    composed: Composed,
    gpus: Sequence[GpuModel],
    nproc: int = 1,
    *,
    cwd: Path | None = None,
) -> Prediction:
    """Predict memory and time of a recipe, of uncompiled code.

    Args:
        composed: the recipe and its overrides.
        gpus: kinds of GPU, each answered for by itself: `find_gpu` or `GPUS`.
        nproc: ranks, one for each GPU, in one node.
        cwd: folder whose modules `_target_` may name; default the current one.

    Raises:
        ConfigError, PlanError, DataError: the recipe or the numbers are wrong.
        GatrainError: the model cannot be traced, or not in time.
    """
    config = composed.config
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} is below 1, the smallest number of processes.")
    if config.batch.counts_tokens:
        raise ConfigError(
            "batch.count=tokens: how many samples a window has is known from the data, which a prediction does not "
            "read. Give it a number: gatrain plan batch.count=samples batch.effective=..., or use gatrain autotune."
        )
    if isinstance(config.batch.micro, int):
        batch.Split(config.batch.largest, nproc).check_micro_batch(config.batch.micro)
    if config.checkpointing == "offload":
        raise ConfigError(
            "checkpointing=offload: how much of what waits in main memory is on the GPU at once is known from "
            "measurements alone. Use gatrain autotune, or gatrain plan with checkpointing=auto."
        )
    began = time.perf_counter()
    precisions = {gpu: _precision(config, gpu) for gpu in gpus}
    memory_bytes = max(gpu.memory_bytes for gpu in gpus)
    requests = {
        name: request_for(config, memory_bytes, nproc, name) for name in dict.fromkeys(precisions.values())
    }
    traces = dict(zip(requests, trace_in_child(composed.yaml, list(requests.values()), cwd), strict=True))
    forecasters = {
        name: Forecaster(trace, config, nproc, name, sync=requests[name].sync)
        for name, trace in traces.items()
    }
    first = next(iter(traces.values()))
    if not first.traces:
        raise ConfigError(
            f"checkpointing={config.checkpointing}: the model has no list of repeated blocks to recompute. "
            "Use checkpointing=none."
        )
    prediction = Prediction(
        recipe=composed.recipe,
        effective_batch=config.batch.largest,
        world_size=nproc,
        parameters=first.parameters,
        gpus=[forecasters[precisions[gpu]].on(gpu) for gpu in gpus],
        checkpointing_offered=first.offered,
        trace_s=time.perf_counter() - began,
        notes=_notes(config, list(traces.values())),
    )
    if len(gpus) > 1 or prediction.fits:
        return prediction
    return dataclasses.replace(prediction, refusal=_refusal(prediction, forecasters))


def _precision(config: RunConfig, gpu: GpuModel) -> str:
    return gpu.precision if config.precision == "auto" else config.precision


def _notes(config: RunConfig, traces: list[TraceResult]) -> list[str]:
    notes = ["Everything here is predicted; gatrain autotune on the GPU itself measures it."]
    if not (stages := config.batch.stages).is_constant:
        notes.append(
            f"The effective batch has stages ({stages.text}). This is the largest, which needs most memory."
        )
    if config.compile is not False:
        notes.append("Compiled code is predicted as uncompiled code, which usually needs more memory.")
    off = [
        trace.straightness for result in traces for trace in result.traces if trace.straightness is not None
    ]
    if off and max(off) > 0.02:
        notes.append(
            f"Memory is not a straight line in the micro-batch here: a trace at a large size differs by "
            f"{max(off):.0%} from the line."
        )
    return notes


def _refusal(prediction: Prediction, forecasters: dict[str, Forecaster]) -> str:
    forecast = prediction.gpus[0]
    asked = forecast.modes[0].sizes[0].micro_batch
    forecaster = forecasters[forecast.precision]
    others = [gpu.name for gpu in GPUS if gpu.precision == forecast.gpu.precision and forecaster.on(gpu).fits]
    where = f"It should fit on: {', '.join(others)}." if others else "It fits on no GPU of the table."
    fraction = forecast.budget_bytes / forecast.gpu.memory_bytes
    return (
        f"predicted: at micro-batch {asked} a step needs {units.size(forecast.smallest_peak_bytes)} at least, "
        f"but {units.size(forecast.budget_bytes)} ({fraction:.0%}) of a {forecast.gpu.name} may be used. "
        f"{where}"
    )
