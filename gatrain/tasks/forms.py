"""The forms that batches and model outputs come in: pairs, mappings, dataclasses, objects with named fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gatrain.errors import ConfigError

TARGET_NAMES = frozenset({"y", "label", "labels", "target", "targets"})
_FURTHER_LOSSES = ("loss", "aux", "router")
"""Parts of the names under which models return what should add to the loss."""


def fields_of(value: Any) -> dict[Any, Any] | None:
    """Entries of a mapping, named tuple, tuple, list or object, by name or position; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        return None
    found = {name: each for name, each in vars(value).items() if not name.startswith("_")}
    if "logits" not in found and hasattr(value, "logits"):
        found["logits"] = value.logits
    return found


def chosen(value: Any, key: str | int, setting: str, what: str) -> Any:
    """One entry of a batch or an output.

    Raises:
        ConfigError: there is none of that name.
    """
    entries = fields_of(value) or {}
    for name in (key, int(key) if isinstance(key, str) and key.isdigit() else key):
        if name in entries:
            return entries[name]
    raise ConfigError(f"{setting}={key}, but {what} {shown(value)}.")


def scores_of(outputs: Any, choice: str | int | None, task: str) -> Tensor:
    """The one tensor of a model's outputs that a loss compares with the targets.

    It is the output itself, its ``logits``, or its only tensor; ``choice`` names it where there are several.

    Raises:
        ConfigError: it cannot be told, or the model returns a further loss that would be left out.
    """
    if isinstance(outputs, Tensor) and choice is None:
        return outputs
    if choice is not None:
        found = chosen(outputs, choice, "task.output", "the model returns")
        if isinstance(found, Tensor):
            return found
        raise ConfigError(f"task.output={choice} is a {type(found).__name__}, not a tensor.")
    entries = {name: each for name, each in (fields_of(outputs) or {}).items() if _has_tensor(each)}
    further = [name for name in entries if isinstance(name, str) and _is_further_loss(name)]
    if further:
        raise ConfigError(
            f"the model returns {shown(outputs)}, and task={task} would train without {', '.join(further)}. Switch "
            "that off in the model (aux_logits=false, output_router_logits=false, no labels in its inputs), or set "
            "task.output to the name of the tensor to train on, or write a task of your own: its loss_sum(model, "
            "batch) returns the sum of all losses and the weight."
        )
    scores = entries.get("logits")
    if scores is None and len(entries) == 1:
        scores = next(iter(entries.values()))
    if isinstance(scores, Tensor):
        return scores
    first = next((name for name, each in entries.items() if isinstance(each, Tensor)), 0)
    raise ConfigError(
        f"the model returns {shown(outputs)}, but task={task} needs one tensor, or an output with logits. Name the "
        f"one to train on (+task.output={first}), or write a task of your own: class MyTask(gatrain.tasks.Task)."
    )


def pair_of(batch: Any, inputs: str | int | None, targets: str | int | None) -> tuple[Any, Any]:
    """(inputs, targets) of a batch.

    Raises:
        ConfigError: it has another form, or does not tell which is which.
    """
    if inputs is not None and targets is not None:
        return tuple(  # type: ignore[return-value]
            chosen(batch, key, f"task.{name}", "a batch is")
            for name, key in (("inputs", inputs), ("targets", targets))
        )
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    entries = fields_of(batch) or {}
    named = [name for name in entries if isinstance(name, str)]
    if "input_ids" in entries or "pixel_values" in entries:
        remedy = "Use task=huggingface, which calls the model with these names"
    elif named:
        ours = [name for name in named if name.lower() in TARGET_NAMES]
        if len(named) == 2 and len(ours) == 1:
            other = next(name for name in named if name != ours[0])
            return entries[other], entries[ours[0]]
        remedy = f"Name the two, such as +task.inputs={named[0]} +task.targets={(ours or named)[-1]}"
    elif len(entries) > 2:
        remedy = "Name the two, such as +task.inputs=0 +task.targets=1"
    else:
        remedy = "Let the dataset return such pairs"
    raise ConfigError(
        f"a batch is {shown(batch)}, but task=supervised needs (inputs, targets). {remedy}, or write a task: class "
        "MyTask(gatrain.tasks.Task)."
    )


def shown(value: Any) -> str:
    """A value in words: its type and its entries."""
    entries = fields_of(value)
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if not entries:
        return f"a {kind}"
    if isinstance(value, list) and not any(isinstance(each, Tensor) for each in value):
        return f"a list of {len(value)}"
    parts = [
        f"{name}: {list(each.shape)}" if isinstance(each, Tensor) else f"{name}: {_kind_of(each)}"
        for name, each in entries.items()
        if each is not None
    ]
    more = f", and {len(parts) - 8} more" if len(parts) > 8 else ""
    return f"a {kind} ({', '.join(parts[:8])}{more})"


def _kind_of(value: Any) -> str:
    return f"list of {len(value)}" if isinstance(value, list) else type(value).__name__


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if not isinstance(value, Mapping | tuple | list):
        return False  # a cache, a configuration
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _is_further_loss(name: str) -> bool:
    return any(part in name.lower() for part in _FURTHER_LOSSES)
