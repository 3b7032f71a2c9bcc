"""How a recipe and overrides are composed: with `messages` and `schema` the only place that talks to Hydra.

A recipe is a Hydra primary config. Three facts about Hydra shape this file:

- it looks for the primary config before it reads ``hydra.searchpath``, so composition starts at the folder
  that holds the recipe, and the other folders follow as one quoted override;
- without the typed schema at the head of the defaults list a misspelt key in a file is accepted, and a
  schema further down silently resets what came before it: both are refused here;
- its messages speak of its own machinery; `gatrain.compose.messages` says the same in the user's words.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gatrain import assets, doors, secrets
from gatrain.compose import (
    COMMAND_LINE,
    DEFAULT,
    Composed,
    Reloaded,
    bounds,
    folders_of,
    messages,
    moment,
    own,
    schema,
    sources,
    split_recipe,
    words,
)
from gatrain.compose.settle import resolve_again as settle_again
from gatrain.compose.settle import settle
from gatrain.config import RunConfig, validate
from gatrain.errors import ConfigError


def compose(overrides: Sequence[str], cwd: Path) -> Composed:
    """See `gatrain.compose.compose`."""
    given, typed = take_recipe(overrides, cwd)
    recipe = assets.find_recipe(given, cwd)
    folders = folders_of(recipe, cwd)
    parsed = _displacing(messages.parse_overrides(typed, given))
    merged = [override for override in parsed if not _is_stages(override)]
    hydras = [words.for_hydra(override) for override in merged]
    _check_extension(recipe.name, [recipe.path], folders)
    context = messages.Context(recipe.name, recipe.path, folders, parsed)
    with _initialized(folders) as others:
        schema.register(optimizer_by_group=True)
        try:
            elements = _elements(recipe.path.stem, [*hydras, others])
            _check_schema_first(elements, recipe)
            if not any(sources.stem(element) in schema.OPTIMIZER_SCHEMAS for element in elements):
                schema.register(optimizer_by_group=False)
            composed = hydra_compose(recipe.path.stem, [*hydras, others])
            others_too = [w for w, o in zip(hydras, merged, strict=True) if o.key_or_group != "optimizer"]
            switched = len(others_too) < len(hydras) and _options_of("optimizer", elements) != _options_of(
                "optimizer", _elements(recipe.path.stem, [*others_too, others])
            )
        except messages.FOREIGN as error:
            raise ConfigError(messages.explain(error, context)) from error
    if OmegaConf.get_type(composed) is not RunConfig:
        raise ConfigError(_no_schema(recipe))
    _replace_stages(composed, parsed)
    leaves = dict(sources.leaves_of(OmegaConf.to_container(composed)))
    parts = sources.parts_of(elements, folders, read_yaml)
    _refuse_hydras_own(parts)
    setters = sources.sources_of(leaves, parts, parsed)
    typed_keys = [override.key_or_group for override in parsed]
    if switched:
        files = [part.leaves for part in parts if sources.stem(part.element).startswith("optimizer/")]
        own.drop_left_over(composed, setters, typed_keys, files[-1] if files else {})
    own.settle(composed, setters, typed_keys)
    _settle_keys(composed, setters, parsed)
    leaves = dict(sources.leaves_of(OmegaConf.to_container(composed)))
    leaves |= sources.keep_text(composed, leaves, setters, parts, parsed, cwd)
    timed = moment.settle(composed, leaves)
    leaves |= timed
    config = _to_config(composed, leaves)
    _in_their_file("batch.effective", setters, lambda: config.batch.stages)
    validate(config)
    for door in doors.SHIPPED:
        _in_their_file(door, setters, functools.partial(doors.nodes_of, door, getattr(config, door)))
    settled, references = settle(composed)
    return Composed(
        config=config,
        recipe=recipe.name,
        recipe_file=recipe.path,
        overrides=typed,
        yaml=OmegaConf.to_yaml(settled),
        leaves=leaves,
        sources={key: setters[key] for key in leaves},
        shadows=recipe.shadows,
        remarks=sources.remarks(parts, setters, folders),
        timed=tuple(timed),
        references=references,
    )


BEFORE: dict[str, Any] = {"norm": "torch"}
"""What a run trains with whose stored configuration is of a version without the key, if not with the default."""


def reload(path: Path, overrides: Sequence[str], values: Mapping[str, Any]) -> Reloaded:
    """See `gatrain.compose.reload`."""
    parsed = _displacing(messages.parse_overrides(overrides))
    stored = read_yaml(path)
    words.check_file(path, "", dict(sources.leaves_of(OmegaConf.to_container(stored))), path.parent)
    name = _optimizer_name(stored)
    if name not in schema.OPTIMIZERS:
        raise ConfigError(f"{path}: optimizer.name={name} is not one of {', '.join(schema.OPTIMIZERS)}.")
    context = messages.Context(path.stem, path, [path.parent], parsed)
    try:
        merged = OmegaConf.merge(_schema_for(stored, name), stored)
    except messages.FOREIGN as error:
        raise ConfigError(messages.explain(error, context)) from error
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)
    for override in parsed:
        try:
            is_merged = not _is_stages(override)
            OmegaConf.update(merged, override.key_or_group, override.value(), merge=is_merged)
        except messages.FOREIGN as error:
            raise ConfigError(messages.explain_override(override, error, context)) from error
    for key, value in values.items():
        OmegaConf.update(merged, key, value, merge=False)
    config = _to_config(merged, dict(sources.leaves_of(OmegaConf.to_container(merged))))
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(str(error) if parsed or values else f"{path}: {error}") from None
    settled, references = settle(merged)
    return Reloaded(
        config=config,
        yaml=OmegaConf.to_yaml(settled),
        leaves=dict(sources.leaves_of(OmegaConf.to_container(settled))),
        references=references,
    )


def resolve_again(yaml: str, references: Mapping[str, str]) -> dict[str, Any]:
    """See `gatrain.compose.resolve_again`."""
    stored = OmegaConf.create(yaml)
    assert isinstance(stored, DictConfig)
    typed = OmegaConf.merge(_schema_for(stored, _optimizer_name(stored)), stored)
    assert isinstance(typed, DictConfig)
    return settle_again(typed, references)


def _optimizer_name(stored: DictConfig) -> str:
    section = stored.get("optimizer") if "optimizer" in stored else None
    return str(section.get("name", "adamw")) if isinstance(section, DictConfig) else "adamw"


def _schema_for(stored: DictConfig, optimizer: str) -> DictConfig:
    """The schema that a stored configuration is merged into."""
    before = {key: value for key, value in BEFORE.items() if key not in stored}
    return own.opened(schema.thawed(RunConfig(optimizer=schema.OPTIMIZERS[optimizer](), **before)), stored)


def take_recipe(overrides: Sequence[str], cwd: Path) -> tuple[str, list[str]]:
    """Split the words into the recipe's name (or path) and the others.

    Raises:
        ConfigError: no ``recipe=``, several, or an empty one.
    """
    for word in overrides:
        if not word.isprintable() and any("\ud800" <= each <= "\udfff" for each in word):
            with suppress(UnicodeDecodeError):
                readable = os.fsencode(word).decode("utf-8")
                raise ConfigError(
                    f"'{readable}' cannot be read: the encoding that Python takes from the environment is "
                    f"{sys.getfilesystemencoding()}. Type export LC_ALL=C.UTF-8 PYTHONUTF8=1, then the same again."
                )
            raise ConfigError(
                f"{word!r} holds bytes that are not UTF-8, which no file of a run can keep. Rename that file or "
                "folder, or name it through a link."
            )
    given, others = split_recipe(overrides)
    names = [recipe.name for recipe in assets.list_recipes(cwd)]
    known = ", ".join(names) or "none"
    for nth, word in enumerate(others):
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(messages.no_override(word, others[nth + 1 : nth + 2], names, cwd))
    if not given:
        meant = next((word for word in others if word.lower().startswith("recipe=")), None)
        hint = f" Did you mean 'recipe={meant.partition('=')[2]}'?" if meant else ""
        raise ConfigError(f"no recipe is given. Add recipe=NAME.{hint} Known recipes: {known}.")
    if len(given) > 1:
        listed = " and ".join(f"recipe={name}" for name in given)
        raise ConfigError(f"{listed} are both given. Keep one of them.")
    if not given[0]:
        raise ConfigError(f"'recipe=' has no name after it. Known recipes: {known}.")
    return given[0], others


_EITHER_OR = {
    "train.steps": "train.epochs=null",
    "train.epochs": "train.steps=null",
    "schedule.warmup_steps": "schedule.warmup_samples=null",
    "schedule.warmup_samples": "schedule.warmup_steps=0",
    "schedule.decay_steps": "schedule.decay_samples=null",
    "schedule.decay_samples": "schedule.decay_steps=null",
    "schedule.milestones": "schedule.milestone_samples=null",
    "schedule.milestone_samples": "schedule.milestones=null",
}


def _displacing(parsed: list[Override]) -> list[Override]:
    """Let a key of the command line displace the recipe's other way of saying the same.

    ``train.steps=5`` for a recipe that counts epochs means five steps. Both together stay a conflict.
    """
    given = {override.key_or_group for override in parsed}
    displaced = []
    for override in parsed:
        other = _EITHER_OR.get(override.key_or_group)
        if other and other.partition("=")[0] not in given and override.value() is not None:
            displaced += messages.parse_overrides([other])
    return [*parsed, *displaced]


def _is_stages(override: Override) -> bool:
    """Typed stages of the batch, which take the place of a recipe's: merged, as Hydra merges mappings, they would
    be stages that nobody wrote together."""
    return override.key_or_group == "batch.effective" and isinstance(override.value(), dict)


def _replace_stages(composed: DictConfig, parsed: list[Override]) -> None:
    for override in filter(_is_stages, parsed):
        OmegaConf.update(composed, "batch.effective", override.value(), merge=False)


def _refuse_hydras_own(parts: Sequence[sources.Part]) -> None:
    """Hydra merges what a file says of Hydra itself elsewhere, where nothing here reads it."""
    for part in parts:
        for key in part.leaves:
            if sources.is_below("hydra", key):
                raise ConfigError(f"{part.path}: {key}: {messages.HYDRAS_OWN}")


def _in_their_file(key: str, setters: Mapping[str, str], check: Callable[[], object]) -> None:
    """Check a value whose type the schema leaves open; name the file that gives it."""
    try:
        check()
    except ConfigError as error:
        whose = [setters[each] for each in setters if sources.is_below(key, each)]
        files = [each for each in whose if each not in (COMMAND_LINE, DEFAULT)]
        raise ConfigError(f"{files[0]}: {error}" if files else str(error)) from None


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: names the file and the line.
    """
    try:
        bounds.check(path)
        loaded = OmegaConf.load(path)
    except (messages.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(messages.unreadable(path, error)) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: the top level must be keys with values, not a list.")
    return loaded


def _check_schema_first(elements: list[ResultDefault], recipe: assets.Recipe) -> None:
    names = [element.config_path for element in elements]
    if "schema" not in names:
        raise ConfigError(_no_schema(recipe))
    if names[0] != "schema":
        raise ConfigError(
            f"{recipe.path}: '- schema' must be the first line of the defaults list; "
            f"after '{names[0]}' it would reset the values given there."
        )


def _no_schema(recipe: assets.Recipe) -> str:
    return (
        f"{recipe.path}: the recipe does not use gatrain's schema, so a misspelt key would go unseen. "
        "Begin its defaults list with '- base' (or '- schema'): defaults: [base, ..., _self_]."
    )


def _check_extension(name: str, chain: list[Path], folders: list[Path]) -> None:
    """Refuse a recipe that extends itself, directly or in a circle: Hydra would recurse for ever."""
    defaults = read_yaml(chain[-1]).get("defaults", [])
    if defaults != [] and not OmegaConf.is_list(defaults):
        raise ConfigError(f"{chain[-1]}: 'defaults' must be a list, such as: defaults: [schema, _self_].")
    for entry in defaults:
        if not isinstance(entry, str) or entry in ("schema", "_self_"):
            continue
        parent = entry.split("@")[0].removeprefix("/").removesuffix(".yaml")
        path = next((p for folder in folders if (p := folder / f"{parent}.yaml").is_file()), None)
        if path in chain:
            if len(chain) == 1:
                raise ConfigError(
                    f"{path}: recipe '{name}' extends itself: '{entry}' in its defaults list is this file. "
                    f"Rename yours, for example to my_{path.name}, and keep '{entry}' in its list."
                )
            circle = " -> ".join(p.stem for p in [*chain, chain[chain.index(path)]])
            raise ConfigError(f"{chain[0]}: recipes extend each other in a circle: {circle}.")
        if path is not None:
            _check_extension(name, [*chain, path], folders)


# --- Hydra ----------------------------------------------------------------------------------------------


@contextmanager
def _initialized(folders: list[Path]) -> Iterator[str]:
    """Start Hydra at the first folder; yield the override that adds the others in order."""
    quoted = ",".join(QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders[1:])
    with initialize_config_dir(str(folders[0]), job_name="gatrain", version_base="1.3"), catch_warnings():
        # what a recipe says itself then counts last, which is what everybody means who leaves _self_ out
        filterwarnings("ignore", "(?s).*Defaults list is missing `_self_`", UserWarning)
        yield f"hydra.searchpath=[{quoted}]"


def _options_of(group: str, elements: list[ResultDefault]) -> list[str]:
    return [stem for each in elements if (stem := sources.stem(each)).startswith(f"{group}/")]


def _elements(recipe: str, hydras: list[str]) -> list[ResultDefault]:
    """Return what the recipe's defaults list comes to, in the order of merging."""
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(recipe, hydras, RunMode.RUN).defaults
    return [element for element in defaults if not (element.config_path or "").startswith("hydra/")]


# --- typed result ---------------------------------------------------------------------------------------


def _settle_keys(
    node: DictConfig, setters: Mapping[str, str], parsed: list[Override], prefix: str = ""
) -> None:
    """Refuse keys that a typed section does not have; drop those of an optimizer that was switched away.

    Such keys come from ``+key=value``, which forces its way in, and from the optimizer sections of recipes.
    """
    declared = OmegaConf.get_type(node)
    if declared is None or not dataclasses.is_dataclass(declared):
        return
    known = {item.name for item in dataclasses.fields(declared)}
    switched = any(override.key_or_group == "optimizer" for override in parsed)
    for name in list(node):
        key, full_key = str(name), f"{prefix}{name!s}"
        if key in known:
            held = node._get_node(key)
            if isinstance(held, DictConfig) and not held._is_none() and not held._is_missing():
                _settle_keys(held, setters, parsed, f"{full_key}.")
            continue
        word = next((o.input_line for o in parsed if o.key_or_group == full_key), None)
        owner = next((o for o, cls in schema.OPTIMIZERS.items() if key in cls.__dataclass_fields__), None)
        if prefix == "optimizer." and owner is not None and switched and word is None:
            del node[key]
            continue
        where = f"'{word}'" if word else next((setters[k] for k in setters if k.startswith(full_key)), prefix)
        if prefix == "optimizer." and owner is not None:
            raise ConfigError(f"{where}: {full_key} is a key of optimizer={owner}, which is not chosen here.")
        raise ConfigError(f"{where}: {messages.unknown_key(full_key, sorted(known), None)}")


def _to_config(composed: DictConfig, leaves: Mapping[str, Any]) -> RunConfig:
    for key, value in leaves.items():
        if resolver := moment.foreign(value):
            raise ConfigError(messages.no_resolver(f"{key}={value}", resolver))
    missing = [key for key, value in leaves.items() if value == MISSING]
    if missing:
        raise ConfigError(messages.missing_values(missing))
    try:
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(messages.explain_resolution(error, leaves)) from error
    assert isinstance(config, RunConfig)
    config = own.typed(config)
    secrets.note("", dataclasses.asdict(config))  # from here on no message or log of this process shows them
    expected = schema.OPTIMIZERS.get(config.optimizer.name)
    if expected is not None and config.optimizer.node is None and type(config.optimizer) is not expected:
        name = config.optimizer.name
        raise ConfigError(
            f"optimizer.name={name} does not change the optimizer. Type optimizer={name} instead."
        )
    typed: RunConfig = _with_tuples(config)
    return typed


def _with_tuples(instance: Any, prefix: str = "") -> Any:
    """Give tuple fields real tuples (OmegaConf has only lists) and check their lengths."""
    hints = typing.get_type_hints(type(instance))
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(instance):
        value = getattr(instance, item.name)
        if dataclasses.is_dataclass(value):
            changes[item.name] = _with_tuples(value, f"{prefix}{item.name}.")
        elif typing.get_origin(hints[item.name]) is tuple:
            wanted = len(typing.get_args(hints[item.name]))
            if len(value) != wanted:
                shown = ",".join(map(str, value))
                raise ConfigError(f"{prefix}{item.name}=[{shown}] is not a list of {wanted} numbers.")
            changes[item.name] = tuple(value)
    return dataclasses.replace(instance, **changes)
