"""The names that ``--trust`` has given on the command line: the only way past what `gatrain.targets` refuses.

They are this command's alone. Its own child processes inherit them through a variable that every start sets anew,
so that one which was there before counts for nothing; no file is ever asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from gatrain.errors import ConfigError

OPTION = "--trust"
_VARIABLE = "GATRAIN_INHERITED_TRUST"

_trusted: tuple[str, ...] = ()


def accept(names: Iterable[str]) -> None:
    """Trust exactly these names, as `_target_` writes them or as they resolve.

    Raises:
        ConfigError: one is no dotted name.
    """
    global _trusted
    given = tuple(dict.fromkeys(name.strip() for name in names))
    for name in given:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name):
            raise ConfigError(
                f"{OPTION} {name} is no dotted name. Write what the message named, for example "
                f"{OPTION} collections.OrderedDict."
            )
    _trusted = given


def inherit() -> None:
    """In a child process: trust what the command that started it trusts."""
    accept(filter(None, os.environ.get(_VARIABLE, "").split(",")))


def environment() -> dict[str, str]:
    """What a child process finds in its environment; always given, also when it is empty."""
    return {_VARIABLE: ",".join(_trusted)}


def names() -> tuple[str, ...]:
    """Everything that is trusted."""
    return _trusted


def options() -> list[str]:
    """The options that give the same trust to another command."""
    return [word for name in _trusted for word in (OPTION, name)]


def without_options(words: Sequence[str]) -> list[str]:
    """Words of a command that a file gave, without the trust that it would lend itself."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith(OPTION):
            skip = word == OPTION
        else:
            kept.append(word)
    return kept
