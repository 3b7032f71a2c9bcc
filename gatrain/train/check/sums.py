"""Whether weights and losses of pieces add up to those of the whole; and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from gatrain.train import seeding
from gatrain.train.check.causes import Numbers, cause_of_difference
from gatrain.train.check.computing import TOLERANCE, by_precision
from gatrain.train.check.faults import Fault, Unclear
from gatrain.train.check.forwards import Forwards, Terms, number
from gatrain.train.check.host import HostSamples, Made
from gatrain.train.held_state import HeldState

SURELY_EQUAL, SURELY_WRONG = 2e-6, 1e-3
"""Of fp32: differences in between are computed again in fp64, where only a wrong loss leaves any."""
NOTHING = 1e-5
"""A loss per sample below this is what is left of terms that cancel (policy gradients of a group, a divergence
from itself): rounding alone decides its digits. The gradients are compared all the same."""


class Sums:
    """
    Args:
        chosen: (id, sample) of each.
        whole, together: all of them, and what their forward gave.
        own: the pieces were collated each on its own.
    """

    def __init__(
        self,
        host: HostSamples,
        forwards: Forwards,
        chosen: list[tuple[int, Any]],
        whole: Made,
        together: Terms,
        own: bool,
        state: HeldState,
    ) -> None:
        self._host, self._forwards = host, forwards
        self._chosen, self._whole, self._together = chosen, whole, together
        self._own, self._state = own, state

    def check(self, pieces: list[Made], parts: list[Terms]) -> str | None:
        """What could not be checked, if anything.

        Raises:
            Fault: something does not add up.
            Unclear: numbers of Python's or NumPy's generators decide.
        """
        whole, together = self._whole, self._together
        for name, counted in whole.weights.items():
            added = sum(piece.weights[name] for piece in pieces)
            if abs(added - counted) > 1e-5 * max(abs(added), abs(counted)):
                sizes = " + ".join(str(piece.count) for piece in pieces)
                one = all(piece.weights[name] == counted for piece in pieces)
                cause = (
                    "It is the same for every batch, so it counts micro-batches"
                    if one
                    else "It depends on which samples share a batch: padding counted as data, a mean, or another "
                    "dimension than the samples'"
                )
                raise Fault(
                    f"weight() counts {counted:g} for the loss term {name!r} of {whole.count} samples, but "
                    f"{added:g} for the same samples as {sizes}. {cause}. Let weight(batch) count what the loss's "
                    "mean divides by, sample by sample: len(batch), or the labels that are not ignored."
                )
        for piece, part in zip(pieces, parts, strict=True):
            if together.is_finite and not part.is_finite and any(piece.weights.values()):
                raise Fault(
                    f"the loss of {whole.count} samples is {number(together)} as one micro-batch, but that of "
                    f"{piece.count} of them alone is {number(part)}, so the result would depend on the split. "
                    "Likely cause: a statistic over the micro-batch, such as a standard deviation, or a mean over "
                    "labels where none counts. Compute each sample's loss on its own, with statistics of the whole "
                    "training data, and return a sum."
                )
        if not (together.is_finite and all(part.is_finite for part in parts)):
            return "The loss of the first samples is not finite, so it could not be checked that it may be split."
        lowest = min(
            (t.sixteen_bit for t in (together, *parts) if t.sixteen_bit), key=by_precision, default=None
        )
        tolerance = TOLERANCE[lowest or torch.float32]
        for name, wanted in together.losses.items():
            given = [part.losses[name] for part in parts]
            size = max(abs(wanted), sum(map(abs, given)))
            if size <= NOTHING * whole.count:
                continue
            difference = abs(sum(given) - wanted) / max(size, 1e-12)
            if lowest is None and SURELY_EQUAL < difference < SURELY_WRONG:
                exact = self._difference_in_fp64(name, pieces)
                difference = difference if exact is None else exact
                tolerance = TOLERANCE[torch.float32] if exact is None else SURELY_EQUAL
            if difference > tolerance:
                self._explain(name, wanted, pieces, given, tolerance)
        return None

    def _loss(self, name: str, made: Made) -> float:
        return self._forwards.from_start(made, self._state).losses[name]

    def _difference_in_fp64(self, name: str, pieces: list[Made]) -> float | None:
        """The relative difference without rounding; None where the model or the loss cannot be computed so."""
        forwards, kept = self._forwards, self._forwards.way
        forwards.way = dataclasses.replace(kept, precise=torch.float64)
        try:
            wanted, *given = [self._loss(name, made) for made in (self._whole, *pieces)]
        except Exception:
            return None
        finally:
            forwards.way = kept
        return abs(sum(given) - wanted) / max(abs(wanted), sum(map(abs, given)), 1e-12)

    def _explain(
        self,
        name: str,
        wanted: float,
        pieces: list[Made],
        given: list[float],
        tolerance: float,
    ) -> NoReturn:
        """Find out why the pieces do not add up, with further forwards.

        Raises:
            Fault: with the cause.
            Unclear: numbers of Python's or NumPy's generators decide.
        """
        whole, chosen, own = self._whole, self._chosen, self._own
        if self._forwards.of_rows is not None:
            sizes = " + ".join(str(piece.count) for piece in pieces)
            raise Fault(
                f"represent() must compute each sample by itself, but a fixed sum over the rows of {whole.count} "
                f"samples is {wanted:.6g} as one micro-batch and {sum(given):.6g} as {sizes}: it normalises over "
                "the batch, compares samples, or depends on how far the batch is padded. Move what needs other "
                "samples into window_loss()."
            )

        def loss(made: Made) -> float:
            return self._loss(name, made)

        def attempt(call: Callable[[], float | None]) -> float | None:
            try:
                return call()
            except Exception:
                return None

        if self._depends_on_host_numbers(name, wanted, pieces, tolerance):
            raise Unclear(
                "the model or the loss draws from random or numpy.random for each sample, and whole and pieces "
                "draw differently. Draw from torch's generator instead."
            )

        def cut_sum() -> float | None:
            cut = self._host.cut(whole, [piece.count for piece in pieces]) if own else None
            return None if cut is None else sum(loss(piece) for piece in cut)

        def three() -> float | None:
            if not own or len(chosen) < 3:
                return None
            return sum(loss(self._host.made(part)) for part in (chosen[:1], chosen[1:2], chosen[2:]))

        numbers = Numbers(
            term=name,
            whole=wanted,
            pieces=tuple(given),
            counts=(whole.count, *(piece.count for piece in pieces)),
            weights=(whole.weights[name], *(piece.weights[name] for piece in pieces)),
            batches=(whole.batch, *(piece.batch for piece in pieces)),
            turned_round=attempt(lambda: loss(self._host.made(chosen[::-1]))) if own else None,
            cut=attempt(cut_sum),
            three=attempt(three),
            tolerance=tolerance,
            is_own_task=not type(self._host.task).__module__.startswith("gatrain."),
        )
        raise Fault(cause_of_difference(numbers))

    def _depends_on_host_numbers(
        self, name: str, wanted: float, pieces: list[Made], tolerance: float
    ) -> bool:
        """Whether numbers of ``random`` and NumPy may be what makes the pieces differ from the whole."""
        forwards, seed = self._forwards, self._forwards.seed
        states = []
        for made in (self._whole, *pieces):
            self._loss(name, made)
            states.append(seeding.random_state()[:2])
        if all(seeding.same_host_random_state(states[0], other) for other in states[1:]):
            return False  # none, or as many for any number of samples: the same ones, as all are seeded alike
        forwards.seed = seed + 1
        try:
            other = self._loss(name, self._whole)
        finally:
            forwards.seed = seed
        return abs(other - wanted) > tolerance * max(abs(wanted), 1e-12)
