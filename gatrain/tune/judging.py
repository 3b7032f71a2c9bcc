"""What a measured curve is worth: wrong results are none, and what fitted before may not fit now. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import NoReturn

from gatrain.errors import ExactnessError
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, Measurement
from gatrain.tune.curve import Curve

LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
"""Relative difference between losses of equal samples that rounding in that precision cannot explain."""


def judged(found: Curve, limit_bytes: int | None, *, refuses: bool) -> tuple[Curve, str | None]:
    """The curve with wrong results refused, and what does not fit any more; and what there is to say of its losses.

    Args:
        limit_bytes: memory that may be used now, for a curve of an earlier time.
        refuses: whether a loss that depends on the micro-batch is an error.

    Raises:
        ExactnessError: it does.
    """
    if limit_bytes is not None:
        found = within(found, limit_bytes)
    without = reject_wrong_losses(found)
    if (wrong := wrong_at_every_size(found, without)) is not None:
        if refuses:
            refuse_loss(wrong, found.fitting[0])
        return found, loss_text(wrong, found.fitting[0])  # the user knows
    if (noisy := unrepeatable(found)) is not None:
        return without, (
            f"The same samples with the same seed gave other losses at micro-batch {noisy.micro_batch} "
            f"({noisy.loss:.6g} and {noisy.repeated_loss:.6g}): data, collate or model draw numbers that "
            "gatrain does not control, so losses could not be compared between sizes."
        )
    return without, None


def within(curve: Curve, limit_bytes: int) -> Curve:
    """The curve where no more than ``limit_bytes`` is free now, for one measured when more was."""
    gone = "it fitted before, but less memory is free now"
    return dataclasses.replace(
        curve,
        measurements=tuple(
            dataclasses.replace(m, outcome=DOES_NOT_FIT, error=gone)
            if m.outcome == FITS and (m.peak_memory_bytes or 0) > limit_bytes
            else m
            for m in curve.measurements
        ),
    )


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


def refuse_loss(wrong: Measurement, smallest: Measurement) -> NoReturn:
    """Refuse to plan for a loss that depends on the micro-batch size.

    Raises:
        ExactnessError: with the two numbers, the likely cause and what to write.
    """
    raise ExactnessError(
        f"{loss_text(wrong, smallest)} No split can be planned. train.check=warn plans all the same."
    )


def loss_text(wrong: Measurement, smallest: Measurement) -> str:
    """What was seen, the likely cause, and what to write."""
    return (
        f"The loss depends on the micro-batch: one sample, repeated, has a loss of {wrong.reference_loss:.6g} at "
        f"micro-batch {smallest.micro_batch} and of {wrong.loss:.6g} at {wrong.micro_batch}. Likely cause: a mean "
        "handed on as a sum, or samples that are compared with one another. Return a sum over samples from "
        "loss_sum() and count them in weight(), give task.weight for a mean over something else, or use another "
        "loss."
    )
