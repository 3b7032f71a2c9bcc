"""The samples that the check computes, read and collated on the host."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gatrain.errors import DataError, GatrainError
from gatrain.tasks.base import Batch, Samples, Task, weights_of
from gatrain.train import samples as reading
from gatrain.train.check.alike import copied, same, share_memory
from gatrain.train.check.faults import Fault, Unclear
from gatrain.train.sample_names import names_of

MOST, FEWEST = 8, 3
"""Samples that are computed; between the two it is the plan's micro-batch."""
LOOKED_AT = 16
"""Samples among which those of unlike weight are chosen."""


@dataclass
class Made:
    """Samples collated on the host, with the weight that the task counts."""

    batch: Batch
    weights: dict[str, float]
    places: tuple[int, ...]
    """The samples' ids, which key their dropout."""

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.places)


class HostSamples:
    """A few training samples.

    Args:
        ids: to choose from.
        epoch, seed: which decide their augmentation.
        micro_batch: of the plan, if there is one.
    """

    def __init__(
        self, task: Task, ids: Sequence[int], epoch: int, seed: int, micro_batch: int | None
    ) -> None:
        self.task, self._ids, self._epoch, self._seed = task, ids, epoch, seed
        self._micro_batch = micro_batch

    def keys(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        return [(self._epoch, int(sample)) for sample in ids]

    def read(self, ids: Sequence[int]) -> list[Any]:
        with _loading(self.task.train_data, ids):
            return reading.read(self.task, self.task.train_data, self.keys(ids), self._seed)

    def chosen(self) -> list[tuple[int, Any]]:
        """(id, sample), those of unlike weight first: the lightest that counts, the heaviest, then in turn."""
        ids = list(dict.fromkeys(int(sample) for sample in self._ids))[:LOOKED_AT]
        first = self.read(ids)
        kept = copied(first)  # an object that is handed out again may have been changed in place
        again = self.read(ids)
        is_batched = hasattr(self.task.train_data, "__getitems__")
        is_shared = share_memory(first)
        alone = [copied(self.read([each]))[0] for each in ids] if is_batched or is_shared else kept
        if is_batched and not is_shared and not same(kept, alone):
            raise Fault(
                "the dataset's __getitems__ gives other samples for several numbers than for each alone, or in "
                "another order (sorted, say), so what belongs to a sample would be another's. Let it return the "
                "samples in the order of the numbers that it is given."
            )
        if is_shared and not same(kept, alone):
            raise Fault(
                "the dataset hands out the same memory for several training samples (one array or tensor that it "
                "fills anew for each), so samples that are read together all hold what was read last. Let it "
                "return a copy: x.clone() of a tensor, x.copy() of an array."
            )
        if not (same(first, kept) and same(kept, again)):
            raise Fault(
                "reading the same training samples twice gives different ones: the dataset draws numbers that "
                "gatrain does not control, counts its calls, or changes what it keeps in place (x.mul_(...)), so "
                "no run could be repeated or resumed. Draw from random, numpy.random or torch's global "
                "generators, which gatrain seeds for each sample, not from a generator of your own "
                "(torch.Generator, numpy.random.default_rng, random.Random), and change copies."
            )
        usable = [(key, sample) for key, sample in zip(ids, first, strict=True) if reading.is_read(sample)]
        count = min(MOST, len(usable), max(FEWEST, self._micro_batch or MOST))
        try:
            weights = [sum(self.made([pair]).weights.values()) for pair in usable]
        except GatrainError:
            raise
        except Exception:  # a collate function that takes no single sample
            return usable[:count]
        rising = [
            pair
            for _, pair in sorted(zip(weights, usable, strict=True), key=lambda each: (each[0] <= 0, each[0]))
        ]
        weighing = sum(weight > 0 for weight in weights)
        if weighing == 0:
            raise Unclear("none of the first samples has a weight.")
        order = [rising[0], *reversed(rising[1:weighing]), *rising[weighing:]]
        return order[:count]

    def made(self, pairs: Sequence[tuple[int, Any]]) -> Made:
        ids, samples = [int(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
        keys = self.keys(ids)
        made = reading.make(self.task, samples, keys, self._seed)
        return Made(made.batch, {name: float(w) for name, w in made.weights.items()}, tuple(ids))

    def collated(self, pairs: Sequence[tuple[int, Any]]) -> tuple[Made, bool]:
        """The whole batch, and whether collating it draws random numbers."""
        with _loading(self.task.train_data, [sample for sample, _ in pairs]):
            whole, draws = reading.draws_random_numbers(lambda: self.made(pairs))
            again = self.made(pairs)
        if not same([whole.batch], [again.batch]) or whole.weights != again.weights:
            raise Fault(
                "collating the same samples twice gives different batches: collate draws numbers that gatrain does "
                "not control, or counts its calls, so no run could be repeated or resumed. Draw from random, "
                "numpy.random or torch's global generators, which gatrain seeds for each micro-batch, not from a "
                "generator of your own (torch.Generator, numpy.random.default_rng, random.Random)."
            )
        return whole, draws

    def pieces(
        self, chosen: list[tuple[int, Any]], whole: Made, draws: bool, first: int = 1
    ) -> tuple[list[Made], bool]:
        """Two unequal pieces, and whether each was collated on its own, as a micro-batch is.

        A collate function that draws numbers would draw others: its batch is cut instead.
        """
        if len(chosen) < 2:
            return [], True
        if not draws:
            return [self.made(chosen[:first]), self.made(chosen[first:])], True
        cut = self.cut(whole, [first, len(chosen) - first])
        if cut is None:
            raise Unclear(
                "collate draws random numbers and its batch cannot be cut into samples, so whole and pieces differ "
                "anyway."
            )
        return cut, False

    def cut(self, whole: Made, sizes: list[int]) -> list[Made] | None:
        cut = reading.split_batch(whole.batch, sizes, whole.count)
        if cut is None:
            return None
        left = iter(whole.places)
        return [
            Made(
                part,
                {n: float(w) for n, w in weights_of(self.task, part).items()},
                tuple(itertools.islice(left, size)),
            )
            for part, size in zip(cut, sizes, strict=True)
        ]


@contextlib.contextmanager
def _loading(data: Samples, ids: Sequence[int]) -> Iterator[None]:
    """Errors of data and collate as the loader tells them."""
    try:
        yield
    except (GatrainError, Fault):
        raise
    except Exception as error:
        raise DataError(
            f"cannot load the samples {names_of(data, ids)}: {type(error).__name__}: {error}"
        ) from error
