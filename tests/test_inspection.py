"""The inspection of model and data, what is remembered of it with a tuning answer, and a run that is outdated."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tune import CPU, Machine, config_of, info_of
from torch import nn
from torch.utils.data import TensorDataset

from gatrain import codec, outdated, tune
from gatrain.batch import Split
from gatrain.compose import compose
from gatrain.config import RunConfig
from gatrain.errors import DataError, OutdatedPlanError
from gatrain.fit.planning import why_plan_again
from gatrain.inspected import Inspected
from gatrain.inspection import begin_inspection, inspect_run, inspected
from gatrain.launch.world import Nodes
from gatrain.plan import MadeFor, Plan, StepSettings
from gatrain.rundir import RunDir, write_json
from gatrain.sources import file_states, named_files, own_modules
from gatrain.tasks import Supervised
from gatrain.train.data_look import look_at_data

MINE = """
import json, torch
from torch import nn

def size(name):
    return json.load(open("sizes.json"))[name]

def net():
    return nn.Sequential(nn.Linear(4, size("width")), nn.ReLU(), nn.Linear(size("width"), 4))

def points(root="."):
    x = torch.randn(size("samples"), 4)
    return torch.utils.data.TensorDataset(x, x)
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.net}
data: {_target_: mine.points}
loss: {_target_: torch.nn.MSELoss}
batch: {effective: 16}
train: {steps: 3}
tune: {max_seconds: 1}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and a module of one's own, and an empty cache."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "mine.yaml").write_text(RECIPE)
    sizes(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    return folder


def sizes(folder: Path, samples: int = 500, width: int = 16) -> None:
    (folder / "sizes.json").write_text(json.dumps({"samples": samples, "width": width}))


# --- the inspection -------------------------------------------------------------------------------------


def test_an_inspection_tells_what_model_and_data_are(here: Path) -> None:
    composed = compose(["recipe=./mine.yaml"], here)
    with begin_inspection(composed.yaml, here) as child:
        found = inspected(child)
    assert (found.samples, found.eval_samples, found.parameters) == (500, 0, 2 * 16 * 4 + 16 + 4)
    assert found.data is not None
    assert found.data.train_samples == 500
    assert found.code == (str(here / "mine.py"),)
    assert list(found.files) == [str(here / "mine.py")]
    assert codec.decode(Inspected, json.loads(json.dumps(codec.encode(found)))) == found


def test_an_inspection_refuses_before_anything_is_spent(here: Path) -> None:
    composed = compose(["recipe=./mine.yaml", "batch.effective=501"], here)
    with pytest.raises(DataError, match=r"has 500 samples, fewer than batch\.effective=501"):
        inspect_run(composed.yaml, here)


@pytest.mark.parametrize(
    "changes", [{"samples": -1}, {"samples": "100"}, {"checkpointing_modes": [1]}, {"files": 3}, {"data": {}}]
)
def test_what_is_no_inspection_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        codec.decode(Inspected, codec.encode(info_of()) | changes)


def test_files_are_those_that_values_name(here: Path) -> None:
    (here / "a").mkdir()
    node = {"_target_": "mine.points", "x": ["a", {"y": "mine.py"}], "cache_dir": "a", "z": "no\0path"}
    assert named_files(node, here) == [str(here / "a"), str(here / "mine.py")]
    assert named_files(["", "x" * 5000, "~nobody-of-this-name/x", 3, None, ("missing",)], here) == []
    assert str(Path(__file__)) in own_modules()
    assert not [path for path in own_modules() if "site-packages" in path or path.endswith("gatrain/plan.py")]


# --- what is remembered with a tuning answer ------------------------------------------------------------


def measured(config: RunConfig, found: Inspected) -> None:
    tune.Tuner(config, CPU, Nodes(1)).plan(found, run=Machine())


def remembered(config: RunConfig) -> Inspected | None:
    answer = tune.Tuner(config, CPU, Nodes(1)).remembered()
    if answer is None:
        return None
    plan, found = answer
    assert plan.made_for == MadeFor(found.parameters, found.samples, found.eval_samples, is_remembered=True)
    assert "remembered" in plan.reason
    return found


def own(**nodes: Any) -> RunConfig:
    return dataclasses.replace(config_of(16), data={"_target_": "mine.points", "root": "data"}, **nodes)


def test_an_answer_needs_no_inspection_while_nothing_has_changed(here: Path) -> None:
    assert remembered(own()) is None
    measured(own(), info_of())
    assert remembered(own()) == info_of()
    assert remembered(dataclasses.replace(own(), eval=dataclasses.replace(own().eval, every=7))) == info_of()


def write(path: str) -> Callable[[pytest.MonkeyPatch], object]:
    return lambda patch: Path(path).write_text("pass\n")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(write("mine.py"), id="module edited"),
        pytest.param(write("beside.py"), id="module beside it"),
        pytest.param(write("data/more.txt"), id="a file more in the folder that it names"),
        pytest.param(lambda patch: os.utime("elsewhere.py", ns=(1, 1)), id="imported module touched"),
        pytest.param(lambda patch: os.remove("elsewhere.py"), id="imported module removed"),
        pytest.param(lambda patch: patch.setattr(sys, "version", "4.0"), id="another Python"),
        pytest.param(lambda patch: patch.setattr("gatrain.trust._trusted", ("a.b",)), id="another trust"),
    ],
)
def test_a_change_is_inspected(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], object],
) -> None:
    (here / "data").mkdir()
    (here / "elsewhere.py").touch()
    files = file_states([str(here / "data"), str(here / "elsewhere.py")])
    measured(own(), info_of(files=files))
    assert remembered(own()) is not None
    change(monkeypatch)
    assert remembered(own()) is None


@pytest.mark.usefixtures("here")
def test_a_memory_refuses_no_run_and_answers_nothing_that_has_to_be_measured() -> None:
    measured(own(), info_of(samples=20))
    larger = dataclasses.replace(own(), batch=dataclasses.replace(own().batch, effective=21))
    assert remembered(larger) is None
    assert tune.Tuner(own(), CPU, Nodes(2)).remembered() is None


@pytest.mark.usefixtures("here")
def test_curves_of_another_model_or_other_data_do_not_count() -> None:
    measured(own(), info_of())
    again = Machine()
    tune.Tuner(own(), CPU, Nodes(1)).plan(info_of(parameters=7), run=again)
    assert again.asked
    untouched = Machine()
    found = info_of(parameters=7, remarks=("looked at anew",))
    tune.Tuner(own(), CPU, Nodes(1)).plan(found, run=untouched)
    assert not untouched.asked
    assert remembered(own()) == found  # what was found last is what is remembered


# --- outdated -------------------------------------------------------------------------------------------


def plan_for(made_for: MadeFor | None) -> Plan:
    settings = StepSettings("fp32", "none", False, "window")
    return Plan(split=Split(8, 1), micro_batch=8, settings=settings, reason="", made_for=made_for)


def task_of(samples: int, factor: float = 1.0) -> Supervised:
    x = factor * torch.arange(samples * 4.0).view(samples, 4)
    return Supervised(lambda: nn.Linear(4, 4), TensorDataset(x, x), nn.MSELoss())


@pytest.mark.parametrize(
    ("now", "what"),
    [(task_of(99), "training samples: was 100, is 99"), (task_of(100, 2.0), "data.contents: was sample")],
)
def test_a_rank_asks_for_another_plan_where_a_remembered_one_was_for_other_data(
    tmp_path: Path, now: Supervised, what: str
) -> None:
    run_dir, then = RunDir(tmp_path), task_of(100)
    write_json(run_dir.data, look_at_data(then, None).to_dict())
    remembered, fresh = (plan_for(MadeFor(20, 100, 0, is_remembered=each)) for each in (True, False))
    assert outdated.check_data(run_dir, remembered, then, None) == []
    with pytest.raises(OutdatedPlanError, match=what):
        outdated.check_data(run_dir, remembered, now, None)
    said = outdated.check_data(
        run_dir, fresh, now, None
    )  # inspected just now: another plan would be no better
    assert bool(said) == ("samples" in what and len(now.train_data) != 100)
    assert outdated.check_data(run_dir, plan_for(None), now, None) == []  # of an earlier version


def test_a_rank_asks_for_another_plan_where_a_remembered_one_was_for_another_model() -> None:
    remembered, fresh = (plan_for(MadeFor(20, 100, 0, is_remembered=each)) for each in (True, False))
    assert outdated.check_model(remembered, 20) == []
    with pytest.raises(OutdatedPlanError, match="model parameters: was 20, is 1,000"):
        outdated.check_model(remembered, 1000)
    assert "was 20, is 1,000" in outdated.check_model(fresh, 1000)[0]


def test_a_run_that_goes_on_is_planned_again_for_another_model_or_data_of_another_size(
    tmp_path: Path,
) -> None:
    run_dir, data = RunDir(tmp_path), look_at_data(task_of(100), None)
    write_json(run_dir.data, data.to_dict())
    plan, found = plan_for(MadeFor(20, 100, 0)), info_of(samples=100, parameters=20, data=data)
    assert why_plan_again(run_dir, plan, found) == ""
    assert why_plan_again(run_dir, None, found) == ""
    assert "model parameters: was 20, is 21" in why_plan_again(
        run_dir, plan, dataclasses.replace(found, parameters=21)
    )
    assert "held-out samples: was 0, is 5" in why_plan_again(
        run_dir, plan, dataclasses.replace(found, eval_samples=5)
    )
    longer = dataclasses.replace(data, shapes="float32 [9], float32 [9]")
    assert "float32 [9]" in why_plan_again(run_dir, plan, dataclasses.replace(found, data=longer))


def test_data_that_changed_unseen_by_any_key_is_noticed_by_the_run_and_planned_for(here: Path) -> None:
    def gatrain(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gatrain", *words, "recipe=./mine.yaml"]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    assert "Inspecting" in gatrain("autotune", "--json").stderr
    sizes(here, samples=400)
    done = gatrain("fit", "run.dir=run")
    assert "(training samples: was 500, is 400). It is planned again." in done.stderr
    assert done.stderr.index("planned again") < done.stderr.index("Inspecting")
    run = RunDir(here / "run")
    plan = run.load_plan()
    assert plan.made_for is not None
    assert (plan.made_for.samples, plan.made_for.is_remembered) == (400, False)
    assert "remembered" not in plan.reason
    assert json.loads(run.data.read_text())["train_samples"] == 400
    assert json.loads(run.summary.read_text())["step"] == 3
