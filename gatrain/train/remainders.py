"""Windows that a model with BatchNorm cannot compute, found before the first step instead of at an epoch's end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gatrain import batch
from gatrain.errors import PlanError
from gatrain.train.modules import batch_norms, synchronised_norms, unequal_steps_text
from gatrain.train.token_windows import TokenWindows
from gatrain.train.windows import Cut, WindowSchedule

_SEARCHED = 64
"""Effective batches on either side among which one is looked for that would do."""
_LOOKED_AT = 1000
"""Windows whose sizes are looked at where each may have another."""
_LARGER = 4
"""How much larger a micro-batch may be besides."""
_REFUSAL = "more than 1 value per channel"
"""What PyTorch says where BatchNorm has one value for each channel; a picture or a sequence has several."""


@dataclass(frozen=True)
class Split:
    """The sizes of one kind of window, by rank."""

    samples: int
    sizes: list[list[int]]
    is_short: bool
    """At the end of an epoch."""

    @property
    def has_single(self) -> bool:
        return any(1 in sizes for sizes in self.sizes)

    @property
    def steps(self) -> list[int]:
        return [len(sizes) for sizes in self.sizes]


@dataclass(frozen=True)
class Splits:
    """How a run cuts its windows. ``shares`` as in `gatrain.train.loader.WindowLoader`."""

    schedule: WindowSchedule
    world_size: int
    micro_batch: int
    shares: Sequence[int] | None = None
    cuts: Sequence[Cut] = ()
    """By stage, where the effective batch changes."""

    def of(self, first: int, last: int) -> Iterator[Split]:
        """The one or two kinds among the windows ``first`` to ``last`` - 1."""
        schedule = self.schedule
        if self.cuts:
            yield from self._of_stages(first, last)
            return
        if isinstance(schedule, TokenWindows):
            sizes = {len(schedule.window(index).ids) for index in range(first, min(last, first + _LOOKED_AT))}
            yield from (self._split(size, is_short=False) for size in sorted(sizes))
            return
        per_epoch = schedule.per_epoch
        rest = 0 if schedule.drop_last else schedule.samples % schedule.effective_batch
        ends = [index for index in range(first, min(last, first + per_epoch)) if (index + 1) % per_epoch == 0]
        if last > first and not (rest and last - first == len(ends)):
            yield self._split(schedule.effective_batch, is_short=False)
        if rest and ends:
            yield self._split(rest, is_short=True)

    def _of_stages(self, first: int, last: int) -> Iterator[Split]:
        """The same, stage by stage: two epochs' ends say all, that in which it begins and any later one."""
        spans = self.schedule.spans
        ends = [span.index for span in spans[1:]] + [last]
        for span, end, cut in zip(spans, ends, self.cuts, strict=True):
            begin, end = max(first, span.index), min(last, end)
            found = {}
            for index in range(begin, min(end, begin + span.in_first + span.per_epoch + 1)):
                place = span.place(index)
                found[place.last - place.first] = place.last - place.first < span.effective_batch
            for size, is_short in found.items():
                yield dataclasses.replace(self, micro_batch=cut.micro_batch, shares=cut.shares)._split(
                    size, is_short
                )

    def _split(self, samples: int, is_short: bool) -> Split:
        shares = (
            batch.rank_shares(samples, self.world_size)
            if self.shares is None
            else batch.window_shares(samples, self.shares)
        )
        return Split(samples, batch.split_shares(shares, self.micro_batch), is_short)

    def better(self, is_good: Callable[[Split], bool]) -> str:
        """What to write so that every window of an epoch is good; empty if nothing near is, or where there are
        stages, which each would have to change."""
        if self.cuts or isinstance(self.schedule, TokenWindows):
            return ""
        found = []
        dropping = self._with(dataclasses.replace(self.schedule, drop_last=True), self.micro_batch)
        if not self.schedule.drop_last and dropping._is_good(is_good):
            found.append("train.drop_last=true")
        share = batch.Split(self.schedule.effective_batch, self.world_size).share
        for micro_batch in range(self.micro_batch + 1, share + 1):
            if self._with(self.schedule, micro_batch)._is_good(is_good):
                found.append(f"batch.micro={micro_batch}")
                break
        asked = self.schedule.effective_batch
        for effective in (asked + sign * step for step in range(1, _SEARCHED) for sign in (1, -1)):
            if not 1 <= effective <= self.schedule.samples:
                continue
            other = dataclasses.replace(self.schedule, effective_batch=effective)
            most = min(batch.Split(effective, self.world_size).share, self.micro_batch + _LARGER)
            for micro_batch in range(min(self.micro_batch, most), most + 1):
                if self._with(other, micro_batch)._is_good(is_good):
                    is_new = micro_batch != self.micro_batch
                    also = f" with batch.micro={micro_batch}" if is_new else ""
                    return " or ".join([*found, f"batch.effective={effective}{also}"])
        return " or ".join(found)

    def _with(self, schedule: WindowSchedule, micro_batch: int) -> Splits:
        most = batch.Split(schedule.effective_batch, self.world_size).share
        shares = self.shares if schedule.effective_batch == self.schedule.effective_batch else None
        return Splits(schedule, self.world_size, min(micro_batch, most), shares)

    def _is_good(self, is_good: Callable[[Split], bool]) -> bool:
        return all(map(is_good, self.of(0, self.schedule.per_epoch)))


def check_windows(
    model: nn.Module,
    splits: Splits,
    first: int,
    last: int,
    device: torch.device,
    forward_of_one: Callable[[], object],
) -> None:
    """Refuse a run some of whose windows BatchNorm cannot compute. Alike on all ranks, and without talk.

    Args:
        model: as it trains.
        splits: of the windows.
        first: index of the first window to come.
        last: index after the last one.
        device: of the model.
        forward_of_one: computes one sample as training would; called only where some micro-batch is that small.

    Raises:
        PlanError: names the window, its numbers and what would do.
        ConfigError: SyncBatchNorm on a CPU.
    """
    norms = batch_norms(model)
    if not norms:
        return
    kinds = list(splits.of(first, last))
    synchronised = synchronised_norms(model, device) if splits.world_size > 1 else []
    if synchronised:
        for split in kinds:
            if len(set(split.steps)) > 1:
                better = splits.better(lambda each: len(set(each.steps)) == 1)
                raise PlanError(unequal_steps_text(synchronised, split.steps) + _advice(better))
        return  # the ranks' samples are normalised together
    single = [split for split in kinds if split.has_single]
    if single and (refusal := _refusal(model, forward_of_one)) is not None:
        raise PlanError(_single_text(single[0], splits, norms, refusal))


def _single_text(split: Split, splits: Splits, norms: Sequence[str], refusal: str) -> str:
    schedule = splits.schedule
    if splits.cuts or isinstance(schedule, TokenWindows):
        where = (
            f"a window of {split.samples} samples{' at the end of an epoch' if split.is_short else ''} has a "
            f"micro-batch of one: {batch.equation(split.samples, split.sizes)}"
        )
    elif split.is_short:
        where = (
            f"{schedule.samples} samples with batch.effective={schedule.effective_batch} leave a window of "
            f"{split.samples} at the end of each epoch, and a micro-batch of one sample in it"
        )
    else:
        where = f"every window has a micro-batch of one sample: {batch.equation(split.samples, split.sizes)}"
    text = f"BatchNorm ('{norms[0]}') cannot normalise a micro-batch of one sample ({refusal}), and {where}."
    return text + _advice(splits.better(lambda each: not each.has_single)) + " GroupNorm has no such limit."


def _advice(better: str) -> str:
    return f" Use {better}." if better else ""


def _refusal(model: nn.Module, forward_of_one: Callable[[], object]) -> str | None:
    """What BatchNorm says to one sample; None if it takes it. Buffers and modes stay as they are."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            forward_of_one()
    except Exception as error:
        text = str(error).split("\n")[0]
        return text if _REFUSAL in text else None  # anything else is not for this check to tell
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    return None
