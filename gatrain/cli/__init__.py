"""The command line: parse, call, print, exit code.

Settings are Hydra override words, not options: `gatrain fit recipe=llm optimizer.lr=1e-3`. The few options
are about where and how the processes start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from gatrain import offspring, secrets, trust
from gatrain.cli import machine, streams, subcommands, terminal
from gatrain.cli.subcommands import app
from gatrain.errors import ConfigError, GatrainError, Interrupted

COMMANDS = (
    "fit",
    "autotune",
    "plan",
    "explain",
    "launch",
    "resume",
    "verify",
    "recipes",
    "show",
    "schema",
    "doctor",
)

COMPLETES = "_GATRAIN_COMPLETE"
"""Set by the shell's completion."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; every error is one message on standard error."""
    if COMPLETES in os.environ:  # a shell asks; Typer answers it and ends the process
        app(prog_name="gatrain")
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    secrets.note_words(arguments)
    secrets.mask_command_line(arguments)
    with streams.forgiving():
        code = streams.exit_code(_run_settled(arguments), arguments[0])
    terminal.leave(code, is_program=argv is None)


def _run_settled(arguments: list[str]) -> int:
    if arguments[0].startswith("-"):
        return _run(arguments)
    try:
        with machine.settled():
            return _run_within_torchrun(arguments) if "RANK" in os.environ else _run(arguments)
    except GatrainError as error:
        terminal.print_error(str(error))
        return int(error.exit_code)


def _run_within_torchrun(arguments: list[str]) -> int:
    """Where torchrun started several of these processes, they become one run instead of as many runs."""
    from gatrain.launch import torchrun

    if arguments[0] == "launch" and "--nproc" in arguments and torchrun.is_left_over(os.environ):
        machine.note(
            f"RANK={os.environ['RANK']} of the environment is not torchrun's (no LOCAL_WORLD_SIZE) and counts for "
            "nothing: launch --nproc starts the ranks."
        )
        torchrun.forget(os.environ)
        return _run(arguments)
    try:
        subcommands.torchrun_world = world = torchrun.detect(os.environ)
        if world is None:
            return _run(arguments)
        if world.local_rank:
            return torchrun.follow(world)
        torchrun.forget(os.environ)
        # what is no training is done once, on node 0
        here = world.node_rank == 0 or arguments[0] in ("fit", "launch", "resume", "autotune", "explain")
        return torchrun.lead(world, lambda: _run(arguments) if here else 0)
    except GatrainError as error:
        terminal.print_error(str(error))
        return int(error.exit_code)


def _run(arguments: list[str]) -> int:
    stop = terminal.Terminable()
    trust.accept(())  # of this command alone
    try:
        with offspring.stopping_together(), stop:
            returned = app(arguments, prog_name="gatrain", standalone_mode=False, obj=arguments)
        if (
            stop.asked is not None or returned == Interrupted.exit_code
        ):  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except GatrainError as error:
        terminal.debug_traceback()
        terminal.print_error(str(error))
        return int(getattr(error, "exit_code", 1))
    except terminal.UsageError as error:
        terminal.print_error(terminal.usage_text(error, arguments, COMMANDS))
        return ConfigError.exit_code
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        terminal.debug_traceback()
        if stop.asked is None:
            terminal.print_error("interrupted")
            return Interrupted.exit_code
        terminal.print_error(f"stopped by {signal.Signals(stop.asked).name}.")
        return stop.EXIT_CODE
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return terminal.unexpected(error)
