"""A recipe and overrides become one typed configuration, wherever the files lie, and mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatrain import assets
from gatrain.compose import COMMAND_LINE, DEFAULT, compose, load_config, reload
from gatrain.config import AdamWConfig, RunConfig, SGDConfig
from gatrain.errors import ConfigError

SHIPPED = [recipe.name for recipe in assets.list_recipes(Path("/nonexistent"))]
BODY = "model: {_target_: my.Model}\ndata: {_target_: my.Data}\n"
MINE = f"# My own.\ndefaults: [base, _self_]\n{BODY}"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def cwd(weird_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(weird_tmp_path)
    return weird_tmp_path.resolve()


def needed(recipe: str) -> list[str]:
    """Values that a recipe leaves to the user."""
    return ["data.path=/data"] if recipe == "resnet50" else []


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_composes(recipe: str, cwd: Path) -> None:
    composed = compose([f"recipe={recipe}", *needed(recipe)])
    assert type(composed.config) is RunConfig
    assert composed.config.model["_target_"]
    assert assets.find_recipe(recipe, cwd).description


@pytest.mark.parametrize("recipe", SHIPPED)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_shipped_recipe_can_switch_its_optimizer(recipe: str, name: str, cwd: Path) -> None:
    optimizer = compose([f"recipe={recipe}", f"optimizer={name}", *needed(recipe)]).config.optimizer
    assert type(optimizer) is {"adamw": AdamWConfig, "sgd": SGDConfig}[name]
    assert optimizer.name == name
    if isinstance(optimizer, AdamWConfig):
        assert isinstance(optimizer.betas, tuple)


def test_own_recipe_by_name_and_by_path(cwd: Path) -> None:
    path = write(cwd / "recipes" / "mine.yaml", MINE + "optimizer: {lr: 0.5}\n")
    for given in ("mine", "recipes/mine.yaml", "./recipes/mine.yaml", str(path)):
        composed = compose([f"recipe={given}"])
        assert composed.recipe == "mine"
        assert composed.recipe_file == path
        assert composed.config.optimizer.lr == 0.5


def test_a_path_may_hold_any_character(cwd: Path) -> None:
    path = write(cwd / "it's, [my] ${exp} \\ 100%" / "a recipe, v1.0.yaml", MINE)
    assert compose([f"recipe={path}"]).recipe == "a recipe, v1.0"


def test_own_recipe_extends_a_shipped_one_from_another_folder(cwd: Path) -> None:
    write(cwd / "recipes" / "deep" / "mine.yaml", "defaults: [llm, _self_]\nbatch: {effective: 7}\n")
    config = compose(["recipe=deep/mine"]).config
    assert config.batch.effective == 7
    assert config.model == compose(["recipe=llm"]).config.model


def test_a_part_of_recipes_needs_no_defaults_list(cwd: Path) -> None:
    write(cwd / "recipes" / "common.yaml", "train: {steps: 7}\n")
    write(cwd / "recipes" / "mine.yaml", MINE.replace("base,", "base, common,"))
    assert compose(["recipe=mine"]).config.train.steps == 7


def test_own_recipe_hides_the_shipped_one_and_says_so(cwd: Path) -> None:
    write(cwd / "recipes" / "llm.yaml", MINE)
    composed = compose(["recipe=llm"])
    assert composed.config.model == {"_target_": "my.Model"}
    assert composed.shadows == assets.shipped_folder("recipes") / "llm.yaml"
    listed = {recipe.name: recipe for recipe in assets.list_recipes(cwd)}
    assert listed["llm"].yours
    assert listed["llm"].shadows == composed.shadows
    assert listed["llm"].description == "My own."


def test_own_group_option_is_usable_from_a_shipped_recipe(cwd: Path) -> None:
    write(cwd / "conf" / "model" / "mine.yaml", "_target_: my.Model\nsize: 3\n")
    assert compose(["recipe=llm", "model=mine"]).config.model == {"_target_": "my.Model", "size": 3}


def test_four_lines_with_the_schema_alone_are_a_recipe(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", f"defaults: [schema, _self_]\n{BODY}task: {{_target_: my.Task}}\n")
    config = compose(["recipe=mine", "train.steps=3", "optimizer.betas=[0.8,0.9]"]).config
    assert config.optimizer == AdamWConfig(betas=(0.8, 0.9))


def test_sources_tell_who_set_each_value(cwd: Path) -> None:
    path = write(cwd / "recipes" / "mine.yaml", "defaults: [llm, _self_]\noptimizer: {lr: 0.5}\n")
    composed = compose(["recipe=mine", "train.steps=3", "+model.extra=1", "optimizer=adamw"])
    sources = composed.sources
    assert set(sources) == set(composed.leaves)
    assert sources["optimizer.lr"] == str(path)
    assert sources["train.steps"] == COMMAND_LINE
    assert sources["model.extra"] == COMMAND_LINE
    assert sources["run.dir"] == DEFAULT
    assert sources["model._target_"].endswith("conf/model/gpt.yaml")
    assert sources["optimizer.eps"].endswith("conf/optimizer/adamw.yaml")


def test_hydra_override_forms_work(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", "defaults: [llm, _self_]\n")
    words = ["train={seed:3,log_every:2}", "~model.bias", "+model.list=[1,2]", "++model.layers=9"]
    config = compose(["recipe=mine", *words]).config
    assert (config.train.seed, config.train.log_every) == (3, 2)
    assert "bias" not in config.model
    assert config.model["list"] == [1, 2]
    assert config.model["layers"] == 9


def test_keys_of_an_optimizer_that_was_switched_away_are_dropped(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", "defaults: [llm, _self_]\noptimizer: {betas: [0.5, 0.9], lr: 2}\n")
    composed = compose(["recipe=mine", "optimizer=sgd"])
    assert type(composed.config.optimizer) is SGDConfig
    assert composed.config.optimizer.lr == 2
    assert "optimizer.betas" not in composed.leaves
    refused(["recipe=mine", "optimizer=sgd", "optimizer.betas=[1,1]"], "optimizer=adamw", "betas")
    refused(["recipe=mine", "optimizer.momentum=1"], "optimizer=sgd", "momentum")


def test_steps_on_the_command_line_displace_the_epochs_of_a_recipe(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", MINE + "train: {steps: null, epochs: 3}\n")
    train = compose(["recipe=mine", "train.steps=5"]).config.train
    assert (train.steps, train.epochs) == (5, None)
    with pytest.raises(ConfigError, match="both given"):
        compose(["recipe=mine", "train.steps=5", "train.epochs=1"])


def test_a_secret_is_resolved_for_the_run_and_never_written(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    composed = compose(["recipe=llm", "+data.token=${oc.env:MY_TOKEN}"])
    assert composed.config.data["token"] == "s3cret"
    assert "s3cret" not in composed.yaml
    assert composed.leaves["data.token"] == "${oc.env:MY_TOKEN}"


@pytest.mark.parametrize("recipe", SHIPPED)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_stored_configuration_reads_back_equal(recipe: str, name: str, cwd: Path) -> None:
    composed = compose([f"recipe={recipe}", f"optimizer={name}", *needed(recipe)])
    path = write(cwd / "config.yaml", composed.yaml)
    assert load_config(path) == composed.config


def test_a_stored_configuration_can_be_changed(cwd: Path) -> None:
    path = write(cwd / "config.yaml", compose(["recipe=llm"]).yaml)
    reloaded = reload(path, ["train.steps=7", "save={every:2}"])
    assert (reloaded.config.train.steps, reloaded.config.save.every) == (7, 2)
    path.write_text(reloaded.yaml)
    assert load_config(path) == reloaded.config
    with pytest.raises(ConfigError, match=r"Did you mean 'train\.steps'"):
        reload(path, ["train.stepz=7"])


# --- the rules --------------------------------------------------------------------------------------------


def refused(words: list[str], *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    message = str(caught.value)
    for part in parts:
        assert part in message
    for noise in ("full_key", "object_type", "reference_type", "Traceback", "provider=", "hydra.cc"):
        assert noise not in message


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("optimzer: {lr: 1}", ["optimzer", "Did you mean 'optimizer'?"]),
        ("optimizer: {lrr: 1}", ["lrr", "Did you mean 'optimizer.lr'?"]),
        ("train: {step: 1}", ["step", "Did you mean 'train.steps'?"]),
        ("train: {steps: many}", ["train.steps=many", "a whole number or null"]),
        ("batch: {effective: 1.5}", ["batch.effective=1.5", "a whole number"]),
        ("batch: 3", ["batch", "effective, micro"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas", "2 numbers"]),
        ("data: {x: '${nope.x}'}", ["data.x", "nope.x"]),
        ("data: {x: '${oc.env:GATRAIN_NO_SUCH}'}", ["GATRAIN_NO_SUCH", "export"]),
        ("data: {x: '???'}", ["data.x", "Add data.x=VALUE"]),
        ("data: {val_path: '???'}", ["Add data.val_path=/path/to/data"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_nearest_key(
    body: str, parts: list[str], cwd: Path
) -> None:
    path = write(cwd / "recipes" / "mine.yaml", f"defaults: [llm, _self_]\n{body}\n")
    in_file = [] if "${" in body or "???" in body or "betas" in body else [str(path)]
    refused(["recipe=mine"], *parts, *in_file)


def test_a_mistake_in_a_group_file_names_that_file(cwd: Path) -> None:
    path = write(cwd / "conf" / "optimizer" / "mine.yaml", "defaults: [base_sgd, _self_]\nmomentom: 1\n")
    refused(["recipe=llm", "optimizer=mine"], str(path), "Did you mean 'optimizer.momentum'?")


def test_rule_1_a_shipped_recipe_is_found_though_own_recipes_exist(cwd: Path) -> None:
    write(cwd / "recipes" / "other.yaml", MINE)
    assert compose(["recipe=llm"]).recipe_file == (assets.shipped_folder("recipes") / "llm.yaml").resolve()


def test_rule_3_a_recipe_without_the_schema_is_refused(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", BODY)
    refused(["recipe=mine"], "schema", "mine.yaml")


def test_rule_3_a_schema_after_values_is_refused(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", "defaults: [_self_, schema]\nbatch: {effective: 7}\n")
    refused(["recipe=mine"], "first")


def test_rule_4_a_recipe_that_extends_itself_is_told_to_change_its_name(cwd: Path) -> None:
    write(cwd / "recipes" / "llm.yaml", "defaults: [llm, _self_]\n")
    refused(["recipe=llm"], "extends itself", "my_llm.yaml")


def test_rule_4_a_circle_of_recipes_is_told(cwd: Path) -> None:
    write(cwd / "recipes" / "a.yaml", "defaults: [b, _self_]\n")
    write(cwd / "recipes" / "b.yaml", "defaults: [a, _self_]\n")
    refused(["recipe=a"], "a -> b -> a")


def test_rule_5_an_unknown_recipe_lists_the_known_ones(cwd: Path) -> None:
    write(cwd / "recipes" / "mine.yaml", MINE)
    refused(["recipe=mien"], "'mien'", "Did you mean 'mine'?", "llm", "vision")


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optimizer.lrr=1", ["Did you mean 'optimizer.lr'?"]),
        ("model.layer=1", ["Did you mean 'model.layers'?", "+model.layer=1"]),
        ("lr=1", ["Did you mean 'optimizer.lr'?"]),
        ("+optimizer.foo=1", ["optimizer.foo", "lr"]),
        ("+foo=1", ["foo", "optimizer"]),
        ("optimizer=adam", ["optimizer=adam", "Did you mean 'adamw'?", "sgd"]),
        ("optimizer=SGD", ["Did you mean 'sgd'?"]),
        ("optimizer.name=sgd", ["optimizer=sgd"]),
        ("+model=gpt", ["model=NAME"]),
        ("train.steps=1,2", ["train.steps=1,2", "one configuration at a time"]),
        ("train.steps=range(1,3)", ["one configuration at a time"]),
        ("data.path=/a[b", ["/a[b", "quotes"]),
        ("hydra.run.dir=x", ["run.dir"]),
        ("~optimizer.lr", ["optimizer.lr"]),
        ("~data.nothing", ["data.nothing"]),
        ("train.steps", ["KEY=VALUE"]),
    ],
)
def test_a_mistake_on_the_command_line_is_told(word: str, parts: list[str], cwd: Path) -> None:
    refused(["recipe=llm", word], *parts)
