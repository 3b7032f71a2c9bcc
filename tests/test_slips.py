"""Slips at the keyboard: what is proposed instead works when it is typed, and nothing wrong reaches a queue."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gatrain import cli, disk, doors, start, states
from gatrain.assets import first_comment, list_recipes
from gatrain.cli import examine, settings_help, views
from gatrain.compose import compose
from gatrain.errors import ConfigError, SavedStateError, nearest
from gatrain.fit.resuming import resume
from gatrain.rundir import RunDir


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=llm", *words])
    return str(caught.value)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word", ["batch.effective=1e3", "batch.effective=512.0", "train.steps=1e2", "train.seed=1.0"]
)
def test_a_whole_number_that_yaml_reads_as_a_float_is_answered_with_its_digits(word: str) -> None:
    text = refusal(word)
    proposed = re.search(r"Write (\S+=\d+)\.$", text)
    assert proposed, text
    assert compose(["recipe=llm", proposed[1]])
    assert "converted" not in text


@pytest.mark.parametrize(
    "word", ["batch.effective:64", "batch.effective 64", "batch/effective=64", "batch_effective=64"]
)
def test_a_key_with_another_sign_in_it_is_answered_with_the_key(word: str) -> None:
    assert "Did you mean" in (text := refusal(*word.split(" ")))
    assert "batch.effective" in text.partition("Did you mean")[2][:20]


def test_a_difference_of_case_is_near() -> None:
    assert "'llm'" in nearest("LLM", ["padded", "llm"])
    with pytest.raises(ConfigError, match="Did you mean 'recipe=llm'"):
        compose(["Recipe=llm"])


@pytest.mark.parametrize("betas", ["[0.9,1.5]", "[-0.1,0.9]", "[0.9,.nan]", "[1,0.9]"])
def test_what_an_optimizer_would_refuse_later_is_refused_by_its_key(betas: str) -> None:
    assert "optimizer.betas[" in refusal(f"optimizer.betas={betas}")
    assert "optimizer.eps=" in refusal("optimizer.eps=-1")


def test_a_value_that_refers_to_itself_and_an_item_that_is_not_there_are_told_in_words() -> None:
    assert "refers to itself" in refusal("optimizer.lr=${optimizer.lr}")
    text = refusal("hooks.0=ema")
    assert "index" not in text
    (proposed,) = shlex.split(text.rpartition("Write the whole list: ")[2].rstrip("."))
    assert compose(["recipe=llm", proposed]).config.hooks == ["ema"]


# --- recipes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: [llm, _self_]\nbatch.effective: 64\n", "Write batch: {effective: VALUE}"),
        ("defaults: [llm, optimizer: sgd, _self_]\n", "'- override /optimizer: NAME'"),
        ("defaults: [llm, _self_]\nhydra: {run: {dir: x}}\n", "hydra.run.dir: Hydra's own settings"),
        ("defaults: [llm, _self_]\nbatch:\n", "takes keys with values: effective"),
    ],
)
def test_a_mistake_in_a_recipe_is_answered_with_what_to_write_in_the_recipe(
    text: str, said: str, cwd: Path
) -> None:
    (cwd / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=own.yaml"])
    assert said in str(caught.value)
    assert str(cwd / "own.yaml") in str(caught.value)
    assert "Optional" not in str(caught.value)


def test_what_a_recipe_without_self_says_counts_and_hydra_is_quiet(cwd: Path) -> None:
    (cwd / "own.yaml").write_text("defaults: [llm]\nbatch: {effective: 3}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compose(["recipe=own.yaml"]).config.batch.effective == 3


def test_a_folder_is_no_recipe(cwd: Path) -> None:
    (cwd / "recipes" / "a.yaml").mkdir(parents=True)
    assert "a" not in [recipe.name for recipe in list_recipes(cwd)]


# --- names of parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", list(doors.SHIPPED))
def test_a_part_of_no_such_name_is_refused_by_every_command_and_its_advice_composes(door: str) -> None:
    text = refusal(f"{door}=emaa")
    (proposed,) = shlex.split(text.partition("by its class: ")[2].rstrip("."))
    assert compose(["recipe=llm", proposed]).config
    if door not in doors.LISTS:
        for value in ("0.1", "[a]", "true"):
            assert "is not a list" not in refusal(f"{door}={value}")


def test_a_wrong_part_in_a_recipe_names_the_file(cwd: Path) -> None:
    (cwd / "own.yaml").write_text("defaults: [llm, _self_]\nnorm: exac\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: norm=exac .*Did you mean 'exact'"):
        compose(["recipe=own.yaml"])


@pytest.mark.parametrize("word", ["gradient=cache", "model._target_=nope.Net"])
def test_what_cannot_train_is_not_submitted(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = told(capsys, "launch", "--slurm", "--dry-run", "recipe=llm", word)
    assert code == 2
    assert word.partition("=")[0] in err


# --- options and commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--config-dir", "-cn", "--cfg", "-v", "--verbose", "--nope"])
def test_no_option_is_answered_with_a_setting_that_does_not_exist(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = told(capsys, "fit", "recipe=llm", option, "x")
    assert code == 2
    assert "Settings have no dashes" not in err
    assert "--overwrite" not in err


def test_an_option_with_the_name_of_a_setting_is_answered_with_the_whole_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "optimizer.lr=VALUE" in told(capsys, "fit", "--lr", "3")[1]
    assert "--overwrite" in told(capsys, "fit", "--overwrit")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train recipe=llm", "gatrain fit"),
        ("help", "gatrain --help"),
        ("autotune --nproc x", "--nproc x is not a whole number"),
        ("autotune --nproc=2.5", "--nproc 2.5 is not a whole number"),
        ("recipes all", "takes no such word: all"),
        ("resume", "no run folder is given"),
        ("resume a_file", "it is a file"),
        ("show recipe=/etc/passwd", "is no .yaml file"),
        ("fit recipe=llm run.dir=a_file", "it is a file, not a folder"),
    ],
)
def test_it_is_said_what_is_wrong_in_plain_words(
    words: str, said: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cwd / "a_file").write_text("")
    code, err = told(capsys, *words.split())
    assert code in (2, 7)
    assert said in err


@pytest.mark.parametrize("command", ["fit", "verify", "autotune", "doctor", "launch"])
def test_a_run_folder_where_a_recipe_belongs_is_known(
    command: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cwd / "my run").mkdir()
    (cwd / "my run" / "config.yaml").write_text("")
    assert "\nTo go on with the run: gatrain resume 'my run'\n" in told(capsys, command, "my run")[1]


# --- runs -----------------------------------------------------------------------------------------------


def test_a_resume_that_is_refused_for_its_steps_leaves_the_run_as_it_was(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "damage_at_a_glance", lambda path: None)
    run_dir = RunDir(cwd / "run")
    (run_dir.saved / "step_00000008").mkdir(parents=True)
    stored = compose(["recipe=vision", "train.steps=8"]).yaml
    run_dir.config.write_text(stored)
    with pytest.raises(SavedStateError, match=r"of step 8, .* to have 1 step\. .*train\.steps=8"):
        resume(run_dir.path, ["train.steps=1"])
    assert run_dir.config.read_text() == stored


# --- the machine ----------------------------------------------------------------------------------------


def test_a_ctrl_c_while_the_command_line_is_loading_has_one_line_and_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        start.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_word_in_an_environment_that_is_not_utf8_is_told_what_to_export(cwd: Path) -> None:
    code = (
        "from gatrain.compose import compose\n"
        "import sys\n"
        "try:\n    compose(['recipe=llm', *sys.argv[1:]])\n"
        "except Exception as error:\n    print(ascii(str(error)))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, "run.name=\u00e9"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "export LC_ALL=C.UTF-8" in done.stdout
    assert "not UTF-8" not in done.stdout
    for name in ("LC_ALL", "PYTHONUTF8", "PYTHONCOERCECLOCALE"):
        environment.pop(name)
    environment |= {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    assert subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout == ""


def test_too_many_open_files_are_answered_with_the_limit_to_raise() -> None:
    assert "ulimit -n" in disk.remedy(OSError(errno.EMFILE, "Too many open files"))


# --- columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_help_doctor_and_recipes_fit_their_columns_and_fold_no_word(columns: int) -> None:
    lines = settings_help.help_lines("fit", columns)
    lines += examine.examine([]).lines(columns)
    listed = views.recipe_lines(list_recipes(Path.cwd()), columns)
    assert not [line for line in listed if line.endswith("-")]
    wide = [line for line in [*lines, *listed] if len(line) > columns and len(line.split()) > 2]
    assert not [line for line in wide if not line.lstrip().startswith("gatrain ")]


def test_a_recipe_is_described_by_a_whole_sentence(cwd: Path) -> None:
    (cwd / "a.yaml").write_text("# @package _global_\n\n# Two lines\n# of one sentence. And more.\nx: 1\n")
    (cwd / "b.yaml").write_text("# no full stop\n# here\nx: 1\n")
    (cwd / "c.yaml").write_text("x: 1\n# not at its head.\n")
    described = [first_comment(cwd / name) for name in ("a.yaml", "b.yaml", "c.yaml")]
    assert described == ["Two lines of one sentence.", "no full stop", ""]
