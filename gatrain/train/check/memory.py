"""What a forward leaves behind, and who reads it: the next micro-step, or evaluation."""

from __future__ import annotations

import contextlib

from gatrain.train.check.faults import Fault
from gatrain.train.check.forwards import REPEATED, Forwards, Terms, number
from gatrain.train.check.host import Made
from gatrain.train.engine import Engine, evaluating
from gatrain.train.held_state import HeldState, Slot, perturb


def check_memory(engine: Engine, forwards: Forwards, probe: Made, first: Terms) -> str | None:
    """Does the loss depend on what earlier micro-steps left behind?

    Args:
        first: of ``probe``.

    Returns:
        What to tell of state that only evaluation reads.

    Raises:
        Fault: it does.
    """
    before = HeldState(engine.model, engine.task)
    second = forwards.terms(probe, graph=True)
    changed = before.changed()
    if not changed:
        if forwards.agree(second, first, REPEATED) or not second.is_finite:
            return None
        third = forwards.terms(probe, graph=True)
        if forwards.agree(third, second, REPEATED):
            return None  # something was made at the first call
        raise Fault(uncontrolled(second, third))
    later = forwards.terms(probe, graph=True)
    before.restore()
    again = forwards.terms(probe, graph=True)
    if not forwards.agree(again, second, REPEATED):
        raise Fault(uncontrolled(second, again))
    noise = max(1e-6, *(abs(again.losses[n] / v - 1) * 10 for n, v in second.losses.items() if v), 0.0)
    if forwards.agree(later, second, noise):
        before.restore()
        perturb(changed)
        with contextlib.suppress(Exception):  # such as an index out of range
            later = forwards.terms(probe, graph=True)
    before.restore()
    if not forwards.agree(later, second, noise):
        names = ", ".join(slot.name for slot in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise Fault(
            f"loss_sum() keeps state that changes with each micro-step and that the loss depends on ({names}): "
            f"the same micro-batch gives {number(second)}, and {number(later)} once that state has moved on. "
            "So the result depends on the number of micro-steps in a step, that is on the split and on the "
            "number of ranks. A moving average, a counter or a queue must move once for each optimizer step: "
            "loss_sum is no place for it."
        )
    return _read_by_evaluation(engine, forwards, probe, before, changed)


def _read_by_evaluation(
    engine: Engine, forwards: Forwards, probe: Made, before: HeldState, changed: list[Slot]
) -> str | None:
    def evaluated() -> Terms:
        with evaluating(engine.model):
            return forwards.terms(probe)

    try:
        one = evaluated()
        if not forwards.agree(one, evaluated(), REPEATED):
            return None  # it draws numbers there
        perturb(changed)
        is_read = not forwards.agree(one, evaluated(), 10 * REPEATED)
    except Exception:
        return None  # a model that has no loss in evaluation mode
    finally:
        before.restore()
    if not is_read:
        return None
    names = ", ".join(slot.name for slot in changed[:3]) + (", ..." if len(changed) > 3 else "")
    return (
        f"Each forward of training moves state that evaluation reads ({names}): it moves once for each micro-step "
        "and not once a step, and of several ranks that of rank 0 is kept. So what is evaluated and saved depends "
        "on the split, though no gradient does. Move it in a hook, after each update, or leave it out "
        "(track_running_stats=False)."
    )


def uncontrolled(one: Terms, other: Terms) -> str:
    return (
        f"the same micro-batch with the same seeds gives the loss {number(one)} and then {number(other)}: the "
        "model or loss_sum() draws numbers that gatrain does not control (a torch.Generator, "
        "numpy.random.default_rng or random.Random of its own), or keeps what it saw before (a list, a queue, a "
        "counter). Draw from the global generators, which gatrain seeds for each micro-step, and keep nothing "
        "between micro-steps."
    )
