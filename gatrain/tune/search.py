"""The choice: from measured curves to the fastest split of one effective batch. Pure functions, no torch.

The cost of one optimizer step on the busiest rank is

    step_s(b) = sum of micro_step_s over that rank's micro-batches + reduce_s + optimizer_s

where the time of a micro-batch smaller than ``b`` lies on the line between measured sizes; ``b`` itself, the size
that is chosen, was measured. Where the ranks are unequal it is the largest of all ranks, each with times and a
share of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from gatrain import batch, units
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, StepSettings, Trial
from gatrain.tune.curve import Curve, Measurement

NOISE = 0.01
"""Step times that differ by less than this part are taken as equal."""
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
"""Relative difference between losses of equal samples that rounding in that precision cannot explain."""
NEARLY = 1 / 16
"""A micro-batch that is smaller than a measured size by at most this part takes as long per sample."""
MAX_EXTRA_SIZES = 6
_CHECKPOINTING_ORDER = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """One way to compute the effective batch, with its predicted seconds per optimizer step."""

    settings: StepSettings
    micro_batch: int
    accumulation_steps: int
    step_s: float
    measured: bool
    """False where the micro-step time lies on the line between two measured sizes: such a size is measured before
    it may be chosen."""
    shares: tuple[int, ...] = ()
    """Samples of each rank; empty where they are equal, up to one sample."""
    noise: float = 0.0
    """Relative standard error of the measured micro-step."""

    @property
    def key(self) -> tuple[StepSettings, int, tuple[int, ...]]:
        """What tells candidates for one effective batch apart."""
        return self.settings, self.micro_batch, self.shares


def candidate_sizes(share: int) -> list[int]:
    """Micro-batch sizes worth measuring for a share of ``share`` samples, rising; 1 and ``share`` are among
    them.

    Powers of two, as the share is really cut by them, cover the curve; the share itself means no accumulation; a
    few divisors and near-equal cuts (``share / k`` rounded up) avoid a small remainder. Sizes close to another are
    left out.
    """
    powers = (2**power for power in range(share.bit_length()))
    sizes = {1, share, *(batch.even_size(share, power) for power in powers if power <= share)}
    lowest = max(6, share // 32)
    divisors = [share // k for k in range(2, 65) if share % k == 0]
    cuts = [-(-share // k) for k in range(2, 5)]
    extras = 0
    for size in (*divisors, *cuts):
        # a cut that leaves a remainder must fill a real gap to be worth its time
        apart = 1.2 if size in divisors else 1.4
        spaced = all(max(size, other) >= apart * min(size, other) for other in sizes)
        if size >= lowest and spaced and extras < MAX_EXTRA_SIZES:
            sizes.add(size)
            extras += 1
    return sorted(sizes)


@functools.lru_cache(maxsize=4096)
def parts(share: int, size: int) -> tuple[tuple[int, int], ...]:
    """The micro-batches that a share is cut into where none may exceed ``size``: (samples, how many) of each."""
    return tuple(collections.Counter(batch.micro_batch_sizes(share, size)).items())


def reject_wrong_losses(curve: Curve) -> Curve:
    """Turn sizes whose loss disagrees with the smallest size's into failures: a wrong answer is no answer."""
    judged = tuple(_judge(m, curve.settings.precision) for m in curve.measurements)
    return dataclasses.replace(curve, measurements=judged)


def wrong_at_every_size(found: Curve, judged: Curve) -> Measurement | None:
    """The first size whose loss disagrees with the smallest's, where all larger sizes do: then it is the loss that
    depends on the size. A kernel that is wrong at some sizes, or a compiled one, is another matter."""
    larger = [m for m in found.fitting if m.loss is not None and m.reference_loss is not None][1:]
    failed = {m.micro_batch for m in judged.measurements if m.outcome == FAILED}
    if found.settings.compile or not larger or not all(m.micro_batch in failed for m in larger):
        return None
    return larger[0]


def unrepeatable(curve: Curve) -> Measurement | None:
    """A size whose loss differs from itself, repeated with the same samples and seed."""
    tolerance = LOSS_TOLERANCE.get(curve.settings.precision, 5e-2)
    return next((m for m in curve.fitting if _is_unrepeatable(m, tolerance)), None)


def _is_unrepeatable(m: Measurement, tolerance: float) -> bool:
    if m.loss is None or m.repeated_loss is None or not math.isfinite(m.loss):
        return False
    return not abs(m.loss - m.repeated_loss) <= 0.1 * tolerance * abs(m.loss)


def disagrees(loss: float, reference: float, noise: float, precision: str) -> bool:
    """Whether rounding and dropout cannot explain the difference to the reference."""
    # six standard deviations: dropout alone must practically never reject a size
    allowed = max(LOSS_TOLERANCE.get(precision, 5e-2) * abs(reference), 6 * noise, 1e-6)
    return not abs(loss - reference) <= allowed  # true for nan, which is what we want


def _judge(m: Measurement, precision: str) -> Measurement:
    if m.outcome != FITS or m.loss is None or m.reference_loss is None or not math.isfinite(m.reference_loss):
        return m
    if not disagrees(m.loss, m.reference_loss, m.loss_noise, precision):
        return m
    if _is_unrepeatable(m, LOSS_TOLERANCE.get(precision, 5e-2)):
        return m  # says nothing about this size
    return dataclasses.replace(
        m,
        outcome=FAILED,
        error=f"wrong result: the loss of the same sample is {m.loss:.6g} at this size and "
        f"{m.reference_loss:.6g} at the smallest",
    )


def extended(compiled: Curve, plain: Curve) -> Curve:
    """The compiled curve with estimates below its smallest size: the plain curve's times, scaled to meet it there.

    Compilation takes long, so few sizes are compiled; a smaller effective batch must not need new trials.
    """
    if not compiled.fitting:
        return compiled
    first = compiled.fitting[0]
    known = {m.micro_batch for m in compiled.measurements}  # also those that failed
    sizes = [m for m in plain.fitting if m.micro_batch < first.micro_batch and m.micro_batch not in known]
    if not sizes or first.micro_batch > plain.fitting[-1].micro_batch:
        return compiled
    ratio = (first.micro_step_s or 0.0) / plain.micro_step_s(first.micro_batch)
    estimates = [
        Measurement(
            micro_batch=m.micro_batch,
            outcome=FITS,
            peak_memory_bytes=first.peak_memory_bytes,  # no more than that
            micro_step_s=(m.micro_step_s or 0.0) * ratio,
            rank_s=tuple(seconds * ratio for seconds in m.rank_s),
            is_estimate=True,
        )
        for m in sizes
    ]
    return dataclasses.replace(compiled, measurements=(*estimates, *compiled.measurements))


def candidates(
    curve: Curve, effective_batch: int, world_size: int, fixed: int | None = None
) -> list[Candidate]:
    """Every split of the effective batch that the curve can vouch for, with its cost.

    With ``fixed`` it is the split by that micro-batch alone, if it was measured. Else, besides measured sizes,
    these are the near-equal cuts of the share between them: smaller than a size that fits, so they fit as well.
    Where the ranks are unequal, the same with shares in proportion to their speed.
    """
    fitting = {m.micro_batch for m in curve.fitting}
    measured = {m.micro_batch: m for m in curve.fitting if not m.is_estimate}
    if not fitting:
        return []
    found = []
    for shares in {(), unequal_shares(curve, effective_batch, world_size)}:
        share = max(shares) if shares else batch.largest_share(effective_batch, world_size)
        cuts = {-(-share // k) for k in range(1, 33)}
        # a size that does not divide the share is evened out, which gives one of the cuts
        sizes = {_name_of(share, size, measured) for size in fitting | cuts if size <= share}
        sizes = {size for size in sizes if _is_vouched_for(curve, size)}
        if fixed is not None:
            sizes = fitting & {fixed}
        found += [
            Candidate(
                settings=curve.settings,
                micro_batch=size,
                accumulation_steps=-(-share // size),
                step_s=step_seconds(curve, effective_batch, world_size, size, shares),
                measured=size in measured,
                shares=shares,
                noise=(measured[size].noise or 0.0) if size in measured else 0.0,
            )
            for size in sorted(sizes)
            if not _uses_unusable(curve, shares or batch.rank_shares(effective_batch, world_size), size)
        ]
    return sorted(found, key=lambda option: (option.micro_batch, option.shares))


def _name_of(share: int, size: int, measured: Collection[int]) -> int:
    """The largest micro-batch that a share cut by ``size`` really has, or a measured size that is hardly larger and
    cuts the share in the same way."""
    even = batch.even_size(share, size)
    alike = (each for each in measured if even <= each <= (1 + NEARLY) * even)
    return min(
        (each for each in alike if batch.even_size(share, each) == even and each <= share), default=even
    )


def has_equal_steps(option: Candidate, effective_batch: int, world_size: int) -> bool:
    """Whether all ranks have as many micro-steps, as SyncBatchNorm needs it."""
    shares = option.shares or batch.rank_shares(effective_batch, world_size)
    return len({len(sizes) for sizes in batch.split_shares(shares, option.micro_batch)}) == 1


def unequal_shares(curve: Curve, effective_batch: int, world_size: int) -> tuple[int, ...]:
    """Shares in proportion to the ranks' measured speeds; empty where equal ones are as good."""
    factors = _factors(curve, world_size)
    if not factors:
        return ()
    shares = batch.proportional_shares(effective_batch, [round(1e6 / factor) for factor in factors])
    return tuple(shares) if max(shares) - min(shares) > 1 else ()


def _factors(curve: Curve, world_size: int) -> tuple[float, ...]:
    factors = curve.rank_factors
    return factors if len(factors) == world_size else ()


def _is_vouched_for(curve: Curve, size: int) -> bool:
    """Whether the measured sizes on both sides work: next to a wrong result anything may happen."""
    below = max((m for m in curve.measurements if m.micro_batch <= size), default=None, key=_size)
    above = min((m for m in curve.measurements if m.micro_batch >= size), default=None, key=_size)
    return all(m is not None and m.outcome == FITS for m in (below, above))


def _size(measurement: Measurement) -> int:
    return measurement.micro_batch


def _uses_unusable(curve: Curve, shares: Iterable[int], size: int) -> bool:
    """Whether any rank's split contains a size that is known to crash, such as BatchNorm's single sample."""
    used = {part for share in set(shares) for part, _ in parts(share, size)}
    return bool(used & curve.unusable)


def step_seconds(
    curve: Curve, effective_batch: int, world_size: int, size: int, shares: Sequence[int] = ()
) -> float:
    """Predicted seconds of one optimizer step; see the module's docstring for the form."""
    if not shares:
        share = batch.largest_share(effective_batch, world_size)
        return share_seconds(curve, share, size) + curve.step_overhead_s
    by_rank = zip(_factors(curve, world_size), shares, strict=True)
    return (
        max(factor * share_seconds(curve, share, size) for factor, share in by_rank) + curve.step_overhead_s
    )


def share_seconds(curve: Curve, share: int, size: int) -> float:
    """Seconds of all micro-steps of ``share`` samples on the slowest rank."""
    return sum(count * curve.micro_step_s(part) for part, count in parts(share, size))


def choose(options: Sequence[Candidate]) -> Candidate:
    """The fastest candidate that was measured; within the noise the simpler one.

    Simpler means: equal shares, not compiled, less checkpointing, fewer accumulation steps.

    Raises:
        ValueError: none of ``options`` was measured.
    """
    options = [option for option in options if option.measured]
    if not options:
        raise ValueError("no candidate")
    fastest = min(option.step_s for option in options)
    equal = [option for option in options if option.step_s <= fastest * (1 + NOISE)]
    return min(equal, key=lambda option: (*simplicity(option), option.step_s))


def simplicity(option: Candidate) -> tuple[bool, bool, int, int]:
    """Sorts the simpler candidate first."""
    return (
        bool(option.shares),
        option.settings.compile,
        _CHECKPOINTING_ORDER.index(option.settings.checkpointing),
        option.accumulation_steps,
    )


def trial_rows(curve: Curve, effective_batch: int, world_size: int) -> list[Trial]:
    """The curve as rows of the plan's table, with what each size means for this effective batch."""
    unequal = unequal_shares(curve, effective_batch, world_size)
    share = max(unequal) if unequal else batch.largest_share(effective_batch, world_size)
    rows = []
    for m in curve.measurements:
        if m.micro_batch > share:
            continue  # measured for a larger effective batch
        step_s = rate = None
        if m.outcome == FITS and m.micro_step_s is not None:
            step_s = step_seconds(curve, effective_batch, world_size, m.micro_batch, unequal)
            rate = effective_batch / step_s if step_s > 0 else None
        rows.append(
            Trial(
                micro_batch=m.micro_batch,
                precision=curve.settings.precision,
                checkpointing=curve.settings.checkpointing,
                compile=curve.settings.compile,
                outcome=m.outcome,
                peak_memory_bytes=m.peak_memory_bytes,
                micro_step_s=m.micro_step_s,
                reduce_s=m.reduce_s,
                optimizer_s=m.optimizer_s,
                samples_per_s=rate,
                step_s=step_s,
                loss=m.loss,
                error=m.error,
            )
        )
    return rows


def explain(
    chosen: Candidate,
    options: Iterable[Candidate],
    curves: Iterable[Curve],
    confirmed: tuple[float, str] | None = None,
) -> str:
    """The choice in one sentence, with its numbers.

    Args:
        confirmed: measured seconds of whole steps, and what they say of the other finalists.
    """
    others = [o for o in options if o.measured and o.key != chosen.key]
    text = f"{name(chosen, chosen)} takes {units.seconds(confirmed[0] if confirmed else chosen.step_s)}"
    text += " per optimizer step"
    if confirmed:
        text += f", {confirmed[1]}"
    elif others:
        other = min(others, key=lambda option: option.step_s)
        if other.step_s > chosen.step_s * (1 + NOISE):
            text += f"; the next best, {name(other, chosen)}, takes {units.seconds(other.step_s)}"
        else:
            text += f", within {NOISE:.0%} of {name(other, chosen)} ({units.seconds(other.step_s)})"
    for curve in curves:
        refused = [m.micro_batch for m in curve.measurements if m.outcome == DOES_NOT_FIT]
        if refused and dataclasses.replace(curve.settings, sync=chosen.settings.sync) == chosen.settings:
            text += f"; {min(refused)} does not fit"
    return text


def name(option: Candidate, chosen: Candidate) -> str:
    """``micro-batch 16 x 2``; settings are named where they differ from the chosen ones."""
    steps = option.accumulation_steps
    text = f"micro-batch {option.micro_batch}" + (f" x {steps}" if steps > 1 else "")
    differing = []
    if option.shares != chosen.shares:
        differing.append("unequal shares" if option.shares else "equal shares")
    if option.settings.sync != chosen.settings.sync:
        differing.append(f"sync {option.settings.sync}")
    if option.settings.checkpointing != chosen.settings.checkpointing:
        differing.append(f"checkpointing {option.settings.checkpointing}")
    if option.settings.compile != chosen.settings.compile:
        differing.append("compiled" if option.settings.compile else "not compiled")
    return text + (f" ({', '.join(differing)})" if differing else "")
