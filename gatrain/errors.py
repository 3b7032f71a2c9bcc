"""Every error that gatrain raises on purpose, and the exit code that each one gives.

    GatrainError              1   anything below, unnamed
    ├── ConfigError           2   a key, value, recipe, option or `_target_` that is not right
    ├── PlanError             3   batch numbers that cannot multiply out to the effective batch
    │   └── OutdatedPlanError     never the user's: a plan from memory for another model, made anew by the command
    ├── DataError             4   data that is missing, unreadable, empty or too small
    ├── DoesNotFitError       5   the model does not fit in memory even at one sample
    ├── LaunchError           6   processes that cannot start: port, GPU count, scheduler
    ├── RunFolderError        7   a run folder in use, not a run folder, or not writable
    │   └── DamagedFileError  8   a file of the run folder that does not hold what gatrain writes there
    ├── SavedStateError       8   no valid saved state, or one that belongs to another run
    ├── ExactnessError        9   counted and used weights differ, or a gradient is not finite
    ├── VerifyError          10   `gatrain verify` found a split gradient that is not equal
    ├── WorkerError          11   a rank failed with an error of the user's code
    ├── AfterTrainingError   12   all steps are trained and saved; evaluation, showcase, plots or a logger failed
    └── BatchProposed        13   batch.effective=auto: a batch was proposed, and none was set
    Interrupted        130/143    stopped by Ctrl-C, or by SIGTERM, SIGHUP or SIGUSR1; the state was saved

A message says what was given, what is allowed, and what to type next. Leaves hold no logic.
"""

from __future__ import annotations

import difflib
import errno
import re
import sys
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


class OutdatedPlanError(PlanError):
    """A rank found another model or other data than its plan was measured for; the command plans anew."""


class DataError(GatrainError):
    """Data is missing, unreadable, empty, or smaller than one effective batch."""

    exit_code = 4


class BrokenSampleError(DataError):
    """One sample cannot be read, and the others can.

    Any dataset may raise it from ``__getitem__``. With ``skip`` the sample is left out of its window with weight
    zero, counted and named, and the run goes on; without, it ends the run.
    """

    def __init__(self, message: str, skip: bool = False) -> None:
        super().__init__(message)
        self.skip = skip


class DoesNotFitError(GatrainError):
    """Model, gradients and optimizer state do not fit in memory at one sample."""

    exit_code = 5


class LaunchError(GatrainError):
    """The job could not be started."""

    exit_code = 6


class RunFolderError(GatrainError):
    """A run folder is in use, is not a run folder, or cannot be written."""

    exit_code = 7


class DamagedFileError(RunFolderError):
    """A file of a run folder (plan.json, env.json, ...) does not hold what gatrain writes there."""

    exit_code = 8


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

    secondary = True
    """However early it is reported, it is no cause."""
    before_update = False
    """All ranks left a window together, before it changed anything but buffers."""


class AfterTrainingError(GatrainError):
    """Every step is trained and saved; what failed is beside it: an evaluation, the showcase, a plot, a logger."""

    exit_code = 12


class BatchProposed(GatrainError):
    """``batch.effective=auto`` has proposed a batch; nothing was trained with it."""

    exit_code = 13


class Interrupted(GatrainError):
    """The run was asked to stop by a signal and did so after saving its state."""

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
        AfterTrainingError,
        BatchProposed,
        Interrupted,
    )
}


def nearest(given: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string.

    A difference of case alone always counts as near.
    """
    names = [str(name) for name in allowed]
    match = [name for name in names if name.lower() == str(given).lower()]
    match = match or difflib.get_close_matches(str(given), names, n=1, cutoff=cutoff)
    return f" Did you mean '{match[0]}'?" if match else ""


def typed_key(path: str) -> str:
    """``hooks[0].decay`` as it is typed on a command line: ``hooks.0.decay``."""
    return re.sub(r"\[(\d+)\]", r".\1", path)


_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc failed",
)  # fmt: skip
"""How PyTorch, its CPU allocator, the CUDA driver, cuBLAS, cuDNN, cuSOLVER, cuFFT and NCCL say it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in any of the ways in which Python, NumPy, PyTorch and its libraries say so.

    The causes of the error count too, and errors in whose handling it was raised: wrappers hide the first.
    """
    return any(_says_out_of_memory(each) for each in chain(error))


def chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it, outermost first, each once. What was raised ``from None`` hides its cause."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and all(current is not each for each in found):
        found.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):  # NumPy's _ArrayMemoryError is one
        return True
    torch = sys.modules.get("torch")  # without it no error is torch's
    if isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # RuntimeError and what derives from it: torch.AcceleratorError, DistBackendError (NCCL)
    text = str(error).lower().replace("_", " ")  # CUBLAS_STATUS_ALLOC_FAILED, CUDA_ERROR_OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
