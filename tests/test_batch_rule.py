"""Another effective batch changes the learning rate by a named rule; another split never does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatrain.batch_rule import scaled
from gatrain.config import AdamWConfig, BatchConfig, RunConfig, SGDConfig, TrainConfig, validate
from gatrain.errors import ConfigError
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, Task
from gatrain.train.batch_scaling import BatchScaling
from gatrain.train.engine import Engine, StepClock
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks

SETTINGS = StepSettings("fp32", "none", False, "window")


def config(optimizer: Any = None, **batch: Any) -> RunConfig:
    target = {"_target_": "gatrain.tasks.supervised.Supervised"}
    return RunConfig(
        model=target, data=target, task=target, batch=BatchConfig(**batch),
        train=TrainConfig(steps=1), optimizer=optimizer or AdamWConfig(),
    )  # fmt: skip


class Squares(Task):
    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return model(batch).square().sum(), float(len(batch))


def engine(rule: str = "none", base: int = 1, **adam: Any) -> Engine:
    task, optimizer = Squares(), AdamWConfig(lr=0.01, **adam)
    clock = StepClock(config().schedule, 10, 8)
    return Engine(
        task, task.build_model(), SETTINGS, optimizer, Ranks(), torch.device("cpu"), clock,
        batch_rule=(rule, base),
    )  # fmt: skip


def window(split: list[int]) -> LoadedWindow:
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    return LoadedWindow([MicroBatch(part, {"loss": float(len(part))}) for part in data.split(split)])


def test_another_split_of_the_same_window_has_the_same_rate_betas_and_update() -> None:
    found = []
    for split in ([8], [1] * 8, [3, 3, 2]):
        one = engine("sqrt", 2)
        one.scaling.set_to(8)  # the effective batch, whatever the split
        one.step(window(split), 0)
        group = one.optimizer.param_groups[0]
        found.append((one.learning_rate(0), group["betas"], group["eps"], one.model.weight.detach().clone()))
    assert found[0][:3] == found[1][:3] == found[2][:3]
    assert found[0][0] == 0.02
    for _, _, _, weight in found[1:]:
        torch.testing.assert_close(weight, found[0][3], rtol=1e-6, atol=1e-7)


def test_the_rules_are_those_of_their_papers() -> None:
    betas, eps = (0.9, 0.999), 1e-8
    assert scaled("none", 4, betas, eps).lr_factor == 1
    assert scaled("linear", 4, betas, eps).lr_factor == 4
    root = scaled("sqrt", 4, betas, eps)
    assert root.lr_factor == 2
    assert root.betas == pytest.approx((0.6, 0.996), abs=1e-15)
    assert root.eps == 5e-9
    half = scaled("half_life", 4, betas, eps)
    assert (half.lr_factor, half.eps) == (1, eps)
    assert half.betas is not None
    assert half.betas[0] == 0.9
    # after as many samples (4 old steps, 1 new one) as much is forgotten
    assert half.betas[1] == pytest.approx(0.999**4, abs=1e-15)
    for rule in ("linear", "sqrt", "half_life"):
        assert scaled(rule, 1.0, betas, eps).betas == betas


@pytest.mark.parametrize(
    ("batch", "optimizer", "words"),
    [
        ({"effective": 640, "rule": "sqrt", "base": 64}, None, "1 - 10 (1 - 0.9) = 0, which is not above 0"),
        (
            {"effective": 640, "rule": "sqrt", "base": 64},
            SGDConfig(),
            "Adam's betas, and the optimizer is sgd",
        ),
        ({"effective": 640, "rule": "half_life", "base": 64}, SGDConfig(), "batch.rule=linear"),
        ({"effective": 64, "rule": "linear"}, None, "nothing to do"),
        ({"effective": 64, "base": 32}, None, "batch.rule=none changes nothing"),
        ({"effective": 64, "rule": "cubic", "base": 32}, None, "none, linear, sqrt, half_life"),
        ({"effective": 64, "effective_by": "epochs"}, None, "leave batch.effective_by out"),
        ({"effective": {1: 64}}, None, "Let the first stage begin at 0"),
        ({"effective": {0: 64, 1: 1.5}}, None, "a whole number of samples"),
        ({"effective": {}}, None, "no stage"),
    ],
)
def test_what_has_no_meaning_is_refused(batch: dict[str, Any], optimizer: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config(optimizer, **batch))
    assert words in str(refused.value)


def test_a_rule_of_adam_is_refused_for_an_optimizer_of_another_kind() -> None:
    lion_like = torch.optim.RMSprop([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match=r"the optimizer is a RMSprop. Use batch.rule=linear"):
        BatchScaling("sqrt", 1, lion_like, 0.1)


def trained(steps: int) -> Engine:
    one = engine("half_life", 2)
    one.scaling.set_to(2)
    for number in range(steps):
        one.step(window([8]), number)
    return one


def moments(one: Engine) -> list[Tensor]:
    return [
        state[name].clone() for state in one.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]


def test_the_bias_corrected_means_are_the_same_after_a_change() -> None:
    one = trained(3)
    before, (_, beta) = moments(one), one.optimizer.param_groups[0]["betas"]
    one.scaling.set_to(8)
    _, now = one.optimizer.param_groups[0]["betas"]
    assert now == pytest.approx(beta**4)
    for old, new in zip(before[1::2], moments(one)[1::2], strict=True):
        torch.testing.assert_close(old / (1 - beta**3), new / (1 - now**3), rtol=1e-6, atol=0)
        assert float((new / old).max()) > 3.9  # left as they were they would be that much too small
    for old, new in zip(before[::2], moments(one)[::2], strict=True):
        assert torch.equal(old, new)  # beta1 stays


def test_a_change_is_made_once_wherever_a_run_goes_on() -> None:
    one = trained(3)
    one.scaling.set_to(8)
    again = engine("half_life", 2)
    again.model.load_state_dict(one.model.state_dict())
    groups = again.optimizer.state_dict()["param_groups"]  # a saved state holds no options of groups
    again.optimizer.load_state_dict({**copy.deepcopy(one.optimizer.state_dict()), "param_groups": groups})
    parts = one.scaling.parts()
    again.scaling.load(parts)
    assert not parts
    for each in (one, again):
        each.scaling.set_to(8)
        each.step(window([8]), 3)
    assert torch.equal(one.model.weight, again.model.weight)
    assert all(torch.equal(a, b) for a, b in zip(moments(one), moments(again), strict=True))


def test_changes_back_and_forth_leave_the_values_of_the_base() -> None:
    one = engine("sqrt", 2)
    for effective in (2, 8, 4, 2):
        one.scaling.set_to(effective)
    group = one.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], one.learning_rate(0)) == ((0.9, 0.999), 1e-8, 0.01)
