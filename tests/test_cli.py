"""The command line: its surface is frozen, help is quick, JSON is pure, a run goes from start to resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from command import REPO, run

from gatrain import cli
from gatrain.errors import EXIT_CODES, ConfigError, LaunchError
from gatrain.launch.world import WorldRequest

SURFACE = {
    "fit": {"--retune", "--overwrite", "--trust"},
    "autotune": {"--nproc", "--json", "--retune", "--plot", "--trust"},
    "plan": {"--gpu", "--gpus", "--nproc", "--json", "--trust"},
    "explain": {"--gpu", "--nproc", "--json", "--retune", "--trust"},
    "launch": {
        "--nproc", "--nnodes", "--node-rank", "--rdzv-endpoint", "--max-restarts",
        "--slurm", "--dry-run", "--nodes", "--gpus-per-node", "--cpus-per-gpu", "--mem",
        "--partition", "--time", "--account", "--qos", "--constraint",
        "--retune", "--overwrite", "--trust",
    },
    "resume": {
        "--nproc", "--nnodes", "--node-rank", "--rdzv-endpoint", "--max-restarts", "--from-start",
        "--accept-changes", "--trust",
    },
    "verify": {"--json", "--trust"},
    "recipes": set(),
    "show": {"--json", "--data", "--check", "--trust"},
    "doctor": {"--json", "--trust"},
    "schema": set(),
}  # fmt: skip
"""Scripts rely on these names: adding one is a decision, renaming one breaks somebody."""

QUICK = ["batch.micro=8", "precision=fp32", "checkpointing=none", "compile=false", "sync=window"]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_commands_and_options_are_frozen() -> None:
    group = typer.main.get_command(cli.app)
    found = {
        name: {option for p in command.params for option in p.opts if option.startswith("-")} - {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == SURFACE
    assert set(cli.COMMANDS) == set(SURFACE)


def test_every_exit_code_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(cli.subcommands.EXIT_CODE_HELP) == {0, 143, *EXIT_CODES}
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for number in cli.subcommands.EXIT_CODE_HELP:
        assert f" {number}  " in out


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "hydra", "omegaconf", "numpy", "torchvision")
    code = f"import sys, gatrain.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_bare_command_prints_help_and_version_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys)
    assert code == 0
    assert "Usage:" in out
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.startswith("gatrain ")


@pytest.mark.parametrize("command", list(SURFACE))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    for option in SURFACE[command]:
        assert option in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Fit", "recipe=llm"], "Did you mean 'fit'"),
        (["--retune", "fit", "recipe=llm"], r"one of gatrain fit, .* stands after it"),
        (["fit", "--recipe", "llm"], "Settings have no dashes: recipe=VALUE"),
    ],
)
def test_words_in_the_wrong_place_are_answered_with_the_right_one(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, *words)
    assert code == 2
    assert re.search(message, err)
    assert call(capsys, words[0].lower() if words[0][0] != "-" else "fit", "-h")[0] == 0


@pytest.mark.parametrize("words", [["show", "recipe=llm"], ["doctor"], ["doctor", "recipe=llm"]])
def test_json_is_one_object_and_nothing_else(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_show_tells_where_each_value_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("defaults: [llm, _self_]\noptimizer: {lr: 0.5}\n")
    _, out, _ = call(capsys, "show", "recipe=mine", "train.steps=3", "+data.api_key=abc", "--json")
    shown = json.loads(out)
    assert shown["config"]["optimizer"]["lr"] == 0.5
    assert shown["sources"]["optimizer.lr"].endswith("recipes/mine.yaml")
    assert shown["sources"]["train.steps"] == "command line"
    assert shown["config"]["data"]["api_key"] == "<redacted>"
    _, out, _ = call(capsys, "show", "recipe=mine")
    assert "recipes/mine.yaml" in out
    assert "${data.context}" in out


def test_recipes_lists_shipped_and_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("# Mine, for a test.\ndefaults: [llm, _self_]\n")
    _, out, _ = call(capsys, "recipes")
    for text in ("llm", "gpt2", "vision", "resnet50", "Mine, for a test.", "yours"):
        assert text in out


def test_doctor_says_what_would_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "doctor", "recipe=llm", "precision=bf16", "--json")
    report = json.loads(out)
    assert report["precision"] == "bf16"
    assert "asked for" in report["precision_reason"]
    assert report["versions"]["torch"]
    assert report["nproc"] >= 1


def test_slurm_dry_run_prints_the_batch_file_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--slurm", "--dry-run", "--partition", "gpu", "--time", "1:00:00", "--nodes", "2"]
    code, out, _ = call(capsys, "launch", *words, "--gpus-per-node", "4", "recipe=llm")
    assert code == 0
    assert out.startswith("#!/bin/bash")
    for text in ("--partition=gpu", "--time=1:00:00", "--nodes=2", "--gpus-per-node=4", "recipe=llm"):
        assert text in out
    assert not list(Path().iterdir())


def test_autotune_json_is_the_plan(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "autotune", "recipe=vision", "batch.effective=23", *QUICK, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert sum(map(sum, plan["micro_batches"])) == plan["effective_batch"] == 23
    assert plan["reason"]
    assert not Path("outputs").exists()


def test_a_run_from_start_to_resume(weird_tmp_path: Path) -> None:
    folder = weird_tmp_path / "run"
    quoted = str(folder).replace('"', '\\"')
    words = ["recipe=vision", "batch.effective=16", "train.steps=2", f'run.dir="{quoted}"', *QUICK]
    done = run("fit", *words, "+data.api_key=abc")
    assert done.returncode == 2  # the built-in data takes no such argument, and nothing is left behind
    assert not folder.exists()
    done = run("fit", *words)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "overrides.txt",
        "plan.json",
        "hardware.json",
        "env.json",
        "metrics.jsonl",
    } <= names
    assert (folder / "config.yaml").stat().st_mode & 0o077 == 0
    env = json.loads((folder / "env.json").read_text())
    assert env["recipe"] == "vision"
    assert env["working_dir"] == str(Path.cwd())

    again = run("fit", *words)
    assert again.returncode == 7
    assert "gatrain resume" in again.stderr
    complete = run("resume", str(folder))
    assert complete.returncode == 0
    assert "complete" in complete.stdout
    refused = run("resume", str(folder), "batch.effective=8")
    assert refused.returncode == 2
    further = run("resume", str(folder), "train.steps=4", "--nproc", "2")
    assert further.returncode == 0, further.stderr
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert json.loads((folder / "plan.json").read_text())["world_size"] == 2


def test_a_run_that_is_stopped_while_it_prepares_leaves_nothing() -> None:
    command = [sys.executable, "-m", "gatrain", "fit", "recipe=vision", "run.dir=a/b"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not Path("a/b/.lock").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert not list(Path().iterdir())


def test_the_exit_code_of_a_stop_outlives_an_interrupt_while_a_dataclass_is_made(tmp_path: Path) -> None:
    program = """
from gatrain.cli import terminal
try:
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt:
    terminal.leave(143, is_program=True)
"""
    (tmp_path / "stopped.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    done = subprocess.run(
        [sys.executable, "-m", "stopped"], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path
    )
    assert done.returncode == 143


def test_unexpected_errors_are_told_in_short_with_a_file_for_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(cwd: Path) -> list[object]:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("gatrain.assets.list_recipes", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = call(capsys, "recipes")
    assert code == 1
    assert "Traceback" not in err
    assert "by accident" in err
    (report,) = tmp_path.glob("gatrain-error-*")
    assert "Traceback" in report.read_text()
    assert str(report) in err


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_DEBUG", "1")
    code, _, err = call(capsys, "show", "recipe=nope")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize("words", [["fit"], ["launch", "--nproc", "1"]])
def test_retune_reaches_the_tuner(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def plan(*args: object, retune: bool, **options: object) -> None:
        asked.append(retune)
        raise LaunchError("enough")

    monkeypatch.setattr("gatrain.tune.Tuner.plan", plan)
    for options in ([], ["--retune"]):
        code, _, err = call(capsys, *words, "recipe=vision", *options)
        assert (code, "enough" in err) == (LaunchError.exit_code, True)
    assert asked == [False, True]


def test_a_plot_that_cannot_be_written_is_told_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = call(capsys, "autotune", "recipe=vision", "--plot", "nowhere/curve.png")
    assert code == 2
    assert "--plot nowhere/curve.png" in err


def test_interrupt_gives_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(cwd: Path) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("gatrain.assets.list_recipes", interrupted)
    code, _, err = call(capsys, "recipes")
    assert code == 130
    assert "Traceback" not in err


def test_autotune_plans_for_a_stated_number_of_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[WorldRequest] = []

    def autotune(words: list[str], request: WorldRequest, *others: object) -> None:
        asked.append(request)
        raise ConfigError("enough")

    monkeypatch.setattr("gatrain.fit.autotune", autotune)
    assert call(capsys, "autotune", "--nproc", "2", "recipe=vision")[0] == 2
    assert asked == [WorldRequest(2)]
