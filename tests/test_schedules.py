"""The learning rate is a function of the optimizer step alone: closed forms, torch's, one's own."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gatrain import build
from gatrain.config import BatchConfig, RunConfig, ScheduleConfig, SGDConfig
from gatrain.errors import ConfigError
from gatrain.optimizer_config import OwnSchedule, check_schedule
from gatrain.train.schedule import Span, factor


def curve(config: ScheduleConfig, steps: int = 12, effective_batch: int = 1) -> list[float]:
    return [factor(config, Span(steps, effective_batch), step) for step in range(steps)]


def own(target: str, steps: int = 12, lr: float | None = 0.2, **arguments: Any) -> list[float]:
    config = RunConfig(
        batch=BatchConfig(4),
        optimizer=SGDConfig(lr=lr),  # type: ignore[arg-type]
        schedule=OwnSchedule(target=target, arguments=arguments),
    )
    clock = build.step_clock(config, steps)
    return [clock.factor(step) for step in range(steps)]


def test_warm_up_and_cosine_over_eight_steps() -> None:
    config = ScheduleConfig("warmup_cosine", warmup_steps=3, final_fraction=0.0)
    right = [(s + 1) / 3 if s < 3 else 0.5 * (1 + math.cos(math.pi * (s - 3) / 5)) for s in range(8)]
    assert curve(config, 8) == pytest.approx(right, abs=1e-15)


def test_wsd_is_flat_until_the_last_steps() -> None:
    config = ScheduleConfig("wsd", warmup_steps=2, decay_steps=4, final_fraction=0.0)
    assert curve(config) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    fifth = ScheduleConfig("wsd", final_fraction=0.0)
    assert curve(fifth, 10) == pytest.approx([1] * 9 + [0.5])
    root = ScheduleConfig("wsd", decay_steps=4, final_fraction=0.2, decay_shape="sqrt")
    assert curve(root)[-1] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.75)))


def test_linear_inverse_root_step_and_one_cycle() -> None:
    assert curve(ScheduleConfig("linear", final_fraction=0.0), 4) == [1.0, 0.75, 0.5, 0.25]
    root = curve(ScheduleConfig("inverse_sqrt", warmup_steps=4))
    assert root[:4] == [0.25, 0.5, 0.75, 1.0]
    assert root[8] == pytest.approx(math.sqrt(4 / 9))
    steps = curve(ScheduleConfig("step", milestones=[3, 6], gamma=0.5), 8)
    assert steps == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    cycle = curve(ScheduleConfig("one_cycle", warmup_steps=4, initial_fraction=0.1, final_fraction=0.0))
    assert cycle[0] == pytest.approx(0.1)
    assert max(cycle) == cycle[4] == 1.0


@pytest.mark.parametrize(
    ("in_steps", "in_samples"),
    [
        ({"name": "wsd", "decay_steps": 4}, {"name": "wsd", "decay_samples": 32}),
        ({"name": "step", "milestones": [3, 6]}, {"name": "step", "milestone_samples": [24, 48]}),
        ({"name": "linear", "warmup_steps": 4}, {"name": "linear", "warmup_samples": 32}),
    ],
)
def test_what_is_given_in_samples_keeps_its_curve_when_the_effective_batch_changes(
    in_steps: dict[str, Any], in_samples: dict[str, Any]
) -> None:
    wanted = curve(ScheduleConfig(**in_steps), 12, 8)
    assert curve(ScheduleConfig(**in_samples), 12, 8) == wanted
    finer = curve(ScheduleConfig(**in_samples), 24, 4)
    if in_steps["name"] == "linear":  # the warm-up is counted at the end of a step
        finer = finer[1::2][:4] + finer[::2][4:]
    assert finer[::2] == wanted if in_steps["name"] != "linear" else finer == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ScheduleConfig("constant", milestones=[3]), "milestones is a key of schedule=step"),
        (ScheduleConfig("wsd", decay_steps=3, decay_samples=3), "both given"),
        (ScheduleConfig("step"), r"milestones=None is not a list of increasing whole numbers"),
        (ScheduleConfig("step", milestones=[6, 3]), "increasing"),
        (ScheduleConfig("wsd", decay_shape="cubic"), "not one of linear, cosine, sqrt"),
        (ScheduleConfig("warmup_cosin"), "Did you mean 'warmup_cosine'"),
    ],
)
def test_keys_without_effect_are_refused(config: ScheduleConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_schedule(config)


TORCHS: dict[str, dict[str, Any]] = {
    "OneCycleLR": {"max_lr": 0.2, "cycle_momentum": False},
    "CosineAnnealingLR": {"T_max": 7, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "StepLR": {"step_size": 3},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 12, "power": 2.0},
}


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_schedulers_give_their_rates(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    options = {**TORCHS[name], **({"total_steps": 12} if name == "OneCycleLR" else {})}
    scheduler = getattr(lr_scheduler, name)(optimizer, **options)
    wanted = []
    for _ in range(12):
        wanted.append(optimizer.param_groups[0]["lr"] / 0.2)
        optimizer.step()
        if len(wanted) < 12:
            scheduler.step()
    assert own(f"torch.optim.lr_scheduler.{name}", **TORCHS[name]) == pytest.approx(wanted, rel=1e-12)


class Halving:
    def __init__(self, every: int, total_steps: int, effective_batch: int) -> None:
        assert (total_steps, effective_batch) == (12, 4)
        self.every = every

    def __call__(self, step: int) -> float:
        return float(0.5 ** (step // self.every))


class Counts:
    calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1.0 / self.calls


def ramp(step: int, total_steps: int, power: float = 1.0) -> float:
    return float((1 - step / total_steps) ** power)


def negative(step: int) -> float:
    return -1.0


def text() -> str:
    return "no schedule"


def in_turn(optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.25, 1.0, 4),
        lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[total_steps // 3])


def plateau(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ReduceLROnPlateau(optimizer)


def at_random(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda step: random.random())


def no_scheduler(optimizer: torch.optim.Optimizer) -> float:
    return 1.0


def by_decay(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    decays = [bool(group["weight_decay"]) for group in optimizer.param_groups]
    return lr_scheduler.LambdaLR(optimizer, [lambda step, on=on: 0.9**step if on else 1.0 for on in decays])


class FirstFast(lr_scheduler.LRScheduler):
    def get_lr(self) -> list[Any]:
        return [base * 0.1 ** (nth > 0) for nth, base in enumerate(self.base_lrs)]


def one_rate(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step])


def unnamed(opt: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ExponentialLR(opt, 0.9)


def test_a_scheduler_that_takes_a_list_of_one_rate_is_taken() -> None:
    assert own(f"{__name__}.one_rate") == [0.5**step for step in range(12)]


def test_a_function_of_an_optimizer_gives_a_scheduler_made_of_others() -> None:
    assert own(f"{__name__}.in_turn") == pytest.approx(
        [0.25, 0.4375, 0.625, 0.8125, *(0.5**step for step in range(8))]
    )


def test_a_class_or_a_function_of_the_users_gives_the_factor() -> None:
    assert own(f"{__name__}.Halving", every=4) == [1.0] * 4 + [0.5] * 4 + [0.25] * 4
    assert own(f"{__name__}.ramp", power=2.0) == [(1 - s / 12) ** 2 for s in range(12)]


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        (f"{__name__}.Counts", {}, "counts its calls"),
        (f"{__name__}.negative", {}, "gives -1.0 at step 0"),
        (f"{__name__}.plateau", {}, "follows the evaluation's loss"),
        (f"{__name__}.at_random", {}, "for the same step"),
        (f"{__name__}.no_scheduler", {}, "takes an optimizer and gave a float"),
        (f"{__name__}.by_decay", {}, r"different rates \(0.9 and 1 of optimizer.lr at step 1\).*lr_scale"),
        (f"{__name__}.FirstFast", {}, "different rates"),
        (f"{__name__}.unnamed", {}, "'opt'.* Call it 'optimizer' .* or 'step'"),
        (f"{__name__}.text", {}, "not a function of the optimizer step"),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {}, "follows the evaluation's loss"),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 0.2}, "cycle_momentum=false"),
    ],
)
def test_what_is_no_function_of_the_step_is_refused(
    target: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        own(target, **arguments)


class Remembers:
    """A factor for each step that was ever asked for, in the order of asking."""

    def __init__(self) -> None:
        self.given: dict[int, float] = {}

    def __call__(self, step: int) -> float:
        return self.given.setdefault(step, 0.9 ** len(self.given))


class Adds:
    """Fine: however it is asked, a step has one rate."""

    def __init__(self) -> None:
        self.rates = [1.0]

    def __call__(self, step: int) -> float:
        while len(self.rates) <= step:
            self.rates.append(0.9 * self.rates[-1])
        return self.rates[step]


def late_noise(step: int) -> float:
    return 1.0 if step < 7 or step == 11 else random.random()


@pytest.mark.parametrize("name", ["Remembers", "late_noise"])
def test_a_schedule_that_follows_from_more_than_the_step_is_refused_wherever_it_shows(name: str) -> None:
    with pytest.raises(ConfigError, match="for the same step"):
        own(f"{__name__}.{name}")


LOSSES: list[float] = []


def by_loss(step: int) -> float:
    return 1.0 if not LOSSES else 0.1


def test_a_schedule_that_follows_what_moves_in_the_run_is_refused_where_it_shows() -> None:
    config = RunConfig(batch=BatchConfig(4), schedule=OwnSchedule(target=f"{__name__}.by_loss", arguments={}))
    clock = build.step_clock(config, 12)
    assert clock.factor(3) == 1.0
    LOSSES.append(0.5)
    try:
        with pytest.raises(ConfigError, match="for the same step, 4, before training and now"):
            clock.factor(4)
    finally:
        LOSSES.clear()


def test_a_schedule_that_computes_its_steps_in_turn_is_taken() -> None:
    assert own(f"{__name__}.Adds") == pytest.approx([0.9**step for step in range(12)])
