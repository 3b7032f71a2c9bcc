"""From a trace to an answer for one kind of GPU: what fits, which split, how long a step may take. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gatrain import batch, codec, units
from gatrain.config import RunConfig
from gatrain.plan import FITS, Measurement, Plan, StepSettings, Trial
from gatrain.predict import overheads, roofline
from gatrain.predict.gpus import GpuModel
from gatrain.predict.request import ModeTrace, TraceResult, largest
from gatrain.predict.roofline import Range

SHOWN_SIZES = 5


@dataclass(frozen=True)
class SizeForecast:
    """Predicted memory of one micro-batch in one mode of checkpointing, in bytes."""

    micro_batch: int
    accumulation_steps: int
    allocated_bytes: int
    """Peak of the tensors, as ``torch.cuda.max_memory_allocated`` counts."""
    reserved_bytes: int
    """Peak that the caching allocator holds, as ``torch.cuda.max_memory_reserved`` counts."""
    peak_bytes: int
    """With what lies outside the allocator: as ``nvidia-smi`` shows."""
    fits: bool


@dataclass(frozen=True)
class ModeForecast:
    """One mode of checkpointing on one kind of GPU."""

    checkpointing: str
    largest_micro_batch: int
    """The largest that fits; 0 if not even one sample does."""
    sizes: list[SizeForecast]
    proposed: SizeForecast | None
    step_s: Range | None
    """Seconds of an optimizer step with the proposed micro-batch."""
    straightness: float | None
    """How far memory is from a straight line in the micro-batch: see `gatrain.predict.request.ModeTrace`."""


@dataclass(frozen=True)
class GpuForecast:
    """All modes on one kind of GPU. ``plan`` is None where nothing fits."""

    gpu: GpuModel
    precision: str
    budget_bytes: int
    modes: list[ModeForecast]
    plan: Plan | None
    step_s: Range | None
    samples_per_s: Range | None

    @property
    def fits(self) -> bool:
        return self.plan is not None

    @property
    def smallest_peak_bytes(self) -> int:
        """The least that any mode needs, at one sample."""
        return min(mode.sizes[0].peak_bytes for mode in self.modes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        plan = None if self.plan is None else self.plan.to_dict()
        return {"label": "predicted", "fits": self.fits, **codec.encode(self), "plan": plan}


class Forecaster:
    """Answers for any GPU from one trace.

    Args:
        trace: of this precision.
        config: names the effective batch and the share of memory that may be used.
    """

    def __init__(
        self,
        trace: TraceResult,
        config: RunConfig,
        world_size: int,
        precision: str,
        *,
        sync: str,
    ) -> None:
        self._trace = trace
        self._config = config
        self._world_size = world_size
        self._precision = precision
        self._sync = sync
        self._effective = config.batch.largest
        self._share = batch.Split(self._effective, world_size).share

    def on(self, gpu: GpuModel) -> GpuForecast:
        """The answer for one kind of GPU."""
        budget = int(gpu.memory_bytes * self._config.tune.memory_fraction)
        modes = [self._mode(gpu, trace, budget) for trace in self._trace.traces]
        usable = [mode for mode in modes if mode.step_s is not None]
        chosen = min(usable, key=lambda mode: mode.step_s.middle if mode.step_s else 0.0, default=None)
        plan = None if chosen is None else self._plan(gpu, chosen, modes)
        step_s = None if chosen is None else chosen.step_s
        rate = None if step_s is None else step_s.rate(self._effective)
        return GpuForecast(gpu, self._precision, budget, modes, plan, step_s, rate)

    def size(self, gpu: GpuModel, trace: ModeTrace, micro_batch: int, budget: int) -> SizeForecast:
        """Predicted peak of one micro-batch."""
        steps = -(-self._share // micro_batch)
        workspace = overheads.workspace_bytes(gpu.capability)
        peak = trace.peak(micro_batch, workspace, accumulates=steps > 1)
        total = peak.reserved + overheads.outside_bytes(self._world_size)
        return SizeForecast(micro_batch, steps, peak.allocated, peak.reserved, total, total <= budget)

    def _mode(self, gpu: GpuModel, trace: ModeTrace, budget: int) -> ModeForecast:
        def fits(size: int) -> bool:
            return self.size(gpu, trace, size, budget).fits

        fixed = self._config.batch.micro
        limit = fixed if isinstance(fixed, int) else self._share
        most = (limit if fits(limit) else 0) if isinstance(fixed, int) else largest(limit, fits)
        shown = [fixed] if isinstance(fixed, int) else _shown(max(most, 1), self._share)
        sizes = [self.size(gpu, trace, size, budget) for size in shown]
        if not most:
            return ModeForecast(trace.mode, 0, sizes, None, None, trace.straightness)
        # as few micro-steps as memory allows, and those equally large
        micro_batch = fixed if isinstance(fixed, int) else _balanced(self._share, most, fits)
        proposed = self.size(gpu, trace, micro_batch, budget)
        return ModeForecast(
            trace.mode, most, sizes, proposed, self._step_seconds(gpu, trace, micro_batch), trace.straightness
        )

    def _step_seconds(self, gpu: GpuModel, trace: ModeTrace, micro_batch: int) -> Range:
        """One optimizer step of the busiest rank."""
        total = roofline.reduce_seconds(self._trace.gradient_bytes, gpu, self._world_size)
        total += roofline.update_seconds(
            sum(trace.persistent),
            self._trace.gradient_bytes,
            gpu,
            clips=self._config.optimizer.clips is not None,
        )
        sizes = batch.micro_batch_sizes(self._share, micro_batch)
        for size in dict.fromkeys(sizes):
            one = roofline.micro_step_seconds(
                trace.work(size),
                gpu,
                self._precision,
                may_compile=self._config.compile is not False,
            )
            total += one.times(sizes.count(size) * self._trace.usual_length(size) * self._trace.passes)
        return total

    def _plan(self, gpu: GpuModel, chosen: ModeForecast, modes: list[ModeForecast]) -> Plan:
        assert chosen.proposed is not None
        assert chosen.step_s is not None
        trials = [
            Trial(
                self._settings(mode),
                Measurement(mode.proposed.micro_batch, FITS, peak_memory_bytes=mode.proposed.peak_bytes),
            )
            for mode in modes
            if mode.proposed is not None
        ]
        steps = chosen.proposed.accumulation_steps
        reason = (
            f"predicted, not measured: on {gpu.name} micro-batch {chosen.proposed.micro_batch} x {steps} with "
            f"checkpointing {chosen.checkpointing} fits in {units.size(chosen.proposed.peak_bytes)} and should "
            f"take {seconds(chosen.step_s)} per optimizer step; gatrain autotune on that GPU measures it"
        )
        return Plan(
            split=batch.Split(self._effective, self._world_size),
            micro_batch=chosen.proposed.micro_batch,
            settings=self._settings(chosen),
            reason=reason,
            trials=trials,
            notes=["Every number of this plan is a prediction."],
        )

    def _settings(self, mode: ModeForecast) -> StepSettings:
        return StepSettings(self._precision, mode.checkpointing, compile=False, sync=self._sync)


def _balanced(share: int, most: int, fits: Callable[[int], bool]) -> int:
    steps = -(-share // most)
    even = -(-share // steps)
    return even if fits(even) else most


def _shown(most: int, share: int) -> list[int]:
    """One sample, powers of two on the way, the largest that fits, and the first power beyond it."""
    powers = [2**k for k in range(share.bit_length())]
    below = [size for size in powers if size < most]
    above = [size for size in [*powers, share] if size > most][:1]
    return sorted({1, *below[-SHOWN_SIZES:], most, *above})


def seconds(span: Range) -> str:
    """A range of seconds for people."""
    return units.seconds_range(span.low, span.high)
