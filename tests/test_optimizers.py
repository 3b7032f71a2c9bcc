"""Any optimizer steps as it does in a plain loop on the whole batch, is resumed bitwise, or is refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CPU
from torch import Tensor, nn

from gatrain import build
from gatrain.config import AdamWConfig, OptimizerConfig, SGDConfig
from gatrain.errors import ConfigError, SavedStateError
from gatrain.optimizer_config import AdafactorConfig, LionConfig, MuonConfig, OwnOptimizer
from gatrain.optimizers import Lion, Muon
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, Task
from gatrain.train import saved_state
from gatrain.train.engine import Engine
from gatrain.train.groups import group_parameters
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.optimizer import PART, build_optimizer, counted_state
from gatrain.train.optimizer_state import state_bytes, try_out
from gatrain.train.ranks import Ranks
from gatrain.train.saved_state import Progress


class Net(nn.Module):
    """Two hidden matrices and an output layer, in fp64: what is compared is mathematics and no rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 5)
        self.head = nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


class Squares(Task):
    def build_model(self) -> nn.Module:
        return Net()

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return (model(batch) - batch.sum(1, keepdim=True)).square().sum(), float(len(batch))


DATA = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STEPS = 4


def own(name: str, lr: float | None = 0.01, **arguments: Any) -> OwnOptimizer:
    return OwnOptimizer(lr=lr, target=name, arguments=arguments)


def engine_for(config: OptimizerConfig, model: nn.Module | None = None) -> Engine:
    settings = StepSettings("fp32", "none", False, "window")
    return Engine(Squares(), model or Net(), settings, config, Ranks(), CPU, maker_of=build.optimizer_maker)


def train(engine: Engine, sizes: list[int], start: int = 0, stop: int = STEPS) -> dict[str, Tensor]:
    for step in range(start, stop):
        batch = DATA * (1 + step)
        micro = [MicroBatch(part, {"loss": float(len(part))}) for part in batch.split(sizes)]
        engine.step(LoadedWindow(micro), step)
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def plain(make: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> dict[str, Tensor]:
    """The same training in plain torch on whole batches."""
    model = Net()
    optimizers = make(model)
    for step in range(STEPS):
        batch = DATA * (1 + step)
        (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def decayed(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """As gatrain sorts them: weight decay on matrices only."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    hidden = [model.first.weight, model.second.weight]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95)),
    ]


def lion_by_its_formula(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Chen et al. 2023, Algorithm 2, line by line."""

    class Formula(torch.optim.Optimizer):
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    g, m = p.grad, state.get("m", torch.zeros_like(p))
                    c = 0.9 * m + (1 - 0.9) * g
                    p.data = p.data - 0.01 * (torch.sign(c) + group["weight_decay"] * p.data)
                    state["m"] = 0.99 * m + (1 - 0.99) * g

    return [Formula(decayed(model, 0.1), {})]


T = torch.optim
KINDS: dict[str, tuple[OptimizerConfig, Callable[[nn.Module], list[torch.optim.Optimizer]]]] = {
    "adamw": (AdamWConfig(lr=0.01, weight_decay=0.1), lambda m: [T.AdamW(decayed(m, 0.1), lr=0.01)]),
    "sgd": (SGDConfig(lr=0.01, momentum=0.9), lambda m: [T.SGD(m.parameters(), lr=0.01, momentum=0.9)]),
    "muon": (MuonConfig(lr=0.01, weight_decay=0.1), muon_and_adamw),
    "adafactor": (AdafactorConfig(lr=0.01), lambda m: [T.Adafactor(m.parameters(), lr=0.01)]),
    "lion": (LionConfig(lr=0.01, weight_decay=0.1), lion_by_its_formula),
    "Adagrad": (
        own("torch.optim.Adagrad", initial_accumulator_value=0.1),
        lambda m: [T.Adagrad(m.parameters(), lr=0.01, initial_accumulator_value=0.1)],
    ),
    "NAdam": (own("torch.optim.NAdam", None), lambda m: [T.NAdam(m.parameters())]),
    "RMSprop": (own("torch.optim.RMSprop", centered=True), lambda m: [T.RMSprop(m.parameters(), centered=True)]),
    "RAdam": (own("torch.optim.RAdam"), lambda m: [T.RAdam(m.parameters(), lr=0.01)]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 1, 3]], ids=str)
def test_every_optimizer_steps_as_in_a_plain_loop_whatever_the_split(name: str, sizes: list[int]) -> None:
    config, make = KINDS[name]
    found, wanted = train(engine_for(config), sizes), plain(make)
    start = dict(Net().named_parameters())
    for key, value in found.items():
        moved = (wanted[key] - start[key].detach()).norm()
        assert float((value - wanted[key]).norm() / moved) < 1e-9, key


PROGRESS = Progress(2, 0, 0, 6, 0, 6, updates=2)


class Counting(torch.optim.SGD):
    """Keeps a number in its groups and one in its state, as D-adaptation does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["n"] = self.state[p].get("n", 0) + 1
                    p.data.add_(p.grad, alpha=-group["lr"] * group["k"] / self.state[p]["n"] ** 0.5)


STRANGERS = {
    "counting": (own(f"{__name__}.Counting"), None),
    "lion_pytorch": (own("lion_pytorch.Lion"), "lion_pytorch"),
    "prodigy": (own("prodigyopt.Prodigy", 1.0), "prodigyopt"),
}


@pytest.mark.parametrize("name", [*KINDS, *STRANGERS])
def test_a_resumed_optimizer_goes_on_bitwise(name: str, tmp_path: Path) -> None:
    if name in STRANGERS and STRANGERS[name][1] is not None:
        pytest.importorskip(STRANGERS[name][1])
    config = (KINDS.get(name) or STRANGERS[name])[0]
    whole = train(engine_for(config), [2, 4])
    first = engine_for(config)
    train(first, [2, 4], 0, 2)
    state = saved_state.snapshot(PROGRESS, first.model, first.optimizer, parts=first.built.parts())
    path = saved_state.write(tmp_path, state, 0)
    second = engine_for(config)
    loaded = saved_state.read(path, second.model, second.optimizer, None)
    loaded.fill(second.model, second.optimizer, None)
    second.built.load(loaded.parts)
    resumed = train(second, [2, 4], 2, STEPS)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert (PART in dict(first.built.parts())) == (name in ("counting", "prodigy"))


def test_a_state_without_what_the_optimizer_counts_in_its_groups_is_refused() -> None:
    with pytest.raises(SavedStateError, match="counts in its groups"):
        engine_for(own(f"{__name__}.Counting")).built.load({})


# --- what cannot be used --------------------------------------------------------------------------------


class Forgetful(torch.optim.SGD):
    """Counts in an attribute, which no saved state holds."""

    n = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.n += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"] / self.n)


class Late(torch.optim.SGD):
    """Counts in an attribute, and looks at it every tenth step alone."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups if self.count % 10 == 0 else []:
            for p in group["params"]:
                p.data.mul_(0.5)
        super().step()


class LateInState(torch.optim.SGD):
    """Goes back half of the way to where it was, every fifth step: kept where it is saved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("slow", p.clone())
            self.state[p]["n"] = self.state[p].get("n", 0) + 1
        super().step()
        for p, state in self.state.items():
            if state["n"] % 5 == 0:
                p.copy_(state["slow"].lerp_(p, 0.5))


class TwoWeights(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class Sharp(torch.optim.SGD):
    """Asks for a closure inside its step, as SAM does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "Sharp needs a closure"


def half(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(params)[:1], lr=lr)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.optim.LBFGS", "needs closure"),
        ("torch.optim.SparseAdam", "does not support dense gradients"),
        ("Forgetful", "cannot be resumed exactly"),
        ("Late", "cannot be resumed exactly: its attribute count is another after a resume"),
        ("TwoWeights", "another for evaluation"),
        ("Sharp", "Sharp needs a closure"),
        ("half", "does not hold the parameters"),
        ("Net", "not an argument|takes no lr|could not make"),
        ("torch.optim.Muon", "Muon only supports 2D"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(name: str, words: str) -> None:
    config = own(name if "." in name else f"{__name__}.{name}")
    with pytest.raises(ConfigError, match=words):
        engine_for(config)


def test_a_state_that_is_looked_at_every_fifth_step_is_made_in_the_first_step_and_not_ahead_of_it() -> None:
    engine = engine_for(own(f"{__name__}.LateInState", lr=0.1))
    assert not engine.built.behaviour.can_be_primed
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), Net().parameters(), strict=True))


def test_gradients_that_a_hook_left_behind_are_no_part_of_the_next_window() -> None:
    config = SGDConfig(lr=0.01)
    plain, met = engine_for(config), engine_for(config)
    train(plain, [4, 2], 0, 2)
    for step in range(2):
        met.loss_sum(DATA)[0].backward()  # type: ignore[index,union-attr]
        train(met, [4, 2], step, step + 1)
    assert all(
        torch.equal(p, q) for p, q in zip(plain.model.parameters(), met.model.parameters(), strict=True)
    )
    assert met.replaced() is None
    met.model.head.weight = nn.Parameter(met.model.head.weight.clone())  # type: ignore[union-attr]
    assert met.replaced() == "head.weight"


def test_arguments_that_it_does_not_take_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lr_decay'"):
        engine_for(own("torch.optim.Adagrad", lr_decai=1))
    rule = OwnOptimizer(target="torch.optim.Rprop", weight_decay=0.1, arguments={})
    with pytest.raises(ConfigError, match="takes no weight_decay"):
        engine_for(rule)
    assert engine_for(OwnOptimizer(target="torch.optim.Rprop", arguments={})).built.lr == 0.01  # its own


# --- the rules reach it ---------------------------------------------------------------------------------


def hidden_decay(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.5)


class NoDecay(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class Swallows(NoDecay):
    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        super().__init__(params, lr)


def test_a_rules_decay_reaches_an_optimizer_whose_arguments_do_not_name_it() -> None:
    rules = [{"match": "first.*", "weight_decay": 0.25}]
    config = OwnOptimizer(lr=0.01, target=f"{__name__}.hidden_decay", arguments={}, groups=rules)
    built = engine_for(config).built
    decays = {p: group["weight_decay"] for group in built.optimizer.param_groups for p in group["params"]}
    for group in built.grouping.groups:
        for name, p in zip(group.names, group.parameters, strict=True):
            assert decays[p] == (0.25 if name.startswith("first") else 0.5 if p.dim() > 1 else 0.0), name


@pytest.mark.parametrize("name", ["NoDecay", "Swallows"])
def test_a_rules_decay_that_an_optimizer_does_not_have_is_refused(name: str) -> None:
    def config(decay: float) -> OwnOptimizer:
        rules = [{"match": "first.*", "weight_decay": decay}]
        return OwnOptimizer(lr=0.01, target=f"{__name__}.{name}", arguments={}, groups=rules)

    with pytest.raises(ConfigError, match=f"weight_decay=0.25: .*{name} has no weight decay. Leave it out"):
        engine_for(config(0.25))
    engine_for(config(0.0))


def test_options_in_a_rule_make_a_shipped_optimizer_step_as_torchs_with_them() -> None:
    config = SGDConfig(lr=0.01, momentum=0.9, groups=[{"match": "*", "dampening": 0.9}])
    found = train(engine_for(config), [6])
    wanted = plain(lambda model: [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, dampening=0.9)])
    assert all(torch.allclose(found[name], value, rtol=1e-10) for name, value in wanted.items())


# --- state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_state_is_counted_to_the_byte_without_memory(name: str) -> None:
    config = KINDS[name][0]
    engine = engine_for(config)
    train(engine, [6], 0, 1)
    kept = [v for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    counted = counted_state(config, group_parameters(config, Net()), (), build.optimizer_maker(config))
    assert sorted(counted) == sorted(v.numel() * v.element_size() for v in kept)


def test_state_of_what_looks_at_numbers_is_told_by_shapes() -> None:
    model = nn.Sequential(nn.Linear(300, 70), nn.Conv2d(3, 5, 2))
    groups = [{"params": list(model.parameters())}]
    found = state_bytes(lambda given: torch.optim.Adafactor(given), groups)
    # row and column of the matrix and of the convolution, whole vectors of the biases, and the count of steps
    assert sorted(found) == sorted([4 * 70, 4 * 300, 4 * 70, 4 * 5 * 3 * 2, 4 * 5 * 3 * 2, 4 * 5, 4, 4, 4, 4])


def test_a_state_made_ahead_changes_no_step_or_is_not_made() -> None:
    groups = [{"params": list(Net().parameters())}]
    tried = {
        name: try_out(
            lambda given, name=name: getattr(torch.optim, name)(given, lr=0.01), groups
        ).can_be_primed
        for name in ("Adam", "RMSprop", "RAdam", "Adafactor", "NAdam", "Adagrad", "Rprop")
    }
    assert tried == {  # NAdam's and Rprop's do not begin with zeros, Adagrad has its own from the start
        "Adam": True, "RMSprop": True, "RAdam": True, "Adafactor": True,
        "NAdam": False, "Adagrad": False, "Rprop": False,
    }  # fmt: skip
    dampened = try_out(lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, dampening=0.5), groups)
    assert not dampened.can_be_primed


def test_muon_leaves_embeddings_and_the_output_to_adamw() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    built = build_optimizer(MuonConfig(), group_parameters(MuonConfig(), model))
    by_muon = [p for group in built.optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert [id(p) for p in by_muon] == [id(model[1].weight), id(model[2].weight)]
    named = MuonConfig(adamw=["2.*"])
    built = build_optimizer(named, group_parameters(named, model))
    by_muon = [p for group in built.optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert len(by_muon) == 3
    with pytest.raises(ConfigError, match="matches no parameter"):
        group_parameters(MuonConfig(adamw=["hed*"]), model)


def test_muon_survives_torchs_own_state_dict() -> None:
    found = []
    for reload in (False, True):
        model = Net()
        optimizer = Muon(model.parameters(), lr=0.01)
        for step in range(4):
            model(DATA).square().mean().backward()
            if reload and step == 2:
                state = optimizer.state_dict()
                optimizer = Muon(model.parameters(), lr=0.5)
                optimizer.load_state_dict(state)
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lion_refuses_what_is_no_rate() -> None:
    with pytest.raises(ValueError, match="lr"):
        Lion(Net().parameters(), lr=-1)
    assert math.isclose(Lion(Net().parameters()).defaults["lr"], 1e-4)
