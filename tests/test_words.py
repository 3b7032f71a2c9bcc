"""Words of the command line as people type them: names and paths stay text, and what is not meant is told."""

from __future__ import annotations

import shlex
import subprocess
import sys
from inspect import Parameter
from pathlib import Path

import pytest

from gatrain.cli.terminal import usage_text
from gatrain.compose import compose, load_config, reload
from gatrain.compose.declared import text_arguments
from gatrain.compose.words import as_loop
from gatrain.errors import ConfigError
from gatrain.signatures import mistake

ODD_NAMES = (
    "2026_01_31", "7e91234", "9e55555", "12e5", "1e-3", "007",
    "null", "true", "inf", "1_000", "0x10", "-0.0",
)  # fmt: skip
"""``null`` is a name for ``run.name`` alone: elsewhere it is no value."""


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(*words: str, recipe: str = "llm") -> dict[str, object]:
    return compose([f"recipe={recipe}", *words]).leaves


def refusal(*words: str, recipe: str = "llm") -> str:
    with pytest.raises(ConfigError) as caught:
        compose([f"recipe={recipe}", *words])
    return str(caught.value)


# --- names and paths ------------------------------------------------------------------------------------


TEXT_KEYS = ("run.name", "run.dir", "data.path", "data.cache_dir", "data.text_field", "data.tokenizer")


@pytest.mark.parametrize("turn", [0, 1])
def test_a_name_or_path_stays_what_was_typed(turn: int, cwd: Path) -> None:
    typed = dict(zip(TEXT_KEYS, ODD_NAMES[6 * turn : 6 * turn + 6], strict=False))
    composed = compose(["recipe=llm", *(f"{key}={name}" for key, name in typed.items())])
    assert {key: composed.leaves[key] for key in typed} == typed
    stored = cwd / "config.yaml"
    stored.write_text(composed.yaml)
    config = load_config(stored)
    assert [config.run.name, config.run.dir, config.data["path"]] == list(typed.values())[:3]


OWN = """
import pathlib
from dataclasses import dataclass
from typing import Optional, Union

class Data:
    def __init__(self, path: "str | pathlib.Path", parts: list[str] = (), count: int = 1, tag=None, size=None,
                 which: Optional[Union[str, pathlib.Path]] = None, kind="plain"):
        pass

class Child(Data):
    pass

@dataclass
class Fields:
    path: str
    count: int = 0

def make(name: str, rate: float = 1.0):
    pass
"""


@pytest.fixture
def own(cwd: Path) -> Path:
    (cwd / "mine.py").write_text(OWN)
    (cwd / "names.py").write_text("from mine import Data as Renamed\n")
    (cwd / "own.yaml").write_text(
        "defaults: [base, model: gpt, _self_]\n"
        "data: {_target_: names.Renamed, vocab_size: 8, context: 8, path: 2026_01_31, parts: [1_2, b],\n"
        "       count: 1_000, tag: 7e91234, size: 1_000, which: 12e5, kind: 1.10}\n"
        "loss: {_target_: torch.nn.CrossEntropyLoss}\n"
        "run: {name: 9e55555}\n"
    )
    return cwd


def test_a_factory_of_the_users_own_says_by_its_signature_what_is_text(own: Path) -> None:
    words = [
        "data.path=7e91234",
        "data.parts=[7e9,2026_01_31]",
        "data.count=7",
        "data.which=true",
        "data.kind=1e3",
    ]
    data = compose(["recipe=own.yaml", *words]).config.data
    assert data["path"] == "7e91234"
    assert data["parts"] == ["7e9", "2026_01_31"]
    assert data["count"] == 7
    assert data["which"] == "true"
    assert data["kind"] == "1e3"


def test_a_recipe_that_writes_such_names_without_quotes_means_text_too(own: Path) -> None:
    config = compose(["recipe=own.yaml"]).config
    assert config.run.name == "9e55555"
    data = config.data
    assert (data["path"], data["tag"], data["which"], data["kind"]) == (
        "2026_01_31",
        "7e91234",
        "12e5",
        "1.10",
    )
    assert data["parts"] == ["1_2", "b"]
    assert (data["count"], data["size"]) == (1000, 1000)


def test_signatures_are_read_without_importing(own: Path) -> None:
    (own / "mine.py").write_text(f"raise SystemExit('imported')\n{OWN}")
    for target in ("mine.Data", "mine.Child", "names.Renamed"):
        assert text_arguments(target, own)["path"].itself
        assert not text_arguments(target, own)["count"].itself
    assert text_arguments("mine.Fields", own)["path"].itself
    assert text_arguments("mine.make", own)["name"].itself
    assert not text_arguments("mine.make", own)["rate"].itself
    assert text_arguments("gatrain.data.TextWindows", own)["path"].itself


def test_odd_characters_need_no_quotes_where_they_mean_nothing_else(cwd: Path) -> None:
    paths = (
        "~/corpus.jsonl",
        "données/été.jsonl",
        "epoch=1.jsonl",
        "v1 (copy).jsonl",
        "[0-9]*.txt",
        "数据+@#.txt",
    )
    typed = dict(zip(TEXT_KEYS, paths, strict=True))
    leaves = given(*(f"{key}={path}" for key, path in typed.items()))
    assert {key: leaves[key] for key in typed} == typed


def test_quotes_lists_and_references_keep_their_meaning(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "été")
    assert given("data.path='a,b.txt'")["data.path"] == "a,b.txt"
    assert given("data.path=null")["data.path"] is None
    assert given("run.dir=null")["run.dir"] is None
    assert given("optimizer.betas=[0.5,0.6]")["optimizer.betas"] == [0.5, 0.6]
    assert compose(["recipe=llm", "data.path=é/${oc.env:WHERE}"]).config.data["path"] == "é/été"
    assert "do not close" in refusal("data.path=/a[b")


def test_bytes_that_are_no_text_are_refused(cwd: Path) -> None:
    assert "not UTF-8" in refusal("run.name=a\udcff")


# --- the moment -----------------------------------------------------------------------------------------


def test_now_has_one_value_everywhere(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(cwd / "cache"))
    composed = compose(["recipe=llm", "run.dir=out/${now:%Y-%f}", "data.path=${now:%f}"])
    moment = composed.config.data["path"]
    assert composed.config.run.dir is not None
    assert composed.config.run.dir.endswith(f"-{moment}")
    assert "${now" not in composed.yaml
    (cwd / "config.yaml").write_text(composed.yaml)
    code = "import gatrain.compose as c, pathlib; print(c.load_config(pathlib.Path('config.yaml')).run.dir)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == composed.config.run.dir
    (cwd / "timed.yaml").write_text("defaults: [llm, _self_]\nrun: {name: '${now:%f}'}\n")
    names = {compose(["recipe=timed.yaml"]).config.run.name for _ in range(3)}
    assert len(names) == 3


def test_what_only_hydras_own_runs_know_is_refused_at_once(cwd: Path) -> None:
    assert "no resolver 'hydra'" in refusal("run.dir=${hydra:runtime.cwd}")
    assert "no resolver 'own'" in refusal("run.dir=${own:x}")


# --- what is not meant ----------------------------------------------------------------------------------


def test_pythons_none_is_answered_with_null(cwd: Path) -> None:
    assert "Write optimizer.clip_norm=null" in refusal("optimizer.clip_norm=None")
    assert given("optimizer.clip_norm=null")["optimizer.clip_norm"] is None
    assert "run.dir=null" in refusal("run.dir=None")
    assert "data.path=null" in refusal("data.path=None")


@pytest.mark.parametrize("value", ["(0.9,0.95)", "0.9,0.95"])
def test_a_pair_is_answered_with_a_list_that_works(value: str, cwd: Path) -> None:
    text = refusal(f"optimizer.betas={value}")
    (word,) = shlex.split(text.rpartition("Write ")[2].removesuffix("."))
    assert given(word)["optimizer.betas"] == [0.9, 0.95]


def run_loop(loop: str, cwd: Path) -> list[list[str]]:
    """The words of each command that a loop of the shell runs."""
    (cwd / "gatrain").write_text(f"#!{sys.executable}\nimport sys\nprint(repr(sys.argv[1:]))\n")
    (cwd / "gatrain").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", loop], capture_output=True, text=True, check=True, env={"PATH": f"{cwd}:/usr/bin:/bin"}
    )
    return [eval(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("value", ["1e-3,3e-3", "choice(1e-3,3e-3)"])
def test_several_values_are_answered_with_a_loop_that_works(value: str, cwd: Path) -> None:
    text = refusal(f"optimizer.lr={value}", "run.name=sweep", "data.path=a b.txt")
    commands = run_loop(text.partition("one after another: ")[2], cwd)
    rates = []
    for command, *words in commands:
        composed = compose(words)
        assert command == "fit"
        assert composed.config.data["path"] == "a b.txt"
        rates.append((composed.config.optimizer.lr, composed.config.run.name))
    assert [rate for rate, _ in rates] == [1e-3, 3e-3]
    assert len({name for _, name in rates}) == 2  # the second would otherwise find the folder of the first


def test_hydras_multirun_option_is_answered_with_a_loop_that_works(cwd: Path) -> None:
    class NoSuchOption(Exception):
        option_name = "-m"

        def format_message(self) -> str:
            return "No such option: -m"

    arguments = [
        "launch",
        "--nproc",
        "2",
        "-m",
        "recipe=llm",
        "optimizer.lr=1e-3,3e-3",
        "train.seed=range(0,2)",
    ]
    text = usage_text(NoSuchOption(), arguments, ("fit", "launch"))
    commands = run_loop(text.partition("one after another: ")[2], cwd)
    assert len(commands) == 4
    assert commands[0] == ["launch", "--nproc", "2", "recipe=llm", "optimizer.lr=0.001", "train.seed=0"]
    assert as_loop(["recipe=llm"]) is None


def test_options_of_sbatch_are_answered_with_a_way(cwd: Path) -> None:
    for option, part in (
        ("--reservation", "SBATCH_RESERVATION"),
        ("--cpus-per-task", "--dry-run"),
        ("--gres=gpu:1", "SBATCH_GRES"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gatrain", "launch", "--slurm", option, "recipe=llm"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert part in done.stderr
        assert "=VALUE." not in done.stderr.replace("SBATCH", "")


# --- files that say something in vain -------------------------------------------------------------------


def test_a_key_that_a_group_after_self_overrides_is_told(cwd: Path) -> None:
    (cwd / "order.yaml").write_text(
        "defaults: [base, _self_, model: gpt, data: text, override task: language_model]\n"
        "data: {context: 64}\nmodel: {layers: 1}\nrun: {name: x}\n"
    )
    (cwd / "right.yaml").write_text("defaults: [llm, _self_]\ndata: {context: 64}\n")
    (remark,) = compose(["recipe=order.yaml"]).remarks
    assert f"{cwd}/order.yaml: data.context, model.layers have no effect: " in remark
    assert "conf/model/gpt.yaml after _self_ in its defaults list" in remark
    (remark,) = compose(["recipe=order.yaml", "data.context=32"]).remarks
    assert "order.yaml: model.layers has no effect" in remark
    assert compose(["recipe=right.yaml"]).remarks == []


def test_a_conf_folder_of_another_project_is_named_where_it_wins(cwd: Path) -> None:
    (cwd / "conf" / "optimizer").mkdir(parents=True)
    (cwd / "conf" / "optimizer" / "adamw.yaml").write_text("lr: 1e-2\nbetas: [0.5, 0.6]\n")
    (remark,) = compose(["recipe=llm"]).remarks
    assert remark.startswith(f"{cwd}/conf/optimizer/adamw.yaml is used in place of gatrain's own ")


@pytest.mark.parametrize(
    ("defaults", "told"),
    [
        ("[base, override modle: gpt, _self_]", "nothing before it chooses modle"),
        ("[base, _self_, _self_]", "_self_ stands twice"),
        ("[base, 3, _self_]", "an entry that is no name"),
        ("[base, {a: b, c: d}, _self_]", "an entry that is no name"),
        ("[base, {model: '${x}'}, _self_]", "where that is not possible"),
        ("[base, override task: language_model, model: gpt, _self_]", "stands too early"),
        ("[base, /optimizer/sgd, _self_]", "override optimizer: NAME"),
    ],
)
def test_what_is_wrong_with_a_defaults_list_is_told_in_the_users_words(
    defaults: str, told: str, cwd: Path
) -> None:
    (cwd / "x.yaml").write_text(f"defaults: {defaults}\n")
    text = refusal(recipe="x.yaml")
    assert text.startswith(f"{cwd}/x.yaml: ")
    assert told in text
    assert not any(
        word in text for word in ("Hydra", "Default List", "_dummy_", "ConfigDefault", "Merge error")
    )


def test_a_base_of_another_project_is_named(cwd: Path) -> None:
    (cwd / "conf").mkdir()
    (cwd / "conf" / "base.yaml").write_text("foo: 1\n")
    text = refusal()
    assert f"{cwd}/conf/base.yaml is used in place of gatrain's own" in text
    assert "No match" not in text


def test_a_number_that_is_read_in_two_ways_is_refused(cwd: Path) -> None:
    (cwd / "eight.yaml").write_text("defaults: [llm, _self_]\nbatch: {effective: 010}\n")
    given = {
        "batch.effective=010": "batch.effective: 010 begins with a zero.* Write 10",
        "train.steps=010": "train.steps: 010 begins with a zero.* Write 10",
        "batch.effective=1:30": "batch.effective: 1:30 is read as 90",
        "+data.lengths=010": 'Write 10, or "010" in quotes',
    }
    for word, message in given.items():
        with pytest.raises(ConfigError, match=message):
            compose(["recipe=llm", word])
    with pytest.raises(ConfigError, match="010 begins with a zero"):
        compose(["recipe=eight.yaml"])
    inside = {
        "batch": ("{effective: {0: 64, 010: 256}}", "batch.effective: 010 begins with a zero.* Write 10"),
        "schedule": ("{milestones: [1, 010]}", "schedule.milestones: 010 begins with a zero"),
        "hooks": ("[{name: ema, start: 010}]", "hooks.start: 010 begins with a zero"),
        "order": ("{name: grouped, by: {1:30 : 2}}", "order.by: 1:30 is read as"),
    }
    for key, (value, message) in inside.items():
        (cwd / "inside.yaml").write_text(f"defaults: [llm, _self_]\n{key}: {value}\n")
        with pytest.raises(ConfigError, match=f"inside.yaml: {message}"):
            compose(["recipe=inside.yaml"])
    for word in (
        "batch.effective={0: 64, 010: 256}",
        "batch.effective={0: 010}",
        "schedule.milestones=[010]",
    ):
        with pytest.raises(ConfigError, match=r"010 begins with a zero.* Write 10"):
            compose(["recipe=llm", word])
    (cwd / "config.yaml").write_text(compose(["recipe=llm", "+data.ids=['010']", "+data.sizes=[010]"]).yaml)
    assert reload(cwd / "config.yaml", []).config.data["ids"] == ["010"]
    with pytest.raises(ConfigError, match=r"train\.steps: 010 begins with a zero"):
        reload(cwd / "config.yaml", ["train.steps=010"])
    config = compose(
        ["recipe=llm", "batch.effective=0x10", "train.seed=0", "run.name=010", "optimizer.lr=0.010"]
    ).config
    assert (config.batch.effective, config.train.seed, config.run.name, config.optimizer.lr) == (
        16,
        0,
        "010",
        0.01,
    )


def test_an_item_of_a_list_is_reached_by_the_form_that_messages_tell() -> None:
    given = ["recipe=llm", "hooks=[{_target_: x.Y}]"]
    with pytest.raises(ConfigError, match=r"Write \+hooks\.0\.wanted=3\.$"):
        compose([*given, "+hooks[0].wanted=3"])
    assert compose([*given, "+hooks.0.wanted=3"]).config.hooks == [{"_target_": "x.Y", "wanted": 3}]
    told = mistake("hooks[0]", "x.Y", {"a": Parameter("a", Parameter.KEYWORD_ONLY)}, set(), set())
    assert told is not None
    assert told.endswith("(+hooks.0.a=... on the command line).")
