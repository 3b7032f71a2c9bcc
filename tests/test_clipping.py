"""Clipping by norm and by units (AGC), by group: once, on the reduced gradient, as a plain reference does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from torch import Tensor, nn

from gatrain.config import RunConfig, SGDConfig, TrainConfig
from gatrain.errors import ConfigError
from gatrain.optimizer_config import AdamAConfig, OptimizerConfig, check_optimizer
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, Task
from gatrain.train.engine import Engine
from gatrain.train.gradient.fold import Fold
from gatrain.train.groups import group_parameters, notices
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks

Part = tuple[list[str], float | None, float | None]
"""Names of parameters that are clipped together, with clip_norm and clip_agc."""


class Net(nn.Module):
    """A convolution, a transposed one, gains that begin at zero, and an output layer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3)
        self.up = nn.ConvTranspose1d(4, 3, 2)
        self.gain = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(21, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(torch.tanh(self.conv(x.to(self.gain.dtype)))))  # [n, 3, 7]
        out: Tensor = self.head((hidden * (1 + self.gain[:, None])).flatten(1))
        return out.double()


class Squares(Task):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def build_model(self) -> nn.Module:
        return Net(self.dtype)

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return (model(batch) - 3).square().sum(), float(len(batch))


DATA = torch.randn(6, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LR = 0.5


def units(name: str, tensor: Tensor) -> list[Tensor]:
    """Views of the units of a parameter, one by one."""
    if tensor.dim() < 2:
        return [tensor]
    return [
        tensor.select(1 if name == "up.weight" else 0, nth)
        for nth in range(tensor.shape[name == "up.weight"])
    ]


def reference(parts: list[Part]) -> tuple[Any, float]:
    """One SGD step on the whole batch: (weights, norm of the gradient before it is clipped)."""
    model = Net()
    (Squares().loss_sum(model, DATA)[0] / len(DATA)).backward()
    named = dict(model.named_parameters())
    before = float(torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None]).norm())
    for names, norm, agc in parts:
        if norm is not None:
            nn.utils.clip_grad_norm_([named[name] for name in names], norm)
        for name in names if agc is not None else ():
            for weight, gradient in zip(units(name, named[name]), units(name, named[name].grad), strict=True):
                most = agc * max(float(weight.detach().norm()), 1e-3)
                if float(gradient.norm()) > most:
                    gradient *= most / float(gradient.norm())
    torch.optim.SGD(model.parameters(), lr=LR).step()
    return {name: p.detach() for name, p in model.named_parameters()}, before


BODY, UP, HEAD = ["conv.weight", "conv.bias", "gain"], ["up.weight", "up.bias"], ["head.weight", "head.bias"]
CASES: dict[str, tuple[OptimizerConfig, list[Part]]] = {
    "norm": (SGDConfig(lr=LR, clip_norm=0.1), [(BODY + UP + HEAD, 0.1, None)]),
    "agc": (SGDConfig(lr=LR, clip_agc=0.05), [(BODY + UP, None, 0.05)]),
    "agc of all": (SGDConfig(lr=LR, clip_agc=0.05, clip_agc_exclude=[]), [(BODY + UP + HEAD, None, 0.05)]),
    "agc by pattern": (
        SGDConfig(lr=LR, clip_agc=0.05, clip_agc_exclude=["up.*"]),
        [(BODY + HEAD, None, 0.05)],
    ),
    "norm by group": (
        SGDConfig(
            lr=LR,
            clip_norm=0.2,
            groups=[{"match": "up.*", "clip_norm": 0.03}, {"match": "head.*", "clip_norm": None}],
        ),
        [(BODY, 0.2, None), (UP, 0.03, None)],
    ),
    "both by group": (
        SGDConfig(lr=LR, clip_norm=0.2, groups=[{"match": "up.*", "clip_agc": 0.02}]),
        [(BODY + HEAD, 0.2, None), (UP, None, 0.02)],
    ),
}


def stepped(config: OptimizerConfig, sizes: list[list[int]], dtype: torch.dtype = torch.float64) -> Engine:
    task, settings = Squares(dtype), StepSettings("fp32", "none", False, "window")
    one = Engine(task, task.build_model(), settings, config, Ranks.current(), torch.device("cpu"))
    parts = iter(DATA.split([size for of_rank in sizes for size in of_rank]))
    made = [[MicroBatch(p, {"loss": float(len(p))}) for p in (next(parts) for _ in each)] for each in sizes]
    one.norm = one.step(LoadedWindow(made[one.ranks.rank]), 0)[1]  # type: ignore[attr-defined]
    return one


def weights(one: Engine) -> dict[str, Tensor]:
    found = {name: one.masters.of(p).detach().double() for name, p in one.model.named_parameters()}
    return found | {"norm": one.norm.double()}  # type: ignore[attr-defined]


def assert_is_the_reference(name: str, found: dict[str, Tensor], rtol: float = 1e-10) -> None:
    wanted, norm = reference(CASES[name][1])
    assert float(found["norm"]) == pytest.approx(norm, rel=rtol)
    for key, value in wanted.items():
        assert float((found[key] - value).norm()) <= rtol * float(value.norm()), key


def _all_on_two_ranks() -> list[dict[str, Tensor]]:
    return [weights(stepped(config, [[1, 2], [3]])) for config, _ in CASES.values()]


def test_a_step_is_clipped_as_the_reference_on_one_rank_and_on_two() -> None:
    for name, (config, _) in CASES.items():
        assert_is_the_reference(name, weights(stepped(config, [[2, 1, 3]])))
    for rank in run_on_ranks(2, _all_on_two_ranks):
        for name, found in zip(CASES, rank, strict=True):
            assert_is_the_reference(name, found)


def test_what_is_clipped_matters_here() -> None:
    """The cases differ from each other and from no clipping, so that the comparison above says something."""
    every = [reference(parts)[0] for _, parts in CASES.values()]
    every.append(reference([])[0])
    flat = [torch.cat([value.flatten() for value in each.values()]) for each in every]
    assert all(float((a - b).norm()) > 1e-3 for nth, a in enumerate(flat) for b in flat[:nth])


@pytest.mark.parametrize("name", ["agc", "norm by group"])
def test_16_bit_parameters_are_clipped_by_their_main_gradients_and_master_weights(name: str) -> None:
    one = stepped(CASES[name][0], [[2, 4]], torch.bfloat16)
    assert_is_the_reference(name, weights(one), rtol=0.05)
    assert all(one.masters.of(p).dtype == torch.float32 for p in one.model.parameters())


def test_a_gradient_that_is_not_finite_is_seen_before_it_is_clipped() -> None:
    one = stepped(CASES["agc"][0], [[6]])
    before = weights(one)
    result, norm = one.step(LoadedWindow([MicroBatch(DATA * float("nan"), {"loss": 6.0})]), 1)
    assert result.skipped
    assert not torch.isfinite(norm)
    assert all(torch.equal(value, before[name]) for name, value in weights(one).items() if name != "norm")


def test_a_run_tells_what_agc_leaves_out() -> None:
    model, config = Net(), SGDConfig(clip_agc=0.01)
    (said,) = notices(group_parameters(config, model), model, None)
    assert said.startswith("optimizer.clip_agc leaves out head.weight, head.bias, the output layer")


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (SGDConfig(clip_norm=1.0, clip_agc=0.01), "Keep one of them and set the other to null"),
        (
            SGDConfig(groups=[{"match": "*", "clip_norm": 1, "clip_agc": 0.1}]),
            r"groups\[0\].*Keep one of them",
        ),
        (SGDConfig(clip_agc=-1.0), "optimizer.clip_agc=-1.0"),
        (SGDConfig(groups=[{"match": "*", "clip_agc": "x"}]), "is not a number"),
        (SGDConfig(clip_agc_exclude=["head.*"]), "Add for example optimizer.clip_agc=0.01"),
    ],
    ids=["both", "both in a group", "below zero", "no number", "nothing to leave out of"],
)
def test_what_cannot_be_clipped_so_is_refused(optimizer: OptimizerConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_optimizer(optimizer)


def test_a_pattern_without_a_parameter_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'haed.weight' matches no parameter.*head.weight"):
        group_parameters(SGDConfig(clip_agc=0.01, clip_agc_exclude=["haed.weight"]), Net())

    class Sparse(Squares):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))

    task, settings = Sparse(), StepSettings("fp32", "none", False, "window")
    with pytest.raises(ConfigError, match="Write sparse=False in the model, or clip_norm"):
        Engine(task, task.build_model(), settings, SGDConfig(clip_agc=0.1), Ranks(), torch.device("cpu"))


@pytest.mark.parametrize(
    "optimizer", [AdamAConfig(clip_agc=0.1), AdamAConfig(groups=[{"match": "*", "clip_norm": 1.0}])]
)
def test_adama_refuses_every_kind_of_clipping(optimizer: OptimizerConfig) -> None:
    config = RunConfig(optimizer=optimizer, train=TrainConfig(steps=1))
    with pytest.raises(ConfigError, match=r"Write optimizer.*=null"):
        Fold().check(config)
