"""Evaluation on the held-out split: sums over all ranks, so the result does not depend on the split."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from gatrain.errors import ExactnessError, GatrainError
from gatrain.tasks.base import LossSum, Task, terms_of
from gatrain.train.aftermath import explain
from gatrain.train.engine import Engine
from gatrain.train.loader import load_batches
from gatrain.train.ranks import Ranks
from gatrain.train.samples import Key
from gatrain.train.seeding import EVALUATION, seeded
from gatrain.train.window_evaluation import WindowEvaluation

RESERVED = ("step", "loss", "loss_terms", "unreadable_samples", "unreadable")
"""Names in a line of evaluations.jsonl that are not those of metrics."""

_Sums = dict[tuple[str, str], list[float]]
"""Summed value and weight by kind (``loss`` or ``metric``) and name."""
_DeviceSums = dict[tuple[str, str], tuple[Tensor | float, Tensor | float]]


class EvaluationError(GatrainError):
    """The evaluation failed on some rank; raised on all of them. The message is that rank's own error."""


class EvaluationStopped(Exception):
    """A stop was asked for while the evaluation ran; raised on all ranks."""


def evaluate(
    engine: Engine,
    *,
    samples: int | None,
    micro_batch: int,
    workers: int = 0,
    window_samples: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    describe: Callable[[BaseException], str] = str,
) -> dict[str, Any]:
    """Mean loss (``loss``) and further metrics over the first ``samples`` held-out samples. Collective.

    Waits for the device once, at the end. What no held-out sample has any weight for is left out: without a
    held-out split, or where all its weights are zero, the result is empty. Several loss terms, each with its own
    mean, stand in ``loss_terms``. Samples that could not be read and were skipped are counted in
    ``unreadable_samples`` and named in ``unreadable``, where there are any; the means are over the others.

    Args:
        window_samples: of a window, for gradient strategies that evaluate in windows
            (`gatrain.train.window_evaluation`).
        describe: an error in words, for the ranks that did not raise it.

    Raises:
        EvaluationError: it failed on some rank. No rank is left waiting in a collective.
        EvaluationStopped: ``stop_requested`` was true on some rank.
    """
    if engine.task.eval_data is None:
        return {}
    engine.share_buffers()
    count = min(len(engine.task.eval_data), samples or len(engine.task.eval_data))
    on_device: _DeviceSums = {}
    skipped: list[str] = []
    windows = None
    if window_samples is not None and engine.step.strategy.evaluates_windows:
        windows = WindowEvaluation(engine.task, window_samples)
    batches = _batches_into(on_device, skipped, engine, count, micro_batch, workers, windows)
    sums, problem, stopped = _Sums(), "", False
    # the user's code runs in here, and no collective: whatever happens on one rank, all meet after each batch
    for _ in evaluation_keys(
        engine.task, Ranks(0, engine.ranks.world_size), count, micro_batch
    ):  # rank 0 has most
        try:
            stopped = stop_requested()
            if not stopped:
                next(batches, None)
        except (Exception, SystemExit) as error:
            problem = explain(error, describe)
        if any(engine.ranks.sum([stopped, bool(problem)])):
            break
    try:
        batches.close()
        sums = {name: [float(total), float(weight)] for name, (total, weight) in on_device.items()}
    except (Exception, SystemExit) as error:  # a device tells of its errors late
        problem = problem or explain(error, describe)
    # names may differ from rank to rank: one may have no sample, or a metric only with some batches
    found = engine.ranks.gather((problem, stopped, list(sums), skipped))
    for rank, (text, _, _, _) in enumerate(found):
        if text:
            raise EvaluationError(f"rank {rank}: {text}" if len(found) > 1 else text)
    if any(stop for _, stop, _, _ in found):
        raise EvaluationStopped
    every = [name for _, _, names, _ in found for name in names]
    if windows is not None:
        try:  # every rank computes the same
            with engine.evaluating():
                of_windows = windows.sums(engine.ranks, engine.device)
        except Exception as error:
            raise EvaluationError(explain(error, describe)) from error
        sums |= {name: [float(total), float(weight)] for name, (total, weight) in of_windows.items()}
        every += engine.ranks.share_object(list(of_windows))
    means = _means(engine, list(dict.fromkeys(every)), sums)
    unreadable = [reason for _, _, _, reasons in found for reason in reasons]
    return means | ({"unreadable_samples": len(unreadable), "unreadable": unreadable} if unreadable else {})


def evaluation_keys(task: Task, ranks: Ranks, count: int, micro_batch: int) -> list[list[Key]]:
    """This rank's batches of the first ``count`` held-out samples."""
    if task.collates_deterministically:
        mine = range(ranks.rank, count, ranks.world_size)
        groups = [mine[first : first + micro_batch] for first in range(0, len(mine), micro_batch)]
    else:  # what collate draws belongs to the batch: any number of ranks must make the same ones
        firsts = range(ranks.rank * micro_batch, count, ranks.world_size * micro_batch)
        groups = [range(first, min(first + micro_batch, count)) for first in firsts]
    return [[(0, sample) for sample in group] for group in groups]


def _batches_into(
    sums: _DeviceSums,
    skipped: list[str],
    engine: Engine,
    count: int,
    micro_batch: int,
    workers: int,
    windows: WindowEvaluation | None,
) -> Generator[None, None, None]:
    """Add this rank's batches to ``sums``, and samples that were skipped to ``skipped``; one batch for each `next`.
    Not collective."""
    data = engine.task.eval_data
    assert data is not None
    keys = evaluation_keys(engine.task, engine.ranks, count, micro_batch)
    for micro in load_batches(engine.task, data, keys, workers):
        skipped += micro.skipped
        if micro.is_empty:
            yield
            continue
        with seeded(0, EVALUATION, *micro.keys[0]):
            batch = engine.to_device(micro.batch)
            if windows is None:
                losses, metrics = engine.evaluate(batch)
            else:
                with engine.evaluating():
                    windows.add(engine.step.method("represent"), batch, micro.keys)
                    losses, metrics = {}, dict(engine.task.eval_metrics(engine.model, batch))
        _check_names(metrics)
        for kind, found in (("loss", losses), ("metric", metrics)):
            for name, (total, weight) in found.items():
                before = sums.get((kind, name), (0.0, 0.0))
                sums[kind, name] = (before[0] + total.double(), before[1] + weight)
        yield


def _check_names(metrics: dict[str, LossSum]) -> None:
    for name in RESERVED:
        if name in metrics:
            raise ExactnessError(
                f"eval_metrics() returned {name!r}, which gatrain writes itself. Give the metric another name."
            )


def _means(engine: Engine, names: list[tuple[str, str]], sums: _Sums) -> dict[str, Any]:
    flat = [value for name in names for value in sums.get(name, [0.0, 0.0])]
    summed = engine.ranks.sum(flat)
    means = {
        name: summed[2 * index] / summed[2 * index + 1]
        for index, name in enumerate(names)
        if summed[2 * index + 1]
    }
    terms = {name: mean for (kind, name), mean in means.items() if kind == "loss"}
    result: dict[str, Any] = {"loss": sum(terms.values())} if terms else {}
    if len(terms_of(engine.task)) > 1 and terms:
        result["loss_terms"] = terms
    return result | {name: mean for (kind, name), mean in means.items() if kind == "metric"}
