"""Which parameter is stepped with which rate and decay: the model's own wishes, rules by name, depth, freezing.

The first rule of ``optimizer.groups`` that matches a parameter counts for it. What no rule says follows the usual
way: weight decay on parameters of two or more dimensions, but for those that the model itself exempts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gatrain.errors import ConfigError, nearest
from gatrain.optimizer_config import DIMS, RULE_KEYS, MuonConfig, OptimizerConfig
from gatrain.train.clipping import Part, parts_of
from gatrain.train.depth import depths_of
from gatrain.train.output_layers import output_layers

_SHOWN = 8
_OWN_GROUPS = ("parameter_groups", "param_groups")
"""Methods by which a model says how its parameters are grouped."""
_OPERATIONS = {
    ">=": int.__ge__, "<=": int.__le__, ">": int.__gt__, "<": int.__lt__, "==": int.__eq__, "=": int.__eq__,
    "": int.__eq__,
}  # fmt: skip


@dataclass
class Group:
    """Parameters that are stepped alike."""

    lr: float | None
    """Peak rate; None is that of the optimizer."""
    lr_scale: float
    """Factor of the peak rate."""
    weight_decay: float | None
    """None is that of the optimizer's class."""
    options: dict[str, Any]
    """Further options of the optimizer's group."""
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    """Of the model itself; `gatrain.train.main_gradients.MasterWeights` has what is stepped for 16-bit ones."""


@dataclass
class Grouping:
    """What the configuration makes of a model's parameters."""

    groups: list[Group]
    exempt: list[str]
    """Parameters of two or more dimensions that the model itself wants without weight decay."""
    thaw_at: dict[str, int]
    """Optimizer step, counted from 1, from which on a parameter is trained."""
    frozen: list[str]
    """Parameters that a rule freezes for the whole run."""
    clips: list[Part]
    """Which parameters are clipped together, and how; every trained one is in one of them."""
    not_clipped: list[str]
    """Parameters of the output layer, which AGC leaves out unless it is told what to leave out."""


def group_parameters(
    config: OptimizerConfig, model: nn.Module, only: Collection[str] | None = None
) -> Grouping:
    """Sort the parameters into groups, and freeze or unfreeze them as the rules say.

    What is thawed later belongs to a group and wants a gradient from the start: `Thawing` switches that.

    Args:
        only: names of the parameters that are sorted and that rules may match; all by default.

    Raises:
        ConfigError: a rule that matches nothing, or groups of the model's that are not right.
    """
    rules = [dict(rule) for rule in config.groups] if isinstance(config.groups, list | tuple) else []
    rule_of = _match(rules, model, only)
    for name, parameter in model.named_parameters():
        rule = rule_of.get(name, {})
        if "frozen" in rule or "thaw_at" in rule:
            parameter.requires_grad_(not rule.get("frozen", False))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and (only is None or n in only)}
    if rules and not trained:
        raise ConfigError("optimizer.groups freezes every parameter that it is for.")
    exempt = exempt_from_decay(model) if config.weight_decay != 0 else {}
    depths = depths_of(model, config.layer_decay) if config.layer_decay is not None else {}
    own = _own_options(model, trained) if config.groups == "model" else {}
    by_adamw = _by_adamw(config, model) if isinstance(config, MuonConfig) else None
    found: dict[Any, Group] = {}
    clip_rules: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        rule = clip_rules[name] = {**own.get(name, {}), **rule_of.get(name, {})}
        decays = parameter.dim() >= 2 and name not in exempt
        options = {key: value for key, value in rule.items() if key not in RULE_KEYS}
        if by_adamw is not None and "use_muon" not in options:
            options["use_muon"] = parameter.dim() == 2 and name not in by_adamw
        group = Group(
            lr=rule.get("lr"),
            lr_scale=float(rule.get("lr_scale", 1.0)) * (1.0 if "lr" in rule else depths.get(name, 1.0)),
            weight_decay=rule.get("weight_decay", config.weight_decay if decays else 0.0),
            options=options,
        )
        key = (group.lr, group.lr_scale, group.weight_decay, repr(sorted(options.items())))
        group = found.setdefault(key, group)
        group.names.append(name)
        group.parameters.append(parameter)
    clips, not_clipped = parts_of(config, model, trained, clip_rules)
    groups = sorted(found.values(), key=lambda group: group.weight_decay == 0)  # a stable order
    return Grouping(
        groups=groups,
        exempt=[
            name
            for name in exempt
            if "weight_decay" not in rule_of.get(name, {}) and (only is None or name in only)
        ],
        thaw_at={name: rule["thaw_at"] for name, rule in rule_of.items() if "thaw_at" in rule},
        frozen=[name for name, rule in rule_of.items() if rule.get("frozen")],
        clips=clips,
        not_clipped=not_clipped,
    )


def notices(grouping: Grouping, model: nn.Module, groups: Any) -> list[str]:
    """What a person should know of the groups, a sentence each.

    Args:
        groups: ``optimizer.groups`` as it was given.
    """
    said = []
    if grouping.exempt:
        names, more = _first(grouping.exempt)
        said.append(
            f"optimizer.weight_decay does not apply to {names}{more}: the model lists "
            f"{'it' if len(grouping.exempt) == 1 else 'them'} in no_weight_decay()"
        )
    if grouping.not_clipped:
        names, more = _first(grouping.not_clipped)
        said.append(
            f"optimizer.clip_agc leaves out {names}{more}, the output layer (optimizer.clip_agc_exclude=[...] "
            "names other ones)"
        )
    if by_muon := [
        name for group in grouping.groups if group.options.get("use_muon") for name in group.names
    ]:
        names, more = _first(by_muon)
        said.append(
            f"Muon steps {names}{more}, AdamW everything else (optimizer.adamw=[...] names other ones)"
        )
    for at in sorted(set(grouping.thaw_at.values())):
        names, more = _first([name for name, step in grouping.thaw_at.items() if step == at])
        said.append(f"optimizer.groups trains {names}{more} from step {at} on")
    own = next((m for m in _OWN_GROUPS if callable(getattr(model, m, None))), None)
    if own is not None and groups is None:
        said.append(f"the model's own {own}() is not used: optimizer.groups=model takes its groups")
    return said


def _first(names: Sequence[str]) -> tuple[str, str]:
    return ", ".join(names[:3]), f" and {len(names) - 3} more" if len(names) > 3 else ""


class Thawing:
    """Switches ``requires_grad`` of parameters that are frozen until a step; alike on all ranks and at a resume.

    Args:
        later: the parameters with the step, counted from 1, from which on they are trained.
    """

    def __init__(self, later: Iterable[tuple[nn.Parameter, int]]) -> None:
        self._later = list(later)
        self._open: int | None = None

    def before_step(self, step: int) -> None:
        """Before the forward of optimizer step ``step`` (from 0). Host work alone, none where nothing changes."""
        if not self._later:
            return
        are_open = sum(at <= step + 1 for _, at in self._later)
        if are_open != self._open:
            self._open = are_open
            for parameter, at in self._later:
                parameter.requires_grad_(at <= step + 1)


# --- rules ----------------------------------------------------------------------------------------------


def _match(
    rules: Sequence[Mapping[str, Any]], model: nn.Module, only: Collection[str] | None
) -> dict[str, dict[str, Any]]:
    """The rule of each parameter, by its first name."""
    if not rules:
        return {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, dict[str, Any]] = {}
    matched, used = [0] * len(rules), [0] * len(rules)
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        hits = [nth for nth, rule in enumerate(rules) if _matches(rule, names[id(parameter)], parameter)]
        for nth in hits:
            matched[nth] += 1
        if hits:
            found[name] = dict(rules[hits[0]])
            is_frozen = not parameter.requires_grad and not {"frozen", "thaw_at"} & found[name].keys()
            used[hits[0]] += not is_frozen
    for nth, rule in enumerate(rules):
        if not used[nth]:
            raise ConfigError(_unused(f"optimizer.groups[{nth}]", rule, matched[nth], list(found), model))
    return found


def _matches(rule: Mapping[str, Any], names: Sequence[str], parameter: nn.Parameter) -> bool:
    patterns = rule.get("match", "*")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns):
        return False
    if "dims" not in rule:
        return True
    parts = DIMS.fullmatch(str(rule["dims"]))
    return parts is None or bool(_OPERATIONS[parts[1]](parameter.dim(), int(parts[2])))


def _unused(where: str, rule: Mapping[str, Any], matched: int, taken: list[str], model: nn.Module) -> str:
    shown = ", ".join(f"{key}={rule[key]!r}" for key in ("match", "dims") if key in rule)
    if matched and all(p.requires_grad for p in model.parameters()):
        return (
            f"{where} ({shown}): every parameter that it matches belongs to an earlier rule, and the first that "
            "matches counts. Put the narrower rule first."
        )
    if matched:
        return (
            f"{where} ({shown}) matches only parameters that are frozen or belong to an earlier rule. Add "
            "frozen: false, or thaw_at: STEP, to train them."
        )
    names = [name for name, _ in model.named_parameters()]
    parts = list(dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names if "." in name)]))
    patterns = rule.get("match", "*")
    pattern = patterns if isinstance(patterns, str) else patterns[0]
    hint = nearest(pattern.strip("*."), parts)
    more = ", ..." if len(names) > _SHOWN else ""
    return (
        f"{where} ({shown}) matches no parameter of {type(model).__name__}.{hint} A pattern is for the whole name: "
        f"'head.*', '*bias'. Names: {', '.join(names[:_SHOWN])}{more}."
    )


def check_options(groups: Iterable[Group], defaults: Mapping[str, Any], optimizer: str) -> None:
    """Refuse options of rules that the optimizer's groups do not have.

    Raises:
        ConfigError: names the nearest.
    """
    for group in groups:
        for key in group.options:
            if key not in defaults:
                known = [*RULE_KEYS, *(name for name in defaults if name not in RULE_KEYS)]
                raise ConfigError(
                    f"optimizer.groups: '{key}' is no key of a rule, nor an option of {optimizer}."
                    f"{nearest(key, known)} Known: {', '.join(known)}."
                )


# --- what the model says --------------------------------------------------------------------------------


def _own_options(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Options of each parameter by the model's own ``parameter_groups()`` or ``param_groups()``."""
    method = next((name for name in _OWN_GROUPS if callable(getattr(model, name, None))), None)
    if method is None:
        raise ConfigError(
            f"optimizer.groups=model: {type(model).__name__} has no method parameter_groups(). Give it one that "
            "returns a list of {'params': [...], 'lr_scale': 0.1}, or write rules in optimizer.groups."
        )
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    given = f"{type(model).__name__}.{method}()"
    try:
        groups = [dict(group) for group in getattr(model, method)()]
        listed = [(group, parameter) for group in groups for parameter in group["params"]]
        found: dict[str, dict[str, Any]] = {}
        for group, parameter in listed:
            name = parameter if isinstance(parameter, str) else name_of[id(parameter)]
            if name in found:
                raise ValueError(f"{name} is in two groups")
            found[name] = {key: value for key, value in group.items() if key not in ("params", "name")}
    except Exception as error:
        raise ConfigError(
            f"optimizer.groups=model: {given} should give groups of the model's parameters, each with 'params': "
            f"{type(error).__name__}: {error}"
        ) from error
    if missing := [name for name in trained if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"optimizer.groups=model: {given} leaves out {missing[0]}{more}, not frozen. List or freeze what it "
            "leaves out."
        )
    return found


def exempt_from_decay(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of two or more dimensions that the model wants without weight decay, by name.

    It says so in the ways that are usual: ``no_weight_decay()`` of any of its modules gives names (timm),
    ``no_weight_decay_keywords()`` parts of names (Swin), and a parameter may carry ``_no_weight_decay`` (Mamba).

    Raises:
        ConfigError: such a method cannot be called.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        names, parts = _listed(module, "no_weight_decay"), _listed(module, "no_weight_decay_keywords")
        if not names and not parts:
            continue
        for name, parameter in module.named_parameters():
            if any(name == each or name.endswith(f".{each}") for each in names) or any(
                p in name for p in parts
            ):
                found[f"{prefix}.{name}".strip(".")] = parameter
    found.update({n: p for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)})
    return {name: p for name, p in found.items() if p.requires_grad and p.dim() >= 2}


def _listed(module: nn.Module, method: str) -> list[str]:
    call = getattr(module, method, None)
    if not callable(call):
        return []
    try:
        return [str(name) for name in call()]
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__}.{method}() should list the names of parameters without weight decay, but "
            f"failed: {type(error).__name__}: {error}"
        ) from error


def _by_adamw(config: MuonConfig, model: nn.Module) -> set[str]:
    """Names of matrices that Muon is not for: embeddings and the output layer, or what the user lists.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if config.adamw is not None:
        for pattern in config.adamw:
            if not fnmatch.filter(names, pattern):
                hint = nearest(pattern.strip("*."), names)
                raise ConfigError(f"optimizer.adamw: {pattern!r} matches no parameter.{hint}")
        return {n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in config.adamw)}
    modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    modules += output_layers(model)
    spared = {id(parameter) for module in modules for parameter in module.parameters()}
    return {
        name
        for name, p in model.named_parameters()
        if id(p) in spared or name.rpartition(".")[2] in ("pos_embed", "cls_token", "position_embedding")
    }
