"""Which sample makes a window not finite, and what helps: the window's micro-batches again, bad ones in halves.

Every rank searches its own part, alone, with the parameters as they were before the window; then all hear of all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gatrain import commands
from gatrain.labels import IGNORED
from gatrain.rundir import RunDir
from gatrain.tasks.base import Batch, Samples
from gatrain.train.batches import tensors_of
from gatrain.train.engine import Engine
from gatrain.train.loss_scale import lowest_loss_scale
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.rehearsal import Rehearsal, rehearse
from gatrain.train.sample_names import names_of, sample_name
from gatrain.train.samples import Key, make, read

MOST_NAMED = 4
"""Bad samples that one rank looks for: more are seldom a matter of samples."""
SEARCH_S = 120.0
"""Seconds after which a rank gives up its search; the others wait for it."""


@dataclass(frozen=True)
class BadMicroBatch:
    """A micro-batch that is not finite when it is computed again."""

    rank: int
    micro_step: int
    micro_steps: int
    samples: tuple[int, ...]
    alone: tuple[int, ...]
    """Samples that are not finite on their own."""
    group: tuple[int, ...]
    """Where there is none: the smallest group found that is not finite."""
    loss_is_finite: bool
    holds: str = ""
    """Where its data holds a number that is not finite, in words."""
    has_no_label: bool = False
    """Its weight is 0, or a tensor of targets holds nothing but the ignored one."""
    is_fp16: bool = False
    finite_in_fp32: bool = False


@dataclass(frozen=True)
class Findings:
    """What the search came to, the same on every rank."""

    bad: list[BadMicroBatch]
    some_are_finite: bool
    """Some sample or micro-batch of the window is finite by itself."""
    parameter: str | None
    """A parameter that is itself not finite."""
    problem: str = ""
    """Why the search is not complete."""


def first_bad_parameter(engine: Engine) -> str | None:
    """Name of a trained parameter that holds NaN or infinity; the same on every rank. Waits for the device."""
    parameters = engine.model.named_parameters()  # frozen ones may be of any dtype
    named = [(name, p.detach()) for name, p in parameters if p.requires_grad and p.numel()]
    if not named:
        return None
    with torch.no_grad():
        largest = torch.stack([n.float() for n in torch._foreach_norm([p for _, p in named], float("inf"))])
        finite = torch.isfinite(largest).tolist()
    return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)


@dataclass
class Search:
    """One rank's search through its part of a window.

    Args:
        window: this rank's part, as it was trained.
        totals: T of each loss term.
        seed: the run's, for reading samples again.
    """

    engine: Engine
    window: LoadedWindow
    totals: Mapping[str, float]
    seed: int
    _bad: list[BadMicroBatch] = field(default_factory=list)
    _some_are_finite: bool = False
    _index: int = 0
    _until: float = 0.0

    def run(self) -> Findings:
        """Search, and share what was found. Collective."""
        parameter = first_bad_parameter(self.engine)
        problem = ""
        if parameter is None:
            self._until = time.monotonic() + SEARCH_S
            try:
                with lowest_loss_scale(self.engine.scaler), _alone(self.engine):
                    self._search()
            except _OutOfTimeError:
                problem = f"the search for the sample ended after {SEARCH_S:.0f} s"
            except _CommunicatesError:
                problem = "the model lets ranks communicate in its forward, so no sample was searched for"
            except Exception as error:  # the window's own story is the one to tell
                first = str(error).partition("\n")[0]
                problem = f"the search for the sample failed ({type(error).__name__}: {first})"
        parts = self.engine.ranks.gather((self._bad, self._some_are_finite, problem))
        return Findings(
            bad=[each for bad, _, _ in parts for each in bad],
            some_are_finite=any(fine for _, fine, _ in parts),
            parameter=parameter,
            problem=next((text for _, _, text in parts if text), ""),
        )

    def _search(self) -> None:
        for index, micro in enumerate(self.window.micro_batches):
            keys = micro.keys
            self._index = index
            if sum(len(each.alone) or 1 for each in self._bad) >= MOST_NAMED:
                return
            outcome = self._outcome(micro.batch, whole=True)
            if outcome.is_finite:
                self._some_are_finite = True
                continue
            alone, group = self._halved(list(keys))
            suspect = micro.batch
            if alone and len(keys) > 1:
                suspect = self._read(alone[:1]).batch
            self._bad.append(
                BadMicroBatch(
                    rank=self.engine.ranks.rank,
                    micro_step=index,
                    micro_steps=len(self.window.micro_batches),
                    samples=tuple(sample for _, sample in keys),
                    alone=tuple(sample for _, sample in alone),
                    group=tuple(sample for _, sample in group),
                    loss_is_finite=math.isfinite(outcome.loss_sum),
                    holds=_not_finite_in(suspect),
                    has_no_label=not any(micro.weights.values()) or _is_all_ignored(suspect),
                    is_fp16=self.engine.scaler is not None,
                    finite_in_fp32=self.engine.settings.precision != "fp32"
                    and self._outcome(suspect, fp32=True).is_finite,
                )
            )

    def _halved(self, keys: list[Key]) -> tuple[list[Key], list[Key]]:
        """Of samples that are not finite together: those that are so alone, or else the smallest group."""
        if len(keys) == 1:
            return keys, []
        middle = len(keys) // 2
        halves = keys[:middle], keys[middle:]
        try:
            bad = [half for half in halves if not self._is_finite(half)]
        except (_OutOfTimeError, _CommunicatesError):
            raise
        except Exception:  # a batch of these alone cannot be made or computed
            return [], keys
        if not bad:
            return [], keys
        alone: list[Key] = []
        group: list[Key] = []
        for half in bad:
            if len(alone) < MOST_NAMED:
                found, rest = self._halved(half)
                alone += found
                group = rest if rest and (not group or len(rest) < len(group)) else group
        return alone, [] if alone else group

    def _is_finite(self, keys: list[Key]) -> bool:
        try:
            read = self._read(keys)
            finite = read.is_empty or self._outcome(read.batch).is_finite
        except (_OutOfTimeError, _CommunicatesError):
            raise
        except Exception:
            if len(keys) > 1:
                raise
            # BatchNorm wants two values: the sample with itself says the same
            finite = self._outcome(self._read(keys * 2).batch).is_finite
        self._some_are_finite |= finite
        return finite

    def _read(self, keys: list[Key]) -> MicroBatch:
        task = self.engine.task
        return make(task, read(task, task.train_data, keys, self.seed), keys, self.seed)

    def _outcome(self, batch: Batch, fp32: bool = False, whole: bool = False) -> Rehearsal:
        if time.monotonic() > self._until:
            raise _OutOfTimeError
        scale = {name: 1 / total if total else 0.0 for name, total in self.totals.items()}
        return rehearse(self.engine.step, batch, scale, partial(self._seed, whole), fp32=fp32)

    def _seed(self, whole: bool) -> None:
        """The random numbers of this micro-step; other samples than all of it are looked at with any keys."""
        step, seed = self.engine.step, self.window.seed_of(self._index)
        if whole:
            step.seed(self.window, self._index)
        elif seed is not None:
            step.random.start(seed, None)


class _OutOfTimeError(Exception):
    pass


class _CommunicatesError(Exception):
    pass


class _NoCollectives(TorchDispatchMode):
    """Ranks search different batches: a collective in a forward would wait for ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise _CommunicatesError
        return func(*args, **(kwargs or {}))


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    if engine.ranks.world_size == 1:
        yield
        return
    with _NoCollectives():  # type: ignore[no-untyped-call]
        yield


def _not_finite_in(batch: Batch) -> str:
    """Say where a host batch holds a number that is not finite; empty where it holds none."""
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            what = "NaN" if bool(torch.isnan(leaf).any()) else "infinity"
            return f"its data holds {what} (at {pytree.keystr(path) or 'its only tensor'} of the batch)"
    for tensor in tensors_of(batch):  # in objects, whose places pytree does not know
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"its data holds {'NaN' if bool(torch.isnan(tensor).any()) else 'infinity'}"
    return ""


def _is_all_ignored(batch: Batch) -> bool:
    leaves = [leaf for leaf in tensors_of(batch) if leaf.numel()]
    return any(
        not leaf.is_floating_point() and leaf.dtype != torch.bool and bool((leaf == IGNORED).all())
        for leaf in leaves
    )


def story(findings: Findings, data: Samples, loss: float, norm: float, updates: int) -> str:
    """What is not finite and where, in sentences.

    Args:
        data: the training data, for the names of samples.
        loss: of the window.
        norm: of its gradient.
        updates: made before it.
    """
    if findings.parameter is not None:
        since = "the update before made it so" if updates else "the model begins so"
        return f"The parameter {findings.parameter} is not finite itself: {since}."
    most = MOST_NAMED if findings.some_are_finite else 1
    sentences = [_sentence(each, data) for each in findings.bad[:most]]
    if findings.bad and not findings.some_are_finite:
        sentences.append("So is every other micro-batch and sample that was computed again.")
    elif len(findings.bad) > most:
        sentences.append(f"So are {len(findings.bad) - most} more micro-batches.")
    if not findings.bad and not findings.problem:
        sentences.append(
            "Computed again, each micro-batch alone is finite: only their sum is not, or the data or the model "
            "draws numbers that gatrain does not seed."
            if math.isfinite(loss) or not math.isfinite(norm)
            else "Computed again, each micro-batch is finite."
        )
    if findings.problem:
        sentences.append(f"{findings.problem[0].upper()}{findings.problem[1:]}.")
    return " ".join(sentences)


def _sentence(bad: BadMicroBatch, data: Samples) -> str:
    place = f"rank {bad.rank}, micro-step {bad.micro_step + 1} of {bad.micro_steps}"
    if bad.alone:
        names = ", ".join(sample_name(data, sample) for sample in bad.alone)
        what = f"sample {names} alone is" if len(bad.alone) == 1 else f"each of the samples {names} alone is"
    else:
        named = bad.group or bad.samples
        names = names_of(data, named)
        what = f"no single sample, but the samples {names} together are"
    if bad.has_no_label and not bad.loss_is_finite:
        why = ", and none of its labels counts: a mean over nothing is 0 / 0"
    elif bad.holds:
        why = f": {bad.holds}"
    elif bad.loss_is_finite:
        why = ", in the gradient only: the loss is finite" + (", at any loss scale" if bad.is_fp16 else "")
    else:
        why = f" (micro-batch of the samples {', '.join(map(str, bad.samples[:8]))})"
    return f"In {place}, {what} not finite{why}."


@dataclass(frozen=True)
class Remedies:
    """What a person can do, by what was found. Commands work as they are typed."""

    run_dir: RunDir
    lr: float
    may_clip: bool
    """Whether ``optimizer.clip_norm`` can be added."""
    may_skip: bool
    """Whether ``train.nonfinite=skip`` can be."""
    skips: bool
    """``train.nonfinite=skip`` already."""
    limit: int
    precision: str
    updates: int
    can_resume: bool

    def lines(self, findings: Findings) -> list[str]:
        """One line for each thing that may help, the likeliest first."""
        bad = findings.bad
        lines = []
        if any(each.has_no_label and not each.loss_is_finite for each in bad):
            lines.append(
                "let the loss return a sum, or 0 where no label counts (torch's own losses do; for another one, "
                "task.weight counts the labels)"
            )
        elif any(each.holds for each in bad):
            lines.append("mend that data or leave it out of the dataset")
        elif bad and all(each.loss_is_finite for each in bad):
            lines.append(
                "look for sqrt, norm, log or a division at 0 in the model or loss: the gradient there is infinite; "
                "add a small number first"
            )
        if any(each.finite_in_fp32 for each in bad):
            other = "bf16" if self.precision == "fp16" else "fp32"
            lines.append(
                f"in fp32 it is finite. A new run in its place, with {other}: "
                f"{commands.start_over(self.run_dir, {'precision': other})}"
            )
        may_skip = self.may_skip and self.can_resume and findings.parameter is None
        if may_skip and (findings.some_are_finite or not bad):
            lines.append(
                f"to allow more of them in a row: {self._command({'train.nonfinite_limit': f'{10 * self.limit}'})}"
                if self.skips
                else f"to leave such windows out: {self._command({'train.nonfinite': 'skip'})}"
            )
        if self.updates and not any(each.holds or each.has_no_label for each in bad):
            lines.append(f"if the training diverged, a lower rate: {self.lower_rate()}")
        return lines

    def lower_rate(self) -> str:
        """What to type for a lower rate."""
        clip = {"optimizer.clip_norm": "1.0"} if self.may_clip else {}
        return self._command({"optimizer.lr": f"{self.lr / 10:g}"} | clip)

    def _command(self, changes: Mapping[str, str]) -> str:
        if not self.can_resume:
            return commands.start_over(self.run_dir, changes)
        return commands.resume(self.run_dir, *(f"{key}={value}" for key, value in changes.items()))
