"""What an optimizer keeps beside the parameters: made before the first step, counted, and tried on small tensors.

Nothing is known of an optimizer by its name. Before a run, one of its kind steps a few small parameters: so it
shows whether it steps at all with gradients alone, whether what gatrain saves of it is all that it needs to go on,
and whether its state can be made ahead of the first step.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.optimizers import AdamA
from gatrain.train.optimizer_attributes import (
    attributes_of,
    differing_attribute,
    moved_attributes,
    same_value,
)
from gatrain.train.seeding import kept_random_state

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes the optimizer over groups, each a dict with ``params``."""

_SIDES = (13, 11, 3, 5, 2)
"""Of the small parameters. No two are equal, so that the sides of a tensor of state tell which side of the
parameter they follow."""
_LARGE_SIDES = (131, 137, 3, 5, 2)
"""Large enough for optimizers that factor, or keep something else, only for large matrices."""
_SAVED_AT = (2, 7)
"""Steps after which the small parameters are saved: before and after what happens at every fifth step, say."""
_STEPS = 14
_OPEN = ("params", "param_names", "lr")
"""Keys of a group that others set."""


@dataclass(frozen=True)
class Behaviour:
    """What an optimizer did on small parameters."""

    can_be_primed: bool
    """`prime` leaves it as it was before its first step."""
    counts_in_groups: bool = False
    """It changes options of its groups as it steps, which belong to its state."""
    moves: frozenset[str] = frozenset()
    """Names of attributes that it changes, and comes to again after a resume."""


# --- before the first step ------------------------------------------------------------------------------


@torch.no_grad()
def prime(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state before the first step, with zeros; for those of which `try_out` says they can.

    Made during the first update, it is cut out of the blocks that activations have left, which then no longer serve
    the next step's: GPT-2 124M at 32 samples reserved 16 % more memory on an H100 (``tests/benchmarks/results``).
    Nothing moves: the rate is zero, and all state is set to zero afterwards, also the count of steps.
    """
    if isinstance(optimizer, AdamA):  # without a gradient of the whole model
        optimizer.make_state()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float) and not isinstance(value, bool):
                state[key] = type(value)(0)
    optimizer.zero_grad(set_to_none=True)


def try_out(
    make: Make,
    groups: Sequence[Mapping[str, Any]],
    sparse: Iterable[nn.Parameter] = (),
    *,
    large: bool = False,
) -> Behaviour:
    """Step small parameters with an optimizer of this kind.

    Args:
        make: makes it over groups.
        groups: those of the model; they are left alone.
        sparse: parameters in them that have sparse gradients.
        large: step parameters of the model's own sizes too, as far as these are not above `_LARGE_SIDES`.

    Raises:
        ConfigError: its step needs more than gradients, fails, or keeps what would be lost at a resume.
    """
    of_sparse = {id(p) for p in sparse}
    with kept_random_state():
        behaviour = _tried(make, *_small_groups(groups, of_sparse))
        if large:
            other = _tried(make, *_small_groups(groups, of_sparse, is_capped=True))
            behaviour = dataclasses.replace(behaviour, moves=behaviour.moves | other.moves)
        return behaviour


def _tried(make: Make, small: list[dict[str, Any]], is_sparse: list[bool]) -> Behaviour:
    """As `try_out`, of these parameters."""
    mine = _copies(small)
    first = make([dict(group) for group in mine])
    what = type(first).__name__
    check_step(type(first))
    begun, made, rates = options_of(first), attributes_of(first), _rates(first)
    resumed: list[tuple[torch.optim.Optimizer, list[dict[str, Any]], int]] = []
    counts = False
    for step in range(_STEPS):
        try:
            _steps(first, mine, is_sparse, step, step + 1, rates)
        except Exception as error:
            raise ConfigError(_fails(what, error, any(is_sparse))) from error
        if step + 1 not in _SAVED_AT:
            continue
        theirs = _copies(mine)
        again = make([dict(group) for group in theirs])
        try:
            give_state(again, *state_of(first, begun))
        except Exception as error:
            raise ConfigError(_forgets(what, f": {type(error).__name__}: {error}")) from error
        resumed.append((again, theirs, step + 1))
        counts = counts or any(changed_options(first, begun))
    try:
        state_of(first, begun)  # what it has made in the last steps
        for again, theirs, at in resumed:
            _steps(again, theirs, is_sparse, at, _STEPS, rates)
    except Exception as error:
        raise ConfigError(_forgets(what, f": {type(error).__name__}: {error}")) from error
    _check_rates(make, small, is_sparse, mine, what)
    for again, theirs, _ in resumed:
        if name := differing_attribute(first, again, made):
            raise ConfigError(_forgets(what, f": its attribute {name} is another after a resume"))
        if not _agree(mine, theirs):
            raise ConfigError(_forgets(what, ""))
    if not any(is_sparse):
        _check_closure(make, small, what)  # last: one that draws random numbers was told so above
    return Behaviour(
        _can_be_primed(make, small, is_sparse, mine, first),
        counts or any(changed_options(first, begun)),
        moved_attributes(first, made),
    )


def _check_rates(
    make: Make, small: list[dict[str, Any]], is_sparse: list[bool], stepped: list[dict[str, Any]], what: str
) -> None:
    """Refuse an optimizer whose rate no schedule can set.

    Args:
        stepped: the small parameters after all steps, with the rate set before each.

    Raises:
        ConfigError: it makes other steps where nobody sets its groups' rate, or the same ones at half of it.
    """
    found = []
    for factor in (1.0, 0.5):
        given = _copies(small)
        optimizer = make([dict(group) for group in given])
        rates = _rates(optimizer)
        if not all(isinstance(rate, int | float) and rate for rate in rates):
            return  # `build_optimizer` says what a rate has to be
        for group in optimizer.param_groups:
            group["lr"] *= factor
        try:
            _steps(optimizer, given, is_sparse, 0, _STEPS)
        except Exception:  # at half of the rate; or with a rate that it has made itself
            return
        found.append(given)
        if factor == 1.0 and _rates(optimizer) != rates and not _agree(stepped, given):
            raise ConfigError(
                f"{what} changes the rate of its groups by itself ({rates[0]:g} is {_rates(optimizer)[0]:g} after "
                f"{_STEPS} steps), and gatrain sets it before each step: what it makes of it would be lost. Write "
                "the change as a schedule (schedule=...), and keep further factors in self.state[parameter]."
            )
    moved = any((p - q).abs().max() > 1e-3 for p, q in zip(_listed(small), _listed(found[0]), strict=True))
    if moved and _agree(*found):
        raise ConfigError(
            f"{what} does not use the rate of its groups: it steps as far at half of it. A schedule or a warm-up "
            "would do nothing, and the recorded rate would not be the one in use. Let step() read group['lr']."
        )


def _check_closure(make: Make, small: list[dict[str, Any]], what: str) -> None:
    """Refuse an optimizer that steps differently where it may compute the loss again, as SAM does.

    Raises:
        ConfigError: it does; one that fails is let pass.
    """
    found = []
    for with_closure in (False, True):
        given = _copies(small)
        parameters = _listed(given)

        def gradients(parameters: list[Tensor] = parameters) -> Tensor:
            """Of half of the sum of squares."""
            for p in parameters:
                p.grad = p.detach().clone()
            return torch.stack([p.detach().double().square().sum().cpu() for p in parameters]).sum() / 2

        try:
            gradients()
            with kept_random_state():  # both draw the same
                optimizer: Any = make([dict(group) for group in given])
                optimizer.step(**({"closure": gradients} if with_closure else {}))
        except Exception:
            return
        found.append(given)
    if not _agree(*found):
        raise ConfigError(
            f"{what} takes another step where step() gets a closure: it computes the loss again at other weights, "
            "say, as SAM does. gatrain gives an optimizer the gradient of the whole window, once, so it would "
            "train as the plain one. Use another one, such as optimizer=adamw."
        )


def _rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [group.get("lr") for group in optimizer.param_groups]


def check_step(cls: type[torch.optim.Optimizer]) -> None:
    """Refuse a class whose step needs more than gradients.

    Raises:
        ConfigError: it does.
    """
    what = cls.__name__
    parameters = list(inspect.signature(cls.step).parameters.values())[1:]
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ConfigError(
            f"{what}.step() needs {', '.join(needed)}: it computes the loss several times for one update, or wants "
            "more than gradients. gatrain gives an optimizer the gradient of the whole window, once. Use another "
            "one, such as optimizer=adamw."
        )
    if callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None)):
        raise ConfigError(
            f"{what} keeps one set of weights for training and another for evaluation (methods train and eval): "
            "what gatrain evaluates and saves would be the wrong one. Use another one, such as optimizer=adamw "
            "schedule=wsd."
        )


def _fails(what: str, error: Exception, is_sparse: bool) -> str:
    first = str(error).partition("\n")[0]
    if is_sparse:
        return (
            f"the model gives sparse gradients (sparse=True), and {what} fails on them: {type(error).__name__}: "
            f"{first}. Write sparse=False in the model, or use optimizer=sgd optimizer.weight_decay=0 "
            "optimizer.nesterov=false."
        )
    return (
        f"{what} fails in its step, tried on small parameters with their gradients: {type(error).__name__}: "
        f"{first}. It gets each parameter's gradient in .grad, and nothing else."
    )


def _forgets(what: str, why: str) -> str:
    return (
        f"{what} cannot be resumed exactly{why}. What is saved is its state for each parameter, tensors and "
        "numbers, and the numbers in its groups; tried on small parameters, it keeps more than that (in "
        "attributes, say) or draws random numbers. Use another one, or keep it all in self.state[parameter]."
    )


def _can_be_primed(
    make: Make,
    small: list[dict[str, Any]],
    is_sparse: list[bool],
    wanted: list[dict[str, Any]],
    unprimed: torch.optim.Optimizer,
) -> bool:
    """Whether one that was primed steps the small parameters to what one that was not has made of them, and comes
    to the same state: a copy of the first weights, say, may show in a later step alone."""
    given = _copies(small)
    primed = make([dict(group) for group in given])
    if all(primed.state.get(p) for p in _parameters(primed)):
        return False  # it has its state already
    before, rates = options_of(primed), _rates(primed)
    try:
        prime(primed)
        if changed_options(primed, before) != [{} for _ in before]:
            return False
        _steps(primed, given, is_sparse, 0, _STEPS, rates)
    except Exception:
        return False
    return _agree(wanted, given) and _agree_in_state(unprimed, primed)


# --- what is saved --------------------------------------------------------------------------------------


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each group, copied: some optimizers count and estimate in them."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in _OPEN}
        for group in optimizer.param_groups
    ]


def changed_options(
    optimizer: torch.optim.Optimizer, begun: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each group the options that are not what they were when the optimizer was made."""
    return [
        {
            key: value
            for key, value in group.items()
            if key not in _OPEN and not (key in before and same_value(value, before[key]))
        }
        for group, before in zip(optimizer.param_groups, begun, strict=True)
    ]


def state_of(
    optimizer: torch.optim.Optimizer, begun: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """State of each parameter, in the order of the groups, and the options that changed.

    Raises:
        TypeError: something in it is neither a tensor nor a number, a text or a list of those.
    """
    parameters = _parameters(optimizer)
    known = {id(p) for p in parameters}
    if strange := [key for key in optimizer.state if id(key) not in known]:
        raise TypeError(f"its state has the key {strange[0]!r}, which is no parameter")
    states = [dict(optimizer.state.get(p, {})) for p in parameters]
    options = changed_options(optimizer, begun)
    for values in [*states, *options]:
        for key, value in values.items():
            if not isinstance(key, str) or "/" in key:
                raise TypeError(f"its state has the key {key!r}, where text without '/' is needed")
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise TypeError(f"{key} is a tensor of {value.layout}")
            if not (isinstance(value, Tensor) or is_plain(value)):
                raise TypeError(f"{key} is a {type(value).__name__}")
    return states, options


def give_state(
    optimizer: torch.optim.Optimizer,
    states: Sequence[Mapping[str, Any]],
    options: Sequence[Mapping[str, Any]],
) -> None:
    """Put copies of what `state_of` gave into an optimizer of the same kind."""
    for parameter, values in zip(_parameters(optimizer), states, strict=True):
        for key, value in values.items():
            optimizer.state[parameter][key] = _as_saved(value)
    for group, changed in zip(optimizer.param_groups, options, strict=True):
        group.update({key: _as_saved(value) for key, value in changed.items()})


def _as_saved(value: Any) -> Any:
    """As it comes back from a file: tuples as lists, say."""
    return value.clone() if isinstance(value, Tensor) else json.loads(json.dumps(value))


def is_plain(value: Any) -> bool:
    """A number, truth value, text or None, or a list of those: what JSON keeps."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _agree_in_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    states, others = ([dict(each.state.get(p, {})) for p in _parameters(each)] for each in (one, other))
    return all(
        mine.keys() == theirs.keys() and all(same_value(value, theirs[key]) for key, value in mine.items())
        for mine, theirs in zip(states, others, strict=True)
    )


# --- how much it is -------------------------------------------------------------------------------------


def state_bytes(make: Make, groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Bytes of each tensor of state that an optimizer of this kind keeps for these parameters, without memory.

    It steps parameters without numbers; one that looks at numbers steps small ones, whose state says how it follows
    from a parameter's shape.

    Raises:
        Exception: it fails on small ones too.
    """
    with kept_random_state():
        try:
            return _bytes_on_meta(make, groups)
        except Exception:
            return _bytes_by_shape(make, groups)


def _bytes_on_meta(make: Make, groups: Sequence[Mapping[str, Any]]) -> list[int]:
    empty = [
        {**group, "params": [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]}
        for group in groups
    ]
    optimizer = make([dict(group) for group in empty])
    for parameter in _listed(empty):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return [_bytes(value) for state in optimizer.state.values() for value in _tensors(state)]


def _bytes_by_shape(make: Make, groups: Sequence[Mapping[str, Any]]) -> list[int]:
    small, is_sparse = _small_groups(groups, set(), _LARGE_SIDES)
    given = _copies(small)
    optimizer = make([dict(group) for group in given])
    _steps(optimizer, given, is_sparse, 0, 1)
    found = []
    alike = [{_kind(p, False): p for p in group["params"]} for group in given]
    for group, by_kind in zip(groups, alike, strict=True):
        for parameter in group["params"]:
            like = by_kind[_kind(parameter, False)]
            for value in _tensors(optimizer.state[like]):
                found.append(_numel(value, like, parameter) * value.element_size())
    return found


def _numel(value: Tensor, like: Tensor, parameter: Tensor) -> int:
    if value.numel() == like.numel():
        return parameter.numel()
    real = dict(zip(like.shape, parameter.shape, strict=True))
    return math.prod(real.get(side, side) for side in value.shape)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


# --- small parameters -----------------------------------------------------------------------------------


def _kind(parameter: Tensor, is_sparse: bool) -> tuple[int, torch.dtype, bool]:
    return parameter.dim(), parameter.dtype, is_sparse


def _small_groups(
    groups: Sequence[Mapping[str, Any]],
    sparse: set[int],
    sides: Sequence[int] = _SIDES,
    *,
    is_capped: bool = False,
) -> tuple[list[dict[str, Any]], list[bool]]:
    """For each group one small parameter of each kind in it; and of all in a row whether its gradient is sparse.

    Args:
        is_capped: of the shape of the largest of the kind, as far as its sides are not above `_LARGE_SIDES`.
    """
    small: list[dict[str, Any]] = []
    is_sparse: list[bool] = []
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        kinds: dict[tuple[int, torch.dtype, bool], Tensor] = {}
        for parameter in (
            sorted(group["params"], key=lambda each: -each.numel()) if is_capped else group["params"]
        ):
            kinds.setdefault(_kind(parameter, id(parameter) in sparse), parameter)
        made = []
        for (dims, dtype, has_sparse), like in kinds.items():
            most = (*_LARGE_SIDES, *(2,) * dims)
            capped = (min(side, limit) for side, limit in zip(like.shape, most, strict=False))
            shape = tuple(capped) if is_capped else (*sides, *(2,) * dims)[:dims]
            value = torch.randn(shape, generator=generator).to(dtype)
            made.append(nn.Parameter(value.to("cpu" if like.is_meta else like.device)))
            is_sparse.append(has_sparse)
        small.append({**group, "params": made})
    return small, is_sparse


def _copies(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups]


def _steps(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Mapping[str, Any]],
    is_sparse: Sequence[bool],
    start: int,
    stop: int,
    rates: Sequence[Any] = (),
) -> None:
    """Steps ``start`` to ``stop`` - 1, with the groups' rates set before each where they are given."""
    parameters = _listed(groups)
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(1 + step)
        for parameter, has_sparse in zip(parameters, is_sparse, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.grad = gradient.to_sparse(1) if has_sparse else gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def _listed(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _agree(some: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> bool:
    return all(
        torch.equal(p.detach(), q.detach()) or torch.equal(torch.nan_to_num(p), torch.nan_to_num(q))
        for p, q in zip(_listed(some), _listed(others), strict=True)
    )
