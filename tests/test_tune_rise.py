"""The walk through rising sizes in a trial process, with a faked device: memory predicted, refined, respected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatrain.plan import DOES_NOT_FIT, FITS, SKIPPED, Measurement, StepSettings
from gatrain.train.gradient import StepCost
from gatrain.tune import curve, explain, protocol
from gatrain.tune.curve import Curve
from gatrain.tune.trials import measure, session
from gatrain.units import MIB

WAY = StepSettings("bf16", "none", False, "window")


class FakeGpu:
    """Meter, memory and peers of one rank of several: all in one, from formulas."""

    def __init__(
        self,
        peak_of: Callable[[int], int],
        budget: int,
        seconds: Callable[[int], float] = lambda size: 0.1 + 0.001 * size,
        others_over: float = 0.0,
    ) -> None:
        self.budget_bytes, self._peak_of, self._seconds = budget, peak_of, seconds
        self._others_over = others_over
        self._now = 0
        self.tried: list[int] = []
        self.said: list[dict[str, Any]] = []

    def measure(self, size: int) -> Measurement:
        self.tried.append(size)
        self._now = self._peak_of(size)
        if self._now > self.budget_bytes:
            return Measurement(size, DOES_NOT_FIT, error="out of memory")
        return Measurement(size, FITS, self._now, self._seconds(size), 0.0, 0.0)

    def gather(self, value: Any) -> list[Any]:
        return [value, self._others_over] if isinstance(value, float) and self._others_over else [value]

    def peak(self) -> int:
        return self._now

    def base(self) -> int:
        return 0

    def write(self, event: str, **content: Any) -> None:
        self.said.append({"event": event, **content})

    def walk(self, sizes: list[int], device: str = "cuda", few: int = 10**9, **options: Any) -> str:
        asked = protocol.TrialSpec(WAY, tuple(sizes), 1000.0, 0.9, **options)
        this = SimpleNamespace(device=SimpleNamespace(type=device), stop_requested=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session.torch.cuda, "synchronize", lambda device: None)
            patch.setattr(session, "IDLE_SIZES_BELOW", few)
            return session.SizeSweep(asked, self, self, self, self, this).run()  # type: ignore[arg-type]

    @property
    def outcomes(self) -> dict[int, str]:
        lines = [line["measurement"] for line in self.said if line["event"] == "trial"]
        return {line["micro_batch"]: line["outcome"] for line in lines}


POWERS = [2**power for power in range(11)]


def test_what_clearly_cannot_fit_is_not_tried_on_a_gpu_either() -> None:
    machine = FakeGpu(lambda size: 1000 * MIB + 100 * MIB * size, 4000 * MIB)  # 30 fit
    assert machine.walk(POWERS) == curve.MEMORY
    assert max(machine.tried) < 32  # 32 needs 4,200, which the line knows
    assert machine.outcomes[32] == SKIPPED


def test_sizes_that_keep_the_gpu_waiting_are_left_out_below_a_part_of_the_share() -> None:
    machine = FakeGpu(lambda size: MIB * size, 4000 * MIB, lambda size: max(0.1, 0.01 * size))
    machine.walk(POWERS, few=16)  # 1,024 samples: up to 64
    assert machine.tried[:6] == [1, 2, 8, 32, 64, 128]
    assert machine.tried[-1] >= 256


def test_in_doubt_a_size_is_tried() -> None:
    crooked = {1: 1100, 2: 1210, 4: 1390, 8: 1820, 16: 2580, 32: 3990}  # a line would say 4,150
    machine = FakeGpu(lambda size: crooked[size] * MIB, 4000 * MIB)
    assert machine.walk([1, 2, 4, 8, 16, 32]) == curve.SHARE
    assert machine.tried == [1, 2, 4, 8, 16, 32]


def test_the_gap_is_halved_twice_while_throughput_rises() -> None:
    machine = FakeGpu(lambda size: 1000 * MIB + 100 * MIB * size, 6000 * MIB)  # 50 fit
    machine.walk(POWERS)
    assert [size for size in machine.outcomes if size not in POWERS] == [48, 56]
    assert machine.outcomes[48] == FITS
    level = FakeGpu(lambda size: 1000 * MIB + 100 * MIB * size, 6000 * MIB, seconds=lambda size: 0.01 * size)
    level.walk(POWERS)
    assert all(size in POWERS for size in level.outcomes)  # nothing to gain, nothing to pay


def test_a_size_that_fails_unexpectedly_is_approached_from_below() -> None:
    machine = FakeGpu(lambda size: 10 * MIB * size if size < 50 else 10**12, 4000 * MIB)
    assert machine.walk(POWERS) == curve.MEMORY
    assert machine.tried[-3:] == [64, 48, 56]
    assert machine.outcomes[48] == FITS


def test_the_weaker_rank_is_respected() -> None:
    machine = FakeGpu(lambda size: 100 * MIB * size, 10**12, others_over=1.0)
    assert machine.walk([1, 2, 4], device="cpu") == curve.MEMORY
    assert machine.tried == [1]


def test_a_noisy_size_is_not_called_slower() -> None:
    def walk(noise: float) -> list[int]:
        machine = FakeGpu(
            lambda size: MIB, 10**12, seconds=lambda size: 0.01 * size * (1 + 0.05 * (size > 1))
        )
        plain = machine.measure
        machine.measure = lambda size: dataclasses.replace(plain(size), noise=noise)  # type: ignore[method-assign]
        machine.walk([1, 2, 4, 8, 16, 32])
        return machine.tried

    assert walk(0.001) == [1, 2, 4]
    assert walk(0.05) == [1, 2, 4, 32]  # level for all that can be said: only the whole share is still of use


@settings(max_examples=100, deadline=None)
@given(
    base=st.integers(0, 5000),
    per_sample=st.integers(1, 500),
    budget=st.integers(100, 60_000),
    share=st.integers(1, 900),
)
def test_a_straight_line_loses_no_size_that_fits(base: int, per_sample: int, budget: int, share: int) -> None:
    machine = FakeGpu(lambda size: (base + per_sample * size) * MIB, budget * MIB)
    sizes = [size for size in POWERS if size <= share]
    machine.walk(sizes)
    fitting = [size for size in sizes if base + per_sample * size <= budget]
    assert [size for size in machine.outcomes if size in sizes and machine.outcomes[size] == FITS] == fitting
    assert all(
        base + per_sample * size <= budget for size, found in machine.outcomes.items() if found == FITS
    )
    refused = [size for size in machine.tried if base + per_sample * size > budget]
    assert len(refused) <= 1 + session.REFINEMENTS


# ---- noise: repeats that disagree, sizes that contradict each other ---------------------------------------


def test_a_time_that_other_sizes_contradict_is_measured_again_and_the_fastest_counts() -> None:
    """A busy CPU: 0.001, 0.102 and 0.021 s for 1, 2 and 4 samples were believed, and 1 was chosen."""
    disturbed = {2: [0.102, 0.030, 0.0021], 4: [0.021, 0.0042]}

    def seconds(size: int) -> float:
        left = disturbed.get(size, [])
        return left.pop(0) if left else 0.001 * size * (1.1 if size == 1 else 1.05)

    device = FakeGpu(lambda size: size * MIB, 10**9, seconds)
    device.walk([1, 2, 4], device="cpu")
    last = {
        line["measurement"]["micro_batch"]: line["measurement"]
        for line in device.said
        if "measurement" in line
    }
    assert {size: m["micro_step_s"] for size, m in last.items()} == {
        1: pytest.approx(0.0011), 2: pytest.approx(0.0021), 4: pytest.approx(0.0042),
    }  # fmt: skip
    assert last[2]["again"] == 2
    answers = protocol.read_output(json.dumps(line) for line in device.said)
    assert sorted(m.micro_batch for m in answers.measurements) == [1, 2, 4]


def test_what_stays_contradictory_is_not_measured_for_ever() -> None:
    device = FakeGpu(lambda size: MIB, 10**9, lambda size: 9.0 if size == 2 else 0.01 * size)
    device.walk([1, 2, 4, 8], device="cpu")
    assert device.tried.count(2) == 1 + session.MAX_REPEATS
    assert device.tried.count(4) == 1


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=6), st.floats(1.0, 1.9))
def test_times_that_grow_with_the_size_are_not_doubted(steps: list[float], factor: float) -> None:
    fixed = sum(steps)
    rising = [Measurement(2**k, FITS, 1, fixed + 0.1 * 2**k * (factor if k else 1)) for k in range(6)]
    assert curve.doubtful(rising) == []


class Slot:
    """An engine and a clock: a micro-step takes what the list says."""

    model = None
    step = SimpleNamespace(strategy=SimpleNamespace(cost_of=lambda model: StepCost()))

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.now, self.steps = seconds, 0.0, 0

    def micro_step(self, *_: Any) -> None:
        self.now += self.seconds[self.steps % len(self.seconds)]
        self.steps += 1

    def mark(self) -> float:
        return self.now


def cycles(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> measure.SizeTimes:
    slot = Slot(seconds)
    meter = object.__new__(measure.SizeMeter)
    meter._engine = slot  # type: ignore[assignment]
    meter._meter = SimpleNamespace(mark=slot.mark, seconds=lambda a, b: b - a)  # type: ignore[assignment]
    meter._device = SimpleNamespace(type="cpu")  # type: ignore[assignment]
    meter._peers = SimpleNamespace(gather=lambda value: [value], worst=lambda failure: failure)  # type: ignore[assignment]
    monkeypatch.setattr(measure.SizeMeter, "_close_step", lambda self: (None, 0.0, 0.0))
    failure, times = meter._cycles([(None, {})], 0.1)
    assert failure is None
    return times


def test_repeats_that_differ_are_repeated_until_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [0.102, 0.101, 0.021, 0.1, 0.09, 0.08, 0.021, 0.0205, 0.02, 0.02, 0.02]
    times = cycles(busy, monkeypatch)
    assert times.again == 1
    assert times.typical_s == pytest.approx(0.02)
    assert times.spread <= curve.DIFFERS
    steady = cycles([0.1, 0.101, 0.102], monkeypatch)
    assert steady.again == 0
    assert len(steady.micro_s[0]) < 8


def test_repeats_that_never_agree_end_and_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = [0.02 * 1.5**k for k in range(40)]
    times = cycles(growing[::-1], monkeypatch)
    assert times.again == 1
    assert times.range_s[1] > times.range_s[0]


def test_noise_is_said_in_one_sentence_with_its_numbers() -> None:
    noisy = Measurement(2, FITS, MIB, 0.021, 0.0, 0.0, spread=3.0, range_s=(0.021, 0.102), again=1)
    calm = Measurement(1, FITS, MIB, 0.012, 0.0, 0.0, spread=0.01, range_s=(0.012, 0.0121))
    (note,) = explain.noisy(Curve(WAY, (calm, noisy)), Curve(WAY, (calm, noisy)), share=4)
    assert "2 (21 ms to 102 ms)" in note
    assert "still disagree" in note
    settled = dataclasses.replace(noisy, spread=0.05)
    (note,) = explain.noisy(Curve(WAY, (calm, settled)), Curve(WAY, (calm, settled)), share=4)
    assert "now they agree" in note
    assert explain.noisy(Curve(WAY, (calm,)), Curve(WAY, (calm,)), share=4) == []


@pytest.mark.parametrize(("micro_steps", "forwards", "wanted"), [(1, 0, "b"), (1, 1, "fb"), (2, 2, "ffbb")])
def test_a_micro_steps_time_holds_every_pass_that_the_strategy_makes(
    micro_steps: float, forwards: float, wanted: str
) -> None:
    made: list[str] = []
    cost = StepCost(micro_steps, forwards)
    engine = SimpleNamespace(
        model=None,
        step=SimpleNamespace(strategy=SimpleNamespace(cost_of=lambda model: cost)),
        forward_pass=lambda batch: made.append("f"),
        micro_step=lambda batch, scale: made.append("b"),
    )
    measure.SizeMeter._passes(SimpleNamespace(_engine=engine), None, {})  # type: ignore[arg-type]
    assert "".join(made) == wanted
