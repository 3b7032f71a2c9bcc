"""The learning rate as a function of the optimizer step: factors of the peak, counted in steps or samples.

A schedule knows nothing but the step's number, so a resumed run has the same rates, and the split of a window never
changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from gatrain.errors import ConfigError
from gatrain.optimizer_config import ScheduleConfig

Factor = Callable[[int], float]
"""Factor of the peak rate at an optimizer step, counted from 0."""


@dataclass(frozen=True)
class Span:
    """What a schedule is stretched over."""

    total_steps: int
    effective_batch: int
    stages: tuple[tuple[int, int], ...] = ()
    """(first step, effective batch) of each, where it changes. Windows are counted as full ones, also at an epoch's
    end."""

    def steps(self, steps: int | None, samples: int | None) -> float | None:
        """A length in optimizer steps from the beginning that was given in steps or in samples."""
        return steps if samples is None else self.step_at(samples)

    def last_steps(self, steps: int | None, samples: int | None) -> float | None:
        """The same for a length that ends with the run."""
        if samples is None or not self.stages:
            return self.steps(steps, samples)
        return self.total_steps - self.step_at(self._samples_at(self.total_steps) - samples)

    def step_at(self, samples: float) -> float:
        """The step, and the part of one, after which so many samples were given."""
        first, given, effective = 0, 0.0, self.effective_batch
        for step, following in self.stages[1:]:
            if given + (step - first) * effective > samples:
                break
            first, given, effective = step, given + (step - first) * effective, following
        return first + (samples - given) / effective

    def _samples_at(self, step: int) -> int:
        ends = [start for start, _ in self.stages[1:]] + [step]
        return sum(
            effective * max(0, min(end, step) - start)
            for (start, effective), end in zip(self.stages, ends, strict=True)
        )


def factor(config: ScheduleConfig, span: Span, step: int) -> float:
    """Factor of the peak rate at optimizer step ``step`` (from 0).

    Every schedule but ``one_cycle`` begins with a linear warm-up: ``(step + 1) / warm-up``, at most 1.
    """
    warmup = span.steps(config.warmup_steps, config.warmup_samples) or 0.0
    if step < warmup and config.name != "one_cycle":
        return min(1.0, (step + 1) / warmup)
    return _AFTER_WARMUP[config.name](config, span, float(warmup), step)


def _part(step: float, start: float, end: float) -> float:
    """How much of the way from ``start`` to ``end`` is over, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1.0, end - start)))


def _cosine(part: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * part))


def _down_to(final: float, height: float) -> float:
    return final + (1 - final) * height


def _constant(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    return 1.0


def _warmup_cosine(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    return _down_to(config.final_fraction, _cosine(_part(step, warmup, span.total_steps)))


def _linear(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    return _down_to(config.final_fraction, 1 - _part(step, warmup, span.total_steps))


def _inverse_sqrt(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    """Vaswani et al. 2017 (arXiv:1706.03762), scaled to the peak at the end of the warm-up."""
    return math.sqrt(max(1.0, warmup) / max(1.0, warmup, step + 1))


def _wsd(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    """Hu et al. 2024 (arXiv:2404.06395); shapes of the decay after Haegele et al. 2024 (arXiv:2405.18392)."""
    given = span.last_steps(config.decay_steps, config.decay_samples)
    decay = span.total_steps / 5 if given is None else given
    part = _part(step, max(warmup, span.total_steps - decay), span.total_steps)
    heights = {"linear": 1 - part, "cosine": _cosine(part), "sqrt": 1 - math.sqrt(part)}
    return _down_to(config.final_fraction, heights[config.decay_shape or "linear"])


def _step(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    if config.milestone_samples is not None:
        passed = sum(step >= span.step_at(samples) for samples in config.milestone_samples)
    else:
        passed = sum(step >= milestone for milestone in config.milestones)
    return float((0.1 if config.gamma is None else config.gamma) ** passed)


def _one_cycle(config: ScheduleConfig, span: Span, warmup: float, step: int) -> float:
    """Smith and Topin 2017 (arXiv:1708.07120), with half cosines as in torch's OneCycleLR; no cycle of momenta."""
    initial = 0.04 if config.initial_fraction is None else config.initial_fraction
    if step < warmup:
        return initial + (1 - initial) * (1 - _cosine(_part(step, 0, warmup)))
    return _warmup_cosine(config, span, warmup, step)


_AFTER_WARMUP: dict[str, Callable[[ScheduleConfig, Span, float, int], float]] = {
    "constant": _constant,
    "warmup_cosine": _warmup_cosine,
    "linear": _linear,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
    "step": _step,
    "one_cycle": _one_cycle,
}


def check_scheduler(dotted: str, made: Any) -> LRScheduler:
    """Refuse what is no scheduler of PyTorch's, or one that is no function of the step.

    Raises:
        ConfigError: it is such.
    """
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            f"schedule._target_={dotted}: ReduceLROnPlateau follows the evaluation's loss, not the optimizer "
            "step, so it is no schedule here. Use schedule=wsd or schedule=step."
        )
    if not isinstance(made, LRScheduler):
        raise ConfigError(
            f"schedule._target_={dotted} takes an optimizer and gave a {type(made).__name__}, not a scheduler of "
            "torch.optim.lr_scheduler. Return one, or name a function of 'step' that gives the factor of "
            "optimizer.lr."
        )
    return made


class TorchFactor:
    """A scheduler of `torch.optim.lr_scheduler` as factors of the peak rate.

    It steps through on an optimizer of one number, in order, and each rate is kept: so the rate is a function of
    the step, and a resumed run asks for its own.

    Args:
        make: makes the scheduler of an optimizer.
        peak: rate of that optimizer.
    """

    def __init__(self, make: Callable[[torch.optim.Optimizer], LRScheduler], peak: float) -> None:
        self._peak = peak
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak, momentum=0.9)
        self._others = self._options()
        self._scheduler = make(self._optimizer)
        self._factors: list[float] = []

    def __call__(self, step: int) -> float:
        while len(self._factors) <= step:
            if self._factors:
                self._optimizer.step()
                self._scheduler.step()
            self._factors.append(float(self._optimizer.param_groups[0]["lr"]) / self._peak)
            if self._options() != self._others:
                raise ValueError(
                    "it changes more than the rate (momentum, say), which gatrain would not follow; "
                    "schedule.cycle_momentum=false, if it has that"
                )
        return self._factors[step]

    def _options(self) -> dict[str, Any]:
        group = self._optimizer.param_groups[0]
        names = ("momentum", "dampening", "weight_decay", "nesterov")
        return {name: group[name] for name in names}


_ALL_TRIED = 1000
"""Steps from the first on at which a schedule of the user's own is asked before training."""
_MADE_TWICE = 1000
"""Steps up to which two schedulers of torch are compared: one takes all steps before the one asked for."""


def check_factor(made: Factor, total_steps: int, name: str, again: Factor | None = None) -> Factor:
    """Refuse a schedule of the user's own that a resumed run could not repeat, or that is no factor.

    Args:
        again: the same made anew, where it is an object, which may keep something.

    Raises:
        ConfigError: it fails, gives no finite number of 0 or more, or depends on how often it was asked. What is
            returned raises it where a step's factor is another than before training.
    """

    def checked(step: int, made: Factor = made) -> float:
        try:
            value = float(made(step))
        except Exception as error:
            raise ConfigError(
                f"{name} failed at step {step} of {total_steps}: {type(error).__name__}: {error}. It takes the "
                "optimizer step, counted from 0, and gives the factor of optimizer.lr."
            ) from error
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} gives {value} at step {step}, not a factor of 0 or more.")
        return value

    tried = sorted(
        {
            *range(min(total_steps, _ALL_TRIED)),
            *range(0, total_steps, 1 + total_steps // 100),
            max(0, total_steps - 1),
        }
    )
    given = {step: checked(step) for step in tried}
    if isinstance(made, TorchFactor):
        tried = [step for step in tried if step < _MADE_TWICE]
    before = [given[step] for step in tried]
    # from the last step to the first: what adds up at each call, or remembers what it was asked before, shows
    after = [checked(step, again or made) for step in reversed(tried)][::-1]
    if before != after:
        one, other = next((a, b) for a, b in zip(after, before, strict=True) if a != b)
        raise ConfigError(
            f"{name} gives {one} and {other} for the same step: it counts its calls, remembers them or draws "
            "random numbers, so a resumed run would have other rates. Let it follow from the step alone."
        )

    def as_before(step: int) -> float:
        value = checked(step)
        if value != (before := given.get(step, value)):
            raise ConfigError(
                f"{name} gives {before} and {value} for the same step, {step}, before training and now: it follows "
                "something beside the step (a loss, say), so a resumed run would have other rates. Let it follow "
                "from the step alone."
            )
        return value

    return as_before


def check_groups_alike(
    make: Callable[[torch.optim.Optimizer], LRScheduler],
    peak: float,
    checked: Factor,
    total_steps: int,
    name: str,
) -> None:
    """Refuse a scheduler that gives the optimizer's groups different rates: `TorchFactor` follows those of one.

    Args:
        make: makes the scheduler of an optimizer.
        peak: rate of that optimizer.
        checked: the factors of an optimizer with one group.

    Raises:
        ConfigError: it does, in one of the first steps.
    """
    groups = [{"params": [nn.Parameter(torch.zeros(()))], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9)
    found = []
    try:
        scheduler = make(optimizer)
        for step in range(min(total_steps, _ALL_TRIED)):
            if step:
                optimizer.step()
                scheduler.step()
            found.append([float(group["lr"]) / peak for group in optimizer.param_groups])
    except Exception:  # it is for one group: a list of one rate, say
        return
    for step, factors in enumerate(found):
        one, *_, other = sorted([*factors, checked(step)])
        if one != other:
            raise ConfigError(
                f"{name} gives groups of parameters different rates ({one:g} and {other:g} of optimizer.lr at step "
                f"{step}), and gatrain follows one for all. Write lr or lr_scale in the rules of optimizer.groups, "
                "or let it give every group the same factor."
            )
