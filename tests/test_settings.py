"""Settings are told once and shown where people look: `--help`, completion, editors, `gatrain show`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gatrain import assets
from gatrain.cli import COMMANDS, settings_help, views
from gatrain.compose import compose
from gatrain.json_schema import recipe_schema
from gatrain.settings import settings

ROOT = Path(__file__).parent.parent


def gatrain(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gatrain", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)


def test_every_setting_has_a_meaning() -> None:
    assert not [each.key for each in settings() if not each.text]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_and_the_settings(command: str) -> None:
    text = gatrain(command, "--help", COLUMNS="80", TERM="dumb").stdout
    assert settings_help.EXAMPLES[command] in text
    assert ("batch.micro  (auto | whole number; auto)" in text) == (command in settings_help.READS)
    assert max(map(len, text.splitlines())) <= 80


def test_examples_of_the_help_compose() -> None:
    for command in ("fit", "launch", "autotune", "plan", "verify", "show", "doctor"):
        words = settings_help.EXAMPLES[command].split()
        compose([word for word in words if "=" in word])


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("recipe=vi", ["recipe=vision"]),
        ("batch.m", ["batch.micro="]),
        ("batch.effective", ["batch.effective=", "batch.effective_by="]),
        ("precision=b", ["precision=bf16"]),
        ("optimizer=s", ["optimizer=sgd"]),
        ("nothing=", []),
    ],
)
def test_the_shell_completes_recipes_keys_and_values(typed: str, offered: list[str], tmp_path: Path) -> None:
    done = gatrain(_GATRAIN_COMPLETE="complete_bash", COMP_WORDS=f"gatrain fit {typed}", COMP_CWORD="2")
    assert (done.returncode, done.stdout.split()) == (0, offered)


def test_the_script_of_the_shell_can_be_shown() -> None:
    done = gatrain("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_GATRAIN_COMPLETE=complete_bash" in done.stdout


def problems(recipe: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.message for error in jsonschema.Draft7Validator(recipe_schema()).iter_errors(recipe)]


@pytest.mark.parametrize("name", [recipe.name for recipe in assets.list_recipes(ROOT)])
def test_the_schema_takes_every_shipped_recipe(name: str) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    assert problems(recipe) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"batch": {"efective": 3}},
        {"batch": {"effective": "many"}},
        {"precision": "fp8"},
        {"train": {"nonfinite": "ignore"}},
        {"trian": {}},
    ],
)
def test_the_schema_refuses_what_is_no_setting(recipe: dict[str, Any]) -> None:
    assert problems(recipe)


def test_the_schema_is_printed_as_json() -> None:
    assert json.loads(gatrain("schema").stdout) == recipe_schema()


@pytest.mark.parametrize("name", [recipe.name for recipe in assets.list_recipes(ROOT)])
def test_show_fits_eighty_columns_and_folds_no_word(name: str) -> None:
    composed = compose([f"recipe={name}", *(["data.path=images"] if name == "resnet50" else [])])
    lines = views.config_lines(composed, 80)
    assert max(map(len, lines[1:])) <= 80
    words = {word for line in lines for word in line.split()}
    for key, value in composed.leaves.items():
        assert key in words
        assert set(views._value(value).split()) <= words
