"""The doors `hooks` and `logger`: a person's own and the shipped ones, from a folder and YAML alone, killed and
resumed, on one rank and on two."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gatrain, metrics
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from gatrain import build
from gatrain.compose import compose
from gatrain.errors import ConfigError, ExactnessError, PeerFailed, SavedStateError
from gatrain.hooks.best import Best
from gatrain.hooks.early_stopping import EarlyStopping
from gatrain.hooks.ema import EMA
from gatrain.plan import StepSettings
from gatrain.report.mlflow import MLflowLogger
from gatrain.report.sink import Fanout, Logger
from gatrain.report.wandb import WandbLogger
from gatrain.states import keep_state
from gatrain.train import parts, saved_state
from gatrain.train.events import RunInfo
from gatrain.train.hook import Hook, HookRun, TrainedStep
from gatrain.train.hooks import Hooks, named
from gatrain.train.ranks import Ranks
from gatrain.train.records import RunSummary, StepRecord
from gatrain.train.saved_state import Progress

MODULE = """
import copy, os, signal
import torch
import torch.nn.functional as F
from torch import nn
import gatrain

class WithTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(4, 2)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def move_teacher(self, decay=0.9):
        for t, s in zip(self.teacher.parameters(), self.student.parameters()):
            t.lerp_(s, 1 - decay)

def points():
    g = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(18, 4, generator=g), torch.randn(18, 2, generator=g))

class Distil(gatrain.Task):
    def __init__(self, model, data):
        self.make = model
        self.train_data, self.eval_data = (torch.utils.data.Subset(data, r) for r in (range(12), range(12, 18)))

    def build_model(self):
        return self.make()

    def weight(self, batch):
        return len(batch[0])

    def loss_sum(self, model, batch):
        net = getattr(model, "module", model)
        out, target = net.student(batch[0]), net.teacher(batch[0])
        each = (F.mse_loss(out, wanted, reduction="none").mean(1) for wanted in (target, batch[1]))
        return sum(loss.sum() for loss in each), len(batch[0])

    def eval_metrics(self, model, batch):
        return {"flat": (torch.tensor(1.0 * len(batch[0])), len(batch[0]))}

class MoveTeacher(gatrain.Hook):
    # the obvious place for "after the optimizer step"
    def __init__(self, decay):
        self.decay, self.moves = decay, 0

    def start(self, run):
        self.rank = run.rank

    def update(self, step):
        if f"fail {self.rank} {step.step}" == os.environ.get("PLANTED"):
            raise ValueError("planted in the hook")  # here
        if f"kill {self.rank} {step.step}" == os.environ.get("PLANTED"):
            os.kill(os.getpid(), signal.SIGKILL)
        step.model.move_teacher(self.decay)
        self.moves += 1
        return {"moves": self.moves, "norm_squared": step.grad_norm ** 2}

    def state_dict(self):
        return {"moves": self.moves}

    def load_state_dict(self, state):
        self.moves = state["moves"]

class Lines(gatrain.Logger):
    def __init__(self, file):
        self.file = file

    def start(self, info):
        self.path = info.run_dir / self.file

    def step(self, record):
        with self.path.open("a") as lines:
            print(record.step, record.loss, record.metrics["moves"], file=lines)

class Broken(gatrain.Logger):
    def step(self, record):
        raise ValueError("planted in the logger")
"""
RECIPE = """
defaults: [base, override optimizer: sgd, override schedule: constant, _self_]
model: {_target_: mine.WithTeacher}
data: {_target_: mine.points}
task: {_target_: mine.Distil}
batch: {effective: 12, micro: 4}
train: {steps: 40}
eval: {every: 2}
save: {every: 3, keep: 1}
optimizer: {lr: 0.1, momentum: 0.0, nesterov: false, weight_decay: 0.0}
hooks:
  - {name: ema, decay: 0.8}
  - {name: keep_best, metric: ema.loss}
  - {name: early_stopping, metric: flat, patience: 4}
  - {_target_: mine.MoveTeacher, decay: 0.9}
logger:
  - {_target_: mine.Lines, file: mine.txt}
  - {_target_: mine.Broken}
device: cpu
"""
STEPS = 10
"""Until early_stopping ends the run: the first evaluation is the best one, four later ones are not better."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: one module, one recipe, and the runs of all tests."""
    path = tmp_path_factory.mktemp("hooks")
    (path / "mine.py").write_text(MODULE)
    (path / "recipes").mkdir()
    (path / "recipes" / "mine.yaml").write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A whole run of one rank. Its logger Broken fails, which no more than exit code 12 tells."""
    printed = gatrain(folder, "fit", "recipe=mine", "run.dir=alone", expect=12)
    assert "Broken is off after an error in step: planted in the logger" in printed
    return folder / "alone"


@pytest.fixture(scope="module")
def pair(folder: Path) -> Path:
    """A whole run of two ranks."""
    gatrain(folder, "launch", "--nproc", "2", "recipe=mine", "run.dir=pair", "logger=[]")
    return folder / "pair"


def last(run: Path, file: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(run / "saved" / f"step_{STEPS:08d}" / file)


def reference() -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, averaged weights and losses of a plain loop over the whole effective batch."""
    scope: dict[str, Any] = {}
    exec(MODULE, scope)
    torch.manual_seed(0)
    model, data = scope["WithTeacher"](), scope["points"]()
    task = scope["Distil"](None, data)
    x, y = (tensor[:12] for tensor in data.tensors)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = task.loss_sum(model, (x, y))[0] / 12
        loss.backward()
        optimizer.step()
        for name, value in model.state_dict().items():
            if name.startswith("student"):
                average[name] = 0.8 * average[name] + 0.2 * value
        model.move_teacher(0.9)
        losses.append(float(loss.detach()))
    average |= {name: value for name, value in model.state_dict().items() if name.startswith("teacher")}
    return model.state_dict(), average, losses


@pytest.mark.parametrize("which", ["alone", "pair"])
def test_averages_move_once_an_update_whatever_the_split(which: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    weights, average, losses = reference()
    torch.testing.assert_close(last(run), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last(run, "ema.safetensors"), average, rtol=1e-5, atol=1e-6)
    assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-5)
    assert [line["metrics"]["moves"] for line in metrics(run)] == list(range(1, STEPS + 1))
    for line in metrics(run):
        assert line["metrics"]["norm_squared"] == pytest.approx(line["grad_norm"] ** 2)


def test_a_run_is_ended_measured_and_logged_by_parts_of_ones_own(alone: Path) -> None:
    summary = json.loads((alone / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["total_steps"]) == ("completed", STEPS, 40)
    assert summary["stopped_early"] == "flat has not been better than 1 (step 2) for 4 evaluations"
    lines = [line.split() for line in (alone / "mine.txt").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss, _ in lines] == [
        (line["step"], line["loss"]) for line in metrics(alone)
    ]


def test_evaluations_hold_the_numbers_of_both_weights_and_the_averaged_ones_are_those_exported(
    alone: Path,
) -> None:
    lines = [json.loads(line) for line in (alone / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    scope: dict[str, Any] = {}
    exec(MODULE, scope)
    model, data = scope["WithTeacher"](), scope["points"]()
    for file, key in (("model.safetensors", "loss"), ("ema.safetensors", "ema.loss")):
        load_model(model, alone / "saved" / f"step_{STEPS:08d}" / file)
        batch = tuple(tensor[12:] for tensor in data.tensors)
        loss = scope["Distil"](None, data).loss_sum(model, batch)[0] / 6
        assert lines[-1][key] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert lines[-1]["loss"] != lines[-1]["ema.loss"]


def test_the_best_state_stays_beside_the_newest_ones(alone: Path) -> None:
    lines = [json.loads(line) for line in (alone / "evaluations.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["ema.loss"])["step"]
    assert [path.name for path in (alone / "kept" / "best").iterdir()] == [f"step_{best:08d}"]
    assert [path.name for path in (alone / "saved").iterdir()] == [f"step_{STEPS:08d}"]
    kept = json.loads((alone / "kept" / "best" / f"step_{best:08d}" / "hooks.json").read_text())
    assert kept["states"]["MoveTeacher"]["moves"] == best


def test_an_error_on_one_rank_loses_nothing_and_a_killed_run_goes_on_to_the_same_bits(
    folder: Path, pair: Path
) -> None:
    words = ("launch", "--nproc", "2", "recipe=mine", "run.dir=broken", "logger=[]")
    printed = gatrain(folder, *words, expect=11, PLANTED="fail 1 4")
    assert "planted in the hook" in printed
    assert f"{folder / 'mine.py'}:{MODULE[: MODULE.index('# here')].count(chr(10)) + 1} in update" in printed
    assert [path.name for path in (folder / "broken" / "saved").iterdir()] == ["step_00000004"]
    gatrain(folder, "resume", "broken", "--nproc", "2", expect=11, PLANTED="kill 1 8")
    gatrain(folder, "resume", "broken", "--nproc", "2")
    resumed = folder / "broken"
    for file in ("model.safetensors", "ema.safetensors", "hooks.safetensors"):
        wanted, given = last(pair, file), last(resumed, file)
        assert wanted.keys() == given.keys()
        assert all(torch.equal(wanted[name], given[name]) for name in wanted), file
    assert (resumed / "evaluations.jsonl").read_text() == (pair / "evaluations.jsonl").read_text()
    assert [line["metrics"] for line in metrics(resumed)] == [line["metrics"] for line in metrics(pair)]
    states = [
        json.loads((run / "saved" / f"step_{STEPS:08d}" / "hooks.json").read_text())
        for run in (pair, resumed)
    ]
    assert states[0] == states[1]
    assert [p.name for p in (resumed / "kept" / "best").iterdir()] == [
        p.name for p in (pair / "kept" / "best").iterdir()
    ]


def test_other_hooks_at_a_resume_are_refused_until_they_are_accepted_by_name(
    folder: Path, alone: Path
) -> None:
    teacher = last(alone)["teacher.weight"]
    words = ("resume", "alone", "hooks=[{name:ema,decay:0.0}]", "train.steps=12", "logger=[]")
    assert "cannot change when a run goes on" in gatrain(folder, *words, expect=2)
    printed = gatrain(folder, *words, "--accept-changes", "hooks")
    for gone in ("keep_best", "early_stopping", "MoveTeacher"):
        assert f"the saved state holds the hook {gone}, which the run no longer has" in printed
    after = alone / "saved" / "step_00000012"
    model, average = load_file(after / "model.safetensors"), load_file(after / "ema.safetensors")
    assert all(torch.equal(model[name], average[name]) for name in model)  # the decay is 0 now
    assert torch.equal(model["teacher.weight"], teacher)  # nothing moves it any more


# --- what a part may hold


def test_a_part_comes_back_as_it_was() -> None:
    part = {
        "a": torch.arange(3),
        "b": [1, 2.5, None, True, "x", {"c": torch.zeros(2, 2, dtype=torch.bfloat16)}],
        "inf": math.inf,
        "x/y": torch.ones(1),
        "x": {"y": torch.zeros(1)},
    }
    data, tensors = parts.split(part, "it")
    back = parts.join(json.loads(json.dumps(data)), tensors)
    assert torch.equal(back["a"], part["a"])
    assert back["b"][:5] == part["b"][:5]
    assert back["b"][5]["c"].dtype == torch.bfloat16
    assert (float(back["x/y"]), float(back["x"]["y"]), back["inf"]) == (1, 0, math.inf)


@pytest.mark.parametrize(
    ("part", "what"),
    [({"a": {1, 2}}, "a set at a"), ({"a": {3: 1}}, "the key 3 at a"), ({"a": [nn]}, "module at a/0")],
)
def test_a_part_with_something_else_is_refused_by_its_place(part: Any, what: str) -> None:
    with pytest.raises(SavedStateError, match=what):
        parts.split(part, "it")


@pytest.mark.parametrize(
    "data", [{"a": {"__tensor__": "other"}}, {}, {"a": {"__tensor__": "t"}, "b": {"__tensor__": "t"}}]
)
def test_tensors_and_text_of_a_part_must_belong_together(data: Any) -> None:
    with pytest.raises(ValueError, match="tensor"):
        parts.join(data, {"t": torch.zeros(1)})


def saved_with_a_part(folder: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    progress = Progress(1, 4, 0, 4, 0, 9)
    part, export = {"x": torch.arange(3.0), "n": 3}, {"weight": torch.ones(3, 3), "bias": torch.zeros(3)}
    state = saved_state.snapshot(progress, model, optimizer, parts={"hooks": part}, exports={"ema": export})
    return saved_state.write(folder, state, keep=0), model, optimizer


def test_parts_and_further_weights_are_checked_with_the_state(tmp_path: Path) -> None:
    path, model, optimizer = saved_with_a_part(tmp_path)
    loaded = saved_state.read(path, model, optimizer)
    assert (loaded.parts["hooks"]["n"], loaded.parts["hooks"]["x"].tolist()) == (3, [0, 1, 2])
    for file in ("hooks.json", "hooks.safetensors", "ema.safetensors"):
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert saved_state.find_damage(path) == f"{file} does not match its checksum"
        (path / file).unlink()
        assert saved_state.find_damage(path) == f"{file} is missing"
        (path / file).write_bytes(content)
    assert saved_state.find_damage(path) is None


@pytest.mark.parametrize("name", ["../x.json", "x.pkl", "X.json", "/x.json", "model.json/x.json"])
def test_a_manifest_that_names_other_files_is_damaged(name: str, tmp_path: Path) -> None:
    path, _, _ = saved_with_a_part(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, name: manifest["hooks.json"]}))
    assert "names files that no state has" in str(saved_state.find_damage(path))


def test_a_kept_state_outlives_those_that_are_removed_and_takes_the_place_of_the_one_before(
    tmp_path: Path,
) -> None:
    path, _, _ = saved_with_a_part(tmp_path / "saved")
    later = path.rename(path.with_name("step_00000002"))
    path, _, _ = saved_with_a_part(tmp_path / "saved")
    for state in (later, path):
        keep_state(state, tmp_path / "kept" / "best")
    for file in path.iterdir():
        file.unlink()
    assert [each.name for each in (tmp_path / "kept" / "best").iterdir()] == ["step_00000001"]
    assert saved_state.find_damage(tmp_path / "kept" / "best" / "step_00000001") is None


# --- the moving average


def run_of(model: nn.Module, **changes: Any) -> HookRun:
    facts: dict[str, Any] = {
        "model": model, "task": None, "effective_batch": 12, "step": 0, "total_steps": 9, "rank": 0,
        "world_size": 1,
        "run_dir": Path(), "trained": dict(model.named_parameters()), "evaluates": True,
        "stop": lambda reason: None, "keep": lambda name: None, "notice": lambda text: None,
    }  # fmt: skip
    return HookRun(**{**facts, **changes})


def step_of(model: nn.Module, updates: int, left_out: Tensor | None = None) -> TrainedStep:
    return TrainedStep(model, updates, updates, 0.1, torch.ones(()), {}, {}, left_out)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_a_window_that_was_not_finite_leaves_the_average_bit_for_bit() -> None:
    model = net()
    ema = EMA(decay=0.5, buffers="average")
    ema.start(run_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model[1].running_mean.fill_(2.0)
        ema.update(step_of(model, 1, torch.zeros(())))
        assert torch.equal(ema._buffers["1.running_mean"], torch.ones(4))
        before = copy.deepcopy(ema.state_dict())
        model[1].running_mean.fill_(math.nan)
        ema.update(step_of(model, 2, torch.ones(())))
    for part in ("averages", "buffers"):
        for name, value in ema.state_dict()[part].items():
            assert torch.equal(value, before[part][name]), name


def test_warmup_forgets_the_first_weights_soon() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(decay=0.999, warmup=True)
    nn.init.zeros_(model.weight)
    ema.start(run_of(model))
    nn.init.ones_(model.weight)
    expected = 0.0
    with torch.no_grad():
        for updates in range(1, 6):
            ema.update(step_of(model, updates))
            decay = min(0.999, (1 + updates) / (10 + updates))
            expected = decay * expected + (1 - decay)
    assert float(ema.state_dict()["averages"]["weight"]) == pytest.approx(expected)


def test_the_models_own_weights_come_back_after_an_evaluation_and_tied_ones_are_exported() -> None:
    model = net()
    model[2].weight = nn.Parameter(model[0].weight.detach().T.contiguous())
    model.add_module("tied", nn.Linear(3, 4))
    model.tied.weight = model[0].weight
    ema = EMA(decay=0.5)
    ema.start(run_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        ema.update(step_of(model, 1))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    inside: dict[str, Tensor] = {}

    def fail() -> None:
        with ema.weights()["ema"]:
            inside.update((name, value.clone()) for name, value in model.state_dict().items())
            raise RuntimeError("in the evaluation")

    with pytest.raises(RuntimeError, match="in the evaluation"):
        fail()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    exported = ema.exports()["ema"]
    assert exported["tied.weight"] is exported["0.weight"]
    assert all(torch.equal(inside[name], value) for name, value in exported.items())
    torch.testing.assert_close(exported["0.weight"], own["0.weight"] / 3 * 2)


def test_16_bit_parameters_are_averaged_in_fp32_and_exported_in_16() -> None:
    model = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    master = model.weight.detach().float()
    ema = EMA(decay=0.9)
    ema.start(run_of(model, trained={"weight": master}))
    master += 1e-3  # too little for bfloat16
    with torch.no_grad():
        ema.update(step_of(model, 1))
    assert ema.state_dict()["averages"]["weight"].dtype == torch.float32
    assert ema.exports()["ema"]["weight"].dtype == torch.bfloat16
    with pytest.raises(SavedStateError, match="shape"):
        ema.load_state_dict({"averages": {"weight": torch.zeros(3)}, "buffers": {}})
    with pytest.raises(SavedStateError, match="another model"):
        ema.load_state_dict({"averages": {"other": torch.zeros(2, 2)}, "buffers": {}})


def test_trials_and_predictions_hold_as_much_memory_as_hooks_will() -> None:
    words = ["recipe=vision", "device=cpu"]
    config = compose([*words, "hooks=[ema]"]).config
    task = build.build_task(config)
    engine = build.build_engine(
        task, config, StepSettings("fp32", "none", False, "window"), torch.device("cpu"), in_place=True
    )
    averages = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    assert engine.reserved is not None
    assert averages <= engine.reserved.numel() <= 2 * averages
    assert (
        build.build_engine(
            task, config, StepSettings("fp32", "none", False, "window"), torch.device("cpu")
        ).reserved
        is None
    )


# --- watching a number


@pytest.mark.parametrize(
    ("mode", "values", "steps"),
    [
        ("min", [3, 2, math.nan, 2, 1], [1, 2, 5]),
        ("max", [1, 3, 3.05, 4], [1, 2, 4]),
        ("min", [math.nan, 5], [2]),
    ],
)
def test_better_means_by_more_than_min_delta_and_never_nan(
    mode: str, values: list[float], steps: list[int]
) -> None:
    best = Best("it", "loss", mode, min_delta=0.1)
    assert [n for n, value in enumerate(values, 1) if best.improves(n, {"loss": value})] == steps


def test_a_number_that_the_evaluation_has_not_is_told_with_those_that_it_has() -> None:
    with pytest.raises(
        ConfigError, match=r"metric=acuracy is not one of .*: loss, accuracy\. Did you mean 'accuracy'"
    ):
        Best("it", "acuracy", "max").improves(2, {"loss": 1.0, "accuracy": 0.5, "loss_terms": {}})


def test_a_resumed_run_with_more_patience_goes_on_and_with_the_same_ends_again() -> None:
    asked: list[str] = []
    hook = EarlyStopping(patience=2)
    hook.start(run_of(net(), stop=asked.append))
    for step, loss in enumerate((1.0, 2.0, 2.0), 1):
        hook.evaluated(step, {"loss": loss})
    assert len(asked) == 1
    for patience, ends in ((2, True), (3, False)):
        asked.clear()
        again = EarlyStopping(patience=patience)
        again.start(run_of(net(), stop=asked.append))
        again.load_state_dict(hook.state_dict())
        assert bool(asked) is ends


# --- many hooks


class Recorder(Hook):
    def __init__(self, fails: str = "") -> None:
        self.fails, self.seen = fails, 0

    def update(self, step: TrainedStep) -> Mapping[str, float]:
        self.seen += 1
        if self.fails == "update":
            raise ValueError("planted")
        return {"seen": self.seen}

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "state_dict":
            raise ValueError("planted")
        return {"seen": self.seen}


def started(hooks: Hooks, part: Any = None, step: int = 0) -> list[str]:
    model = net()
    return hooks.start(lambda **asks: run_of(model, step=step, **asks), part)


def test_an_error_waits_until_all_ranks_can_leave_and_the_state_says_what_is_missing() -> None:
    broken, later = Recorder("update"), Recorder()
    hooks = Hooks({"broken": broken, "later": later}, Ranks())
    started(hooks)
    assert hooks.update(step_of(net(), 1)) == {}
    assert later.seen == 0
    with pytest.raises(ValueError, match="planted"):
        hooks.settle()
    part = hooks.state_dict()
    again = Hooks({"broken": Recorder(), "later": Recorder()}, Ranks())
    (notice,) = started(again, json.loads(json.dumps(part)), 1)
    assert "the hook broken failed in step 1" in notice


def test_a_failure_of_another_rank_ends_this_one() -> None:
    class Two(Ranks):
        def sum(self, values: Any) -> list[float]:
            return [value + (nth == 0) for nth, value in enumerate(values)]

    with pytest.raises(PeerFailed, match="a hook failed on another rank"):
        Hooks({"it": Recorder()}, Two()).settle()


def test_a_state_that_cannot_be_given_leaves_the_others_to_be_saved() -> None:
    hooks = Hooks({"broken": Recorder("state_dict"), "later": Recorder()}, Ranks())
    started(hooks)
    assert hooks.state_dict()["states"] == {"later": {"seen": 0}}
    with pytest.raises(ValueError, match="planted"):
        hooks.settle()


class Holds(Recorder):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def update(self, step: TrainedStep) -> Mapping[str, float]:
        self.seen += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"it": self.state if self.seen else 0}


def test_a_state_that_no_file_holds_is_told_before_training_or_leaves_the_others_to_be_saved() -> None:
    early = Holds({1: 2})
    early.seen = 1
    with pytest.raises(SavedStateError, match="states/early has the key 1 at it: keys are text"):
        started(Hooks({"early": early}, Ranks()))
    hooks = Hooks({"late": Holds({3}), "later": Recorder()}, Ranks())
    started(hooks)
    hooks.update(step_of(net(), 1))
    saved = hooks.state_dict()
    assert saved["states"] == {"later": {"seen": 1}}
    again = Holds({3})  # mended since; what it never gave is not given to it as if it were empty
    told = started(Hooks({"late": again, "later": Recorder()}, Ranks()), saved, 1)
    assert told == ["the hook late could not give its state when this was saved, and it begins at step 1"]
    with pytest.raises(SavedStateError, match="states/late holds a set at it"):
        hooks.settle()


class Meddles(Hook):
    def __init__(self, what: Callable[[nn.Module], Any]) -> None:
        self.what = what

    def start(self, run: HookRun) -> None:
        self.drawn = [torch.rand(()).item()]

    def update(self, step: TrainedStep) -> None:
        self.drawn.append(torch.rand(()).item())
        self.what(step.model)


def test_a_model_that_a_hook_left_in_evaluation_mode_is_not_trained_on() -> None:
    model = net().train()
    hooks = Hooks({"own": Meddles(lambda model: model.eval())}, Ranks())
    hooks.start(lambda **asks: run_of(model, **asks), None)
    hooks.update(step_of(model, 1))
    assert model.training
    with pytest.raises(ExactnessError, match="the hook own left the model in evaluation mode"):
        hooks.settle()


def test_what_a_hook_has_frozen_stays_so_after_a_resume_and_what_it_has_thawed_too() -> None:
    def freeze(model: nn.Module) -> None:
        model[1].eval().requires_grad_(False)  # type: ignore[operator]

    def started_with(hook: Meddles, part: Any = None) -> tuple[nn.Module, Hooks]:
        model, hooks = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), Hooks({"own": hook}, Ranks())
        hooks.start(lambda **asks: run_of(model, **asks), part)
        return model, hooks

    model, hooks = started_with(Meddles(freeze))
    untouched = hooks.state_dict()
    hooks.update(step_of(model, 1))
    frozen = json.loads(json.dumps(hooks.state_dict()))
    again, _ = started_with(Meddles(freeze), frozen)
    assert [p.requires_grad for p in again.parameters()] == [True, True, False, False]
    assert [module.training for module in again.modules()] == [True, True, False]
    thawed, _ = started_with(Meddles(freeze), json.loads(json.dumps(untouched)))
    assert all(p.requires_grad for p in thawed.parameters())
    with pytest.raises(SavedStateError, match="modes gatrain did not write"):
        started_with(Meddles(freeze), {**frozen, "modes": {"training": {"1": 3}, "requires_grad": {}}})


def test_what_hooks_draw_at_random_follows_from_the_seed_and_the_step_on_every_rank_alike() -> None:
    def drawn(noise: int, seed: int = 7) -> list[float]:
        torch.manual_seed(noise)  # ranks and resumed runs have come to other numbers
        hook = Meddles(lambda model: None)
        hooks = Hooks({"other": Recorder(), "own": hook}, Ranks(), seed=seed)
        started(hooks)
        for step in (1, 2):
            torch.rand(noise)
            hooks.update(step_of(net(), step))
        return hook.drawn

    assert drawn(1) == drawn(2)
    assert len(set(drawn(1))) == 3
    assert drawn(1) != drawn(1, seed=8)


def test_hooks_that_come_and_go_at_a_resume_are_told_of() -> None:
    before = Hooks({"old": Recorder()}, Ranks(), fingerprint="a", stop_reason="enough", ended=True)
    after = Hooks({"new": Recorder()}, Ranks(), fingerprint="b")
    notices = started(after, before.state_dict(), 5)
    assert ["old" in notices[0], "new" in notices[1]] == [True, True]
    assert not after.ended
    same = Hooks({"old": Recorder()}, Ranks(), fingerprint="a")
    assert started(same, before.state_dict(), 5) == []
    assert (same.ended, same.stop_reason) == (True, "enough")


@pytest.mark.parametrize("part", [[], {"states": {}}, {"states": {"x": 1}}, "x"])
def test_a_part_of_somebody_elses_is_refused(part: Any) -> None:
    with pytest.raises(SavedStateError, match="a part 'hooks'"):
        started(Hooks({"it": Recorder()}, Ranks()), part)


def test_two_hooks_with_one_metric_or_one_file_are_refused() -> None:
    hooks = Hooks(named([("it", Recorder()), ("it", Recorder())]), Ranks())
    assert list(hooks.hooks) == ["it", "it_2"]
    started(hooks)
    hooks.update(step_of(net(), 1))
    with pytest.raises(ValueError, match="two hooks measure 'seen'"):
        hooks.settle()
    with pytest.raises(ConfigError, match="the name 'ema' of further weights is taken"):
        started(Hooks({"a": EMA(), "b": EMA()}, Ranks()))


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hooks=[{name:ema,decay:1.5}]"], "decay=1.5 is not from 0 to below 1"),
        (["hooks=[{name:ema,decai:0.5}]"], "decay"),
        (["hooks=[emma]"], "Did you mean 'ema'"),
        (["hooks=[early_stopping]"], "early_stopping needs evaluations while the run trains"),
        (["hooks=[{name:keep_best,mode:mean}]", "eval.every=2"], "mode=mean is not one of min, max"),
        (["logger=[wandbb]"], "Did you mean 'wandb'"),
        (["logger=[{name:wandb,projekt:x}]"], "project"),
    ],
)
def test_a_mistake_in_a_part_is_told_before_anything_runs(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build.check_targets(compose(["recipe=vision", "eval.every=0", *words]).config)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed_is_told_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    config = compose(["recipe=vision", f"logger=[{name}]"]).config
    with pytest.raises(ConfigError, match=rf"pip install 'gatrain\[{name}\]'"):
        build.check_targets(config)
    build.check_targets(compose(["recipe=vision"]).config)  # auto asks for nothing


def test_what_is_no_hook_and_no_logger_is_refused() -> None:
    config = compose(
        ["recipe=vision", "hooks=[{_target_:torch.nn.ReLU}]", "logger=[{_target_:torch.nn.ReLU}]"]
    ).config
    with pytest.raises(ConfigError, match=r"not a gatrain\.Hook"):
        build.build_hooks(config)
    with pytest.raises(ConfigError, match=r"not a gatrain\.Logger"):
        build.build_loggers(config)


# --- trackers, without a network


def info_of(folder: Path, first_step: int) -> RunInfo:
    return RunInfo(
        recipe="mine", run_dir=folder, device="CPU", world_size=1, effective_batch=12, equation="12 = 12",
        precision="fp32", checkpointing="none", compile=False, sync="window", parameters=20, train_samples=12,
        eval_samples=6, first_step=first_step, total_steps=4, steps_per_epoch=1,
        settings={"optimizer.lr": 0.1, "data.token": "(hidden)"},
    )  # fmt: skip


def log_twice(folder: Path, make: Callable[[], Logger]) -> dict[str, str]:
    """A run of two steps that is resumed for two more; gives the ids that the run folder keeps."""
    for first_step in (0, 2):
        with Fanout([make()]) as sinks:
            sinks.start(info_of(folder, first_step))
            for step in (first_step + 1, first_step + 2):
                sinks.step(
                    StepRecord(step, 1.0 / step, 0.5, 0.1, 12 * step, 9.0, 0.1, "0", metrics={"moves": step})
                )
            sinks.evaluation(first_step + 2, {"loss": 2.0, "ema.loss": 1.5})
            sinks.end(RunSummary("completed", 4, 4, 0.25, 2.0, {}, 4, 0, 0, None, 1.0))
        assert sinks.failures == []
    ids: dict[str, str] = json.loads((folder / "loggers.json").read_text())
    return ids


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = log_twice(tmp_path, lambda: WandbLogger(project="mine", tags=["a"]))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and a number more for the second of one second
    assert [run.name.split("-")[3] for run in runs] == [ids["wandb/mine"]] * 2
    files = [file for run in runs for file in run.glob("*.wandb")]
    deadline = time.monotonic() + 20  # wandb's own process writes them
    while not all(b"train/moves" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    ids = log_twice(tmp_path, lambda: MLflowLogger(str(tmp_path / "mlruns"), experiment="mine"))
    (run,) = (tmp_path / "mlruns").glob(f"*/{ids['mlflow/mine']}")
    lines = [line.split() for line in (run / "metrics" / "train" / "loss").read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in lines] == [
        (1.0 / step, step) for step in range(1, 5)
    ]
    assert (run / "params" / "optimizer.lr").read_text() == "0.1"
    assert len((run / "metrics" / "eval" / "ema.loss").read_text().splitlines()) == 2
