"""The hooks of one run on this rank: called in their order, their failures and wishes agreed on between ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gatrain.errors import ConfigError, PeerFailed, SavedStateError
from gatrain.states import FURTHER_NAME, RESERVED
from gatrain.train.hook import Hook, HookRun, TrainedStep
from gatrain.train.modes import Modes
from gatrain.train.parts import check, digest
from gatrain.train.ranks import Ranks
from gatrain.train.records import StepRecord
from gatrain.train.seeding import EVALUATION, HOOK, MEASURED, seed_everything

PART = "hooks"
"""Of a saved state."""


class _Run(Protocol):
    def __call__(self, **asks: Any) -> HookRun: ...


@dataclass
class Hooks:
    """All hooks by name. Where there are none, no method does anything or communicates.

    A hook's error in the middle of training is kept until all ranks can leave together: `failure` goes with the
    next window, or is raised by `settle`.
    """

    hooks: Mapping[str, Hook]
    ranks: Ranks
    fingerprint: str = ""
    """Of the configuration: a saved wish to end holds only for the same hooks."""
    seed: int = 0
    """Of the run: what a hook draws at random is the same on every rank, and after a resume."""
    failure: Exception | None = None
    raised: list[Exception] = field(default_factory=list)
    """Errors that `settle` has raised: the weights are those of the last step."""
    stop_reason: str = ""
    """Why this rank wants the run to end."""
    ended: bool = False
    """The ranks have agreed to end."""
    evaluated_step: int = -1
    """The step of the last evaluation that the hooks have seen."""
    _keep: list[str] = field(default_factory=list)
    _unfinished: str = ""
    """The hook that failed."""
    _modes: Modes | None = None

    def __bool__(self) -> bool:
        return bool(self.hooks)

    @property
    def needs_verdict(self) -> bool:
        return any(hook.needs_verdict for hook in self.hooks.values())

    @property
    def need_part_norms(self) -> bool:
        return any(hook.needs_part_norms for hook in self.hooks.values())

    def start(self, make_run: _Run, part: Any) -> list[str]:
        """Start all, with their part of a saved state where there is one; returns what a person should know.

        Raises:
            SavedStateError: the part is odd, or a hook does not take its state.
            ConfigError: two hooks want the same name for what they evaluate or export.
        """
        if not self and part is None:
            return []
        before = _Part.of(part)
        self.evaluated_step = before.evaluated
        if before.fingerprint == self.fingerprint:
            self.stop_reason, self.ended = before.stop, before.ended
        run = make_run(stop=self._stop, keep=self._asked_to_keep)
        self._modes = Modes(run.model)
        notices = [
            f"the saved state holds the hook {name}, which the run no longer has: its state is dropped"
            for name in before.hooks
            if name not in self.hooks
        ]
        for nth, (name, hook) in enumerate(self.hooks.items()):
            with torch.no_grad():
                seed_everything(self.seed, HOOK, nth)
                hook.start(run)
                self._modes.check(name)
                if name in before.hooks:
                    self._load(name, hook, before.hooks[name])
            if name not in before.hooks and run.step:
                failed = name == before.unfinished
                why = (
                    " could not give its state when this was saved, and" if failed else " has no saved state:"
                )
                notices.append(f"the hook {name}{why} it begins at step {run.step}")
            elif name == before.unfinished:
                notices.append(
                    f"the hook {name} failed in step {run.step} before this state was saved: what it would have "
                    "done in that step is missing from its state"
                )
            self._check_state(name, hook)
        if before.modes is not None:
            self._modes.restore(before.modes)
        self._check_names()
        return notices

    def update(self, step: TrainedStep) -> dict[str, Tensor | float]:
        """Call `Hook.update` of all. Raises nothing: an error waits in `failure`, and no later hook is called."""
        found: dict[str, Tensor | float] = {}
        for name, hook in self._running(step.step):
            try:
                with torch.no_grad():
                    measured = hook.update(step) or {}
                for metric, value in measured.items():
                    if metric in found:
                        raise ValueError(
                            f"two hooks measure {metric!r}: give one of the metrics another name"
                        )
                    found[metric] = _scalar(metric, value)
            except Exception as error:
                self._failed(name, error)
        return found

    def measured(self, record: StepRecord) -> StepRecord:
        """The record with what `Hook.measured` of all adds to its metrics. Raises nothing, as `update`."""
        found = dict(record.metrics)
        for name, hook in self._running(record.step, MEASURED):
            try:
                for metric, value in (hook.measured(record) or {}).items():
                    if metric in found:
                        raise ValueError(
                            f"two hooks measure {metric!r}: give one of the metrics another name"
                        )
                    found[metric] = float(value)
            except Exception as error:
                self._failed(name, error)
        return dataclasses.replace(record, metrics=found) if found else record

    def findings(self) -> dict[str, str]:
        """What hooks found out, in words. On rank 0."""
        found: dict[str, str] = {}
        for name, hook in self._running():
            try:
                found |= hook.findings()
            except Exception as error:
                self._failed(name, error)
        return found

    def other_weights(self) -> list[tuple[str, AbstractContextManager[Any]]]:
        """Name and context of each set of other weights to evaluate with. Collective, where there are hooks.

        Raises:
            As `settle`.
        """
        found: dict[str, AbstractContextManager[Any]] = {}
        for name, hook in self._running():
            try:
                found |= hook.weights()
            except Exception as error:
                self._failed(name, error)
        self.settle()
        return list(found.items())

    @contextlib.contextmanager
    def in_place(self, name: str, weights: AbstractContextManager[Any]) -> Iterator[None]:
        """The model has these weights in here. Collective.

        Raises:
            As `settle`.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(weights)
            except Exception as error:
                self._failed(name, error)
            self.settle()
            yield

    def evaluated(self, step: int, numbers: Mapping[str, Any]) -> None:
        """As `update`, after an evaluation."""
        self.evaluated_step = step
        for name, hook in self._running(step, EVALUATION):
            try:
                with torch.no_grad():
                    hook.evaluated(step, numbers)
            except Exception as error:
                self._failed(name, error)

    def saved(self, step: int, path: Path) -> None:
        """As `update`, on rank 0."""
        for name, hook in self._running():
            try:
                hook.saved(step, path)
            except Exception as error:
                self._failed(name, error)

    def settle(self) -> list[str]:
        """Let the ranks agree on what hooks asked for; returns the folders that the state is to be kept in.

        Collective, where there are hooks.

        Raises:
            The error of this rank's hook, or PeerFailed where that of another rank failed.
        """
        if not self:
            return []
        asks = [self.failure is not None, bool(self.stop_reason), self.ranks.rank == 0 and len(self._keep)]
        failed, stop, keep = self.ranks.sum([float(each) for each in asks])
        if failed:
            error = self.failure or PeerFailed("a hook failed on another rank; its own error says why.")
            self.raised.append(error)
            raise error
        self.ended = self.ended or stop > 0
        folders, self._keep[:] = list(dict.fromkeys(self._keep)), []
        return self.ranks.share_object(folders) if keep else []

    def end(self, step: int, completed: bool) -> None:
        """Tell all. Collective, where there are hooks.

        Raises:
            As `settle`.
        """
        for name, hook in self._running():
            try:
                hook.end(step, completed)
            except Exception as error:
                self._failed(name, error)
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        """The part of a saved state. On rank 0."""
        states: dict[str, Any] = {}
        for name, hook in self.hooks.items():
            try:
                state = dict(hook.state_dict())
                check(state, f"hooks at states/{name}")
                states[name] = state
            except Exception as error:  # everything else is saved, and the run ends with this error
                self._failed(name, error)
        return {
            "states": states,
            "stop": self.stop_reason,
            "ended": self.ended,
            "evaluated": self.evaluated_step,
            "fingerprint": self.fingerprint,
            "unfinished": self._unfinished,
            "modes": None if self._modes is None else self._modes.changed(),
        }

    def digests(self) -> dict[str, int]:
        """Of each hook's state, by which ranks see whether it is the same on all of them."""
        found = {}
        for name, hook in self.hooks.items():
            with contextlib.suppress(Exception):  # a save tells of it
                found[name] = digest(dict(hook.state_dict()), f"hooks at states/{name}")
        return found

    def parts(self) -> dict[str, Any]:
        """The parts of a saved state that are the hooks': none where there are no hooks."""
        return {PART: self.state_dict()} if self else {}

    def reason(self) -> str:
        """Why the run ends early. Collective."""
        return next((reason for reason in self.ranks.gather(self.stop_reason) if reason), "")

    def have_missed_evaluation(self, step: int) -> bool:
        """Whether an evaluation after this step, from which the run goes on, is not in the hooks' state."""
        return bool(self) and step > 0 and self.evaluated_step != step

    def exports(self) -> dict[str, Mapping[str, Tensor]]:
        """The weights to write beside the model's. On rank 0."""
        found: dict[str, Mapping[str, Tensor]] = {}
        for name, hook in self._running():
            try:
                found |= hook.exports()
            except Exception as error:
                self._failed(name, error)
        return found

    def _running(self, *draws: int) -> Iterator[tuple[str, Hook]]:
        """Each hook in turn, as long as none has failed.

        Args:
            draws: what the hooks' random numbers follow from; none where they are called on one rank alone.
        """
        for nth, (name, hook) in enumerate(self.hooks.items()):
            if self.failure is not None:
                return
            if draws:
                seed_everything(self.seed, HOOK, nth, *draws)
            yield name, hook
            try:
                if self._modes is not None:
                    self._modes.check(name)
            except Exception as error:
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self.failure = self.failure or error
        self._unfinished = self._unfinished or name

    def _asked_to_keep(self, name: str) -> None:
        if not FURTHER_NAME.fullmatch(name):
            raise ValueError(f"keep({name!r}): a folder's name is of small letters, digits and underscores")
        self._keep.append(name)

    def _stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or str(reason) or "a hook ended the run"

    def _check_state(self, name: str, hook: Hook) -> None:
        """What no file can hold is told before the first step, not when work is to be saved. On rank 0.

        Raises:
            SavedStateError: it holds such a thing already.
        """
        if self.ranks.rank:
            return
        try:
            state = hook.state_dict()
        except Exception:  # it may want an update first: a save tells
            return
        check(state, f"hooks at states/{name}")

    def _load(self, name: str, hook: Hook, state: Mapping[str, Any]) -> None:
        try:
            hook.load_state_dict(state)
        except SavedStateError:
            raise
        except Exception as error:
            error.add_note(f"while the hook {name} was given the state that it had saved")
            raise

    def _check_names(self) -> None:
        names = [name for hook in self.hooks.values() for name in {**hook.weights(), **hook.exports()}]
        for name in names:
            if names.count(name) > 1 or name in RESERVED or not FURTHER_NAME.fullmatch(name):
                raise ConfigError(
                    f"hooks: the name {name!r} of further weights is taken or cannot be a file's. Give each hook's "
                    "weights another name of small letters, digits and underscores."
                )


@dataclass(frozen=True)
class _Part:
    """What the part of a saved state holds."""

    hooks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stop: str = ""
    ended: bool = False
    evaluated: int = -1
    fingerprint: str = ""
    unfinished: str = ""
    modes: Mapping[str, Any] | None = None
    """None: of a state that was saved without."""

    @staticmethod
    def of(part: Any) -> _Part:
        """
        Raises:
            SavedStateError: it is something else.
        """
        if part is None:
            return _Part()
        kinds = {"states": dict, "stop": str, "ended": bool, "evaluated": int}
        kinds |= {"fingerprint": str, "unfinished": str}
        if (
            not isinstance(part, dict)
            or part.keys() - {"modes"} != kinds.keys()  # without: none was changed
            or not all(type(part[key]) is kind for key, kind in kinds.items())
            or not all(isinstance(state, dict) for state in part["states"].values())
        ):
            raise SavedStateError("the saved state has a part 'hooks' that gatrain did not write.")
        texts = (part[key] for key in kinds if key != "states")
        return dataclasses.replace(_Part(part["states"], *texts), modes=part.get("modes"))


def _scalar(name: str, value: Any) -> Tensor | float:
    """
    Raises:
        ValueError: it is no number.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, bool | int | float):
        return float(value)
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    raise ValueError(f"the metric {name!r} is a {type(value).__name__}{shape}, not one number")


def fingerprint_of(nodes: Any) -> str:
    """Of what a configuration has under ``hooks``."""
    return hashlib.sha256(json.dumps(nodes, sort_keys=True, default=str).encode()).hexdigest()[:16]


def named(hooks: Sequence[tuple[str, Hook]]) -> dict[str, Hook]:
    """Hooks by name; the second of a name is ``name_2``."""
    found: dict[str, Hook] = {}
    for name, hook in hooks:
        number, unique = 1, name
        while unique in found:
            number += 1
            unique = f"{name}_{number}"
        found[unique] = hook
    return found
