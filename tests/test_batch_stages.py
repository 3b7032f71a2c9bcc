"""Stages of the effective batch: the number of a window says which samples it has; none is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import gatrain, metrics, project, start, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_streams import Numbers, inputs
from test_tune import CPU, CUDA, Machine, config_of, info_of, no_trial, plan_on
from torch import nn

from gatrain import tune
from gatrain.batch_stages import read_stages
from gatrain.compose import COMMAND_LINE, compose, reload
from gatrain.config import ScheduleConfig
from gatrain.errors import ConfigError
from gatrain.launch.world import Nodes
from gatrain.plan import Plan
from gatrain.tasks.supervised import Supervised
from gatrain.train.ranks import Ranks
from gatrain.train.schedule import Span, factor
from gatrain.train.stream_loader import StreamWindows
from gatrain.train.token_places import TokenPlaces
from gatrain.train.window_source import open_windows
from gatrain.train.windows import Cut, WindowSchedule


def net() -> nn.Module:
    return nn.Linear(4, 1)


SAMPLES = 23


def schedule(
    given: Any, by: str = "steps", samples: int = SAMPLES, lengths: Any = None, **more: Any
) -> WindowSchedule:
    stages = read_stages(given, by)
    plain = WindowSchedule(samples, stages.largest, 5, **more)
    tokens = None if lengths is None else TokenPlaces(lengths, plain.ids, each_once=True)
    return WindowSchedule(samples, stages.largest, 5, stages=stages, tokens=tokens, **more)


def one_by_one(
    given: Any, by: str, samples: int, drop_last: bool, count: int, lengths: Any = None
) -> list[tuple[int, ...]]:
    """(epoch, first, last) of each window, as a loop would count them; ``lengths`` by epoch and position."""
    stages, found = read_stages(given, by), []
    epoch = first = consumed = tokens = 0
    number = 0
    while len(found) < count:
        # the place of the window that the stage in force would take
        for later in range(number + 1, len(stages.sizes)):
            at = {
                "steps": len(found),
                "samples": consumed,
                "epochs": epoch + first / samples,
                "tokens": tokens,
            }
            if at[by] >= stages.starts[later]:
                number = later
        size = stages.sizes[number]
        if first + size > samples and (drop_last or first == samples):
            epoch, first = epoch + 1, 0
            continue
        last = min(first + size, samples)
        found.append((epoch, first, last))
        consumed += last - first
        tokens += 0 if lengths is None else int(lengths(epoch)[first:last].sum())
        epoch, first = (epoch + 1, 0) if last == samples else (epoch, last)
    return found


def places(windows: WindowSchedule, count: int) -> list[tuple[int, ...]]:
    found = [windows.spans[windows.stage_at(n)].place(n) for n in range(count)]
    return [(each.epoch, each.first, each.last) for each in found]


@st.composite
def staged(draw: st.DrawFn) -> tuple[dict[float, int], str]:
    by = draw(st.sampled_from(["steps", "samples", "epochs", "tokens"]))
    most = {"steps": 30, "samples": 120, "epochs": 5, "tokens": 600}[by]
    starts = draw(st.lists(st.integers(1, most), max_size=3, unique=True))
    sizes = draw(st.lists(st.integers(1, SAMPLES), min_size=len(starts) + 1, max_size=len(starts) + 1))
    return dict(zip([0, *sorted(starts)], sizes, strict=True)), by


@settings(max_examples=150, deadline=None)
@given(staged(), st.booleans())
def test_every_window_is_where_counting_one_by_one_puts_it(
    what: tuple[dict[float, int], str], drop_last: bool
) -> None:
    given_, by = what
    lengths = np.random.default_rng(0).integers(1, 12, SAMPLES) if by == "tokens" else None
    windows = schedule(given_, by, lengths=lengths, drop_last=drop_last)
    by_position = None if lengths is None else lambda epoch: lengths[windows.ids(epoch, 0, SAMPLES)]
    wanted = one_by_one(given_, by, SAMPLES, drop_last, 50, by_position)
    assert places(windows, 50) == wanted
    assert [(w.epoch, len(w.ids)) for w in map(windows.window, range(50))] == [
        (e, b - a) for e, a, b in wanted
    ]


def test_an_epoch_with_a_change_in_it_holds_every_sample_once_on_any_number_of_ranks() -> None:
    windows = schedule({0: 4, 3: 9, 5: 2})
    shared = [windows.window(n) for n in range(20)]
    for epoch in (0, 1):
        ids = np.concatenate([w.ids for w in shared if w.epoch == epoch])
        assert sorted(ids.tolist()) == list(range(SAMPLES))
    for ranks in (2, 3):
        for w in shared:
            parts = [w.slice_of(rank, ranks)[1] for rank in range(ranks)]
            assert np.concatenate(parts).tolist() == w.ids.tolist()


def test_a_large_effective_batch_across_blocks_of_the_permutation() -> None:
    windows = schedule({0: 100, 3: 6000, 5: 9000}, samples=30_000)
    ids = np.concatenate([windows.window(n).ids for n in range(7)])
    assert [windows.window(n).epoch for n in range(8)] == [0] * 7 + [1]
    assert sorted(ids.tolist()) == list(range(30_000))


def test_the_number_of_steps_covers_the_epochs() -> None:
    windows = schedule({0: 4, 10: 23})
    assert windows.steps(None, 1) == 6
    assert windows.steps(None, 1.5) == 9
    assert windows.steps(None, 3) == 12  # ten of 4 (an epoch and 16 samples), its other 7, and 23 at once
    assert windows.steps(7, None) == 7


def test_what_a_schedule_counts_in_samples_follows_the_stages() -> None:
    stages = ((0, 4), (10, 8), (20, 16))
    span = Span(30, 4, stages)
    assert [span.step_at(n) for n in (0, 20, 40, 120, 136)] == [0, 5, 10, 20, 21]
    milestones = ScheduleConfig("step", milestone_samples=[40, 120], gamma=0.5)
    rates = [factor(milestones, span, step) for step in range(30)]
    assert rates == [1.0] * 10 + [0.5] * 10 + [0.25] * 10
    decay = ScheduleConfig(
        "wsd", decay_samples=160 + 40, final_fraction=0.0
    )  # the last ten steps, and five before
    assert [factor(decay, span, step) for step in (14, 15, 16, 29)] == pytest.approx(
        [1, 1, 1 - 1 / 15, 1 / 15]
    )


def test_stages_are_told_in_words() -> None:
    assert read_stages({0: 64, 1000: 256}, "steps").text == "64, 256 after 1,000 steps"
    assert read_stages({"0": 64, "0.5": 256}, "epochs").text == "64, 256 after 0.5 epochs"
    with pytest.raises(ConfigError, match=r"a stage begins at 0\.5 steps"):
        read_stages({0: 64, 0.5: 256}, "steps")


def test_a_stream_goes_through_stages_for_every_world_size_and_from_any_window() -> None:
    task = Supervised(net, Numbers(), nn.MSELoss())
    stages = read_stages({0: 5, 3: 8, 6: 2}, "steps")
    windows = StreamWindows(2**40, 8, 7, first=20, stages=stages)
    cuts = [Cut(2), Cut(3), Cut(1)]

    def read(rank: int = 0, ranks: int = 1, start: int = 0, position: Any = None) -> list[Any]:
        given: dict[str, Any] = {"micro_batch": 1, "shares": None, "start": start, "stop": 11, "cuts": cuts}
        return list(open_windows(task, windows, Ranks(rank, ranks), position=position, **given))

    alone = read()
    assert [each.window_samples for each in alone] == [5, 5, 5, 7, 8, 8, 2, 2, 2, 2, 2]  # 22 samples an epoch
    assert [len(each.micro_batches) for each in alone] == [3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2]
    two = [
        [x for part in parts for x in part]
        for parts in zip(*(inputs(read(r, 2)) for r in (0, 1)), strict=True)
    ]
    assert two == inputs(alone)
    assert inputs(read(start=5, position=alone[4].position)) == inputs(alone)[5:]


@pytest.mark.usefixtures("own_cache")
def test_the_plan_has_a_split_for_each_stage_that_multiplies_out_and_is_remembered() -> None:
    config = config_of({0: 6, 10: 96, 20: 23})  # type: ignore[arg-type]
    machine = Machine(seconds=lambda size: 0.010 + 0.001 * size, largest=40)
    nodes = Nodes(2)
    plan = plan_on(machine, config, nodes=nodes, hardware=CUDA)
    assert plan.effective_batch == 96  # memory and time are those of the largest
    assert [stage.begins for stage in plan.stages] == ["", "after 10 steps", "after 20 steps"]
    assert [(stage.split.effective_batch, stage.micro_batch) for stage in plan.stages] == [
        (6, 3), (96, plan.micro_batch), (23, 12),
    ]  # fmt: skip
    assert all(
        sum(map(sum, each.split.sizes(each.micro_batch))) == each.split.effective_batch
        for each in plan.stages
    )
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    asked = len(machine.asked)
    again = plan_on(machine, config, nodes=nodes, hardware=CUDA)
    assert len(machine.asked) == asked
    assert again.stages == plan.stages


def test_a_fixed_micro_batch_is_that_of_every_stage_which_can_fill_it() -> None:
    plan = tune.Tuner(config_of({0: 6, 10: 96}, micro=16), CPU, Nodes(2)).plan(info_of(), run=no_trial)  # type: ignore[arg-type]
    assert [stage.equation for stage in plan.stages] == [
        "6 = 2 ranks x 1 accumulation step x 3", "96 = 2 ranks x 3 accumulation steps x 16",
    ]  # fmt: skip


def test_stages_are_typed_and_take_the_place_of_a_recipes(tmp_path: Path) -> None:
    project(tmp_path, MODULE, RECIPE, "staged")
    written = compose(["recipe=staged"], tmp_path)
    assert written.config.batch.stages.text == "5, 7 after 99 steps"
    typed = compose(
        ["recipe=staged", "batch.effective={0: 4, 7.5: 9}", "batch.effective_by=epochs"], tmp_path
    )
    assert typed.config.batch.stages.text == "4, 9 after 7.5 epochs"
    assert typed.sources["batch.effective.7.5"] == COMMAND_LINE
    assert compose(["recipe=staged", "batch.effective=8"], tmp_path).config.batch.stages.is_constant
    (tmp_path / "config.yaml").write_text(typed.yaml)
    assert reload(tmp_path / "config.yaml", ()).config.batch == typed.config.batch


MODULE = """
import time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)

class Points(torch.utils.data.Dataset):
    def __init__(self, count=61, slow_s=0.0):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = torch.randint(3, (count,), generator=generator)
        self.slow_s = slow_s
        self.lengths = list(range(1, count + 1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(self.slow_s)
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: staged.Net}
data: {_target_: staged.Points, slow_s: 0.0}
batch: {effective: {0: 5, 99: 7}, micro: 3, rule: sqrt, base: 8}
train: {steps: 18, log_every: 1}
"""
STAGES = "batch.effective={0: 4, 7: 11, 14: 6}"  # the second begins in the middle of the first epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("staged"), MODULE, RECIPE, "staged")


def saved(run: Path, step: int) -> dict[str, Any]:
    state = run / "saved" / f"step_{step:08d}"
    return {name: load_file(state / f"{name}.safetensors") for name in ("model", "optimizer")}


def test_a_run_killed_in_the_middle_of_a_stage_goes_on_to_the_same_bits(folder: Path) -> None:
    words = ["recipe=staged", STAGES, "save.every=1", "save.keep=0", "precision=fp32"]
    gatrain(folder, "launch", "--nproc", "2", *words, "run.dir=whole")
    process = start(folder, "launch", "--nproc", "2", *words, "data.slow_s=0.03", "run.dir=killed")
    wait_for(folder / "killed" / "saved" / "step_00000010" / "manifest.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    states = sorted((folder / "killed" / "saved").glob("step_*"))
    assert len(states) < 14  # within the second stage, and not after it
    said = gatrain(folder, "resume", "killed", "--nproc", "2")
    assert "is in stage 2 of 3" in said
    one, two = metrics(folder / "whole"), metrics(folder / "killed")
    assert [line["window"] for line in one] == [line["window"] for line in two]
    assert {line["step"]: line["effective_batch"] for line in one if "effective_batch" in line} == {
        1: 4,
        8: 11,
        15: 6,
    }
    assert [line["lr"] for line in one] == [line["lr"] for line in two]
    for part, tensors in saved(folder / "whole", 18).items():
        again = saved(folder / "killed", 18)[part]
        assert tensors.keys() == again.keys()
        for name, value in tensors.items():
            assert torch.equal(value, again[name]), (part, name)
    sizes = np.diff([0] + [line["samples"] for line in one]).tolist()
    assert sizes == [*[4] * 7, *[11] * 7, 6, 6, 5, 6]  # 61 samples an epoch
