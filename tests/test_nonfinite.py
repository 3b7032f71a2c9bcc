"""A window that is not finite changes nothing, is named, and is left out or stopped at; fp16 loses no window."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gatrain, project
from distributed import run_on_ranks
from safetensors.torch import load_file
from test_engine import CPU, Regression, engine, window
from torch import Tensor, nn

from gatrain.config import AdamWConfig, ScheduleConfig, SGDConfig
from gatrain.plan import StepSettings
from gatrain.train.engine import Engine
from gatrain.train.guard import Guard
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.nonfinite import Search, first_bad_parameter
from gatrain.train.ranks import Ranks
from gatrain.train.sample_names import sample_name
from gatrain.train.schedule import Span, factor

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

def plain_net():
    return nn.Linear(4, 1)

class Norms(nn.Module):
    # the loss is finite, the gradient is not: sqrt at zero
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        y = self.linear(x)
        return y + (y - y.detach()).pow(2).sqrt()

class Points(torch.utils.data.Dataset):
    def __init__(self, bad=(), large=1.0):
        self.x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * large
        self.y = self.x.sum(1, keepdim=True) * large
        self.samples = [(f"photos/{n}.jpg", 0) for n in range(40)]
        for sample in bad:
            self.x[sample, 0] = float("inf")
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return self.x[index], self.y[index]

class Zero(nn.Module):
    def forward(self, outputs, targets):
        return (outputs * 0).mean()
"""
RECIPE = """
defaults: [base, override optimizer: adamw, override schedule: warmup_cosine, _self_]
model: {_target_: mine.net}
data: {_target_: mine.Points, bad: [17], large: 1.0}
loss: {_target_: torch.nn.MSELoss}
batch: {effective: 8, micro: 4}
train: {steps: 10, log_every: 3}
schedule: {warmup_steps: 2}
optimizer: {lr: 0.01}
device: cpu
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return project(tmp_path, MODULE, RECIPE)


def rates(steps: int, lr: float) -> list[float]:
    """The learning rates of a run in which every window makes an update."""
    schedule = ScheduleConfig("warmup_cosine", warmup_steps=2)
    return [lr * factor(schedule, Span(steps, 8), n) for n in range(steps)]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    newest = sorted((run / "saved").iterdir())[-1]
    tensors = {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}
    progress: dict[str, Any] = json.loads((newest / "progress.json").read_text())
    return tensors, progress


def everything(one: Engine) -> list[Tensor]:
    parts = [*one.model.state_dict().values(), *(v for s in one.optimizer.state.values() for v in s.values())]
    return [part.clone() for part in parts]


def same_bits(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))


# --- the step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_window_that_is_not_finite_changes_no_bit(precision: str, bad: float) -> None:
    one = engine(normalised, precision=precision, optimizer=AdamWConfig(lr=0.1, clip_norm=1.0))
    good = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    one.step(window(good, [4, 4]), 0)
    before, scale = everything(one), one.scaler.state_dict() if one.scaler else None
    poisoned = good.clone()
    poisoned[5, 1] = bad
    result, _ = one.step(window(poisoned, [4, 4]), 1)
    assert result.skipped
    assert same_bits(before, everything(one))
    assert scale == (one.scaler.state_dict() if one.scaler else None)
    result, _ = one.step(window(good, [4, 4]), 1)
    assert not result.skipped
    assert not same_bits(before, everything(one))


def test_frozen_parameters_and_buffers_of_any_dtype_are_left_alone() -> None:
    class Quantised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 5)
            self.codes = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
            self.register_buffer("scales", torch.ones(3).to(torch.float8_e4m3fn))

    one = engine(Quantised)
    result, _ = one.step(window(torch.full((4, 5), float("nan")), [4]), 0)
    assert result.skipped
    assert first_bad_parameter(one) is None
    with torch.no_grad():
        one.model.weight[0, 0] = float("inf")  # type: ignore[operator,index]
    assert first_bad_parameter(one) == "weight"


def test_an_infinite_loss_with_a_finite_gradient_makes_no_update() -> None:
    class Task(Regression):
        def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
            total, weight = super().loss_sum(model, batch)
            return total + float("inf"), weight

    task = Task(lambda: nn.Linear(5, 5))
    settings = StepSettings("fp32", "none", False, "window")
    one = Engine(task, task.build_model(), settings, SGDConfig(lr=0.1), Ranks(), CPU)
    before = everything(one)
    result, _ = one.step(window(torch.ones(4, 5), [2, 2]), 0)
    assert result.skipped
    assert same_bits(before, everything(one))


def test_without_a_look_from_the_host_nothing_changes_from_the_bad_window_on() -> None:
    """As on a GPU: the fused optimizer reads the verdict, the host learns of it later."""
    one = engine(normalised)
    good = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    one.optimizer = torch.optim.AdamW(one.model.parameters(), lr=0.1, fused=True)
    one.guard = one.step.guard = Guard(one.model, one.optimizer, CPU, at_once=False)
    one.step(window(good, [4, 4]), 0)
    before = everything(one)
    for batch in (good * float("inf"), good, good):
        result, _ = one.step(window(batch, [4, 4]), 1)
        assert not result.skipped  # not known yet
    one.guard.restore_buffers()
    assert same_bits(before, everything(one))


def test_a_window_that_overflows_in_fp16_is_computed_again_at_a_lower_scale() -> None:
    fine, one = engine(normalised), engine(normalised, precision="fp16")
    assert one.scaler is not None
    large = 100 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for each in (fine, one):
        result, _ = each.step(window(large, [4, 4]), 0)
        assert not result.skipped
    linear = engine(lambda: nn.Linear(5, 5), precision="fp16")
    assert linear.scaler is not None
    result, norm = linear.step(window(large, [4, 4]), 0)
    assert not result.skipped
    assert torch.isfinite(norm)
    assert 0 < linear.scaler.get_scale() < 65536
    result.ranks.sum([0.0])
    linear.step.counts.check()  # the tries are counted as windows of their own


class Forgiving(Regression):
    """NaN in its data reaches the loss and not the gradient."""

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        total, weight = super().loss_sum(model, batch.nan_to_num())
        return total + 0 * batch.sum(), weight


def _one_bad_rank() -> list[Tensor]:
    ranks = Ranks.current()
    found = []
    for sync, kind in (("window", Forgiving), ("overlap", Regression)):
        task = kind(normalised)
        settings = StepSettings("fp32", "none", False, sync)
        one = Engine(task, task.build_model(), settings, AdamWConfig(lr=0.1), ranks, CPU)
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(ranks.rank))
        one.step(window(batch, [4, 4]), 0)
        before = everything(one)
        bad = batch.clone()
        if ranks.rank == 1:
            bad[6, 0] = float("nan")
        result, _ = one.step(window(bad, [4, 4]), 1)
        parts = zip(window(bad, [4, 4]).micro_batches, (range(4), range(4, 8)), strict=True)
        keyed = [
            dataclasses.replace(micro, keys=tuple((0, 100 * ranks.rank + n) for n in part))
            for micro, part in parts
        ]
        search = Search(one, LoadedWindow(keyed), result.weight_totals, 0)

        def read(keys: list[tuple[int, int]], bad: Tensor = bad) -> MicroBatch:
            return window(bad[[sample % 100 for _, sample in keys]], [len(keys)]).micro_batches[0]

        search._read = read  # type: ignore[method-assign,assignment]
        findings = search.run()
        (culprit,) = findings.bad
        found.append(torch.tensor([result.skipped, same_bits(before, everything(one))]))
        found.append(
            torch.tensor([culprit.rank, culprit.micro_step, *culprit.alone, findings.some_are_finite])
        )
        after, _ = one.step(window(batch, [4, 4]), 1)
        found.append(torch.tensor(after.skipped))
    return found


def test_one_bad_rank_stops_the_update_of_both_and_both_hear_which_sample() -> None:
    for found in run_on_ranks(2, _one_bad_rank):
        for left_out, culprit, after in (found[:3], found[3:]):
            assert left_out.tolist() == [True, True]
            assert culprit.tolist() == [1, 1, 106, True]
            assert not after


# --- whole runs -----------------------------------------------------------------------------------------


def test_a_run_stops_before_the_bad_window_and_the_command_that_it_prints_goes_on(folder: Path) -> None:
    said = gatrain(folder, "fit", "recipe=mine", "run.dir=stopped", expect=9)
    match = re.search(r"step (\d+) is not finite", said)
    assert match is not None
    step = int(match[1])
    assert "rank 0, micro-step" in said
    assert "sample 17 (photos/17.jpg)" in said
    assert "fp32" not in said.partition("error:")[2]
    assert state(folder / "stopped")[1]["step"] == step - 1
    command = re.search(r"gatrain (resume \S+ train.nonfinite=skip)", said)
    assert command is not None
    said = gatrain(folder, *shlex.split(command[1]))
    assert "skipped" in said
    found = lines(folder / "stopped")
    assert [line["step"] for line in found] == list(range(1, 11))
    bad = [line for line in found if line["skipped"]]
    assert [(line["skipped"], line["lr"]) for line in bad] == [("not finite", None)] * len(bad)
    assert found[-1]["skipped_steps"] == len(bad)
    assert "train.nonfinite=skip" in (folder / "stopped" / "overrides.txt").read_text()
    # the schedule has not advanced at the windows that were skipped
    assert [line["lr"] for line in found if not line["skipped"]] == rates(10, 0.01)[: 10 - len(bad)]
    # and it all is the same to the bit in one piece, on the other hand killed and resumed
    gatrain(folder, "fit", "recipe=mine", "run.dir=whole", "train.nonfinite=skip")
    tensors, progress = state(folder / "whole")
    other, progress_too = state(folder / "stopped")
    assert all(torch.equal(tensors[name], other[name]) for name in tensors)
    assert progress == progress_too
    assert progress["updates"] == 10 - len(bad)


def test_two_processes_skip_what_one_skips(folder: Path) -> None:
    gatrain(
        folder, "fit", "recipe=mine", "run.dir=one", "train.nonfinite=skip", "model._target_=mine.plain_net"
    )
    gatrain(
        folder, "launch", "--nproc", "2", "recipe=mine", "run.dir=two", "train.nonfinite=skip",
        "model._target_=mine.plain_net",
    )  # fmt: skip
    one, two = lines(folder / "one"), lines(folder / "two")
    assert [line["skipped"] for line in one] == [line["skipped"] for line in two]
    assert [line["lr"] for line in one] == [line["lr"] for line in two]
    for a, b in zip(state(folder / "one")[0].items(), state(folder / "two")[0].items(), strict=True):
        assert torch.allclose(a[1], b[1], rtol=1e-4, atol=1e-6), a[0]


def test_more_than_the_limit_in_a_row_ends_the_run_and_so_does_a_diverged_model(folder: Path) -> None:
    words = ("fit", "recipe=mine", "train.nonfinite=skip", "train.nonfinite_limit=2", "train.log_every=50")
    said = gatrain(folder, *words, "run.dir=limit", f"data.bad={[*range(40)]}".replace(" ", ""), expect=9)
    assert "number 3 in a row" in said
    assert len(lines(folder / "limit")) == 3
    said = gatrain(
        folder, *words, "run.dir=diverged", "data.bad=[]", "optimizer=sgd", "optimizer.lr=1e30",
        "model._target_=mine.plain_net", expect=9,
    )  # fmt: skip
    assert "not finite" in said


def test_a_gradient_that_is_never_finite_stops_the_run_in_fp16_as_in_fp32(folder: Path) -> None:
    said = gatrain(
        folder, "fit", "recipe=mine", "run.dir=norms", "model._target_=mine.Norms", "data.bad=[]",
        "precision=fp16", "train.steps=30", expect=9,
    )  # fmt: skip
    assert "step 1 is not finite" in said
    assert "the loss is finite" in said
    assert "optimizer.lr" not in said  # no update was made: the rate is not at fault


def test_fp16_makes_an_update_at_every_window_of_a_regression_with_large_errors(folder: Path) -> None:
    gatrain(
        folder, "fit", "recipe=mine", "run.dir=half", "precision=fp16", "data.bad=[]", "data.large=10.0",
        "model._target_=mine.plain_net", "train.steps=4",
    )  # fmt: skip
    found = lines(folder / "half")
    assert [line["skipped"] for line in found] == [None] * 4
    assert all(line["grad_norm"] > 0 and 0 < line["loss_scale"] < 65536 for line in found)
    assert state(folder / "half")[1]["updates"] == 4


def test_a_run_whose_gradients_are_all_zero_is_not_called_completed(folder: Path) -> None:
    said = gatrain(
        folder, "fit", "recipe=mine", "run.dir=zero", "data.bad=[]", "loss._target_=mine.Zero", expect=9
    )
    assert "exactly zero" in said
    assert state(folder / "zero")[1]["step"] == 10


def test_the_rate_and_the_length_may_change_on_resume_and_take_effect(folder: Path) -> None:
    run = folder / "run"
    gatrain(folder, "fit", "recipe=mine", f"run.dir={run}", "data.bad=[]", "train.steps=4")
    gatrain(folder, "resume", str(run), "optimizer.lr=0.004", "optimizer.clip_norm=0.5", "train.steps=8")
    gatrain(
        folder, "fit", "recipe=mine", "run.dir=other", "data.bad=[]", "train.steps=8", "optimizer.lr=0.004"
    )
    rates, wanted = ([line["lr"] for line in lines(each)] for each in (run, folder / "other"))
    assert rates[4:] == wanted[4:]
    assert rates[:4] != wanted[:4]
    assert "optimizer.lr=0.004 optimizer.clip_norm=0.5" in (run / "overrides.txt").read_text()
    assert re.search(r"lr: 0.004", (run / "config.yaml").read_text())
    gatrain(folder, "resume", str(run), "optimizer.weight_decay=0.1", expect=2)


# --- names ----------------------------------------------------------------------------------------------


def test_a_sample_is_named_by_its_file_where_the_dataset_keeps_one() -> None:
    class Files:
        samples = (("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 0))

    subset = torch.utils.data.Subset(Files(), [2, 0])  # type: ignore[arg-type]
    assert sample_name(subset, 0) == "0 (c.jpg)"
    assert sample_name(torch.utils.data.TensorDataset(torch.ones(3)), 1) == "1"  # type: ignore[arg-type]
