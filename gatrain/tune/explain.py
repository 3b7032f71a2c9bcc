"""From a decision to the plan: the table's rows, the reason in words, the notes. Pure functions, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gatrain import batch_rule, units
from gatrain.batch import Split
from gatrain.config import AdamWConfig, RunConfig
from gatrain.inspected import Inspected
from gatrain.plan import FITS, MadeFor, Measurement, Plan, StepSettings, Trial
from gatrain.train import read_ahead
from gatrain.tune import advice, curve, knobs, search
from gatrain.tune.curve import Curve
from gatrain.tune.finalists import VARYING, StepTimings, Verdict
from gatrain.tune.knobs import SearchSpace
from gatrain.tune.search import Candidate

MOST_NOISY = 4
"""Sizes that a note names."""
TimedCandidate = tuple[Candidate, StepTimings]

WORTH_TELLING_BYTES = 256 * units.MIB
"""Main memory that loading may hold before the plan speaks of it."""


@dataclass(frozen=True)
class Decision:
    """What was chosen, and by what."""

    chosen: Candidate
    options: Sequence[Candidate]
    verdict: Verdict | None = None
    """Of full steps; None where the model alone decided."""
    timed: Sequence[TimedCandidate] = field(default_factory=list)
    """All finalists, also those that failed as a full step."""
    remarks: Sequence[str] = ()
    """What could not be compared, and why."""
    is_close: bool = False
    """The model could not tell the best from the next, and no full steps were timed."""


def make(
    decision: Decision,
    used: Mapping[StepSettings, Curve],
    chosen_curve: Curve,
    space: SearchSpace,
    *,
    is_remembered: bool,
) -> Plan:
    """Put the plan together.

    Args:
        used: all curves that took part.
        chosen_curve: the one behind the decision.
        is_remembered: whether nothing was measured for this answer.
    """
    chosen, verdict = decision.chosen, decision.verdict
    reason = search.explain(
        chosen, decision.options, used.values(), (verdict.step_s, verdict.sentence) if verdict else None
    )
    if decision.is_close:
        reason += "; the model cannot tell these apart, and full steps were not timed"
    if is_remembered:
        reason += " (remembered from earlier measurements; --retune measures again)"
    budget = chosen_curve.budget_bytes or space.allowed_bytes
    # few sizes are compiled: how far the sizes go is for the curve without compilation to say
    plain = used.get(dataclasses.replace(chosen_curve.settings, compile=False), chosen_curve)
    return Plan(
        split=chosen.split,
        micro_batch=chosen.micro_batch,
        settings=chosen.settings,
        reason=reason,
        trials=rows(decision, used.values()),
        notes=[
            *observations(decision, chosen_curve, plain, space),
            *loading(chosen_curve, chosen, space.config.train.data_workers),
        ],
        advice=advice.sentences(
            chosen_curve,
            chosen,
            optimizer=space.config.optimizer,
            on_gpu=space.device == "cuda",
            is_plain=space.has_plain_batch,
        ),
        predicted_peak_bytes=chosen_curve.peak_bytes(chosen.micro_batch),
        memory_budget_bytes=min(budget, space.allowed_bytes) if is_remembered else budget,
    )


def loading(chosen_curve: Curve, chosen: Candidate, workers: int) -> list[str]:
    """What loading holds of each rank's main memory, where that is much."""
    measured = [m.host_bytes / m.micro_batch for m in chosen_curve.fitting if m.host_bytes]
    if not measured:
        return []
    share = chosen.split.share
    micro_bytes, window_bytes = measured[-1] * chosen.micro_batch, measured[-1] * share
    held = read_ahead.held_bytes(workers, micro_bytes, window_bytes)
    if held < WORTH_TELLING_BYTES:
        return []
    parts = f"two windows of {units.size(window_bytes)}"
    if workers:
        count = workers * read_ahead.PREFETCH
        parts += f", and {count} micro-batches of {units.size(micro_bytes)} on their way through /dev/shm"
    return [
        f"Loading holds up to {units.size(held)} of main memory per rank: {parts}. Less is read ahead where "
        "less is free."
    ]


def observations(
    decision: Decision,
    chosen_curve: Curve,
    plain: Curve,
    space: SearchSpace,
) -> list[str]:
    """What happened on the way and what the plan is, apart from advice."""
    notes = list(decision.remarks)
    notes += [
        f"{offer.name}={decision.chosen.settings.knobs[offer.name]} was the fastest: {offer.words}."
        for offer in plain.knobs
        if offer.name in decision.chosen.settings.knobs
    ]
    chosen = decision.chosen
    share = chosen.split.share
    largest = chosen_curve.fitting[-1].micro_batch
    if chosen_curve.stopped == curve.TIME:
        notes.append(
            "Time for trials ran out before larger micro-batches were tried; "
            f"tune.max_seconds={2 * space.max_seconds:g} --retune would allow more."
        )
    elif chosen_curve.stopped in (curve.SLOWER, curve.LEVEL) and largest < share:
        why = "slower" if chosen_curve.stopped == curve.SLOWER else "no faster than the noise can show"
        notes.append(f"Micro-batches above {largest} were not tried: the last sizes were {why} per sample.")
    elif plain.stopped == curve.SHARE and plain.largest < share and space.fixed_micro_batch is None:
        notes.append(
            f"Micro-batches above {plain.largest} were not tried: by the times up to there they could be faster by "
            f"{plain.possible_gain:.1%} at most. --retune measures them."
        )
    near = min(chosen_curve.fitting, key=lambda m: abs(m.micro_batch - chosen.micro_batch))
    if near.fragmentation_bytes:
        notes.append(
            f"Of the peak, {units.size(near.fragmentation_bytes)} is memory cut up by the allocator, as measured; "
            "the plan leaves room for as much again."
        )
    notes += noisy(plain, chosen_curve, share)
    for option, steps in decision.timed:
        if steps.error and steps.error.startswith(VARYING):
            notes.append(
                f"The overlapped reduction was not compared: {steps.error}. It could not begin early."
            )
        elif steps.error:
            notes.append(
                f"{search.name(option, chosen).capitalize()} fits as a micro-step but failed as a full step "
                f"({steps.error}), so it was not chosen."
            )
    if not chosen.split.is_even:
        even = Split(chosen.split.effective_batch, chosen.split.world_size)
        equal_s = search.step_seconds(chosen_curve, even, min(largest, chosen.micro_batch))
        notes.append(
            f"The ranks are unequal, so are their shares: {', '.join(map(str, chosen.split.shares))} samples. "
            f"Equal shares would take {units.seconds(equal_s)} per step by the same model, "
            f"these {units.seconds(chosen.step_s)}; the gradient is the same."
        )
    return notes


def noisy(plain: Curve, chosen_curve: Curve, share: int) -> list[str]:
    """What is said of sizes that were measured again, with the numbers; and of what still is in doubt."""
    found = {
        m.micro_batch: m for each in (plain, chosen_curve) for m in each.fitting if m.micro_batch <= share
    }
    doubtful = set(curve.doubtful(found.values(), far=math.inf))
    again = [m for m in found.values() if m.again and (m.micro_batch in doubtful or _differs(m))]
    if not again:
        return []
    again.sort(key=lambda m: m.micro_batch)
    named = ", ".join(
        f"{m.micro_batch} ({units.seconds(m.range_s[0])} to {units.seconds(m.range_s[1])})"
        for m in again[:MOST_NOISY]
        if m.range_s is not None
    )
    more = f" and {len(again) - MOST_NOISY} more" if len(again) > MOST_NOISY else ""
    unsure = [m.micro_batch for m in again if (m.spread or 0.0) > curve.DIFFERS or m.micro_batch in doubtful]
    if unsure:
        still = (
            f"; {', '.join(map(str, unsure[:MOST_NOISY]))} still disagree: something else uses this machine, and "
            "--retune measures again when it is quiet"
        )
    else:
        still = "; now they agree"
    return [
        "Times were noisy, so these micro-batches were measured again (fastest to slowest micro-step): "
        f"{named}{more}{still}."
    ]


def _differs(m: Measurement) -> bool:
    return m.range_s is not None and m.range_s[1] > (1 + curve.DIFFERS) * m.range_s[0]


def rows(
    decision: Decision,
    curves: Iterable[Curve],
) -> list[Trial]:
    """All trials; those of the finalists with what full steps showed."""
    even = Split(decision.chosen.split.effective_batch, decision.chosen.split.world_size)
    found = [row for used in curves for row in search.trial_rows(used, even)]
    # where both ways of reducing were timed, the row tells of the chosen one
    timed = [pair for pair in decision.timed if pair[1].seconds]
    timed.sort(key=lambda pair: pair[0].key == decision.chosen.key)
    full = {(option.micro_batch, _without_sync(option.settings)): steps for option, steps in timed}
    confirmed = [
        dataclasses.replace(row, confirmed_step_s=steps.median_s, confirmed_steps=len(steps.seconds))
        if row.outcome == FITS
        and (steps := full.get((row.micro_batch, _without_sync(row.settings)))) is not None
        else row
        for row in found
    ]
    return sorted(confirmed, key=_order)


def _without_sync(settings: StepSettings) -> StepSettings:
    return dataclasses.replace(settings, sync="")


def _order(row: Trial) -> tuple[int, int, str, int]:
    way = row.settings
    compiled, level = (each.values.index(each.of(way)) for each in (knobs.COMPILE, knobs.CHECKPOINTING))
    return compiled, level, way.knob_text, row.micro_batch


def half_note(half_parameters: int, half_dtypes: str, parameters: int) -> str:
    """What the plan says of trained 16-bit parameters."""
    which = "All" if half_parameters == parameters else f"{half_parameters:,} of"
    return (
        f"{which} {parameters:,} parameters are {half_dtypes}: their gradients are summed in fp32 over micro-steps "
        "and ranks, and the optimizer steps fp32 master weights, which are rounded into them after each step."
    )


def norm_note(
    batch_norms: Sequence[str], plan: Plan, synchronises: bool = False, running_statistics: str = ""
) -> str | None:
    """What BatchNorm means for a plan with several micro-batches; None where it sees the whole batch at once.

    Args:
        running_statistics: a sentence on them, for a rank with several micro-batches.
    """
    pieces = max(map(len, plan.micro_batches)) if synchronises else sum(map(len, plan.micro_batches))
    if not batch_norms or pieces == 1:
        return None
    count = len(batch_norms)
    layers = (
        f"{count} BatchNorm layers ('{batch_norms[0]}' to '{batch_norms[-1]}') normalise" if count > 1 else ""
    )
    layers = layers or f"BatchNorm ('{batch_norms[0]}') normalises"
    sizes = sorted({size for rank in plan.micro_batches for size in rank})
    moved = f" {running_statistics}" if running_statistics and max(map(len, plan.micro_batches)) > 1 else ""
    which = f"({' or '.join(map(str, sizes))} samples{' of each rank' if synchronises else ''})"
    return (
        f"{layers} each micro-batch {which} by itself: Ghost BatchNorm, whose result depends on the split. "
        f"norm=exact normalises over the whole window; norm=group and norm=frozen depend on no split.{moved}"
    )


def with_notes(plan: Plan, found: Inspected, config: RunConfig) -> Plan:
    """The plan with what is to be said of the model, its data and the window, and with what it was made for."""
    half = found.half_dtypes
    notes = [half_note(found.half_parameters, half, found.parameters)] if half else []
    notes += found.remarks
    norms = found.batch_norms, plan, found.synchronises, found.running_statistics
    if (note := norm_note(*norms)) is not None:
        notes.append(note)
    made_for = MadeFor(found.parameters, found.samples, found.eval_samples)
    return dataclasses.replace(
        plan, notes=[*notes, *plan.notes, *window_notes(plan, config)], made_for=made_for
    )


def window_notes(plan: Plan, config: RunConfig) -> list[str]:
    """What a window counted in tokens holds, and what ``batch.rule`` does to the optimizer at each effective batch
    of the run."""
    batch, optimizer, notes = config.batch, config.optimizer, []
    if batch.counts_tokens:
        notes.append(
            f"A window holds at most {batch.largest:,} tokens (batch.count=tokens), in this data "
            f"{plan.effective_batch} samples on average, which the plan is for; each is cut into micro-batches of "
            f"at most {units.plural(plan.micro_batch, 'sample')}."
        )
    if batch.rule == "none":
        return notes
    betas, eps = (optimizer.betas, optimizer.eps) if isinstance(optimizer, AdamWConfig) else (None, None)
    base = batch_rule.Scaled(1.0, betas, eps)
    for effective in batch.stages.sizes:
        scaled = batch_rule.scaled(batch.rule, effective / batch.rule_base, betas, eps)
        words = batch_rule.in_words(batch.rule, batch.rule_base, effective, optimizer.lr, base, scaled)
        notes.append(f"{words}.")
    return notes
