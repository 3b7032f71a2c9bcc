"""Standard streams as they really are: closed by a daemon, on a full disk, without a reader, of another alphabet.

Training goes on whatever becomes of what it prints; its log is in the run folder. A command whose whole work is
what it prints ends with an error where that cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from gatrain.errors import GatrainError

TRAINING = ("fit", "launch", "resume")
"""Commands that do something else than to print."""


class Forgiving:
    """A text stream that never raises: what it cannot write is dropped, and why is kept in ``failure``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failure = self.failure or error
        with contextlib.suppress(OSError, ValueError):  # what is still in the buffer goes nowhere
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Standard output and error exist in here, and no failure to write there ends anything."""
    open_missing()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def open_missing() -> None:
    """Point the standard streams that are closed at nothing, before another file takes their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def exit_code(code: int, command: str) -> int:
    """The command's exit code, which is 1 where its answer could not be written. Says why on standard error."""
    sys.stdout.flush()
    failure = getattr(sys.stdout, "failure", None)
    if failure is None or isinstance(failure, BrokenPipeError):  # such as `head`, which has seen enough
        return code
    reason = failure.strerror if isinstance(failure, OSError) else str(failure)
    if isinstance(failure, OSError) and failure.errno == errno.EIO:
        return code  # a terminal that is gone
    if command in TRAINING:
        text = f"note: standard output could not be written: {reason}. The logs are in the run folder."
        print(text, file=sys.stderr)
        return code
    print(f"error: standard output cannot be written: {reason}.", file=sys.stderr)
    return code or GatrainError.exit_code
