"""Rows of a window over all ranks: nested tensors with one row for each sample, of any number of samples a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gatrain.errors import ConfigError
from gatrain.tasks.window import Rows
from gatrain.train.ranks import Ranks


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several micro-batches, one below the other.

    Args:
        parts: at least one; nested alike, leaves [n_k, ...].

    Raises:
        ConfigError: they are of different kinds or shapes.
    """
    flat = [pytree.tree_flatten(part) for part in parts]
    spec = flat[0][1]
    shapes = {tuple((tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves) for leaves, _ in flat}
    if len(shapes) > 1 or any(other != spec for _, other in flat):
        given = " and ".join(
            ", ".join(str(list(shape)) for shape, _ in each) for each in sorted(shapes, key=str)[:2]
        )
        raise ConfigError(
            f"represent() gives rows of different shapes for different micro-batches ({given}). Each sample must "
            "have a row of one shape: pool over what varies, such as the length."
        )
    return pytree.tree_unflatten(
        [torch.cat(leaves) for leaves in zip(*(f[0] for f in flat), strict=True)], spec
    )


def gathered(ranks: Ranks, rows: Rows | None, device: torch.device) -> tuple[Rows, int]:
    """Rows of all ranks in their order, without a graph, and the place of this rank's first one. Collective.

    Args:
        rows: of this rank; None where it has none, and need not know how they look.

    Raises:
        ConfigError: on every rank: no rank has any, or they look different.
    """
    leaves, spec = pytree.tree_flatten(rows) if rows is not None else ([], None)
    looks = [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    every: list[Any] = ranks.gather(
        (None if spec is None else (spec, looks), len(leaves[0]) if leaves else 0)
    )
    seen = [look for look, _ in every if look is not None]
    if not seen or any(look != seen[0] for look in seen):
        raise ConfigError(
            "represent() gives no rows on any rank."
            if not seen
            else f"represent() gives rows of different shapes on different ranks ({seen[0][1]} and others)."
        )
    spec, looks = seen[0]
    if not leaves:
        leaves = [torch.zeros(0, *shape, dtype=dtype, device=device) for shape, dtype in looks]
    found: list[Tensor] = [torch.cat(ranks.gather_rows(leaf.detach())) for leaf in leaves]
    return pytree.tree_unflatten(found, spec), sum(count for _, count in every[: ranks.rank])
