"""The parent's side of trials: asks rank processes and keeps what they measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gatrain import scratch, units
from gatrain.config import RunConfig
from gatrain.errors import DoesNotFitError, GatrainError, Interrupted, WorkerError
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, Measurement, StepSettings
from gatrain.rundir import write_text
from gatrain.tune import curve, knobs, protocol
from gatrain.tune.curve import Curve
from gatrain.tune.finalists import Confirmation
from gatrain.tune.protocol import FullStepSpec, TrialOutput, TrialSpec

Progress = Callable[[str], None]
Run = Callable[[Path], None]
"""Lets trial processes answer the spec in a folder; raises the error of the rank that failed."""


class TrialRunner:
    """Measures curves within one time limit.

    Args:
        config: of the run; it reaches the processes as a file.
        run: lets the processes answer, such as a `gatrain.tune.processes.TrialHost`.
        max_seconds: time for all curves together. It runs while sizes are measured: what the start of the
            processes, the user's imports, the data and the model take is not counted.
        keep: called with every curve, complete or not, also when a person interrupts.
        progress: told one sentence per trial.
        shared: a folder that the ranks of all nodes can read, where there are several.
        config_yaml: the file, with references to secrets unresolved; None writes ``config`` as it is.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        max_seconds: float,
        keep: Callable[[Curve], None],
        progress: Progress,
        shared: Path | None = None,
        config_yaml: str | None = None,
    ) -> None:
        self._config = config
        # JSON is YAML as well
        self._written = config_yaml or json.dumps(dataclasses.asdict(config))
        self._shared = shared
        self._run = run
        self._spent_s = 0.0
        self._max_seconds = max_seconds
        self._keep = keep
        self._progress = progress
        self._checks = True
        self.notices: list[str] = []
        """What the data or the check of the loss made known, each once."""

    @property
    def seconds_left(self) -> float:
        """Until no further size may be started."""
        return self._max_seconds - self._spent_s

    def measure(
        self,
        settings: StepSettings,
        sizes: Sequence[int],
        *,
        stop_early: bool = True,
        full_steps: FullStepSpec | None = None,
    ) -> tuple[Curve, Confirmation | None]:
        """Measure ``sizes``, in that order, computed in one ``way``, in processes of their own.

        A rank that dies leaves its size as a failure, and what was measured before it counts.

        Args:
            full_steps: to time in the same warm processes afterwards.

        Raises:
            GatrainError: the processes failed before the model was built: the user's own error.
            Interrupted, KeyboardInterrupt: a person stopped it; what was measured has been kept.
        """
        asked = TrialSpec(
            settings=settings,
            sizes=tuple(sizes),
            seconds=self.seconds_left,
            memory_fraction=self._config.tune.memory_fraction,
            # a limit that a person has set is kept
            patience_s=self._max_seconds if self._config.tune.max_seconds is None else 0.0,
            stop_early=stop_early,
            full_steps=full_steps,
            check=self._checks,
        )
        answers, error = TrialOutput(), None
        # private to this user: the config in it may hold secrets that were given literally
        with scratch.folder("gatrain_tune_", self._shared) as folder:
            asked.write(folder)
            write_text(folder / protocol.CONFIG, self._written, mode=0o600)
            self._progress(_announcement(settings, sizes, stop_early))
            began = time.time()
            try:
                with listening(folder / protocol.LINES, self._tell):
                    self._run(folder)
            except (Interrupted, KeyboardInterrupt):
                answers = _read(folder)  # what ended before the interruption is complete
                self._keep(self._curve(settings, answers, answers.stopped or curve.INTERRUPTED))
                raise
            except GatrainError as caught:
                error = caught
            answers = _read(folder)
            self._take_notices(answers)
            self._spent_s += max(0.0, time.time() - (answers.ready_at or began))
        if answers.is_checking and isinstance(error, WorkerError | DoesNotFitError) and self._checks:
            self._checks = False  # a process died in it: let the sizes tell which
            return self.measure(settings, sizes, stop_early=stop_early, full_steps=full_steps)
        if error is not None:
            if full_steps is not None and answers.stopped is not None:
                self._progress(f"the finalists could not be timed as full steps: {error}")
            answers = _after_crash(answers, error)
        measured = self._curve(settings, answers, answers.stopped or curve.BROKEN)
        if sizes:
            self._keep(measured)
        return measured, answers.confirmation

    def _curve(self, settings: StepSettings, answers: TrialOutput, stopped: str) -> Curve:
        measurements = sorted(answers.measurements, key=lambda m: m.micro_batch)
        modes = answers.modes or ("none",)
        return Curve(
            settings,
            tuple(measurements),
            stopped,
            self._max_seconds,
            modes,
            answers.knobs,
            answers.budget_bytes,
        )

    def _take_notices(self, answers: TrialOutput) -> None:
        for text in answers.notices:
            if text not in self.notices:
                self.notices.append(text)
                self._progress(text)

    def _tell(self, measurement: Measurement) -> None:
        self._progress(sentence(measurement))


def _announcement(settings: StepSettings, sizes: Sequence[int], stop_early: bool) -> str:
    if not sizes:
        return "timing full optimizer steps of the finalists, in turn"
    what = f"measuring {knobs.describe(settings)}"
    if stop_early:
        return f"{what}: increasing micro-batches"
    return f"{what}: micro-batch {', '.join(map(str, sizes))}"


def sentence(m: Measurement) -> str:
    """One trial for people."""
    text = f"micro-batch {m.micro_batch}: {m.outcome.replace('_', ' ')}"
    if m.outcome == FITS and m.micro_step_s:
        peak = f", peak {units.size(m.peak_memory_bytes)}" if m.peak_memory_bytes else ""
        return f"{text}, {units.seconds(m.micro_step_s)} per micro-step{peak}"
    return f"{text} ({m.error})" if m.error else text


def _read(folder: Path) -> TrialOutput:
    with contextlib.suppress(OSError):
        return protocol.read_output((folder / protocol.LINES).read_text(encoding="utf-8").splitlines())
    return TrialOutput()


def _after_crash(answers: TrialOutput, error: GatrainError) -> TrialOutput:
    """Make the death of a rank the outcome of the size under way.

    Raises:
        GatrainError: ``error`` itself, where no size was under way: it is about the model or the data.
    """
    if answers.stopped is not None:
        return answers  # all was said; a process that fails while it ends changes nothing
    if answers.started is None or not isinstance(error, WorkerError | DoesNotFitError):
        raise error
    outcome = DOES_NOT_FIT if isinstance(error, DoesNotFitError) else FAILED
    text = str(error).split("\n")[0]
    answers.measurements.append(Measurement(answers.started, outcome, error=text))
    answers.stopped = curve.MEMORY if outcome == DOES_NOT_FIT else curve.BROKEN
    return answers


@contextlib.contextmanager
def listening(path: Path, tell: Callable[[Measurement], None]) -> Iterator[None]:
    """Follow a growing file of lines in a thread and tell each measurement as it comes."""
    ended = threading.Event()

    def follow() -> None:
        answers, rest, position = TrialOutput(), "", 0
        while True:
            last = ended.wait(0.2)
            with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
                file.seek(position)
                *full_steps, rest = (rest + file.read()).split("\n")
                position = file.tell()
                for line in full_steps:
                    if (measurement := answers.take(line)) is not None:
                        tell(measurement)
            if last:
                return

    thread = threading.Thread(target=follow, name="gatrain-trials", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
