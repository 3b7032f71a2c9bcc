"""The first line of every command: the import path is put in order before anything is imported."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; a Ctrl-C before that can answer by itself has its words and its exit code."""
    try:
        _run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _run() -> NoReturn:
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # told by the command
        here = ""
    if here:
        from gatrain.imports import put_last

        if any(os.path.realpath(entry or here) == here for entry in sys.path):
            put_last(here)
    from gatrain.cli import main as run

    run()
