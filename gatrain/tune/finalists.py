"""The finalists: which candidates are timed as full optimizer steps, and what those times say. No torch.

The model of `gatrain.tune.search` composes a step from parts. What it leaves out (the copies of a real window, a
size between two measured ones, an allocator that must keep two sizes at once) is a few percent, so
candidates closer than that are decided by full steps, timed in turn: A B C A B C. A disturbance then meets all of
them alike, and the noise is that of the ratios within a round, not of the machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gatrain import schema
from gatrain.batch import Split
from gatrain.plan import StepSettings
from gatrain.tune.search import Candidate, name, simplicity

FINALIST_WITHIN, FINALIST_AT_MOST = 0.03, 1.0
"""Part of the best's step time within which a candidate is a finalist: where the micro-steps' times were steady,
and at most, where they were noisy."""
MAX_FINALISTS = 3
ROUNDS = (3, 15)
MAX_SECONDS = {"cpu": 8.0, "cuda": 10.0}
"""For all full steps together, warm-up included."""
VARYING = "not every micro-step uses all parameters"
"""Why an overlapped reduction is not compared."""
EQUAL_WITHIN, EQUAL_AT_MOST = 0.005, 0.03
"""Differences below the first are always noise; above the second never, however noisy the machine is."""


@dataclass(frozen=True)
class Finalist:
    """One candidate as the trial processes need it."""

    settings: StepSettings
    micro_batch: int
    split: Split

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no candidate has.
        """
        schema.at_least(1, micro_batch=self.micro_batch)


@dataclass(frozen=True)
class StepTimings:
    """What one finalist showed: seconds of each round on the slowest rank, or why there are none."""

    finalist: Finalist
    seconds: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median_s(self) -> float:
        """Median of the rounds; infinite where there is none."""
        return statistics.median(self.seconds) if self.seconds else math.inf


@dataclass(frozen=True)
class Confirmation:
    """One interleaved run of finalists for one effective batch on one world."""

    entries: tuple[StepTimings, ...]

    def get(self, finalist: Finalist) -> StepTimings | None:
        """What this run says of one finalist."""
        return next((entry for entry in self.entries if entry.finalist == finalist), None)

    def check(self) -> None:
        """
        Raises:
            ValueError: a number that was never measured.
        """
        for seconds in (seconds for entry in self.entries for seconds in entry.seconds):
            schema.at_least(0, seconds=seconds)


@dataclass(frozen=True)
class Verdict:
    """The winner of a confirmation, how sure that is, and the sentence that says so."""

    chosen: Candidate
    step_s: float
    sentence: str


def finalists(options: Sequence[Candidate]) -> list[Candidate]:
    """The measured candidates that the model cannot tell from the best; one alone where the gap is clear.

    The best is first, then the one with the fewest accumulation steps: what is fixed in a micro-step costs it
    least, so where noise hides the order it is the likeliest to be better. Then the others, best first.
    """
    options = [option for option in options if option.measured]
    best = min(options, key=lambda option: (option.step_s, simplicity(option)))

    def is_close(option: Candidate) -> bool:
        noise = 2 * math.hypot(option.noise, best.noise) if option.key != best.key else 0.0
        return option.step_s <= best.step_s * (1 + min(max(FINALIST_WITHIN, noise), FINALIST_AT_MOST))

    near = sorted(filter(is_close, options), key=lambda option: (option.step_s, simplicity(option)))
    kept: list[Candidate] = []
    for option in near:
        # neighbours in size are the same choice: their times differ by less than can be measured
        if all(_differs(option, other) for other in kept):
            kept.append(option)
    fewest = min(kept[1:], key=lambda option: (option.accumulation_steps, option.step_s), default=None)
    if fewest is not None:
        kept = [kept[0], fewest, *(option for option in kept[1:] if option.key != fewest.key)]
    return kept[:MAX_FINALISTS]


def _differs(option: Candidate, other: Candidate) -> bool:
    if (option.settings, option.split) != (other.settings, other.split):
        return True
    low, high = sorted((option.micro_batch, other.micro_batch))
    return high > 1.05 * low


def finalist_of(option: Candidate) -> Finalist:
    """The candidate without what was modelled."""
    return Finalist(option.settings, option.micro_batch, option.split)


def affordable(step_s: Sequence[float], seconds: float) -> tuple[int, int]:
    """(finalists, rounds) for which ``seconds`` suffice, one warm-up each included; fewer than two: none.

    Args:
        step_s: predicted seconds of a step of each finalist, best first.
    """
    for count in range(len(step_s), 1, -1):
        rounds = int(seconds / max(sum(step_s[:count]), 1e-9)) - 1
        if rounds >= ROUNDS[0]:
            return count, min(rounds, ROUNDS[1])
    return 0, 0


def verdict(timed: Sequence[tuple[Candidate, StepTimings]]) -> Verdict | None:
    """Choose by full steps: the best median, and within the noise of the ratios the simpler candidate.

    None where fewer than two have times: there is nothing to compare.
    """
    ranked = sorted((pair for pair in timed if pair[1].seconds), key=lambda pair: pair[1].median_s)
    if len(ranked) < 2:
        return None
    (best, best_steps), *others = ranked
    gaps = {best.key: (0.0, 0.0), **{o.key: difference(best_steps.seconds, s.seconds) for o, s in others}}
    equal = [
        (option, steps)
        for option, steps in ranked
        if gaps[option.key][0] <= min(max(gaps[option.key][1], EQUAL_WITHIN), EQUAL_AT_MOST)
    ]
    chosen, steps = min(equal, key=lambda pair: (*simplicity(pair[0]), pair[1].median_s))
    rounds = f"confirmed over {len(steps.seconds)} full steps each"
    if len(equal) > 1:
        rival = next(option for option, _ in equal if option.key != chosen.key)
        gap, noise = gaps[rival.key] if chosen.key == best.key else gaps[chosen.key]
        why = (
            "took the one with fewer accumulation steps"
            if chosen.accumulation_steps < rival.accumulation_steps
            else "took the simpler one"
        )
        text = (
            f"{rounds}: the difference to {name(rival, chosen)} ({gap:.1%}) is within the noise "
            f"({max(noise, EQUAL_WITHIN):.1%}), {why}"
        )
    else:
        second = ranked[1][0]
        gap, noise = gaps[second.key]
        text = f"{rounds}: the next, {name(second, chosen)}, takes {gap:.1%} longer, noise {noise:.1%}"
    return Verdict(chosen, steps.median_s, text)


def difference(best: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(median of other / best - 1 over the rounds, its noise: two standard errors); the first never below 0."""
    ratios = [b / a - 1 for a, b in zip(best, other, strict=False)]
    # 1.25 is the ratio of the standard errors of a median and of a mean, for normal noise
    noise = 2 * 1.25 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    return max(0.0, statistics.median(ratios)), noise
