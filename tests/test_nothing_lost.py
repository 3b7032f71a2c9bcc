"""Nothing trained is lost: states by time, errors beside the training, memory that runs out."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import gatrain, metrics, project, run, start
from test_runs import weights
from torch import nn

from gatrain import assets
from gatrain.compose import compose
from gatrain.errors import DataError, DoesNotFitError, is_out_of_memory
from gatrain.plan import StepSettings
from gatrain.report.text import evaluation_text, summary_rows
from gatrain.tasks.base import Task
from gatrain.train import samples
from gatrain.train.engine import Engine
from gatrain.train.evaluate import evaluate
from gatrain.train.ranks import Ranks
from gatrain.train.save_clock import SaveClock

MODULE = """
import os, time
import torch
from torch import nn
from gatrain.tasks import Supervised

PLANTED, SLOW_S = os.environ.get("PLANTED", "").split(","), float(os.environ.get("SLOW_S", "0"))

def net():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))

class Points(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(90, 6, generator=generator), torch.arange(90) % 3
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        time.sleep(SLOW_S)
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]

class Task(Supervised):
    def loss_sum(self, model, batch):
        if "memory" in PLANTED and model.training and len(batch[0]) > 3 and "TORCHELASTIC_RUN_ID" in os.environ:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999 bytes.")
        return super().loss_sum(model, batch)
    def eval_metrics(self, model, batch):
        if f"evaluation on rank {os.environ.get('RANK', '0')}" in PLANTED:
            raise ValueError("planted in the evaluation")  # here
        return {}
    def showcase(self, model, device):
        if "showcase" in PLANTED:
            raise ValueError("planted in the showcase")  # here
        return "a sample"

if "plot" in PLANTED:
    import gatrain.report.plot as plot
    def broken(*anything):
        raise ValueError("planted in the plot")  # here
    plot._loss_figure = broken
if "logger" in PLANTED:
    from gatrain.report.jsonl import JsonlSink
    def broken(self, record):
        raise ValueError("planted in the logger")  # here
    JsonlSink.step = broken
"""  # noqa: E501
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.net}
data: {_target_: mine.Points}
task: {_target_: mine.Task, eval_fraction: 0.2}
batch: {effective: 8, micro: 3}
train: {steps: 5, seed: 3}
precision: fp32
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return project(tmp_path, MODULE, RECIPE)


def equal_weights(one: Path, two: Path, step: int) -> bool:
    a, b = weights(one, step), weights(two, step)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- states by time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(r.name for r in assets.list_recipes(Path("/"))))
def test_every_shipped_recipe_loses_at_most_ten_minutes(recipe: str) -> None:
    words = ["data.path=somewhere"] if recipe == "resnet50" else []
    assert 0 < compose([f"recipe={recipe}", *words]).config.save.minutes <= 10


class Simulation:
    """A run on a simulated clock that may be killed at any time."""

    def __init__(self, limit_s: float, step_s: float, write_s: float, eval_every: int, eval_s: float) -> None:
        self.now, self.kept_at, self.most_lost_s = 0.0, 0.0, 0.0
        self.saves = 0
        clock = SaveClock(limit_s, now=lambda: self.now)
        for step in range(1, 3000):
            evaluates = eval_every > 0 and step % eval_every == 0
            wish = clock.is_due(before_evaluation=evaluates)
            self._pass(step_s)
            if wish:
                began = self.now
                self._pass(write_s)
                self.kept_at, self.saves = began, self.saves + 1
                clock.saved(began)
            if evaluates:
                began = self.now
                self._pass(eval_s)
                clock.evaluated(began)

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.most_lost_s = max(self.most_lost_s, self.now - self.kept_at)


@pytest.mark.parametrize("step_s", [0.001, 0.4, 7.0, 100.0])
@pytest.mark.parametrize("write_s", [0.01, 3.0, 60.0])
@pytest.mark.parametrize(("eval_every", "eval_s"), [(0, 0.0), (50, 20.0), (7, 150.0)])
def test_a_kill_at_any_time_loses_at_most_the_limit_and_one_step(
    step_s: float, write_s: float, eval_every: int, eval_s: float
) -> None:
    run = Simulation(600, step_s, write_s, eval_every, eval_s)
    assert run.most_lost_s <= 600 + step_s
    # and the time is not spent on writing: ahead of long evaluations alone states come more often
    assert run.saves <= run.now / 150 + 1


def test_a_disk_too_slow_for_the_limit_does_not_take_all_the_time() -> None:
    run = Simulation(600, 1.0, 700.0, 0, 0.0)
    assert run.saves * 700 < 0.6 * run.now


def test_minutes_of_zero_never_ask_for_a_state() -> None:
    assert Simulation(0, 100.0, 1.0, 5, 100.0).saves == 0


def test_after_a_failed_save_the_next_attempt_waits() -> None:
    now = 0.0
    clock = SaveClock(600, now=lambda: now)
    now = 500.0
    assert clock.is_due(before_evaluation=False)
    clock.failed()
    now = 510.0
    assert not clock.is_due(before_evaluation=False)
    now = 570.0
    assert clock.is_due(before_evaluation=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_a_random_moment_loses_the_limit_at_most_and_goes_on_to_the_same_bits(
    folder: Path, ranks: int
) -> None:
    """Nothing is set but a shorter limit: save.every keeps its default."""
    words = [
        "launch",
        "--nproc",
        str(ranks),
        "recipe=mine",
        "train.log_every=7",
        "train.steps=160",
        "eval.every=50",
    ]
    limit_s, step_s = 1.5, 0.4  # a step takes some 0.1 s; the machine may be busy
    process = start(folder, *words, "run.dir=killed", f"save.minutes={limit_s / 60}", SLOW_S="0.01")
    saved = folder / "killed" / "saved"
    deadline = time.monotonic() + 90
    while not list(saved.glob("step_*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.uniform(0.0, 2 * limit_s))
    killed_at = time.time()
    process.kill()
    process.wait()
    assert (folder / "killed" / "summary.json").exists() is False
    states = sorted(saved.glob("step_*"))
    assert killed_at - (states[-1] / "progress.json").stat().st_mtime < limit_s + step_s + 1.0
    time.sleep(2.5)  # the ranks die with their launcher
    gatrain(folder, "resume", "killed")
    gatrain(folder, *words, "run.dir=whole")
    assert equal_weights(folder / "killed", folder / "whole", 160)
    assert [(r["step"], r["loss"], r["window"]) for r in metrics(folder / "killed")] == [
        (r["step"], r["loss"], r["window"]) for r in metrics(folder / "whole")
    ]
    evaluations = [
        json.loads(line) for line in (folder / "killed" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in evaluations] == [50, 100, 150, 160]


# --- errors beside the training -------------------------------------------------------------------------


def gatrain_with(folder: Path, planted: str, *words: str) -> tuple[int, str]:
    done = run(*words, cwd=folder, PLANTED=planted)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_beside_the_training_lose_nothing_are_told_and_the_run_can_be_resumed(
    folder: Path, ranks: int
) -> None:
    """The evaluation fails on the last rank alone: the others must not wait for it in a collective."""
    planted = f"evaluation on rank {ranks - 1},showcase,plot,logger"
    words = ["launch", "--nproc", str(ranks), "recipe=mine", "eval.every=2"]
    code, printed = gatrain_with(folder, planted, *words, "run.dir=run")
    run = folder / "run"
    assert code == 12, printed
    assert "Traceback" not in printed
    error = printed[printed.index("error: all 5 steps are trained and saved") :]
    has_plots = importlib.util.find_spec("matplotlib") is not None
    for what in ("evaluation", "showcase", "logger", *(["plot"] if has_plots else [])):
        line = next(line for line in error.splitlines() if f"planted in the {what}" in line)
        assert "mine.py:" in line  # the user's own
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("completed", 5)
    assert len(summary["failed"]) == 3 + has_plots
    assert len(weights(run, 5)) == 4

    code, printed = gatrain_with(folder, "", *shlex.split(re.findall("gatrain (resume .*)", error)[0]))
    assert code == 0, printed
    assert "a sample" in printed
    assert "held-out loss" in printed
    assert json.loads((run / "summary.json").read_text())["failed"] == []
    assert "is complete at step 5" in gatrain_with(folder, "", "resume", "run")[1]


# --- what is reported -----------------------------------------------------------------------------------


class TwoTerms(Task):
    loss_terms = ("class", "box")

    def __init__(self, train: Any, held_out: Any) -> None:
        self.train_data, self.eval_data = train, held_out

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def weight(self, batch: Any) -> dict[str, float]:
        return {"class": len(batch[0]), "box": float(batch[1].sum())}

    def loss_sum(self, model: nn.Module, batch: Any) -> Any:
        x, has_box = batch
        loss = model(x).pow(2).sum(1)
        return {"class": (loss.sum(), len(x)), "box": (3 * (loss * has_box).sum(), has_box.sum())}


def engine_of(task: TwoTerms) -> Engine:
    config = compose(["recipe=vision"]).config
    settings = StepSettings("fp32", "none", False, "window")
    return Engine(task, task.build_model(), settings, config.optimizer, Ranks(), torch.device("cpu"))


def held_out(boxes: list[float]) -> Any:
    x = torch.arange(2.0 * len(boxes)).view(-1, 2)
    return torch.utils.data.TensorDataset(x, torch.tensor(boxes))


def test_each_loss_term_of_an_evaluation_has_its_own_mean_and_the_loss_is_their_sum() -> None:
    found = evaluate(engine_of(TwoTerms(None, held_out([0.0, 1.0, 1.0]))), samples=None, micro_batch=2)
    assert list(found["loss_terms"]) == ["class", "box"]
    assert found["loss"] == pytest.approx(sum(found["loss_terms"].values()))


def test_a_term_that_no_held_out_sample_has_is_left_out() -> None:
    found = evaluate(engine_of(TwoTerms(None, held_out([0.0, 0.0]))), samples=None, micro_batch=2)
    assert list(found["loss_terms"]) == ["class"]
    assert math.isfinite(found["loss"])


def test_nothing_held_out_gives_no_held_out_loss() -> None:
    assert evaluate(engine_of(TwoTerms(None, None)), samples=None, micro_batch=2) == {}
    assert evaluate(engine_of(TwoTerms(None, held_out([]))), samples=None, micro_batch=2) == {}


def test_no_words_about_a_held_out_loss_that_was_not_measured() -> None:
    from test_report import run_info, summary

    ended = summary(eval_loss=None, evaluation={})
    assert "held-out" not in str(summary_rows(ended, run_info(Path("run"))))
    assert evaluation_text({"accuracy": 0.5}, run_info(Path("run"))) == "accuracy 0.5000"
    told = evaluation_text({"loss": 3.0, "loss_terms": {"class": 1.0, "box": 2.0}}, run_info(Path("run")))
    assert "class 1.000  box 2.000" in told


# --- memory ---------------------------------------------------------------------------------------------


def caused_by(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


def while_handling(error: Exception, first: Exception) -> Exception:
    try:
        try:
            raise first
        except Exception:
            raise error  # noqa: B904
    except Exception as raised:
        return raised


def numpy_error() -> Exception:
    try:
        np.empty((1 << 50,), dtype=np.float64)
    except MemoryError as error:
        return error
    pytest.skip("this machine gives a petabyte")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
        torch.AcceleratorError("CUDA error: out of memory")
        if hasattr(torch, "AcceleratorError")
        else MemoryError(),
        caused_by(DataError("cannot load the samples 4"), MemoryError()),
        while_handling(ValueError("in the user's except"), torch.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}",
)
def test_out_of_memory_is_one_thing(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_numpy_running_out_of_memory_is_out_of_memory() -> None:
    assert is_out_of_memory(numpy_error())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory, says a user's own text"),
        RuntimeError("CUDA error: device-side assert"),
        KeyError(12),
    ],
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


class Large:
    """Samples whose micro-batches do not fit."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise MemoryError


def test_memory_that_runs_out_in_reading_is_no_error_of_the_data() -> None:
    task = TwoTerms(Large(), None)
    with pytest.raises(
        DoesNotFitError, match=r"out of memory in reading and collating the samples 1.*batch.micro=1"
    ):
        samples.load(task, task.train_data, [(0, 1), (0, 2)], 0)


def test_training_out_of_memory_ends_with_5_and_a_command_that_works(folder: Path) -> None:
    words = ["launch", "--nproc", "1", "recipe=mine", "batch.micro=6", "run.dir=run"]
    code, printed = gatrain_with(folder, "memory", *words)
    assert code == 5, printed
    assert "out of memory" in printed
    assert "can't allocate memory" in printed
    assert "Traceback" not in printed
    command = shlex.split(re.findall("gatrain ((?:launch|resume) .*)", printed)[0])
    assert "batch.micro=3" in command
    code, printed = gatrain_with(folder, "memory", *command)
    assert code == 0, printed
