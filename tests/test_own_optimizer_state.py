"""What an optimizer of one's own keeps is saved whole, or it is refused before the first step."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatrain.build.optimizer import optimizer_maker
from gatrain.errors import ConfigError, SavedStateError
from gatrain.optimizer_config import OwnOptimizer
from gatrain.states import Progress
from gatrain.train import saved_state
from gatrain.train.groups import group_parameters
from gatrain.train.optimizer import Built, build_optimizer
from gatrain.train.optimizer_state import try_out


class Plain(torch.optim.Optimizer):
    """SGD, to be changed in one place."""

    def __init__(self, params: Any, lr: float = 0.05, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})
        self.made()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.before()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * self.factor(p, group, self.state[p]))

    def made(self) -> None: ...

    def before(self) -> None: ...

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        return 1.0


class Counter:
    def __init__(self) -> None:
        self.n = 0


class InAnObject(Plain):
    def made(self) -> None:
        self.counter = Counter()

    def before(self) -> None:
        self.counter.n += 1

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        return 0.1 if self.counter.n > 1000 else 1.0  # never seen in a trial: the attribute itself tells


class InACount(Plain):
    def made(self) -> None:
        self.count = itertools.count()

    def before(self) -> None:
        next(self.count)


class InASet(Plain):
    def made(self) -> None:
        self.seen: set[int] = set()

    def before(self) -> None:
        self.seen.add(len(self.seen))


class InANumberOfNumpy(Plain):
    def made(self) -> None:
        self.taken = np.int64(0)

    def before(self) -> None:
        self.taken = self.taken + 1


class InAGenerator(Plain):
    def made(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def before(self) -> None:
        torch.rand((), generator=self.generator)


class InPythonsGenerator(Plain):
    def made(self) -> None:
        self.generator = random.Random(0)

    def before(self) -> None:
        self.generator.random()


class InAHook(Plain):
    def made(self) -> None:
        taken = [0]

        def count(*given: Any) -> None:
            taken[0] += 1

        self.register_step_post_hook(count)


class AtEverySixth(Plain):
    """Lookahead's kind: what it does shows in some steps alone."""

    def made(self) -> None:
        self.kept: dict[Tensor, Tensor] = {}

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 6:
            self.kept[p] = p.clone()
        return 1.0


class ForLargeMatrices(Plain):
    def made(self) -> None:
        self.kept: dict[Tensor, Tensor] = {}

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        assert p.grad is not None
        if p.numel() >= 4096:
            self.kept.setdefault(p, torch.zeros_like(p)).add_(p.grad)
        return 1.0


class ByNumber(Plain):
    def factor(self, p: Tensor, group: dict[str, Any], state: Any) -> float:
        state[0] = state.get(0, 0) + 1
        return 1 / state[0]  # type: ignore[no-any-return]


class ByPath(Plain):
    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["a/b"] = torch.zeros(())
        return 1.0


class Sparse(Plain):
    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["m"] = torch.eye(2).to_sparse()
        return 1.0


class SharedLate(Plain):
    """One tensor in the state of all parameters, from the fifth step on."""

    def before(self) -> None:
        states = [self.state[p] for group in self.param_groups for p in group["params"]]
        for state in states:
            state["step"] = state.get("step", 0) + 1
        if states[0]["step"] == 5:
            shared = torch.zeros(())
            for state in states:
                state["shared"] = shared
        if states[0]["step"] >= 5:
            states[0]["shared"] += 1

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        return 1 / (1 + float(state.get("shared", 0)))


class OwnRate(Plain):
    def before(self) -> None:
        for group in self.param_groups:
            group["lr"] *= 0.9


class NoRate(Plain):
    def made(self) -> None:
        self.rate = self.param_groups[0]["lr"]

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(self.rate / group["lr"])


class OptionalSAM(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is not None:
            moves = [0.05 * p.grad for p in parameters]
            for p, move in zip(parameters, moves, strict=True):
                p.add_(move)
            closure()
            for p, move in zip(parameters, moves, strict=True):
                p.sub_(move)
        super().step()


GROUPS = [{"params": list(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 3)).parameters())}]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (InAnObject, "attribute counter"),
        (InACount, "attribute count"),
        (InASet, "attribute seen"),
        (InANumberOfNumpy, "attribute taken"),
        (InAGenerator, "attribute generator"),
        (InPythonsGenerator, "attribute generator"),
        (InAHook, "attribute _optimizer_step_post_hooks"),
        (AtEverySixth, "attribute kept"),
        (ForLargeMatrices, "attribute kept"),
        (ByNumber, "the key 0"),
        (ByPath, "the key 'a/b'"),
        (Sparse, "sparse_coo"),
        (SharedLate, "cannot be resumed exactly"),
        (OwnRate, "changes the rate of its groups by itself"),
        (NoRate, "does not use the rate of its groups"),
        (OptionalSAM, "another step where step\\(\\) gets a closure"),
    ],
)
def test_what_a_resume_would_lose_is_refused_wherever_it_is_kept(kind: type[Plain], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        try_out(lambda given: kind(given), GROUPS, large=True)


def test_what_never_changes_or_follows_from_the_saved_is_taken() -> None:
    class Fine(Plain):
        def made(self) -> None:
            self.table, self.names, self.made_by = np.arange(3), {"a", "b"}, object()

        def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
            state["step"] = state.get("step", 0) + 1
            self.last = state["step"]
            return 1.0

    assert not try_out(lambda given: Fine(given), GROUPS, large=True).counts_in_groups


# --- through a saved state ------------------------------------------------------------------------------


class LateInGroups(Plain):
    """SWA's kind: its groups change in step 20, long after all trials."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, phase=0, **kwargs)

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 20:
            group["phase"] = 1
        return 0.2 if group["phase"] else 1.0


class LateInAList(Plain):
    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 20:
            state["kept"] = [torch.zeros(())]
        return 1.0


def made(name: str) -> tuple[nn.Module, Built]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    config = OwnOptimizer(target=f"{__name__}.{name}", lr=0.05)
    return model, build_optimizer(config, group_parameters(config, model), maker=optimizer_maker(config))


def train(model: nn.Module, built: Built, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        built.optimizer.zero_grad()
        model(x).square().mean().backward()
        built.optimizer.step()


def save(folder: Path, name: str, step: int) -> Path:
    model, built = made(name)
    train(model, built, range(step))
    progress = Progress(step, 6 * step, 0, 6, 0, 6, updates=step)
    return saved_state.write(
        folder, saved_state.snapshot(progress, model, built.optimizer, parts=built.parts()), 1
    )


def test_groups_that_change_late_are_saved(tmp_path: Path) -> None:
    whole, built = made("LateInGroups")
    train(whole, built, range(30))
    path = save(tmp_path, "LateInGroups", 25)
    resumed, built = made("LateInGroups")
    loaded = saved_state.read(path, resumed, built.optimizer)
    loaded.fill(resumed, built.optimizer, None)
    built.load(loaded.parts)
    train(resumed, built, range(25, 30))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


class LateAttribute(Plain):
    """Lookahead's kind, with a start: slow weights are kept from step 20 on."""

    def factor(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["step"] = state.get("step", 0) + 1
        self.last = state["step"]
        if state["step"] >= 20:
            self.slow = {**getattr(self, "slow", {}), p: p.clone()}
        return 1.0


def test_attributes_that_come_late_are_told() -> None:
    model, built = made("LateAttribute")
    train(model, built, range(19))
    assert built.late() == ""  # `last` follows from what is saved
    train(model, built, range(19, 25))
    assert "LateAttribute has begun to change slow, and no saved state holds" in built.late()


def test_state_that_no_file_holds_and_comes_late_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(SavedStateError, match="LateInAList has come to keep a list at 'kept'"):
        save(tmp_path, "LateInAList", 25)
    assert not list(tmp_path.iterdir())
