"""The windows of a run: order, stages, and what they count."""

from __future__ import annotations

import dataclasses

import numpy as np

from gatrain.batch import typical_samples
from gatrain.build.nodes import part
from gatrain.config import RunConfig
from gatrain.doors import is_shipped, node_of
from gatrain.errors import ConfigError, DataError
from gatrain.tasks.base import Task
from gatrain.tasks.streams import ENDLESS, Stream
from gatrain.train import order
from gatrain.train.order.grouped import Grouped
from gatrain.train.order.sequential import Sequential
from gatrain.train.stream_loader import StreamWindows
from gatrain.train.token_places import Lengths, TokenPlaces, token_lengths
from gatrain.train.token_windows import TokenWindows
from gatrain.train.windows import WindowSchedule


def window_schedule(config: RunConfig, task: Task, effective_batch: int | None = None) -> WindowSchedule:
    """The windows of a run. ``effective_batch`` stands for the configured one, where only a look is wanted.

    Raises:
        ConfigError: the order cannot be made, or is none.
        DataError: no window could be filled.
    """
    data, seed, total = task.train_data, config.train.seed, len(task.train_data)
    effective = effective_batch or config.batch.largest
    lengths: int | Lengths = 0
    if by_tokens := config.batch.counts_tokens and effective_batch is None:
        if isinstance(data, Stream):
            raise ConfigError(
                f"{data.name} is a stream, whose samples' lengths nobody knows before they are read, so "
                "batch.count=tokens has no place in it. Count samples, or give a dataset with lengths."
            )
        lengths = token_lengths(task, seed, "batch.count=tokens")
        effective = typical_samples(effective, float(np.mean(lengths)), total)
    stages = None if effective_batch is not None or config.batch.stages.is_constant else config.batch.stages
    if isinstance(data, Stream):
        if stages is not None and stages.by != "steps":
            raise ConfigError(
                f"{data.name} is a stream, of which nobody knows how many samples an epoch has, so "
                f"batch.effective_by={stages.by} has no place in it. Let stages begin at steps."
            )
        if data.is_whole and total < effective:
            raise DataError(
                f"{data.name} is a stream of {total} samples, fewer than batch.effective={effective}: no window "
                f"could be filled. Use batch.effective={max(total, 1)} or less, or more data."
            )
        endless = ENDLESS * effective
        return StreamWindows(endless, effective, seed, config.train.drop_last, first=total, stages=stages)
    own = order.of_data(data)
    if config.order == "shuffle":
        made = None if own is None else own(seed)
    elif own is not None:
        raise ConfigError(
            f"order={config.order!r} has no meaning for a {type(data).__name__}, which has an order of its "
            "own. Leave order out."
        )
    else:
        # an order that lays out windows: smaller ones make up larger ones
        smallest = effective if stages is None else stages.smallest
        given = {"data": data, "seed": seed, "effective_batch": smallest}
        made = part("order", config.order, **given)
        if not isinstance(made, order.Order):
            raise ConfigError(
                f"order gave a {type(made).__name__}, which has no method ids(epoch, positions) that gives the "
                "numbers of the samples at these positions."
            )
        if not is_shipped(node_of("order", config.order)["_target_"]):
            again = part("order", config.order, **given)
            order.check_repeats(made, again, min(smallest, getattr(made, "samples", total)))
    samples = getattr(made, "samples", total)
    tokens = None
    if by_tokens:
        budget, drop_last = config.batch.largest, config.train.drop_last
        return TokenWindows(samples, effective, seed, drop_last, made, total, budget=budget, lengths=lengths)
    plain = WindowSchedule(samples, effective, seed, config.train.drop_last, made, total)
    if stages is None:
        return plain
    if stages.by == "tokens":
        lengths = token_lengths(task, seed, "batch.effective_by=tokens")
        each_once = made is None or isinstance(made, Grouped | Sequential)
        tokens = TokenPlaces(lengths, plain.ids, each_once)
    return dataclasses.replace(plain, stages=stages, tokens=tokens)
