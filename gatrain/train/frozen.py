"""A model without chance, otherwise as it trains: so that a batch can be compared with its pieces.

Dropout draws one mask for a whole batch and others for its pieces: their losses differ, and nothing is wrong.
Here every random number is a constant that does not depend on the shape of the batch. That is done where all
random numbers pass, at the operators of ATen: dropout as a module, as a function, inside attention or an LSTM,
drop path, noise and random masks are all the same there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

MIDDLE = 0.5
"""What stands for a number drawn from [0, 1): it keeps what is dropped with less than even chance."""
DEVIATIONS = 0.5
"""A normal number lies this far above its mean; at the mean itself, noise and the scale of it would vanish."""

_DROPPING = ("dropout", "droppath", "drop_path", "stochasticdepth", "dropblock")


@contextlib.contextmanager
def frozen_randomness(model: nn.Module) -> Iterator[None]:
    """Context in which ``model`` computes in training mode but draws no random numbers.

    Dropout and drop path pass everything on; ``torch.rand`` and its like give 0.5, ``randn`` 0.5,
    ``bernoulli(p)`` gives p, ``randint`` the middle of its range, ``randperm`` each place's neighbour: with the
    identity a model that pairs samples at random would pair each with itself. Works under autograd
    (keep the backward inside: checkpointed layers are computed again there) and under autocast; not for code that
    is compiled already. Draws of Python's and NumPy's generators are not seen: seed them alike for what is to be
    compared.
    """
    dropping = [module for module in model.modules() if module.training and _drops(module)]
    recurrent = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    for module in dropping:
        module.training = False
    for module, _ in recurrent:
        module.dropout = 0.0
    try:
        with _Constants():  # type: ignore[no-untyped-call]
            yield
    finally:
        for module in dropping:
            module.training = True
        for module, dropout in recurrent:
            module.dropout = dropout


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or any(word in type(module).__name__.lower() for word in _DROPPING)


class _Constants(TorchDispatchMode):
    """Gives constants where an operator would draw."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None:  # a higher-order operator
            return func(*args, **kwargs)
        name = schema.name.removeprefix("aten::")
        into = any(argument.is_out for argument in schema.arguments)
        if (call := _INSTEAD.get(name)) is not None and not into:
            return call(func, _named(schema, args, kwargs))
        for argument in schema.arguments:
            if argument.name == "dropout_p":  # attention, ATen's or a library's, and its backward
                return _with(func, args, kwargs, dropout_p=0.0)
        if (constant := _CONSTANT.get(name.removesuffix("_"))) is not None:
            return _filled(func(*args, **kwargs), constant(_named(schema, args, kwargs)))
        return func(*args, **kwargs)


def _named(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, with its defaults."""
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update(zip((a.name for a in schema.arguments), args, strict=False))
    return {**found, **kwargs}


def _with(func: Any, args: Sequence[Any], kwargs: dict[str, Any], **changed: Any) -> Any:
    """Call with some arguments replaced, wherever they were given."""
    names = [argument.name for argument in func._schema.arguments]
    positional = [changed.get(name, value) for name, value in zip(names, args, strict=False)]
    later = {name: value for name, value in changed.items() if name in names[len(args) :]}
    return func(*positional, **{**kwargs, **later})


def _filled(drawn: Any, constant: Tensor | float) -> Any:
    """``drawn`` with its numbers overwritten, in place: it has the right shape, type and device already."""
    if not isinstance(drawn, Tensor) or drawn.is_meta:
        return drawn
    if not (drawn.is_floating_point() or drawn.is_complex()):  # 0.9 must not become 0
        constant = constant.round() if isinstance(constant, Tensor) else math.floor(constant + 0.5)
    return drawn.copy_(constant) if isinstance(constant, Tensor) else drawn.fill_(constant)


def _uniform(given: dict[str, Any]) -> float:
    return float(given["from"] + MIDDLE * (given["to"] - given["from"]))


def _normal(given: dict[str, Any]) -> Any:
    return given.get("mean", 0.0) + DEVIATIONS * given.get("std", 1.0)


def _probability(given: dict[str, Any]) -> Any:
    probability = given.get("p")
    return given["self"].clone() if probability is None else probability


def _whole_number(given: dict[str, Any]) -> int:
    """Middle of ``[low, high)`` or ``[from, to)``."""
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    return int(low if high is None else (low + high - 1) // 2)


_CONSTANT: dict[str, Callable[[dict[str, Any]], Tensor | float]] = {
    "rand": lambda given: MIDDLE,
    "rand_like": lambda given: MIDDLE,
    "randn": lambda given: DEVIATIONS,
    "randn_like": lambda given: DEVIATIONS,
    "randint": _whole_number,
    "randint_like": _whole_number,
    "random": _whole_number,
    "randperm": lambda given: torch.arange(given["n"]).roll(1),
    "bernoulli": _probability,
    "uniform": _uniform,
    "normal": _normal,
    "normal_functional": _normal,
    "log_normal": lambda given: math.exp(given["mean"]),
    "exponential": lambda given: 1 / given["lambd"],
    "geometric": lambda given: max(1.0, round(1 / given["p"])),
    "cauchy": lambda given: given["median"] + DEVIATIONS * given["sigma"],
    "poisson": lambda given: given["self"],
    "binomial": lambda given: given["count"] * given["prob"],
    "_standard_gamma": lambda given: given["self"],
    "_sample_dirichlet": lambda given: given["self"] / given["self"].sum(-1, keepdim=True),
}
"""The constant of each operator that draws, by its name without the underscore of the form in place."""


def _no_dropout(func: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)


def _no_dropout_backward(func: Any, given: dict[str, Any]) -> Tensor:
    gradient: Tensor = given["grad_output"]
    return gradient.clone()  # without the scale of what was kept


def _likeliest(func: Any, given: dict[str, Any]) -> Tensor:
    weights: Tensor = given["self"]
    count: int = given["num_samples"]
    if given["replacement"]:
        return weights.argmax(-1, keepdim=True).expand(*weights.shape[:-1], count).contiguous()
    return _sorted(weights, -1, True)[1][..., :count]


def _mean_slope(func: Any, given: dict[str, Any]) -> Any:
    return func(**{**given, "training": False})


def _stable_sort(func: Any, given: dict[str, Any]) -> Any:
    """Random orders are sorts of random numbers: equal ones must keep their places, whatever the shape. Where all
    are equal their order is the one that stands for a random one."""
    return _sorted(given["self"], given.get("dim", -1), bool(given.get("descending", False)))


def _sorted(values: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    found, places = torch.ops.aten.sort.stable(values, stable=True, dim=dim, descending=descending)
    if not values.dim() or not values.numel():
        return found, places
    is_tie = found.select(dim, 0).eq(found.select(dim, -1)).unsqueeze(dim)
    return found, torch.where(is_tie, places.roll(1, dim), places)


_INSTEAD: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "native_dropout": _no_dropout,
    "native_dropout_backward": _no_dropout_backward,
    "multinomial": _likeliest,
    "rrelu_with_noise": _mean_slope,
    "rrelu_with_noise_": _mean_slope,
    "rrelu_with_noise_functional": _mean_slope,
    "rrelu_with_noise_backward": _mean_slope,
    "sort": _stable_sort,
    "_cudnn_rnn": lambda func, given: func(**{**given, "dropout": 0.0}),
    "_cudnn_rnn_backward": lambda func, given: func(**{**given, "dropout": 0.0}),
}
"""Operators that are computed in another way."""
