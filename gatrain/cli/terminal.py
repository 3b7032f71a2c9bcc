"""What the command line does on a terminal besides its commands: progress, output, error messages."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from gatrain import __version__, disk, offspring
from gatrain.cli import options_elsewhere
from gatrain.errors import GatrainError, Interrupted, RunFolderError, nearest
from gatrain.secrets import hide, hide_in, hide_known

if TYPE_CHECKING:
    from gatrain.fit.listener import Listener


class Progress:
    """What goes on before training, on standard error: a live status on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._status: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def tell(self, text: str) -> None:
        text = hide_known(text)
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.markup import escape

        if self._status is None:
            self._status = Console(stderr=True).status(escape(text))
            self._status.start()
        self._status.update(escape(text))

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def listener(self, print_plan: bool = True) -> Listener:
        from gatrain.data.report import DataRecord
        from gatrain.fit.listener import Listener
        from gatrain.plan import Plan

        seen: list[DataRecord] = []

        def planned(plan: Plan, run_dir: Path | None) -> None:
            self.stop()
            if print_plan:
                from gatrain.report import print_plan as print_it
                from gatrain.report.data_lines import data_lines

                for data in seen:
                    print_lines([*data_lines(data), ""])
                print_it(plan, trains=run_dir is not None)
                if run_dir is not None:
                    print(f"Run folder: {run_dir}", flush=True)

        def notice(text: str) -> None:
            self.stop()
            print(hide_known(text), file=sys.stderr, flush=True)

        return Listener(progress=self.tell, read=seen.append, planned=planned, notice=notice)


def print_json(data: Any) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(hide_in(data), indent=2, default=str))


def width() -> int:
    """Columns of the terminal, or 80 elsewhere."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, with a stand-in for what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(hide_known(line).encode(encoding, "replace").decode(encoding))


# typer 0.26 and newer carries its own copy of click, older ones import it: so the class is looked up
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Terminable:
    """Turn SIGTERM, SIGHUP and SIGUSR1 into what Ctrl-C raises, so that what was begun is cleaned up before the
    process ends. What was ignored at the start stays ignored.

    No `Exception`: libraries catch those and say them in their own words. ``asked`` tells the two apart.
    """

    EXIT_CODE = 128 + signal.SIGTERM
    asked: int | None = None
    """The signal that came; None for a Ctrl-C."""

    def __enter__(self) -> None:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in offspring.handled():
                if signum != signal.SIGINT:
                    self._previous[signum] = signal.signal(signum, self._stop)

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            leave_closed_terminal()
        if self.asked is None:  # once: what is being cleaned up shall be
            self.asked = signum
            raise KeyboardInterrupt


def leave_closed_terminal() -> None:
    """Send output that no terminal takes any more nowhere, so that nothing fails on it."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if (
                stat.S_ISCHR(os.fstat(fd).st_mode)
                and not os.isatty(fd)
                and os.fstat(fd).st_rdev != os.stat(os.devnull).st_rdev
            ):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def leave(code: int, is_program: bool) -> NoReturn:
    """End the process.

    A thread that is still inside of a library would abort it while Python ends; and taking torch apart, module by
    module, takes longer than somebody who has stopped the command twice will wait. `python -m` would end by SIGINT,
    whatever the code, where a KeyboardInterrupt once came out of ``exec``, by which dataclasses are made.

    Args:
        is_program: nothing but this command runs in the process.
    """
    for signum in (
        offspring.handled() if is_program else ()
    ):  # the code is settled: a further one would change it
        signal.signal(signum, signal.SIG_IGN)
    threads = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    is_inside = any(thread.name == offspring.AGENT_THREAD for thread in threads)
    is_stopped = code in (Interrupted.exit_code, Terminable.EXIT_CODE)
    is_quick = is_program and all(thread.daemon for thread in threads)
    if not is_inside and not (is_quick and (is_stopped or "torch" in sys.modules)):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def print_error(text: str) -> None:
    """Print the one message of a failed command on standard error."""
    encoding = sys.stderr.encoding or "utf-8"
    message = f"error: {hide(text.strip())}"
    print(message.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)


def usage_text(error: Exception, arguments: Sequence[str], commands: Sequence[str]) -> str:
    """Say what is wrong with the words of the command line, in the same style as every other error."""
    text = str(getattr(error, "format_message", lambda: str(error))()).rstrip(".")
    first = arguments[0]
    if text.startswith("No such command"):
        if "=" in first:
            from gatrain.commands import typed

            return f"'{first}' stands where a command belongs. Did you mean: {typed('fit', *arguments)}"
        hint = options_elsewhere.command(first) or nearest(first, commands)
        return f"there is no command '{first}'.{hint} Commands: {', '.join(commands)}."
    if text.startswith("No such option"):
        option = str(getattr(error, "option_name", ""))
        if answer := options_elsewhere.answer(option, arguments):
            return answer
        context = getattr(error, "ctx", None)
        known = _options(getattr(context, "command", None))
        hint = nearest(option, known, 0.85) or nearest(
            option, [each for each in known if each not in _TAKES_AWAY]
        )
        group = getattr(context, "parent", None) or context  # before the command it is the group's
        siblings = getattr(getattr(group, "command", None), "commands", {})
        if owners := [f"gatrain {name}" for name, command in siblings.items() if option in _options(command)]:
            hint = f" It is one of {', '.join(owners)}{', and stands after it' if group is context else ''}."
        if option == "--recipe":  # not as near as it looks
            hint = ""
        key = _setting(option.lstrip("-").partition("=")[0]) if first in commands and not hint else None
        if key is not None:
            hint = f" Settings have no dashes: {key}=VALUE."
        where = first if first in commands else ""
        return f"there is no option '{option}'.{hint} See gatrain {where + ' ' if where else ''}--help."
    text = _in_our_words(text, arguments)
    return f"{text}. See gatrain {first if first in commands else ''} --help.".replace("  ", " ")


def _in_our_words(text: str, arguments: Sequence[str]) -> str:
    """What Typer says of the words of a command, as every other message here says it."""
    if number := re.match(r"Invalid value for '([^']+)': .*valid (integer|float)", text):
        name = number[1]
        words = " ".join(arguments).replace(f"{name}=", f"{name} ").split(" ")
        given = words[words.index(name) + 1] if name in words[:-1] else ""
        return f"{name} {given} is not a {'whole ' if number[2] == 'integer' else ''}number"
    if more := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", text):
        return f"gatrain {arguments[0]} takes no such word: {more[1]}"
    if text == "Missing argument 'run_dir'":
        return "no run folder is given. Write for example gatrain resume outputs/llm/2026-01-31_12-00-00"
    return text


_TAKES_AWAY = ("--overwrite", "--from-start", "--trust", "--accept-changes")
"""Options that are proposed for a slip of the finger alone: they replace a run, or let pass what is refused."""


def _setting(name: str) -> str | None:
    """The setting that an option of this name stands for: itself, one whose last part it is, or None."""
    from gatrain.config import OPEN_NODES
    from gatrain.settings import settings

    name = name.replace("-", "_")
    keys = ["recipe", *(each.key for each in settings())]
    if name in keys or (name.partition(".")[0] in OPEN_NODES and "." in name):
        return name
    return next((key for key in keys if key.rpartition(".")[2] == name), None)


def _options(command: Any) -> list[str]:
    return [name for p in getattr(command, "params", []) for name in p.opts if name.startswith("--")]


_OF_THE_MACHINE = {
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE,
    errno.ENFILE, errno.ESTALE, errno.EIO, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip
"""What a system answers that no program can help."""


def unexpected(error: Exception) -> int:
    """Report a mistake of gatrain's own in short, with the traceback in a file; return the exit code."""
    debug_traceback()
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        where = f" ({str(error.filename)[:200]})" if error.filename else ""
        print_error(f"{disk.reason(error)}{where}. {disk.remedy(error)}, then type the same command again.")
        return GatrainError.exit_code
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        print_error(
            "no folder for temporary files can be written. Set TMPDIR to one that can, and try again."
        )
        return RunFolderError.exit_code
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        handle, name = tempfile.mkstemp(prefix=f"gatrain-error-{stamp}-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"gatrain {__version__}, Python {sys.version}\n")
            file.write(hide(traceback.format_exc()))
        where = f"The details are in {os.path.realpath(name)}"  # a short name of TMPDIR ends with the command
    except OSError:
        where = "Set GATRAIN_DEBUG=1 to see the details"
    print_error(
        f"{type(error).__name__}: {error}\nThis is a mistake in gatrain. {where}; please report it with them."
    )
    return GatrainError.exit_code


def debug_traceback() -> None:
    """Print the traceback where GATRAIN_DEBUG asks for it."""
    if os.environ.get("GATRAIN_DEBUG", "") not in ("", "0"):
        print(hide(traceback.format_exc()), file=sys.stderr)
