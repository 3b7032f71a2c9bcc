"""How far a gradient may be from another that is equal but for rounding, by the precision of both."""

from __future__ import annotations

FLOOR = {"fp64": 1e-12, "fp32": 2e-6, "fp16": 2**-9, "bf16": 2**-6}
"""Relative L2 error that is always rounding; what reordering sums costs is some hundred times less."""
CEILING = {"fp64": 1e-12, "fp32": 1e-4, "fp16": 0.1, "bf16": 0.5}
"""Above it nothing is called rounding, however ill-conditioned the gradient is."""
UNIT = {"fp64": 2**-53, "fp32": 2**-24, "fp16": 2**-11, "bf16": 2**-8}
"""Relative error of rounding one number."""
SUM = 1e-6
"""For sums of the very same micro-gradients, in fp32 and in fp64."""
FACTOR = 4.0


def coarsest(*precisions: str) -> str:
    """The one with the fewest digits."""
    return max(precisions, key=lambda name: UNIT[name])


def split_limit(precision: str, casts: str, error: float, rounding: float | None = None) -> float:
    """Limit of a split gradient against the one-shot gradient, both in ``precision``.

    Where fp64 proves the same split, fp32 has its own rounding as the measure, however large that is: what is as
    near to the fp64 gradient as the one-shot gradient is at most twice as far from that. One ReLU whose input
    rounds to the other side of zero is enough to move a gradient by some 1e-4.

    Args:
        precision: of the parameters.
        casts: the coarsest that the model uses by itself.
        error: what was found; the narrowest limit stands that is wide enough.
        rounding: relative error of the one-shot gradient itself, from the same in a finer precision; None where
            there is none.
    """
    if error <= FLOOR[precision]:
        return FLOOR[precision]
    taking_part = coarsest(precision, casts)
    floor = FLOOR[taking_part]
    if error <= floor or rounding is None:
        return floor
    limit = max(floor, min(CEILING[taking_part], FACTOR * rounding))
    return max(limit, 2 * rounding) if is_beyond_ceiling(precision, casts, rounding) else limit


def is_beyond_ceiling(precision: str, casts: str, rounding: float) -> bool:
    """Whether the one-shot gradient's own rounding is so large that it, and not the ceiling, limits splits in fp32.
    A model that leaves fp64 by itself has no proof in fp64, so that the ceiling stands."""
    return precision == "fp32" and casts == "fp64" and 2 * rounding > CEILING[precision]


def trained_limit(precision: str, rounding: float | None, spread: float) -> float:
    """Limit of the trained path's gradient against a finer one.

    Args:
        precision: the coarsest that takes part.
        rounding: relative error of the one-shot gradient in the same path; None where nothing finer is known.
        spread: root of the summed squares of the micro-gradients' norms, over the norm of their sum: what one
            rounding of each of them comes to is that many units.
    """
    own = FLOOR[precision] if rounding is None else rounding
    # where rounding alone makes up the gradient, nothing can be told from it
    return max(min(CEILING[precision], FACTOR * (own + UNIT[precision] * spread)), 2 * own)
