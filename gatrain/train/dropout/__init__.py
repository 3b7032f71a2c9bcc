"""The door `dropout`: where the random numbers of a forward come from.

``dropout: torch`` draws from torch's generators, which are seeded for each micro-step: a run can be repeated and
resumed, and another split draws other masks. ``dropout: keyed`` makes each sample's masks a function of the run's
seed, the window and the sample (`gatrain.train.dropout.keyed`): then no split changes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.seeding import seed_everything, set_torch_random_state, torch_random_state

Context = Callable[[], AbstractContextManager[Any]]


class RandomNumbers:
    """Those of torch's generators."""

    exact: str = (
        "where the model drops nothing; else masks belong to each micro-batch, the same at each repetition, and "
        "another split draws others of the same distribution (dropout=keyed draws the same)"
    )
    """One sentence: which part of a model's own random numbers the split does not change."""
    is_keyed: bool = False
    """Whether a sample's numbers are the same in every split."""

    def set_up(self, model: nn.Module) -> None:
        """Prepare a model, once, on its device and before activation checkpointing wraps its blocks.

        Raises:
            ConfigError: the model draws in a way that cannot be had so.
        """

    def seed(self, window: LoadedWindow, k: int) -> None:
        """Set the numbers to those of micro-step k, the same ones however often it is computed."""
        if (seed := window.seed_of(k)) is not None:
            seed_everything(*seed)

    def start(self, seed: tuple[int, ...], places: Sequence[int] | None) -> None:
        """Set the numbers for a batch outside of any window.

        Args:
            places: an integer for each sample in turn, which tells it from the others; None where any serve.
        """
        seed_everything(*seed)

    def around(self, forward: Context) -> Context:
        """The context of a forward with these numbers, around another context such as autocast."""
        return forward

    def state(self) -> Any:
        """Where the forward in hand is with its numbers, for `resume`: another one may run before it goes on.

        Python's and numpy's generators are not in it.
        """
        return torch_random_state()

    def resume(self, state: Any) -> None:
        """Go on with the forward that was left at `state`."""
        set_torch_random_state(state)

    def aside(self) -> AbstractContextManager[Any]:
        """A context in which torch's own numbers are drawn."""
        return contextlib.nullcontext()
