"""The door `knobs`: what trials may set beside gatrain's own settings, and what a plan then trains with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gatrain import build
from gatrain.compose import compose
from gatrain.errors import ConfigError, PlanError
from gatrain.plan import Plan, StepSettings
from gatrain.train.attention import AttentionBackend
from gatrain.train.knobs import by_name
from gatrain.tune import knobs

MODULE = '''
import contextlib
import os
import time
from pathlib import Path

import torch
from torch import nn

NAPS = [0.004]
FACTOR = [1.0]


class Naps:
    """How long the model sleeps; a value that changes what it computes must never be chosen."""

    name = "naps"
    words = "how long the model sleeps"

    def values(self, device):
        return ("wrong", "none")

    @contextlib.contextmanager
    def apply(self, value):
        NAPS[0], FACTOR[0] = 0.0, 3.0 if value == "wrong" else 1.0
        try:
            yield
        finally:
            NAPS[0], FACTOR[0] = 0.004, 1.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        time.sleep(NAPS[0] * len(x))
        if (told := os.environ.get("TOLD")) and NAPS[0] == 0.0:
            Path(told).touch()
        return self.layer(x) * FACTOR[0]


def data():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, torch.arange(64) % 4)
'''
RECIPE = """
defaults: [base, _self_]
model: {_target_: sleepy.Model}
data: {_target_: sleepy.data}
task: {_target_: gatrain.tasks.Supervised}
batch: {effective: 8}
train: {steps: 2}
tune: {max_seconds: 60}
device: cpu
checkpointing: none
knobs:
  - {_target_: sleepy.Naps}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "sleepy.py").write_text(MODULE)
    (folder / "recipes" / "sleepy.yaml").write_text(RECIPE)
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


def gatrain(*words: str, told: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = os.environ | ({"TOLD": str(told)} if told else {})
    done = subprocess.run(
        [sys.executable, "-m", "gatrain", *words], env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_persons_own_knob_is_measured_planned_and_trained_with(project: Path, tmp_path: Path) -> None:
    told = tmp_path / "trained_without_naps"
    gatrain("fit", "recipe=sleepy", f"run.dir={tmp_path / 'run'}")
    plan = Plan.from_dict(json.loads((tmp_path / "run" / "plan.json").read_text()))
    assert plan.settings.knobs == {"naps": "none"}
    assert "naps=none was the fastest: how long the model sleeps." in plan.notes
    outcomes = {trial.settings.knobs.get("naps"): trial for trial in plan.trials}
    assert set(outcomes) == {None, "wrong", "none"}
    wrong = next(trial for trial in plan.trials if trial.settings.knobs.get("naps") == "wrong")
    assert "wrong result" in str(wrong.error)
    # remembered, applied in the ranks that train, and held when the run goes on
    again = gatrain("autotune", "recipe=sleepy", told=told)
    assert "naps=none" in again.stdout
    assert "remembered" in again.stdout
    assert not told.exists()
    gatrain("resume", str(tmp_path / "run"), "train.steps=4", told=told)
    assert told.exists()


def test_a_plan_with_a_knob_that_is_gone_is_refused_with_what_to_type(project: Path) -> None:
    without = build.build_knobs(compose(["recipe=sleepy", "knobs=[]"]).config)
    with (
        pytest.raises(PlanError, match="plan without it: gatrain"),
        without.applied({"naps": "none"}, "gatrain x"),
    ):
        pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{_target_: torch.nn.Identity}", "without name, words, values"),
        ("atention", "Did you mean"),
        ("{name: attention, values: [fast]}", "not one of cudnn"),
    ],
)
def test_what_is_no_knob_is_refused(project: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build.build_knobs(compose(["recipe=sleepy", f"knobs=[{value}]"]).config)


class _Given:
    name, words = "mine", "something of mine"

    def __init__(self, values: object, held: object = None) -> None:
        self._values, self._held = values, held

    def values(self, device: torch.device) -> Any:
        return self._values

    def apply(self, value: object) -> Any:
        return self._held


@pytest.mark.parametrize(
    "values", [[None], [(1, 2)], [float("nan")], [float("inf")], [object()], None, "abc", 3]
)
def test_values_that_a_plan_cannot_hold_are_refused_and_never_left_unmeasured(values: object) -> None:
    with pytest.raises(ConfigError, match=r"knob 'mine': values\(device\) gave"):
        by_name([("knobs[0]", _Given(values))]).offers(torch.device("cpu"))


def test_a_value_that_is_given_twice_is_measured_once() -> None:
    offers = by_name([("knobs[0]", _Given([1, 1, True, 1.0, "a", "a"]))]).offers(torch.device("cpu"))
    assert list(map(repr, offers[0]["values"])) == ["1", "True", "1.0", "'a'"]  # type: ignore[call-overload]


def test_an_apply_that_holds_nothing_is_refused_by_name() -> None:
    made = by_name([("knobs[0]", _Given([1]))])
    with (
        pytest.raises(ConfigError, match=r"knob 'mine': apply\(1\) gave a NoneType"),
        made.applied({"mine": 1}),
    ):
        pass


def test_every_setting_of_a_step_has_its_row() -> None:
    settings = StepSettings("bf16", "full", compile=True, sync="overlap", knobs={"attention": "flash"})
    assert {row.name for row in knobs.ROWS} | {"knobs"} == set(settings.__dataclass_fields__)
    assert all(row.of(settings) in row.values for row in knobs.ROWS)
    assert knobs.describe(settings) == "bf16, checkpointing full, compiled, attention=flash"
    row = knobs.row_of(knobs.KnobOffer("attention", ("flash",), "kernel"))
    assert row.of(row.set(settings, None)) is None
    assert row.set(row.set(settings, None), "flash") == settings
    simpler = row.set(settings, None)
    assert knobs.simplicity(simpler) < knobs.simplicity(settings)
    assert knobs.differences(settings, simpler) == ["attention=flash"]


@pytest.mark.parametrize("value", ["cudnn", "flash", "efficient", "math"])
def test_a_backend_of_attention_comes_first_and_leaves_no_trace(value: str) -> None:
    x = torch.randn(2, 2, 8, 4)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    before = torch._C._get_sdp_priority_order()
    with AttentionBackend().apply(value):
        assert torch._C._get_sdp_priority_order() != before or value == "flash"
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(x, x, x), wanted)
    assert torch._C._get_sdp_priority_order() == before
    assert AttentionBackend().values(torch.device("cpu")) == ()
