"""Accumulation itself: whether it is needed, what it costs and buys, and what one could do instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gatrain import units
from gatrain.batch_rule import scaled
from gatrain.config import SGDConfig
from gatrain.explain.row import Row, Situation
from gatrain.optimizer_config import AdamWConfig
from gatrain.plan import DOES_NOT_FIT, FITS, Trial

KNEE = 0.95
"""Part of the best measured throughput from which on a micro-batch counts as large enough."""


def need(situation: Situation) -> Iterable[Row]:
    """Whether the effective batch fits without accumulation."""
    plan, share = situation.plan, situation.share
    memory = ""
    if plan.predicted_peak_bytes is not None and plan.memory_budget_bytes is not None:
        memory = (
            f" The plan needs {units.size(plan.predicted_peak_bytes)} of the "
            f"{units.size(plan.memory_budget_bytes)} that it may use."
        )
    if plan.accumulation_steps == 1:
        yield Row(
            "accumulation",
            f"not used: {plan.equation}",
            f"Each rank computes its share of {share:,} samples at once (K = 1), so there is nothing to "
            f"accumulate.{memory}",
        )
        return
    whole = [t for t in plan.trials if t.micro_batch >= share and t.outcome == FITS]
    too_large = [t.micro_batch for t in plan.trials if t.outcome == DOES_NOT_FIT]
    largest = max((t.micro_batch for t in plan.trials if t.outcome == FITS), default=plan.micro_batch)
    if whole:
        fastest = min(whole, key=lambda t: t.confirmed_step_s or t.step_s or float("inf"))
        times = _compared(fastest, situation.chosen)
        state = "fits without"
        text = (
            f"It is not needed for memory: a rank's {share:,} samples fit at once with checkpointing "
            f"{fastest.settings.checkpointing}{times}; the split was chosen for speed."
        )
    elif too_large:
        state = "needed"
        text = (
            f"A rank's {share:,} samples do not fit at once: {min(too_large):,} did not, and the largest "
            f"micro-batch that does is {largest:,}.{_at_once(situation)}"
        )
    elif isinstance(situation.config.batch.micro, int):
        state = "asked for"
        text = (
            f"batch.micro={plan.micro_batch} asks for it; whether {share:,} samples fit at once was not tried: "
            "batch.micro=auto tries."
        )
    else:
        state = "used"
        text = (
            f"Micro-batches above {largest:,} were not tried, as they promised no gain; whether a rank's {share:,} "
            f"samples fit at once is not known.{_at_once(situation)}"
        )
    yield Row("accumulation", f"{state}: {plan.equation}", text + memory)


def _compared(other: Trial, chosen: Trial | None) -> str:
    """Both times of a step, by the same way of finding them; nothing where there is none."""
    for name, how in (("confirmed_step_s", "full steps"), ("step_s", "modelled")):
        theirs, own = getattr(other, name), getattr(chosen, name, None)
        if theirs and own:
            return f" ({units.seconds(theirs)} a step, the plan {units.seconds(own)}; {how})"
    return ""


def _at_once(situation: Situation) -> str:
    """Memory of the whole share, on the line through the smallest and the largest measured size."""
    points = [(t.micro_batch, t.peak_memory_bytes) for t in situation.sizes if t.peak_memory_bytes]
    if len(points) < 2:
        return ""
    (low, low_bytes), (high, high_bytes) = points[0], points[-1]
    slope = (high_bytes - low_bytes) / (high - low)
    if slope <= 0:
        return ""
    at_once = high_bytes + slope * (situation.share - high)
    return (
        f" At once they would need about {units.size(int(at_once))}, by the line through the measured sizes."
    )


def cost(situation: Situation) -> Iterable[Row]:
    """What a step's time consists of, and what a micro-step more costs."""
    trial, steps = situation.chosen, situation.plan.accumulation_steps
    micro_s = trial.measured.micro_step_s if trial else None
    if trial is None or micro_s is None:
        if situation.is_predicted:
            yield Row("cost", "predicted", f"{situation.plan.reason}.")
        return
    once_s = (trial.measured.reduce_s or 0.0) + (trial.measured.optimizer_s or 0.0)
    total_s = steps * micro_s + once_s
    text = (
        f"A step takes {units.seconds(steps * micro_s)} in {units.plural(steps, 'micro-step')} and "
        f"{units.seconds(once_s)} ({once_s / total_s:.1%}) for reduction and update, which come once a step "
        "however many micro-steps there are. "
    )
    text += (
        "Twice the effective batch takes twice the micro-steps: accumulation buys memory, and larger batches, but "
        "no time."
    )
    yield Row("cost", f"{units.seconds(_step_s(trial) or total_s)} a step", text)


def knee(situation: Situation) -> Iterable[Row]:
    """From which micro-batch on throughput hardly grows."""
    rates = [
        (t.micro_batch, t.micro_batch / t.measured.micro_step_s)
        for t in situation.sizes
        if t.measured.micro_step_s
    ]
    if len(rates) < 2:
        return
    best = max(rate for _, rate in rates)
    at = next(size for size, rate in rates if rate >= KNEE * best)
    size = situation.plan.micro_batch
    _, own = min(rates, key=lambda pair: abs(pair[0] - size))
    shown = _spread(rates)
    curve = ", ".join(f"{size}: {units.rate(rate)}" for size, rate in shown)
    text = f"Samples per second of a rank by micro-batch: {curve}; {at} reaches {KNEE:.0%} of the best. "
    if own < KNEE * best:
        text += f"The plan's {size} reaches {own / best:.0%}: " + (
            "a larger one would be faster, by batch.micro=auto."
            if isinstance(situation.config.batch.micro, int)
            else "the rest of the step, or the share, speaks for it."
        )
        if situation.plan.settings.checkpointing == "none" and situation.found.checkpointing_modes[1:]:
            text += " checkpointing=selective makes room for larger ones at the price of recomputation."
    else:
        text += f"The plan's {size} is on the flat part: a larger micro-batch would gain little."
    yield Row("throughput", f"knee at micro-batch {at}", text)


def _spread(rates: list[tuple[int, float]], most: int = 6) -> list[tuple[int, float]]:
    """At most so many of them, the first and the last included."""
    if len(rates) <= most:
        return rates
    places = [round(nth * (len(rates) - 1) / (most - 1)) for nth in range(most)]
    return [rates[place] for place in places]


def reductions(situation: Situation) -> Iterable[Row]:
    """What accumulation saves in communication."""
    world, steps = situation.plan.world_size, situation.plan.accumulation_steps
    if world == 1:
        yield Row(
            "reduction", "none: one rank", "There is nothing to send, so accumulation saves nothing here."
        )
        return
    once = situation.chosen.measured.reduce_s if situation.chosen else None
    saved = f", {units.seconds((steps - 1) * once)} of {units.seconds(steps * once)}" if once else ""
    text = f"Gradients are added over {world} ranks once a step, after the last of K = {steps} micro-steps"
    text += (
        f": that saves {steps - 1} of {steps} reductions{saved}. "
        if steps > 1
        else "; with K = 1 each step pays one. "
    )
    yield Row(
        "reduction",
        f"sync={situation.plan.settings.sync}",
        f"{text}Exact: fp32 sums of shares that are divided by the weight of the whole window, ragged or empty "
        "ones too.",
    )


def small_batch(situation: Situation) -> Iterator[Row]:
    """The batch that needs no accumulation, with what it takes of the optimizer."""
    plan, optimizer, batch = situation.plan, situation.config.optimizer, situation.config.batch
    if not situation.adds_micro_batches:  # a smaller batch may be another loss
        return
    if (
        plan.accumulation_steps == 1
        or batch.counts_tokens
        or not batch.stages.is_constant
        or batch.rule != "none"
    ):
        return
    small, large = plan.micro_batch * plan.world_size, plan.effective_batch
    k = small / large
    rule = "half_life" if isinstance(optimizer, AdamWConfig) else "linear"
    if not isinstance(optimizer, AdamWConfig | SGDConfig):
        return
    if isinstance(optimizer, AdamWConfig):
        beta2 = (scaled(rule, k, optimizer.betas, optimizer.eps).betas or optimizer.betas)[1]
        says = (
            f"beta2 becomes {beta2:.6g}, the same half-life in samples, and optimizer.lr is tuned again (Marek et "
            "al. 2025, arXiv 2507.07101, found such batches as good per sample for language models)"
        )
    else:
        says = f"lr becomes {optimizer.lr * k:.4g} (Goyal et al. 2017, arXiv 1706.02677)"
    command = situation.command(f"batch.effective={small}", f"batch.rule={rule}", f"batch.base={large}")
    slow = (
        " Each of those steps pays for a reduction and an update, where ranks are slow to reach that counts."
        if plan.world_size > 1
        else ""
    )
    yield Row(
        "small batch",
        f"possible: batch.effective={small}",
        f"If nothing obliges you to {large}, train without accumulation and with {large / small:.3g} times the "
        f"updates for the same samples: {command}. There {says}.{slow}",
    )


def _step_s(trial: Trial | None) -> float | None:
    return None if trial is None else trial.confirmed_step_s or trial.step_s
