"""Which samples a micro-batch holds, as places in its window."""

from __future__ import annotations

from collections.abc import Sequence

from gatrain.errors import ExactnessError
from gatrain.train.micro_batches import MicroBatch


def places_of(micro_batch: MicroBatch) -> Sequence[int]:
    """The place in the window of each sample of a micro-batch.

    Raises:
        ExactnessError: it is not known which samples are in it.
    """
    first = micro_batch.position
    if micro_batch.places is not None and first is not None:
        return [first + place for place in micro_batch.places]
    if first is None or micro_batch.samples is None or micro_batch.dropped:
        why = (
            f"left out {micro_batch.dropped} sample(s)"
            if micro_batch.dropped
            else "does not tell its samples"
        )
        raise ExactnessError(
            f"dropout=keyed needs to know which samples a micro-batch holds, and one {why}. Let the dataset raise "
            "gatrain.errors.BrokenSampleError(text, skip=True) for what is to be left out, or use dropout=torch."
        )
    return range(first, first + micro_batch.samples)
