"""A loss that changes in the course of training asks for the number of updates made before, and is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_runs import gatrain, metrics
from torch import nn

from gatrain.config import SGDConfig
from gatrain.plan import StepSettings
from gatrain.tasks import LanguageModel, Task
from gatrain.train.check import check_loss
from gatrain.train.compiling import CompiledLossSum
from gatrain.train.engine import Engine
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks

# the second term's factor rises over the steps (a weight of the Kullback-Leibler term, say)
MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

import gatrain


class Annealed(gatrain.Task):
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(12, 4, generator=g), torch.randn(12, 2, generator=g)
        self.train_data = torch.utils.data.TensorDataset(x, y)
        self.eval_data = self.train_data
        self.told = []

    def build_model(self):
        torch.manual_seed(0)
        return nn.Linear(4, 2)

    def weight(self, batch):
        return len(batch[0])

    def loss_sum(self, model, batch, step=0):
        self.told.append(step)
        out = model(batch[0])
        factor = min(1.0, step / 4)
        return (F.mse_loss(out, batch[1], reduction="none").mean(1) + factor * out.pow(2).mean(1)).sum(), len(out)
"""
space: dict[str, Any] = {}
exec(MODULE, space)
Annealed: type[Task] = space["Annealed"]


def engine(**settings: Any) -> Engine:
    task = Annealed()
    values = {"precision": "fp32", "checkpointing": "none", "compile": False, "sync": "window", **settings}
    optimizer = SGDConfig(lr=0.1)
    return Engine(task, task.build_model(), StepSettings(**values), optimizer, Ranks(), torch.device("cpu"))


def window(task: Task, sizes: list[int]) -> LoadedWindow:
    x, y = task.train_data.tensors
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    return LoadedWindow([MicroBatch(list(part), {"loss": float(len(part[0]))}) for part in parts])


@pytest.mark.parametrize("sizes", [[12], [5, 4, 3]])
def test_every_micro_batch_of_a_step_is_told_its_number(sizes: list[int]) -> None:
    one = engine()
    found = [one.step(window(one.task, sizes), number)[0].loss() for number in range(4)]
    assert one.task.told == [number for number in range(4) for _ in sizes]
    assert found == pytest.approx(plain_losses(one.task, [0.1] * 4)[:4], rel=1e-6)
    assert one.step.number == 4  # what an evaluation after these steps goes by
    one.evaluate(list(one.task.train_data.tensors))
    check_loss(one, range(12))
    assert set(one.task.told[4 * len(sizes) :]) == {4}


def plain_losses(task: Task, rates: list[float]) -> list[float]:
    """Of each update on the whole batch, and once more after the last."""
    model, found = task.build_model(), []
    for number, rate in enumerate([*rates, 0.0]):
        total, count = task.loss_sum(model, list(task.train_data.tensors), step=number)  # type: ignore[call-arg]
        task.told.pop()
        model.zero_grad()
        (total / count).backward()
        found.append(float(total.detach()) / count)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return found


def test_a_compiled_loss_is_told_and_is_not_compiled_again_for_each_number() -> None:
    compiled: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append("graph")
        return graph.forward

    task = Annealed()
    model, batch = task.build_model(), list(task.train_data.tensors)
    loss_sum = CompiledLossSum(task, model, backend=backend)
    for number in range(6):
        given, _ = loss_sum(batch, step=number)
        wanted, _ = task.loss_sum(model, batch, step=number)  # type: ignore[call-arg]
        assert given.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert len(compiled) == 1


def test_a_language_model_with_a_loss_of_its_own_keeps_it_when_it_is_compiled() -> None:
    class Own(LanguageModel):
        def __init__(self) -> None:
            pass

        def loss_sum(self, model: nn.Module, batch: Any, step: int = 0) -> Any:
            return model(batch).sum() * step, 1.0

    loss_sum = Own().partly_compiled_loss_sum(lambda function: function)
    assert float(loss_sum(nn.Identity(), torch.ones(2), step=3)[0]) == 6.0


def test_a_resumed_run_goes_on_with_the_number(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "defaults: [base, _self_]\ntask: {_target_: mine.Annealed}\nbatch: {effective: 12, micro: 5}\n"
    )
    words = ["precision=fp32", "checkpointing=none", "compile=false", "optimizer=sgd", "optimizer.momentum=0"]
    words += ["optimizer.nesterov=false", "optimizer.weight_decay=0", "train.steps=2", "run.dir=one"]
    gatrain(tmp_path, "fit", "recipe=mine", *words)
    gatrain(tmp_path, "resume", "one", "train.steps=4")
    found = metrics(tmp_path / "one")
    wanted = plain_losses(task := Annealed(), [each["lr"] for each in found])
    assert task.told == []
    assert [each["loss"] for each in found] == pytest.approx(wanted[:4], rel=1e-6)
    evaluations = (tmp_path / "one" / "evaluations.jsonl").read_text().splitlines()
    assert float(evaluations[-1].partition('"loss": ')[2].partition(",")[0].rstrip("}")) == pytest.approx(
        wanted[4], rel=1e-6
    )
