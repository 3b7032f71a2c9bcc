"""The doors `gradient` and `parallel`: a way from a window to its gradient that is a user's file and one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from examples.contrastive import Cached, Pairs
from test_exact_gradient import gradient, relative_error
from test_runs import gatrain, metrics
from torch import Tensor, nn

from gatrain import build
from gatrain.config import RunConfig, SGDConfig
from gatrain.errors import ConfigError, DoesNotFitError, PeerFailed
from gatrain.plan import StepSettings
from gatrain.tasks import Task
from gatrain.train.accumulate import gradient_step
from gatrain.train.engine import Engine
from gatrain.train.gradient import GradientStrategy, Update
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.samples import split_batch
from gatrain.train.step import Step
from gatrain.train.windows import WindowSchedule

SAMPLES = 13
EXAMPLE = Path(__file__).parent / "examples" / "contrastive.py"


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Pairs().build_model().double()


def window(batches: list[Tensor], seed: tuple[int, ...] | None = None) -> LoadedWindow:
    made = [MicroBatch([batch], {"loss": float(len(batch))}) for batch in batches]
    return LoadedWindow(made, seed=seed)


def step_of(
    task: Task, model: nn.Module, strategy: GradientStrategy, ranks: Ranks | None = None, sync: str = "window"
) -> Step:
    return gradient_step(
        model,
        lambda batch: task.loss_sum(model, batch),
        term_names=["loss"],
        ranks=ranks or Ranks(),
        sync=sync,
        stage=lambda batch: lambda: batch,
        strategy=strategy,
        task=task,
    )


def one_shot() -> Tensor:
    task, model = Pairs(), encoder()
    total, count = task.loss_sum(model, [task.train_data.tensors[0][:SAMPLES].double()])
    (total / count).backward()
    return gradient(model)


SPLITS = [[[3, 1, 2], [5, 2]], [[13], []], [[], [6, 7]]]


def _gradients_of_a_window_on_two_ranks() -> list[Tensor]:
    found = []
    for sync in ("window", "overlap"):
        for split in SPLITS:
            task, model, ranks = Pairs(), encoder(), Ranks.current()
            views = task.train_data.tensors[0][:SAMPLES].double()
            cut = iter(views.split([size for sizes in split for size in sizes]))
            parts = [[next(cut) for _ in sizes] for sizes in split][ranks.rank]
            step_of(task, model, Cached(), ranks, sync).gradient(window(parts))
            found.append(gradient(model))
    return found


def _failing_on_one_rank() -> list[str]:
    """A rank fails before the strategy's own collective, or after it; the other one hears of it."""
    told = []
    for pass_ in (1, 2):
        task, model, ranks = Pairs(), encoder(), Ranks.current()
        calls = []

        def represent(
            model: nn.Module, batch: list[Tensor], pass_: int = pass_, calls: list[int] = calls
        ) -> Tensor:
            calls.append(1)
            if len(calls) == pass_ and Ranks.current().rank == 1:
                raise DoesNotFitError("planted")
            return F.normalize(model(batch[0]), dim=-1)

        task.represent = represent  # type: ignore[method-assign]
        step = step_of(task, model, Cached(), ranks)
        try:
            step.gradient(window([torch.randn(3, 2, 5).double()]))
        except (DoesNotFitError, PeerFailed) as error:
            told.append(type(error).__name__)
    return told


def test_a_strategy_of_two_passes_is_exact_for_a_loss_of_the_whole_window() -> None:
    """Representations are gathered over the ranks within the window, and one rank may have none."""
    wanted = one_shot()
    for found in run_on_ranks(2, _gradients_of_a_window_on_two_ranks):
        assert len(found) == 2 * len(SPLITS)
        for each in found:
            assert relative_error(each, wanted) < 1e-12
    model, task = encoder(), Pairs()
    step_of(task, model, Plain()).gradient(
        window(list(task.train_data.tensors[0][:SAMPLES].double().split(3)))
    )
    assert relative_error(gradient(model), wanted) > 0.05  # what the usual way comes to


def test_a_failure_within_a_strategy_of_two_passes_ends_the_window_on_all_ranks() -> None:
    first, second = run_on_ranks(2, _failing_on_one_rank)
    assert first == ["PeerFailed"] * 2
    assert second == ["DoesNotFitError"] * 2


def test_the_second_pass_draws_the_same_random_numbers() -> None:
    task = Pairs(dropout=0.5)
    torch.manual_seed(0)
    model = task.build_model().double()
    parts = list(task.train_data.tensors[0][:SAMPLES].double().split(4))
    step_of(task, model, Cached()).gradient(window(parts, seed=(1, 2, 3)))  # which asserts it


class Halving(Plain):
    """Replays a window with smaller micro-batches when one does not fit."""

    overlaps = False

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        while True:
            failed = False
            try:
                super().__call__(window, step)
            except DoesNotFitError:
                failed = True
            if not step.parallel.agree(failed):
                return
            step.reset()
            halves = []
            for each in window.micro_batches:
                count = len(each.batch[0])
                sizes = [count - count // 2, count // 2]
                for part in split_batch(each.batch, sizes, count) or []:
                    halves.append(MicroBatch(part, {"loss": float(len(part[0]))}))
            window = LoadedWindow(halves, seed=window.seed)


class Squares(Task):
    """A loss that decomposes, through BatchNorm's buffers, and does not fit beyond three samples."""

    def __init__(self, most: int = 99) -> None:
        self.most = most

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3).eval()).double()

    def weight(self, batch: list[Tensor]) -> int:
        return len(batch[0])

    def loss_sum(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, float]:
        if len(batch[0]) > self.most:
            raise DoesNotFitError("planted")
        return model(batch[0]).square().sum(), float(len(batch[0]))


def test_a_half_window_can_be_forgotten_and_computed_in_smaller_micro_batches() -> None:
    batch = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for most, strategy in ((99, Plain()), (3, Halving())):
        task = Squares(most)
        model = task.build_model()
        step = step_of(task, model, strategy)
        result, _ = step.gradient(
            window(list(batch.split([2, 9])))
        )  # which compares weights with their count
        found.append((gradient(model), result.loss()))
    assert relative_error(found[1][0], found[0][0]) < 1e-14
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-14)


class Twice(Plain):
    """Two updates in one step, as optimizers in phases make them."""

    def __call__(self, window: LoadedWindow, step: Step) -> Update:
        for phase in range(2):
            if phase:
                step.reset()  # the weights that are used are counted once
            super().__call__(window, step)
            step.parallel.reduce()
            update = step.update()
        return update


def test_a_strategy_may_make_the_update_itself() -> None:
    batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for strategy, steps in ((Plain(), 2), (Twice(), 1)):
        task = Squares()
        settings = StepSettings("fp32", "none", False, "window")
        engine = Engine(
            task,
            task.build_model(),
            settings,
            SGDConfig(lr=0.1),
            Ranks(),
            torch.device("cpu"),
            strategy=strategy,
        )
        for number in range(steps):
            result, norm = engine.step(window(list(batch.split(4))), number)
        assert float(norm) > 0
        assert not result.skipped
        assert engine.step.number == steps
        found.append(torch.cat([p.detach().flatten() for p in engine.model.parameters()]))
    assert relative_error(found[1], found[0]) < 1e-14


def test_the_door_names_what_it_takes() -> None:
    assert isinstance(build.build_strategy(RunConfig()), Plain)
    with pytest.raises(ConfigError, match=r"gradient=plan is not one of plain.*Did you mean 'plain'"):
        build.build_strategy(RunConfig(gradient="plan"))
    with pytest.raises(ConfigError, match=r"gave a Linear, not a .*GradientStrategy. Subclass"):
        build.build_strategy(
            RunConfig(gradient={"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1})
        )


RECIPE = """
defaults: [base, _self_]
task: {_target_: contrastive.Pairs}
gradient: {_target_: contrastive.Cached}
batch: {effective: 13}
"""


def test_a_strategy_from_a_users_folder_trains_resumes_and_verifies(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    words = ["fit", "recipe=mine", "optimizer=sgd", "optimizer.lr=0.05", "precision=fp32"]
    fixed = ["checkpointing=none", "compile=false", "sync=window"]
    fixed += ["optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0"]
    gatrain(tmp_path, *words, *fixed, "batch.micro=3", "train.steps=2", "run.dir=two")
    gatrain(tmp_path, "resume", "two", "train.steps=4")
    task = Pairs()
    model = build.build_model(task, 0, torch.device("cpu"))
    schedule, losses = WindowSchedule(len(task.train_data), SAMPLES, 0), []
    found = metrics(tmp_path / "two")
    for index in range(4):
        total, count = task.loss_sum(model, [task.train_data.tensors[0][schedule.window(index).ids.copy()]])
        losses.append(float(total.detach()) / count)
        model.zero_grad()
        (total / count).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= found[index]["lr"] * parameter.grad
    assert [each["loss"] for each in found] == pytest.approx(losses, rel=1e-5)
    said = gatrain(tmp_path, "verify", "recipe=mine", "batch.micro=3")
    assert "equal" in said
