"""The choice: from measured curves to the fastest split of one effective batch. Pure functions, no torch.

The cost of one optimizer step on the busiest rank is

    step_s(b) = sum of micro_step_s over that rank's micro-batches + reduce_s + optimizer_s

where the time of a micro-batch smaller than ``b`` lies on the line between measured sizes; ``b`` itself, the size
that is chosen, was measured. Where the ranks are unequal it is the largest of all ranks, each with times and a
share of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from gatrain import batch, units
from gatrain.batch import Split
from gatrain.plan import DOES_NOT_FIT, FITS, Measurement, StepSettings, Trial
from gatrain.tune import knobs
from gatrain.tune.curve import Curve

NOISE = 0.01
"""Step times that differ by less than this part are taken as equal."""
NEARLY = 1 / 16
"""A micro-batch that is smaller than a measured size by at most this part takes as long per sample."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute the effective batch, with its predicted seconds per optimizer step."""

    settings: StepSettings
    micro_batch: int
    split: Split
    step_s: float
    measured: bool
    """False where the micro-step time lies on the line between two measured sizes: such a size is measured before
    it may be chosen."""
    noise: float = 0.0
    """Relative standard error of the measured micro-step."""

    @property
    def key(self) -> tuple[StepSettings, int, Split]:
        """What tells candidates apart."""
        return self.settings, self.micro_batch, self.split

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps of the busiest rank."""
        return self.split.accumulation_steps(self.micro_batch)


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


def candidates(curve: Curve, even: Split, fixed: int | None = None) -> list[Candidate]:
    """Every way to compute a window that the curve can vouch for, with its cost.

    With ``fixed`` it is that micro-batch alone, if it was measured. Else, besides measured sizes, these are the
    near-equal cuts of the share between them: smaller than a size that fits, so they fit as well. Where the ranks
    are unequal, the same with shares in proportion to their speed besides the ``even`` ones.
    """
    fitting = {m.micro_batch for m in curve.fitting}
    measured = {m.micro_batch: m for m in curve.fitting if not m.is_estimate}
    if not fitting:
        return []
    found = []
    for split in {even, unequal(curve, even)}:
        cuts = {-(-split.share // k) for k in range(1, 33)}
        # a size that does not divide the share is evened out, which gives one of the cuts
        sizes = {_name_of(split.share, size, measured) for size in fitting | cuts if size <= split.share}
        sizes = {size for size in sizes if _is_vouched_for(curve, size)}
        if fixed is not None:
            sizes = fitting & {fixed}
        found += [
            Candidate(
                settings=curve.settings,
                micro_batch=size,
                split=split,
                step_s=step_seconds(curve, split, size),
                measured=size in measured,
                noise=(measured[size].noise or 0.0) if size in measured else 0.0,
            )
            for size in sorted(sizes)
            # no rank may meet a size that is known to crash, such as BatchNorm's single sample
            if not split.distinct_sizes(size) & curve.unusable
        ]
    return sorted(
        found, key=lambda option: (option.micro_batch, not option.split.is_even, option.split.shares)
    )


def _name_of(share: int, size: int, measured: Collection[int]) -> int:
    """The largest micro-batch that a share cut by ``size`` really has, or a measured size that is hardly larger and
    cuts the share in the same way."""
    even = batch.even_size(share, size)
    alike = (each for each in measured if even <= each <= (1 + NEARLY) * even)
    return min(
        (each for each in alike if batch.even_size(share, each) == even and each <= share), default=even
    )


def unequal(curve: Curve, even: Split) -> Split:
    """Shares in proportion to the ranks' measured speeds; ``even`` where these are as good."""
    factors = _factors(curve, even)
    return even.in_proportion([round(1e6 / factor) for factor in factors]) if factors else even


def _factors(curve: Curve, split: Split) -> tuple[float, ...]:
    factors = curve.rank_factors
    return factors if len(factors) == split.world_size else ()


def _is_vouched_for(curve: Curve, size: int) -> bool:
    """Whether the measured sizes on both sides work: next to a wrong result anything may happen."""
    below = max((m for m in curve.measurements if m.micro_batch <= size), default=None, key=_size)
    above = min((m for m in curve.measurements if m.micro_batch >= size), default=None, key=_size)
    return all(m is not None and m.outcome == FITS for m in (below, above))


def _size(measurement: Measurement) -> int:
    return measurement.micro_batch


def step_seconds(curve: Curve, split: Split, size: int) -> float:
    """Modelled seconds of one optimizer step; see the module's docstring for the form."""
    # a micro-step's time is the slowest rank's
    factors, shares = ((1.0,), (split.share,)) if split.is_even else (_factors(curve, split), split.shares)
    by_rank = zip(factors, shares, strict=True)
    busiest_s = max(factor * share_seconds(curve, share, size) for factor, share in by_rank)
    return busiest_s + curve.step_overhead_s


def share_seconds(curve: Curve, share: int, size: int) -> float:
    """Seconds of all micro-steps of ``share`` samples on the slowest rank."""
    return sum(count * curve.micro_step_s(part) for part, count in batch.micro_batch_counts(share, size))


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


def simplicity(option: Candidate) -> tuple[int, ...]:
    """Sorts the simpler candidate first."""
    return (not option.split.is_even, *knobs.simplicity(option.settings), option.accumulation_steps)


def trial_rows(curve: Curve, even: Split) -> list[Trial]:
    """The curve as rows of the plan's table, with what each size means for this effective batch."""
    split = unequal(curve, even)
    rows = []
    for m in curve.measurements:
        if m.micro_batch > split.share:
            continue  # measured for a larger effective batch
        step_s = rate = None
        if m.outcome == FITS and m.micro_step_s is not None:
            step_s = step_seconds(curve, split, m.micro_batch)
            rate = split.effective_batch / step_s if step_s > 0 else None
        rows.append(Trial(curve.settings, m, samples_per_s=rate, step_s=step_s))
    return rows


def explain(
    chosen: Candidate,
    options: Iterable[Candidate],
    curves: Iterable[Curve],
    confirmed: tuple[float, str] | None = None,
) -> str:
    """The choice in one sentence, with its numbers.

    Args:
        confirmed: measured seconds of full steps, and what they say of the other finalists.
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
    if option.split != chosen.split:
        differing.append("equal shares" if option.split.is_even else "unequal shares")
    differing += knobs.differences(option.settings, chosen.settings)
    return text + (f" ({', '.join(differing)})" if differing else "")
