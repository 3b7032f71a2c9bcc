"""What Hydra says of a defaults list, in the user's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_SENTENCES = (
    (
        r"Could not override '(?P<name>[^'@]+)[^']*'.*No match",
        "its defaults list says 'override {name}', and nothing before it chooses {name}. "
        "Write '- {name}: ...' without override{shadow}.",
    ),
    (
        r"Could not override '(?P<name>[^'@]+)[^']*'.*Did you mean to override (?P<near>[^?]+)\?",
        "its defaults list says 'override {name}', and nothing before it chooses {name}, but {near}{shadow}.",
    ),
    (
        r"Override '(?P<name>[^':]+) : [^']*' is defined before",
        "the entry 'override {name}' stands too early in its defaults list. Put the overrides last, before _self_.",
    ),
    (r"Duplicate _self_", "_self_ stands twice in its defaults list. Keep the last one."),
    (
        r"not found.*_dummy_|_dummy_.*not found|not supported in options list|subtree\s+of an in interpolated",
        "its defaults list refers to something with ${{...}} where that is not possible. Write the name itself.",
    ),
    (
        r"Merge error: \w+Config is not a subclass of \w+Config.*momentum|Merge error: .*Config.*betas",
        "it puts one optimizer's file in the place of another's. Write '- override optimizer: NAME' instead.",
    ),
    (
        r"Unsupported|[Ii]nvalid type in defaults|Unrecognized|Missing ConfigDefault|Too many keys in default",
        "its defaults list holds an entry that is no name. "
        "Write '- NAME' for a file and '- GROUP: NAME' for one of a group.",
    ),
)


def explain(text: str, folders: Sequence[Path]) -> str | None:
    """A sentence for one of Hydra's; None for any other.

    Args:
        folders: what is searched for the files of a list, in this order.
    """
    for pattern, sentence in _SENTENCES:
        if found := re.search(pattern, text, re.DOTALL):
            return sentence.format(**found.groupdict(), shadow=_shadow(folders))
    return None


def _shadow(folders: Sequence[Path]) -> str:
    """Which file of the user's stands in the place of gatrain's own base, for a list that expects that."""
    places = [folder / "base.yaml" for folder in folders if (folder / "base.yaml").is_file()]
    if len(places) < 2:
        return ""
    ours, theirs = places[-1], places[0]
    return f". {theirs} is used in place of gatrain's own {ours}, which does: rename it if that is not meant"
