"""Every error that gatrain raises on purpose, and the exit code that each one gives.

    GatrainError              1   anything below, unnamed
    ├── ConfigError           2   a key, value, recipe, option or `_target_` that is not right
    ├── PlanError             3   batch numbers that cannot multiply out to the effective batch
    ├── DataError             4   data that is missing, unreadable, empty or too small
    ├── DoesNotFitError       5   the model does not fit in memory even at one sample
    ├── LaunchError           6   processes that cannot start: port, GPU count, scheduler
    ├── RunFolderError        7   a run folder in use, not a run folder, or not writable
    ├── SavedStateError       8   no valid saved state, or one that belongs to another run
    ├── ExactnessError        9   counted and used weights differ, or a gradient is not finite
    ├── VerifyError          10   `gatrain verify` found a split gradient that is not equal
    └── WorkerError          11   a rank failed with an error of the user's code
    Interrupted        130/143    stopped by Ctrl-C or SIGTERM; the state was saved

A message says what was given, what is allowed, and what to type next. Leaves hold no logic.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GatrainError(Exception):
    """Base of all errors that the command line prints without a traceback."""

    exit_code = 1


class ConfigError(GatrainError):
    """A configuration key, value, recipe, group option or `_target_` is wrong."""

    exit_code = 2


class PlanError(GatrainError):
    """The batch numbers cannot multiply out to the effective batch size."""

    exit_code = 3


class DataError(GatrainError):
    """Data is missing, unreadable, empty, or smaller than one effective batch."""

    exit_code = 4


class DoesNotFitError(GatrainError):
    """Model, gradients and optimizer state do not fit in memory at one sample."""

    exit_code = 5


class LaunchError(GatrainError):
    """The job could not be started."""

    exit_code = 6


class RunFolderError(GatrainError):
    """A run folder is in use, is not a run folder, or cannot be written."""

    exit_code = 7


class SavedStateError(GatrainError):
    """There is no valid saved state, or it belongs to another run."""

    exit_code = 8


class ExactnessError(GatrainError):
    """The result would not be the gradient of the effective batch."""

    exit_code = 9


class VerifyError(GatrainError):
    """`gatrain verify` found a difference."""

    exit_code = 10


class WorkerError(GatrainError):
    """A rank failed with an error that is not one of the above."""

    exit_code = 11


class PeerFailed(WorkerError):
    """Another rank failed; that rank's own error is the one to show."""


class Interrupted(GatrainError):
    """The run was asked to stop (SIGINT or SIGTERM) and did so after saving its state."""

    exit_code = 130


EXIT_CODES: dict[int, type[GatrainError]] = {
    cls.exit_code: cls
    for cls in (
        GatrainError,
        ConfigError,
        PlanError,
        DataError,
        DoesNotFitError,
        LaunchError,
        RunFolderError,
        SavedStateError,
        ExactnessError,
        VerifyError,
        WorkerError,
        Interrupted,
    )
}


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
