"""The typed configuration of optimizer and schedule: what `gatrain.config` has under those two keys."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gatrain.config_checks import above_zero, at_least, one_of
from gatrain.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """What every optimizer has. Its own keys are those of the class below that its short name stands for."""

    name: str = "adamw"
    """Which one; choose it with its own settings by optimizer=NAME."""
    lr: float | None = 1e-3
    """Peak learning rate. It belongs to the effective batch, so the split never changes it."""
    weight_decay: float | None = 0.0
    """Applied to parameters of two or more dimensions only."""
    clip_norm: float | None = None
    """Clip the norm of the whole reduced gradient to this; null for no clipping."""
    clip_agc: float | None = None
    """Adaptive gradient clipping: a unit's gradient (a row of a weight) has at most this times the norm of its
    weights, 0.01 say; null for none."""
    clip_agc_exclude: Any = None
    """Patterns of names that ``clip_agc`` leaves out; null: the layer that gives the model's output."""
    groups: Any = None
    """Rules for some of the parameters, the first that matches a name counts: a list of
    ``{match: 'head.*', dims: '>=2', lr: 0.01, lr_scale: 0.1, weight_decay: 0, clip_norm: 1, clip_agc: 0.01,
    frozen: true, thaw_at: 100}``; or ``model`` for the groups that the model's own ``parameter_groups()`` gives."""
    layer_decay: float | None = None
    """Factor of the rate from each block to the one before it, the head at the full rate (0.75, say)."""
    phases: Any = None
    """With ``gradient=phases``, an optimizer for each phase of the task: ``{critic: {lr: 2e-4}, actor: {name: sgd,
    lr: 0.1, match: 'actor.*', clip_norm: 1, schedule: constant}}``; what one leaves out is as here."""

    @property
    def node(self) -> dict[str, Any] | None:
        """The node with a ``_target_`` of a class of the user's; None for a short name."""
        return None

    @property
    def gradient(self) -> str | None:
        """The shipped gradient strategy that it works with; None for any that leaves the gradient in ``.grad``."""
        return None

    @property
    def clips(self) -> str | None:
        """A setting by which the gradient is clipped, as it was given; None where it is not."""
        for key in ("clip_norm", "clip_agc"):
            if getattr(self, key) is not None:
                return f"optimizer.{key}={getattr(self, key):g}"
            for nth, rule in enumerate(self.groups if isinstance(self.groups, list | tuple) else ()):
                if isinstance(rule, dict) and rule.get(key) is not None:
                    return f"optimizer.groups[{nth}].{key}={rule[key]}"
        return None

    def held_still(self, lr: float) -> OptimizerConfig:
        """The same with every rate at ``lr``: for trials, which should move no weight."""
        if isinstance(self.phases, Mapping):
            still = {name: _held_still(phase, lr) for name, phase in self.phases.items()}
            return dataclasses.replace(self, lr=lr, phases=still)
        if not isinstance(self.groups, list | tuple):
            return dataclasses.replace(self, lr=lr)
        return dataclasses.replace(self, lr=lr, groups=_rules_held_still(self.groups, lr))


def _held_still(phase: Any, lr: float) -> dict[str, Any]:
    still: dict[str, Any] = {**(phase or {}), "lr": lr}
    if isinstance(still.get("groups"), list | tuple):
        still["groups"] = _rules_held_still(still["groups"], lr)
    return still


def _rules_held_still(groups: Iterable[Any], lr: float) -> list[Any]:
    rules = [{**rule, "lr": lr} if isinstance(rule, dict) else rule for rule in groups]
    for rule in rules:
        if isinstance(rule, dict):
            rule.pop("lr_scale", None)
    return rules


@dataclass(frozen=True)
class ShippedOptimizer(OptimizerConfig):
    """One with a short name: its rate and its weight decay are always numbers."""

    lr: float = 1e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamWConfig(ShippedOptimizer):
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay per step of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""


@dataclass(frozen=True)
class AdamAConfig(AdamWConfig):
    """AdamW whose moments take each micro-batch's gradient at once (`gatrain.optimizers.AdamA`)."""

    name: str = "adama"

    @property
    def gradient(self) -> str:
        return "fold"


@dataclass(frozen=True)
class SGDConfig(ShippedOptimizer):
    name: str = "sgd"
    momentum: float = 0.0
    """Decay per step of the running sum of the gradients; 0 for none."""
    nesterov: bool = False
    """Nesterov's form of momentum."""


@dataclass(frozen=True)
class MuonConfig(ShippedOptimizer):
    """Muon for the hidden matrices, AdamW for everything else (`gatrain.optimizers.Muon`)."""

    name: str = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    adjust_lr_fn: str = "match_rms_adamw"
    """``match_rms_adamw``: one rate serves both; ``original``: the matrices' rate is Muon's own, larger one."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = 1e-8
    """Of AdamW."""
    adamw: Any = None
    """Patterns of names that go by AdamW; null: embeddings, and the layer that gives the model's output."""


@dataclass(frozen=True)
class AdafactorConfig(ShippedOptimizer):
    name: str = "adafactor"
    lr: float = 1e-2
    beta2_decay: float = -0.8
    """Power of the step by which the decay of the second moments goes to 1."""
    d: float = 1.0
    """Updates with a larger root mean square are scaled down to it."""


@dataclass(frozen=True)
class LionConfig(ShippedOptimizer):
    name: str = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class OwnOptimizer(OptimizerConfig):
    """``optimizer._target_=...``: any class, with its own keywords. A rate or decay of null is the class's own."""

    name: str = "own"
    lr: float | None = None
    weight_decay: float | None = None
    target: str = ""
    arguments: Any = None

    @property
    def node(self) -> dict[str, Any]:
        return {"_target_": self.target, **(self.arguments or {})}


OPTIMIZERS: dict[str, type[ShippedOptimizer]] = {
    "adamw": AdamWConfig,
    "adama": AdamAConfig,
    "sgd": SGDConfig,
    "muon": MuonConfig,
    "adafactor": AdafactorConfig,
    "lion": LionConfig,
}


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "constant"
    """Which one; choose it with its own settings by schedule=NAME."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up. Give this or ``warmup_samples``."""
    warmup_samples: int | None = None
    """Samples of linear warm-up: keeps the curve when the effective batch changes."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    decay_steps: int | None = None
    """wsd: the last steps, in which the rate falls; null for a fifth of all. Give this or ``decay_samples``."""
    decay_samples: int | None = None
    """wsd: as ``decay_steps``, in samples."""
    decay_shape: str | None = None
    """wsd: ``linear`` (null), ``cosine`` or ``sqrt`` (1 minus the square root of the part that is over)."""
    milestones: Any = None
    """step: a list of optimizer steps, from each of which on the rate is multiplied by ``gamma``."""
    milestone_samples: Any = None
    """step: as ``milestones``, in samples."""
    gamma: float | None = None
    """step: factor at each milestone; null for 0.1."""
    initial_fraction: float | None = None
    """one_cycle: rate at the start, as a fraction of the peak; null for 0.04."""

    @property
    def node(self) -> dict[str, Any] | None:
        """As `OptimizerConfig.node`."""
        return None


@dataclass(frozen=True)
class OwnSchedule(ScheduleConfig):
    """``schedule._target_=...``: a class or function that gives the factor of the peak rate at each step."""

    name: str = "own"
    target: str = ""
    arguments: Any = None

    @property
    def node(self) -> dict[str, Any]:
        return {"_target_": self.target, **(self.arguments or {})}


SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "warmup_cosine": (),
    "linear": (),
    "inverse_sqrt": (),
    "wsd": ("decay_steps", "decay_samples", "decay_shape"),
    "step": ("milestones", "milestone_samples", "gamma"),
    "one_cycle": ("initial_fraction",),
}
"""Short names, with the keys that they alone have."""
DECAY_SHAPES = ("linear", "cosine", "sqrt")


def check_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.node is None:
        one_of("optimizer.name", optimizer.name, tuple(OPTIMIZERS))
    for key in ("lr", "weight_decay"):
        if optimizer.node is None and getattr(optimizer, key) is None:
            raise ConfigError(f"optimizer.{key}=null: {optimizer.name} needs a number.")
    if optimizer.lr is not None:
        above_zero("optimizer.lr", optimizer.lr)
    if optimizer.weight_decay is not None:
        at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    _check_clipping("optimizer", optimizer.clip_norm, optimizer.clip_agc)
    if optimizer.clip_agc_exclude is not None:
        _texts("optimizer.clip_agc_exclude", optimizer.clip_agc_exclude)
        if optimizer.clip_agc is None:
            raise ConfigError(
                "optimizer.clip_agc_exclude says what optimizer.clip_agc leaves out, which is null. Add for "
                "example optimizer.clip_agc=0.01."
            )
    if optimizer.layer_decay is not None and not 0 < optimizer.layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay={optimizer.layer_decay} is not above 0 and at most 1.")
    for nth, beta in enumerate(getattr(optimizer, "betas", None) or ()):
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.betas[{nth}]={beta} is not at least 0 and below 1.")
    if (eps := getattr(optimizer, "eps", None)) is not None:
        at_least("optimizer.eps", eps, 0)
    if isinstance(optimizer, SGDConfig):
        at_least("optimizer.momentum", optimizer.momentum, 0)
        if optimizer.nesterov and not optimizer.momentum:
            raise ConfigError(
                "optimizer.nesterov=true is a form of momentum, but optimizer.momentum=0. Use "
                "optimizer.momentum=0.9, or add optimizer.nesterov=false."
            )
    if isinstance(optimizer, MuonConfig):
        one_of("optimizer.adjust_lr_fn", optimizer.adjust_lr_fn, ("match_rms_adamw", "original"))
        at_least("optimizer.ns_steps", optimizer.ns_steps, 1)
        if optimizer.adamw is not None:
            _texts("optimizer.adamw", optimizer.adamw)
    _check_groups(optimizer.groups)


CLIP_KEYS = {"clip_norm", "clip_agc"}
RULE_KEYS = ("match", "dims", "lr", "lr_scale", "weight_decay", "clip_norm", "clip_agc", "frozen", "thaw_at")
"""Of a rule in ``optimizer.groups``; further ones are options of the optimizer's own groups."""
DIMS = re.compile(r"(>=|<=|==|>|<|=|)\s*(\d+)")
"""``>=2``, ``<2``, ``1`` (which is ``==1``)."""


def _check_groups(groups: Any) -> None:
    if groups is None or groups == "model":
        return
    example = "optimizer.groups=[{match: 'head.*', lr_scale: 10}]"
    if not isinstance(groups, list | tuple) or not all(isinstance(rule, dict) for rule in groups):
        raise ConfigError(
            f"optimizer.groups={groups!r} is not a list of rules. Write for example '{example}', or "
            "optimizer.groups=model for the groups of the model's own parameter_groups()."
        )
    for nth, rule in enumerate(groups):
        _check_rule(f"optimizer.groups[{nth}]", rule)


def _check_rule(where: str, rule: dict[str, Any]) -> None:
    if "match" not in rule and "dims" not in rule:
        raise ConfigError(
            f"{where}={rule!r} says of no parameters. Give it match ('head.*', a pattern of names) or dims ('>=2')."
        )
    if len(rule) == len({"match", "dims"} & rule.keys()):
        raise ConfigError(f"{where}={rule!r} says nothing of its parameters. Add one of: {_rest(RULE_KEYS)}.")
    match = rule.get("match", "*")
    _texts(f"{where}.match", match if isinstance(match, list | tuple) else [match])
    dims = rule.get("dims", 0)
    if isinstance(dims, bool) or not isinstance(dims, int | str) or not DIMS.fullmatch(str(dims)):
        raise ConfigError(f"{where}.dims={dims!r} is not a number of dimensions such as '>=2', '<2' or 1.")
    if "lr" in rule and "lr_scale" in rule:
        raise ConfigError(f"{where}.lr and {where}.lr_scale are both given. Keep one of them.")
    for key in ("lr", "lr_scale"):
        if key in rule:
            above_zero(f"{where}.{key}", _number(f"{where}.{key}", rule[key]))
    if "weight_decay" in rule:
        at_least(f"{where}.weight_decay", _number(f"{where}.weight_decay", rule["weight_decay"]), 0)
    clips = {key: rule[key] for key in sorted(CLIP_KEYS & rule.keys())}
    for key, value in clips.items():
        if value is not None:
            _number(f"{where}.{key}", value)
    _check_clipping(where, clips.get("clip_norm"), clips.get("clip_agc"))
    if not isinstance(rule.get("frozen", False), bool):
        raise ConfigError(f"{where}.frozen={rule['frozen']!r} is not true or false.")
    if "thaw_at" in rule:
        step = rule["thaw_at"]
        if isinstance(step, bool) or not isinstance(step, int):
            raise ConfigError(f"{where}.thaw_at={step!r} is not an optimizer step.")
        at_least(f"{where}.thaw_at", step, 1)
        if rule.get("frozen") is True:
            raise ConfigError(f"{where}: frozen=true holds for the whole run. Leave it out beside thaw_at.")


def check_schedule(schedule: ScheduleConfig) -> None:
    if schedule.node is not None:
        return
    one_of("schedule.name", schedule.name, tuple(SCHEDULES))
    for name, keys in SCHEDULES.items():
        for key in keys:
            if getattr(schedule, key) is not None and name != schedule.name:
                raise ConfigError(
                    f"schedule.{key} is a key of schedule={name}, and schedule.name is {schedule.name}."
                )
    at_least("schedule.warmup_steps", schedule.warmup_steps, 0)
    if schedule.warmup_samples is not None:
        at_least("schedule.warmup_samples", schedule.warmup_samples, 0)
        if schedule.warmup_steps:
            raise ConfigError(
                "schedule.warmup_steps and schedule.warmup_samples are both given. Keep one of them."
            )
    if not 0 <= schedule.final_fraction <= 1:
        raise ConfigError(f"schedule.final_fraction={schedule.final_fraction} is not between 0 and 1.")
    for one, other in (("decay_steps", "decay_samples"), ("milestones", "milestone_samples")):
        if getattr(schedule, one) is not None and getattr(schedule, other) is not None:
            raise ConfigError(f"schedule.{one} and schedule.{other} are both given. Keep one of them.")
    for key in ("decay_steps", "decay_samples"):
        if (value := getattr(schedule, key)) is not None:
            at_least(f"schedule.{key}", value, 1)
    if schedule.decay_shape is not None:
        one_of("schedule.decay_shape", schedule.decay_shape, DECAY_SHAPES)
    if schedule.gamma is not None:
        above_zero("schedule.gamma", schedule.gamma)
    if schedule.initial_fraction is not None and not 0 <= schedule.initial_fraction <= 1:
        raise ConfigError(f"schedule.initial_fraction={schedule.initial_fraction} is not between 0 and 1.")
    if schedule.name == "step":
        _check_milestones(schedule)


def _check_milestones(schedule: ScheduleConfig) -> None:
    key = "milestones" if schedule.milestone_samples is None else "milestone_samples"
    given = getattr(schedule, key)
    if (
        not isinstance(given, list | tuple)
        or not given
        or not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in given)
        or sorted(set(given)) != list(given)
    ):
        raise ConfigError(
            f"schedule.{key}={given!r} is not a list of increasing whole numbers. Write for example "
            f"'schedule.{key}=[30,60,80]'."
        )


def _check_clipping(where: str, norm: float | None, agc: float | None) -> None:
    for key, value in (("clip_norm", norm), ("clip_agc", agc)):
        if value is not None:
            above_zero(f"{where}.{key}", value)
    if norm is not None and agc is not None:
        raise ConfigError(
            f"{where}.clip_norm={norm:g} and {where}.clip_agc={agc:g} are both given: each clips the same "
            "gradient. Keep one of them and set the other to null."
        )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value!r} is not a number.")
    return value


def _texts(key: str, values: Any) -> None:
    if not isinstance(values, list | tuple) or not all(isinstance(each, str) and each for each in values):
        raise ConfigError(f"{key}={values!r} is not a list of patterns such as ['*embed*'].")


def _rest(keys: tuple[str, ...]) -> str:
    return ", ".join(key for key in keys if key not in ("match", "dims"))
