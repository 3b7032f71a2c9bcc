"""What parent and trial processes say to each other: one spec file in, JSON lines out. No torch.

Lines of ``trials.jsonl``, each flushed, so that a crash or Ctrl-C keeps what was measured:

    {"event": "checking"}                                    the loss is being checked
    {"event": "notice", "text": "..."}                       what the data or the check of the loss made known
    {"event": "ready", "modes": [...], "budget_bytes": n, "at": t}   model built; what it offers and may use; when
    {"event": "start", "micro_batch": b}                     about to try b; without an answer: a crash
    {"event": "trial", "measurement": {...}}                 the answer
    {"event": "end", "stopped": "memory"}                    why no larger size was tried
    {"event": "full_steps", "confirmation": {...}}           of the finalists, if there was a close call
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain import codec, units
from gatrain.plan import Measurement, StepSettings
from gatrain.rundir import read_json, write_json
from gatrain.tune.curve import KnobOffer
from gatrain.tune.finalists import Confirmation, Finalist

SPEC, LINES, CONFIG = "trial_spec.json", "trials.jsonl", "config.yaml"
"""In the folder of a request: what is asked, what was found, the configuration."""
ANSWERED = "answered"
"""Made there when the request is answered."""
WORLD, REQUESTS, FAILED = "world.json", "requests", "failed.json"
"""In the folder of the host process: the ranks to fork, the folders of requests, why it failed."""
POLL_S = 0.01


@dataclass(frozen=True)
class FullStepSpec:
    """Full optimizer steps to time after the sizes; see `gatrain.tune.finalists`."""

    max_seconds: float
    finalists: tuple[Finalist, ...]


@dataclass(frozen=True)
class TrialSpec:
    """What one set of trial processes shall measure: one way of computing, several sizes in this order."""

    settings: StepSettings
    sizes: tuple[int, ...]
    seconds: float
    """From the moment at which model and data are built, after which no further size may be started; the first size
    is always tried."""
    memory_fraction: float
    patience_s: float = 0.0
    """Seconds beyond these that may be spent while larger sizes still gain a lot: on a busy machine a
    choice made too early would cost more in training."""
    stop_early: bool = True
    """Sizes rise, and larger ones that bring nothing end it; False measures every size in the order given."""
    full_steps: FullStepSpec | None = None
    check: bool = True
    """Check the loss before the first size, if these processes have not done so."""

    def write(self, folder: Path) -> None:
        write_json(folder / SPEC, codec.encode(self))

    @classmethod
    def read(cls, folder: Path) -> TrialSpec:
        return codec.decode(cls, read_json(folder / SPEC))


@dataclass
class TrialOutput:
    """What trial processes have said so far."""

    modes: tuple[str, ...] | None = None
    """None while the model is not built."""
    knobs: tuple[KnobOffer, ...] = ()
    budget_bytes: int | None = None
    ready_at: float | None = None
    """``time.time()`` at which model and data were built: what came before is the user's own time."""
    measurements: list[Measurement] = field(default_factory=list)
    started: int | None = None
    """The size under way, or the one that took the processes down."""
    stopped: str | None = None
    is_checking: bool = False
    """The check of the loss had begun, and nothing came after it."""
    notices: list[str] = field(default_factory=list)
    """What the check of the loss had to say."""
    confirmation: Confirmation | None = None

    def take(self, line: str) -> Measurement | None:
        """Read one line; return the measurement if it holds one. A torn or foreign line is ignored."""
        try:
            said: dict[str, Any] = json.loads(line)
            match said["event"]:
                case "ready":
                    self.is_checking = False
                    self.modes = tuple(said["modes"])
                    self.knobs = tuple(codec.decode(list[KnobOffer], said.get("knobs", [])))
                    self.budget_bytes = int(said["budget_bytes"])
                    self.ready_at = float(said["at"]) if "at" in said else None
                case "checking":
                    self.is_checking = True
                case "notice":
                    self.notices.append(str(said["text"]))
                case "start":
                    self.started = int(said["micro_batch"])
                case "trial":
                    found = codec.decode(Measurement, said["measurement"], finite=False)
                    # a size that was measured again
                    self.measurements = [m for m in self.measurements if m.micro_batch != found.micro_batch]
                    self.measurements.append(found)
                    self.started = None
                    return found
                case "end":
                    self.stopped = str(said["stopped"])
                case "full_steps":
                    self.confirmation = codec.decode(Confirmation, said["confirmation"])
        except (ValueError, KeyError, TypeError):
            pass
        return None


def no_time(needed_s: float, left_s: float) -> str:
    """Why a size was not tried."""
    if left_s <= 0:
        return f"no time is left, and it would take about {units.seconds(needed_s)}"
    return f"no time: it would take about {units.seconds(needed_s)}, and {units.seconds(left_s)} are left"


def read_output(lines: Iterable[str]) -> TrialOutput:
    """All lines of one ``trials.jsonl``."""
    answers = TrialOutput()
    for line in lines:
        answers.take(line)
    return answers


def requests(folder: Path, seen: int = 0) -> Iterator[str | None]:
    """Requests in their order, each once; None about once a second while there is none."""
    while True:
        until = time.monotonic() + 1.0
        found = None
        while found is None and time.monotonic() < until:
            lines = (folder / REQUESTS).read_text(encoding="utf-8").split("\n")[:-1]  # a torn line has no end
            if len(lines) > seen:
                found, seen = lines[seen], seen + 1
            else:
                time.sleep(POLL_S)
        yield found
