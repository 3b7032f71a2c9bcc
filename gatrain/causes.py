"""What an error says of itself: the whole chain of its causes, and the lines of the user's own code."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

from gatrain.errors import chain

LONGEST = 1500
"""Characters shown of one message: some libraries add a page of advice."""


def told(error: BaseException, prefix: str = "") -> str:
    """The messages of the whole chain, innermost last, and where in the user's code the innermost arose."""
    messages: list[str] = []
    errors = chain(error)
    for each in errors:
        text = f"{type(each).__name__}: {_short(str(each).strip())}".rstrip(": ")
        # many libraries repeat the cause in the message of the outer error
        if not any(text in said or (str(each).strip() and str(each).strip() in said) for said in messages):
            messages.append(text)
    lines = [prefix + messages[0], *(f"  caused by {text}" for text in messages[1:])]
    places: list[traceback.FrameSummary] = []
    for each in reversed(errors):  # Python puts the outer frames on the outer error
        places = places or user_frames(each)
    lines += [f"  at {f.filename}:{f.lineno} in {f.name}: {f.line}".rstrip(": ") for f in places]
    return "\n".join(lines)


def user_frames(error: BaseException, most: int = 3) -> list[traceback.FrameSummary]:
    """The innermost frames of the user's own code and of what is installed; else the innermost frame of all.

    The user's own come first in line: a frame deep in a library says less to them than the call that led there.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    libraries = [Path(__file__).parent]
    for name in ("torch", "hydra", "omegaconf"):
        if file := getattr(sys.modules.get(name), "__file__", None):
            libraries.append(Path(file).parent)
    standard = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]

    def is_user(frame: traceback.FrameSummary) -> bool:
        path = Path(frame.filename)
        if frame.filename.startswith("<") or any(path.is_relative_to(folder) for folder in libraries):
            return False
        installed = "site-packages" in path.parts
        return installed or not any(path.is_relative_to(folder) for folder in standard)

    theirs = [frame for frame in frames if is_user(frame)]
    own = [frame for frame in theirs if "site-packages" not in Path(frame.filename).parts]
    if own and own[-1] is not theirs[-1]:
        return [*own[len(own) - most + 1 :], theirs[-1]] if most > 1 else own[-1:]
    return theirs[-most:] or frames[-1:]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
