"""`gatrain explain`: what accumulation costs and buys for this recipe on this machine, and what is exact.

A technique is explained by a function ``(Situation) -> iterable of Row`` in `SOURCES`, or, where it is behind a
door (`gatrain.doors`), by its own ``exact`` sentence or the first sentence of its docstring: so a new part needs
nothing here. Numbers come from the plan alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gatrain.explain import accumulation, noise, techniques
from gatrain.explain.row import Row as Row
from gatrain.explain.row import Situation as Situation

Source = Callable[[Situation], Iterable[Row]]

SOURCES: tuple[Source, ...] = (
    accumulation.need,
    accumulation.cost,
    accumulation.knee,
    accumulation.reductions,
    accumulation.small_batch,
    noise.rows,
    techniques.batch_norm,
    techniques.doors_rows,
    techniques.precision,
    techniques.checkpointing,
    techniques.compiled,
    techniques.clipping,
    techniques.optimizer,
    techniques.schedule,
    techniques.random_numbers,
    techniques.short_window,
)
"""In the order of the output; whoever adds a technique that is no part behind a door adds a line."""


def explain(situation: Situation) -> list[Row]:
    """All rows."""
    return [row for source in SOURCES for row in source(situation)]
