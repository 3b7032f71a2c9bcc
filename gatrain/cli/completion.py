"""Completion of the shell for the words of a command: recipes, keys, and the values of keys that take few."""

from __future__ import annotations

from pathlib import Path


def words(incomplete: str) -> list[str]:
    """What may stand where ``incomplete`` has been typed. Imports nothing heavy: a shell waits for it."""
    from gatrain import assets, doors
    from gatrain.settings import CHOICES, settings, spelt

    key, equals, value = incomplete.partition("=")
    if key == "recipe" and equals:
        names = sorted(recipe.name for recipe in assets.list_recipes(Path.cwd()))
        return [f"recipe={name}" for name in names if name.startswith(value)]
    if equals:
        choices = [spelt(each) for each in CHOICES.get(key, ())] or [*doors.SHIPPED.get(key, ())]
        choices = choices or assets.group_options(key, Path.cwd())
        return [f"{key}={choice}" for choice in choices if choice.startswith(value)]
    keys = ["recipe", *assets.groups(Path.cwd()), *(setting.key for setting in settings())]
    return [f"{each}=" for each in dict.fromkeys(keys) if each.startswith(incomplete)]
