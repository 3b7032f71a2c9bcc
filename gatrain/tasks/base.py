"""The seam for the user's own work: a task builds the model, reads samples and defines the loss.

Exactness rests on two methods. `Task.weight` counts, on the host and before any forward, what a batch adds to
the loss's denominator; `Task.loss_sum` returns a SUM over loss terms, never a mean, with the weight that it
really used. The training core divides by the total over the whole window and all ranks, and checks that both
counts agree, so a loss that shifts, masks or averages differently from its count is caught, not trained.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gatrain.errors import ConfigError, DataError, ExactnessError
from gatrain.tasks.forms import shown

Batch = Any
"""What `Task.collate` returns: any nesting of dicts, lists and tuples with tensors as leaves."""

Weights = float | Mapping[str, float]
"""One number, or one for each named loss term (each term has a denominator of its own)."""

LossSum = tuple[Tensor, Tensor | float]
"""(sum of weighted losses: scalar tensor with graph, weight used: number or scalar tensor)."""

LossSums = LossSum | Mapping[str, LossSum]


@runtime_checkable
class Samples(Protocol):
    """A map-style dataset. ``__getitems__(indices)`` is used instead where it exists. ``batch_of(indices)`` may
    give what torch's default collate makes of these samples, with all of them read in one call.

    Set ``deterministic = True`` on a dataset whose samples involve no random number; otherwise reading sample
    ``i`` in epoch ``e`` is seeded by (seed, e, i), so augmentation does not depend on who reads it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Task(abc.ABC):
    """What gatrain trains. Subclass it, or use a ready one such as `gatrain.tasks.Supervised`."""

    train_data: Samples
    eval_data: Samples | None = None
    loss_terms: Sequence[str] = ("loss",)
    """Names of the loss terms, where `weight` and `loss_sum` return mappings; known even to a rank without data."""
    phases: Sequence[str] | Mapping[str, Sequence[str]] = ()
    """Where several optimizers train parts of the model in turn (``gradient=phases``): the phases' names in their
    order, or for each phase the names of its loss terms; by default it has one, called like the phase.
    `loss_sum` then takes ``phase``, and gives the terms of that phase."""
    variable_length: bool | None = None
    """Whether batches differ in shape from one to the next, beyond their number of samples; None where it is to be
    found by reading some (`gatrain.train.lengths`)."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """Make the model on the CPU with fresh weights (the random seed is set by the caller)."""

    @property
    def collates_deterministically(self) -> bool:
        """Whether `collate` is known to draw no random number: torch's own, or declared by
        ``deterministic_collate = True`` where it is written."""
        return type(self).collate is Task.collate or declares(self, "deterministic_collate", "collate")

    @property
    def collates_by_default(self) -> bool:
        """Whether `collate` is torch's own: then data that has ``batch_of(indices)`` makes whole batches."""
        return type(self).collate is Task.collate

    counts_samples: bool = False
    """True if `weight` counts samples: then it must equal the number of samples collated."""

    def count_samples(self, batch: Batch) -> int | None:
        """Number of samples in a host batch; None where it cannot be told from the batch."""
        return None

    @abc.abstractmethod
    def weight(self, batch: Batch) -> Weights:
        """Count what ``batch`` (on the host) adds to the denominator of each loss term."""

    @abc.abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> LossSums:
        """Run the model and return the summed loss with the weight used. Runs under autocast.

        A loss that changes in the course of training takes a third argument, ``step``: the number of updates made
        before, the same for all micro-batches of a window (``def loss_sum(self, model, batch, step=0)``).
        With `phases` it takes ``phase``, whose terms it gives, and may take ``update``, the number of this phase's
        update within the window, from 0 (``def loss_sum(self, model, batch, phase="", update=0)``).
        """

    def partly_compiled_loss_sum(
        self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> Callable[..., LossSums]:
        """`loss_sum` where the model's blocks are compiled one by one: what else is worth it goes through
        ``compiled``, such as a loss over large logits."""
        return self.loss_sum

    def collate(self, samples: list[Any]) -> Batch:
        """Make one batch of a list of samples."""
        try:
            return torch.utils.data.default_collate(samples)
        except (RuntimeError, TypeError, KeyError, ValueError) as error:
            raise DataError(_uncollated(samples, error)) from error

    def tokens(self, batch: Batch) -> int | None:
        """Number of input tokens in a host batch, for the metrics; None where it means nothing."""
        return None

    def worst_case_indices(self, count: int) -> Sequence[int]:
        """Indices of ``count`` training samples that need the most memory (repeats allowed)."""
        return [index % len(self.train_data) for index in range(count)]

    def eval_metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, LossSum]:
        """Further sums for evaluation, such as correct answers, each with its denominator."""
        return {}

    def baseline(self) -> tuple[str, float] | None:
        """A name and a loss that a trivial model reaches on the held-out split, for comparison."""
        return None

    def showcase(self, model: nn.Module, device: torch.device) -> str | None:
        """Text that shows a person what the trained model does, such as a generated sample."""
        return None

    def shortened(self, batch: Batch) -> Batch:
        """A cheaper batch of the same samples for `gatrain verify`, such as shorter sequences."""
        return batch


def _uncollated(samples: list[Any], error: Exception) -> str:
    if any(sample is None for sample in samples):
        return (
            f"the default collate cannot make a batch of these samples, some of which are None: {error}. Let the "
            "dataset return another sample instead, or give the data a collate(samples) that leaves None out."
        )
    remedy = "Give the data a method collate(samples) that makes one batch of them"
    if isinstance(samples[0], Mapping) and "input_ids" in samples[0]:
        remedy += ", or use task=huggingface, which pads what a tokenizer gives"
    first, last = shown(samples[0]), shown(samples[-1])
    return (
        f"the default collate cannot make a batch of samples such as {first} and {last}: {error}. {remedy}."
    )


def is_deterministic(data: Samples) -> bool:
    """Whether reading a sample draws no random number: the data says so, or is torch's own TensorDataset.

    A subclass that reads in its own way must say it again.
    """
    if type(data) is TensorDataset:
        return bool(getattr(data, "deterministic", True))
    return declares(data, "deterministic", "__getitem__", "__getitems__")


def declares(owner: Any, trait: str, *methods: str) -> bool:
    """Whether ``owner.trait`` is true and was said of the methods it has: none was replaced since by a subclass
    or on the object."""
    if not getattr(owner, trait, False):
        return False
    own = getattr(owner, "__dict__", {})
    if trait in own:
        return True
    if any(method in own for method in methods):
        return False
    for kind in type(owner).__mro__:
        if trait in kind.__dict__:
            return True
        if any(method in kind.__dict__ for method in methods):
            return False
    return True  # given by __getattr__, as wrappers do


def phases_of(task: Task) -> dict[str, tuple[str, ...]]:
    """The loss terms of each phase, in the phases' order; empty for a task without phases.

    Raises:
        ConfigError: a phase without terms, or a term of two phases.
    """
    given = task.phases
    named = given.items() if isinstance(given, Mapping) else ((name, (name,)) for name in given)
    found = {name: (terms,) if isinstance(terms, str) else tuple(terms) for name, terms in named}
    terms = [term for each in found.values() for term in each]
    if not all(found.values()) or len(set(terms)) < len(terms):
        raise ConfigError(
            f"{type(task).__name__}.phases={given!r}: every phase needs a loss term of its own, for example "
            "phases = ('discriminator', 'generator')."
        )
    return found


def terms_of(task: Task) -> tuple[str, ...]:
    """Names of all loss terms: those of all phases, where the task has phases."""
    phases = phases_of(task)
    return tuple(term for terms in phases.values() for term in terms) if phases else tuple(task.loss_terms)


def weights_of(task: Task, batch: Batch) -> dict[str, float]:
    """`Task.weight` by the names of the terms; one number counts for every term of a task with phases."""
    weights = task.weight(batch)
    if task.phases and not isinstance(weights, Mapping):
        return dict.fromkeys(terms_of(task), weights)
    return named_weights(weights)


def asks_for(task: Task, name: str) -> bool:
    """Whether `Task.loss_sum` takes an argument of this name."""
    try:
        return name in inspect.signature(task.loss_sum).parameters
    except (TypeError, ValueError):
        return False


def asks_for_step(task: Task) -> bool:
    """Whether `Task.loss_sum` takes the number of updates made before, as ``step``."""
    return asks_for(task, "step")


def loss_sum_at(task: Task, model: nn.Module, batch: Batch, step: int) -> LossSums:
    """`Task.loss_sum` after ``step`` updates; of a task with phases the terms of all of them."""
    if task.phases:
        return {
            name: each
            for phase in phases_of(task)
            for name, each in phase_loss_sum(task, partial(task.loss_sum, model), batch, phase, step).items()
        }
    loss_sum: Callable[..., LossSums] = task.loss_sum
    return loss_sum(model, batch, step=step) if asks_for_step(task) else loss_sum(model, batch)


def phase_loss_sum(
    task: Task, call: Callable[..., LossSums], batch: Batch, phase: str, step: int = 0, update: int = 0
) -> dict[str, LossSum]:
    """The loss sums of one phase by the names of its terms.

    Args:
        call: `Task.loss_sum` of a model.
        update: number of this phase's update within the window, from 0.

    Raises:
        ExactnessError: they are not those that `Task.phases` names.
    """
    told = {"step": step, "update": update}
    asked = {name: value for name, value in told.items() if asks_for(task, name)}
    sums = call(batch, phase=phase, **asked)
    terms = phases_of(task)[phase]
    named = dict(sums) if isinstance(sums, Mapping) else {terms[0]: sums}
    if set(named) != set(terms):
        raise ExactnessError(
            f"loss_sum(phase={phase!r}) gave the terms {', '.join(named)}; this phase has {', '.join(terms)} "
            f"({type(task).__name__}.phases)."
        )
    return named


def named_weights(weights: Weights) -> dict[str, float]:
    """Give the single unnamed term the name ``loss``."""
    return dict(weights) if isinstance(weights, Mapping) else {"loss": weights}


def named_loss_sums(sums: LossSums) -> dict[str, LossSum]:
    """Give the single unnamed term the name ``loss``."""
    return dict(sums) if isinstance(sums, Mapping) else {"loss": sums}
