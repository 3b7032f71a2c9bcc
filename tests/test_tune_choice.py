"""The choice among close calls, the memory model, advice and unequal shares: laws, without processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_tune import CPU, CUDA, WAY, Machine, config_of, curve_of, gpu, no_trial, plan_on

from gatrain import batch, codec, tune, units
from gatrain.batch import Split
from gatrain.config import AdamWConfig, SGDConfig
from gatrain.errors import Interrupted, WorkerError
from gatrain.launch.world import Nodes
from gatrain.plan import FAILED, FITS, Measurement, Plan
from gatrain.tune import advice, curve, explain, finalists, memory_model, protocol, search
from gatrain.tune.curve import Curve
from gatrain.tune.finalists import Confirmation, Finalist, StepTimings
from gatrain.tune.search import Candidate
from gatrain.units import GIB

pytestmark = pytest.mark.usefixtures("own_cache")


class WholeMachine(Machine):
    """Answers for full steps too: ``whole_s`` gives a finalist's seconds in one round."""

    def __init__(self, whole_s: Callable[[Finalist, int], float], **formulas: Any) -> None:
        super().__init__(**formulas)
        self.whole_s = whole_s
        self.timed: list[list[Finalist]] = []
        self.crash_in_whole_steps = False
        self.rank_factors: tuple[float, ...] = ()

    def __call__(self, folder: Path) -> None:
        super().__call__(folder)
        asked = self.asked[-1]
        if self.rank_factors:
            self._rewrite(folder)
        if asked.full_steps is None:
            return
        named = list(asked.full_steps.finalists)
        self.timed.append(named)
        if self.crash_in_whole_steps:
            raise WorkerError("the rank was killed (SIGKILL)")
        entries = tuple(StepTimings(f, tuple(self.whole_s(f, nth) for nth in range(5))) for f in named)
        found = Confirmation(entries)
        with open(folder / protocol.LINES, "a") as file:
            file.write(json.dumps({"event": "full_steps", "confirmation": codec.encode(found)}) + "\n")

    def _rewrite(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / protocol.LINES).read_text().splitlines()]
        for line in lines:
            if line["event"] == "trial" and line["measurement"]["micro_step_s"]:
                slowest = line["measurement"]["micro_step_s"]
                line["measurement"]["rank_s"] = [slowest * factor for factor in self.rank_factors]
        (folder / protocol.LINES).write_text("".join(json.dumps(line) + "\n" for line in lines))


def level(size: int) -> float:
    """Micro-step seconds of a machine on which only the fixed cost of 1 ms tells sizes apart."""
    return 0.001 + 0.01 * size


# ---- finalists ------------------------------------------------------------------------------------------


def test_a_close_call_is_decided_by_whole_steps_and_says_so() -> None:
    machine = WholeMachine(lambda f, nth: 0.60 if f.micro_batch == 32 else 0.70 + 0.001 * nth, seconds=level)
    plan = plan_on(machine, config_of(64))
    assert plan.micro_batch == 32  # the model would take 64
    assert [asked.full_steps is None for asked in machine.asked] == [True, False]
    assert "confirmed over 5 full steps each: the next, micro-batch" in plan.reason
    assert "600 ms per optimizer step" in plan.reason
    confirmed = {t.micro_batch: t.confirmed_step_s for t in plan.trials if t.confirmed_step_s is not None}
    assert confirmed[32] == pytest.approx(0.60)
    assert len(confirmed) == len(machine.timed[0]) <= finalists.MAX_FINALISTS
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_within_the_noise_whole_steps_take_fewer_accumulation_steps() -> None:
    def noisy(finalist: Finalist, nth: int) -> float:
        slower = 1.004 if finalist.micro_batch == 64 else 1.0
        return 0.6 * slower * (1 + (0.0, 0.03, -0.03, 0.02, -0.02)[(nth + finalist.micro_batch) % 5])

    plan = plan_on(WholeMachine(noisy, seconds=level), config_of(64))
    assert plan.micro_batch == 64
    assert "is within the noise" in plan.reason
    assert "fewer accumulation steps" in plan.reason


def test_a_clear_gap_needs_no_whole_steps() -> None:
    machine = WholeMachine(lambda f, nth: 1.0, seconds=lambda size: 0.1 + 0.001 * size)
    plan = plan_on(machine, config_of(64))
    assert plan.micro_batch == 64
    assert not machine.timed
    assert "the next best" in plan.reason


def test_whole_steps_are_remembered_for_their_effective_batch_only() -> None:
    machine = WholeMachine(lambda f, nth: 0.60 if f.micro_batch == 32 else 0.70, seconds=level)
    first = plan_on(machine, config_of(64))
    again = tune.Tuner(config_of(64), CPU, Nodes(1)).plan(_info(), run=no_trial)
    assert (again.micro_batch, again.trials) == (first.micro_batch, first.trials)
    assert "confirmed" in again.reason
    other = tune.Tuner(config_of(60), CPU, Nodes(1)).plan(_info(), run=no_trial)
    assert all(trial.confirmed_step_s is None for trial in other.trials)
    assert "full steps were not timed" in other.reason


def test_a_crash_in_whole_steps_leaves_the_curve_and_the_modelled_choice() -> None:
    machine = WholeMachine(lambda f, nth: 1.0, seconds=level)
    machine.crash_in_whole_steps = True
    plan = plan_on(machine, config_of(64))
    assert plan.micro_batch == 64
    assert all(trial.outcome == FITS for trial in plan.trials)
    assert "full steps were not timed" in plan.reason


def test_close_calls_between_ways_of_computing_share_one_set_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)
    machine = WholeMachine(
        lambda f, nth: 0.5 if f.settings.compile else 0.6,
        seconds=lambda size: 0.01 + 0.01 * size,
        compiled=0.98,
    )
    plan = plan_on(machine, config_of(64), hardware=CUDA)
    assert plan.settings.compile
    assert {f.settings.compile for f in machine.timed[-1]} == {False, True}
    assert machine.asked[-1].sizes == ()


def test_the_overlapped_reduction_is_a_finalist_on_several_gpus() -> None:
    two = dataclasses.replace(CUDA, gpus=[gpu(), gpu()])
    machine = WholeMachine(
        lambda f, nth: 0.5 if f.settings.sync == "overlap" else 0.6, seconds=lambda size: 0.1 + 0.001 * size
    )
    config = config_of(64, compile=False)
    plan = plan_on(machine, config, hardware=two, nodes=Nodes(2))
    assert plan.settings.sync == "overlap"
    asked = config_of(64, compile=False, sync="window")
    assert plan_on(machine, asked, hardware=two, nodes=Nodes(2), retune=True).settings.sync == "window"


def test_the_overlapped_reduction_is_never_chosen_where_the_used_parameters_vary() -> None:
    class Dropping(WholeMachine):
        def __call__(self, folder: Path) -> None:
            super().__call__(folder)
            lines = (folder / protocol.LINES).read_text().splitlines()
            if self.timed and "confirmation" in lines[-1]:
                line = json.loads(lines[-1])
                for entry in line["confirmation"]["entries"]:
                    if entry["finalist"]["settings"]["sync"] == "overlap":
                        entry |= {"seconds": [], "error": f"{finalists.VARYING} (layers.1.weight by 3 of 12)"}
                (folder / protocol.LINES).write_text("\n".join([*lines[:-1], json.dumps(line)]) + "\n")

    two = dataclasses.replace(CUDA, gpus=[gpu(), gpu()])
    machine = Dropping(lambda f, nth: 0.5 if f.settings.sync == "overlap" else 0.6, seconds=level)
    plan = plan_on(machine, config_of(64, compile=False), hardware=two, nodes=Nodes(2))
    assert any(finalist.settings.sync == "overlap" for finalist in machine.timed[-1])
    assert plan.settings.sync == "window"
    assert any("not compared" in note and "layers.1.weight by 3 of 12" in note for note in plan.notes)


def test_a_person_who_interrupts_whole_steps_is_obeyed() -> None:
    class Stopped(WholeMachine):
        def __call__(self, folder: Path) -> None:
            super().__call__(folder)
            raise Interrupted("stopped")

    machine = Stopped(lambda f, nth: 1.0, seconds=level)
    with pytest.raises(Interrupted):
        plan_on(machine, config_of(64))
    # the curve was complete
    assert tune.Tuner(config_of(64), CPU, Nodes(1)).plan(_info(), run=no_trial).micro_batch


def _info() -> Any:
    from test_tune import info_of

    return info_of()


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=8), st.floats(0.1, 100))
def test_whole_steps_keep_to_their_time(step_s: list[float], seconds: float) -> None:
    step_s = sorted(step_s)[: finalists.MAX_FINALISTS]
    count, rounds = finalists.affordable(step_s, seconds)
    assert count == 0 or (count > 1 and finalists.ROUNDS[0] <= rounds <= finalists.ROUNDS[1])
    assert (rounds + 1) * sum(step_s[:count]) <= seconds * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(
    medians=st.lists(st.floats(0.1, 10), min_size=2, max_size=3),
    drift=st.lists(st.floats(0.5, 2), min_size=3, max_size=9),
)
def test_the_verdict_is_never_much_slower_than_the_best_and_ignores_a_drift(
    medians: list[float], drift: list[float]
) -> None:
    timed = [
        (Candidate(WAY, 2**nth, Split(8, 1), 1.0, True), _steps(2**nth, [median * d for d in drift]))
        for nth, median in enumerate(medians)
    ]
    verdict = finalists.verdict(timed)
    assert verdict is not None
    place = [option.key for option, _ in timed].index(verdict.chosen.key)
    # a drift that meets all alike is no noise: only what is equal may lose to the simpler one
    assert medians[place] <= min(medians) * (1 + finalists.EQUAL_WITHIN) * (1 + 1e-9)


def _steps(size: int, seconds: Sequence[float]) -> StepTimings:
    return StepTimings(Finalist(WAY, size, Split(8, 1)), tuple(seconds))


def test_however_noisy_a_clearly_slower_finalist_never_wins() -> None:
    wild = [0.5, 1.5, 1.0, 2.0, 0.7]
    timed = [
        (Candidate(WAY, 8, Split(64, 1), 1.0, True), _steps(8, [1.0] * 5)),
        (Candidate(WAY, 64, Split(64, 1), 1.0, True), _steps(64, [1.05 * w for w in wild])),
    ]
    verdict = finalists.verdict(timed)
    assert verdict is not None
    assert verdict.chosen.micro_batch == 8
    assert finalists.verdict(timed[:1]) is None


# ---- the memory model -----------------------------------------------------------------------------------


@given(
    base=st.integers(0, 10 * GIB),
    per_sample=st.integers(2**20, GIB),
    level_bytes=st.integers(0, 12 * GIB),
    powers=st.integers(2, 8),
)
def test_what_fits_is_never_skipped_on_a_line_with_a_level_start(
    base: int, per_sample: int, level_bytes: int, powers: int
) -> None:
    def peak(size: int) -> int:
        return max(level_bytes, base + per_sample * size)

    points = [(2**power, peak(2**power)) for power in range(powers)]
    line = memory_model.fit_line(points)
    if line is None:
        return
    following = 2**powers
    assert not line.clearly_exceeds(following, peak(following))
    # on the rising end the line is exact, and what is far too large is skipped
    if points[0][1] < points[1][1] and points[0][1] > level_bytes:
        assert line.peak(following) == pytest.approx(peak(following), rel=1e-6)
        assert line.clearly_exceeds(following, points[-1][1])


def test_the_level_start_is_left_out_of_the_line() -> None:
    line = memory_model.fit_line([(1, 1200), (2, 1200), (4, 1200), (8, 1400)])
    assert line is not None
    assert line.peak(16) == pytest.approx(1800)


def test_one_point_says_nothing() -> None:
    assert memory_model.fit_line([]) is None
    assert memory_model.fit_line([(1, GIB)]) is None


@given(st.integers(1, 4096), st.integers(1, 4096), st.sampled_from([2, 4]))
def test_bisection_stays_between_and_ends(fits: int, gap: int, smallest: int) -> None:
    refused = fits + gap
    for _ in range(20):
        middle = memory_model.between(fits, refused, smallest)
        if middle is None:
            return
        assert fits < middle < refused
        fits = middle
    raise AssertionError("it does not end")


# ---- the plan's memory ----------------------------------------------------------------------------------


def test_the_plan_names_its_peak_and_its_budget() -> None:
    plan = plan_on(Machine(largest=16), config_of(64, checkpointing="none"))
    assert plan.predicted_peak_bytes == plan.micro_batch * 2**20
    assert plan.memory_budget_bytes == GIB
    again = tune.Tuner(config_of(64, checkpointing="none"), CPU, Nodes(1)).plan(_info(), run=no_trial)
    assert again.predicted_peak_bytes == plan.predicted_peak_bytes
    assert again.memory_budget_bytes == GIB  # less than what is free now
    fixed = tune.Tuner(config_of(8, micro=2), CPU, Nodes(1)).plan(_info(), run=no_trial)
    assert (fixed.predicted_peak_bytes, fixed.memory_budget_bytes) == (None, None)


# ---- advice ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    effective=st.integers(2, 1500),
    world_size=st.integers(1, 5),
    fixed_s=st.floats(1e-4, 1),
    sample_s=st.floats(1e-4, 0.1),
    largest=st.integers(0, 7),
)
def test_a_better_effective_batch_is_near_and_really_better(
    effective: int, world_size: int, fixed_s: float, sample_s: float, largest: int
) -> None:
    measured = curve_of({2**p: fixed_s + sample_s * 2**p for p in range(largest + 1)})

    def per_sample(batch_size: int) -> float:
        share = Split(batch_size, world_size).share
        sizes = range(1, min(share, 2**largest) + 1)
        return min(search.share_seconds(measured, share, size) for size in sizes) / batch_size

    for better in advice.better_batches(measured, Split(effective, world_size)):
        assert abs(better.effective_batch - effective) <= advice.NEARBY * effective
        assert better.gain >= advice.WORTH_SAYING
        assert per_sample(better.effective_batch) < per_sample(effective)


def test_advice_names_the_nearest_batch_that_splits_better() -> None:
    flat = curve_of(dict.fromkeys((1, 2, 4, 8, 16), 0.1))  # only full micro-steps pay
    (below,) = [b for b in advice.better_batches(flat, Split(33, 1)) if b.effective_batch < 33]
    assert below.effective_batch == 32
    assert below.gain == pytest.approx(1 - (2 / 32) / (3 / 33))
    assert advice.better_batches(flat, Split(32, 1)) == []


@given(st.floats(0.5, 0.99999), st.integers(1, 512), st.integers(1, 512))
def test_the_rescaled_beta_keeps_its_half_life_in_samples(beta: float, small: int, factor: int) -> None:
    effective = small * factor
    rescaled = advice.rescaled_beta(beta, small, effective)
    assert rescaled**factor == pytest.approx(beta)
    assume(rescaled < 1)
    half_life = small * math.log(0.5) / math.log(rescaled)
    assert half_life == pytest.approx(effective * math.log(0.5) / math.log(beta), rel=1e-4)


def test_advice_is_short_and_fits_the_case() -> None:
    measured = curve_of({1: 0.02, 2: 0.03, 4: 0.05, 8: 0.11})

    def said(effective: int, world_size: int = 1, **case: Any) -> str:
        options = search.candidates(measured, Split(effective, world_size))
        case = {"optimizer": AdamWConfig(), "on_gpu": True, **case}
        lines = advice.sentences(measured, search.choose(options), **case)
        assert len(lines) <= advice.MOST_SENTENCES
        assert all(line.endswith(".") for line in lines)
        return "\n".join(lines)

    assert "no accumulation is needed" in said(4)
    assert "accumulation is a choice" not in said(4)
    assert "'optimizer.betas=[0.9,0.999937]'" in said(64)  # 0.999 ** (4 / 64)
    assert "is predicted to take 405 ms instead of 805 ms without the gradient reduction" in said(64)
    assert "reduction" not in said(64, 2)
    assert "One more GPU" not in said(64, on_gpu=False)
    assert "betas" not in said(64, optimizer=SGDConfig())
    assert "betas" not in said(64, 2)
    assert "batch.effective" in said(64)
    assert "batch.effective" not in said(64, is_plain=False)
    assert advice.next_gpu_step_s(measured, Split(2, 2)) is None


# ---- unequal ranks --------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any))
def test_proportional_shares_sum_and_are_proportions_rounded(window: int, weights: list[int]) -> None:
    shares = batch.proportional_shares(window, weights)
    assert sum(shares) == window
    for share, weight in zip(shares, weights, strict=True):
        exact = window * weight / sum(weights)
        assert math.floor(exact - 1e-6) <= share <= math.ceil(exact + 1e-6)
    for (a, wa), (b, wb) in itertools.combinations(zip(shares, weights, strict=True), 2):
        assert (wa - wb) * (a - b) >= 0 or abs(a - b) <= 1


@given(st.integers(0, 2000), st.integers(1, 9), st.integers(1, 2000))
def test_equal_weights_give_equal_shares(window: int, world_size: int, weight: int) -> None:
    assert batch.proportional_shares(window, [weight] * world_size) == batch.rank_shares(window, world_size)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9).filter(any), st.data())
def test_a_plans_shares_serve_full_and_short_windows(shares: list[int], data: st.DataObject) -> None:
    assert batch.window_shares(sum(shares), shares) == shares
    short = data.draw(st.integers(0, sum(shares)))
    found = batch.window_shares(short, shares)
    assert sum(found) == short
    assert all(part <= share + 1 for part, share in zip(found, shares, strict=True))
    if max(shares) - min(shares) <= 1 and short < sum(shares):
        assert found == batch.rank_shares(short, len(shares))


def test_the_largest_remainders_get_what_is_left() -> None:
    assert batch.proportional_shares(10, [26, 27, 47]) == [2, 3, 5]
    assert batch.window_shares(1, [8, 9]) == [1, 0]  # as good as equal ranks: as without a plan


def unequal(factors: Sequence[float], seconds: Callable[[int], float] = level) -> Curve:
    rows = []
    for size in (1, 2, 4, 8, 16):
        ranks = tuple(seconds(size) * factor for factor in factors)
        rows.append(Measurement(size, FITS, size, max(ranks), 0.002, 0.003, rank_s=ranks))
    return Curve(WAY, tuple(rows), curve.SHARE)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.lists(st.floats(0.2, 1.0), min_size=2, max_size=4))
def test_unequal_shares_are_taken_only_where_they_are_faster(effective: int, factors: list[float]) -> None:
    measured = unequal(factors)
    world_size = len(factors)
    options = search.candidates(measured, Split(effective, world_size))
    if not options:
        return
    chosen = search.choose(options)
    if not chosen.split.is_even:
        assert sum(chosen.split.shares) == effective
        equal = [option.step_s for option in options if option.split.is_even and option.measured]
        assert chosen.step_s < min(equal, default=float("inf"))  # only what was measured is chosen
    if min(factors) > max(factors) / (1 + curve.UNEQUAL) * (1 + 1e-9):
        assert chosen.split.is_even


def test_a_gpu_of_half_the_speed_computes_half_as_much() -> None:
    pair = dataclasses.replace(CUDA, gpus=[gpu(), gpu("slow")])
    machine = WholeMachine(lambda f, nth: 1.0, seconds=level)
    machine.rank_factors = (0.5, 1.0)
    config = config_of(48, compile=False, sync="window")
    plan = plan_on(machine, config, hardware=pair, nodes=Nodes(2))
    assert plan.split.shares == (32, 16)
    assert sum(map(sum, plan.micro_batches)) == 48
    assert any("ranks are unequal" in note for note in plan.notes)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).split == plan.split


def test_noise_makes_no_rank_unequal() -> None:
    assert unequal((0.5, 1.0)).rank_factors == (0.5, 1.0)
    assert unequal((0.95, 1.0)).rank_factors == ()
    assert unequal((1.0,)).rank_factors == ()
    flip = iter(range(100))
    rows = [
        dataclasses.replace(m, rank_s=m.rank_s if next(flip) % 2 else m.rank_s[::-1])
        for m in unequal((0.5, 1.0)).measurements
    ]
    assert Curve(WAY, tuple(rows), curve.SHARE).rank_factors == ()
    assert Curve(WAY, unequal((0.5, 1.0)).measurements[:2], curve.SHARE).rank_factors == ()  # too few to tell


def test_compiled_sizes_that_are_estimated_keep_the_ranks_apart() -> None:
    plain = unequal((0.5, 1.0))
    largest = dataclasses.replace(plain.measurements[-1], rank_s=(1.0, 2.0), micro_step_s=2.0)
    compiled = Curve(dataclasses.replace(WAY, compile=True), (largest,), curve.SHARE)
    assert compiled.rank_factors == ()
    assert search.extended(compiled, plain).rank_factors == (0.5, 1.0)


def test_a_plan_with_shares_still_multiplies_out() -> None:
    plan = Plan(split=Split(10, 2, (7, 3)), micro_batch=4, settings=WAY, reason="")
    assert plan.micro_batches == [[4, 3], [3]]
    assert plan.equation == "10 = 1 rank x (4 + 3) + 1 rank x (3)"
    with pytest.raises(ValueError, match="shares of 9 samples over 2 ranks"):
        Split(10, 2, (6, 3))


# ---- compiled sizes: few, and none for a smaller batch ---------------------------------------------------


class Compiling(WholeMachine):
    """Eager code has a launch cost that compiled code does not have, so its best sizes differ."""

    def __init__(self, compiled_s: Callable[[int], float], **formulas: Any) -> None:
        super().__init__(lambda f, nth: 1.0, **formulas)
        self.compiled_s, self.eager_s = compiled_s, self.seconds

    def __call__(self, folder: Path) -> None:
        way = protocol.TrialSpec.read(folder).settings
        self.seconds = self.compiled_s if way.compile else self.eager_s
        super().__call__(folder)

    @property
    def compiled_sizes(self) -> list[int]:
        return [size for asked in self.asked if asked.settings.compile for size in asked.sizes]


def compiling(compiled_s: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> tuple[Compiling, Plan]:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)
    # eager code is as fast from 16 samples on and slower above 64
    machine = Compiling(compiled_s, seconds=lambda size: max(0.16, 0.01 * size) * (1.2 if size > 64 else 1.0))
    return machine, plan_on(machine, config_of(512), hardware=CUDA)


def test_compiled_sizes_climb_while_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, plan = compiling(lambda size: 0.05 + 0.004 * size, monkeypatch)
    assert machine.compiled_sizes == [64, 128, 256, 512]
    assert (plan.settings.compile, plan.micro_batch) == (True, 512)


def test_compiled_sizes_stop_where_they_do_not_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, plan = compiling(lambda size: 0.004 * size, monkeypatch)
    assert machine.compiled_sizes == [64, 128, 256]  # one without a gain may be noise, two are not
    assert plan.settings.compile


def test_one_noisy_compiled_size_does_not_end_the_climb(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, plan = compiling(lambda size: (0.05 + 0.004 * size) * (1.1 if size == 128 else 1.0), monkeypatch)
    assert machine.compiled_sizes == [64, 128, 256, 512]
    assert (plan.settings.compile, plan.micro_batch) == (True, 512)


def test_compiled_sizes_descend_where_larger_ones_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, plan = compiling(lambda size: 0.004 * size * (1 + size / 256), monkeypatch)
    assert machine.compiled_sizes[:3] == [64, 128, 32]
    assert plan.micro_batch < 64


def test_another_effective_batch_compiles_only_what_it_will_use(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _ = compiling(lambda size: 0.004 * size, monkeypatch)
    for effective in (384, 256):
        plan = tune.Tuner(config_of(effective), CUDA, Nodes(1)).plan(_info(), run=no_trial)
        assert sum(map(sum, plan.micro_batches)) == effective
        assert plan.settings.compile
    # below all compiled sizes the uncompiled curve says how much compiling promises: one size is measured
    machine.asked.clear()
    plan = plan_on(machine, config_of(24), hardware=CUDA)
    assert [asked.sizes for asked in machine.asked if asked.sizes] == [(24,)]
    assert (plan.settings.compile, plan.micro_batch) == (True, 24)


def test_ways_of_reducing_that_do_not_fit_beside_each_other_are_not_compared_and_it_is_said() -> None:
    state = tune.state_bytes(_info())
    tight = gpu()
    tight = dataclasses.replace(tight, free_bytes=int((32 * 2**20 + 2 * state) / 0.92))
    two = dataclasses.replace(CUDA, gpus=[tight, tight])
    machine = WholeMachine(lambda f, nth: 0.5, seconds=lambda size: 0.1 + 0.001 * size)
    plan = plan_on(machine, config_of(64, compile=False), hardware=two, nodes=Nodes(2))
    assert plan.settings.sync == "window"
    assert not machine.timed
    assert any("was not compared" in note and "sync=overlap" in note for note in plan.notes)


def test_recomputation_is_tried_only_where_larger_sizes_promise_more_than_it_costs() -> None:
    def modes_tried(gain_per_doubling: float) -> set[str]:
        exponent = math.log2(gain_per_doubling)
        machine = Machine(
            seconds=lambda size: 0.01 * size ** (1 - exponent),
            largest={"none": 8, "selective": 64, "full": 64},
        )
        plan_on(machine, config_of(64), retune=True)
        return {asked.settings.checkpointing for asked in machine.asked}

    assert modes_tried(1.03) == {"none"}
    assert modes_tried(1.10) == {"none", "selective"}
    # selective fits the whole share, so memory no longer limits and full is not needed
    assert modes_tried(1.30) == {"none", "selective"}


def test_where_memory_keeps_larger_compiled_sizes_away_smaller_ones_are_not_tried_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)
    machine = Compiling(lambda size: 0.004 * size, seconds=lambda size: max(0.16, 0.01 * size), largest=64)
    plan = plan_on(machine, config_of(512), hardware=CUDA)
    assert machine.compiled_sizes == [64, 128, 103]  # and not 32, but one between what fits and what does not
    assert (plan.settings.compile, plan.micro_batch) == (True, 64)


def test_a_first_compiled_size_that_does_not_fit_ends_the_climb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)

    class Fuller(Machine):
        """Compiled code fits 64 samples, uncompiled code all; 128 are as fast as any, and more are slower."""

        def __call__(self, folder: Path) -> None:
            self.largest = 64 if protocol.TrialSpec.read(folder).settings.compile else 10**9
            super().__call__(folder)

    machine = Fuller(lambda size: (0.1 + 0.01 * size) * (1.2 if size > 128 else 1.0), compiled=0.5)
    plan_on(machine, config_of(64), hardware=CUDA)  # compiled at 64, the whole share
    plan = plan_on(machine, config_of(512), hardware=CUDA)
    assert [asked.sizes for asked in machine.asked if asked.settings.compile and asked.sizes] == [
        (64,),
        (128,),
    ]
    assert (plan.settings.compile, plan.micro_batch) == (True, 64)


def test_recomputation_is_judged_where_nothing_fits_uncompiled() -> None:
    class Fused(Machine):
        """Compiled code fits one sample, uncompiled code none."""

        def __call__(self, folder: Path) -> None:
            way = protocol.TrialSpec.read(folder).settings
            self.largest = 64 if way.checkpointing != "none" else int(way.compile)
            super().__call__(folder)

    plan = plan_on(Fused(), config_of(8, compile=True))
    assert plan.settings.compile
    assert sum(map(sum, plan.micro_batches)) == 8


def test_a_size_that_failed_compiled_is_not_estimated() -> None:
    plain = Curve(
        WAY, tuple(Measurement(size, FITS, size, 0.01 * size) for size in (1, 2, 4, 8)), curve.SHARE
    )
    way = dataclasses.replace(WAY, compile=True)
    failed, fits = Measurement(4, FAILED, error="wrong result"), Measurement(8, FITS, 8, 0.04)
    found = search.extended(Curve(way, (failed, fits), curve.SHARE), plain)
    assert [(m.micro_batch, m.outcome, m.is_estimate) for m in found.measurements] == [
        (1, FITS, True), (2, FITS, True), (4, FAILED, False), (8, FITS, False),
    ]  # fmt: skip
    assert all(m.micro_step_s == pytest.approx(0.005 * m.micro_batch) for m in found.fitting)


def test_the_plan_names_the_main_memory_that_loading_holds() -> None:
    """Two windows and four micro-batches in each loader process: what is loaded ahead is not free."""
    rows = tuple(
        Measurement(size, FITS, size, 0.01 * size, host_bytes=size * units.MIB) for size in (1, 2, 4, 8)
    )
    measured = Curve(WAY, rows, curve.SHARE)
    chosen = search.candidates(measured, Split(512, 2), 8)[0]
    (told,) = explain.loading(measured, chosen, workers=8)
    assert "up to 768 MiB" in told
    assert "two windows of 256 MiB, and 32 micro-batches of 8 MiB" in told
    assert explain.loading(measured, dataclasses.replace(chosen, split=Split(16, 2)), workers=0) == []
