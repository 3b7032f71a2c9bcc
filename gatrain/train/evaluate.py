"""Evaluation on the held-out split: sums over all ranks, so the result does not depend on the split."""

from __future__ import annotations

from torch import Tensor

from gatrain.train.engine import Engine
from gatrain.train.loader import load_batches
from gatrain.train.samples import Key


def evaluate(engine: Engine, *, samples: int | None, micro_batch: int, workers: int = 0) -> dict[str, float]:
    """Mean loss (``loss``) and further metrics over the first ``samples`` held-out samples. Collective.

    Waits for the device once, at the end. Empty if the task has no held-out split.
    """
    data = engine.task.eval_data
    if data is None:
        return {}
    engine.share_buffers()
    count = min(len(data), samples or len(data))
    mine = range(engine.ranks.rank, count, engine.ranks.world_size)
    keys: list[list[Key]] = [
        [(0, sample) for sample in mine[first : first + micro_batch]]
        for first in range(0, len(mine), micro_batch)
    ]
    device_sums: dict[tuple[str, str], tuple[Tensor | float, Tensor | float]] = {}
    for micro in load_batches(engine.task, data, keys, workers):
        losses, metrics = engine.evaluate(engine.to_device(micro.batch))
        for kind, found in (("loss", losses), ("metric", metrics)):
            for name, (total, weight) in found.items():
                before = device_sums.get((kind, name), (0.0, 0.0))
                device_sums[kind, name] = (before[0] + total.double(), before[1] + weight)
    sums = {name: [float(total), float(weight)] for name, (total, weight) in device_sums.items()}
    return _means(engine, sums)


def _means(engine: Engine, sums: dict[tuple[str, str], list[float]]) -> dict[str, float]:
    # rank 0 has a sample if any rank has one: its names hold for ranks that have none
    names = engine.ranks.share_object(sorted(sums))
    flat = [value for name in names for value in sums.get(name, [0.0, 0.0])]
    summed = engine.ranks.sum(flat)
    result: dict[str, float] = {"loss": 0.0}
    for index, (kind, name) in enumerate(names):
        total, weight = summed[2 * index : 2 * index + 2]
        mean = total / weight if weight else float("nan")
        if kind == "loss":
            result["loss"] += mean
        else:
            result[name] = mean
    return result
