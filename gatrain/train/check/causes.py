"""Why the losses of two pieces do not add up to the loss of the whole: the likely cause and what to write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatrain.labels import IGNORED
from gatrain.tasks.base import Batch

MAX_PARTS = 12
"""Tensors of a batch whose elements are tried as what a mean divides by."""


@dataclass(frozen=True)
class Numbers:
    """One loss term of the same samples, whole and in two pieces. Tuples with the whole's entry have it first."""

    term: str
    whole: float
    pieces: tuple[float, ...]
    counts: tuple[int, ...]
    """Samples of the whole and of each piece."""
    weights: tuple[float, ...]
    batches: tuple[Batch, ...]
    turned_round: float | None
    """Of the whole with its samples in the opposite order."""
    cut: float | None
    """Of pieces that were cut out of the whole batch, so that they are padded like it."""
    three: float | None
    """Of the same samples as one, one and the rest."""
    tolerance: float
    is_own_task: bool
    """Whether loss_sum() is the user's own, not one of gatrain's tasks with a loss function."""

    @property
    def added(self) -> float:
        return sum(self.pieces)

    def equal(self, one: float, other: float) -> bool:
        """Much closer to each other than whole and pieces are."""
        apart, size = abs(self.added - self.whole), sum(map(abs, self.pieces))
        return abs(one - other) <= max(0.01 * apart, min(0.3 * apart, 2e-6 * size))


def cause_of_difference(numbers: Numbers) -> str:
    """One message: the two numbers, the likely cause, and what to write."""
    sizes = " + ".join(map(str, numbers.counts[1:]))
    text = (
        f"the loss term {numbers.term!r} of {numbers.counts[0]} samples is {numbers.whole:.6g} as one micro-batch, "
        f"but adds up to {numbers.added:.6g} as {sizes}, so the result would depend on the split. "
    )
    cause, remedy = _cause(numbers)
    return f"{text}Likely cause: {cause}. {remedy}"


def _cause(n: Numbers) -> tuple[str, str]:
    if (mean := _as_mean(n)) is not None:
        return mean
    if n.three is not None and len(n.pieces) == 2:
        once = n.added - n.whole
        if n.equal(n.three - n.whole, 2 * once):
            return (
                f"a part of it ({once:.4g}) is added once for every micro-batch, whatever its samples (a penalty "
                "on the weights, an auxiliary mean)",
                "Multiply that part by the weight of the batch, or give it a loss term of its own.",
            )
    if n.turned_round is not None and not n.equal(n.turned_round, n.whole):
        return (
            "it depends on the place of a sample in its micro-batch (a collate function or a loss that goes by "
            "position, or pairs samples at random: mixup, shuffled negatives): in the opposite order the same "
            f"samples give {n.turned_round:.6g}",
            "Let each sample count alike wherever it stands: put what goes by position into the dataset, where it "
            "belongs to the sample, and let its __getitem__ draw the sample to pair it with.",
        )
    if n.cut is not None and n.equal(n.cut, n.whole):
        return (
            "a sample's loss depends on what it shares its micro-batch with through collate (padding to the "
            "longest that is not masked, or normalising over the batch): cut out of the padded batch, they give "
            f"{n.cut:.6g}",
            "Mask the padding in the model and in the loss, or pad every sample to one length.",
        )
    return (
        "it compares or combines the samples of a micro-batch (in-batch negatives, a maximum, sorting, statistics "
        "of the batch), or divides by something that weight() does not count",
        _OWN_SUM
        if n.is_own_task
        else "If the loss is a mean over something else than samples, give task.weight=my_module.count, a "
        "function of the targets that counts it. For a loss that compares samples add gradient=cached: it is then "
        "computed over all outputs of the effective batch, exactly, for one forward more.",
    )


_OWN_SUM = (
    "Return a sum over samples from loss_sum(), each computed on its own, and let weight() count them. For a loss "
    "that compares samples, let the task be a gatrain.tasks.WindowTask, with represent(model, batch) and "
    "window_loss(rows) in the place of loss_sum(), and add gradient=cached: exact for any split, for one forward "
    "more."
)


def _as_mean(n: Numbers) -> tuple[str, str] | None:
    """Is it a mean over something, handed on as a sum or multiplied by another count?"""
    counts = dict(_counts(n))
    factors = {"": (1.0,) * len(n.counts), "samples": tuple(map(float, n.counts)), "weight": n.weights}
    for (by, factor), (over, divisor) in itertools.product(factors.items(), counts.items()):
        ratios = [d / f if f else 0.0 for d, f in zip(divisor, factor, strict=True)]
        if over == by or not all(ratios) or max(ratios) - min(ratios) <= 1e-6 * max(ratios):
            continue
        sums = [part * ratio for part, ratio in zip((n.whole, *n.pieces), ratios, strict=True)]
        scale = sum(map(abs, sums[1:]))
        if abs(sums[0] - sum(sums[1:])) <= n.tolerance * scale:
            return _mean_text(n, by, over)
    return None


def _mean_text(n: Numbers, by: str, over: str) -> tuple[str, str]:
    what = {"weight": "what weight() counts", "samples": "the samples"}.get(over, over)
    if not by:
        cause = f"loss_sum() returns a mean over {what}, not a sum"
    else:
        cause = (
            f"it is a mean over {what}, multiplied by the number of {'samples' if by == 'samples' else by}"
        )
        if by == "weight":
            cause = f"it is a mean over {what}, multiplied by what weight() counts"
    if n.is_own_task:
        if over == "weight":
            return cause, "Multiply it by the weight, or use reduction='sum': return loss * weight, weight."
        return (
            cause,
            f"Return a sum (reduction='sum') and let weight(batch) count {what}, or average per sample.",
        )
    return cause, (
        "Give task.weight=my_module.count, a function of the targets that counts what the loss's mean divides by, "
        "or write a Task of your own: class MyTask(gatrain.tasks.Task)."
    )


def _counts(n: Numbers) -> Iterator[tuple[str, tuple[float, ...]]]:
    """What a mean might divide by, for the whole and each piece."""
    yield "weight", n.weights
    yield "samples", tuple(map(float, n.counts))
    by_batch = [_leaves(batch) for batch in n.batches]
    for path in list(by_batch[0])[:MAX_PARTS]:
        leaves = [each.get(path) for each in by_batch]
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            continue
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        where = f" of {path}" if path else " of the batch"
        yield f"the elements{where}", tuple(float(leaf.numel()) for leaf in given)
        if given[0].is_floating_point() or given[0].is_complex():
            continue
        yield f"the entries{where} that are not {IGNORED}", tuple(_true(leaf != IGNORED) for leaf in given)
        yield f"the entries{where} that are not 0", tuple(_true(leaf != 0) for leaf in given)
        if given[0].dim() > 1:
            for start in (slice(1, None), slice(None, -1)):
                shifted = [leaf[:, start] for leaf in given]
                yield (
                    f"the shifted entries{where} that are not {IGNORED}",
                    tuple(_true(leaf != IGNORED) for leaf in shifted),
                )


def _true(mask: Tensor) -> float:
    return float(torch.count_nonzero(mask))


def _leaves(batch: Any, path: str = "") -> dict[str, Any]:
    if isinstance(batch, Mapping):
        parts = [(f"{path}[{key!r}]", value) for key, value in batch.items()]
    elif isinstance(batch, list | tuple):
        parts = [(f"{path}[{index}]", value) for index, value in enumerate(batch)]
    elif hasattr(batch, "__dict__") and not isinstance(batch, Tensor):
        parts = [(f"{path}.{key}", value) for key, value in vars(batch).items()]
    else:
        return {path: batch}
    found: dict[str, Any] = {}
    for below, value in parts[:MAX_PARTS]:
        found.update(_leaves(value, f"batch{below}" if not path else below))
    return found
