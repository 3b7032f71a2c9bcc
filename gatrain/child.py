"""Work in a process of its own that ends with this one: ``python -m MODULE FOLDER [WORD ...]``, its result in JSON.

    parent    Child(module, files, ...)    a private folder with these files, and the process
              .result()                    waits; the JSON object that it left, or its error with its exit code
    child     main(work, failed)           leaves what ``work`` returns, or the error that it raised

For what must not happen in the command itself: importing what the user's configuration names, taking memory that
shall be free again, importing torch. The child sees no GPU unless it is told to.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gatrain import imports, offspring, scratch
from gatrain.causes import told
from gatrain.errors import EXIT_CODES, GatrainError, WorkerError
from gatrain.rundir import write_json, write_text

RESULT, STDERR = "result.json", "stderr.txt"
TAIL_LINES = 3


class Child:
    """A child process that is under way. As a context manager it is ended, come what may.

    Args:
        module: name of the module, which ends with a call of `main`.
        files: what the child finds in its folder; readable by this user alone.
        failed: what to say where it dies without a word, such as ``"reading the data failed"``.
        words: further arguments of the child.
        cwd: its working folder, whose modules it may import; default the current one.
        env: additions to its environment.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        module: str,
        files: Mapping[str, str],
        failed: str,
        *,
        words: Sequence[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._failed = failed
        self._is_closed = False
        self.folder = scratch.make("gatrain-child-")
        try:
            for name, text in files.items():
                write_text(self.folder / name, text, mode=0o600)
            sockets = {offspring.SOCKETS: str(scratch.sockets_of(self.folder))}
            with (self.folder / STDERR).open("wb") as said:  # a file never fills up, as an unread pipe does
                self._process = offspring.start(
                    ["-m", module, str(self.folder), *words],
                    cwd=cwd,
                    env=sockets | dict(env or {}),
                    said=said,
                )
        except BaseException:
            scratch.remove(self.folder)
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether it is still at work."""
        return self._process.poll() is None

    def result(self, time_limit_s: float | None = None) -> dict[str, Any]:
        """What the child's ``work`` returned; waits for it, and leaves nothing behind.

        Raises:
            GatrainError: the child's error, with its message and exit code; or it died, with its last lines.
            TimeoutError: it took longer than ``time_limit_s`` and was ended.
        """
        try:
            return self._read(self._process.wait(time_limit_s))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:  # also when the wait is interrupted
            self.close()

    def close(self) -> None:
        """End the child if it still runs, with whatever it has started, and remove its folder."""
        if not self._is_closed:
            self._is_closed = True
            offspring.end(self._process)
            scratch.remove(self.folder)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, status: int) -> dict[str, Any]:
        try:
            left = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = b""
            with contextlib.suppress(OSError):
                said = (self.folder / STDERR).read_bytes()
            tail = said.decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
            raise GatrainError("\n".join([f"{self._failed} (exit status {status}).", *tail])) from None
        if "error" in left:
            raise EXIT_CODES.get(left["exit_code"], GatrainError)(left["error"])
        result: dict[str, Any] = left["result"]
        return result


def main(work: Callable[[Path, list[str]], dict[str, Any]], failed: str) -> NoReturn:
    """The whole life of a child: call ``work(folder, words)``, leave its result or its error, and end.

    Args:
        work: returns what goes into JSON.
        failed: begins the message of an error of the user's own code.
    """
    offspring.die_with_parent()
    imports.use_working_folder()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # nothing here may take GPU memory
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    try:
        left: dict[str, Any] = {"result": work(folder, words)}
    except GatrainError as error:
        left = {"error": str(error), "exit_code": error.exit_code}
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        left = {"error": told(error, f"{failed}: "), "exit_code": WorkerError.exit_code}
    write_json(folder / RESULT, left)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    # at once: a thread of the user's that never ends would keep the command waiting, and taking torch apart takes
    # a third as long as importing it
    os._exit(0)
