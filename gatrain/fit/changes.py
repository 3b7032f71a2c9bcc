"""Going on with a run whose data, code, settings or plan are not what they were: refused, or accepted by name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatrain import recorded as records
from gatrain.compose import Composed, reload, resolve_again
from gatrain.errors import ConfigError, GatrainError
from gatrain.inspected import Inspected
from gatrain.inspection import inspect_run
from gatrain.plan import Plan
from gatrain.recorded import Difference, Recorded
from gatrain.rundir import RunDir, write_json, write_text


def check_names(accepted: Sequence[str]) -> None:
    """Refuse what is no name of a change.

    Raises:
        ConfigError: an empty name, a value, or ``all``.
    """
    for name in accepted:
        if name.strip() in ("", "all", "*") or "=" in name:
            raise ConfigError(
                f"--accept-changes {name!r} names no change. Changes are accepted one by one, as the refusal lists "
                "them: --accept-changes data.contents --accept-changes code."
            )


def write_record(run_dir: RunDir, composed: Composed, plan: Plan, found: Inspected, cwd: Path) -> None:
    """Keep what a new run trains with: its config.yaml, the record beside it, and what was read."""
    write_text(run_dir.config, composed.yaml, mode=0o600)  # a value given literally may be a secret
    stored = reload(run_dir.config, ())
    new = Recorded(
        settings=records.public(stored.leaves),
        references={**composed.references, **stored.references},
        precision=plan.settings.precision,
        code=records.code_of(found.code, cwd),
        versions=records.versions(),
    )
    new.write(run_dir)
    if found.data is not None:
        write_json(run_dir.data, found.data.to_dict())


@dataclass
class Changes:
    """What a run goes on with, beside what it was started with."""

    run_dir: RunDir
    typed: Sequence[str]
    """Override words of the command line."""
    accepted: Sequence[str]
    free_when_typed: Sequence[str]
    """Keys that need no more than being typed."""
    options: Sequence[str] = ()
    """Options of the command line, for the command that is printed."""

    def __post_init__(self) -> None:
        check_names(self.accepted)
        self.recorded = records.read_recorded(self.run_dir)
        self.reloaded = reload(self.run_dir.config, self.typed)
        self.differences: list[Difference] = []
        self.references: dict[str, str] = {}
        if self.recorded is not None:
            self._compare_settings(self.recorded)
        if not all(each.may_be_accepted for each in self.differences):
            self.refuse()

    @property
    def replans(self) -> bool:
        """Whether config.yaml asks for another plan than the run was started with."""
        if self.recorded is None:
            return False
        old, new = self.recorded.settings, records.public(self.reloaded.leaves)
        keys = ("batch.micro", "checkpointing", "compile", "sync", "precision")
        return any(old.get(key) != new.get(key) for key in keys)

    def _typed_keys(self) -> list[str]:
        return [word.partition("=")[0].strip().lstrip("+~") for word in self.typed]

    def _compare_settings(self, recorded: Recorded) -> None:
        typed = self._typed_keys()
        now = records.public(self.reloaded.leaves)
        # a value that was typed, or written into config.yaml, takes the place of a reference
        self.references = {
            key: text
            for key, text in recorded.references.items()
            if not records.covers_any(typed, key) and now.get(key) == recorded.settings.get(key)
        }
        found = records.reference_differences(recorded, resolve_again(self.reloaded.yaml, self.references))
        if found:  # what is looked at, and refused or trained with, is what there is now
            values = {each.key: value for each, value in found}
            self.reloaded = reload(self.run_dir.config, self.typed, values)
        self.differences += [each for each, _ in found]
        known = {each.key for each, _ in found}
        for each in records.setting_differences(recorded, self.reloaded.leaves):
            if records.covers_any(typed, each.key):
                if not records.covers_any(self.free_when_typed, each.key):
                    self.differences.append(dataclasses.replace(each, where="typed"))
            elif each.key not in known:
                self.differences.append(each)

    def inspect(self, cwd: Path, plan: Plan | None, progress: Callable[[str], None]) -> Inspected:
        """Inspect code, model and data, and refuse what differs and was not accepted.

        Raises:
            SavedStateError: lists the differences and says how to go on.
            GatrainError: the inspection of model and data failed.
        """
        if self.recorded is None:
            progress(f"note: {self.run_dir.recorded.name} is missing: settings and code are not compared")
        else:
            self.differences += records.code_differences(self.recorded, cwd)
            if plan is not None and plan.settings.precision != self.recorded.precision and not self.replans:
                was, now = self.recorded.precision, plan.settings.precision
                self.differences.append(Difference("precision", was, now, self.run_dir.plan.name))
        try:
            progress("Inspecting the model and the data")
            found = inspect_run(self.reloaded.yaml, cwd)
        except GatrainError:
            self.refuse()  # the change is what explains the error
            raise
        before = records.read_data(self.run_dir)
        if before is None and found.data is not None:
            progress(f"note: {self.run_dir.data.name} is missing: the data is not compared")
        self.differences += records.differences_of_data(before, found.data)
        self.refuse()
        known = [each.key for each in self.differences]
        for name in self.accepted:
            if not any(records.covers(name, key) for key in known):
                progress(f"--accept-changes {name}: nothing of that name has changed")
        return found

    def refuse(self) -> None:
        """Raise unless everything that was found is accepted."""
        words = [*self.typed, *self.options]
        records.refuse(self.run_dir, self.differences, self.accepted, words)

    def write(self, plan: Plan, found: Inspected, cwd: Path) -> None:
        """Record what the run goes on with. Killed anywhere in between, the next attempt finds no difference."""
        old = self.recorded
        settings = records.public(self.reloaded.leaves)
        new = Recorded(
            settings=settings,
            references=self.references | self.reloaded.references,
            precision=plan.settings.precision,
            code=records.code_of(found.code, cwd),
            versions=records.versions(),
        )
        if new == old and self.reloaded.yaml == self._stored_yaml():
            return
        changed = {
            key: value
            for key, value in (old.settings if old is not None else {}).items()
            if settings.get(key) != value
        }
        dataclasses.replace(new, before=changed).write(self.run_dir)
        if found.data is not None and self._is_new_data():
            write_json(self.run_dir.data, found.data.to_dict())
        write_text(self.run_dir.config, self.reloaded.yaml, mode=0o600)
        new.write(self.run_dir)

    def _is_new_data(self) -> bool:
        return not self.run_dir.data.exists() or any(
            each.key.startswith("data.") for each in self.differences
        )

    def _stored_yaml(self) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self.run_dir.config.read_text(encoding="utf-8")
        return ""
