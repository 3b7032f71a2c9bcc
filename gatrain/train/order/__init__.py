"""The order of samples: which sample stands at which position of an epoch. One file for each shipped order.

An order is made once in every process and depends on its arguments alone, never on the rank: so the windows are the
same for any number of ranks, and a run goes on at any window.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler, SequentialSampler, WeightedRandomSampler

from gatrain.errors import ConfigError

Ids = npt.NDArray[np.int64]


@runtime_checkable
class Order(Protocol):
    """What ``order: {_target_: my_module.MyOrder}`` must give.

    It is called with its keywords of the recipe, and with those of ``data`` (the training samples), ``seed``
    (train.seed) and ``effective_batch`` that it takes.

    It may have ``samples``, the positions of an epoch (else as many as the data has); ``draws(epoch, positions)``,
    numbers that key the random augmentation of what stands there (else the epoch: a sample that stands in an
    epoch several times must be told apart by it); ``fingerprint``, a text that differs where the order may, so that
    a run goes on with the same one; and ``sentence``, what a person should know of it.
    """

    def ids(self, epoch: int, positions: Ids) -> Any:
        """The number of the sample at each of ``positions`` (int64, shape [n], ascending) of an epoch, from 0."""
        ...


def of_data(data: Any) -> Any:
    """What makes the training data's own order of a seed, in place of ``order: shuffle``; None if it has none."""
    return getattr(data, "window_order", None)


def unused_sampler(data: Any, source: Any = None) -> str:
    """A sentence where the data brings a sampler, which is not drawn from: it goes from one state to the next."""
    for each in (source, data):
        for name in ("sampler", "batch_sampler"):
            sampler = getattr(each, name, None)
            if not isinstance(sampler, Sampler):
                continue
            if isinstance(sampler, WeightedRandomSampler):
                instead = f"For its weights: order={{name: weighted, weights: {name}.weights}}."
            elif isinstance(sampler, SequentialSampler):
                instead = "For the data's own order: order=sequential."
            else:
                instead = "For an order of your own: order={_target_: my_module.MyOrder}."
            return (
                f"{type(each).__name__}.{name} ({type(sampler).__name__}) is not used: order=shuffle reads every "
                f"sample once an epoch. {instead}"
            )
    return ""


def check_repeats(made: Order, again: Order, count: int) -> None:
    """Refuse an order that would give a resumed run, or another rank, other samples.

    Args:
        made: the order.
        again: the same, made anew.
        count: positions of a window.

    Raises:
        ConfigError: they differ, or one differs from itself.
    """
    positions = np.arange(count, dtype=np.int64)

    def ids(order: Order, epoch: int) -> list[Any] | None:
        try:
            return list(np.asarray(order.ids(epoch, positions)).tolist())
        except Exception:  # said where windows are made, if one ever asks for it
            return None

    first, second = ids(made, 0), ids(made, 1)
    if (ids(again, 1), ids(again, 0)) != (second, first) or ids(made, 0) != first:
        raise ConfigError(
            f"order: {type(made).__qualname__} gives other samples for the same epoch and positions when it is "
            "asked again or made anew: it counts its calls or draws random numbers, so a resumed run would train "
            "on other samples. Let ids follow from epoch, positions and the seed alone: "
            "np.random.default_rng([self.seed, epoch])."
        )


def checked_ids(ids: Any, positions: Ids, total: int, order: Any) -> Ids:
    """What an order gave, as int64.

    Raises:
        ConfigError: it is not one number of a sample for each position.
    """
    found = np.asarray(ids)
    name = f"{type(order).__module__}.{type(order).__qualname__}"
    if found.shape != positions.shape or found.dtype.kind not in "iu":
        raise ConfigError(
            f"order: {name}.ids gave {found.dtype} {list(found.shape)} for {len(positions)} positions, not one "
            "whole number for each."
        )
    if len(found) and not 0 <= found.min() <= found.max() < total:
        wrong = int(found.min()) if found.min() < 0 else int(found.max())
        raise ConfigError(
            f"order: {name}.ids gave the sample {wrong}, but the data has the samples 0 to {total - 1}."
        )
    return found.astype(np.int64)
