"""Recipe plus overrides -> `RunConfig`. Runs once, at the edge.

Importing this package imports no Hydra, which not every command needs: `composer` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain import assets
from gatrain.config import RunConfig

COMMAND_LINE, DEFAULT = "command line", "default"


@dataclass(frozen=True)
class Composed:
    """A checked configuration and where it came from."""

    config: RunConfig
    recipe: str
    recipe_file: Path
    overrides: list[str]
    """The words of the command line, without ``recipe=``."""
    yaml: str
    """What is written down: what asks the environment or the clock as it was answered, secrets as references."""
    leaves: dict[str, Any]
    """Dotted key -> value as it was written, references included."""
    sources: dict[str, str] = field(default_factory=dict)
    """Dotted key -> ``command line``, ``default``, or the path of a file."""
    shadows: Path | None = None
    """A shipped recipe of the same name that the user's own one hides."""
    remarks: list[str] = field(default_factory=list)
    """What a person should know of the files: keys without effect, and files that replace gatrain's own."""
    timed: tuple[str, ...] = ()
    """Keys whose value was made of the moment: ``${now:...}``."""
    references: dict[str, str] = field(default_factory=dict)
    """Dotted key -> what ``yaml`` holds the answer of, such as ``${oc.env:LR}``."""


@dataclass(frozen=True)
class Reloaded:
    """A stored configuration, read back."""

    config: RunConfig
    yaml: str
    """As `Composed.yaml`."""
    leaves: dict[str, Any]
    """Dotted key -> value in ``yaml``."""
    references: dict[str, str]
    """As `Composed.references`, of what was not answered before."""


def compose(overrides: Sequence[str], cwd: Path | None = None) -> Composed:
    """Compose and check a configuration.

    Args:
        overrides: ``recipe=NAME`` (or a path) and Hydra override words.
        cwd: folder whose ``recipes/`` and ``conf/`` come before the shipped ones; default the current one.

    Raises:
        ConfigError: anything that is wrong, in the user's words.
    """
    from gatrain.compose import composer

    return composer.compose(overrides, (cwd or Path.cwd()).resolve())


def load_config(path: Path) -> RunConfig:
    """Read a run folder's ``config.yaml`` back, resolved and checked.

    Raises:
        ConfigError: the file cannot be read or no longer holds a valid configuration.
    """
    return reload(path, ()).config


def reload(path: Path, overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> Reloaded:
    """Read a stored configuration, with some values changed.

    Args:
        values: dotted key -> value, beside the override words.

    Raises:
        ConfigError: the file or an override is not right.
    """
    from gatrain.compose import composer

    return composer.reload(path, overrides, values or {})


def resolve_again(yaml: str, references: Mapping[str, str]) -> dict[str, Any]:
    """What references, by dotted key, come to now; those are left out that cannot be resolved, or that come to
    something else each time (``${now:...}``)."""
    from gatrain.compose import composer

    return composer.resolve_again(yaml, references)


def split_recipe(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the words give as recipes, and the other words."""
    given = [word.partition("=")[2].strip().strip("'\"") for word in overrides if word.startswith("recipe=")]
    return given, [word for word in overrides if not word.startswith("recipe=")]


def folders_of(recipe: assets.Recipe, cwd: Path) -> list[Path]:
    """The folders that a recipe's parts are looked for in, the first that has one counts."""
    folders = [
        recipe.path.parent,
        *assets.search_folders("recipes", cwd),
        *assets.search_folders("conf", cwd),
    ]
    return list(dict.fromkeys(folders))
