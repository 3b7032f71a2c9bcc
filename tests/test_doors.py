"""Every door at once: a person's own parts, from a folder and YAML alone, killed, resumed and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import gatrain, metrics, project
from safetensors.torch import load_file

OWN = '''
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from gatrain import Hook, Logger
from gatrain.launch.schedulers import Job, Scheduler
from gatrain.train.gradient import GradientStrategy


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1))


class Stream(torch.utils.data.IterableDataset):
    """Points without an end and without a number."""

    def __iter__(self):
        place = 0
        while True:
            x = torch.randn(4, generator=torch.Generator().manual_seed(place))
            yield x, x.sum().reshape(1)
            place += 1


class HeavyBall(torch.optim.Optimizer):
    """Momentum, by hand."""

    def __init__(self, params, lr=0.05, drag=0.5):
        super().__init__(params, {"lr": lr, "drag": drag})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "speed" not in state:
                    state["speed"] = torch.zeros_like(p)
                state["speed"].mul_(group["drag"]).add_(p.grad)
                p.add_(state["speed"], alpha=-group["lr"])


def sawtooth(step):
    return 1.0 - 0.1 * (step % 5)


class Counted(GradientStrategy):
    """A backward for each micro-batch; windows are counted."""

    exact = "the gradient of the whole window, for any loss that is a sum over samples"
    windows = 0

    def __call__(self, window, step):
        self.windows += 1
        for k, batch in step.batches(window):
            step.seed(window, k)
            step.forward_backward(batch)
        with open("passes.txt", "a") as file:
            file.write(f"{len(window.micro_batches)}\\n")

    def state_dict(self):
        return {"windows": self.windows}

    def load_state_dict(self, state):
        self.windows = state["windows"]


class Travelled(Hook):
    """How far the weights have come, summed over all updates."""

    def start(self, run):
        self.run = run
        self.far = torch.zeros((), dtype=torch.float64)

    def update(self, done):
        self.far += sum(p.double().abs().sum() for p in done.model.parameters())
        if os.environ.get("PLANTED") == str(done.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"far": self.far.clone()}

    def state_dict(self):
        return {"far": self.far}

    def load_state_dict(self, state):
        self.far = state["far"]


class Diary(Logger):
    """A line for each step."""

    def step(self, record):
        with open("diary.txt", "a") as file:
            file.write(f"{record.step} {record.metrics['far']!r}\\n")


class Pods(Scheduler):
    """A cluster of its own kind, which names the run."""

    def detect(self, environ):
        return Job("pods", environ["POD_JOB"]) if "POD_JOB" in environ else None


class Order:
    """Does the same in another way: trials measure it."""

    name = "order"
    words = "sums in another order"

    def values(self, device):
        return ["other"]

    @contextmanager
    def apply(self, value):
        with open("knob.txt", "a") as file:
            file.write(f"{value}\\n")
        yield
'''

RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.net}
data: {_target_: mine.Stream}
loss: {_target_: torch.nn.MSELoss}
optimizer: {_target_: mine.HeavyBall, lr: 0.02, drag: 0.8}
schedule: {_target_: mine.sawtooth}
gradient: {_target_: mine.Counted}
hooks: [{_target_: mine.Travelled}]
logger: [{_target_: mine.Diary}]
scheduler: {_target_: mine.Pods}
knobs: [{_target_: mine.Order}]
batch: {effective: 12, micro: 5}
train: {steps: 9, log_every: 1}
save: {every: 3}
tune: {max_seconds: 5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's folder with two runs: one to its end, one killed after its fifth step and resumed."""
    made = project(tmp_path_factory.mktemp("own"), OWN, RECIPE)
    gatrain(made, "fit", "recipe=mine", "run.dir=whole")
    gatrain(made, "fit", "recipe=mine", "run.dir=killed", expect=11, PLANTED="5")
    gatrain(made, "resume", "killed")
    return made


@pytest.mark.chaos
def test_own_parts_at_every_door_are_killed_and_go_on_to_the_same_bits(folder: Path) -> None:
    whole, killed = (
        load_file(folder / name / "saved/step_00000009/model.safetensors") for name in ("whole", "killed")
    )
    assert all(whole[name].equal(killed[name]) for name in whole)
    kept = ("step", "loss", "grad_norm", "lr", "window", "metrics")
    one, other = (
        [{key: line[key] for key in kept} for line in metrics(folder / name)] for name in ("whole", "killed")
    )
    assert one == other
    assert len(one) == 9


def test_every_part_of_ones_own_was_used(folder: Path) -> None:
    lines = metrics(folder / "whole")
    assert [line["lr"] for line in lines] == pytest.approx(
        [0.02 * (1 - 0.1 * (step % 5)) for step in range(9)]
    )
    assert "3" in (folder / "passes.txt").read_text().split()  # 12 samples are 4 + 4 + 4
    assert (folder / "diary.txt").read_text().splitlines()[0].startswith("1 ")
    assert "other" in (folder / "knob.txt").read_text()
    state = json.loads((folder / "whole/saved/step_00000009/progress.json").read_text())
    assert "108" in json.dumps(state["stream"])  # samples that were read
    assert "HeavyBall" in (folder / "whole/config.yaml").read_text()


def test_a_gradient_strategy_goes_on_from_the_state_that_it_gave(folder: Path) -> None:
    for name in ("whole", "killed"):
        assert json.loads((folder / name / "saved/step_00000009/gradient.json").read_text()) == {"windows": 9}


def test_the_scheduler_of_ones_own_names_the_run(folder: Path) -> None:
    said = gatrain(folder, "fit", "recipe=mine", "train.steps=1", POD_JOB="77")
    assert "77" in said.split("Run folder: ")[1].splitlines()[0]


def test_a_run_of_own_parts_is_verified(folder: Path) -> None:
    assert "exact" in gatrain(folder, "verify", "recipe=mine")
