"""The state of each technique that a recipe sets, and what is exact about it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from gatrain import build, doors
from gatrain.config import REDUCE_OVERHEAD
from gatrain.explain.row import Row, Situation

SMALL_GROUP = 32
"""Samples below which BatchNorm's statistics of one micro-batch are far from those of the effective batch."""
SHOWN_DOORS = ("gradient", "dropout", "order", "hooks", "knobs")
_PRECISIONS = {
    "fp32": "Everything is computed and summed in fp32.",
    "bf16": "Autocast computes in bf16; parameters are fp32, so gradients add up over micro-batches in fp32, and "
    "the split changes no more than the order of those sums.",
    "fp16": "Autocast computes in fp16 with one loss scale for the whole window; gradients add up in fp32, and a "
    "window that overflows on any rank is computed again at a lower scale by all.",
}
_CHECKPOINTING = {
    "none": "All activations are kept.",
    "selective": "Cheap operators are computed again in the backward, matrix products are kept.",
    "every_4": "Every fourth block keeps its input alone and is computed again in the backward.",
    "every_3": "Every third block keeps its input alone and is computed again in the backward.",
    "every_2": "Every second block keeps its input alone and is computed again in the backward.",
    "full": "Each block keeps its input alone and is computed again in the backward.",
    "offload": "What the backward needs waits in main memory: nothing is computed again, much is transferred.",
}


def doors_rows(situation: Situation) -> Iterable[Row]:
    """The parts behind doors, each in its own words."""
    for door in SHOWN_DOORS:
        yield from _of_door(situation, door)


def _of_door(situation: Situation, door: str) -> Iterator[Row]:
    for name, part in build.parts_named(situation.config, door):
        is_shipped = name in doors.SHIPPED[door]
        said = _words(part) if is_shipped or hasattr(part, "exact") else "Your own: ask it what is exact."
        yield Row(door, name, said)


def _words(part: Any) -> str:
    """The part's own sentence on exactness, or the first one of its docstring."""
    exact = getattr(part, "exact", "")
    text = exact or (inspect.getdoc(part) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def batch_norm(situation: Situation) -> Iterable[Row]:
    """What micro-batches mean for BatchNorm."""
    names, plan = situation.found.batch_norms, situation.plan
    if not names:
        # what norm made of them, and what it costs
        said = next((each for each in situation.found.remarks if each.startswith("norm=")), "")
        state, _, text = said.partition(": ")
        independent = "No layer depends on which samples share a micro-batch."
        yield Row("BatchNorm", state or "none", text[:1].upper() + text[1:] or independent)
        return
    smallest = min(size for rank in plan.micro_batches for size in rank)
    if sum(map(len, plan.micro_batches)) == 1:
        text = "One micro-batch is the whole effective batch: statistics are those of the large batch."
    else:
        text = f"Each of the {len(names)} layers sees groups of {smallest} samples or more, never all of the batch."
        if smallest < SMALL_GROUP:
            text += (
                f" Below {SMALL_GROUP} the gradient is far from that of the large batch (at 8 a quarter, at 2 half "
                "of its length in one measurement): norm=group, norm=frozen, or larger micro-batches."
            )
    yield Row("BatchNorm", f"{len(names)} of them, groups of {smallest}", text)
    yield from _of_door(situation, "norm")


def precision(situation: Situation) -> Iterable[Row]:
    """Where sums are rounded."""
    settings, half = situation.plan.settings, situation.found.half_dtypes
    text = _PRECISIONS.get(settings.precision, "")
    if half:
        text += f" The model's {half} parameters have fp32 main gradients and fp32 master weights."
    yield Row("precision", settings.precision, text)


def checkpointing(situation: Situation) -> Iterable[Row]:
    """What is kept of the forward."""
    mode = situation.plan.settings.checkpointing
    offered = ", ".join(situation.found.checkpointing_modes)
    known = _CHECKPOINTING.get(mode, "Some of the forward is computed again in the backward.")
    same = "" if mode == "none" else " The gradient is the same, random numbers included."
    yield Row("checkpointing", mode, f"{known}{same} This model offers: {offered}.")


def compiled(situation: Situation) -> Iterable[Row]:
    """Whether the loss is compiled."""
    is_compiled = situation.plan.settings.compile
    asked = "chosen" if situation.config.compile == "auto" else "asked for"
    text = "The same mathematics; kernels may add in another order, so the last digits differ."
    if not is_compiled:
        text = "Every operator runs by itself." + (
            "" if situation.on_gpu else " On a CPU nothing is compiled by auto."
        )
    replays = is_compiled == REDUCE_OVERHEAD and situation.on_gpu
    state = ("with CUDA graphs" if replays else "on") if is_compiled else "off"
    if replays:
        text += " The GPU is handed a whole micro-step at once instead of kernel by kernel."
    yield Row("compile", f"{state}, {asked}", text)


def clipping(situation: Situation) -> Iterable[Row]:
    """How gradients are clipped."""
    limit = situation.config.optimizer.clips
    if limit is None:
        yield Row("clipping", "off", "The gradient's norm is recorded and left as it is.")
        return
    yield Row(
        "clipping",
        limit,
        "Once, on the whole reduced gradient of the window: exact, whatever the split. (Clipped micro-batch by "
        "micro-batch it would be another algorithm.)",
    )


def optimizer(situation: Situation) -> Iterable[Row]:
    """What the split does to the optimizer: nothing."""
    config = situation.config
    text = "One update a window, with the rate of the effective batch: another split changes no rate and no moment."
    if config.batch.rule != "none":
        text += f" batch.rule={config.batch.rule} scales it from batch.base={config.batch.rule_base}."
    rate = f", lr {config.optimizer.lr:g}" if config.optimizer.lr is not None else ""
    yield Row("optimizer", f"{config.optimizer.name}{rate}", text)


def schedule(situation: Situation) -> Iterable[Row]:
    """What the schedule counts."""
    yield Row(
        "schedule",
        situation.config.schedule.name,
        "Counts optimizer steps (or samples, where it is given in samples), never micro-steps; a window without "
        "update moves it by none.",
    )


def random_numbers(situation: Situation) -> Iterable[Row]:
    """What random numbers depend on."""
    yield Row(
        "random numbers",
        f"seed {situation.config.train.seed}",
        "Data augmentation is keyed by sample: the same for every split. What the model draws is keyed by window "
        "and micro-batch: the same at each repetition.",
    )


def short_window(situation: Situation) -> Iterable[Row]:
    """What happens at the end of an epoch."""
    config, found = situation.config, situation.found
    is_fixed = config.batch.stages.is_constant and not config.batch.counts_tokens
    rest = found.samples % situation.plan.effective_batch if is_fixed else 0
    if not rest:
        return
    dropped = config.train.drop_last
    yield Row(
        "short window",
        "left out" if dropped else f"{rest} samples",
        "The last, short window of an epoch is left out (train.drop_last)."
        if dropped
        else "The last window of an epoch is short and stepped by itself, divided by its own weight: exact.",
    )
