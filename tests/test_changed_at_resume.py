"""A run goes on with the data, code and settings that it was started with, or says what is another and stops."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import environment, project, warm_program

from gatrain import build, fit, recorded, worker
from gatrain.compose import compose, reload, resolve_again
from gatrain.errors import ConfigError, RunFolderError, SavedStateError
from gatrain.fit import resuming
from gatrain.fit.listener import Listener
from gatrain.rundir import RunDir

MODULE = """
import os
import torch
from torch import nn
from gatrain.tasks import Supervised
import mine_parts

class Net(nn.Module):
    def __init__(self, width=8, dropout=0.1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))
    def forward(self, x):
        return self.body(x)

class Points(torch.utils.data.Dataset):
    def __init__(self, path):
        with open(path) as file:
            shift = float(file.read())
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(61, 6, generator=generator) + shift, torch.arange(61) % 3
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]

class Task(Supervised):
    def loss_sum(self, model, batch):
        return super().loss_sum(model, batch)
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.Net, width: 8, dropout: 0.1}
data: {_target_: mine.Points, path: "${oc.env:POINTS}"}
task: {_target_: mine.Task, eval_fraction: 0.1}
batch: {effective: 6, micro: 3}
optimizer: {lr: "${oc.env:RATE}"}
train: {steps: 4, seed: 3}
schedule: {name: constant, warmup_steps: 0}
precision: fp32
save: {every: 2}
checkpointing: none
compile: false
sync: window
"""


def typed(folder: Path, command: str, expect: int) -> str:
    """Type a command in a shell; returns what it says on standard error."""
    env = environment(RATE="1e-3", POINTS="points.txt")
    command = command.replace("gatrain", str(warm_program()), 1)
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stderr


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's project and a run of four steps."""
    folder = tmp_path_factory.mktemp("changed")
    project(folder, MODULE, RECIPE)
    (folder / "mine_parts.py").write_text("LIMIT = 3\n")
    (folder / "points.txt").write_text("0.0")
    (folder / "other.txt").write_text("3.0")
    typed(folder, "gatrain fit recipe=mine run.dir=run", expect=0)
    return folder


@pytest.fixture
def run(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that project and its run; resuming stops where the ranks would start."""
    folder = tmp_path / "project"
    shutil.copytree(started, folder)
    env = json.loads((folder / "run" / "env.json").read_text())
    (folder / "run" / "env.json").write_text(json.dumps({**env, "working_dir": str(folder)}))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RATE", "1e-3")
    monkeypatch.setenv("POINTS", "points.txt")
    monkeypatch.setattr(resuming, "start_ranks", lambda *given: fit.Outcome(given[0].path))
    return folder / "run"


def resume(run: Path, *words: str, accepted: tuple[str, ...] = ()) -> list[str]:
    """What was told meanwhile."""
    told: list[str] = []
    fit.resume(run, ["train.steps=8", *words], None, Listener(progress=told.append), accepted=accepted)
    return told


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def state_of(run: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    }


def config(old: str, new: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda run, patch: edit(run / "config.yaml", old, new)


def source(file: str, old: str, new: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda run, patch: edit(run.parent / file, old, new)


def environ(name: str, value: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda run, patch: patch.setenv(name, value)


CHANGES = {
    "other data of the same length": (source("points.txt", "0.0", "3.0"), ["data.contents"]),
    "activation in the code": (source("mine.py", "nn.Tanh()", "nn.ReLU()"), ["code"]),
    "loss in the code": (source("mine.py", "super().loss_sum(model, batch)", "(3, 4)"), ["code"]),
    "a module that the code imports": (source("mine_parts.py", "3", "4"), ["code"]),
    "dropout edited": (config("dropout: 0.1", "dropout: 0.5"), ["model.dropout"]),
    "rate edited": (config("lr: 0.001", "lr: 0.5"), ["optimizer.lr"]),
    "precision edited": (config("precision: fp32", "precision: bf16"), ["precision"]),
    "plan edited": (
        lambda run, patch: edit(run / "plan.json", '"precision": "fp32"', '"precision": "bf16"'),
        ["precision"],
    ),
    "another rate in the environment": (environ("RATE", "1.0"), ["optimizer.lr"]),
    "other data in the environment": (environ("POINTS", "other.txt"), ["data.path", "data.contents"]),
}


@pytest.mark.parametrize("label", CHANGES)
def test_a_change_that_alters_the_result_is_refused_by_name_and_accepted_by_name(
    label: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, keys = CHANGES[label]
    change(run, monkeypatch)
    before = state_of(run)
    with pytest.raises(SavedStateError) as caught:
        resume(run)
    text = str(caught.value)
    assert state_of(run) == before
    for key in keys:
        assert f"  {key}: was " in text
    command = text.splitlines()[-1].partition("gatrain resume ")[2]
    words = shlex.split(command)
    assert words[0] == str(run)
    accepted = tuple(words[n + 1] for n, word in enumerate(words) if word == "--accept-changes")
    assert set(keys) <= set(accepted)
    resume(run, accepted=accepted)
    resume(run)  # what was accepted is recorded
    stored = reload(run / "config.yaml", ())
    assert label != "another rate in the environment" or stored.config.optimizer.lr == 1.0
    assert label != "other data in the environment" or stored.config.data["path"] == "other.txt"


def test_data_and_code_and_settings_are_listed_together_with_old_and_new_values(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(run.parent / "mine.py", "nn.Tanh()", "nn.ReLU()")
    edit(run.parent / "points.txt", "0.0", "2.0")
    edit(run / "config.yaml", "lr: 0.001", "lr: 0.5")
    with pytest.raises(SavedStateError) as caught:
        resume(run, accepted=("code",))
    text = str(caught.value)
    assert "  optimizer.lr: was 0.001, is 0.5 (config.yaml)" in text
    assert "  data.contents: was sample 0" in text
    assert "  code: was" not in text  # accepted
    assert text.endswith(
        "train.steps=8 --accept-changes code --accept-changes optimizer.lr --accept-changes data.contents"
    )


@pytest.mark.parametrize(
    "change",
    [
        source("mine.py", "class Net", "# the network\n\nclass Net"),
        source("points.txt", "0.0", "0.00001"),
        config("steps: 4", "steps: 6"),
        config("every: 2", "every: 3"),
        config("name: null", "name: other"),
        lambda run, patch: (run.parent / "plots.py").write_text("1 / 0"),
        lambda run, patch: patch.delenv("RATE"),
        lambda run, patch: shutil.move(run / "recorded.json", run / "gone.json"),
    ],
    ids=["comment", "rounding", "steps", "saves", "name", "another script", "unset", "of an older version"],
)
def test_what_alters_nothing_goes_on(
    run: Path, change: Callable[[Path, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(run, monkeypatch)
    resume(run)
    assert (
        reload(run / "config.yaml", ()).config.optimizer.lr == 0.001
    )  # recorded, whatever the environment says


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [("effective: 6", "effective: 12", "batch.effective"), ("seed: 3", "seed: 4", "train.seed")],
)
def test_what_belongs_to_the_run_cannot_be_accepted(run: Path, old: str, new: str, key: str) -> None:
    edit(run / "config.yaml", old, new)
    with pytest.raises(SavedStateError, match=f"{key} cannot change within a run") as caught:
        resume(run, accepted=(key,))
    assert "--accept-changes" not in str(caught.value)


@pytest.mark.parametrize("name", ["all", "", "*", "optimizer.lr=3"])
def test_changes_are_accepted_by_name_only(run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="names no change"):
        resume(run, accepted=(name,))


def test_a_setting_may_be_typed_where_it_is_accepted_by_name(run: Path) -> None:
    with pytest.raises(ConfigError, match="cannot change when a run goes on"):
        resume(run, "model.dropout=0.3")
    resume(run, "model.dropout=0.3", accepted=("model.dropout",))
    assert reload(run / "config.yaml", ()).config.model["dropout"] == 0.3
    told = resume(run, accepted=("model.dropout",))
    assert "--accept-changes model.dropout: nothing of that name has changed" in told


@pytest.mark.parametrize("file", ["recorded.json", "data.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"settings": 3}', '{"report": {}, "train_samples": -1}']
)
def test_a_damaged_record_is_refused(run: Path, file: str, text: str) -> None:
    (run / file).write_text(text)
    with pytest.raises(SavedStateError, match=f"{file} is damaged"):
        recorded.read_recorded(RunDir(run)) if file == "recorded.json" else recorded.read_data(RunDir(run))


# --- restarts that no command has looked at -------------------------------------------------------------


def test_what_is_missing_is_told_with_the_way_on(run: Path) -> None:
    (run / "plan.json").unlink()
    with pytest.raises(
        RunFolderError, match=r"plan\.json is missing\. .* gatrain resume \S+ batch\.micro=auto"
    ) as raised:
        resume(run)
    assert raised.value.exit_code == 7
    (run / "data.json").unlink()
    told = resume(run, "batch.micro=auto")
    assert "note: data.json is missing: the data is not compared" in told
    assert RunDir(run).load_plan().effective_batch == 6
    assert not any(word.startswith("note: data.json") for word in resume(run))


def test_a_restarted_rank_compares_settings_plan_code_and_versions_itself(run: Path) -> None:
    run_dir = RunDir(run)

    def compare() -> list[str]:
        return worker._compare(
            run_dir, reload(run_dir.config, ()).leaves, run_dir.load_plan().settings.precision
        )

    assert compare() == []
    stored = json.loads(run_dir.recorded.read_text())
    run_dir.recorded.write_text(json.dumps({**stored, "versions": {**stored["versions"], "torch": "2.0.0"}}))
    (note,) = compare()
    assert "torch is " in note
    assert "2.0.0" in note
    edit(run / "config.yaml", "dropout: 0.1", "dropout: 0.2")
    edit(run / "plan.json", '"precision": "fp32"', '"precision": "bf16"')
    edit(run.parent / "mine.py", "nn.Tanh()", "nn.ReLU()")
    with pytest.raises(SavedStateError) as caught:
        compare()
    assert all(f"  {key}: was " in str(caught.value) for key in ("model.dropout", "precision", "code"))


def test_a_restarted_rank_compares_the_data_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(run.parent))
    for name in ("mine", "mine_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    stored = reload(run / "config.yaml", ()).config
    worker._compare_data(RunDir(run), *build.build_task_and_source(stored))
    edit(run.parent / "points.txt", "0.0", "3.0")
    with pytest.raises(SavedStateError, match=r"data\.contents: was sample 0"):
        worker._compare_data(RunDir(run), *build.build_task_and_source(stored))
    for name in ("mine", "mine_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_run_killed_while_a_change_is_recorded_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatrain.fit import changes

    def killed(path: Path, *more: Any, **words: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(changes, "write_text", killed)  # config.yaml
        with pytest.raises(KeyboardInterrupt):
            resume(run, "optimizer.lr=0.01")
    resume(run)
    resume(run, "optimizer.lr=0.01")
    resume(run)


# --- the whole way --------------------------------------------------------------------------------------


def test_the_printed_command_works_and_trains_what_it_says(started: Path) -> None:
    shutil.copytree(started / "run", started / "whole")
    edit(started / "whole" / "config.yaml", "lr: 0.001", "lr: 0.5")
    said = typed(started, "gatrain resume whole train.steps=6", expect=8)
    assert "  optimizer.lr: was 0.001, is 0.5" in said
    typed(
        started, "gatrain resume " + said.strip().splitlines()[-1].partition("gatrain resume ")[2], expect=0
    )
    lines = (started / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == [0.001] * 4 + [0.5] * 2


# --- what is written down -------------------------------------------------------------------------------


def test_config_holds_what_was_resolved_and_secrets_as_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATE", "1e-2")
    monkeypatch.setenv("WHERE", "here.bin")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3tS3cr3t")
    monkeypatch.setenv("URL", "https://me:hf_s3cr3tS3cr3t@host/data")
    monkeypatch.setenv("ODD", "a${b}")
    words = [
        "recipe=llm", "optimizer.lr=${oc.env:RATE}", "data.path=${oc.env:WHERE}", "+data.token=${oc.env:HF_TOKEN}",
        "+data.url=${oc.env:URL}", "+data.also=${data.token}", "+data.when='${now:%Y}'", "+data.odd=${oc.env:ODD}",
        "+data.listed=[1,'${oc.env:WHERE}']",
    ]  # fmt: skip
    composed = compose(words)
    assert "s3cr3t" not in composed.yaml
    path = tmp_path / "config.yaml"
    path.write_text(composed.yaml)
    for name in ("RATE", "WHERE", "ODD"):
        monkeypatch.delenv(name)
    stored = reload(path, ())
    assert stored.config == composed.config
    assert stored.leaves["data.token"] == "${oc.env:HF_TOKEN}"
    assert stored.leaves["data.url"] == "${oc.env:URL}"
    assert (
        stored.leaves["model.context"] == "${data.context}"
    )  # train.steps=... at resume reaches what refers to it
    assert not any("s3cr3t" in str(value) for value in recorded.public(stored.leaves).values())
    monkeypatch.setenv("WHERE", "there.bin")
    now = resolve_again(composed.yaml, composed.references)
    assert now == {
        "data.path": "there.bin",
        "data.listed.1": "there.bin",
    }  # the others are gone, or the clock's


def test_the_record_of_a_run_holds_no_secret_and_names_its_code(started: Path) -> None:
    stored = recorded.read_recorded(RunDir(started / "run"))
    assert stored is not None
    assert set(stored.code) == {"mine.py", "mine_parts.py"}
    assert stored.references == {"data.path": "${oc.env:POINTS}", "optimizer.lr": "${oc.env:RATE}"}
    assert stored.settings["optimizer.lr"] == 0.001
    assert not dataclasses.asdict(stored)["before"]
    assert (started / "run" / "recorded.json").stat().st_mode & 0o077 == 0
    assert os.path.exists(started / "run" / "data.json")
