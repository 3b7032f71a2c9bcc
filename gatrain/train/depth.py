"""How deep each parameter lies, for a rate that falls layer by layer from the head to the first block."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatrain.errors import ConfigError
from gatrain.train.checkpointing import blocks_of

_STEMS = ("embed", "wte", "wpe", "token", "stem", "pos_", "cls_", "patch")
"""Parts of names of what comes before the blocks, wherever a model defines it."""


def depths_of(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the rate of each parameter: ``decay`` to the power of its distance from the head.

    As in BEiT and timm (``param_groups_layer_decay``): what comes before the blocks is layer 0, the n blocks are
    layers 1 to n, what comes after them is layer n + 1 with factor 1. The blocks are the model's own
    ``group_matcher()`` (timm), or those that activation checkpointing finds, in their order (`blocks_of`); they
    must lie in one list, or in lists after each other.

    Raises:
        ConfigError: no blocks are found, or their order is not certain.
    """
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        try:
            layers = _by_matcher(model, matcher(coarse=False))
        except Exception as error:
            raise ConfigError(
                f"optimizer.layer_decay: {type(model).__name__}.group_matcher() failed: "
                f"{type(error).__name__}: {error}"
            ) from error
    else:
        layers = _by_blocks(model)
    head = max(layers.values())
    return {name: decay ** (head - layer) for name, layer in layers.items()}


def _by_blocks(model: nn.Module) -> dict[str, int]:
    blocks = blocks_of(model)
    advice = "Give it a checkpoint_blocks() method that lists its blocks in depth order, or write optimizer.groups."
    if len(blocks) < 2:
        raise ConfigError(
            f"optimizer.layer_decay: {type(model).__name__} has no list of repeated blocks to count by. {advice}"
        )
    place = {id(block): nth + 1 for nth, block in enumerate(blocks)}
    prefix = {f"{name}.": place[id(module)] for name, module in model.named_modules() if id(module) in place}
    # blocks of an encoder and of a decoder have no common order unless the model says so
    parents = {name.rstrip(".").rpartition(".")[0] for name in prefix}
    if len(parents) > 1 and not callable(getattr(model, "checkpoint_blocks", None)):
        types = {type(block) for block in blocks}
        if len(types) > 1:
            raise ConfigError(
                f"optimizer.layer_decay: {type(model).__name__} has blocks of several kinds "
                f"({', '.join(sorted(kind.__name__ for kind in types))}), whose order is not certain. {advice}"
            )
    layers: dict[str, int] = {}
    seen = False
    for name, _ in model.named_parameters():
        inside = [layer for start, layer in prefix.items() if name.startswith(start)]
        if inside:
            seen = True
            layers[name] = max(inside)
        else:
            is_stem = not seen or any(part in name.lower() for part in _STEMS)
            layers[name] = 0 if is_stem else len(blocks) + 1
    if len(blocks) + 1 not in layers.values():
        raise ConfigError(
            f"optimizer.layer_decay: {type(model).__name__} has no parameter after its blocks. {advice}"
        )
    return layers


def _by_matcher(model: nn.Module, matcher: Any) -> dict[str, int]:
    """Layer of each parameter by timm's description: patterns whose groups are numbers, in order."""
    try:
        from timm.models import group_parameters
    except ImportError as error:
        raise ConfigError(
            "optimizer.layer_decay: the model has timm's group_matcher(), and timm is missing."
        ) from error
    found = group_parameters(model, matcher, reverse=True)
    return {name: int(layer) for name, layer in found.items()}
