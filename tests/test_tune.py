"""The tuner without processes: hardware, candidate sizes, the choice, the cache, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatrain import batch, codec, hardware, main_memory, tune
from gatrain.batch import Split
from gatrain.config import (
    REDUCE_OVERHEAD,
    AdamWConfig,
    BatchConfig,
    RunConfig,
    SGDConfig,
    TrainConfig,
    TuneConfig,
)
from gatrain.errors import ConfigError, DoesNotFitError, Interrupted, LaunchError, PlanError, WorkerError
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected
from gatrain.launch.world import Nodes
from gatrain.nvml import Gpu
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, Measurement, Plan, StepSettings
from gatrain.sources import source_hash
from gatrain.tune import cache, curve, finalists, judging, protocol, search
from gatrain.tune.curve import Curve
from gatrain.units import GIB

pytestmark = pytest.mark.usefixtures("own_cache")

WAY = StepSettings("fp32", "none", False, "window")


def info_of(**others: Any) -> Inspected:
    """What is known of model and data."""
    return dataclasses.replace(Inspected(1000, 0, "data", 1000, 4000, ("none",)), **others)


def gpu(name: str = "H100", capability: tuple[int, int] = (9, 0), free: int = 79 * GIB) -> Gpu:
    return Gpu(0, name, 80 * GIB, free, "GPU-0", capability)


CPU = Hardware("cpu", "for the test", cpu_cores=2, memory_bytes=8 * GIB, torch="2")
CUDA = Hardware(
    "cuda", "for the test", gpus=[gpu()], driver="570", cuda="13", memory_bytes=8 * GIB, torch="2"
)


def config_of(effective: int = 32, micro: Any = "auto", **others: Any) -> RunConfig:
    node = {"_target_": "json.loads"}
    return RunConfig(
        model=node,
        data=node,
        task=node,
        train=TrainConfig(steps=1),
        batch=BatchConfig(effective=effective, micro=micro),
        **others,
    )


class Machine:
    """Pretends to be the trial processes: answers a spec from formulas, one line a size."""

    def __init__(
        self,
        seconds: Callable[[int], float] = lambda size: 0.01 + 0.001 * size,
        largest: dict[str, int] | int = 10**9,
        loss: Callable[[int], float] = lambda size: 2.0,
        compiled: float = 1.0,
        checkpointed: float = 1.3,
        replayed: float = 1.0,
        host: float | None = None,
    ) -> None:
        self.seconds, self.largest, self.loss = seconds, largest, loss
        self.compiled, self.checkpointed = compiled, checkpointed
        self.replayed, self.host = replayed, host
        self.asked: list[protocol.TrialSpec] = []
        self.interrupt_after: int | None = None
        self.crash_at: int | None = None

    def __call__(self, folder: Path) -> None:
        assert (folder / protocol.CONFIG).is_file()
        asked = protocol.TrialSpec.read(folder)
        self.asked.append(asked)
        way = asked.settings
        largest = self.largest if isinstance(self.largest, int) else self.largest[way.checkpointing]
        factor = self.compiled if way.compile else 1.0
        factor *= 1.0 if way.checkpointing == "none" else self.checkpointed
        factor *= self.replayed if way.compile == REDUCE_OVERHEAD else 1.0
        with open(folder / protocol.LINES, "a") as file:

            def line(**content: Any) -> None:
                file.write(json.dumps(content) + "\n")
                file.flush()

            line(event="ready", modes=["none", "selective", "full"], budget_bytes=GIB)
            for size in asked.sizes:
                line(event="start", micro_batch=size)
                if size == self.crash_at:
                    raise WorkerError("the rank was killed (SIGKILL)\nmore")
                if self.interrupt_after is not None and size > self.interrupt_after:
                    raise Interrupted("stopped")
                fits = size <= largest
                measured = Measurement(
                    size,
                    FITS if fits else DOES_NOT_FIT,
                    peak_memory_bytes=size * 2**20 if fits else None,
                    micro_step_s=self.seconds(size) * factor if fits else None,
                    reduce_s=0.002,
                    optimizer_s=0.003,
                    loss=self.loss(size),
                    reference_loss=self.loss(asked.sizes[0]),
                    host_s=self.host * self.seconds(size) * factor if self.host is not None else None,
                )
                line(event="trial", measurement=dataclasses.asdict(measured))
                if not fits:
                    line(event="end", stopped=curve.MEMORY)
                    return
            line(event="end", stopped=curve.SHARE)


def plan_on(machine: Machine, config: RunConfig, **options: Any) -> Any:
    nodes = options.pop("nodes", Nodes(1))
    where = options.pop("hardware", CPU)
    return tune.Tuner(config, where, nodes).plan(info_of(), run=machine, **options)


# ---- the arithmetic -------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(effective=st.integers(1, 2000), world_size=st.integers(1, 9), data=st.data())
def test_any_choice_sums_to_the_effective_batch(effective: int, world_size: int, data: st.DataObject) -> None:
    share = Split(effective, world_size).share
    micro_batch = data.draw(st.sampled_from(batch.candidate_sizes(share)) | st.integers(1, share))
    plan = Plan(split=Split(effective, world_size), micro_batch=micro_batch, settings=WAY, reason="")
    shares = [sum(sizes) for sizes in plan.micro_batches]
    assert sum(shares) == effective
    assert max(shares) - min(shares) <= 1
    assert all(0 < size <= micro_batch for sizes in plan.micro_batches for size in sizes)


@given(st.integers(1, 100_000))
def test_candidate_sizes_are_few_rise_and_hold_one_and_the_share(share: int) -> None:
    sizes = batch.candidate_sizes(share)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == share
    assert len(sizes) <= share.bit_length() + 1 + batch.MAX_EXTRA_SIZES


@settings(max_examples=100, deadline=None)
@given(
    effective=st.integers(1, 600),
    world_size=st.integers(1, 4),
    fixed_s=st.floats(0, 1),
    sample_s=st.floats(1e-4, 1),
    best=st.integers(1, 64),
)
def test_the_choice_is_the_fastest_of_a_synthetic_curve(
    effective: int, world_size: int, fixed_s: float, sample_s: float, best: int
) -> None:
    def seconds(size: int) -> float:
        return fixed_s + sample_s * size * (1 + max(0, size - best) / 20)  # slower per sample above `best`

    share = Split(effective, world_size).share
    measured = curve_of({size: seconds(size) for size in range(1, share + 1)})
    chosen = search.choose(search.candidates(measured, Split(effective, world_size)))

    def step_s(size: int) -> float:
        return sum(map(seconds, batch.micro_batch_sizes(share, size))) + measured.step_overhead_s

    fastest = min(map(step_s, range(1, share + 1)))
    assert step_s(chosen.micro_batch) <= fastest * (1 + search.NOISE) + 1e-12


def curve_of(seconds: dict[int, float], **others: Any) -> Curve:
    measurements = [Measurement(size, FITS, size, s, 0.002, 0.003) for size, s in seconds.items()]
    return Curve(WAY, tuple(measurements), others.pop("stopped", curve.SHARE), **others)


def test_within_the_noise_fewer_accumulation_steps_win() -> None:
    level = curve_of({8: 0.0800, 16: 0.1601, 32: 0.3202})
    assert search.choose(search.candidates(level, Split(32, 1))).micro_batch == 32
    rising = curve_of({8: 0.0800, 16: 0.1600, 32: 0.3400})
    assert search.choose(search.candidates(rising, Split(32, 1))).micro_batch == 16


def test_the_remainder_is_part_of_the_cost() -> None:
    # 24 = 16 + 8 costs two full micro-steps on a machine whose time hardly depends on the size
    flat = curve_of({1: 0.10, 8: 0.101, 12: 0.102, 16: 0.103})
    assert search.choose(search.candidates(flat, Split(24, 1))).micro_batch == 12


def test_a_size_that_crashes_is_no_remainder_either() -> None:
    crashed = Measurement(1, FAILED, error="Expected more than 1 value per channel")
    without_one = Curve(WAY, (crashed, *curve_of({2: 0.02, 4: 0.03, 8: 0.04}).measurements), curve.SHARE)
    sizes = [c.micro_batch for c in search.candidates(without_one, Split(9, 1))]
    assert sizes
    assert all(1 not in batch.micro_batch_sizes(9, size) for size in sizes)


# ---- plans from trials ----------------------------------------------------------------------------------


def test_the_whole_batch_at_once_if_that_is_fastest() -> None:
    machine = Machine()
    plan = plan_on(machine, config_of(64))
    assert plan.accumulation_steps == 1
    assert plan.micro_batch == 64
    assert any("no accumulation" in note for note in plan.advice)
    assert machine.asked[0].sizes == (1, 2, 4, 8, 16, 32, 64)


def test_not_the_largest_that_fits_but_the_fastest() -> None:
    plan = plan_on(Machine(seconds=lambda size: 0.01 * size if size <= 16 else 0.015 * size), config_of(64))
    assert plan.micro_batch == 16
    assert plan.equation == "64 = 1 rank x 4 accumulation steps x 16"
    assert "micro-batch 16 x 4 takes 645 ms per optimizer step" in plan.reason


def test_out_of_memory_ends_the_rise_and_is_in_the_table() -> None:
    machine = Machine(largest=16)
    plan = plan_on(machine, config_of(509, checkpointing="none"))
    outcomes = {trial.micro_batch: trial.outcome for trial in plan.trials}
    assert outcomes == {1: FITS, 2: FITS, 4: FITS, 8: FITS, 16: FITS, 32: DOES_NOT_FIT}
    assert plan.micro_batch <= 16
    assert "32 does not fit" in plan.reason
    assert sum(map(sum, plan.micro_batches)) == 509


def test_a_wrong_loss_is_refused_however_fast() -> None:
    machine = Machine(seconds=lambda size: 0.01, loss=lambda size: 2.0 if size < 8 else 2.1)
    plan = plan_on(machine, config_of(64))
    assert plan.micro_batch == 4
    refused = [trial for trial in plan.trials if trial.outcome == FAILED]
    assert [trial.micro_batch for trial in refused] == [8, 16, 32, 64]
    assert all("wrong result" in str(trial.error) for trial in refused)


@pytest.mark.parametrize(
    ("precision", "loss", "noise", "outcome"),
    [
        ("fp32", 2.0005, 0.0, FITS),
        ("fp32", 2.01, 0.0, FAILED),
        ("fp32", 2.01, 0.005, FITS),  # dropout
        ("bf16", 2.01, 0.0, FITS),
        ("bf16", 3.0, 0.0, FAILED),
        ("bf16", float("nan"), 0.0, FAILED),
    ],
)
def test_truth_allows_for_rounding_and_dropout(
    precision: str, loss: float, noise: float, outcome: str
) -> None:
    m = Measurement(8, FITS, 1, 0.1, 0.0, 0.0, loss, reference_loss=2.0, loss_noise=noise)
    judged = judging.reject_wrong_losses(Curve(dataclasses.replace(WAY, precision=precision), (m,)))
    assert judged.measurements[0].outcome == outcome


def test_checkpointing_is_tried_where_memory_limits_and_taken_where_it_is_faster() -> None:
    # a large fixed cost per micro-step: the larger micro-batch wins in spite of the recomputation
    machine = Machine(
        seconds=lambda size: 0.1 + 0.001 * size, largest={"none": 4, "selective": 8, "full": 64}
    )
    plan = plan_on(machine, config_of(64))
    assert [asked.settings.checkpointing for asked in machine.asked] == ["none", "selective", "full"]
    assert (plan.settings.checkpointing, plan.micro_batch) == ("full", 64)
    # time in proportion to the samples: recomputation can only lose, so it is not even tried
    machine = Machine(seconds=lambda size: 0.01 * size, largest={"none": 4, "selective": 8, "full": 64})
    plan = plan_on(machine, config_of(64), retune=True)
    assert {asked.settings.checkpointing for asked in machine.asked} == {"none"}
    assert plan.settings.checkpointing == "none"


def test_checkpointing_is_tried_where_nothing_fits() -> None:
    plan = plan_on(Machine(largest={"none": 0, "selective": 0, "full": 2}), config_of(8))
    assert (plan.settings.checkpointing, plan.micro_batch) == ("full", 2)


def test_compilation_is_measured_for_the_best_few_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)
    machine = Machine(compiled=0.7)
    plan = plan_on(machine, config_of(64), hardware=CUDA)
    assert plan.settings.compile
    assert plan.settings.precision == "bf16"
    assert [asked.settings.compile for asked in machine.asked] == [False, True]
    assert machine.asked[1].sizes == (64,)
    assert not plan_on(Machine(compiled=1.0), config_of(64), hardware=CUDA, retune=True).settings.compile


@pytest.mark.parametrize(
    ("host", "replayed", "options", "chosen", "tried"),
    [
        (0.9, 0.5, {}, REDUCE_OVERHEAD, [False, True, REDUCE_OVERHEAD]),
        (0.9, 1.0, {}, True, [False, True, REDUCE_OVERHEAD]),
        (0.1, 0.5, {}, True, [False, True]),
        (0.9, 0.5, {"gradient": "bf16_kahan"}, True, [False, True]),
        (0.9, 0.5, {"dropout": "keyed"}, True, [False, True]),
        (0.9, 0.5, {"precision": "fp16"}, True, [False, True]),
        (0.9, 0.5, {"compile": True}, True, [False, True]),
        (0.1, 1.5, {"compile": REDUCE_OVERHEAD}, REDUCE_OVERHEAD, [False, REDUCE_OVERHEAD]),
        (0.9, 0.5, {"compile": False}, False, [False]),
    ],
)
def test_cuda_graphs_are_tried_where_the_gpu_waits_for_the_host(
    monkeypatch: pytest.MonkeyPatch,
    host: float,
    replayed: float,
    options: dict[str, Any],
    chosen: bool | str,
    tried: list[bool | str],
) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)
    machine = Machine(compiled=0.7, replayed=replayed, host=host)
    plan = plan_on(machine, config_of(64, **options), hardware=CUDA)
    assert plan.settings.compile == chosen
    assert [asked.settings.compile for asked in machine.asked] == tried
    assert codec.decode(StepSettings, codec.encode(plan.settings)) == plan.settings
    again = plan_on(no_trial, config_of(64, **options), hardware=CUDA)
    assert again.settings == plan.settings


def test_compilation_that_is_asked_for_is_not_measured_along_the_whole_curve() -> None:
    machine = Machine(compiled=1.5)
    plan = plan_on(machine, config_of(64, compile=True))
    assert (plan.settings.compile, plan.micro_batch) == (True, 64)
    assert [len(asked.sizes) for asked in machine.asked] == [7, 1]
    assert machine.asked[1].sizes == (64,)
    again = tune.Tuner(config_of(64, compile=True), CPU, Nodes(1)).plan(info_of(), run=no_trial)
    assert (again.settings.compile, again.micro_batch) == (True, 64)


def test_nothing_fits() -> None:
    with pytest.raises(DoesNotFitError, match=r"micro-batch 1.*8\.0 GiB were free.*Tried: fp32; .*Use "):
        plan_on(Machine(largest=0), config_of(8))
    with pytest.raises(DoesNotFitError, match="Use checkpointing=full"):
        plan_on(Machine(largest=0), config_of(8, checkpointing="none"))


def test_a_dead_rank_fails_its_size_and_keeps_the_others() -> None:
    machine = Machine()
    machine.crash_at = 8
    plan = plan_on(machine, config_of(64))
    assert plan.micro_batch == 4
    assert [(t.micro_batch, t.error) for t in plan.trials if t.outcome == FAILED] == [
        (8, "the rank was killed (SIGKILL)")
    ]


def test_nothing_works() -> None:
    machine = Machine()
    machine.crash_at = 1
    with pytest.raises(WorkerError, match="micro-batch 1: the rank was killed"):
        plan_on(machine, config_of(8))


def test_the_users_own_error_before_any_trial_comes_through() -> None:
    def broken(folder: Path) -> None:
        raise ConfigError("model._target_ does not import")

    with pytest.raises(ConfigError, match="does not import"):
        tune.Tuner(config_of(8), CPU, Nodes(1)).plan(info_of(), run=broken)


# ---- what needs no trial --------------------------------------------------------------------------------


def no_trial(folder: Path) -> None:
    raise AssertionError("a trial was started")


def test_a_fixed_micro_batch_needs_no_trial() -> None:
    plan = tune.Tuner(config_of(23, micro=2), CPU, Nodes(3)).plan(info_of(), run=no_trial)
    assert plan.micro_batches == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 1]]
    assert plan.settings == StepSettings("fp32", "none", compile=False, sync="window")
    assert "batch.micro=2 was asked for" in plan.reason


def test_a_fixed_micro_batch_that_does_not_divide_is_evened_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_on(Machine(), config_of(9, micro=4), hardware=CUDA)
    assert plan.micro_batch == 4  # as asked: the most that a micro-batch may hold
    assert plan.micro_batches == [[3, 3, 3]]
    assert plan.equation == "9 = 1 rank x 3 accumulation steps x 3"


def test_no_candidate_is_named_by_a_size_that_its_split_does_not_have() -> None:
    level = curve_of({1: 0.1, 2: 0.11, 4: 0.12, 8: 0.13})
    for option in search.candidates(level, Split(9, 1)):
        assert max(batch.micro_batch_sizes(9, option.micro_batch)) == option.micro_batch
        assert option.accumulation_steps == len(batch.micro_batch_sizes(9, option.micro_batch))


def test_a_fixed_micro_batch_beyond_the_share_is_refused_first() -> None:
    with pytest.raises(PlanError, match=r"batch\.micro=8 or less"):
        tune.Tuner(config_of(16, micro=10), CPU, Nodes(2)).plan(info_of(), run=no_trial)


def test_a_fixed_micro_batch_on_a_gpu_decides_only_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatrain.tune.knobs.can_compile", lambda: True)
    machine = Machine(largest={"none": 2, "selective": 2, "full": 64}, compiled=0.5)
    plan = plan_on(machine, config_of(64, micro=16), hardware=CUDA)
    assert (plan.micro_batch, plan.settings.checkpointing, plan.settings.compile) == (16, "full", True)
    assert all(asked.sizes == (16,) for asked in machine.asked)
    fixed = config_of(64, micro=16, checkpointing="none", compile=False)
    assert tune.Tuner(fixed, CUDA, Nodes(1)).plan(info_of(), run=no_trial).micro_batch == 16


def test_16_bit_parameters_are_named_and_count_their_masters() -> None:
    half = info_of(parameters=1000, parameter_bytes=2000, half_parameters=1000, half_dtypes="bf16")
    # the parameter itself, and master, main gradient and two moments in fp32
    assert tune.state_bytes(dataclasses.replace(half, optimizer_bytes=8000)) == 18_000
    assert tune.state_bytes(dataclasses.replace(half, parameter_bytes=2400)) == 10_000 + 800
    assert tune.state_bytes(dataclasses.replace(half, parameter_bytes=2400, frozen_bytes=400)) == 10_000 + 400
    plan = tune.Tuner(config_of(64, micro=16), CPU, Nodes(2)).plan(half, run=no_trial)
    assert "All 1,000 parameters are bf16" in plan.notes[0]
    assert plan.settings.sync == "window"
    overlap = dataclasses.replace(config_of(64, micro=16), sync="overlap")
    assert tune.Tuner(overlap, CPU, Nodes(2)).plan(half, run=no_trial).settings.sync == "overlap"


def test_a_model_too_large_for_any_plan_is_refused_at_once() -> None:
    info = info_of(parameters=10**9, parameter_bytes=4 * 10**9, optimizer_bytes=8 * 10**9)
    with pytest.raises(
        DoesNotFitError, match=r"14\.9 GiB \(1,000,000,000 parameters x 16 bytes\).*optimizer=sgd"
    ):
        tune.Tuner(config_of(8), CPU, Nodes(1)).plan(info, run=no_trial)
    busy = dataclasses.replace(CUDA, gpus=[gpu(free=10 * GIB)])
    with pytest.raises(DoesNotFitError, match="no other process uses"):
        tune.Tuner(config_of(8, micro=1), busy, Nodes(1)).plan(info, run=no_trial)


# ---- the cache ------------------------------------------------------------------------------------------


def test_a_second_call_answers_from_the_cache() -> None:
    first = plan_on(Machine(largest=16), config_of(64))
    again = plan_on(Machine(), config_of(64))
    assert again.micro_batch == first.micro_batch
    assert again.trials == first.trials
    assert "remembered" in again.reason
    assert "remembered" not in first.reason


@pytest.mark.parametrize(("fixed_s", "tries"), [(0.0004, False), (0.01, True)])
def test_a_larger_effective_batch_is_measured_only_if_larger_sizes_promise_anything(
    fixed_s: float, tries: bool
) -> None:
    machine = Machine(lambda size: fixed_s + 0.001 * size)
    plan_on(machine, config_of(32))
    machine.asked.clear()
    plan = plan_on(machine, config_of(128))
    assert [asked.sizes for asked in machine.asked] == ([(64, 128)] if tries else [])
    assert plan.micro_batch == (128 if tries else 32)
    untried = [note for note in plan.notes if "above 32 were not tried" in note]
    assert len(untried) == (0 if tries else 1)
    assert tries or "by 1.2% at most" in untried[0]


def test_the_possible_gain_is_the_fixed_part_by_the_flattest_line() -> None:
    assert curve_of({8: 0.010, 16: 0.018, 32: 0.034}).possible_gain == pytest.approx(0.002 / 0.034)
    assert curve_of({8: 0.033, 16: 0.033, 32: 0.034}).possible_gain > 0.9  # the host is what takes the time
    assert curve_of({16: 0.01, 32: 0.03}).possible_gain == 0  # larger is slower
    assert curve_of({32: 0.03}).possible_gain == 1  # nobody knows


def test_another_effective_batch_plans_from_the_stored_curve() -> None:
    plan_on(Machine(largest=16), config_of(64, checkpointing="none"))
    for effective in (509, 64, 16, 1):
        plan = tune.Tuner(config_of(effective, checkpointing="none"), CPU, Nodes(1)).plan(
            info_of(), run=no_trial
        )
        assert sum(map(sum, plan.micro_batches)) == effective
        assert plan.micro_batch <= 16


def test_a_size_between_two_that_fit_is_measured_before_it_is_chosen() -> None:
    plan_on(Machine(), config_of(64))
    machine = Machine()
    plan = plan_on(machine, config_of(50))
    assert [asked.sizes for asked in machine.asked] == [(50,)]  # it promises much, and nothing else does
    assert plan.micro_batch == 50
    assert any(t.micro_batch == 50 and t.outcome == FITS and t.peak_memory_bytes for t in plan.trials)
    # the stored curve still tells of the larger sizes
    assert tune.Tuner(config_of(64), CPU, Nodes(1)).plan(info_of(), run=no_trial).micro_batch == 64


@settings(max_examples=100, deadline=None)
@given(
    effective=st.integers(1, 700),
    measured=st.dictionaries(st.integers(1, 700), st.floats(1e-3, 10), min_size=1, max_size=8),
)
def test_a_size_that_was_not_measured_never_wins(effective: int, measured: dict[int, float]) -> None:
    known = curve_of(dict(sorted(measured.items())))
    options = search.candidates(known, Split(effective, 1))
    if not any(option.measured for option in options):
        with pytest.raises(ValueError, match="no candidate"):
            search.choose(options)
        return
    assert search.choose(options).micro_batch in measured
    assert all(option.micro_batch in measured for option in finalists.finalists(options))


def test_a_size_that_does_not_keep_its_promise_is_not_chosen() -> None:
    plan_on(Machine(), config_of(64))
    machine = Machine(lambda size: 9.0 if size == 50 else 0.01 + 0.001 * size)
    plan = plan_on(machine, config_of(50))
    assert 50 in [size for asked in machine.asked for size in asked.sizes]
    assert plan.micro_batch != 50
    assert any(t.micro_batch == plan.micro_batch and t.outcome == FITS for t in plan.trials)


def test_a_larger_share_measures_only_what_is_missing() -> None:
    plan_on(Machine(), config_of(16))
    machine = Machine()
    plan = plan_on(machine, config_of(64))
    assert machine.asked[0].sizes == (32, 64)
    assert plan.micro_batch == 64


@pytest.mark.parametrize(
    "other",
    [
        {"config": config_of(64, precision="bf16")},
        {"config": config_of(64, optimizer=SGDConfig())},
        {"config": dataclasses.replace(config_of(64), model={"_target_": "json.loads", "width": 2})},
        {"hardware": dataclasses.replace(CPU, torch="3")},
        {"nodes": Nodes(2)},
    ],
)
def test_the_fingerprint_covers_what_times_depend_on(other: dict[str, Any]) -> None:
    def key(config: RunConfig, where: Hardware, nodes: Nodes) -> str:
        return cache.fingerprint(config, where, nodes.world_size)

    usual = {"config": config_of(64), "hardware": CPU, "nodes": Nodes(1)}
    base = key(*usual.values())  # type: ignore[arg-type]
    assert key(*{**usual, **other}.values()) != base  # type: ignore[arg-type]
    same = {**usual, "config": config_of(7, optimizer=AdamWConfig(lr=0.5))}
    assert key(*same.values()) == base  # type: ignore[arg-type]


def test_a_change_of_the_users_source_measures_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('must not be imported')")
    before = source_hash("mine.Model", tmp_path)
    assert before == source_hash("mine.Model", tmp_path)
    (tmp_path / "mine.py").write_text("pass")
    changed = source_hash("mine.Model", tmp_path)
    assert changed != before
    (tmp_path / "layers.py").write_text("pass")
    assert source_hash("mine.Model", tmp_path) != changed
    assert source_hash("nowhere.to.be.found", tmp_path) == "not found"
    assert "torchvision" not in source_hash("torchvision.models.resnet50", tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "curves": [{"settings": 3}]}']
)
def test_a_damaged_cache_is_ignored(own_cache: Path, text: str) -> None:
    plan_on(Machine(), config_of(16))
    (stored,) = (own_cache / "plans").iterdir()
    stored.write_text(text)
    machine = Machine()
    assert "remembered" not in plan_on(machine, config_of(16)).reason
    assert machine.asked


def test_retune_measures_again() -> None:
    plan_on(Machine(), config_of(16))
    machine = Machine(largest=4)
    assert plan_on(machine, config_of(16), retune=True).micro_batch == 4
    assert machine.asked


def test_an_interrupted_tuner_keeps_what_it_measured(tmp_path: Path) -> None:
    machine = Machine()
    machine.interrupt_after = 4
    with pytest.raises(Interrupted):
        plan_on(machine, config_of(16))
    again = Machine()
    plan_on(again, config_of(16))
    assert again.asked[0].sizes == (8, 16)


def test_a_remembered_plan_respects_memory_that_others_took() -> None:
    plan_on(Machine(), config_of(64, checkpointing="none"))
    busy = dataclasses.replace(CPU, memory_bytes=int(5.9 * GIB))  # the same machine by its fingerprint
    info = info_of()
    key = cache.fingerprint(config_of(64, checkpointing="none"), busy, 1)
    assert cache.load(key).of(info).curves
    tight = config_of(64, checkpointing="none", tune=TuneConfig(memory_fraction=20 / 5900))
    assert judging.within(curve_of({1: 1, 64: 1}), 20).fitting[-1].micro_batch == 1
    with pytest.raises(AssertionError):  # another memory_fraction is another fingerprint
        tune.Tuner(tight, busy, Nodes(1)).plan(info, run=no_trial)


def test_an_unwritable_cache_does_not_stop_anything(own_cache: Path) -> None:
    own_cache.write_text("a file where a folder should be")
    said: list[str] = []
    assert plan_on(Machine(), config_of(16), progress=said.append).micro_batch == 16
    assert any("could not be kept" in text for text in said)


# ---- hardware -------------------------------------------------------------------------------------------


class FakeNvml(types.ModuleType):
    """Two GPUs as nvidia-ml-py shows them."""

    class NVMLError(Exception):
        pass

    names = ("NVIDIA H100", "NVIDIA T4")

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: b"570.1",
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda h: types.SimpleNamespace(total=80 * GIB, free=(79 - h) * GIB),
            "nvmlDeviceGetCudaComputeCapability": lambda h: [(9, 0), (7, 5)][h],
            "nvmlDeviceGetName": lambda h: self.names[h],
            "nvmlDeviceGetUUID": lambda h: f"GPU-{'ab'[h]}123",
        }
        if name == "nvmlDeviceGetMigMode":
            raise_error = self.NVMLError

            def no_mig(handle: int) -> tuple[int, int]:
                raise raise_error("Not Supported")

            return no_mig
        if name in answers:
            return answers[name]
        raise AttributeError(name)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    monkeypatch.setattr(hardware, "torch_versions", lambda: ("2.15.0", "13.2"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA H100", "NVIDIA T4"]),
        ("0", ["NVIDIA H100"]),
        ("1,0", ["NVIDIA T4", "NVIDIA H100"]),
        (" 1 ", ["NVIDIA T4"]),
        ("0,-1,1", ["NVIDIA H100"]),
        ("0,7,1", ["NVIDIA H100"]),
        ("GPU-b1", ["NVIDIA T4"]),
        ("GPU-b123,GPU-a123", ["NVIDIA T4", "NVIDIA H100"]),
        ("", []),
        ("-1", []),
        ("0,0", []),
        ("GPU-nothing", []),
        ("nonsense", []),
    ],
)
def test_visible_gpus(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = hardware.detect_hardware()
    assert [each.name for each in found.gpus] == names
    assert [each.index for each in found.gpus] == list(range(len(names)))
    assert found.device == ("cuda" if names else "cpu")
    assert codec.decode(Hardware, json.loads(json.dumps(codec.encode(found)))) == found
    if not names:
        with pytest.raises(LaunchError, match=r"CUDA_VISIBLE_DEVICES.*Use device=cpu"):
            hardware.detect_hardware("cuda")


@pytest.mark.usefixtures("two_gpus")
def test_the_cpu_may_be_asked_for() -> None:
    found = hardware.detect_hardware("cpu")
    assert (found.device, found.gpus) == ("cpu", [])


def test_no_driver_means_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "torch_versions", lambda: ("2.15.0", None))
    found = hardware.detect_hardware()
    assert found.device == "cpu"
    assert "without CUDA" in found.reason
    assert found.cpu_cores >= 1
    assert found.memory_bytes > 0
    with pytest.raises(ConfigError, match="not one of auto, cpu, cuda"):
        hardware.detect_hardware("gpu")


@pytest.mark.parametrize(
    ("gpus", "asked", "precision"),
    [
        ([], "auto", "fp32"),
        ([gpu()], "auto", "bf16"),
        ([gpu(), gpu("A100", (8, 0))], "auto", "bf16"),
        ([gpu(), gpu("T4", (7, 5))], "auto", "fp32"),
        ([gpu("T4", (7, 5))], "fp16", "fp16"),
    ],
)
def test_precision_follows_the_weakest_gpu(gpus: list[Gpu], asked: str, precision: str) -> None:
    where = dataclasses.replace(CUDA, gpus=gpus)
    chosen, reason = hardware.choose_precision(config_of(precision=asked), where)
    assert chosen == precision
    assert reason


def test_limits_of_a_container(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/inner\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64 kB\nMemAvailable:   33554432 kB\n")
    assert main_memory.available_memory(tmp_path) == 32 * GIB
    (group / "memory.max").write_text(str(4 * GIB))
    (group / "memory.current").write_text(str(3 * GIB))
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert main_memory.available_memory(tmp_path) == 2 * GIB
    (group / "cpu.max").write_text("100000 100000")
    assert hardware.cpu_cores(tmp_path) == 1
    (group / "cpu.max").write_text("max 100000")
    assert hardware.cpu_cores(tmp_path) >= 1


def test_the_tuner_imports_no_torch() -> None:
    import subprocess

    code = (
        "import sys, gatrain.hardware, gatrain.tune; gatrain.hardware.detect_hardware();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
