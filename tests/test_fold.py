"""AdamA: moments take each micro-batch's gradient at once, across ranks as on one, or it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from test_optimizers import DATA, Net, Squares, engine_for
from test_predict import GIB, SMALL_GPT, compose
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatrain import build, units
from gatrain.config import AdamWConfig, OptimizerConfig, RunConfig, TrainConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.inspected import Inspected
from gatrain.optimizer_config import AdamAConfig, LionConfig
from gatrain.optimizers import AdamA
from gatrain.plan import StepSettings
from gatrain.predict.request import TraceRequest
from gatrain.predict.timeline import LinearStep
from gatrain.train import saved_state
from gatrain.train.engine import Engine
from gatrain.train.gradient.fold import Fold
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.saved_state import Progress
from gatrain.tune.estimate import state_bytes

STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
CONFIG = AdamAConfig(**OPTIONS, groups=[{"match": "head.*", "lr_scale": 3.0}])


def folding(config: OptimizerConfig = CONFIG, model: nn.Module | None = None) -> Engine:
    settings = StepSettings("fp32", "none", False, "window")
    return Engine(
        Squares(),
        model or Net(),
        settings,
        config,
        Ranks.current(),
        torch.device("cpu"),
        strategy=Fold(),
    )


def windows(step: int, sizes: list[list[int]]) -> list[LoadedWindow]:
    """Each rank's part of a window."""
    parts = iter((DATA * (1 + step)).split([size for of_rank in sizes for size in of_rank]))
    return [
        LoadedWindow(
            [MicroBatch(part, {"loss": float(len(part))}) for part in (next(parts) for _ in of_rank)]
        )
        for of_rank in sizes
    ]


def train(one: Engine, sizes: list[list[int]], steps: range = range(STEPS)) -> dict[str, Tensor]:
    """Weights and moments after some steps."""
    norms = []
    for step in steps:
        _, norm = one.step(windows(step, sizes)[one.ranks.rank], step)
        norms.append(norm)
    found = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    for name, p in one.model.named_parameters():
        state = one.optimizer.state[one.masters.of(p)]
        found |= {f"{name}/{key}": state[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in state}
    return found | {"norms": torch.stack(norms).double()}


def by_its_formula(sizes: list[int]) -> dict[str, Tensor]:
    """AdamA in a plain loop, from the formulas of the paper and AdamW's decay."""
    model = Net()
    first, second = OPTIONS["betas"]
    kept = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    norms = []
    for step in range(STEPS):
        squares = 0.0
        moments = {name: (first * m, second * v) for name, (m, v) in kept.items()}
        for part in (DATA * (1 + step)).split(sizes):
            model.zero_grad()
            (Squares().loss_sum(model, part)[0] / len(DATA)).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                m, v = moments[name]
                moments[name] = m + (1 - first) * p.grad, v + (1 - second) * p.grad**2
                squares += float(p.grad.square().sum())
        norms.append(squares**0.5)
        kept = moments
        with torch.no_grad():
            for name, p in model.named_parameters():
                lr = OPTIONS["lr"] * (3.0 if name.startswith("head") else 1.0)
                m, v = (
                    each / (1 - b ** (step + 1)) for each, b in zip(kept[name], (first, second), strict=True)
                )
                p -= lr * (OPTIONS["weight_decay"] if p.dim() >= 2 else 0.0) * p
                p -= lr * m / (v.sqrt() + OPTIONS["eps"])
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, (m, v) in kept.items():
        found |= {f"{name}/exp_avg": m, f"{name}/exp_avg_sq": v}
    return found | {"norms": torch.tensor(norms, dtype=torch.float64)}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close = 1e-6 if name == "norms" else 1e-12  # norms are fp32
        assert float((found[name] - value).norm()) <= close * float(value.norm()), name


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 2], [6]], ids=str)
def test_weights_and_moments_are_those_of_the_formulas(sizes: list[int]) -> None:
    assert_equal(train(folding(), [sizes]), by_its_formula(sizes))


def test_the_first_moment_is_adams_and_the_second_a_sum_of_squares() -> None:
    """Until the first update the weights are the same; with one micro-batch the two are one optimizer."""
    wanted = train(engine_for(AdamWConfig(**OPTIONS)), [[6]], range(1))
    found = train(folding(AdamAConfig(**OPTIONS)), [[2, 3, 1]], range(1))
    for name in (name for name in wanted if name.endswith("exp_avg")):
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 1e-12
    seconds = [name for name in wanted if name.endswith("exp_avg_sq")]
    assert any(float((found[n] - wanted[n]).norm() / wanted[n].norm()) > 0.1 for n in seconds)
    whole, adamw = (
        train(folding(AdamAConfig(**OPTIONS)), [[6]]),
        train(engine_for(AdamWConfig(**OPTIONS)), [[6]]),
    )
    assert_equal(whole, adamw)


SPLITS = [[[2, 1], [1, 2]], [[1, 3, 1], [1]], [[], [4, 2]], [[6], []]]


class Half(Net):
    """Uses its second layer for some samples only, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(self.second(hidden)) if float(x[0, 0]) > 0 else hidden[:, :5]
        out: Tensor = self.head(hidden)
        return out


def _train_on_two_ranks() -> list[dict[str, Tensor]]:
    return [train(folding(model=make()), sizes) for make in (Net, Half) for sizes in SPLITS]


def test_ranks_with_few_or_no_micro_steps_equal_one_rank_with_all_of_them() -> None:
    alone = [
        train(folding(model=make()), [[size for of_rank in sizes for size in of_rank]])
        for make in (Net, Half)
        for sizes in SPLITS
    ]
    signs = {bool(part[0, 0] > 0) for part in DATA.split([2, 1, 1, 2])}
    assert signs == {True, False}
    for rank in run_on_ranks(2, _train_on_two_ranks):
        for found, wanted in zip(rank, alone, strict=True):
            assert_equal(found, wanted)
            unused = [value for name, value in found.items() if name.startswith("never") and "/" in name]
            assert not any(float(value.abs().sum()) for value in unused)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_never_more_than_one_parameters_gradient_is_kept(dtype: torch.dtype) -> None:
    class Cast(Net):
        def __init__(self) -> None:
            super().__init__()
            self.to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype)).double()

    one = folding(model=Cast())
    kept: list[int] = []
    parameters = list(one.model.parameters())
    for parameter in parameters:
        parameter.register_hook(
            lambda _: kept.append(sum(one.masters.of(p).grad is not None for p in parameters))
        )
    before = [p.detach().clone() for p in parameters]
    train(one, [[2, 2, 2]], range(1))
    assert max(kept) == 0, "a gradient is there while the next one is computed"
    assert all(p.grad is None and one.masters.of(p).grad is None for p in parameters)
    assert all(one.optimizer.state[one.masters.of(p)]["exp_avg"].dtype != torch.bfloat16 for p in parameters)
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    straight, sizes = folding(), [[2, 3, 1]]
    train(straight, sizes, range(2))
    progress = Progress(step=2, samples=12, tokens=0, effective_batch=6, seed=0, data_samples=6)
    path = saved_state.save(tmp_path, progress, straight.model, straight.optimizer, keep=1)
    resumed = folding()
    saved_state.load(path, resumed.model, resumed.optimizer)
    for found, wanted in zip(
        train(resumed, sizes, range(2, 5)).values(), train(straight, sizes, range(2, 5)).values(), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("bad", ["not finite", "fails"])
def test_a_window_that_was_begun_is_not_called_the_state_before_it(bad: str) -> None:
    """Its moments are changed: an error in it must not be saved as the last step's state."""
    one = folding()
    window = windows(0, [[2, 2, 2]])[0]
    if bad == "not finite":
        window.micro_batches[1].batch[0, 0] = float("nan")
        before = [p.detach().clone() for p in one.model.parameters()]
        result, norm = one.step(window, 0)
        assert result.skipped
        assert not torch.isfinite(norm)
        assert all(torch.equal(p, old) for p, old in zip(one.model.parameters(), before, strict=True))
        assert not one.step.strategy.keeps_state
        return
    window.micro_batches[1] = MicroBatch(torch.zeros(2, 3, dtype=torch.float64), {"loss": 2.0})
    with pytest.raises(RuntimeError) as raised:
        one.step(window, 0)
    assert raised.value.before_update is False  # type: ignore[attr-defined]


def test_a_gradient_that_comes_in_two_parts_is_refused() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(lambda h: torch.tanh(self.first(h))[:, :4], x, use_reentrant=True)
            out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
            return out

    one, window = folding(model=Twice()), windows(0, [[6]])[0]
    window.micro_batches[0].batch.requires_grad_()
    with pytest.raises(ExactnessError, match="two gradients in one backward"):
        one.step(window, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": AdamAConfig(clip_norm=1.0)}, "Write optimizer.clip_norm=null"),
        ({"precision": "fp16"}, "Write precision=bf16"),
        ({"train": TrainConfig(steps=1, nonfinite="skip")}, "Write train.nonfinite=stop"),
        ({"sync": "overlap"}, "Write sync=window"),
        ({"optimizer": LionConfig(), "gradient": "fold"}, "Use optimizer=adama"),
        ({"gradient": {"_target_": "gatrain.train.gradient.GradientStrategy"}}, "Leave gradient out"),
    ],
    ids=["clip_norm", "fp16", "skip", "overlap", "another optimizer", "another strategy"],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    given = {"optimizer": AdamAConfig(), **changes}
    with pytest.raises(ConfigError, match=words):
        build.build_strategy(RunConfig(**given))


def test_it_comes_with_its_optimizer_and_fp16_parameters_are_refused() -> None:
    assert isinstance(build.build_strategy(RunConfig(optimizer=AdamAConfig())), Fold)
    assert isinstance(build.build_strategy(RunConfig(optimizer=AdamAConfig(), gradient="fold")), Fold)
    with pytest.raises(ConfigError, match="Use bf16 parameters"):
        folding(model=Net().half())


def test_in_a_plain_loop_it_is_an_optimizer_like_others() -> None:
    model, other = Net(), Net()
    adama, adamw = AdamA(model.parameters(), lr=0.01), torch.optim.AdamW(other.parameters(), lr=0.01)
    for _ in range(3):
        for each, optimizer in ((model, adama), (other, adamw)):
            optimizer.zero_grad()
            Squares().loss_sum(each, DATA)[0].backward()
            optimizer.step()
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="beta of 1"):
        AdamA(model.parameters(), betas=(0.9, 1.0))


def test_the_predicted_peak_is_smaller_by_the_gradients_but_for_the_largest() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gatrain.predict.tracer import Batches, StepTracer, model_without_memory

    peaks, sizes = {}, []
    for name in ("adamw", "adama"):
        config = compose(
            [*SMALL_GPT, "precision=fp32", "optimizer.clip_norm=null", f"optimizer={name}"]
        ).config
        task = build.build_task(config)
        batches, asked = Batches(task), TraceRequest("fp32", ["none"], 1, "window", 8, GIB)
        with FakeTensorMode(allow_non_fake_inputs=True):
            tracer = StepTracer(task, model_without_memory(task), config, asked, batches)
            with tracer.in_mode("none"):
                step = LinearStep(tracer.record(4))
        peaks[name] = step.peak(4, tracer.held, accumulates=True).allocated
        sizes = [p.nbytes for p in tracer._parameters]
    saved = sum(sizes) - max(sizes)
    assert peaks["adamw"] - peaks["adama"] >= saved
    (note, deviation) = Fold().remarks(tracer._model)
    assert f"keeps no gradient: {units.size(saved)} less" in note
    assert "up to sqrt(accumulation steps x ranks) larger" in deviation


def test_what_is_always_in_memory_counts_one_gradient() -> None:
    found = Inspected(8, 0, "", 1000, 4000, ("none",), optimizer_bytes=8000)
    assert state_bytes(found) - state_bytes(dataclasses.replace(found, gradient_bytes=400)) == 3600
