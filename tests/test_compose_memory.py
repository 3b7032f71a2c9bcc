"""Compositions that are remembered: the same as composed anew, and nothing private is kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatrain import assets
from gatrain.compose import Composed, compose, memory
from gatrain.compose.memory import compose_remembered
from gatrain.config import AdamWConfig, RunConfig, SGDConfig
from gatrain.errors import ConfigError
from gatrain.secrets import redact_value

RECIPE = """
defaults: [base, _self_]
model: {_target_: torch.nn.Linear, in_features: 2, out_features: 1}
data: {_target_: mine.points}
loss: {_target_: torch.nn.MSELoss}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes/mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


def kept() -> list[Path]:
    return sorted((assets.cache_dir() / "composed").glob("*.json"))


def remembered(*words: str) -> Composed:
    return compose_remembered(words, redact_value)


def only_remembered(monkeypatch: pytest.MonkeyPatch, *words: str) -> Composed:
    """As a second command would get it, which must not compose."""

    def refuse(*given: object) -> Composed:
        raise AssertionError("composed anew")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "compose", refuse)
        return remembered(*words)


@pytest.mark.parametrize(
    "words",
    [
        ("recipe=llm",),
        ("recipe=gpt2", "batch.effective=509", "compile=true"),
        ("recipe=padded", "checkpointing=full"),
        ("recipe=vision", "optimizer=sgd", "optimizer.momentum=0.5"),
        ("recipe=resnet50", "data.path=images", "model.classes=8"),
        ("recipe=mine", "batch.effective=4", "+model.bias=false", "train.steps=null", "train.epochs=2"),
    ],
    ids=lambda words: words[0],
)
def test_what_is_remembered_is_what_is_composed(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = remembered(*words)
    again = only_remembered(monkeypatch, *words)
    assert repr(again) == repr(first) == repr(compose(words))
    assert again == first


@pytest.mark.parametrize("recipe", [recipe.name for recipe in assets.list_recipes(Path("/nonexistent"))])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_shipped_recipe_comes_back(
    recipe: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"recipe={recipe}", f"optimizer={optimizer}", *["data.path=images"] * (recipe == "resnet50")]
    first = remembered(*words)
    again = only_remembered(monkeypatch, *words)
    assert repr(again) == repr(first)
    assert type(again.config.optimizer) is {"adamw": AdamWConfig, "sgd": SGDConfig}[optimizer]


def test_other_words_and_other_folders_are_other_compositions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered("recipe=mine", "batch.effective=4")
    assert remembered("recipe=mine", "batch.effective=5").config.batch.effective == 5
    remembered("recipe=vision")
    assert len(kept()) == 3
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        remembered("recipe=mine", "batch.effective=4")
    remembered("recipe=vision")
    assert len(kept()) == 4


def test_an_edited_or_a_new_file_is_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remembered("recipe=mine").config.model["out_features"] == 1
    (project / "recipes/mine.yaml").write_text(RECIPE.replace("out_features: 1", "out_features: 7"))
    assert remembered("recipe=mine").config.model["out_features"] == 7
    before = remembered("recipe=llm").config.optimizer.lr
    (project / "conf/optimizer").mkdir(parents=True)
    (project / "conf/optimizer/adamw.yaml").write_text("defaults: [base_adamw, _self_]\nweight_decay: 0.77\n")
    (project / "recipes/plain.yaml").write_text(RECIPE)
    assert remembered("recipe=plain").config.optimizer.weight_decay == 0.77
    assert remembered("recipe=llm").config.optimizer.lr == before
    (project / "recipes/llm.yaml").write_text(RECIPE)  # now hides the shipped one
    assert remembered("recipe=llm").config.model["_target_"] == "torch.nn.Linear"
    assert (
        only_remembered(monkeypatch, "recipe=llm").shadows
        == assets.shipped_folder("recipes").resolve() / "llm.yaml"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data: {_target_: mine.points, root: '${oc.env:SOMEWHERE}'}", ()),
        ("data: {_target_: mine.points, api_key: hunter2}", ()),
        ("data: {_target_: mine.points, password: 12345, of: hunter2}", ()),
        ("data: {_target_: mine.points, url: 'https://me:hunter2@example.org/'}", ()),
        ("data: {_target_: mine.points}", ("+data.token=hunter2",)),
        ("data: {_target_: mine.points}", ("+data.root=${oc.env:SOMEWHERE}",)),
    ],
)
def test_what_may_be_private_is_not_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: tuple[str, ...]
) -> None:
    (project / "recipes/mine.yaml").write_text(RECIPE.replace("data: {_target_: mine.points}", line))
    monkeypatch.setenv("SOMEWHERE", "hunter2")
    found = remembered("recipe=mine", *words)
    assert "hunter2" in json.dumps(found.config.data)
    assert kept() == []
    monkeypatch.setenv("SOMEWHERE", "other")
    if "oc.env" in line or any("oc.env" in word for word in words):
        assert remembered("recipe=mine", *words).config.data["root"] == "other"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("defaults: [base, {data: '${oc.env:WHICH}'}, _self_]\nmodel: {_target_: my.net}\n", ()),
        ("defaults: [base, _self_]\nmodel: {_target_: my.net}\n", ("+data=${oc.env:WHICH}",)),
    ],
)
def test_a_choice_of_file_that_asks_the_environment_is_not_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, words: tuple[str, ...]
) -> None:
    (project / "recipes/mine.yaml").write_text(recipe)
    for which, target in (("text", "gatrain.data.TextWindows"), ("digits", "gatrain.data.Digits")):
        monkeypatch.setenv("WHICH", which)
        try:
            assert remembered("recipe=mine", *words).config.data["_target_"] == target
        except ConfigError:
            assert words  # Hydra reads no reference there: an error is as good
        assert kept() == []


def test_files_out_of_the_search_path_are_read_anew(project: Path) -> None:
    (project / "other").mkdir()
    (project / "recipes/mine.yaml").write_text(RECIPE.replace("base,", "base, ../other/part@_global_,"))
    for steps in (5, 6):
        (project / "other/part.yaml").write_text(f"train: {{steps: {steps}}}\n")
        assert remembered("recipe=mine").config.train.steps == steps
    assert kept() == []


def test_a_secret_that_a_later_word_replaces_is_not_kept() -> None:
    words = ("recipe=mine", "+data.url=https://me:hunter2@example.org/", "data.url=plain")
    assert remembered(*words).config.data["url"] == "plain"
    assert kept() == []


def test_what_json_cannot_hold_is_not_kept() -> None:
    words = ("recipe=mine", "+model.table={1:a,2:b}")
    assert remembered(*words).config.model["table"] == {1: "a", 2: "b"}
    assert kept() == []


def test_a_damaged_file_that_is_not_needed_is_no_mistake(project: Path) -> None:
    (project / "recipes/broken.yaml").write_text("a: [${b}\n")
    assert remembered("recipe=mine").recipe == "mine"


def test_an_edit_while_it_is_composed_is_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*given: object) -> Composed:
        (project / "recipes/mine.yaml").write_text(RECIPE + "train: {steps: 7}\n")
        return compose(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(memory, "compose", slow)
        assert remembered("recipe=mine").config.train.steps == 7
    (project / "recipes/mine.yaml").write_text(RECIPE)
    assert remembered("recipe=mine").config.train.steps == 100


@pytest.mark.parametrize("package", ["hydra-core", "omegaconf"])
def test_another_version_composes_anew(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered("recipe=mine")
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99" if name == package else version(name)
    )
    with pytest.raises(AssertionError, match="composed anew"):
        only_remembered(monkeypatch, "recipe=mine")


def test_a_recipe_beside_much_else_is_composed_each_time(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "recipes/mine.yaml").rename(project / "mine.yaml")
    monkeypatch.setattr(memory, "MAX_ENTRIES", 60)
    remembered("recipe=./mine.yaml")
    only_remembered(monkeypatch, "recipe=./mine.yaml")
    (project / "images").mkdir()
    os.symlink(project, project / "images" / "round")
    for number in range(60):
        (project / "images" / str(number)).touch()
    assert remembered("recipe=./mine.yaml").recipe == "mine"
    assert len(kept()) == 1


def test_only_the_newest_are_kept_and_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_FILES", 2)
    for steps in (1, 2, 3):
        remembered("recipe=mine", f"train.steps={steps}")
    assert len(kept()) == 2
    only_remembered(monkeypatch, "recipe=mine", "train.steps=3")

    def full(*given: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "write_text", full)
    assert remembered("recipe=mine", "train.steps=4").config.train.steps == 4
    assert len(kept()) == 2


def test_files_are_the_users_own_and_damage_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    first = remembered("recipe=mine")
    (file,) = kept()
    assert file.stat().st_mode & 0o777 == 0o600
    for text in (
        "",
        "{}",
        "[1]",
        file.read_text()[:-40],
        file.read_text().replace('"effective"', '"effectual"'),
    ):
        file.write_text(text)
        assert remembered("recipe=mine") == first
    monkeypatch.setenv("GATRAIN_CACHE", "/dev/null/nowhere")
    assert remembered("recipe=mine") == first


def test_mistakes_are_told_each_time() -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"batch\.efective|efective"):
            remembered("recipe=mine", "batch.efective=4")
    assert kept() == []


@given(
    st.integers(1, 10**6), st.floats(1e-6, 1.0), st.sampled_from([AdamWConfig(), SGDConfig(nesterov=True)])
)
def test_a_configuration_survives_json(effective: int, lr: float, optimizer: AdamWConfig | SGDConfig) -> None:
    base = RunConfig(optimizer=dataclasses.replace(optimizer, lr=lr))
    config = dataclasses.replace(base, batch=dataclasses.replace(base.batch, effective=effective))
    back = RunConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert back == config
    assert repr(back) == repr(config)


@pytest.mark.parametrize(
    "broken", [{}, {"batch": 3}, None, {"batch": {"effective": "many", "micro": "auto"}}]
)
def test_what_is_no_configuration_is_refused(broken: object) -> None:
    data = broken if not isinstance(broken, dict) or not broken else dataclasses.asdict(RunConfig()) | broken
    with pytest.raises((KeyError, TypeError, ValueError)):
        RunConfig.from_dict(data)  # type: ignore[arg-type]


def test_a_remembered_plan_imports_neither_hydra_nor_torch_and_is_quick(project: Path) -> None:
    words = ["autotune", "recipe=vision", "device=cpu", "batch.effective=2", "tune.max_seconds=5", "--json"]
    first = subprocess.run([sys.executable, "-m", "gatrain", *words], capture_output=True, check=True)
    code = (
        "import sys, atexit; from gatrain.cli import main\n"
        "heavy = ('hydra', 'omegaconf', 'torch', 'numpy', 'yaml')\n"
        "atexit.register(lambda: print({m for m in heavy if m in sys.modules}, file=sys.stderr))\n"
        f"main({words!r})"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert again.stderr.strip().splitlines()[-1] == "set()"
    assert json.loads(again.stdout)["micro_batches"] == json.loads(first.stdout)["micro_batches"]
    assert sorted(seconds)[2] < 0.6
