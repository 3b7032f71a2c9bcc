"""What `gatrain verify` compares with: rounding that is measured, and strategies that change the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatrain.compose import compose
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step
from gatrain.verify import limits
from gatrain.verify.looks import Verification
from gatrain.verify.ranks import Cases

RADIUS = 0.05


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Kink(nn.Module):
    """A ReLU whose input is 7e-9 for the first sample in fp64, and 0 in fp32: its gradient is another one there."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        one = 1 + self.body.weight.sum() - self.body.weight.sum().detach()  # the gradient has to do with it
        kinked = torch.relu((x[:, :1] + x[:, 1:2]) * one + x[:, 2:])
        return self.head(self.body(x)) + kinked * torch.tensor([5.0, 0.0, 0.0], dtype=x.dtype)


def data(width: int = 6) -> torch.utils.data.TensorDataset:
    drawn = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(
        torch.randn(30, width, generator=drawn), torch.randint(3, (30,), generator=drawn)
    )


def kinked() -> torch.utils.data.TensorDataset:
    found = data(3)
    found.tensors[0][:3] = torch.tensor([-0.1, -0.2, 0.3])
    return found


class SharpnessAware(GradientStrategy):
    """The gradient at the weights of largest loss nearby."""

    exact = "the gradient of the whole window at the weights of largest loss nearby"
    changes_gradient = True

    def passes(self, step: Step) -> dict[str, int]:
        return {"loss": 2}

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        Plain()(window, step)
        step.parallel.reduce()
        moved = self.move(step)
        step.parallel.drop_gradients()
        Plain()(window, step)
        self.move_back(moved)

    def move(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        parameters = list(step.parallel.parameters)
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        moved = [(p.detach(), p.grad * (RADIUS / norm)) for p in parameters if p.grad is not None]
        for parameter, by in moved:
            parameter.add_(by)
        return moved

    def move_back(self, moved: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, by in moved:
            parameter.sub_(by)


class Undeclared(SharpnessAware):
    changes_gradient = False


class OfEachMicroBatch(SharpnessAware):
    """The usual mistake: each micro-batch looks for weights of its own."""

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        for k, batch in step.batches(window):
            before = [p.grad for p in step.parallel.parameters]
            step.parallel.drop_gradients()
            step.forward_backward(batch)
            moved = self.move(step)
            step.parallel.drop_gradients()
            step.forward_backward(batch)
            self.move_back(moved)
            for parameter, earlier in zip(step.parallel.parameters, before, strict=True):
                if earlier is not None and parameter.grad is not None:
                    parameter.grad += earlier
            del k


class Louder(Plain):
    """1 % too large."""

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        step.scale = {name: 1.01 * factor for name, factor in step.scale.items()}
        super().__call__(window, step)


def cases(
    folder: Path, strategy: str, model: str = "Net", reader: str = "data"
) -> tuple[list[dict[str, Any]], Verification]:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "mine.yaml").write_text(
        f"defaults: [base, _self_]\nmodel: {{_target_: {__name__}.{model}}}\n"
        f"data: {{_target_: {__name__}.{reader}}}\n"
        "loss: {_target_: torch.nn.CrossEntropyLoss}\nbatch: {effective: 30}\n"
        f"gradient: {strategy}\n"
    )
    config = compose(["recipe=mine"], cwd=folder).config
    proof = Verification(config, torch.device("cpu"), Ranks(), precision="fp32", checkpointing="none")
    proof.inspect()
    return Cases(proof).one_process(7), proof


def own(strategy: type) -> str:
    return f"{{_target_: {__name__}.{strategy.__name__}}}"


def passed(case: dict[str, Any]) -> bool:
    equal = case["relative_error"] <= case["tolerance"]
    return case["error"] is None and bool(equal != case["mutation"])


def test_a_strategy_that_says_to_change_the_gradient_is_compared_with_itself_in_one_piece(
    tmp_path: Path,
) -> None:
    found, proof = cases(tmp_path, own(SharpnessAware))
    assert all(passed(case) for case in found), found
    assert sum("another gradient than that of the loss, as it says" in note for note in proof.notes) == 1


def test_a_strategy_that_changes_the_gradient_unsaid_is_named_and_the_loss_is_not_blamed(
    tmp_path: Path,
) -> None:
    found, _ = cases(tmp_path, own(Undeclared))
    splits = [case for case in found if not case["mutation"]]
    assert splits
    for case in splits:
        assert not passed(case)
        assert (
            "Undeclared gives another gradient than that of the loss even for the window in one"
            in case["error"]
        )
        assert "changes_gradient = True" in case["error"]


def test_a_changed_gradient_that_depends_on_the_split_fails_and_the_strategy_is_named(tmp_path: Path) -> None:
    found, _ = cases(tmp_path, own(OfEachMicroBatch))
    splits = [case for case in found if not case["mutation"]]
    assert not any(passed(case) for case in splits)
    assert all(
        "OfEachMicroBatch computes something else for another split" in case["error"] for case in splits
    )


def test_a_small_mistake_is_caught_where_fp32_rounds_much(tmp_path: Path) -> None:
    found, proof = cases(tmp_path, own(Louder), "Kink", "kinked")
    assert any("In fp32 the one-shot gradient itself is" in note for note in proof.notes)
    (fp64,) = [case for case in found if case["name"] == "planned split" and case["precision"] == "fp64"]
    assert not passed(fp64)


def test_large_rounding_of_fp32_is_no_mistake_of_a_split(tmp_path: Path) -> None:
    found, proof = cases(tmp_path, "plain", "Kink", "kinked")
    assert any("In fp32 the one-shot gradient itself is" in note for note in proof.notes)
    assert all(passed(case) for case in found), found


def ignored() -> torch.utils.data.TensorDataset:
    found = data()
    found.tensors[1][torch.randperm(30, generator=torch.Generator().manual_seed(0))[:14]] = -100
    return found


def test_micro_batches_of_ignored_targets_alone_are_no_alarm(tmp_path: Path) -> None:
    found, _ = cases(tmp_path, "plain", reader="ignored")
    assert all(passed(case) for case in found), found
    assert {case["name"] for case in found if case["mutation"]} == {"mutation: mean of means"}


@pytest.mark.parametrize("rounding", [2.5e-4, 1e-2])
def test_fp32_is_judged_by_its_own_rounding_where_fp64_proves_the_split(rounding: float) -> None:
    assert (
        limits.split_limit("fp32", "fp64", 1.9 * rounding, rounding) == 2 * rounding
    )  # the triangle inequality
    assert (
        limits.split_limit("fp32", "fp32", 1.9 * rounding, rounding) == limits.CEILING["fp32"]
    )  # no proof in fp64
    assert limits.split_limit("fp64", "fp64", 1.9 * rounding, rounding) == limits.FLOOR["fp64"]
