"""Advice beside the plan, with numbers from the measured curve. Pure functions, no torch.

Everything here is a prediction from the cost form of `gatrain.tune.search`; nothing of it changes the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from gatrain import units
from gatrain.batch import Split
from gatrain.config import AdamWConfig, OptimizerConfig
from gatrain.tune import search
from gatrain.tune.curve import Curve
from gatrain.tune.search import Candidate

MOST_SENTENCES = 3
NEARBY = 0.15
"""Part of the effective batch by which a better one may differ."""
WORTH_SAYING = 0.02
"""Less time per sample than this is not worth another effective batch."""
MOST_BATCHES = 64
"""Effective batches looked at: the nearest that split well."""


@dataclass(frozen=True)
class BetterBatch:
    """An effective batch near the asked one whose micro-steps take ``gain`` (a part) less time per sample."""

    effective_batch: int
    gain: float


def sentences(
    curve: Curve,
    chosen: Candidate,
    *,
    optimizer: OptimizerConfig,
    on_gpu: bool,
    is_plain: bool = True,
) -> list[str]:
    """At most `MOST_SENTENCES` short pieces of advice, the most useful first.

    Args:
        is_plain: the effective batch is one number of samples, by no rule: another one may be proposed.
    """
    said = []
    if chosen.accumulation_steps == 1:
        said.append("The whole share of each rank is computed at once: no accumulation is needed.")
    split = Split(chosen.split.effective_batch, chosen.split.world_size)
    better = better_batches(curve, split) if is_plain else []
    if better:
        words = " or ".join(
            f"batch.effective={b.effective_batch} ({b.gain:.1%} less time per sample)" for b in better
        )
        said.append(f"Another effective batch would split better: {words}; predicted, the micro-steps alone.")
    if on_gpu and (faster := next_gpu_step_s(curve, split)) is not None:
        unknown = (
            " without the gradient reduction, which one GPU does not show" if split.world_size == 1 else ""
        )
        now = units.seconds(chosen.step_s)
        said.append(
            f"One more GPU: a step is predicted to take {units.seconds(faster)} instead of {now}{unknown}."
        )
    is_choice = is_plain and split.world_size == 1 and chosen.accumulation_steps > 1
    if is_choice and isinstance(optimizer, AdamWConfig):
        said.append(small_batch_sentence(chosen.micro_batch, split.effective_batch, optimizer))
    return said[:MOST_SENTENCES]


def better_batches(curve: Curve, split: Split) -> list[BetterBatch]:
    """The nearest effective batch below and above that splits clearly better, nearest first.

    Only micro-steps count: that a larger effective batch pays reduction and update less often is true of every
    one and says nothing about the split.
    """
    effective_batch = split.effective_batch
    now = _micro_seconds_per_sample(curve, split)
    if now is None:
        return []
    found: dict[bool, BetterBatch] = {}
    for other in _well_split(curve, split):
        is_above = other > effective_batch
        if is_above in found:
            continue
        per_sample = _micro_seconds_per_sample(curve, Split(other, split.world_size))
        if per_sample is not None and per_sample < now * (1 - WORTH_SAYING):
            found[is_above] = BetterBatch(other, 1 - per_sample / now)
    return sorted(found.values(), key=lambda b: abs(b.effective_batch - effective_batch))


def _well_split(curve: Curve, split: Split) -> list[int]:
    """Effective batches within `NEARBY` that are multiples of a measured size on every rank, nearest first."""
    effective_batch = split.effective_batch
    reach = int(effective_batch * NEARBY)
    found: set[int] = set()
    for m in curve.fitting:
        unit = m.micro_batch * split.world_size
        first = -(-(effective_batch - reach) // unit) * unit
        nearest = round(effective_batch / unit) * unit
        candidates = range(
            max(first, nearest - 2 * unit, unit), min(effective_batch + reach, nearest + 2 * unit) + 1, unit
        )
        found.update(candidates)
    found.discard(effective_batch)
    return sorted(found, key=lambda other: (abs(other - effective_batch), other))[:MOST_BATCHES]


def _micro_seconds_per_sample(curve: Curve, split: Split) -> float | None:
    options = search.candidates(curve, split)
    if not options:
        return None
    best = min(option.step_s for option in options)
    return (best - curve.step_overhead_s) / split.effective_batch


def next_gpu_step_s(curve: Curve, split: Split) -> float | None:
    """Predicted seconds of a step at the same effective batch on one more GPU like the slowest; None if that
    would leave a GPU without work."""
    if split.effective_batch <= split.world_size:
        return None
    share = Split(split.effective_batch, split.world_size + 1).share
    sizes = [m.micro_batch for m in curve.fitting if m.micro_batch <= share]
    if share <= curve.fitting[-1].micro_batch:
        sizes.append(share)
    if not sizes:
        return None
    return min(search.share_seconds(curve, share, size) for size in sizes) + curve.step_overhead_s


def rescaled_beta(beta: float, smaller_batch: int, effective_batch: int) -> float:
    """``beta ** (smaller_batch / effective_batch)``: the same half-life in samples.

    Marek et al., "Small batch size training for language models" (2025), arXiv 2507.07101.
    """
    return float(beta ** (smaller_batch / effective_batch))


def small_batch_sentence(micro_batch: int, effective_batch: int, optimizer: AdamWConfig) -> str:
    """What one would set to train without accumulation on one rank instead."""
    first, second = optimizer.betas
    return (
        f"On one rank accumulation is a choice: batch.effective={micro_batch} with "
        f"'optimizer.betas=[{first:g},{rescaled_beta(second, micro_batch, effective_batch):.6g}]' (beta2's "
        f"half-life in samples kept; tune optimizer.lr again) takes {effective_batch // micro_batch} times "
        "the updates for the same samples (Marek et al. 2025, arXiv 2507.07101)."
    )
