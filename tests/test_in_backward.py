"""An update in the backward is that of the plain step, to the bit, for every shipped optimizer, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from test_optimizers import DATA, Net, Squares
from torch import nn

from gatrain import build
from gatrain.config import AdamWConfig, BatchConfig, OptimizerConfig, RunConfig, SGDConfig, TrainConfig
from gatrain.errors import ConfigError
from gatrain.optimizer_config import AdafactorConfig, LionConfig, MuonConfig, OwnOptimizer
from gatrain.plan import StepSettings
from gatrain.train.engine import Engine
from gatrain.train.gradient.in_backward import InBackward
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks

OPTIMIZERS: list[OptimizerConfig] = [
    AdamWConfig(lr=0.01, weight_decay=0.1, groups=[{"match": "head.*", "lr_scale": 3.0}]),
    SGDConfig(lr=0.05, momentum=0.9, nesterov=True),
    MuonConfig(lr=0.01),
    AdafactorConfig(),
    LionConfig(lr=0.01),
]


def engine_with(strategy: Any, config: OptimizerConfig, model: nn.Module) -> Engine:
    settings = StepSettings("fp32", "none", False, "window")
    return Engine(Squares(), model, settings, config, Ranks.current(), torch.device("cpu"), strategy=strategy)


def window(step: int) -> LoadedWindow:
    return LoadedWindow([MicroBatch(DATA * (1 + step), {"loss": float(len(DATA))})])


class Half(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.bfloat16()).double()


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.name)
@pytest.mark.parametrize("make", [Net, Half], ids=["fp64", "bf16 parameters"])
def test_every_shipped_optimizer_makes_the_plain_steps_update_to_the_bit(
    config: OptimizerConfig, make: Any
) -> None:
    plain, other = (engine_with(strategy, config, make()) for strategy in (Plain(), InBackward()))
    for step in range(3):
        (_, wanted), (result, norm) = (each.step(window(step), step) for each in (plain, other))
        assert not result.skipped
        assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
    for one, two in zip(plain.masters.trained, other.masters.trained, strict=True):
        assert torch.equal(one, two)
        assert two.grad is None
        for key, value in plain.optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.optimizer.state[two][key]))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True)
    )


def test_no_gradient_is_there_while_the_next_one_is_computed() -> None:
    one = engine_with(InBackward(), AdamWConfig(lr=0.01), Net())
    kept: list[int] = []
    parameters = list(one.model.parameters())
    for parameter in parameters:
        parameter.register_hook(lambda _: kept.append(sum(p.grad is not None for p in parameters)))
    one.step(window(0), 0)
    assert kept == [0] * len(parameters)


def test_a_window_that_is_not_finite_ends_the_run_without_a_state_to_save() -> None:
    one = engine_with(InBackward(), AdamWConfig(lr=0.01), Net())
    result, norm = one.step(LoadedWindow([MicroBatch(DATA * float("nan"), {"loss": 6.0})]), 0)
    assert result.skipped
    assert not torch.isfinite(norm)
    assert not one.step.strategy.keeps_state


def _on_two_ranks() -> str:
    try:
        engine_with(InBackward(), AdamWConfig(), Net())
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_several_ranks_and_fp16_parameters_are_refused() -> None:
    assert all("use --nproc 1" in said for said in run_on_ranks(2, _on_two_ranks))
    with pytest.raises(ConfigError, match="fp16 parameters"):
        engine_with(InBackward(), AdamWConfig(), Net().half())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": AdamWConfig(clip_norm=1.0)}, "Write optimizer.clip_norm=null"),
        ({"optimizer": OwnOptimizer(target="a.B")}, "Write optimizer=adamw"),
        ({"precision": "fp16"}, "Write precision=bf16"),
        ({"train": TrainConfig(steps=1, nonfinite="skip")}, "Write train.nonfinite=stop"),
        ({"batch": BatchConfig(effective=8, micro="auto")}, "batch.micro=auto.*Write batch.micro=8"),
        ({"batch": BatchConfig(effective=8, micro=4)}, "batch.micro=4.*Write batch.micro=8"),
        ({"batch": BatchConfig(effective={0: 4, 9: 8}, micro=4)}, "batch.micro=4.*Write batch.micro=8"),
    ],
    ids=["clip_norm", "own optimizer", "fp16", "skip", "auto", "K > 1", "stages"],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    given = {"gradient": "in_backward", "batch": BatchConfig(effective=8, micro=8), **changes}
    with pytest.raises(ConfigError, match=words):
        build.build_strategy(RunConfig(**given))


def test_stages_go_with_it_where_the_largest_is_one_micro_batch() -> None:
    batch = BatchConfig(effective={0: 4, 9: 8}, micro=8)
    assert type(build.build_strategy(RunConfig(gradient="in_backward", batch=batch))) is InBackward
