"""Before the first step: does the loss of a batch equal the losses of its pieces, added up?

Accumulation is exact for a loss that is a sum over samples with a weight that is one, too. Nobody can read that off
a user's code, but a few samples show it: computed whole and in two unequal pieces, with random numbers switched
off, in fp32 where the model allows it, since rounding would hide small faults. What differs is named before
anything is trained. Each rank computes alone; then all share one verdict.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gatrain.config import RunConfig
from gatrain.errors import DataError, ExactnessError, GatrainError, PeerFailed, is_out_of_memory
from gatrain.tasks.base import Batch, Samples, named_loss_sums, weights_of
from gatrain.train import samples as reading
from gatrain.train import seeding
from gatrain.train.counts import agree
from gatrain.train.dropout.notice import NoticeDraws
from gatrain.train.engine import Engine
from gatrain.train.frozen import frozen_randomness
from gatrain.train.held_state import HeldState, perturb
from gatrain.train.sample_names import names_of
from gatrain.train.verdicts import Numbers, cause_of_difference
from gatrain.train.windows import WindowSchedule

MOST, FEWEST = 8, 3
"""Samples that are computed; between the two it is the plan's micro-batch."""
LOOKED_AT = 16
"""Samples among which those of unlike weight are chosen."""
SLOW_S = 0.5
"""A GPU whose forward takes longer than this gets the fewest samples, in the precision of training."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative to the losses' size, by the lowest precision that the forward used, where nothing sharper can be
computed. The same numbers added in another order differ by about 1e-7 to 1e-5 in fp32 and by 3e-3 in bf16."""
SURELY_EQUAL, SURELY_WRONG = 2e-6, 1e-3
"""Of fp32: differences in between are computed again in fp64, where only a wrong loss leaves any."""
REPEATED = 1e-5
"""Relative difference between two equal computations that a GPU's unordered sums may explain."""
OFF = "train.check=warn goes on all the same, train.check=off leaves this check out."


@dataclass(frozen=True)
class LossCheck:
    """What the check found."""

    fault: str | None = None
    """Why the result would be wrong; None if nothing speaks against the loss."""
    notices: tuple[str, ...] = ()


def check_loss(
    engine: Engine,
    ids: Sequence[int],
    *,
    epoch: int = 0,
    seed: int = 0,
    mode: str = "error",
    micro_batch: int | None = None,
    lenient: bool = False,
    of_rows: Callable[[Batch], Tensor] | None = None,
) -> list[str]:
    """Compare a few samples computed whole and in pieces. Collective.

    Model, task and random generators are left as they were.

    Args:
        engine: the model on this rank's device.
        ids: training samples to choose from, such as this rank's of the first window.
        epoch: of these samples; with ``seed`` it decides their augmentation.
        mode: ``error``, ``warn`` or ``off``.
        micro_batch: of the plan, if there is one; not many more samples are computed at once.
        lenient: an error of the user's model is no verdict: for trials, where sizes may fail.
        of_rows: what must be a sum over samples instead of the loss (`GradientStrategy.sum_to_check`).

    Returns:
        What to tell: the fault under ``warn``, and what could not be checked.

    Raises:
        ExactnessError: with ``error``, a loss that would be trained wrongly; says what to write.
        PeerFailed: another rank found it.
        Exception: the user's own error in data, model or loss.
    """
    if mode == "off":
        return []
    found = LossCheck()
    error: Exception | None = None
    try:
        found = _Check(engine, ids, epoch, seed, micro_batch, of_rows=of_rows).run()
    except GatrainError as caught:
        error = caught
    except Exception as caught:
        error = None if lenient else caught
    every = engine.ranks.gather((found, error is not None))
    if error is not None:
        raise error
    if any(failed for _, failed in every):
        raise PeerFailed("another rank failed in the check of the loss; its own error says why.")
    notices = list(dict.fromkeys(notice for each, _ in every for notice in each.notices))
    fault = next((each.fault for each, _ in every if each.fault is not None), None)
    if fault is not None and mode == "error":
        if found.fault is None:
            raise PeerFailed("another rank found the loss wrong; its own error says why.")
        raise ExactnessError(f"{found.fault} Nothing was trained. {OFF}")
    return [f"Wrong result ahead: {fault}", *notices] if fault is not None else notices


def check_before_first_step(
    engine: Engine,
    config: RunConfig,
    schedule: WindowSchedule,
    step: int,
    micro_batch: int | None,
    *,
    lenient: bool = False,
) -> list[str]:
    """`check_loss` on samples of window ``step``, those of this rank first. Collective."""
    strategy, of_rows = engine.step.strategy, None
    if not strategy.needs_sum_over_samples:  # a loss of all samples together is what the strategy is for
        of_rows = strategy.sum_to_check(engine.step)
        if of_rows is None:
            return []
    window = schedule.window(step)
    first, _ = window.slice_of(engine.ranks.rank, engine.ranks.world_size)
    return check_loss(
        engine,
        np.roll(window.ids, -first).tolist(),
        epoch=window.epoch,
        seed=config.train.seed,
        mode=config.train.check,
        micro_batch=micro_batch,
        lenient=lenient,
        of_rows=of_rows,
    )


class _Fault(Exception):
    """The loss is wrong; the text says why."""


class _Unclear(Exception):
    """The check can say nothing; the text says why."""


@dataclass
class _Terms:
    """Loss sums and weights of one forward, by term."""

    losses: dict[str, float]
    weights: dict[str, float]
    has_graph: bool
    sixteen_bit: torch.dtype | None = None

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.losses.values()))


@dataclass(frozen=True)
class _Way:
    """How forwards are computed here."""

    precise: torch.dtype | None = torch.float32
    """Instead of autocast or 16-bit parameters; None computes as in training."""
    frozen: bool = True
    graph: bool = False
    """With a graph, for a loss that needs gradients in its forward."""


@dataclass
class _Made:
    """Samples collated on the host, with the weight that the task counts."""

    batch: Batch
    weights: dict[str, float]
    places: tuple[int, ...]
    """The samples' ids, which key their dropout."""

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.places)


@dataclass
class _Check:
    engine: Engine
    ids: Sequence[int]
    epoch: int
    seed: int
    micro_batch: int | None
    way: _Way = field(default_factory=_Way)
    notices: list[str] = field(default_factory=list)
    in_haste: bool = False
    """The model is large: few samples, and no more precision than training has."""
    of_rows: Callable[[Batch], Tensor] | None = None

    def run(self) -> LossCheck:
        model, task = self.engine.model, self.engine.task
        state = HeldState(model, task)
        try:
            with seeding.kept_random_state(), _batch_statistics_aside(model):
                self._compare(state)
        except _Fault as fault:
            return LossCheck(str(fault), tuple(self.notices))
        except _Unclear as reason:
            self.notices.append(f"The loss could not be checked before the first step: {reason}")
        finally:
            state.restore()  # the allocator keeps its blocks: from an empty cache GPT-2 reserved a fifth more
        return LossCheck(None, tuple(self.notices))

    def _compare(self, state: HeldState) -> None:
        try:
            self._compare_fitting(state)
        except (GatrainError, _Fault, _Unclear):
            raise
        except Exception as error:
            if is_out_of_memory(error) or not self._computes_as_planned(state):
                raise
            if not self._comes_again(error, state):
                raise  # the user's own: no number of samples is to blame
            text = str(error).strip().partition("\n")[0]
            raise _Unclear(
                f"the model computes a micro-batch of {self.micro_batch} samples, but no other number "
                f"({type(error).__name__}: {text})."
            ) from error

    def _comes_again(self, error: Exception, state: HeldState) -> bool:
        """Whether the comparison ends in the same kind of error, as a model of a fixed size makes it do."""
        state.restore()
        try:
            self._compare_fitting(state)
        except (GatrainError, _Fault, _Unclear):
            raise
        except Exception as again:
            return type(again) is type(error)
        return False

    def _computes_as_planned(self, state: HeldState) -> bool:
        """Whether a micro-batch of exactly the plan's size can be computed."""
        ids = list(dict.fromkeys(int(sample) for sample in self.ids))[: self.micro_batch or 0]
        if not self.micro_batch or len(ids) < self.micro_batch:
            return False
        try:
            made = self._made(list(zip(ids, self._read(ids), strict=True)))
            state.restore()
            self._terms(made, _Way(precise=None, frozen=False), graph=True)
        except Exception:
            return False
        return True

    def _compare_fitting(self, state: HeldState) -> None:
        """With as many samples as memory holds."""
        chosen = self._chosen()
        while chosen:
            try:
                self._compare_samples(chosen, state)
                return
            except Exception as error:
                if not is_out_of_memory(error) or len(chosen) == 1:
                    raise
                if self.engine.device.type == "cuda":
                    torch.cuda.empty_cache()
                chosen = chosen[: max(1, len(chosen) // 2)]  # training needs no more than its own micro-batch

    # --- samples on the host ----------------------------------------------------------------------------

    def _keys(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.epoch, int(sample)) for sample in ids]

    def _read(self, ids: Sequence[int]) -> list[Any]:
        with _loading(self.engine.task.train_data, ids):
            return reading.read(self.engine.task, self.engine.task.train_data, self._keys(ids), self.seed)

    def _chosen(self) -> list[tuple[int, Any]]:
        """(id, sample), those of unlike weight first: the lightest that counts, the heaviest, then in turn."""
        ids = list(dict.fromkeys(int(sample) for sample in self.ids))[:LOOKED_AT]
        first = self._read(ids)
        kept = _copied(first)  # an object that is handed out again may have been changed in place
        again = self._read(ids)
        if _share_memory(first) and not _same(kept, [_copied(self._read([each]))[0] for each in ids]):
            raise _Fault(
                "the dataset hands out the same memory for several training samples (one array or tensor that it "
                "fills anew for each), so samples that are read together all hold what was read last. Let it "
                "return a copy: x.clone() of a tensor, x.copy() of an array."
            )
        if not (_same(first, kept) and _same(kept, again)):
            raise _Fault(
                "reading the same training samples twice gives different ones: the dataset draws numbers that "
                "gatrain does not control, counts its calls, or changes what it keeps in place (x.mul_(...)), so "
                "no run could be repeated or resumed. Draw from random, numpy.random or torch's global "
                "generators, which gatrain seeds for each sample, not from a generator of your own "
                "(torch.Generator, numpy.random.default_rng, random.Random), and change copies."
            )
        usable = [(key, sample) for key, sample in zip(ids, first, strict=True) if reading.is_read(sample)]
        count = min(MOST, len(usable), max(FEWEST, self.micro_batch or MOST))
        try:
            weights = [sum(self._made([pair]).weights.values()) for pair in usable]
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
            raise _Unclear("none of the first samples has a weight.")
        order = [rising[0], *reversed(rising[1:weighing]), *rising[weighing:]]
        return order[:count]

    def _made(self, pairs: Sequence[tuple[int, Any]]) -> _Made:
        ids, samples = [int(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
        keys = self._keys(ids)
        made = reading.make(self.engine.task, samples, keys, self.seed)
        return _Made(made.batch, {name: float(w) for name, w in made.weights.items()}, tuple(ids))

    def _collated(self, pairs: Sequence[tuple[int, Any]]) -> tuple[_Made, bool]:
        """The whole batch, and whether collating it draws random numbers."""
        with _loading(self.engine.task.train_data, [sample for sample, _ in pairs]):
            whole, draws = reading.draws_random_numbers(lambda: self._made(pairs))
            again = self._made(pairs)
        if not _same([whole.batch], [again.batch]) or whole.weights != again.weights:
            raise _Fault(
                "collating the same samples twice gives different batches: collate draws numbers that gatrain does "
                "not control, or counts its calls, so no run could be repeated or resumed. Draw from random, "
                "numpy.random or torch's global generators, which gatrain seeds for each micro-batch, not from a "
                "generator of your own (torch.Generator, numpy.random.default_rng, random.Random)."
            )
        return whole, draws

    # --- forwards ---------------------------------------------------------------------------------------

    def _terms(self, made: _Made, way: _Way | None = None, *, graph: bool = False) -> _Terms:
        """One forward on the device."""
        way = way or self.way
        engine = self.engine
        random = engine.step.random
        random.start((self.seed, seeding.MICRO_STEP, self.epoch, 0), made.places)
        batch = engine.to_device(made.batch)
        if (
            engine.device.type == "cpu"
        ):  # it was not copied, and a loss may write into it, as mixup in place does
            with contextlib.suppress(Exception):
                batch = copy.deepcopy(batch)
        watch = _Precisions()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(graph or way.graph))
            if way.precise is not None:
                batch = stack.enter_context(_computing_in(way.precise, engine.model, batch, engine.device))
            else:
                stack.enter_context(engine.autocast())
            stack.enter_context(random.aside() if way.frozen else random.around(contextlib.nullcontext)())
            if way.frozen:
                stack.enter_context(frozen_randomness(engine.model))
            stack.enter_context(watch)
            if self.of_rows is None:
                sums = named_loss_sums(engine.loss_sum(batch))
            else:
                total = self.of_rows(batch)
                sums = {name: (total, weight) for name, weight in made.weights.items()}
        losses, weights, has_graph = {}, {}, False
        for name, (total, weight) in sums.items():
            if not isinstance(total, Tensor) or total.numel() != 1:
                given = f"shape {list(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
                raise _Fault(
                    f"loss_sum() returned {given} for the loss term {name!r} where one number is wanted. Return "
                    "the sum over the samples: losses.sum(), with the weight."
                )
            has_graph |= total.requires_grad
            losses[name], weights[name] = float(total.detach()), float(weight)
        return _Terms(losses, weights, has_graph, watch.lowest)

    def _settle(self, probe: _Made) -> _Terms:
        """Find a way to compute that this model and loss allow; the result of ``probe`` with a graph.

        Raises:
            Exception: the user's own error, with what the model computes as in training.
        """
        ways = (_Way(), _Way(precise=None), _Way(precise=None, frozen=False))
        for way in ways[1:] if self.in_haste else ways:
            try:
                terms = self._terms(probe, way, graph=True)
            except (GatrainError, _Fault):
                raise
            except Exception as error:
                if not way.frozen or (is_out_of_memory(error) and way.precise is None):
                    raise
                continue
            self.way = way
            if not way.frozen and not self._agree(terms, self._terms(probe, graph=True), REPEATED):
                raise _Unclear("the model draws random numbers and cannot be computed without them.")
            return terms
        raise AssertionError("the last way raises or returns")

    def _agree(self, one: _Terms, other: _Terms, tolerance: float) -> bool:
        return all(
            abs(value - other.losses.get(name, math.nan)) <= tolerance * max(abs(value), 1e-12)
            for name, value in one.losses.items()
        )

    # --- the comparison ---------------------------------------------------------------------------------

    def _compare_samples(self, chosen: list[tuple[int, Any]], state: HeldState) -> None:
        whole, draws = self._collated(chosen)
        pieces, own = self._pieces(chosen, whole, draws)
        probe = pieces[0] if pieces else whole
        try:
            terms = self._settle(probe)
        except GatrainError:
            raise
        except _Fault:
            raise
        except Exception:
            # a model may refuse one sample, or another number than training gives it
            state.restore()
            pieces, own = self._pieces(chosen, whole, draws, first=2) if len(chosen) > 3 else ([], own)
            probe = pieces[0] if pieces else whole
            terms = self._settle(probe)
        self._check_memory(probe, terms)
        state.restore()
        self._check_repeats(probe, state)
        if not terms.has_graph and any(p.requires_grad for p in self.engine.model.parameters()):
            raise _Fault(
                "loss_sum() returns a loss without a graph: no parameter would get a gradient, so the weights "
                "would never move. Do not detach it, compute it under torch.no_grad() or from .item() or numpy "
                "numbers."
            )
        if not pieces:
            self._check_used(whole, terms)
            return
        began = time.perf_counter()
        together = self._forward(whole, state)
        took = time.perf_counter() - began
        if took > SLOW_S and self.engine.device.type == "cuda" and not self.in_haste:
            self.in_haste = True
            self._compare_samples(chosen[:FEWEST], state)
            return
        self._check_used(whole, together)
        parts = [self._forward(piece, state) for piece in pieces]
        for piece, part in zip(pieces, parts, strict=True):
            self._check_used(piece, part)
        self._check_sums(chosen, whole, together, pieces, parts, own, state)
        if len(chosen) > 2 and took <= SLOW_S:  # by chance, one split may add up
            turned = chosen[::-1] if own else chosen
            others, _ = self._pieces(turned, whole, draws, first=max(1, len(chosen) // 2 - 1))
            parts = [self._forward(piece, state) for piece in others]
            self._check_sums(chosen, whole, together, others, parts, own, state)
        if self.engine.step.random.is_keyed:
            self._check_keys(whole, pieces, state)

    def _check_keys(self, whole: _Made, pieces: list[_Made], state: HeldState) -> None:
        """With dropout on, which is keyed by sample: do the pieces still add up to the whole?"""
        way = dataclasses.replace(self.way, frozen=False)
        state.restore()
        with NoticeDraws(self.engine.model) as notice:
            together = self._terms(whole, way)
        if notice.seen:
            raise _Fault(
                f"dropout=keyed: the forward draws random numbers that it does not reach ({notice.words}), so they "
                "are other ones in each split. Draw through nn.Dropout or torch.nn.functional.dropout, or use "
                "dropout=torch."
            )
        parts = []
        for piece in pieces:
            state.restore()
            parts.append(self._terms(piece, way))
        for name, wanted in together.losses.items():
            given = sum(part.losses[name] for part in parts)
            lowest = min(
                (each.sixteen_bit for each in (together, *parts) if each.sixteen_bit is not None),
                key=_order,
                default=torch.float32,
            )
            if abs(given - wanted) > TOLERANCE[lowest] * max(abs(wanted), abs(given), 1e-12):
                raise _Fault(
                    f"dropout=keyed: with dropout on, the loss term {name!r} of {whole.count} samples is "
                    f"{wanted:.6g}, and {given:.6g} as {' + '.join(str(piece.count) for piece in pieces)}, while "
                    "without dropout they agree. So a mask depends on more than its sample: dimension 0 of a "
                    "dropout's input does not count samples ('dropout={name: keyed, batch_dim: 1}'), or its rows "
                    "are not those of one sample after the other. Use dropout=torch otherwise."
                )

    def _pieces(
        self, chosen: list[tuple[int, Any]], whole: _Made, draws: bool, first: int = 1
    ) -> tuple[list[_Made], bool]:
        """Two unequal pieces, and whether each was collated on its own, as a micro-batch is.

        A collate function that draws numbers would draw others: its batch is cut instead.
        """
        if len(chosen) < 2:
            return [], True
        if not draws:
            return [self._made(chosen[:first]), self._made(chosen[first:])], True
        cut = self._cut(whole, [first, len(chosen) - first])
        if cut is None:
            raise _Unclear(
                "collate draws random numbers and its batch cannot be cut into samples, so whole and pieces differ "
                "anyway."
            )
        return cut, False

    def _cut(self, whole: _Made, sizes: list[int]) -> list[_Made] | None:
        cut = reading.split_batch(whole.batch, sizes, whole.count)
        if cut is None:
            return None
        left = iter(whole.places)
        return [
            _Made(
                part,
                {n: float(w) for n, w in weights_of(self.engine.task, part).items()},
                tuple(itertools.islice(left, size)),
            )
            for part, size in zip(cut, sizes, strict=True)
        ]

    def _forward(self, made: _Made, state: HeldState) -> _Terms:
        """From the state at the beginning, without a graph if the loss allows that."""
        state.restore()
        try:
            return self._terms(made)
        except RuntimeError as error:
            if self.way.graph or is_out_of_memory(error):
                raise
            self.way = dataclasses.replace(self.way, graph=True)
            state.restore()
            return self._terms(made)

    def _check_memory(self, probe: _Made, first: _Terms) -> None:
        """Does the loss depend on what earlier micro-steps left behind?"""
        before = HeldState(self.engine.model, self.engine.task)
        second = self._terms(probe, graph=True)
        changed = before.changed()
        if not changed:
            if self._agree(second, first, REPEATED) or not second.is_finite:
                return
            third = self._terms(probe, graph=True)
            if self._agree(third, second, REPEATED):
                return  # something was made at the first call
            raise _Fault(_uncontrolled(second, third))
        later = self._terms(probe, graph=True)
        before.restore()
        again = self._terms(probe, graph=True)
        if not self._agree(again, second, REPEATED):
            raise _Fault(_uncontrolled(second, again))
        noise = max(1e-6, *(abs(again.losses[n] / v - 1) * 10 for n, v in second.losses.items() if v), 0.0)
        if self._agree(later, second, noise):
            before.restore()
            perturb(changed)
            with contextlib.suppress(Exception):  # such as an index out of range
                later = self._terms(probe, graph=True)
        before.restore()
        if not self._agree(later, second, noise):
            names = ", ".join(slot.name for slot in changed[:3]) + (", ..." if len(changed) > 3 else "")
            raise _Fault(
                f"loss_sum() keeps state that changes with each micro-step and that the loss depends on ({names}): "
                f"the same micro-batch gives {_number(second)}, and {_number(later)} once that state has moved on. "
                "So the result depends on the number of micro-steps in a step, that is on the split and on the "
                "number of ranks. A moving average, a counter or a queue must move once for each optimizer step: "
                "loss_sum is no place for it."
            )

    def _check_repeats(self, probe: _Made, state: HeldState) -> None:
        """With its random numbers, equally seeded and from the same state, is a micro-step repeatable?"""
        way = dataclasses.replace(self.way, frozen=False)
        twice = []
        for _ in range(2):
            twice.append(self._terms(probe, way, graph=True))
            state.restore()
        if twice[0].is_finite and not self._agree(twice[0], twice[1], 10 * REPEATED):
            raise _Fault(_uncontrolled(*twice))

    def _check_used(self, made: _Made, terms: _Terms) -> None:
        """Do the host's count and the weight that the loss used agree?"""
        if unknown := sorted(set(terms.weights) ^ set(made.weights)):
            where = ("loss_sum()", "weight()") if unknown[0] in terms.weights else ("weight()", "loss_sum()")
            raise _Fault(
                f"the loss term {unknown[0]!r} is returned by {where[0]} and missing in {where[1]}. Both must "
                "return the same terms, each with a denominator of its own."
            )
        for name, counted in made.weights.items():
            used = terms.weights[name]
            if not agree(counted, used, 1e-5):
                raise _Fault(
                    f"weight() counted {counted:g} for the loss term {name!r} of {made.count} sample(s), but "
                    f"loss_sum() used {used:g}. Both must apply the same mask (mind shifted labels and ignored "
                    "positions)."
                )

    def _check_sums(
        self,
        chosen: list[tuple[int, Any]],
        whole: _Made,
        together: _Terms,
        pieces: list[_Made],
        parts: list[_Terms],
        own: bool,
        state: HeldState,
    ) -> None:
        for name, counted in whole.weights.items():
            added = sum(piece.weights[name] for piece in pieces)
            if abs(added - counted) > 1e-5 * max(abs(added), abs(counted)):
                sizes = " + ".join(str(piece.count) for piece in pieces)
                one = all(piece.weights[name] == counted for piece in pieces)
                cause = (
                    "It is the same for every batch, so it counts micro-batches"
                    if one
                    else "It depends on which samples share a batch: padding counted as data, a mean, or another "
                    "dimension than the samples'"
                )
                raise _Fault(
                    f"weight() counts {counted:g} for the loss term {name!r} of {whole.count} samples, but "
                    f"{added:g} for the same samples as {sizes}. {cause}. Let weight(batch) count what the loss's "
                    "mean divides by, sample by sample: len(batch), or the labels that are not ignored."
                )
        for piece, part in zip(pieces, parts, strict=True):
            if together.is_finite and not part.is_finite and any(piece.weights.values()):
                raise _Fault(
                    f"the loss of {whole.count} samples is {_number(together)} as one micro-batch, but that of "
                    f"{piece.count} of them alone is {_number(part)}, so the result would depend on the split. "
                    "Likely cause: a statistic over the micro-batch, such as a standard deviation, or a mean over "
                    "labels where none counts. Compute each sample's loss on its own, with statistics of the whole "
                    "training data, and return a sum."
                )
        if not (together.is_finite and all(part.is_finite for part in parts)):
            self.notices.append(
                "The loss of the first samples is not finite, so it could not be checked that it may be split."
            )
            return
        lowest = min((t.sixteen_bit for t in (together, *parts) if t.sixteen_bit), key=_order, default=None)
        tolerance = TOLERANCE[lowest or torch.float32]
        for name, wanted in together.losses.items():
            given = [part.losses[name] for part in parts]
            size = max(abs(wanted), sum(map(abs, given)))
            difference = abs(sum(given) - wanted) / max(size, 1e-12)
            if lowest is None and SURELY_EQUAL < difference < SURELY_WRONG:
                exact = self._difference_in_fp64(name, whole, pieces, state)
                difference = difference if exact is None else exact
                tolerance = TOLERANCE[torch.float32] if exact is None else SURELY_EQUAL
            if difference > tolerance:
                self._explain(name, chosen, whole, wanted, pieces, given, own, state, tolerance)

    def _difference_in_fp64(
        self, name: str, whole: _Made, pieces: list[_Made], state: HeldState
    ) -> float | None:
        """The relative difference without rounding; None where the model or the loss cannot be computed so."""
        kept, self.way = self.way, dataclasses.replace(self.way, precise=torch.float64)
        try:
            wanted, *given = [self._forward(made, state).losses[name] for made in (whole, *pieces)]
        except Exception:
            return None
        finally:
            self.way = kept
        return abs(sum(given) - wanted) / max(abs(wanted), sum(map(abs, given)), 1e-12)

    def _explain(
        self,
        name: str,
        chosen: list[tuple[int, Any]],
        whole: _Made,
        wanted: float,
        pieces: list[_Made],
        given: list[float],
        own: bool,
        state: HeldState,
        tolerance: float,
    ) -> None:
        """Find out why the pieces do not add up, with further forwards.

        Raises:
            _Fault: with the cause.
            _Unclear: numbers of Python's or NumPy's generators decide.
        """

        if self.of_rows is not None:
            sizes = " + ".join(str(piece.count) for piece in pieces)
            raise _Fault(
                f"represent() must compute each sample by itself, but a fixed sum over the rows of {whole.count} "
                f"samples is {wanted:.6g} as one micro-batch and {sum(given):.6g} as {sizes}: it normalises over "
                "the batch, compares samples, or depends on how far the batch is padded. Move what needs other "
                "samples into window_loss()."
            )

        def loss(made: _Made) -> float:
            return self._forward(made, state).losses[name]

        def attempt(call: Callable[[], float | None]) -> float | None:
            try:
                return call()
            except Exception:
                return None

        if self._depends_on_host_numbers(name, whole, wanted, state, tolerance):
            raise _Unclear(
                "the model or the loss draws from random or numpy.random for each sample, and whole and pieces "
                "draw differently. Draw from torch's generator instead."
            )

        def cut_sum() -> float | None:
            cut = self._cut(whole, [piece.count for piece in pieces]) if own else None
            return None if cut is None else sum(loss(piece) for piece in cut)

        def three() -> float | None:
            if not own or len(chosen) < 3:
                return None
            return sum(loss(self._made(part)) for part in (chosen[:1], chosen[1:2], chosen[2:]))

        numbers = Numbers(
            term=name,
            whole=wanted,
            pieces=tuple(given),
            counts=(whole.count, *(piece.count for piece in pieces)),
            weights=(whole.weights[name], *(piece.weights[name] for piece in pieces)),
            batches=(whole.batch, *(piece.batch for piece in pieces)),
            turned_round=attempt(lambda: loss(self._made(chosen[::-1]))) if own else None,
            cut=attempt(cut_sum),
            three=attempt(three),
            tolerance=tolerance,
            is_own_task=not type(self.engine.task).__module__.startswith("gatrain."),
        )
        raise _Fault(cause_of_difference(numbers))

    def _depends_on_host_numbers(
        self, name: str, whole: _Made, wanted: float, state: HeldState, tolerance: float
    ) -> bool:
        self._forward(whole, state)
        after = seeding.random_state()
        # the seed is set in between: compare with what seeding alone leaves
        seeding.seed_everything(self.seed, seeding.MICRO_STEP, self.epoch, 0)
        untouched = seeding.random_state()
        if after[0] == untouched[0] and _same_numpy(after[1], untouched[1]):
            return False
        kept, self.seed = self.seed, self.seed + 1
        try:
            other = self._forward(whole, state).losses[name]
        finally:
            self.seed = kept
        return abs(other - wanted) > tolerance * max(abs(wanted), 1e-12)


@contextlib.contextmanager
def _loading(data: Samples, ids: Sequence[int]) -> Iterator[None]:
    """Errors of data and collate as the loader tells them."""
    try:
        yield
    except (GatrainError, _Fault):
        raise
    except Exception as error:
        raise DataError(
            f"cannot load the samples {names_of(data, ids)}: {type(error).__name__}: {error}"
        ) from error


def _uncontrolled(one: _Terms, other: _Terms) -> str:
    return (
        f"the same micro-batch with the same seeds gives the loss {_number(one)} and then {_number(other)}: the "
        "model or loss_sum() draws numbers that gatrain does not control (a torch.Generator, "
        "numpy.random.default_rng or random.Random of its own), or keeps what it saw before (a list, a queue, a "
        "counter). Draw from the global generators, which gatrain seeds for each micro-step, and keep nothing "
        "between micro-steps."
    )


def _number(terms: _Terms) -> str:
    return ", ".join(f"{value:.6g}" for value in terms.losses.values())


def _order(dtype: torch.dtype) -> float:
    return -TOLERANCE[dtype]


class _Precisions(TorchDispatchMode):
    """Notes whether anything is computed with 16 bits: then rounding explains more."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lowest: torch.dtype | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16):
            self.lowest = min(self.lowest or result.dtype, result.dtype, key=_order)
        return result


@contextlib.contextmanager
def _computing_in(
    dtype: torch.dtype, model: nn.Module, batch: Batch, device: torch.device
) -> Iterator[Batch]:
    """Compute in fp32 or fp64: no autocast, narrower parameters widened, no TF32. Gives the batch to use."""

    def is_narrow(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize

    narrow = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if is_narrow(t)]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        if narrow:
            batch = pytree.tree_map(
                lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and is_narrow(leaf) else leaf, batch
            )
        for tensor, data in narrow:
            tensor.data = data.to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield batch
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for tensor, data in narrow:
            wide, tensor.data = tensor.data, data
            if not torch.equal(wide, data.to(wide.dtype)):  # the forward wrote to it
                data.copy_(wide)


@contextlib.contextmanager
def _batch_statistics_aside(model: nn.Module) -> Iterator[None]:
    """BatchNorm by its running statistics and spectral norm without its iteration: both are known to depend on the
    micro-batch and are told of elsewhere, and must not hide or look like a wrong loss."""
    aside = [module for module in model.modules() if module.training and _is_known(module)]
    bare = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    for norm in bare:  # statistics of nothing
        weight = next(model.parameters())
        norm.running_mean = torch.zeros(norm.num_features, dtype=weight.dtype, device=weight.device)
        norm.running_var = torch.ones_like(norm.running_mean)
    for module in aside:
        module.training = False
    try:
        yield
    finally:
        for module in aside:
            module.training = True
        for norm in bare:
            norm.running_mean = norm.running_var = None


def _is_known(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    if isinstance(module, _BatchNorm):
        return True
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return "batchnorm" in name or name == "_spectralnorm" or "SpectralNorm" in hooks


def _same_numpy(one: Any, other: Any) -> bool:
    return one[2:] == other[2:] and np.array_equal(one[1], other[1])


def _copied(samples: list[Any]) -> list[Any]:
    """Copies of the samples; what cannot be copied stands for itself."""
    found = []
    for sample in samples:
        try:
            found.append(copy.deepcopy(sample))
        except Exception:
            found.append(sample)
    return found


def _share_memory(samples: Sequence[Any]) -> bool:
    """Whether the same tensor or array belongs to two of the samples."""
    seen: dict[int, int] = {}
    for nth, sample in enumerate(samples):
        for place in _memory(sample):
            if seen.setdefault(place, nth) != nth:
                return True
    return False


def _memory(sample: Any) -> Iterator[int]:
    """Where the tensors and arrays of a sample begin in memory."""
    for value in pytree.tree_leaves(sample):
        if isinstance(value, Tensor) and value.layout is torch.strided and value.numel():
            yield value.data_ptr()
        elif isinstance(value, np.ndarray) and value.size:
            yield value.__array_interface__["data"][0]


def _same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two samples or batches hold the same numbers; what cannot be compared counts as the same."""
    if depth > 8:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.is_sparse or one.is_nested:
            return type(one) is type(other)
        return one.shape == other.shape and bool(torch.equal(_without_nan(one), _without_nan(other)))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))
    if isinstance(one, bool | int | float | complex | str | bytes | np.generic):
        return bool(one == other) or (one != one and other != other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], depth + 1) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(lambda a, b: _same(a, b, depth + 1), one, other))
    if type(one) is type(other) and hasattr(one, "tobytes"):  # an image
        return bool(one.tobytes() == other.tobytes())
    if type(one) is type(other) and isinstance(getattr(one, "__dict__", None), dict):
        return _same(vars(one), vars(other), depth + 1)
    return True


def _without_nan(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor) if tensor.is_floating_point() else tensor
