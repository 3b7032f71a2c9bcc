"""Forwards of the check, in the sharpest way that model and loss allow."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatrain.errors import GatrainError, is_out_of_memory
from gatrain.tasks.base import Batch, LossSum, named_loss_sums
from gatrain.train import seeding
from gatrain.train.check.computing import Precisions, computing_in
from gatrain.train.check.faults import Fault, NoGradients, Unclear
from gatrain.train.check.host import Made
from gatrain.train.engine import Engine
from gatrain.train.frozen import frozen_randomness
from gatrain.train.held_state import HeldState

REPEATED = 1e-5
"""Relative difference between two equal computations that a GPU's unordered sums may explain."""


@dataclass
class Terms:
    """Loss sums and weights of one forward, by term."""

    losses: dict[str, float]
    weights: dict[str, float]
    has_graph: bool
    sixteen_bit: torch.dtype | None = None
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    """Of the terms' sum, for each factor that was asked for: one for each trained parameter."""

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.losses.values()))


@dataclass(frozen=True)
class Way:
    """How forwards are computed here."""

    precise: torch.dtype | None = torch.float32
    """Instead of autocast or 16-bit parameters; None computes as in training."""
    frozen: bool = True
    graph: bool = False
    """With a graph, for a loss that needs gradients in its forward."""


class Forwards:
    """Forwards on one rank's device.

    Args:
        of_rows: computed instead of the loss.
    """

    def __init__(
        self, engine: Engine, epoch: int, seed: int, of_rows: Callable[[Batch], Tensor] | None = None
    ) -> None:
        self._engine, self.epoch, self.seed, self.of_rows = engine, epoch, seed, of_rows
        self.way = Way()
        self.in_haste = False
        """The model is large: no more precision than training has."""

    def terms(
        self, made: Made, way: Way | None = None, *, graph: bool = False, factors: Sequence[float] = ()
    ) -> Terms:
        """One forward on the device; with ``factors`` a backward for each, too, of the loss sums times it.

        Raises:
            NoGradients: a backward failed.
            Exception: the user's own error in the forward.
        """
        way = way or self.way
        engine = self._engine
        random = engine.step.random
        random.start((self.seed, seeding.MICRO_STEP, self.epoch, 0), made.places)
        batch = engine.to_device(made.batch)
        if (
            engine.device.type == "cpu"
        ):  # it was not copied, and a loss may write into it, as mixup in place does
            with contextlib.suppress(Exception):
                batch = copy.deepcopy(batch)
        watch = Precisions()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(graph or way.graph))
            if way.precise is not None:
                batch = stack.enter_context(computing_in(way.precise, engine.model, batch, engine.device))
            else:
                stack.enter_context(engine.autocast())
            stack.enter_context(random.aside() if way.frozen else random.around(contextlib.nullcontext)())
            if way.frozen:
                stack.enter_context(frozen_randomness(engine.model))
            stack.enter_context(watch)
            if self.of_rows is None:
                sums = named_loss_sums(engine.loss_sum(batch))
            else:
                total = self.of_rows(batch)
                sums = {name: (total, weight) for name, weight in made.weights.items()}
            gradients = [
                self._gradients(sums, factor, keeps_graph=nth < len(factors))
                for nth, factor in enumerate(factors, 1)
            ]
        losses, weights, has_graph = {}, {}, False
        for name, (total, weight) in sums.items():
            if not isinstance(total, Tensor) or total.numel() != 1:
                given = f"shape {list(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
                raise Fault(
                    f"loss_sum() returned {given} for the loss term {name!r} where one number is wanted. Return "
                    "the sum over the samples: losses.sum(), with the weight."
                )
            has_graph |= total.requires_grad
            losses[name], weights[name] = float(total.detach()), float(weight)
        return Terms(losses, weights, has_graph, watch.lowest, gradients)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._engine.model.named_parameters() if p.requires_grad}

    def _gradients(
        self, sums: Mapping[str, LossSum], factor: float, *, keeps_graph: bool
    ) -> list[Tensor | None]:
        totals = [total.reshape(()) for total, _ in sums.values() if total.requires_grad]
        trained = list(self.trained().values())
        # not into .grad: what a strategy does where gradients are accumulated is no business of the loss
        total = torch.stack(totals).sum() * factor
        if _is_hidden(total):
            raise NoGradients(
                "reentrant checkpointing hides parameters from it, use_reentrant=False does not"
            )
        try:
            return list(torch.autograd.grad(total, trained, allow_unused=True, retain_graph=keeps_graph))
        except Exception as error:
            raise NoGradients(
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            ) from error

    def settle(self, probe: Made) -> Terms:
        """Find a way to compute that this model and loss allow; the result of ``probe`` with a graph.

        Raises:
            Exception: the user's own error, with what the model computes as in training.
        """
        ways = (Way(), Way(precise=None), Way(precise=None, frozen=False))
        for way in ways[1:] if self.in_haste else ways:
            try:
                terms = self.terms(probe, way, graph=True)
            except (GatrainError, Fault):
                raise
            except Exception as error:
                if not way.frozen or (is_out_of_memory(error) and way.precise is None):
                    raise
                continue
            self.way = way
            if not way.frozen and not self.agree(terms, self.terms(probe, graph=True), REPEATED):
                raise Unclear("the model draws random numbers and cannot be computed without them.")
            return terms
        raise AssertionError("the last way raises or returns")

    def agree(self, one: Terms, other: Terms, tolerance: float) -> bool:
        return all(
            abs(value - other.losses.get(name, math.nan)) <= tolerance * max(abs(value), 1e-12)
            for name, value in one.losses.items()
        )

    def from_start(self, made: Made, state: HeldState) -> Terms:
        """From the state at the beginning, without a graph if the loss allows that."""
        state.restore()
        try:
            return self.terms(made)
        except RuntimeError as error:
            if self.way.graph or is_out_of_memory(error):
                raise
            self.way = dataclasses.replace(self.way, graph=True)
            state.restore()
            return self.terms(made)


def _is_hidden(total: Tensor) -> bool:
    """Whether part of the graph is made in the backward alone, where `torch.autograd.grad` finds no parameter."""
    seen: set[object] = set()
    nodes = [total.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
    return False


def number(terms: Terms) -> str:
    return ", ".join(f"{value:.6g}" for value in terms.losses.values())
