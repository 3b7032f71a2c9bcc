"""What is found out about model and data before the splits are compared: precisions, random numbers, state."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.config import RunConfig
from gatrain.errors import GatrainError
from gatrain.tasks.base import Batch
from gatrain.train import samples, seeding
from gatrain.train.batches import tensors_of
from gatrain.train.check.mixing import beside_others
from gatrain.train.dropout.notice import NoticeDraws
from gatrain.train.gradient.plain import Plain
from gatrain.train.held_state import HeldState, perturb
from gatrain.train.main_gradients import half_names, half_parameters
from gatrain.train.precision import autocast_for
from gatrain.train.ranks import Ranks
from gatrain.verify.limits import coarsest
from gatrain.verify.paths import FP32, FP64, NoticeCasts, Path, trained_path
from gatrain.verify.window import VerifiedWindow

PASSES = 9
"""Passes over the window in one precision, over all cases and processes."""
REPEATS = 3
"""Forwards that must agree, for the model to be called free of random numbers of its own."""
LEAST_SAMPLES, SLOW_SAMPLE_S = 8, 1.0
LOOKED_AT = 4
"""Samples at the start of the window that the first looks need."""


class Verification(VerifiedWindow):
    """The window of one recipe, and what is known of it.

    Args:
        config: of the run.
        precision: as it trains.
        checkpointing: as it trains.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, ranks: Ranks, *, precision: str, checkpointing: str
    ) -> None:
        super().__init__(config, device, ranks, checkpointing=checkpointing)
        self.notes: list[str] = []
        self.paths: list[Path] = []
        """Those that the model computes in."""
        self.trained: Path | None = None
        self.casts = "fp64"
        """The coarsest precision that the model computes in by itself, whatever its parameters are."""
        self.half_dtypes = ""
        """Of trained 16-bit parameters: ``bf16``, say."""
        self.remembers: str | None = None
        """What the loss depends on besides parameters and samples."""
        self.causes: list[str] = []
        """What is known to make the result depend on the split."""
        self._precision = precision

    # --- what the model and the data do ---------------------------------------------------------------

    def inspect(self) -> None:
        """Find the precisions that the model computes in, what draws random numbers, and what cannot be exact.

        Raises:
            Exception: the user's code fails in every precision.
        """
        model = self.model(Path("", None))
        while (found := self.readable(self.ids, LOOKED_AT)) != self.ids:
            self.ids = found
        self.trained = trained_path(model, self._precision)
        self._look_at_collate()
        # as it trains, or in fp32 where that does not compute here
        for path, looked_at in ((Path("", None, self._precision), model), (FP32, None)):
            try:
                self._look_at_state(path, looked_at or self.model(path))
                self._look_at_randomness(path, looked_at or self.model(path))
                break
            except GatrainError:
                raise
            except Exception:  # which the paths will say
                continue
        failures: list[tuple[str, Exception]] = []
        for path in filter(None, (FP64, FP32, self.trained)):
            try:
                self._try(path)
                self.paths.append(path)
            except GatrainError:
                raise
            except Exception as error:
                failures.append((path.name, error))
        if not self.paths:
            raise failures[-1][1]
        for name, failure in failures:
            text = str(failure).strip().split("\n")[0][:150]
            self.notes.append(
                f"The model does not compute in {name} here ({type(failure).__name__}: {text}): nothing is judged "
                f"in {name}."
            )
        if self.trained not in self.paths:
            self.trained = None
        self._say_what_is_known(model)

    def _try(self, path: Path) -> None:
        """Two samples forward and backward in this precision."""
        model = self.model(path)
        with self.computing(path, model):
            probe = self.on_device(self.host(self.ids[:2]), path)
            if path == FP64:
                with NoticeCasts() as casts, torch.no_grad():  # type: ignore[no-untyped-call]
                    self.loss_terms(model, probe)
                self.casts = coarsest("fp64", *casts.seen)
            self.one_shot_backward(model, probe, path)

    def _look_at_randomness(self, path: Path, model: nn.Module) -> None:
        """Whether the forward draws random numbers, and whether they can be held still."""
        drew: set[str] = set()
        host = self.host(self.ids[:2])
        is_keyed = self.random_numbers[model].is_keyed

        def losses(freeze: bool) -> list[float]:
            self.holds_still = freeze
            with self.computing(path, model), torch.no_grad(), autocast_for(path.autocast, self.device)():
                probe = self.on_device(host, path)
                found = [float(total) for total, _ in self.loss_terms(model, probe).values()]
                if not freeze:
                    drew.update(_drawn(self.device, self.config.train.seed))
                return found

        # the same seed again: what draws from a generator of its own shows in the losses
        try:
            plain = [losses(False) for _ in range(REPEATS)]
            held_still = "torch" in drew and not is_keyed
            frozen = [losses(True) for _ in range(REPEATS)] if held_still else plain
            if is_keyed:
                self._look_beside_keys(path, model, host, "torch" in drew)
        finally:
            self.holds_still = False
        self.holds_still = held_still
        if self.holds_still:
            self.notes.append(
                "Dropout draws another mask for each split, so it is off in this check, as is every other random "
                "number of torch: with them, splits are equal in distribution, not in value."
            )
        if drew - {"torch"}:
            self.notes.append(
                "The forward draws from random or numpy: here every forward starts from the same seed, so that "
                "whole and pieces draw the same."
            )
        if frozen.count(frozen[0]) != REPEATS and self.remembers is None:
            text = (
                "the model or loss draws random numbers that gatrain does not control (a generator of its own, "
                "time, os.urandom): it gives another loss for the same samples"
            )
            self.causes.append(text)
            self.notes.append(f"{text[0].upper()}{text[1:]}, so a difference is no proof of a wrong split.")

    def _look_beside_keys(self, path: Path, model: nn.Module, host: Batch, draws: bool) -> None:
        """What dropout=keyed does not reach."""
        self.notes.append("Dropout is on in this check: its masks are keyed by sample.")
        if not draws:
            return
        with (
            self.computing(path, model),
            torch.no_grad(),
            autocast_for(path.autocast, self.device)(),
            NoticeDraws(model) as notice,
        ):
            self.loss_terms(model, self.on_device(host, path))
        text = f"the forward draws random numbers that dropout=keyed does not reach ({notice.words})"
        self.causes.append(text)
        self.notes.append(f"{text[0].upper()}{text[1:]}: they are other ones in each split.")

    def _look_at_state(self, path: Path, model: nn.Module) -> None:
        """Whether the loss remembers earlier micro-steps (a counter, a moving average): so it depends on their
        number."""
        probe = self.on_device(self.host(self.ids[:2]), path)

        def losses() -> list[float]:
            with autocast_for(
                path.autocast, self.device
            )():  # with a graph: some code moves its state only then
                return [float(total.detach()) for total, _ in self.loss_terms(model, probe).values()]

        start = HeldState(model, self.task)
        try:
            with self.computing(path, model):
                losses()  # the first call may make things
                before = HeldState(model, self.task)
                first, changed = losses(), before.changed()
                later = losses()
                before.restore()
                repeats = losses() == first
                if repeats and changed and later == first:
                    before.restore()
                    perturb(changed)
                    with contextlib.suppress(Exception):  # such as an index out of range
                        later = losses()
                before.restore()
        finally:
            start.restore()
        if changed and repeats and later != first:
            names = ", ".join(slot.name for slot in changed[:3]) + (", ..." if len(changed) > 3 else "")
            self.remembers = (
                f"the loss depends on what earlier micro-steps left behind ({names}), so on their number: a moving "
                "average, a counter or a queue has to move once for each optimizer step, not in the forward."
            )

    def _look_at_collate(self) -> None:
        """Whether the same samples make the same batch; otherwise pieces are cut from the whole one."""
        ids = self.ids[: min(4, len(self.ids))]
        self.collated(ids)  # reads them
        first, drew = samples.draws_random_numbers(lambda: self.collated(ids))
        differs = not _equal(first, self.collated(ids))
        read, self.samples_read = self.samples_read, {}
        again = self.collated(ids)
        self.samples_read = read
        if differs or not _equal(first, again):
            self.notes.append(
                "The data gives another batch for the same samples each time: it draws random numbers that gatrain "
                "cannot seed (a generator of its own, time, os.urandom). The splits below compute the same "
                "numbers, but no run can be repeated or resumed exactly."
            )
        if not (drew or differs):
            return
        self.cuts = samples.split_batch(first, [1] * len(ids), len(ids)) is not None
        what = "The collate function draws random numbers"
        if self.cuts:
            self.notes.append(
                f"{what}: the pieces are cut from the whole window's batch, so that they agree."
            )
            keys = [(0, number) for number in ids]
            given = [self.samples_read[number] for number in ids]
            found = beside_others(self.task, given, keys, self.config.train.seed)
            if any(not _equal(one, other) for one, other in found):
                self.notes.append(
                    "The collate function mixes samples (mixup, cutmix). Cut from one batch the pieces agree, but "
                    "in training each micro-batch mixes within itself: the result depends on the split, and fit "
                    "refuses it."
                )
            return
        self.causes.append(
            "the collate function draws random numbers, other ones for pieces than for the whole"
        )
        self.notes.append(
            f"{what}, and its batch cannot be cut into samples: whole and pieces hold other numbers, so a "
            "difference is no proof of a wrong split."
        )

    def _say_what_is_known(self, model: nn.Module) -> None:
        if norms := self.norm.mixing(model):
            more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            self.causes.insert(0, f"BatchNorm ({norms[0]}{more}) uses each micro-batch's own statistics")
            self.notes.append(
                f"BatchNorm normalises each micro-batch by its own statistics ({norms[0]}{more}): with it, the "
                "result depends on the split and cannot equal the whole batch. norm=exact, norm=group, norm=layer "
                "and norm=frozen are exact."
            )
        if self.casts != "fp64":
            self.notes.append(
                f"The model or its loss computes in {self.casts} by itself (.float() and the like), also where its "
                f"parameters are fp64: its gradient is judged by {self.casts} rounding."
            )
        if type(self.strategy) is not Plain:
            self.notes.append(f"What is exact: {str(self.strategy.exact).rstrip('.')}.")
        if self.trained is not None:
            self.half_dtypes = half_names(parameter.dtype for parameter in half_parameters(model))
            kinds = f"{self.half_dtypes} parameters, fp32 sums and master weights" if self.half_dtypes else ""
            cast = f"autocast {self._precision}" if self._precision != "fp32" else ""
            self.notes.append(f"The trained path: {', '.join(filter(None, (kinds, cast)))}.")

    # --- how much of the window ---------------------------------------------------------------------

    def choose_samples(self, seconds: float) -> None:
        """Keep as many samples of the window as ``seconds`` allow, at least a few."""
        path = self.paths[0]
        one_s = self._seconds_of_one_sample(path)
        if one_s > SLOW_SAMPLE_S:
            whole = _elements(self.host(self.ids[:1]))
            self.shorten = True
            if _elements(self.host(self.ids[:1])) < whole:
                self.notes.append(
                    "long samples were shortened for this check; the model is the recipe's own."
                )
                one_s = self._seconds_of_one_sample(path)
        one_s *= self.strategy.cost_of(self.model(path)).in_micro_steps
        affordable = int(seconds / ((0.5 + len(self.paths)) * PASSES * max(one_s, 1e-6)))
        # an even number: some code takes no other
        self.keep(self.ids[: min(len(self.ids), max(LEAST_SAMPLES, affordable - affordable % 2))])

    def _seconds_of_one_sample(self, path: Path) -> float:
        model, probe = self.model(path), self.ids[:2]  # not one: BatchNorm may refuse a single sample
        with self.computing(path, model):
            batch = self.on_device(self.host(probe), path)
            for _ in range(2):  # the first call also pays for warming up
                began = time.perf_counter()
                self.one_shot_backward(model, batch, path)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / len(probe)


def _drawn(device: torch.device, seed: int) -> set[str]:
    """Which generators moved since they were seeded: ``torch``, or ``random`` and numpy, called ``host``."""

    def states() -> tuple[Any, Any, Tensor, Tensor]:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(1)
        return *seeding.random_state(), on_device

    now = states()
    seeding.seed_everything(seed)
    fresh = states()
    found = set()
    if not (torch.equal(now[2], fresh[2]) and torch.equal(now[3], fresh[3])):
        found.add("torch")
    if not seeding.same_random_state((now[0], now[1], fresh[2]), fresh[:3]):
        found.add("host")
    return found


def _equal(one: Batch, other: Batch) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _elements(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in tensors_of(batch))
