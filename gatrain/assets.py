"""Where things are that belong to no run: recipes and config groups, and the folder of what is remembered.

The user's own recipes and groups come first, then those that ship with gatrain.

A wheel carries them inside the package; an editable install has them beside ``pyproject.toml``. They are
plain folders of YAML on a real file system: running gatrain out of a zip file is not supported.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

from gatrain.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """One recipe file; ``shadows`` is a shipped recipe of the same name that it hides."""

    name: str
    path: Path
    yours: bool
    description: str = ""
    shadows: Path | None = None


def cache_dir() -> Path:
    """The folder of what is remembered, as `cache_place` names it.

    Raises:
        ConfigError: others may write there.
    """
    return safe_cache(cache_place())


def safe_cache(folder: Path) -> Path:
    """``folder``, unless every user of this machine may put something there that would then be believed.

    One that belongs to somebody else may be read, and its group may share it: that is done on purpose.

    Raises:
        ConfigError: says what to type.
    """
    for place in (folder.parent, folder, *(folder / name for name in _REMEMBERED)):
        try:
            mode = place.stat().st_mode
        except OSError:  # not there yet, or not for us to see
            continue
        shared = mode & stat.S_IWOTH
        # a parent like /tmp, where nobody may rename what is another's, is as safe as the folder itself
        if shared and not (place == folder.parent and mode & stat.S_ISVTX):
            raise ConfigError(
                f"the cache folder {folder} is not safe: everybody may write in {place}, and what is found there "
                f"is used. Forbid it: chmod o-w {shlex.quote(str(place))}. Or set GATRAIN_CACHE to a folder of "
                "your own."
            )
    return folder


_REMEMBERED = ("plans", "fingerprints")


def cache_place() -> Path:
    """``$GATRAIN_CACHE``, else ``$XDG_CACHE_HOME/gatrain``, else ``~/.cache/gatrain``; not looked at.

    Raises:
        ConfigError: nobody has that home folder.
    """
    own, base = os.environ.get("GATRAIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "gatrain"
    except RuntimeError as error:
        given = f"GATRAIN_CACHE={own}" if own else "HOME is not set, and this user has none"
        raise ConfigError(f"{given}: there is no such home folder. Set GATRAIN_CACHE=FOLDER.") from error


def shipped_folder(name: str) -> Path:
    """Return the shipped ``conf`` or ``recipes`` folder.

    Raises:
        ConfigError: the installation has no such folder.
    """
    inside = _PACKAGE / "_assets" / name
    if inside.is_dir():
        return inside
    beside = _PACKAGE.parent / name
    # Without this guard a stranger's `conf` folder in site-packages might be taken for ours.
    if beside.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return beside
    raise ConfigError(
        f"this installation of gatrain has no '{name}' folder (looked at {inside} and {beside}). "
        "Install gatrain again: pip install --force-reinstall gatrain."
    )


def search_folders(name: str, cwd: Path) -> list[Path]:
    """Return the existing folders called ``name`` (``conf`` or ``recipes``), the user's own first."""
    folders: list[Path] = []
    for folder in (cwd / name, shipped_folder(name)):
        resolved = folder.resolve()
        if resolved.is_dir() and resolved not in folders:  # equal when cwd is gatrain's own repository
            folders.append(resolved)
    return folders


def list_recipes(cwd: Path) -> list[Recipe]:
    """Return every recipe by name; one of the user's own hides a shipped one of the same name.

    Files whose name starts with an underscore are parts for other recipes and are not listed.
    """
    found: dict[str, Recipe] = {}
    shipped = shipped_folder("recipes").resolve()
    for folder in reversed(search_folders("recipes", cwd)):
        for path in sorted(folder.rglob("*.yaml")):
            if path.name.startswith(("_", ".")) or not path.is_file():
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            hidden = found[name].path if name in found else None
            found[name] = Recipe(name, path, folder != shipped, first_comment(path), hidden)
    return sorted(found.values(), key=lambda recipe: (recipe.yours, recipe.name))


def groups(cwd: Path) -> list[str]:
    """Names of the config groups: the folders of ``conf``, such as ``optimizer``."""
    return sorted(
        {each.name for folder in search_folders("conf", cwd) for each in folder.iterdir() if each.is_dir()}
    )


def group_options(group: str, cwd: Path) -> list[str]:
    """What a config group offers: the files in its folder, without their suffix."""
    return sorted(
        {path.stem for folder in search_folders("conf", cwd) for path in (folder / group).glob("*.yaml")}
    )


def find_recipe(given: str, cwd: Path) -> Recipe:
    """Resolve ``recipe=...``: the name of a recipe, or the path of a YAML file.

    Raises:
        ConfigError: nothing there; lists the known names with the nearest one.
    """
    try:
        return _find_recipe(given, cwd)
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, not allowed
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise ConfigError(f"recipe={given[:80]}: {reason}. Give a YAML file or a recipe's name.") from error


def _find_recipe(given: str, cwd: Path) -> Recipe:
    looks_like_path = given.endswith((".yaml", ".yml")) or given.startswith((".", "~", "/"))
    if not looks_like_path:
        for folder in search_folders("recipes", cwd):
            path = folder / f"{given}.yaml"
            if path.is_file():
                shipped = shipped_folder("recipes").resolve()
                hidden = shipped / f"{given}.yaml"
                shadows = hidden if folder != shipped and hidden.is_file() else None
                return Recipe(given, path, folder != shipped, first_comment(path), shadows)
    path = cwd / Path(given).expanduser()
    if path.suffix == ".yml" and path.is_file():
        raise ConfigError(f"recipe={given}: the file name must end in .yaml. Rename it to {path.stem}.yaml.")
    if path.suffix == ".yaml" and path.is_file():
        path = path.resolve()
        return Recipe(path.stem, path, True, first_comment(path))
    known = [recipe.name for recipe in list_recipes(cwd)]
    if looks_like_path:
        state = "is a folder" if path.is_dir() else "is no .yaml file" if path.exists() else "does not exist"
        hint = nearest(Path(given).stem, known).replace("Did you mean '", "Did you mean 'recipe=")
        raise ConfigError(f"recipe={given}: {path} {state}. Give a YAML file or a recipe's name.{hint}")
    raise ConfigError(
        f"unknown recipe '{given}'.{nearest(given, known)} Known recipes: {', '.join(known) or 'none'}. "
        f"Your own go into {cwd / 'recipes'}, or give the path of a YAML file."
    )


def first_comment(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with, or its first line if none ends."""
    block: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                text = line.strip().lstrip("#").strip() if line.strip().startswith("#") else None
                if text is None and (block or line.strip()):
                    break
                if text and not text.startswith("@"):
                    block.append(text)
                elif block:
                    break
    except (OSError, UnicodeDecodeError):
        return ""
    sentence = re.match(r".*?\.(?=\s|$)", " ".join(block))
    return sentence[0] if sentence else block[0] if block else ""
