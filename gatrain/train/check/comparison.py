"""The comparison: a few samples whole and in pieces, and all that is looked at with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatrain.errors import GatrainError, is_out_of_memory
from gatrain.tasks.base import Batch
from gatrain.train import seeding
from gatrain.train.check.computing import TOLERANCE, aside_texts, batch_statistics_aside, by_precision
from gatrain.train.check.faults import Fault, Unclear
from gatrain.train.check.forwards import REPEATED, Forwards, Terms, Way
from gatrain.train.check.gradients import check_gradients
from gatrain.train.check.host import FEWEST, HostSamples, Made
from gatrain.train.check.memory import check_memory, uncontrolled
from gatrain.train.check.mixing import check_mixing
from gatrain.train.check.own_gradients import check_accumulation_hooks, gradients_left_alone
from gatrain.train.check.sums import Sums
from gatrain.train.counts import agree
from gatrain.train.dropout.notice import NoticeDraws
from gatrain.train.engine import Engine
from gatrain.train.held_state import HeldState

SLOW_S = 0.5
"""A GPU whose forward takes longer than this gets the fewest samples, in the precision of training."""


@dataclass(frozen=True)
class LossCheck:
    """What the check found."""

    fault: str | None = None
    """Why the result would be wrong; None if nothing speaks against the loss."""
    notices: tuple[str, ...] = ()


class Comparison:
    """One check on one rank.

    Args:
        ids: training samples to choose from.
        epoch, seed: which decide their augmentation.
        micro_batch: of the plan, if there is one.
        of_rows: what must be a sum over samples instead of the loss.
        has_gradients: gradients are compared, too.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        epoch: int,
        seed: int,
        micro_batch: int | None,
        of_rows: Callable[[Batch], Tensor] | None = None,
        *,
        has_gradients: bool = True,
    ) -> None:
        self._has_gradients = has_gradients
        self._engine, self._ids, self._micro_batch = engine, ids, micro_batch
        self._host = HostSamples(engine.task, ids, epoch, seed, micro_batch)
        self._forwards = Forwards(engine, epoch, seed, of_rows)
        self._notices: list[str] = []

    def run(self) -> LossCheck:
        model, task = self._engine.model, self._engine.task
        state = HeldState(model, task)
        for text in aside_texts(model):
            self._note(text)
        try:
            with seeding.kept_random_state(), batch_statistics_aside(model):
                self._compare(state)
        except Fault as fault:
            return LossCheck(str(fault), tuple(self._notices))
        except Unclear as reason:
            self._notices.append(f"The loss could not be checked before the first step: {reason}")
        finally:
            state.restore()  # the allocator keeps its blocks: from an empty cache GPT-2 reserved a fifth more
        return LossCheck(None, tuple(self._notices))

    def _compare(self, state: HeldState) -> None:
        try:
            self._compare_fitting(state)
        except (GatrainError, Fault, Unclear):
            raise
        except Exception as error:
            if is_out_of_memory(error) or not self._computes_as_planned(state):
                raise
            if not self._comes_again(error, state):
                raise  # the user's own: no number of samples is to blame
            text = str(error).strip().partition("\n")[0]
            raise Unclear(
                f"the model computes a micro-batch of {self._micro_batch} samples, but no other number "
                f"({type(error).__name__}: {text})."
            ) from error

    def _comes_again(self, error: Exception, state: HeldState) -> bool:
        """Whether the comparison ends in the same kind of error, as a model of a fixed size makes it do."""
        state.restore()
        try:
            self._compare_fitting(state)
        except (GatrainError, Fault, Unclear):
            raise
        except Exception as again:
            return type(again) is type(error)
        return False

    def _computes_as_planned(self, state: HeldState) -> bool:
        """Whether a micro-batch of exactly the plan's size can be computed."""
        ids = list(dict.fromkeys(int(sample) for sample in self._ids))[: self._micro_batch or 0]
        if not self._micro_batch or len(ids) < self._micro_batch:
            return False
        try:
            made = self._host.made(list(zip(ids, self._host.read(ids), strict=True)))
            state.restore()
            self._forwards.terms(made, Way(precise=None, frozen=False), graph=True)
        except Exception:
            return False
        return True

    def _compare_fitting(self, state: HeldState) -> None:
        """With as many samples as memory holds."""
        chosen = self._host.chosen()
        while chosen:
            try:
                self._compare_samples(chosen, state)
                return
            except Exception as error:
                if not is_out_of_memory(error) or len(chosen) == 1:
                    raise
                if self._engine.device.type == "cuda":
                    torch.cuda.empty_cache()
                chosen = chosen[: max(1, len(chosen) // 2)]  # training needs no more than its own micro-batch

    # --- the comparison ---------------------------------------------------------------------------------

    def _compare_samples(self, chosen: list[tuple[int, Any]], state: HeldState) -> None:
        check_accumulation_hooks(self._engine.model)
        whole, draws = self._host.collated(chosen)
        pieces, own = self._host.pieces(chosen, whole, draws)
        probe = pieces[0] if pieces else whole
        model = self._engine.model
        try:
            with gradients_left_alone(model):
                terms = self._forwards.settle(probe)
        except GatrainError:
            raise
        except Fault:
            raise
        except Exception:
            # a model may refuse one sample, or another number than training gives it
            state.restore()
            pieces, own = self._host.pieces(chosen, whole, draws, first=2) if len(chosen) > 3 else ([], own)
            probe = pieces[0] if pieces else whole
            with gradients_left_alone(model):
                terms = self._forwards.settle(probe)
        self._note(check_memory(self._engine, self._forwards, probe, terms))
        state.restore()
        self._check_repeats(probe, state)
        if not terms.has_graph and any(p.requires_grad for p in model.parameters()):
            raise Fault(
                "loss_sum() returns a loss without a graph: no parameter would get a gradient, so the weights "
                "would never move. Do not detach it, compute it under torch.no_grad() or from .item() or numpy "
                "numbers."
            )
        if not pieces:
            self._check_used(whole, terms)
            return
        began = time.perf_counter()
        together = self._forwards.from_start(whole, state)
        took = time.perf_counter() - began
        if took > SLOW_S and self._engine.device.type == "cuda" and not self._forwards.in_haste:
            self._forwards.in_haste = True
            self._compare_samples(chosen[:FEWEST], state)
            return
        self._check_used(whole, together)
        parts = [self._forwards.from_start(piece, state) for piece in pieces]
        for piece, part in zip(pieces, parts, strict=True):
            self._check_used(piece, part)
        sums = Sums(self._host, self._forwards, chosen, whole, together, own, state)
        self._note(sums.check(pieces, parts))
        if len(chosen) > 2 and took <= SLOW_S:  # by chance, one split may add up
            turned = chosen[::-1] if own else chosen
            others, _ = self._host.pieces(turned, whole, draws, first=max(1, len(chosen) // 2 - 1))
            parts = [self._forwards.from_start(piece, state) for piece in others]
            self._note(sums.check(others, parts))
        if self._engine.step.random.is_keyed:
            self._check_keys(whole, pieces, state)
        if draws:
            check_mixing(self._host, self._forwards, chosen, state)
        if self._has_gradients and together.is_finite and not self._forwards.in_haste:
            if took > SLOW_S and own:
                chosen = chosen[:FEWEST]
                whole = self._host.made(chosen)
                pieces, _ = self._host.pieces(chosen, whole, draws)
            self._note(check_gradients(self._forwards, whole, pieces, state))

    def _note(self, text: str | None) -> None:
        if text is not None and text not in self._notices:
            self._notices.append(text)

    def _check_keys(self, whole: Made, pieces: list[Made], state: HeldState) -> None:
        """With dropout on, which is keyed by sample: do the pieces still add up to the whole?"""
        way = dataclasses.replace(self._forwards.way, frozen=False)
        state.restore()
        with NoticeDraws(self._engine.model) as notice:
            together = self._forwards.terms(whole, way)
        if notice.seen:
            raise Fault(
                f"dropout=keyed: the forward draws random numbers that it does not reach ({notice.words}), so they "
                "are other ones in each split. Draw through nn.Dropout or torch.nn.functional.dropout, or use "
                "dropout=torch."
            )
        parts = []
        for piece in pieces:
            state.restore()
            parts.append(self._forwards.terms(piece, way))
        for name, wanted in together.losses.items():
            given = sum(part.losses[name] for part in parts)
            lowest = min(
                (each.sixteen_bit for each in (together, *parts) if each.sixteen_bit is not None),
                key=by_precision,
                default=torch.float32,
            )
            if abs(given - wanted) > TOLERANCE[lowest] * max(abs(wanted), abs(given), 1e-12):
                raise Fault(
                    f"dropout=keyed: with dropout on, the loss term {name!r} of {whole.count} samples is "
                    f"{wanted:.6g}, and {given:.6g} as {' + '.join(str(piece.count) for piece in pieces)}, while "
                    "without dropout they agree. So a mask depends on more than its sample: dimension 0 of a "
                    "dropout's input does not count samples ('dropout={name: keyed, batch_dim: 1}'), or its rows "
                    "are not those of one sample after the other. Use dropout=torch otherwise."
                )

    def _check_repeats(self, probe: Made, state: HeldState) -> None:
        """With its random numbers, equally seeded and from the same state, is a micro-step repeatable?"""
        way = dataclasses.replace(self._forwards.way, frozen=False)
        twice = []
        for _ in range(2):
            twice.append(self._forwards.terms(probe, way, graph=True))
            state.restore()
        if twice[0].is_finite and not self._forwards.agree(twice[0], twice[1], 10 * REPEATED):
            raise Fault(uncontrolled(*twice))

    def _check_used(self, made: Made, terms: Terms) -> None:
        """Do the host's count and the weight that the loss used agree?"""
        if unknown := sorted(set(terms.weights) ^ set(made.weights)):
            where = ("loss_sum()", "weight()") if unknown[0] in terms.weights else ("weight()", "loss_sum()")
            raise Fault(
                f"the loss term {unknown[0]!r} is returned by {where[0]} and missing in {where[1]}. Both must "
                "return the same terms, each with a denominator of its own."
            )
        for name, counted in made.weights.items():
            used = terms.weights[name]
            if not agree(counted, used, 1e-5):
                raise Fault(
                    f"weight() counted {counted:g} for the loss term {name!r} of {made.count} sample(s), but "
                    f"loss_sum() used {used:g}. Both must apply the same mask (mind shifted labels and ignored "
                    "positions)."
                )
