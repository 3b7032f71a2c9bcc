"""The door `norm`: what is done about BatchNorm, which normalises by the samples that it sees. ``norm: keep``.

BatchNorm sees a micro-batch, so with accumulation it is another model than over the whole effective batch: Ghost
BatchNorm (Hoffer, Hubara and Soudry 2017, arXiv 1705.08741), whose groups are the micro-batches. One word of a
recipe keeps it, converts it, or computes it over the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from gatrain.train.modules import batch_norms

if TYPE_CHECKING:
    from gatrain.train.gradient import GradientStrategy
    from gatrain.train.step import Step


class Normalisation:
    """What is done about a model's BatchNorm layers. Subclass it; ``norm._target_`` names the subclass."""

    exact: str = ""
    """One sentence: what the result is equal to, and what it depends on."""
    running_statistics: str = ""
    """What the plan says of running statistics where a window has several micro-batches; empty for nothing."""

    def convert(self, model: nn.Module) -> nn.Module:
        """The model that trains, from the one that the task made: in place where that works. No random numbers.

        It may come without memory (on the meta device), and is converted again in each process.

        Raises:
            ConfigError: a layer that cannot be converted.
        """
        return model

    def mixing(self, model: nn.Module) -> list[str]:
        """Names of the layers of the converted model whose results depend on the split."""
        return batch_norms(model)

    def strategy(self) -> GradientStrategy | None:
        """A way from the window to its gradient of its own, in the place of ``gradient: plain``."""
        return None

    def attach(self, step: Step) -> None:
        """The step of the converted model is made: listen to it (`Step.before_micro_step`)."""

    def remarks(self, model: nn.Module) -> list[str]:
        """What a person should know before the run, whatever the plan: sentences about the converted model."""
        return []


def counted(names: Sequence[str], what: str = "BatchNorm") -> str:
    """Layers in words: ``BatchNorm ('bn1')``, ``20 BatchNorm layers ('bn1' to 'layer4.1.bn2')``."""
    if len(names) == 1:
        return f"{what} ('{names[0]}')"
    return f"{len(names)} {what} layers ('{names[0]}' to '{names[-1]}')"
