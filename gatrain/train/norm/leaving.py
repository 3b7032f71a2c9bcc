"""Why a way to compute a window has to be left for another one."""

from __future__ import annotations

from typing import NamedTuple

from gatrain.errors import is_out_of_memory


class Leave(NamedTuple):
    """The same on every rank."""

    why: str
    """For people: a clause after "since"."""
    for_good: bool = True
    again: bool = False
    """The same way will do, with Python's and numpy's numbers looked after."""


UNEVEN = Leave("the losses of some micro-batches do not depend on layers that others' do", for_good=False)
HOST_NUMBERS = Leave("the model draws from Python's or numpy's random numbers", for_good=False, again=True)
DISTURBED = Leave(
    "the model keeps values of one micro-batch that another one finds: a micro-batch's loss among the others is "
    "not what it is alone"
)


def reason_of(error: Exception) -> Leave | None:
    """Why to compute layer by layer; None for an error that would be one there, too."""
    if is_out_of_memory(error):
        return Leave("memory ran out with the activations of all micro-batches")
    text = str(error)
    if isinstance(error, RuntimeError) and "modified by an inplace operation" in text:
        return Leave("the model writes to what the backward of another micro-batch needs")
    if isinstance(error, RuntimeError) and "backward through the graph a second time" in text:
        return Leave("the model keeps a part of one micro-batch's graph for the next")
    return None


def failed_forward(error: Exception) -> Leave:
    """It may come of the others' being under way. If it is the model's own, it comes once more."""
    first = next(iter(str(error).splitlines()), "")
    return Leave(f"a forward among the others failed ({type(error).__name__}: {first})")
