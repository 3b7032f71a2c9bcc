"""What a callable certainly takes, and what only its call can tell.

`inspect.signature` describes what a decorated function wraps, or what an object says of itself, not what it
accepts. Here a plain Python function is believed and nothing else: in doubt the call decides.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Set
from typing import Any

from gatrain.errors import nearest, typed_key

Parameters = dict[str, inspect.Parameter]


def certain_parameters(target: Callable[..., Any]) -> Parameters | None:
    """Parameters of what is called first with the arguments; None where that cannot be told."""
    if isinstance(target, functools._lru_cache_wrapper):
        return certain_parameters(target.__wrapped__)
    if isinstance(target, functools.partial):
        inner = certain_parameters(target.func)
        if inner is None or target.args:
            return None
        given = {name: each.replace(default=None) for name, each in inner.items() if name in target.keywords}
        return {**inner, **given}
    if isinstance(target, types.FunctionType):
        return _of_function(target)
    if isinstance(target, types.MethodType):
        return _without_first(target.__func__)
    if isinstance(target, type):
        return _of_class(target)
    return _without_first(inspect.getattr_static(type(target), "__call__", None))


def believed_parameters(target: Callable[..., Any]) -> Parameters | None:
    """What the callable says of itself, through its decorators."""
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None


def mistake(
    path: str, dotted: str, parameters: Parameters, given: Set[str], extra: Set[str], *, complete: bool = True
) -> str | None:
    """What is wrong with these keywords, as a message; None if nothing is.

    Args:
        path: the node's key, such as ``model``.
        dotted: its ``_target_``.
        given: the keywords of the node.
        extra: keywords that gatrain adds.
        complete: whether required arguments must be among them.
    """
    kinds = {parameter.kind for parameter in parameters.values()}
    named = {
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in sorted(given - named):
            allowed = ", ".join(sorted(named - extra)) or "none"
            return (
                f"{path}.{name} is not an argument of {dotted} (it has: {allowed})."
                f"{nearest(name, named - extra)}"
            )
    for name in parameters if complete else ():
        if (
            name in named
            and parameters[name].default is inspect.Parameter.empty
            and name not in given | extra
        ):
            return (
                f"{path}: {dotted} needs the argument {name!r}. Add {path}.{name}=... "
                f"(+{typed_key(path)}.{name}=... on the command line)."
            )
    return None


def _of_function(function: types.FunctionType) -> Parameters:
    # a copy has neither __wrapped__ nor __signature__, which say what somebody else takes
    bare = types.FunctionType(
        function.__code__, {}, function.__name__, function.__defaults__, function.__closure__
    )
    bare.__kwdefaults__ = function.__kwdefaults__
    return dict(inspect.signature(bare).parameters)


def _without_first(function: Any) -> Parameters | None:
    if not isinstance(function, types.FunctionType):
        return None
    found = list(_of_function(function).items())
    if found and found[0][1].kind is not inspect.Parameter.VAR_POSITIONAL:
        found = found[1:]
    return dict(found)


def _of_class(cls: type) -> Parameters | None:
    if type(cls).__call__ is not type.__call__:
        return None  # a metaclass may do anything with them
    made, begun = (inspect.getattr_static(cls, name) for name in ("__new__", "__init__"))
    made = made.__func__ if isinstance(made, staticmethod) else made
    if made is object.__new__:
        return {} if begun is object.__init__ else _without_first(begun)
    if begun is object.__init__:
        return _without_first(made)
    return None  # what __new__ returns need not be of this class
