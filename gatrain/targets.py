"""The one door for `_target_`: from a dotted name to an object that may be called, or a refusal that says why.

A recipe is the user's own, but recipes are shared, and a run folder's config.yaml is read again by every resume. So
a configuration may call the user's modules and installed packages, and nothing that runs programs, unpickles,
downloads or deletes. What counts is the object that a name resolves to, however it is reached: through other
modules, aliases, decorators, partials, methods. Each is judged before it is called, and what is refused by its
name alone is not even imported. ``--trust NAME`` is the only way past (`gatrain.trust`).

This is no sandbox: an installed package may do harm through a function that looks harmless. It closes the doors
that are known, and the tables of `gatrain.target_rules` say which.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gatrain import doors, imports, target_rules, trust
from gatrain.errors import ConfigError, nearest

BY_NAME = frozenset(
    f"hydra.utils.{name}" for name in ("get_class", "get_method", "get_static_method", "get_object")
)
"""Give what their ``path`` names, uncalled; here that goes through the same door."""

_STDLIB_FOLDERS = tuple(
    {str(Path(sysconfig.get_paths()[key]).resolve()) for key in ("stdlib", "platstdlib")}
    | {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")}
)
_INSTALLED = ("site-packages", "dist-packages")


def admit(path: str, node: dict[str, Any]) -> Any:
    """The object that a node names, if it may be called with the node's arguments.

    Args:
        path: the node's key, such as ``model``.
        node: the mapping with ``_target_``.

    Raises:
        ConfigError: it does not import, or is refused.
    """
    dotted = node.get("_target_")
    if not isinstance(dotted, str):
        raise ConfigError(f"{path}._target_ is {dotted!r}, not the dotted name of a class or function.")
    if dotted in BY_NAME:
        named = node.get("path", (node.get("_args_") or [None])[0])
        return functools.partial(_given, locate(path, str(named)))
    target = locate(path, dotted, node)
    if why := _refused_arguments(dotted, target, node):
        _refuse(path, dotted, _names_of(target), why)
    return target


def _given(target: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of Hydra's look-up, whose answer has been found already."""
    return target


def nodes(path: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_` in nested configuration, with its dotted path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from nodes(f"{path}.{key}", value)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from nodes(f"{path}[{index}]", value)


def check_name(path: str, dotted: str, cwd: Path | None = None) -> None:
    """Refuse what the name alone tells; imports nothing.

    Args:
        path: the key that names it.
        dotted: the name.
        cwd: folder whose modules will be importable where it is called, if they are not here.

    Raises:
        ConfigError: it is no dotted name, or one of those that are refused.
    """
    parts = dotted.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{path}._target_={dotted!r} is not a dotted name, such as my_module.MyClass.")
    if len(parts) < 2:
        raise ConfigError(f"{path}._target_={dotted!r} has no module. Write it as my_module.{dotted}.")
    if dotted in BY_NAME or dotted in trust.names():
        return
    for part in parts:
        if part.startswith("_"):
            _refuse(path, dotted, [], f"{part!r} is a private name")
    if cwd is not None and ((cwd / parts[0]).is_dir() or (cwd / f"{parts[0]}.py").is_file()):
        return  # the user's, most likely: where it is imported, it is known
    if not _is_users(parts[0]) and (why_not := target_rules.refusal(dotted)) is not None:
        _refuse(path, dotted, [], why_not)
    if _is_stdlib(parts[0]):
        why = f"{parts[0]} belongs to Python's standard library"
        if any((Path.cwd() / name).exists() for name in (f"{parts[0]}.py", f"{parts[0]}/__init__.py")):
            why += f" and hides your {parts[0]}.py of the same name (rename that)"
        _refuse(path, dotted, [], why)


def locate(path: str, dotted: str, node: dict[str, Any] | None = None) -> Any:
    """Import a dotted name that may be called.

    Args:
        path: the key that names it, such as ``model``.
        dotted: the name.
        node: its arguments, where it is to be called with them.

    Raises:
        ConfigError: the module or the attribute does not exist (names the nearest), or it is refused.
    """
    check_name(path, dotted)
    trusted = dotted in trust.names()
    module, rest = _import(path, dotted)
    found: Any = module
    for depth, name in enumerate(rest):
        found = _attribute(path, dotted, found, name, ".".join([module.__name__, *rest[:depth]]))
        if isinstance(found, types.ModuleType) and not trusted:  # before anything of it is touched
            resolved = ".".join([found.__name__, *rest[depth + 1 :]])
            if resolved not in trust.names() and (why := _refused_name(resolved, is_module=True)):
                _refuse(path, dotted, [resolved], why)
    names = _names_of(found)
    if trusted or any(name in trust.names() for name in names):
        return found
    if isinstance(found, types.ModuleType):
        raise ConfigError(f"{path}._target_={dotted} is a module, not a class or function.")
    for name in names:
        if name == "torch.serialization.load" and node is not None and _loads_weights_only(node):
            continue
        if why := _refused_name(name):
            _refuse(path, dotted, names, why)
    if not isinstance(found, type):
        for name in (dotted, *names):
            module_name, _, function = name.rpartition(".")
            if target_rules.is_kept(name) or not _is_installed(name.partition(".")[0]):
                continue
            if target_rules.does_more(function):
                _refuse(
                    path, dotted, names, f"{function!r} of {module_name} does more than compute, by its name"
                )
    return found


def _attribute(path: str, dotted: str, owner: Any, name: str, where: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ConfigError(
            f"{path}._target_={dotted} does not import: {where}{imports.hiding(owner)} has no {name!r}."
            f"{nearest(name, [n for n in dir(owner) if not n.startswith('_')])}"
        ) from None
    except Exception as error:  # a package that imports its parts when they are asked for
        text = f"importing {name} of {where} failed: {type(error).__name__}: {error}"
        raise ConfigError(f"{path}._target_={dotted}: {text}") from error


def _import(path: str, dotted: str) -> tuple[types.ModuleType, list[str]]:
    """The longest beginning that is a module, and the other parts."""
    parts, missing = dotted.split("."), ""
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            return importlib.import_module(name), parts[length:]
        except ModuleNotFoundError as error:
            # only "this very module is not there" lets us look further up; a failing import inside it is the news
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(f"{path}._target_={dotted}: importing {name} failed: {error}") from error
            missing = error.name
        except Exception as error:
            raise ConfigError(
                f"{path}._target_={dotted}: importing {name} failed: {type(error).__name__}: {error}"
            ) from error
    raise ConfigError(
        f"{path}._target_={dotted} does not import: there is no module {missing!r} on the Python path, "
        "which includes the folder where gatrain was started."
    )


def _refuse(path: str, dotted: str, names: list[str], why: str) -> None:
    resolved = next((name for name in names if name != dotted), None)
    resolves = f" resolves to {resolved} and" if resolved else ""
    raise ConfigError(
        f"{path}._target_={dotted}{resolves} is refused: {why}. A configuration may call your own modules and "
        "installed packages, but nothing that runs programs, unpickles, downloads or deletes. Wrap what you need "
        f"in a function of your own, or, if you know what it does, add {trust.OPTION} {dotted} to the command."
    )


# --- what an object is ----------------------------------------------------------------------------------


def _names_of(target: Any) -> list[str]:
    """The dotted names under which the object, and all that would be called with it, was defined."""
    return list(dict.fromkeys(_walk(target, set())))


def _walk(target: Any, seen: set[int]) -> Iterator[str]:
    if id(target) in seen or len(seen) > 100:
        return
    seen.add(id(target))
    if isinstance(target, types.ModuleType):
        yield target.__name__
    elif isinstance(target, functools.partial):
        for each in (target.func, *target.args, *target.keywords.values()):
            if callable(each):
                yield from _walk(each, seen)
    elif isinstance(target, types.MethodType):
        yield from _walk(target.__func__, seen)
        owner = target.__self__
        yield from _walk(owner if isinstance(owner, type) else type(owner), seen)
    elif isinstance(target, type):
        yield f"{target.__module__}.{target.__qualname__}"
    elif isinstance(target, types.FunctionType):
        yield from _of_function(target, seen)
    elif isinstance(target, types.BuiltinFunctionType):
        yield from _of_builtin(target)
    elif (owner := getattr(target, "__objclass__", None)) is not None:
        yield f"{owner.__module__}.{owner.__qualname__}.{getattr(target, '__name__', '')}"
    elif (origin := getattr(target, "__origin__", None)) is not None and callable(origin):
        yield from _walk(origin, seen)
    else:
        yield from _of_instance(target, seen)


def _of_function(target: types.FunctionType, seen: set[int]) -> Iterator[str]:
    yield f"{target.__module__}.{target.__qualname__}"
    wrapped = vars(target).get("__wrapped__")
    if wrapped is not None:  # the decorator itself may be anybody's
        yield from _walk(wrapped, seen)
    elif (home := target.__globals__.get("__name__")) not in (None, target.__module__):
        yield f"{home}.{target.__qualname__}"


def _of_builtin(target: types.BuiltinFunctionType) -> Iterator[str]:
    owner, name = target.__self__, target.__name__
    if isinstance(owner, types.ModuleType):
        home = target.__module__ if isinstance(target.__module__, str) else owner.__name__
        yield f"{home}.{name}"
        if owner.__name__ != home:
            yield f"{owner.__name__}.{name}"
    elif owner is not None:
        cls = owner if isinstance(owner, type) else type(owner)
        if cls.__qualname__.startswith(
            "_VariableFunctions"
        ):  # of torch, which has named their home in many ways
            yield f"torch._VariableFunctionsClass.{name}"
            return
        yield f"{cls.__module__}.{cls.__qualname__}.{name}"
    else:
        yield f"{target.__module__}.{target.__qualname__}"


def _of_instance(target: Any, seen: set[int]) -> Iterator[str]:
    """An object with ``__call__``: what it wraps, or what it says of itself, or its class."""
    wrapped = inspect.getattr_static(target, "__wrapped__", None) or getattr(target, "__wrapped__", None)
    module, qualname = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if isinstance(module, str) and isinstance(qualname, str):
        yield f"{module}.{qualname}"
    if callable(wrapped):
        yield from _walk(wrapped, seen)
    if not callable(wrapped) and not isinstance(qualname, str):
        yield from _walk(type(target), seen)


# --- what is refused ------------------------------------------------------------------------------------


def _refused_name(name: str, *, is_module: bool = False) -> str | None:
    top = name.partition(".")[0]
    if _is_stdlib(top):
        return f"{top} belongs to Python's standard library"
    if top == "gatrain":
        if name in target_rules.PUBLIC or doors.is_shipped(name) or is_module:
            return None
        return "of gatrain itself recipes may name its models, data sources and tasks: " + ", ".join(
            sorted(public.rpartition(".")[2] for public in target_rules.PUBLIC)
        )
    if _is_users(top):
        return None
    if (why := target_rules.refusal(name)) is not None:
        return why
    if top in ("keras", "tf_keras", "tensorflow") and name.endswith(".from_config"):
        return target_rules.RUNS
    return None if is_module else target_rules.foreign(name)


def _loads_weights_only(node: dict[str, Any]) -> bool:
    """PyTorch's own reader of tensors, asked for by name: no variable of the environment changes its mind."""
    return (
        node.get("weights_only") is True and "pickle_module" not in node and len(node.get("_args_") or []) < 3
    )


def _refused_arguments(dotted: str, target: Any, node: dict[str, Any]) -> str | None:
    """What makes an admitted function run, unpickle or fetch after all."""
    names = {dotted, *_names_of(target)}
    if names & set(trust.names()):
        return None
    args = node.get("_args_") or []
    kwargs = {key: value for key, value in node.items() if key not in ("_target_", "_args_")}
    for key, value in _pairs(node):
        if key in ("trust_remote_code", "custom_pipeline") and _is_on(value):
            return f"{key}={value} runs code that others chose"
        if key == "allow_pickle" and _is_on(value):
            return f"with allow_pickle={value} {target_rules.READS}"
        if key == "weights_only" and not _is_on(value):
            return f"with weights_only={value} {target_rules.READS}"
        if isinstance(value, str) and value.lstrip().startswith("pipe:"):
            return f"{value.split()[0]}... runs a program"
        if (
            isinstance(value, dict)
            and {"class_name", "module"} <= value.keys()
            and dotted.startswith("keras")
        ):
            return "class_name with module lets Keras call any function"
    if dotted.startswith(("numpy.", "pandas.")) and any(
        isinstance(value, str) and re.match(r"\s*[a-z0-9+]+://", value) for _, value in _pairs(node)
    ):
        return target_rules.FETCHES
    if "numpy.load" in names and len(args) > 2 and _is_on(args[2]):
        return f"with allow_pickle={args[2]} {target_rules.READS}"
    if "datasets.load.load_dataset" in names and (args or [kwargs.get("path")])[0] == "pandas":
        return f"with path=pandas {target_rules.READS}"
    if "h5py._hl.files.File" in names and (args[1:2] or [kwargs.get("mode", "r")])[0] not in ("r", None):
        return "with a mode other than 'r' it writes files"
    return None


def _pairs(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    yield key, node
    if isinstance(node, dict):
        for name, value in node.items():
            if not (isinstance(value, dict) and "_target_" in value):  # judged by itself
                yield from _pairs(value, str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            if not (isinstance(value, dict) and "_target_" in value):
                yield from _pairs(value, key)


def _is_on(value: Any) -> bool:
    return value is not None and str(value).lower() not in ("false", "0", "no", "off", "none", "null", "")


@functools.cache
def _is_stdlib(top: str) -> bool:
    """Whether a top-level name is Python's own; a user's module that comes before it on the path is not."""
    if top in sys.builtin_module_names or top in ("builtins", "__main__"):
        return top != "__main__"
    origin = _origin(top)
    if origin is None:
        return top in sys.stdlib_module_names
    if origin in ("built-in", "frozen"):
        return True
    return origin.startswith(_STDLIB_FOLDERS) and not any(part in Path(origin).parts for part in _INSTALLED)


@functools.cache
def _is_installed(top: str) -> bool:
    origin = _origin(top)
    return origin is not None and any(part in Path(origin).parts for part in _INSTALLED) and top != "torch"


@functools.cache
def _is_users(top: str) -> bool:
    """Whether a top-level module is the user's own work, although a package may have the same name."""
    origin = _origin(top)
    if (
        origin is None
        or top == "gatrain"
        or _is_stdlib(top)
        or any(p in Path(origin).parts for p in _INSTALLED)
    ):
        return False
    if Path(origin).is_relative_to(Path.cwd()):
        return True
    try:
        importlib.metadata.distribution(top)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return True
    return False  # a package that is installed from its sources


def _origin(top: str) -> str | None:
    """File of a top-level module, found without importing it."""
    module = sys.modules.get(top)
    found = getattr(module, "__file__", None)
    if isinstance(found, str):
        return found
    spec = None
    for find in (importlib.machinery.PathFinder.find_spec, importlib.util.find_spec):
        with contextlib.suppress(Exception):  # finders that packages have put there may do anything
            spec = spec or find(top)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    return spec.origin or (folders[0] if folders else None)
