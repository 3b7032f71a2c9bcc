"""Cached gradients: exact for a loss of all samples of the window, which no sum over micro-batches comes to.

Method: GradCache (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"), for
any `gatrain.tasks.window.WindowTask`. Pass 1, without a graph: every micro-batch's rows. Gathered over the ranks
they give the window's loss and its gradient with respect to each row, the cache. Pass 2: every micro-batch again,
with the same random numbers, and a backward of ``sum(rows * cache)``, whose gradient is the chain rule's. Each rank
computes the same loss of all rows and carries its own rows' part of it, so that gradients are added over the ranks
as always, once a window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gatrain.errors import ConfigError, ExactnessError
from gatrain.tasks.base import Batch, LossSum, named_loss_sums
from gatrain.tasks.window import Rows, count_of, loss_of_window, takes_window_loss
from gatrain.train.gathered_rows import joined
from gatrain.train.gradient import GradientStrategy, StepCost
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import batch_norms
from gatrain.train.seeding import (
    all_random_states,
    kept_random_state,
    random_state,
    same_random_state,
    set_random_states,
)
from gatrain.train.step import Step, share_of

if TYPE_CHECKING:
    from gatrain.train.engine import Engine

AGREES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative L2 difference between the rows of the two passes that rounding may explain (16 bits: `AGREES_HALF`):
kernels may differ with and without a graph. Another dropout mask moves them by some ten percent."""
AGREES_HALF = 0.05


class Cached(GradientStrategy):
    """The gradient of a loss of all of the window's samples, by two passes over its micro-batches."""

    exact = "the gradient of the whole window, for any loss of all samples that the model computes one by one"
    needs_whole_window = True
    needs_sum_over_samples = False
    evaluates_windows = True
    cost = StepCost(micro_steps=1, forwards=1)

    def __init__(self) -> None:
        self._is_checked = False

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        _refuse_inexact(step)

    def notices(self, engine: Engine, micro_batches: int) -> list[str]:
        return [
            "gradient=cached: the loss compares all samples of a step, exactly; for that each of its "
            f"{micro_batches} micro-batches is computed forward once more, without a graph. Held-out samples are "
            "evaluated in windows as large as the effective batch, where there are that many."
        ]

    def sum_to_check(self, step: Step) -> Callable[[Batch], Tensor]:
        """Fixed numbers times the rows, which is a sum over samples if each is computed by itself."""

        def total(batch: Batch) -> Tensor:
            rows = _flat(step.task.represent(step.model, batch))  # type: ignore[union-attr]  # uncompiled
            return torch.stack([_fixed_sum(leaf) for leaf in rows if leaf.is_floating_point()]).sum()

        return total

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        if not self._is_checked:
            _refuse_inexact(step)
        drawn = _Drawn(window, step)
        parts = []
        for k, batch in step.batches(window):
            with torch.no_grad(), drawn.first(k), step.parallel.micro_step(), step.autocast():
                parts.append(step.method("represent")(batch))  # leaves [n_k, ...]
        for part in parts:
            count_of(part)  # or it is refused
        step.reset()  # buffers move in the second pass alone
        rows, first = step.parallel.gather_nested(
            joined(parts) if parts else None
        )  # leaves [N, ...], on all ranks
        cache = self._loss_and_cache(window, step, rows)
        del rows
        last = len(parts) - 1
        for k, batch in step.batches(window):
            count = count_of(parts[k])
            with drawn.again(k), step.parallel.micro_step():
                with step.autocast():
                    leaves = _flat(step.method("represent")(batch))
                if step.device.type == "cpu" or not self._is_checked:  # on a GPU the host waits here, once
                    _check_repeats(leaves, _flat(parts[k]))
                step.backward(
                    _surrogate(leaves, [each[first : first + count] for each in cache]), last=k == last
                )
            first += count
            del batch, leaves
        self._is_checked = self._is_checked or bool(parts)

    def _loss_and_cache(self, window: LoadedWindow, step: Step, rows: Rows) -> list[Tensor]:
        """Note the window's loss, which every rank computes alike; its gradient for each leaf [N, ...].

        With an fp16 scaler the loss is scaled on its way to the rows and the cache is not: the second pass scales.
        """
        flat, spec = pytree.tree_flatten(rows)
        wide = [_widened(leaf).requires_grad_(leaf.is_floating_point()) for leaf in flat]
        with _drawn_alike(window, step), step.autocast():
            terms = named_loss_sums(loss_of_window(step.task, pytree.tree_unflatten(wide, spec)))
        share = share_of(terms, step.scale)
        leaves = [leaf for leaf in wide if leaf.requires_grad]
        if not share.requires_grad:
            raise ExactnessError(
                "window_loss() returned a loss without a graph: it does not depend on the rows."
            )
        if not self._is_checked and _uses_others(share, leaves):
            raise ExactnessError(
                "window_loss() uses parameters that are not in the rows, which would not be trained. Let "
                "represent() use them: a temperature, for one, can be multiplied into the rows."
            )
        scaled = share if step.scaler is None else step.scaler.scale(share)
        found = iter(torch.autograd.grad(scaled, leaves, allow_unused=True, materialize_grads=True))
        cache = [next(found) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in wide]
        if step.scaler is not None:
            factor = step.scaler.scale(torch.ones((), device=step.device))  # a power of two: nothing is lost
            cache = [cached / factor for cached in cache]
        self._count(window, step, terms)
        return cache

    def _count(self, window: LoadedWindow, step: Step, terms: Mapping[str, LossSum]) -> None:
        """The loss counts once, on rank 0; each rank has used what it counted if the window has used T.

        Raises:
            ExactnessError: it has not; on every rank.
        """
        for name, (total, weight) in terms.items():
            wanted = step.totals.get(name, 0.0)
            counted = sum(float(micro.weights.get(name, 0.0)) for micro in window.micro_batches)
            is_on_host = not isinstance(weight, Tensor) or weight.device.type == "cpu"
            if is_on_host and abs(float(weight) - wanted) > 1e-6 * wanted * (not wanted.is_integer()):
                raise ExactnessError(
                    f"weight() counted {wanted:g} for the loss term {name!r} of the window, but window_loss() used "
                    f"{float(weight):g}. A mean that window_loss() returns divides by the samples; otherwise it "
                    "returns a sum and the weight that it used."
                )
            used = counted if is_on_host else weight * (counted / wanted if wanted else 0.0)
            step.counts.add({name: (total if step.ranks.rank == 0 else torch.zeros_like(total), used)})


def _refuse_inexact(step: Step) -> None:
    """Refuse what would not be exact.

    Raises:
        ConfigError: a task without rows, or BatchNorm over micro-batches.
    """
    if not takes_window_loss(step.task):
        raise ConfigError(
            f"gradient=cached needs a task with represent(model, batch) and window_loss(rows), which "
            f"{type(step.task).__name__} has not. Write one (class MyTask(gatrain.tasks.WindowTask)), use "
            "task=supervised, or set gradient=plain for a loss that is a sum over samples."
        )
    if names := batch_norms(step.model):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ConfigError(
            "gradient=cached computes each micro-batch twice and needs rows that depend on their own sample alone, "
            f"but BatchNorm ('{names[0]}'{more}) mixes those of a micro-batch. Add norm=group, or norm=frozen "
            "for a pretrained model."
        )


class _Drawn:
    """The random numbers of each micro-step: the same ones in both passes.

    They follow from the window's seed; where it has none, the generators are put back to where they were.
    """

    def __init__(self, window: LoadedWindow, step: Step) -> None:
        self._window, self._step = window, step
        self._states: dict[int, Any] = {}

    @contextlib.contextmanager
    def first(self, k: int) -> Iterator[None]:
        if self._window.seed_of(k) is None:
            self._states[k] = all_random_states()
        self._step.seed(self._window, k)
        yield

    @contextlib.contextmanager
    def again(self, k: int) -> Iterator[None]:
        self._step.seed(self._window, k)  # whatever else goes by the micro-step, such as keyed dropout
        if k not in self._states:
            yield
            return
        with kept_random_state():
            set_random_states(self._states.pop(k))
            yield


@contextlib.contextmanager
def _drawn_alike(window: LoadedWindow, step: Step) -> Iterator[None]:
    """The random numbers of a window's loss (sampled negatives, say): by the window alone, since every rank
    computes this loss, and whatever was drawn before belongs to its own micro-batches.

    Raises:
        ExactnessError: several ranks draw without a seed in common.
    """
    if window.seed is not None:
        step.random.start(window.seed, None)  # keyed dropout's too, which were the last micro-batch's
        yield
        return
    before = random_state()
    yield
    if step.ranks.world_size > 1 and not same_random_state(before, random_state()):
        raise ExactnessError(
            "window_loss() draws random numbers, which would be other ones on each rank: give windows a seed, or "
            "draw from a generator of its own that is seeded alike on all ranks."
        )


def _check_repeats(leaves: list[Tensor], before: list[Tensor]) -> None:
    """Waits for the device.

    Raises:
        ExactnessError: the second pass has not come to the rows of the first.
    """
    for leaf, first in zip(leaves, before, strict=True):
        if not leaf.is_floating_point():
            continue
        apart = (leaf.detach().double() - first.double()).norm()
        if not apart <= AGREES.get(leaf.dtype, AGREES_HALF) * first.double().norm() and bool(
            first.isfinite().all()
        ):
            raise ExactnessError(
                "represent() gives other rows for the same micro-batch when it is computed again, with the same "
                "random numbers: it draws from a generator of its own, or keeps what it saw before. Draw from the "
                "global generators of torch, numpy or random, which are seeded; with compile=true, try "
                "compile=false."
            )


def _surrogate(leaves: list[Tensor], cache: list[Tensor]) -> Tensor:
    """A scalar whose gradient is the window's loss's by way of these rows: sum(rows * cache)."""
    shares = [
        (leaf.to(cached.dtype) * cached).sum()
        for leaf, cached in zip(leaves, cache, strict=True)
        if leaf.requires_grad
    ]
    if not shares:
        raise ExactnessError("represent() returned rows without a graph: no parameter would be trained.")
    return torch.stack(shares).sum()


def _uses_others(loss: Tensor, leaves: list[Tensor]) -> bool:
    """Whether a graph ends in other leaves than these."""
    known, seen, waiting = {id(leaf) for leaf in leaves}, set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the node that a leaf's gradient is added in
        if variable is not None and id(variable) not in known:
            return True
        waiting += [each for each, _ in node.next_functions]
    return False


def _flat(rows: Rows) -> list[Tensor]:
    return pytree.tree_leaves(rows)


def _widened(leaf: Tensor) -> Tensor:
    """A leaf of a graph; 16 bits in fp32, so that small gradients are not lost in the cache."""
    return leaf.detach().float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.detach()


def _fixed_sum(leaf: Tensor) -> Tensor:
    """Of rows [n, ...], each times the same fixed numbers: a scalar."""
    wide = leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]  # [n, d]
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return (wide @ torch.arange(1, wide.shape[1] + 1, device=wide.device, dtype=wide.dtype).cos()).sum()
