"""What the ready tasks share: calling the user's model factory, and finding the splits in the user's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from gatrain.errors import ConfigError, DataError
from gatrain.tasks.base import Samples, is_deterministic
from gatrain.tasks.streams import Stream
from gatrain.train.order.by_number import reads_by_number

ModelFactory = Callable[[], nn.Module]

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
"""Names of a held-out split in a mapping of splits; the first that is there is used."""


class Part:
    """Map-style dataset: the samples ``start <= index < stop`` of another one, with its traits."""

    def __init__(self, dataset: Samples, start: int, stop: int) -> None:
        self.dataset = dataset
        self.start = start
        self.stop = stop
        self.deterministic = is_deterministic(dataset)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.dataset[self.start + index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        shifted = [self.start + index for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        return list(fetch(shifted)) if fetch is not None else [self.dataset[index] for index in shifted]


def check_factory(model: Any) -> ModelFactory:
    """Refuse anything but a function without arguments that makes the model.

    Raises:
        ConfigError: a finished module, or something that cannot be called.
    """
    if isinstance(model, nn.Module):
        name = type(model).__name__
        raise ConfigError(
            f"model is a finished {name}; give a function that makes it, so that its weights follow from "
            f"the seed: lambda: {name}(...), or in a recipe model: {{_target_: my_module.{name}}}."
        )
    if not callable(model):
        raise ConfigError(f"model={model!r} is not callable. Give a function that returns an nn.Module.")
    return model  # type: ignore[no-any-return]


def make_model(factory: ModelFactory) -> nn.Module:
    """Call the factory and check what it returns.

    Raises:
        ConfigError: it is not an nn.Module.
    """
    model = factory()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model gave a {type(model).__name__}, not a torch.nn.Module. "
            "Its _target_ must be a module class, or a function that returns a module."
        )
    return model


def declared_length(data: Any) -> bool | None:
    """What a data source, or its training samples, says of `gatrain.tasks.Task.variable_length`."""
    for each in (data, getattr(data, "train", None)):
        said = getattr(each, "variable_length", None)
        if said is not None:
            return bool(said)
    return None


def find_splits(data: Any, eval_fraction: float = 0.0) -> tuple[Samples, Samples | None]:
    """The training and the held-out samples of a data source, or of a plain dataset.

    Args:
        data: an object with ``train`` and perhaps ``eval``, a mapping of splits (``train`` and, to hold out, one
            of `HELD_OUT_SPLITS`), or a map-style dataset.
        eval_fraction: of a plain dataset, the share at its end that is held out.

    Raises:
        ConfigError: neither of these; an iterable dataset; a fraction that does not apply.
        DataError: nothing to train on.
    """
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"task.eval_fraction={eval_fraction} is not at least 0 and below 1. Try 0.1.")
    if _is_mapping_of_splits(data):
        data = _named_splits(data, eval_fraction)
    held_out: Samples | None = None
    if hasattr(data, "train") and not hasattr(data, "__getitem__"):
        if eval_fraction:
            raise ConfigError(
                f"task.eval_fraction={eval_fraction} applies to a plain dataset, but {type(data).__name__} "
                "brings its own splits. Remove task.eval_fraction, or set data.eval_fraction if the data "
                "has it."
            )
        train = map_style(data.train, f"{type(data).__name__}.train")
        held_out = getattr(data, "eval", None)
        if held_out is not None:
            held_out = map_style(held_out, f"{type(data).__name__}.eval")
            if not isinstance(held_out, Stream) and len(held_out) == 0:
                held_out = None
    else:
        train = map_style(data, "data")
        if eval_fraction and isinstance(train, Stream):
            raise ConfigError(
                f"task.eval_fraction={eval_fraction} is a share of all samples, and a stream does not tell how "
                "many it has. Give an object with train and eval, each a stream or a dataset."
            )
        if eval_fraction:
            total = len(train)
            cut = round(total * (1 - eval_fraction))
            whole = train
            train = Part(whole, 0, cut)
            held_out = Part(whole, cut, total) if cut < total else None
    if not isinstance(train, Stream) and len(train) == 0:
        raise DataError("the training data has no samples. Check data.path, or use a smaller eval_fraction.")
    return train, held_out


def _is_mapping_of_splits(data: Any) -> bool:
    return isinstance(data, Mapping) and any(isinstance(key, str) for key in data)


def _named_splits(data: Mapping[Any, Any], eval_fraction: float) -> Any:
    """A mapping of splits, such as a DatasetDict, as a source with ``train`` and ``eval``, or its ``train`` alone
    where a part of that is to be held out.

    Raises:
        ConfigError: it has no ``train``.
    """
    name, splits = type(data).__name__, ", ".join(repr(split) for split in data)
    if "train" not in data:
        raise ConfigError(
            f"data is a {name} with the splits {splits or '(none)'}, but gatrain trains on 'train'. Give one "
            f"split, such as data[{next(iter(data), 'train')!r}], or an object with train and eval."
        )
    held_out = next((split for split in HELD_OUT_SPLITS if split in data), None)
    if held_out is None:
        return data["train"]
    if eval_fraction:
        raise ConfigError(
            f"task.eval_fraction={eval_fraction} applies to a plain dataset, but the {name} brings "
            f"{held_out!r}. Remove task.eval_fraction, or give data['train'] alone."
        )
    return SimpleNamespace(train=data["train"], eval=data[held_out])


def map_style(dataset: Any, name: str) -> Samples:
    """What can be read by index, as it is; a stream as its first samples (`gatrain.tasks.streams.Stream`).

    Raises:
        ConfigError: says what a dataset needs.
    """
    if _is_mapping_of_splits(dataset):
        raise ConfigError(
            f"{name} is a {type(dataset).__name__} with the splits {', '.join(map(repr, dataset))}, not a "
            "dataset of samples. Give one of them, such as data['train']."
        )
    if reads_by_number(dataset):
        return dataset  # type: ignore[no-any-return]
    if hasattr(dataset, "__iter__"):
        return Stream(dataset, name)
    raise ConfigError(
        f"{name} is a {type(dataset).__name__}. Give a dataset with __len__ and __getitem__, a stream (an "
        "IterableDataset, or any object with __iter__), or an object whose `train` is one."
    )
