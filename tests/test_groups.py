"""Groups by rules, depth and the model's own words; freezing and thawing by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks
from test_engine import CPU
from torch import Tensor, nn

from gatrain.config import ScheduleConfig, SGDConfig
from gatrain.errors import ConfigError
from gatrain.models.gpt import GPT
from gatrain.optimizer_config import MuonConfig, check_optimizer
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, Task
from gatrain.train.depth import depths_of
from gatrain.train.engine import Engine, StepClock
from gatrain.train.groups import group_parameters, notices
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.optimizer import build_optimizer
from gatrain.train.ranks import Ranks


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def options(config: SGDConfig, model: nn.Module | None = None) -> dict[str, tuple[float, float]]:
    """Rate and weight decay that each parameter is stepped with."""
    model = model or small()
    built = build_optimizer(config, group_parameters(config, model))
    built.set_rate(built.lr)
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in built.optimizer.param_groups
        for p in group["params"]
    }


def test_without_rules_matrices_alone_decay() -> None:
    assert options(SGDConfig(lr=1.0, weight_decay=0.1)) == {
        "0.weight": (1.0, 0.1), "2.weight": (1.0, 0.1),
        "0.bias": (1.0, 0.0), "1.weight": (1.0, 0.0), "1.bias": (1.0, 0.0), "2.bias": (1.0, 0.0),
    }  # fmt: skip


def test_the_first_rule_that_matches_counts() -> None:
    rules = [
        {"match": "2.bias", "lr": 0.25},
        {"match": "2.*", "lr_scale": 0.5, "weight_decay": 0.3},
        {"dims": "<2", "weight_decay": 0.2},
    ]
    assert options(SGDConfig(lr=1.0, weight_decay=0.1, groups=rules)) == {
        "0.weight": (1.0, 0.1), "0.bias": (1.0, 0.2), "1.weight": (1.0, 0.2), "1.bias": (1.0, 0.2),
        "2.weight": (0.5, 0.3), "2.bias": (0.25, 0.0),
    }  # fmt: skip


def test_options_of_the_optimizers_own_groups_may_stand_in_a_rule() -> None:
    config = SGDConfig(lr=1.0, momentum=0.9, groups=[{"match": "2.*", "momentum": 0.5}])
    built = build_optimizer(config, group_parameters(config, small()))
    assert {group["momentum"] for group in built.optimizer.param_groups} == {0.9, 0.5}
    wrong = SGDConfig(groups=[{"match": "2.*", "momemtum": 0.5}])
    with pytest.raises(ConfigError, match="Did you mean 'momentum'"):
        build_optimizer(wrong, group_parameters(wrong, small()))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"match": "3.*", "lr": 1.0}], "matches no parameter of Sequential.*0.weight"),
        ([{"match": "*", "lr": 1.0}, {"match": "2.*", "lr": 2.0}], "belongs to an earlier rule"),
        ([{"match": "*", "frozen": True}], "freezes every parameter"),
        ("model", "has no method parameter_groups"),
    ],
)
def test_rules_without_effect_are_refused(rules: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        group_parameters(SGDConfig(groups=rules), small())


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"lr": 1.0}], "says of no parameters"),
        ([{"match": "a"}], "says nothing of its parameters"),
        ([{"match": "a", "lr": 0.0}], "not a positive finite number"),
        ([{"match": "a", "lr": 1.0, "lr_scale": 2.0}], "both given"),
        ([{"dims": "2..", "lr": 1.0}], "number of dimensions"),
        ([{"match": "a", "thaw_at": 0}], "thaw_at=0 is below 1"),
        ([{"match": "a", "frozen": "yes"}], "not true or false"),
        ("all", "not a list of rules"),
    ],
)
def test_rules_that_say_nothing_are_refused_before_anything_is_made(rules: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_optimizer(SGDConfig(groups=rules))


class OwnGroups(nn.Module):
    def __init__(self, lists_all: bool = True) -> None:
        super().__init__()
        self.body, self.head, self._all = nn.Linear(4, 3), nn.Linear(3, 1), lists_all

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": [*self.body.parameters()], "lr_scale": 0.1}]
        return [*groups, {"params": ["head.weight", "head.bias"]}] if self._all else groups


def test_the_models_own_groups_are_taken_where_they_are_asked_for() -> None:
    found = options(SGDConfig(lr=1.0, groups="model"), OwnGroups())
    assert {name: lr for name, (lr, _) in found.items()} == {
        "body.weight": 0.1, "body.bias": 0.1, "head.weight": 1.0, "head.bias": 1.0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"leaves out head\.weight and 1 more"):
        options(SGDConfig(groups="model"), OwnGroups(lists_all=False))


def test_layer_decay_is_timms_for_timms_models() -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    wanted = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.75)
        for p in group["params"]
    }
    found = depths_of(model, 0.75)
    assert {id(p): found[name] for name, p in model.named_parameters()} == wanted


def test_layer_decay_counts_blocks_in_their_order_and_refuses_where_there_are_none() -> None:
    model = GPT(vocab_size=17, context=8, layers=2, heads=2, width=16)
    found = depths_of(model, 0.5)
    by_block = [{v for n, v in found.items() if f"blocks.{block}." in n} for block in (0, 1)]
    assert by_block == [{0.25}, {0.5}]
    embedding = next(name for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    assert found[f"{embedding}.weight"] == 0.125
    assert max(found.values()) == 1.0
    rates = options(
        SGDConfig(lr=1.0, layer_decay=0.5, groups=[{"match": f"{embedding}.*", "lr": 0.7}]), model
    )
    assert rates[f"{embedding}.weight"][0] == 0.7  # a rule's rate is the rate
    with pytest.raises(ConfigError, match=r"no list of repeated blocks.*optimizer\.groups"):
        depths_of(small(), 0.5)


# --- freezing and thawing -------------------------------------------------------------------------------


class Tuned(nn.Module):
    """A frozen body with BatchNorm in evaluation mode, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()).requires_grad_(False)
        self.body.eval()
        self.head = nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class Points(Task):
    def build_model(self) -> nn.Module:
        return Tuned()

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return (model(batch) - batch.sum(1, keepdim=True)).square().sum(), float(len(batch))


X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
THAW = [{"match": "body.*", "thaw_at": 3}]


def thawing_engine(sync: str = "window") -> Engine:
    config = SGDConfig(lr=0.1, weight_decay=0.3, momentum=0.9, groups=THAW)
    clock = StepClock(ScheduleConfig(), 6, 12)
    settings = StepSettings("fp32", "none", False, sync)
    return Engine(Points(), Tuned(), settings, config, Ranks.current(), CPU, clock)


def steps(engine: Engine, x: Tensor, sizes: list[int], start: int = 0, stop: int = 6) -> dict[str, Tensor]:
    for step in range(start, stop):
        micro = [MicroBatch(part, {"loss": float(len(part))}) for part in x.split(sizes)]
        engine.step(LoadedWindow(micro), step)
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def thawed_in_plain_torch() -> dict[str, Tensor]:
    model = Tuned()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
    )
    for step in range(6):
        if step == 2:
            model.body.requires_grad_(True)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), X.sum(1, keepdim=True)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(float((found[name] - value).norm() / value.norm()) < 1e-12 for name, value in wanted.items())


def test_what_is_thawed_at_a_step_trains_from_it_on() -> None:
    wanted = thawed_in_plain_torch()
    engine = thawing_engine()
    untouched = {name: p.detach().clone() for name, p in engine.model.body.named_parameters()}
    steps(engine, X, [5, 5, 2], 0, 2)
    assert all(torch.equal(p, untouched[name]) for name, p in engine.model.body.named_parameters())
    assert not any(p.requires_grad for p in engine.model.body.parameters())
    assert close(steps(engine, X, [5, 5, 2], 2, 6), wanted)
    # a run that goes on at a later step thaws at once
    resumed = thawing_engine()
    resumed.model.load_state_dict(engine.model.state_dict())
    steps(resumed, X, [12], 4, 5)
    assert all(p.requires_grad for p in resumed.model.body.parameters())
    assert engine.newly_thawed() == []


def _on_two_ranks(rank: int, sync: str) -> dict[str, Tensor]:
    return steps(thawing_engine(sync), X[:7] if rank == 0 else X[7:], [3, 3, 1] if rank == 0 else [5])


def test_thawing_on_two_ranks_is_the_same_in_both_ways_of_reducing() -> None:
    wanted = thawed_in_plain_torch()
    for found in run_on_ranks(2, _both_ways):
        assert all(close(each, wanted) for each in found)


def _both_ways() -> list[dict[str, Tensor]]:
    return [_on_two_ranks(dist.get_rank(), sync) for sync in ("window", "overlap")]


def test_what_a_rule_freezes_is_never_touched_and_keeps_no_state() -> None:
    config = SGDConfig(lr=0.1, momentum=0.9, weight_decay=0.3, groups=[{"match": "0.*", "frozen": True}])
    model = small()
    built = build_optimizer(config, group_parameters(config, model))
    held = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    assert id(model[0].weight) not in held
    assert not model[0].weight.requires_grad


def test_what_the_groups_are_is_told_once() -> None:
    model = OwnGroups()
    grouping = group_parameters(SGDConfig(groups=[{"match": "body.*", "thaw_at": 3}]), model)
    assert notices(grouping, model, None) == [
        "optimizer.groups trains body.weight, body.bias from step 3 on",
        "the model's own parameter_groups() is not used: optimizer.groups=model takes its groups",
    ]
    muon = MuonConfig()
    assert "Muon steps 0.weight, AdamW everything else" in notices(
        group_parameters(muon, small()), small(), None
    ).pop(0)
