"""What went wrong while composing, in the user's words: what was given, what is allowed, what to type."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from gatrain import settings
from gatrain.commands import typed
from gatrain.compose import defaults_list, schema, words
from gatrain.compose.declared import Text
from gatrain.config import OPEN_NODES, RunConfig
from gatrain.errors import ConfigError, nearest, typed_key
from gatrain.secrets import REDACTED

YAMLError: type[Exception] = yaml.YAMLError

FOREIGN = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    UnicodeDecodeError,
    RecursionError,
    OSError,
    ValueError,
    AssertionError,
)
"""What Hydra, OmegaConf and PyYAML raise for a wrong input."""


HYDRAS_OWN = (
    "Hydra's own settings are not used here. The run folder is run.dir=FOLDER, and ./recipes and ./conf are "
    "searched by themselves."
)


@dataclass(frozen=True)
class Context:
    """What was being composed when it failed."""

    recipe: str
    recipe_file: Path
    folders: list[Path]
    overrides: list[Override]


def parse_overrides(given: Sequence[str], recipe: str | None = None) -> list[Override]:
    """Parse override words, refusing what gatrain has no use for.

    Args:
        recipe: the recipe that they belong to, for a command to type.

    Raises:
        ConfigError: not an override, a sweep, a setting of Hydra's own, or unreadable syntax.
    """
    whole = [f"recipe={recipe}", *given] if recipe is not None else []
    return [_parse_override(word, whole) for word in given]


def _parse_override(word: str, whole: Sequence[str]) -> Override:
    key, equals, value = word.partition("=")
    if not equals and not word.startswith("~"):
        raise ConfigError(f"'{word}' is not an override. Write key=value, for example {word or 'key'}=VALUE.")
    name = key.lstrip("+~")
    if not name.strip():
        raise ConfigError(f"'{word}' has no key before the '='. Write key=value.")
    if name == "recipe":
        raise ConfigError(f"'{word}': write recipe={value or 'NAME'}, without a sign before it.")
    if name == "hydra" or name.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"'{word}': {HYDRAS_OWN}")
    if (dotted := typed_key(key)) != key:
        typed = shlex.quote(f"{dotted}{equals}{value}")
        raise ConfigError(f"'{word}': the number of a list's item stands after a dot here. Write {typed}.")
    if REDACTED in word:
        raise ConfigError(
            f"'{word}': {REDACTED} stands for a secret that was not kept. Give the value itself."
        )
    try:
        override = words.parse(word)
    except (HydraException, OverrideParseException) as error:
        if pair := _pair(name, value):
            raise ConfigError(
                f"'{word}': {name} takes a list. Write {shlex.quote(f'{key}={pair}')}."
            ) from error
        raise ConfigError(
            f"cannot read the override '{word}'. {_syntax(error)}"
            f"Put a value with special characters in quotes: {_quoted_form(key, value)}."
        ) from error
    if override.package is not None:
        group = override.key_or_group
        raise ConfigError(
            f"'{word}': a group is switched by its name alone. Write {group}={value or 'NAME'}."
        )
    if override.is_delete() and override.key_or_group.split(".")[0] not in OPEN_NODES:
        raise ConfigError(
            f"'{word}': only keys of {', '.join(OPEN_NODES)} can be removed. Give {name}=VALUE instead."
        )
    if override.is_sweep_override():
        raise ConfigError(_several(word, key, value, whole))
    return override


def no_override(word: str, following: Sequence[str], recipes: Sequence[str], cwd: Path) -> str:
    """For a word of the command line without ``=``: what else it may be.

    Args:
        following: the word after it, if any.
    """
    text = f"'{word}' is not an override: those are written KEY=VALUE."
    key, colon, value = word.partition(":")
    if key in schema.dotted_keys() and (colon or (following and "=" not in following[0])):
        return f"{text} Did you mean {shlex.quote(f'{key}={value.strip() if colon else following[0]}')}?"
    if (cwd / Path(word).expanduser() / "config.yaml").is_file():
        return (
            f"'{word}' is a run folder, and a recipe belongs here.\nTo go on with the run: "
            f"{typed('resume', word)}\nTo see how it went: {typed('show', word)}"
        )
    return text + nearest(word, recipes).replace("Did you mean '", "Did you mean 'recipe=")


def _several(word: str, key: str, value: str, whole: Sequence[str]) -> str:
    """For ``key=a,b`` and ``key=choice(a,b)``: what else may be meant, and a loop that runs them all."""
    name = key.lstrip("+~")
    if pair := _pair(name, value):
        return (
            f"'{word}' lists several values, and {name} takes a list. Write {shlex.quote(f'{key}={pair}')}."
        )
    text = f"'{word}' lists several values, and gatrain runs one configuration at a time."
    is_call = re.match(r"\w+\(", value) is not None
    if schema.hint_of(name) is None and not is_call:
        as_list = shlex.quote(f"{key}=[{value}]")
        text += f" Give one value, a list as {as_list}, or text with commas as {_quoted_form(key, value)}."
    elif not is_call and (words.of_schema(name) or Text()).itself:
        text += f" Give one value, or text with commas as {_quoted_form(key, value)}."
    loop = words.as_loop(whole)
    return f"{text} To run them one after another: {loop}" if loop else text


def _pair(name: str, value: str) -> str | None:
    """The list that is meant where a key of the schema takes one."""
    inner = value.strip().strip("()[]")
    is_list = typing.get_origin(schema.hint_of(name)) is tuple and "(" not in inner
    return f"[{inner}]" if is_list and "," in inner else None


def _syntax(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else ""
    if re.search(r"expecting|LexerNoViableAlt|token recognition|extraneous|no viable", first):
        return "Its brackets, braces or quotes do not close, or a character has a meaning of its own. "
    return f"{first.rstrip('.')}. " if first else ""


def _quoted_form(key: str, value: str) -> str:
    escaped = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def unreadable(path: Path, error: Exception) -> str:
    """Say why a YAML file cannot be read, with its line where that is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{path}, line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {error.problem}."
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
    if isinstance(error, yaml.YAMLError):
        first = (str(error).splitlines() or [""])[0]
        return f"{path}: not valid YAML: {first}."
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{path} cannot be read: {reason}."


def missing_values(keys: Sequence[str]) -> str:
    """Ask for the values that a recipe leaves to the user (``???``)."""
    examples = " ".join(f"{key}={_example(key)}" for key in keys)
    plural = len(keys) > 1
    return (
        f"{', '.join(keys)} {'have' if plural else 'has'} no value, and the recipe needs one. Add {examples}."
    )


def _example(key: str) -> str:
    last = key.rsplit(".", 1)[-1].lower()
    if any(part in last for part in ("path", "dir", "root", "folder", "file")):
        return "/path/to/" + key.split(".")[0]
    return "VALUE"


_CHOICE = r"You must specify '([^']+)'|Multiple values for ([^. ]+)|(\w+) appears more than once"


def explain(error: Exception, context: Context) -> str:
    """Turn an error of composition into one message."""
    if isinstance(error, RecursionError):
        return f"{context.recipe_file}: its defaults lists refer to each other in a circle."
    if isinstance(error, MissingConfigException):
        return _missing_config(error, context)
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OmegaConfBaseException):
        inner = inner.__cause__ or inner.__context__
    override = _override_of(error, context.overrides)
    if override is not None:
        return explain_override(override, inner, context)
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError | OSError):
        return unreadable(_broken_file(error, context), error)
    where = _file_of(error, context)
    if text := defaults_list.explain(f"{error}\n{inner}", context.folders):
        return f"{where}: {text}"
    if isinstance(inner, OmegaConfBaseException):
        return f"{where}: {_value_or_key(inner)}"
    choice = re.search(_CHOICE, str(error))
    if choice and choice.group(1):
        group = choice.group(1)
        return (
            f"{where}: {group} must be chosen. Add {group}=NAME, one of: {_listed_options(group, context)}."
        )
    if choice:
        group = choice.group(2) or choice.group(3)
        if any(override.key_or_group == group for override in context.overrides):
            return (
                f"{where}: {group} is chosen more than once. To switch it, write {group}=NAME without a plus."
            )
        return (
            f"{where}: its defaults list and what it extends both choose {group}. To switch it there, write "
            f"'- override /{group}: NAME'."
        )
    for override in context.overrides:
        if "Config group override must be" in str(error) and not isinstance(override.value(), str | list):
            group = override.key_or_group
            if listed := _listed_options(group, context):
                return f"'{override.input_line}': {group} is chosen by name, one of: {listed}."
    return f"{where}: {_plain(str(error))}"


def explain_resolution(error: Exception, leaves: Mapping[str, Any]) -> str:
    """Turn an error of resolving ``${...}`` into one message."""
    full_key = getattr(error, "full_key", None) or "the configuration"
    value = leaves.get(full_key)
    given = f"{full_key}={value}" if value is not None else full_key
    text = _plain(str(error))
    variable = re.search(r"Environment variable '([^']+)' not found", text)
    if variable:
        name = variable.group(1)
        return f"{given}: the environment variable {name} is not set. Set it: export {name}=VALUE."
    if "Recursive interpolation" in text:
        return f"{given} refers to itself. Give it a value."
    absent = re.search(r"Interpolation key '([^']+)' not found", text)
    if absent:
        name = absent.group(1)
        return f"{given}: there is no key '{name}' to refer to.{nearest(name, leaves)}"
    unknown = re.search(r"Unsupported interpolation type (\S+)", text)
    if unknown:
        return no_resolver(given, unknown.group(1))
    if "mismatched input" in text or "extraneous" in text or "no viable" in text:
        return f"{given}: the ${{...}} is not complete. Use ${{key}} or ${{oc.env:VARIABLE}}."
    if isinstance(error, ValidationError):
        return _value_or_key(error)
    return f"{given}: {text}"


def no_resolver(given: str, resolver: str) -> str:
    """For a reference that nothing here can answer."""
    return f"{given}: there is no resolver '{resolver}'. Use ${{key}}, ${{oc.env:VARIABLE}} or ${{now:%Y-%m-%d}}."


# --- where and what -------------------------------------------------------------------------------------


def _missing_config(error: MissingConfigException, context: Context) -> str:
    wanted = error.missing_cfg_file or ""
    where = _file_of(error, context)
    group, _, option = str(wanted).removesuffix(".yaml").rpartition("/")
    if not group:
        known = sorted({path.stem for folder in context.folders for path in folder.glob("*.yaml")})
        return (
            f"{where}: its defaults list names '{option}', and there is no such recipe."
            f"{nearest(option, known)} Known: {', '.join(known)}."
        )
    options = _options(group, context.folders)
    if not options:
        groups = sorted({p.name for folder in context.folders for p in folder.iterdir() if p.is_dir()})
        hint = nearest(group, groups)
        return f"{where}: its defaults list names '{wanted}', and there is no group '{group}'.{hint}"
    given = f"{group}={option}"
    return f"{given}: there is no such option.{nearest(option, options)} Known options: {', '.join(options)}."


def _listed_options(group: str, context: Context) -> str:
    return ", ".join(_options(group, context.folders))


def _options(group: str, folders: Iterable[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _override_of(error: Exception, overrides: list[Override]) -> Override | None:
    """Find the word of the command line that an error is about."""
    text = str(error)
    for override in overrides:
        if text and f"Error merging override {words.for_hydra(override)}" == text.splitlines()[0]:
            return override
    for override in overrides:
        if re.match(
            rf"Could not (override|delete|append).*{re.escape(override.key_or_group)}\b", text, re.DOTALL
        ):
            return override
        if override.input_line and text.startswith(f"Override {words.for_hydra(override)} looks like"):
            return override
    return None


def explain_override(override: Override, inner: BaseException | None, context: Context) -> str:
    """Say what is wrong with one word of the command line; ``inner`` is what OmegaConf found."""
    word, key = override.input_line or "", override.key_or_group
    if override.is_delete():
        return (
            f"'{word}': '{key}' is not there, or cannot be removed. Keys of model, data, loss and task can."
        )
    if isinstance(inner, ConfigKeyError | ConfigAttributeError):
        return f"'{word}': {_unknown_key(inner, word)}"
    if isinstance(inner, OmegaConfBaseException) and "list index out of range" not in str(inner):
        text = _value_or_key(inner)
        return text if text.startswith(word) else f"'{word}': {text}"
    options = _options(key, context.folders)
    if "list index out of range" in str(inner or ""):
        whole, _, _ = key.rpartition(".")
        typed = shlex.quote(f"{whole}=[{word.partition('=')[2]}]")
        return f"'{word}': the list {whole} has no such item. Write the whole list: {typed}."
    if options:
        return (
            f"'{word}': recipe '{context.recipe}' does not choose {key} from a group, so there is nothing to "
            f"switch. Override single keys ({key}.NAME=VALUE) or list '- {key}: {options[0]}' in defaults."
        )
    if "already at" in str(inner or "") or override.is_add():
        return f"'{word}': '{key}' is there already. Leave out the plus sign: {word.lstrip('+')}."
    everywhere = schema.dotted_keys()
    return f"'{word}': there is no key '{key}'.{nearest(key, everywhere)}"


def _value_or_key(error: OmegaConfBaseException) -> str:
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(error, None)
    full_key = error.full_key or (str(error.key) if error.key is not None else "")
    section = re.match(r"Merge error: \w+ is not a subclass of (\w+)", str(error))
    if section:  # OmegaConf does not say which key it was
        hints = typing.get_type_hints(RunConfig).items()
        full_key = next((key for key, hint in hints if getattr(hint, "__name__", "") == section.group(1)), "")
    hint = schema.hint_of(full_key)
    sentence = _plain(error.msg or str(error))
    if hint is None:
        return f"{full_key}: {sentence}" if full_key else sentence
    given = error.value
    shown = f"{full_key}={given}" if isinstance(given, str | int | float | bool) else full_key
    if re.search(
        r"could not be converted|is not a subclass of|is not Optional", sentence
    ):  # says the same in other words
        sentence = ""
        if isinstance(given, float) and given.is_integer() and "whole number" in settings.describe(hint):
            sentence = f" Write {full_key}={int(given)}."
    else:
        sentence = f" ({sentence}.)"
    return f"{shown} does not fit: {full_key} takes {settings.describe(hint)}.{sentence}"


def _unknown_key(error: OmegaConfBaseException, word: str | None) -> str:
    full_key = str(error.full_key or error.key)
    parent = full_key.rpartition(".")[0]
    if word is None and "." in (written := str(error.key)):
        first, *inner = written.split(".")
        nested = "".join(f"{{{each}: " for each in inner) + "VALUE" + "}" * len(inner)
        return f"'{written}' is no key: in a file, its parts stand below each other. Write {first}: {nested}."
    node = error.parent_node
    siblings = (
        sorted(str(key) for key in node) if isinstance(node, DictConfig) and not node._is_none() else []
    )
    return unknown_key(full_key, [key for key in siblings if parent or key != "hydra"], word)


def unknown_key(full_key: str, siblings: Sequence[str], word: str | None) -> str:
    """Say that a key does not exist, with the nearest that does and all of its level."""
    parent, _, last = full_key.rpartition(".")
    if parent and not siblings:
        return f"there is no key '{last}' below {parent}: {parent} is a single value."
    place = f"in {parent}" if parent else "at the top level"
    suggestion = nearest(last, siblings)
    if suggestion and parent:
        suggestion = suggestion.replace("Did you mean '", f"Did you mean '{parent}.")
    elsewhere = [key for key in schema.dotted_keys() if key.rsplit(".", 1)[-1] == last and key != full_key]
    if not suggestion and not elsewhere:
        elsewhere = [key for key in schema.dotted_keys() if _with_dots(key) == _with_dots(full_key)]
    if not suggestion and elsewhere:
        suggestion = f" Did you mean '{elsewhere[0]}'?"
    if full_key == "optimizers":
        suggestion = (
            " Several optimizers are phases of a task: gradient=phases, and 'optimizer.phases={critic: {lr: 2e-4}, "
            "actor: {lr: 1e-4}}'."
        )
    text = f"there is no key '{last}' {place}.{suggestion} Known keys: {', '.join(siblings)}."
    is_open = full_key.split(".")[0] in OPEN_NODES and "." in full_key
    if is_open and word is not None:
        text += f" To pass a further argument to the _target_, write {shlex.quote('+' + word.lstrip('+'))}."
    return text


def _with_dots(key: str) -> str:
    """A key with dots for other signs between its parts: ``batch_effective``, ``batch/effective``."""
    return re.sub(r"[_/:-]", ".", key)


def _file_of(error: BaseException, context: Context) -> str:
    """Find the file that Hydra's text names as a config path (``In 'optimizer/sgd': ...``)."""
    named = re.match(r"In '([^']+)'", str(error))
    if named:
        name = f"{named.group(1).removesuffix('.yaml')}.yaml"
        for folder in context.folders:
            if (folder / name).is_file():
                return str(folder / name)
    return str(context.recipe_file)


def _broken_file(error: Exception, context: Context) -> Path:
    mark = getattr(error, "problem_mark", None)
    name = getattr(mark, "name", None) or getattr(error, "filename", None)
    if name and Path(name).is_file():
        return Path(name)
    for folder in context.folders:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return path
    return context.recipe_file


def _plain(text: str) -> str:
    """Drop the lines that speak of OmegaConf's and Hydra's machinery."""
    noise = re.compile(
        r"^\s*(full_key:|object_type=|reference_type=|Config search path|provider=|set env var|See http)"
    )
    lines = [line.strip() for line in text.splitlines() if line.strip() and not noise.match(line)]
    joined = " ".join(lines)
    joined = re.sub(r"^In '[^']+': (\w+ raised while composing config:)?\s*", "", joined)
    joined = re.sub(r"\w+ raised while resolving interpolation: ", "", joined)
    return joined.rstrip(".")
