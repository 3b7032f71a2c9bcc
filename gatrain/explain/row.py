"""What `gatrain explain` says: one row for each technique, and what it may look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gatrain.commands import typed
from gatrain.config import RunConfig
from gatrain.inspected import Inspected
from gatrain.plan import FITS, Plan, Trial


@dataclass(frozen=True)
class Row:
    """One technique."""

    topic: str
    """Its name, of a word or two."""
    state: str
    """What it is set to, or how it stands, in a few words."""
    text: str
    """Sentences: what it costs and buys here, and what is exact about it."""


@dataclass(frozen=True)
class Situation:
    """A recipe on a machine, planned."""

    recipe: str
    config: RunConfig
    found: Inspected
    plan: Plan
    machine: str
    """The devices in words."""
    on_gpu: bool
    is_predicted: bool
    """Whether the plan was predicted for a GPU that is not here, not measured."""
    cwd: Path
    words: tuple[str, ...] = ()
    """The recipe and the overrides, as typed, without secrets."""

    def command(self, *settings: str) -> str:
        """The command that trains this recipe with further settings."""
        keys = {word.partition("=")[0] for word in settings}
        kept = [word for word in self.words if word.partition("=")[0] not in keys]
        return typed("fit", *kept, *settings)

    @property
    def share(self) -> int:
        """Samples of the busiest rank."""
        return self.plan.split.share

    @cached_property
    def adds_micro_batches(self) -> bool:
        """Whether each sample adds its own part to the gradient, as with ``gradient: plain``."""
        from gatrain.build import build_strategy

        return build_strategy(self.config).adds_micro_batches

    @cached_property
    def sizes(self) -> list[Trial]:
        """Trials computed as the plan says, all micro-batches that fit, smallest first."""
        own = self.plan.settings
        same = [
            trial
            for trial in self.plan.trials
            if (trial.settings.checkpointing, trial.settings.compile, trial.settings.knobs)
            == (own.checkpointing, own.compile, own.knobs)
        ]
        return sorted((t for t in same if t.outcome == FITS), key=lambda t: t.micro_batch)

    @cached_property
    def chosen(self) -> Trial | None:
        """The trial of the plan's own micro-batch, or of the nearest size."""
        return min(self.sizes, key=lambda t: abs(t.micro_batch - self.plan.micro_batch), default=None)
