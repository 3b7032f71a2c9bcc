"""Callbacks for the progress of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatrain.data.report import DataRecord
from gatrain.plan import Plan


@dataclass(frozen=True)
class Listener:
    """Callbacks; ``planned`` gets the plan, and the run folder if there is one."""

    progress: Callable[[str], None] = lambda text: None
    read: Callable[[DataRecord], None] = lambda data: None
    """Gets what was read, before anything is measured."""
    planned: Callable[[Plan, Path | None], None] = lambda plan, run_dir: None
    notice: Callable[[str], None] = lambda text: None
    """Gets what a person must be able to read again later."""
