"""Override words as people type them: names and paths are text, whatever they look like.

Hydra reads ``2026_01_31`` as a number, ``7e91234`` as infinity, and refuses ``~``, accents and ``=`` without
quotes. Where a key takes text, by the schema here or by the signature of a ``_target_`` (`declared`), what was
typed is what is meant; where nobody says what a key takes, only what cannot be anything else is taken as text.
"""

from __future__ import annotations

import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from gatrain.compose import schema, two_ways
from gatrain.compose.declared import Text, text_arguments
from gatrain.config import OPEN_NODES
from gatrain.errors import ConfigError

_NAMES = ("run.name",)
"""A name is a name: ``null`` too."""
_FUNCTION = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool|json_str|extend_list)\(.*\)"
)
_LOOKS_LIKE_A_NAME = re.compile(
    r"(^|_)(path|paths|dir|root|folder|file|files|name|tag|commit|revision|version)$"
)
_PYTHONS_NOTHING = "None"


def parse(word: str) -> Override:
    """Parse one word with Hydra, and as text where that is what its key takes or all that it can be.

    Raises:
        ConfigError: the value is Python's ``None``, or a number that is read in two ways.
        HydraException: it cannot be read.
    """
    key, equals, value = word.partition("=")
    name, value = key.lstrip("+~"), value.strip()
    text = of_schema(name)
    if not equals or key.startswith("~"):
        return OverridesParser.create().parse_override(word)
    if value == _PYTHONS_NOTHING and name not in _NAMES and (text is None or text.nothing):
        raise ConfigError(_none(word, key, text is None or text.itself))
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException:
        is_text = text.itself if text is not None else schema.hint_of(name) is None
        if not (is_text and _is_plain(value)):
            raise
        return _as_text(word, key, value)
    if text is not None and text.itself:
        return _as_text(word, key, value) if _is_other(parsed.value(), text, name) else parsed
    is_own = name.partition(".")[0] not in OPEN_NODES  # else a text goes to the user's work, as it is
    if is_own and (text is not None or isinstance(parsed._value, list | dict)):
        two_ways.check_typed(name, parsed._value, text is None)
    return parsed


def _as_text(word: str, key: str, value: str) -> Override:
    quoted = QuotedString(value, Quote.single).with_quotes()
    override = OverridesParser.create().parse_override(f"{key}={quoted}")
    override.input_line = word
    return override


def for_hydra(override: Override) -> str:
    """The word as Hydra reads it."""
    word, value = override.input_line or "", override._value
    if not isinstance(value, QuotedString):
        return word
    return f"{word.partition('=')[0]}={value.with_quotes()}"


def _none(word: str, key: str, may_be_text: bool) -> str:
    text = f"'{word}': Python's None is written null here. Write {key}=null for no value"
    quoted = shlex.quote(f'{key}="None"')
    return f"{text}, or {quoted} for the text." if may_be_text else f"{text}."


def _is_other(value: Any, text: Text, name: str) -> bool:
    """Whether Hydra made something else of a text."""
    if value is None:
        return not text.nothing or name in _NAMES
    return isinstance(value, bool | int | float)


def _is_plain(value: str) -> bool:
    """Whether a value that Hydra cannot read is a text, and not a list, a sweep or a quotation that went wrong."""
    if not value or re.search(r"[,'\"]", value) or _FUNCTION.fullmatch(value):
        return False
    if any(value.count(opening) != value.count(closing) for opening, closing in ("()", "[]", "{}")):
        return False
    if value[0] in "[{(":
        closing = {"[": "]", "{": "}", "(": ")"}[value[0]]
        return closing in value and not value.endswith(closing)
    return True


# --- what keys take -------------------------------------------------------------------------------------


def of_schema(key: str) -> Text | None:
    """What a key of gatrain's own takes; None for the keys of the user's work and unknown ones."""
    hint = schema.hint_of(key)
    if hint is None:
        return None
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return Text(itself=str in parts, nothing=types.NoneType in parts)


def of_target(leaves: Mapping[str, Any], key: str, cwd: Path) -> Text | None:
    """What a key of a ``_target_`` takes, by the signature; None where that says nothing."""
    parent, _, last = key.rpartition(".")
    target = leaves.get(f"{parent}._target_")
    return text_arguments(target, cwd).get(last) if isinstance(target, str) and "." in target else None


def kept(raw: str, value: Any, key: str, leaves: Mapping[str, Any], cwd: Path) -> Any:
    """What was meant by ``raw``, which Hydra or YAML has read as ``value``, for a key of the user's own work.

    Raises:
        ConfigError: a number that is read in two ways.
    """
    text = of_schema(key) or of_target(leaves, key, cwd)
    if isinstance(value, list):
        parts = [part.strip() for part in raw.removeprefix("[").removesuffix("]").split(",")]
        if text is None or not text.items or len(parts) != len(value):
            if len(parts) == len(value):
                for part, each in zip(parts, value, strict=True):
                    two_ways.check(part, each, key, of_schema(key) is None)
            return value
        return [
            part if isinstance(each, bool | int | float) else each
            for part, each in zip(parts, value, strict=True)
        ]
    if not (value is None or isinstance(value, bool | int | float)):
        return value
    if text is not None and text.itself:
        return raw if _is_other(value, text, key) else value
    if value is None or isinstance(value, bool):
        return value
    if (text is None or not text.known) and _is_no_number(raw, value, key):
        return raw
    two_ways.check(raw, value, key, of_schema(key) is None)
    return value


def _is_no_number(raw: str, value: Any, key: str) -> bool:
    """Digits that nobody would write for a number, or under a name that asks for none."""
    is_date = isinstance(value, int) and "_" in raw and not re.fullmatch(r"[-+]?\d{1,3}(_\d{3})+", raw)
    overflows = isinstance(value, float) and abs(value) == float("inf") and "inf" not in raw.lower()
    looks = _LOOKS_LIKE_A_NAME.search(key.rpartition(".")[2]) is not None
    return is_date or overflows or (looks and str(value) != raw)


def check_file(path: Path, prefix: str, leaves: Mapping[str, Any], cwd: Path) -> None:
    """Refuse numbers that are read in two ways where a file has them as keys and in lists.

    Raises:
        ConfigError: names the file.
    """

    def takes_text(key: str) -> bool:
        text = of_schema(key) or of_target(leaves, key, cwd)
        return text is not None and text.items

    two_ways.check_file(path, prefix, takes_text, lambda key: of_schema(key) is None)


# --- several values -------------------------------------------------------------------------------------


def as_loop(words: Sequence[str], command: str = "gatrain fit") -> str | None:
    """A shell loop that runs ``command`` once for each combination of the values that the words list."""
    heads, tails = [], []
    for word in words:
        key = word.partition("=")[0]
        try:
            override = OverridesParser.create().parse_override(word)
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        except (HydraException, ValueError, TypeError, AttributeError, NotImplementedError):
            values = None
        if values is None:
            tails.append(shlex.quote(word))
            continue
        variable = re.sub(r"\W", "_", key.lstrip("+~").rpartition(".")[2]) or "value"
        heads.append((variable, " ".join(shlex.quote(each) for each in values)))
        tails.append(f'{key}="${variable}"')
    if not heads:
        return None
    mark = "".join(f'-"${variable}"' for variable, _ in heads)
    own = [f"{word}{mark}" if re.match(r"'?run\.(dir|name)=", word) else word for word in tails]
    loops = "".join(f"for {variable} in {values}; do " for variable, values in heads)
    return f"{loops}{command} {' '.join(own)}{'; done' * len(heads)}"
