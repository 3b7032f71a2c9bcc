"""A window on the host: this rank's micro-batches, weighed and counted, as every gradient strategy takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatrain.tasks.base import Batch


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the host with the weight it adds to each loss term's denominator."""

    batch: Batch
    weights: Mapping[str, float]
    samples: int | None = None
    """Samples that it holds; None where nobody counted."""
    dropped: int = 0
    """Samples that are not in it: those that the collate function left out, and `skipped` ones."""
    skipped: tuple[str, ...] = ()
    """Each sample that could not be read and was left out, with the reason."""
    tokens: int | None = None
    keys: tuple[tuple[int, int], ...] = ()
    """(epoch, sample id) of every sample that was read for it, skipped ones included."""
    position: int | None = None
    """Place of its first sample in the window, over all ranks."""
    places: tuple[int, ...] | None = None
    """Where ``dropped`` ones are known: the place among ``keys`` of each sample that it holds."""
    undeclared_draws: bool = False
    """Whether data or collate function drew random numbers although they are declared deterministic."""

    @property
    def is_empty(self) -> bool:
        """True if the collate function left nothing: there is no batch to compute."""
        return self.batch is None and not self.weights


@dataclass(frozen=True)
class LoadedWindow:
    """This rank's part of one window, on the host (pinned where the device is a GPU).

    ``micro_batches`` may be empty. Only the first three fields matter to a gradient.
    """

    micro_batches: Sequence[MicroBatch]
    seed: tuple[int, ...] | None = None
    """Random numbers of a micro-step are keyed by these integers and its position in the window (its index where
    that is unknown); None leaves the generators alone."""
    counts: dict[str, float] = field(default_factory=dict)
    """Host numbers to be summed over the ranks with the weights. The loader's: ``samples`` that reached a batch and
    ``dropped`` ones that are in none, ``unreadable`` ones of them, the ``digest`` of what was read, and input
    ``tokens``. The loop adds its own, such as a stop request."""
    failure: Exception | None = None
    """An error of this rank outside of the window: raised in place of its passes, where all ranks agree on it."""
    index: int = 0
    epoch: int = 0
    window_samples: int = 0
    """Samples of the whole window, by the schedule."""
    window_digest: int = 0
    """What the ranks' digests must add up to."""
    skipped: Sequence[str] = ()
    """Each sample of this rank's part that could not be read, with the reason."""
    position: dict[str, Any] | None = None
    """Of a stream: where the next window begins, for the saved state."""
    notices: Sequence[str] = ()
    """What a person should know of how it was read; each is said once."""

    def seed_of(self, index: int) -> tuple[int, ...] | None:
        """What the random numbers of a micro-step follow from; None leaves the generators alone."""
        if self.seed is None:
            return None
        # by position, not by rank: another number of ranks draws the same for the same samples
        position = self.micro_batches[index].position
        return *self.seed, index if position is None else position


def counts_of(micro_batches: Sequence[MicroBatch], digest: int) -> dict[str, float]:
    """`LoadedWindow.counts` of what was read, empty micro-batches included."""
    full = [micro for micro in micro_batches if not micro.is_empty]
    counted = [micro.tokens for micro in full if micro.tokens is not None]
    has_tokens = bool(full) and len(counted) == len(full)
    return {
        "samples": sum(micro.samples or 0 for micro in micro_batches),
        "dropped": sum(micro.dropped for micro in micro_batches),
        "unreadable": sum(len(micro.skipped) for micro in micro_batches),
        "digest": digest,
        "tokens": sum(counted) if has_tokens else 0,
        "has_tokens": has_tokens,
    }
