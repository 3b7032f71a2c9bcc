"""Curves measured on an H100 (``tests/benchmarks/results``), replayed through the whole tuner without processes.

What a size takes is known here, so a plan can be compared with the best there is: on the card that was measured,
and on one with more memory, where larger sizes fit than any that was tried.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_tune import CUDA, config_of, gpu, info_of
from test_tune_rise import FakeGpu

from gatrain import batch, codec, tune
from gatrain.config import RunConfig
from gatrain.launch.world import Nodes
from gatrain.plan import FITS, Measurement, Plan, StepSettings
from gatrain.tune import finalists, protocol
from gatrain.tune.curve import Curve
from gatrain.tune.finalists import Confirmation, StepTimings
from gatrain.units import GIB

pytestmark = pytest.mark.usefixtures("own_cache")

RESULTS = Path(__file__).parent / "benchmarks/results/tuner_sweep_2026-11-26.json"
WORKLOADS = json.loads(RESULTS.read_text())["workloads"]
H100, H200 = 79 * GIB, 139 * GIB
LARGER_GAIN = 0.015
"""Part that each doubling beyond the measured sizes gains: so it was seen on an H200."""


class Replay:
    """A card with ``memory`` bytes that computes as the stored curves say, and measures with ``noise``."""

    def __init__(self, workload: str, memory: int, noise: float, seed: int) -> None:
        stored = codec.decode(list[Curve], list(WORKLOADS[workload]["curves"].values()), finite=False)
        self.curves = {(each.settings.checkpointing, each.settings.compile): each for each in stored}
        self.memory, self.noise = memory, noise
        self.draw = random.Random(seed)

    def seconds(self, way: StepSettings, size: int) -> float:
        """Of one micro-step."""
        known = self.curves[way.checkpointing, way.compile]
        last = known.fitting[-1]
        if size <= last.micro_batch:
            return known.micro_step_s(size)
        doublings = min(size / last.micro_batch - 1, 1.0)
        return (last.micro_step_s or 0.0) * size / last.micro_batch * (1 - LARGER_GAIN) ** doublings

    def peak(self, way: StepSettings, size: int) -> int:
        fitting = self.curves[way.checkpointing, way.compile].fitting
        first, last = fitting[0], fitting[-1]
        slope = (last.peak_memory_bytes or 0) / last.micro_batch
        if len(fitting) > 1:
            slope = ((last.peak_memory_bytes or 0) - (first.peak_memory_bytes or 0)) / (
                last.micro_batch - first.micro_batch
            )
        return int((last.peak_memory_bytes or 0) + slope * (size - last.micro_batch))

    def step_s(self, way: StepSettings, effective: int, size: int) -> float:
        overhead = self.curves[way.checkpointing, way.compile].step_overhead_s
        return sum(self.seconds(way, part) for part in batch.micro_batch_sizes(effective, size)) + overhead

    def best_s(self, effective: int) -> float:
        """Of all sizes and ways that fit."""
        found = []
        for (mode, compiled), curve in self.curves.items():
            way = dataclasses.replace(curve.settings, checkpointing=mode, compile=compiled)
            found += [
                self.step_s(way, effective, size)
                for size in range(1, effective + 1)
                if self.peak(way, size) <= 0.92 * self.memory
            ]
        return min(found)

    def __call__(self, folder: Path) -> None:
        asked = protocol.TrialSpec.read(folder)
        way, budget = asked.settings, int(0.92 * self.memory)

        def noisy(size: int) -> float:
            return self.seconds(way, size) * (1 + self.draw.uniform(-self.noise, self.noise))

        device = FakeGpu(lambda size: self.peak(way, size), budget, noisy)
        measure = device.measure

        def measured(size: int) -> Measurement:
            compile_s = 4.0 if way.compile else 0.2
            return dataclasses.replace(measure(size), noise=self.noise / 2, compile_s=compile_s)

        device.measure = measured  # type: ignore[method-assign]
        stopped = device.walk(list(asked.sizes), stop_early=asked.stop_early)
        modes = sorted({mode for mode, _ in self.curves}, key=("none", "selective", "full").index)
        lines: list[dict[str, Any]] = [{"event": "ready", "modes": modes, "budget_bytes": budget}]
        lines += [*device.said, {"event": "end", "stopped": stopped}]
        if asked.full_steps is not None:
            entries = tuple(
                StepTimings(f, tuple(self._whole(f, f.split.effective_batch) for _ in range(3)))
                for f in asked.full_steps.finalists
            )
            found = Confirmation(entries)
            lines.append({"event": "full_steps", "confirmation": codec.encode(found)})
        with open(folder / protocol.LINES, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _whole(self, finalist: finalists.Finalist, effective: int) -> float:
        steady = self.step_s(finalist.settings, effective, finalist.micro_batch)
        return steady * (1 + self.draw.uniform(-0.003, 0.003))


@pytest.fixture(autouse=True)
def _compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)


def plan_of(replay: Replay, effective: int, *, retune: bool = True) -> Plan:
    config: RunConfig = config_of(effective, precision="bf16")
    card = dataclasses.replace(gpu(free=replay.memory), total_bytes=replay.memory)
    hardware = dataclasses.replace(CUDA, gpus=[card])

    info = info_of(parameters=124_000_000, parameter_bytes=4 * 124_000_000)
    return tune.Tuner(config, hardware, Nodes(1)).plan(info, run=replay, retune=retune)


def was_measured(plan: Plan) -> bool:
    return any(
        (t.micro_batch, t.settings.checkpointing, t.settings.compile, t.outcome)
        == (plan.micro_batch, plan.settings.checkpointing, plan.settings.compile, FITS)
        and t.peak_memory_bytes is not None
        for t in plan.trials
    )


@pytest.mark.parametrize("memory", [H100, H200], ids=["H100", "H200"])
@pytest.mark.parametrize(
    ("workload", "effective"),
    [("gpt2", 512), ("gpt2", 509), ("vit", 512), ("vit", 509), ("gpt350m", 256), ("gpt350m", 251)],
)
def test_the_plan_is_measured_and_within_3_percent_of_the_best_there_is(
    workload: str, effective: int, memory: int
) -> None:
    for seed in range(4):
        replay = Replay(workload, memory, noise=0.02, seed=seed)
        plan = plan_of(replay, effective)
        takes_s = replay.step_s(plan.settings, effective, plan.micro_batch)
        assert was_measured(plan)
        assert takes_s <= 1.03 * replay.best_s(effective), (seed, plan.equation, plan.reason)


@pytest.mark.parametrize("workload", ["gpt2", "gpt350m"])
def test_another_effective_batch_takes_a_measured_size_from_the_cache(workload: str) -> None:
    for first, other in ((512, 509), (512, 400), (509, 100), (256, 251), (512, 37)):
        replay = Replay(workload, H100, noise=0.01, seed=1)
        plan_of(replay, first)
        plan = plan_of(replay, other, retune=False)
        takes_s = replay.step_s(plan.settings, other, plan.micro_batch)
        assert was_measured(plan), (first, other, plan.equation)
        assert takes_s <= 1.06 * replay.best_s(other), (first, other, plan.equation)
