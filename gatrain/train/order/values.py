"""One number for each sample (weights, lengths): from a list, a file, an attribute of the data or a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gatrain.errors import ConfigError

Values = npt.NDArray[np.float64]


def check_whole(key: str, value: Any, example: int) -> None:
    """
    Args:
        example: what the message writes out; ``1e3`` is no whole number to YAML.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}={value!r} is not a whole number. Write it out: {key}={example}.")
    if value < 1:
        raise ConfigError(f"{key}={value} is below 1, the smallest value allowed.")


def values_of(data: Any, given: Any, where: str) -> Values:
    """Read them.

    Args:
        data: the training samples; a part of a dataset takes its part of the dataset's attribute.
        given: numbers; the path of a file (``.npy``, or text with a number on each line); the name of an attribute
            of the data, dots allowed, that holds numbers or gives them when it is called; or a function that is
            called with the data (``{_target_: my_module.my_function, _partial_: true}``).
        where: the key, for messages.

    Raises:
        ConfigError: there are none, not one for each sample, or negative ones.
    """
    found = _numbers(data, given, where)
    if found.shape != (len(data),):
        raise ConfigError(f"{where}={_shown(given)} gives {found.size} numbers for {len(data)} samples.")
    if len(found) and not (np.isfinite(found).all() and found.min() >= 0):
        wrong = int(np.argmin(np.where(np.isfinite(found), found, -np.inf)))
        raise ConfigError(
            f"{where}={_shown(given)} gives {found[wrong]:g} for the sample {wrong}; 0 or more is allowed."
        )
    return found


def _numbers(data: Any, given: Any, where: str) -> Values:
    try:
        if not isinstance(given, str):
            return _array(given(data) if callable(given) else given)
        path = Path(given).expanduser()
        if path.is_file():
            loaded = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
            return _array(loaded)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where}={_shown(given)} cannot be read: {type(error).__name__}: {error}"
        ) from error
    found = _attribute(data, given.split("."))
    if found is None:
        raise ConfigError(
            f"{where}={given} is neither a file here nor an attribute of the training data "
            f"({type(data).__name__}). Give a file with a number for each sample (.npy, or text with one on each "
            f"line), or let the dataset have the attribute {given!r}."
        )
    return found


def _attribute(data: Any, names: list[str]) -> Values | None:
    value: Any = data
    for name in names:
        value = getattr(value, name, None)
        if value is None:
            break
    if value is not None:
        return _array(value() if isinstance(value, Callable) else value)  # type: ignore[arg-type]
    inner = getattr(data, "dataset", None)  # a part of another dataset, by range or by indices
    if inner is None or (whole := _attribute(inner, names)) is None:
        return None
    if hasattr(data, "indices"):
        return whole[np.asarray(data.indices, dtype=np.int64)]
    if hasattr(data, "start") and hasattr(data, "stop"):
        return whole[data.start : data.stop]
    return whole


def _array(value: Any) -> Values:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def _shown(given: Any) -> str:
    return given if isinstance(given, str) else f"<{type(given).__name__}>"
