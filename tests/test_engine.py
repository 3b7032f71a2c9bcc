"""One step: checkpointing, precision, clipping and schedules change cost or rounding, never the mathematics."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from test_exact_gradient import gradient, relative_error
from torch import Tensor, nn

from gatrain.config import AdamWConfig, ScheduleConfig, SGDConfig
from gatrain.errors import ConfigError
from gatrain.models.gpt import GPT
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, Task
from gatrain.tasks.language_model import LanguageModel
from gatrain.train.checkpointing import apply_checkpointing, available_modes
from gatrain.train.compiling import MOST_AGAIN, MOST_LENGTHS, CompiledLossSum, repeated_blocks
from gatrain.train.engine import Engine
from gatrain.train.groups import group_parameters
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.optimizer import build_optimizer
from gatrain.train.optimizer_state import prime
from gatrain.train.ranks import Ranks
from gatrain.train.schedule import Span, factor

CPU = torch.device("cpu")


class Regression(Task):
    def __init__(self, factory) -> None:  # type: ignore[no-untyped-def]
        self.factory = factory

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = self.factory()
        return model

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return model(batch).float().square().sum(), float(len(batch))


def small_gpt() -> nn.Module:
    return GPT(vocab_size=17, context=8, layers=2, heads=2, width=16)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def convolutional() -> nn.Module:
    return nn.Sequential(*(Residual() for _ in range(3)), nn.Flatten())


def engine(factory, **settings) -> Engine:  # type: ignore[no-untyped-def]
    task = Regression(factory)
    values = {"precision": "fp32", "checkpointing": "none", "compile": False, "sync": "window", **settings}
    optimizer = values.pop("optimizer", SGDConfig(lr=0.1))
    return Engine(task, task.build_model(), StepSettings(**values), optimizer, Ranks(), CPU)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_gives_the_same_gradient(mode: str) -> None:
    tokens = torch.randint(17, (3, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in ("none", mode):
        one = engine(small_gpt, checkpointing=checkpointing)
        one.micro_step(tokens, {"loss": 1 / 3})
        found.append(gradient(one.model))
    assert relative_error(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_does_not_count_a_batch_twice_in_batch_norm(mode: str) -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    buffers = []
    for checkpointing in ("none", mode):
        one = engine(convolutional, checkpointing=checkpointing)
        one.micro_step(images, {"loss": 0.25})
        buffers.append({name: value.clone() for name, value in one.model.named_buffers()})
    assert int(buffers[0]["0.body.1.num_batches_tracked"]) == 1
    for name, value in buffers[0].items():
        assert torch.equal(value, buffers[1][name]), name


def test_checkpointing_keeps_parameter_names_and_refuses_models_without_blocks() -> None:
    model = small_gpt()
    names = list(model.state_dict())
    assert available_modes(model) == ("none", "selective", "every_2", "full")
    apply_checkpointing(model, "full")
    assert list(model.state_dict()) == names
    assert available_modes(nn.Linear(2, 2)) == ("none",)
    with pytest.raises(ConfigError, match="no list of repeated blocks"):
        apply_checkpointing(nn.Linear(2, 2), "full")


def window(batch: Tensor, sizes: list[int]) -> LoadedWindow:
    return LoadedWindow([MicroBatch(part, {"loss": float(len(part))}) for part in batch.split(sizes)])


class TwoTerms(Regression):
    """A sum over elements and a sum over samples, each with a denominator of its own."""

    loss_terms = ("elements", "samples")

    def weight(self, batch: Batch) -> dict[str, float]:  # type: ignore[override]
        return {"elements": batch.numel(), "samples": len(batch)}

    def loss_sum(self, model: nn.Module, batch: Batch):  # type: ignore[no-untyped-def,override]
        out = model(batch)
        return {
            "elements": (out.square().sum(), float(batch.numel())),
            "samples": (out.std(dim=1).sum(), float(len(batch))),
        }


def test_a_task_with_two_loss_terms_steps_the_same_for_any_split() -> None:
    batch = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    after = []
    for sizes in ([12], [5, 4, 3]):
        task = TwoTerms(lambda: nn.Linear(5, 5))
        settings = StepSettings("fp32", "none", False, "window")
        one = Engine(task, task.build_model(), settings, SGDConfig(lr=0.1), Ranks(), CPU)
        one.step(LoadedWindow([MicroBatch(part, task.weight(part)) for part in batch.split(sizes)]), 0)
        after.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
    assert relative_error(after[1], after[0]) < 1e-6


def test_clipping_is_done_once_on_the_whole_gradient() -> None:
    batch = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    after = []
    for sizes in ([12], [5, 5, 2], [1] * 12):
        one = engine(lambda: nn.Linear(5, 5), optimizer=SGDConfig(lr=1.0, clip_norm=0.01))
        before = copy.deepcopy(one.model.state_dict())
        _, norm = one.step(window(batch, sizes), 0)
        assert float(norm) > 0.01
        moved = torch.cat([(before[k] - v).flatten() for k, v in one.model.state_dict().items()])
        assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)
        after.append(moved)
    assert relative_error(after[1], after[0]) < 1e-6
    assert relative_error(after[2], after[0]) < 1e-6


def test_bf16_accumulates_in_fp32() -> None:
    batch = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    fine, coarse = engine(lambda: nn.Linear(5, 5)), engine(lambda: nn.Linear(5, 5), precision="bf16")
    for one in (fine, coarse):
        one.step.gradient(window(batch, [1] * 64))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in coarse.model.parameters())
    assert 1e-5 < relative_error(gradient(coarse.model), gradient(fine.model)) < 1e-2


def test_fp16_takes_one_scaling_decision_per_window() -> None:
    one = engine(lambda: nn.Linear(5, 5), precision="fp16")
    assert one.scaler is not None
    scale = one.scaler.get_scale()
    before = copy.deepcopy(one.model.state_dict())
    overflowing = torch.full((4, 5), 200.0)  # squares near the fp16 limit, times the scale of 65536
    one.step.gradient(window(overflowing, [1, 1, 1, 1]))
    one.update(0)
    assert one.scaler.get_scale() == scale / 2  # once, though all four micro-batches overflow
    assert all(torch.equal(before[k], v) for k, v in one.model.state_dict().items())
    one.step(window(torch.randn(4, 5) * 1e-2, [1, 3]), 1)
    assert any(not torch.equal(before[k], v) for k, v in one.model.state_dict().items())


def deeper_gpt() -> nn.Module:
    return GPT(vocab_size=17, context=8, layers=8, heads=2, width=16)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize(
    ("factory", "mode"),
    [(small_gpt, "none"), (deeper_gpt, "none"), (deeper_gpt, "full"), (deeper_gpt, "selective")],
)
def test_compiled_steps_equal_eager_steps(factory, mode: str) -> None:  # type: ignore[no-untyped-def]
    tokens = torch.randint(17, (5, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compile in (False, True):
        one = engine(factory, compile=compile, checkpointing=mode)
        one.step.gradient(window(tokens, [2, 2, 1]))
        gradients.append(gradient(one.model))
    assert relative_error(gradients[1], gradients[0]) < 1e-5


class Next(LanguageModel):
    def __init__(self) -> None:
        self.variable_length = False
        self._output = None

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return deeper_gpt()


def test_blocks_that_repeat_are_compiled_once_and_only_inside_the_loss() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    task = Next()
    model = task.build_model()
    loss_sum = CompiledLossSum(task, model, backend=backend)
    tokens = torch.randint(17, (3, 9), generator=torch.Generator().manual_seed(0))
    loss, weight = loss_sum(tokens)  # type: ignore[misc]
    assert torch.allclose(loss, task.loss_sum(model, tokens)[0])
    assert int(weight) == 24
    assert len(graphs) == 2  # one for all four blocks, one for the cross-entropy
    loss_sum(tokens)
    with torch.no_grad():
        model(tokens[:1, :4])  # another shape, outside the loss: nothing is compiled for it
    assert len(graphs) == 2


def test_lengths_become_dynamic_and_numbers_of_samples_do_not() -> None:
    shapes: list[tuple[str, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        (x,) = (i for i in inputs if isinstance(i, Tensor) and i.dim() == 3 and i.dtype.is_floating_point)
        shapes.append(tuple(map(str, x.shape[:2])))
        return graph.forward

    torch._dynamo.reset()
    task = Next()
    task.variable_length = True
    model = GPT(vocab_size=17, context=64, layers=8, heads=2, width=16)
    loss_sum = CompiledLossSum(task, model, backend=backend)
    for samples in (4, 3, 2):  # a table of 64 positions must not be taken for 64 samples
        for length in (32, 24, 16, 20):
            tokens = torch.randint(17, (samples, length + 1), generator=torch.Generator().manual_seed(0))
            loss, _ = loss_sum(tokens)  # type: ignore[misc]
            assert torch.allclose(loss, task.loss_sum(model, tokens)[0])
    # blocks and cross-entropy: at a fixed length once, then for any length, for each number of samples
    numbers = [samples for samples, _ in shapes]
    assert numbers.count("4") == 4
    assert numbers.count("3") == numbers.count("2") == 2
    assert len(shapes) == 8


def test_lengths_that_vary_undeclared_become_dynamic_and_it_is_said() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    task = Next()  # declares that lengths do not vary
    model = GPT(vocab_size=17, context=64, layers=4, heads=2, width=16)
    loss_sum = CompiledLossSum(task, model, backend=backend)
    for length in range(8, 48):
        tokens = torch.randint(17, (2, length + 1), generator=torch.Generator().manual_seed(0))
        loss, _ = loss_sum(tokens)  # type: ignore[misc]
        assert torch.allclose(loss, task.loss_sum(model, tokens)[0])
    # blocks and cross-entropy, at most: each static length, one more, and any length
    assert len(graphs) <= 2 * (MOST_LENGTHS + 2)
    (notice,) = loss_sum.notices
    assert "compiled as dynamic from here on" in notice
    assert "variable_length = True" in notice


def test_what_compiles_for_every_batch_is_compiled_no_more_and_it_is_said() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(1)
        return graph.forward

    class Stubborn(Next):
        def loss_sum(self, model: nn.Module, batch: Any) -> Any:
            return model(batch).sum() * len(str(batch.shape[1])), batch.shape[0]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: Tensor) -> Tensor:
            # a branch on the length makes each length a graph of its own
            found = batch.float()
            for _ in range(batch.shape[1]):
                found = found + 1
            return self.layer(found[..., None])

    torch._dynamo.reset()
    task, model = Stubborn(), Odd()
    loss_sum = CompiledLossSum(task, model, backend=backend)
    for length in range(3, 43):
        batch = torch.ones(2, length)
        assert torch.allclose(loss_sum(batch)[0], task.loss_sum(model, batch)[0])  # type: ignore[index]
    assert len(graphs) < 2 * MOST_AGAIN + 10
    assert "nothing is compiled from here on" in loss_sum.notices[-1]
    assert len(loss_sum.notices) == 2


def test_models_that_repeat_nothing_are_compiled_as_one() -> None:
    assert len(repeated_blocks(deeper_gpt())) == 8
    assert repeated_blocks(small_gpt()) == []
    assert repeated_blocks(nn.Sequential(*(Residual() for _ in range(8)))) == []  # convolutions
    assert repeated_blocks(nn.Linear(2, 2)) == []


def test_weight_decay_leaves_vectors_alone() -> None:
    one = engine(lambda: nn.Linear(5, 5), optimizer=AdamWConfig(lr=0.1, weight_decay=0.5))
    decays = {len(group["params"][0].shape): group["weight_decay"] for group in one.optimizer.param_groups}
    assert decays == {2: 0.5, 1: 0.0}


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(lr=0.1, weight_decay=0.5),
        SGDConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
        SGDConfig(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.5),
    ],
    ids=["adamw", "sgd", "plain"],
)
def test_state_made_beforehand_changes_no_step(config: AdamWConfig | SGDConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 5, generator=generator) for _ in range(4)]
    found = []
    for early in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(5, 5, bias=False)
        optimizer = build_optimizer(config, group_parameters(config, layer)).optimizer
        before = layer.weight.detach().clone()
        if early:
            prime(optimizer)
            assert torch.equal(layer.weight, before)
            assert layer.weight.grad is None
        for gradient_ in gradients:
            layer.weight.grad = gradient_.clone()
            optimizer.step()
        found.append(layer.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], before)


def test_warm_up_in_samples_keeps_its_curve_when_the_effective_batch_changes() -> None:
    schedule = ScheduleConfig(name="warmup_cosine", warmup_samples=640, final_fraction=0.1)

    def rate(step: int, effective_batch: int) -> float:
        steps = 6400 // effective_batch
        return factor(schedule, Span(steps, effective_batch), step)

    assert rate(9, 64) == rate(19, 32) == 1.0
    assert rate(4, 64) == pytest.approx(rate(9, 32))
    assert rate(55, 64) == pytest.approx(rate(110, 32))
    assert rate(100, 64) == pytest.approx(0.1)
    assert factor(ScheduleConfig(), Span(9, 1), 7) == 1.0
