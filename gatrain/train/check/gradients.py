"""Is the gradient of a batch the sum of the gradients of its pieces?

A loss may be a sum over samples and its gradient none: a hook that clamps each parameter's gradient, a function
whose backward divides by the norm over the batch, one that adds the gradient of an auxiliary loss in each backward.
Each acts on the part of a micro-step, and the parts do not add up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatrain.errors import GatrainError, is_out_of_memory
from gatrain.train.check.faults import Fault, NoGradients
from gatrain.train.check.forwards import Forwards
from gatrain.train.check.host import Made
from gatrain.train.held_state import HeldState

_DENSE = 2**26
"""Numbers of a sparse gradient's parameter up to which it is compared."""

FACTORS = (1.0, 2.0**12)
"""By which losses are multiplied, beside 1/T as in training: a clamp that lets today's gradient pass shows at the
larger one."""
SEGMENTS = 16
TOLERANCE = 1e-5
"""Relative difference that rounding explains. More is computed again in fp64, where only a wrong gradient leaves
it: parts of a model that compute in fp32 all the same differ by some 1e-7."""
SURELY_WRONG, SURELY_WRONG_IN_16_BIT = 0.03, 0.2
"""What no rounding explains, not even that of a sum at the kink of a ReLU, where fp64 cannot be computed."""


def check_gradients(forwards: Forwards, whole: Made, pieces: Sequence[Made], state: HeldState) -> str | None:
    """Do the pieces' gradients add up to the whole's, at any size of the loss? Tells where nobody could say.

    Raises:
        Fault: they do not.
        Exception: the user's own error in the forward.
    """
    names, total = list(forwards.trained()), sum(whole.weights.values())
    if not names or not total:
        return None

    has_16_bit = False

    def measured(*factors: float) -> list[tuple[float, str]]:
        nonlocal has_16_bit
        found: list[list[Sketch]] = [[] for _ in factors]
        for made in (whole, *pieces):
            state.restore()
            terms = forwards.terms(made, graph=True, factors=[factor / total for factor in factors])
            has_16_bit = has_16_bit or terms.sixteen_bit is not None
            for row, gradients in zip(found, terms.gradients, strict=True):
                row.append(sketch(gradients))
        return [(difference(row[0], row[1:]), furthest(names, row[0], row[1:])) for row in found]

    def worst() -> tuple[float, str]:
        try:
            return max(measured(*FACTORS))
        except NoGradients as error:
            if is_out_of_memory(error):
                raise
            return max(each for factor in FACTORS for each in measured(factor))  # a graph for one backward

    kept = forwards.way
    try:
        relative, name = worst()
    except Exception as error:
        is_full = is_out_of_memory(error)
        if is_full and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not is_full and not isinstance(error, NoGradients):
            raise
        why = f"{whole.count} samples need too much memory at once" if is_full else error
        return f"The gradients could not be compared before the first step ({why})."
    if relative <= TOLERANCE:
        return None
    allowed = SURELY_WRONG if kept.precise is not None and not has_16_bit else SURELY_WRONG_IN_16_BIT
    forwards.way, has_16_bit = dataclasses.replace(kept, precise=torch.float64), False
    try:
        relative, name = worst()
        allowed = SURELY_WRONG_IN_16_BIT if has_16_bit else TOLERANCE  # a model may cast by itself
    except (GatrainError, Fault):
        raise
    except Exception:  # the model cannot be computed in fp64: what was found before counts
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    finally:
        forwards.way = kept
    if relative > allowed:
        raise Fault(fault(relative, name, whole.count, [piece.count for piece in pieces]))
    return None


@dataclass(frozen=True)
class Sketch:
    """What is kept of a gradient: sums with random signs, which add up as gradients do."""

    sums: Tensor
    """``[P, SEGMENTS]`` in fp64 on the host, for P parameters: squared and added they estimate the squared norm."""

    @property
    def is_finite(self) -> bool:
        return bool(self.sums.isfinite().all())

    @property
    def norm(self) -> float:
        return float(self.sums.norm())


def sketch(gradients: Sequence[Tensor | None]) -> Sketch:
    """The sketch of one tensor or None for each parameter; large sparse ones are left out."""
    rows = []
    for nth, gradient in enumerate(gradients):
        row = torch.zeros(SEGMENTS, dtype=torch.float64)
        if gradient is not None and gradient.layout == torch.sparse_coo and gradient.numel() <= _DENSE:
            gradient = gradient.to_dense()
        if gradient is not None and gradient.layout == torch.strided and gradient.numel():
            flat = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).reshape(-1)
            drawn = torch.Generator(flat.device).manual_seed(nth)
            signs = torch.randint(0, 2, flat.shape, generator=drawn, device=flat.device, dtype=torch.int8)
            signed = flat * (2 * signs - 1)
            row = torch.stack([part.sum(dtype=torch.float64) for part in signed.tensor_split(SEGMENTS)]).cpu()
        rows.append(row)
    return Sketch(torch.stack(rows))


def difference(whole: Sketch, parts: Sequence[Sketch]) -> float:
    """Of the whole gradient and the parts' sum, relative to their sizes; 0 where they say nothing."""
    if not (whole.is_finite and all(part.is_finite for part in parts)):
        return 0.0  # an overflow is told of by the step
    size = max(whole.norm, math.fsum(part.norm for part in parts))
    return float(_rest(whole, parts).norm()) / size if size else 0.0


def furthest(names: Sequence[str], whole: Sketch, parts: Sequence[Sketch]) -> str:
    """The parameter whose gradients differ most."""
    return names[int(_rest(whole, parts).norm(dim=1).argmax())]


def _rest(whole: Sketch, parts: Sequence[Sketch]) -> Tensor:
    return whole.sums - torch.stack([part.sums for part in parts]).sum(0)


def fault(relative: float, name: str, count: int, sizes: Sequence[int]) -> str:
    """What to tell of gradients that do not add up."""
    return (
        f"the losses of {count} samples add up, but their gradients do not: as {' + '.join(map(str, sizes))} "
        f"they are off by {relative:.2g} of their size, most of all for {name!r}, so the result would depend on "
        "the split. Likely cause: a hook on a gradient (register_hook, register_full_backward_hook) or a "
        "torch.autograd.Function whose backward clamps it, normalises it or adds to it, or an embedding with "
        "scale_grad_by_freq=True: each micro-step's part goes through it, and never the whole gradient. Clip with "
        "optimizer.clip_norm or a group's, once a step; let a backward multiply by what does not depend on the "
        "batch; and add an auxiliary loss to the loss itself."
    )
