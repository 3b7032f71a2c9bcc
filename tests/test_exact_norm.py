"""`norm=exact`: BatchNorm over a window is BatchNorm over one batch, whatever the micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from test_exact_gradient import relative_error
from test_norm import Batch, gradients, loss_sum, net, step_of, window
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gatrain import build
from gatrain.config import RunConfig, SGDConfig
from gatrain.errors import ConfigError, ExactnessError, GatrainError
from gatrain.optimizer_config import AdamAConfig
from gatrain.plan import StepSettings
from gatrain.tasks.base import Task
from gatrain.train import saved_state
from gatrain.train.engine import Engine
from gatrain.train.gradient.exact_norm import ExactNorm
from gatrain.train.norm.exact import Exact
from gatrain.train.ranks import Ranks
from gatrain.verify.mutations import ConstantStatistics

LIMIT = 1e-10
WAYS = "window", "micro_batch"
"""Which activations are held at once: all micro-batches together, or layer by layer."""


def data(count: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1), torch.arange(count) % 4


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def block(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels, with a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = block(3, 4), block(4, 8), block(12, 4)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = F.interpolate(self.bottom(F.max_pool2d(a, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([a, b], dim=1))).mean(dim=(2, 3))


class Dense(nn.Module):
    """As in DenseNet: each layer normalises all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 2 * nth) for nth in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(3 + 2 * nth, 2, 3, padding=1) for nth in range(4))
        self.last, self.head = nn.BatchNorm2d(11), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return self.head(F.relu(self.last(x)).mean(dim=(2, 3)))


def resnet18() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    made: nn.Module = torchvision.models.resnet18(num_classes=4)
    return made


def one_shot(model: nn.Module, batch: Batch) -> Tensor:
    """Gradient of the mean loss, with none of gatrain."""
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return gradients(model)


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([buffer.double().flatten() for buffer in model.buffers()])


def split(model: nn.Module, batch: Batch, sizes: Sequence[int], strategy: ExactNorm | None = None) -> Tensor:
    step_of(model, Exact(), strategy=strategy).gradient(window(batch, sizes))
    return gradients(model)


# --- two processes ------------------------------------------------------------------------------------------

SPLITS = [[[3, 2, 1, 2], [2, 1, 1, 1]], [[4, 3, 3, 1], []], [[1], [5, 2]]]
"""Sizes of each window's micro-batches, by rank."""


def on_two() -> list[tuple[Callable[[], nn.Module], Batch, list[list[int]], str]]:
    """Nets, batches, sizes of the micro-batches by rank, and the activations that are held at once."""
    return [
        (resnet18, data(16, 32), [[2] * 4, [2] * 4], "window"),
        (UNet, data(16), [[2] * 4, [2] * 4], "micro_batch"),
        (UNet, data(11), [[4, 3, 3, 1], []], "window"),
        (UNet, data(11), [[4, 3, 3, 1], []], "micro_batch"),
    ]


def on_two_ranks() -> tuple[list[Tensor], Tensor, Tensor]:
    """First gradients of `on_two`, and what three steps of SGD made of the U-Net."""
    ranks, found = Ranks.current(), []
    for make, (x, y), sizes, way in on_two():
        model, first = seeded(make), sum(sizes[0]) * ranks.rank
        part = slice(first, first + sum(sizes[ranks.rank]))
        step_of(model, Exact(way), ranks).gradient(window((x[part], y[part]), sizes[ranks.rank]))
        found += [gradients(model), statistics(model)]
    model = seeded(UNet)
    step = step_of(model, Exact("window"), ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for splits in SPLITS:
        x, y = data(sum(map(sum, splits)))
        first = sum(splits[0]) * ranks.rank
        part = slice(first, first + sum(splits[ranks.rank]))
        step.gradient(window((x[part], y[part]), splits[ranks.rank]))
        optimizer.step()
        optimizer.zero_grad()
    return found, torch.cat([p.detach().flatten() for p in model.parameters()]), statistics(model)


def test_two_processes_of_four_micro_batches_have_the_gradients_and_weights_of_one_batch() -> None:
    both = run_on_ranks(2, on_two_ranks)
    wanted = []
    for make, batch, _, _ in on_two():
        model = seeded(make)
        wanted += [one_shot(model, batch), statistics(model)]
    model = seeded(UNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for splits in SPLITS:
        one_shot(model, data(sum(map(sum, splits))))
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    for found, trained, moved in both:
        for given, right in zip(found, wanted, strict=True):
            assert relative_error(given, right) < LIMIT
        assert relative_error(trained, weights) < LIMIT
        assert relative_error(moved, statistics(model)) < LIMIT


# --- models of all kinds ------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One BatchNorm at two places; others without running statistics, with a mean of all batches, without scale."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)
        self.bare = nn.BatchNorm2d(3, track_running_stats=False)
        self.mean = nn.BatchNorm1d(3, momentum=None, affine=False)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.tanh(self.norm(conv(x)))
        x = self.bare(self.convs[0](x)).square().mean(dim=(2, 3))
        return self.head(self.mean(x))


class Teacher(nn.Module):
    """A part that learns nothing, one without a gradient, and BatchNorm right at the input."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.teacher, self.student = nn.BatchNorm2d(3, affine=False), block(3, 4), block(3, 4)
        self.frozen = block(3, 4).requires_grad_(False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        with torch.no_grad():
            target = self.teacher(x)
        return self.head((self.student(x) * target + self.frozen(x)).mean(dim=(2, 3)))


class WithActivation(nn.BatchNorm2d):
    """As in timm: a subclass whose forward does more than normalise, by a function."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, self.eps
        )
        return F.silu(normalised)


def activated() -> nn.Module:
    norms = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), WithActivation(4)
    return nn.Sequential(*norms, nn.Conv2d(4, 4, 3), WithActivation(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [net, UNet, Shared, Teacher, activated, Dense])
def test_gradient_and_buffers_are_those_of_one_batch_for_any_model(
    make: Callable[[], nn.Module], way: str
) -> None:
    model, other, batch = seeded(make), seeded(make), data(11)
    for sizes in ((4, 1, 3, 3), (11,)):
        wanted = one_shot(model, batch)
        assert relative_error(split(other, batch, sizes, ExactNorm(way)), wanted) < 1e-13
        assert relative_error(statistics(other), statistics(model)) < 1e-13
        other.zero_grad()


def test_without_what_goes_through_statistics_the_gradient_is_far_off() -> None:
    for way in WAYS:
        model, batch = seeded(UNet), data(11)
        wanted = one_shot(model, batch)
        found = split(seeded(UNet), batch, (4, 4, 3), ConstantStatistics(way))
        assert relative_error(found, wanted) > 0.1


def test_each_pass_draws_the_same_random_numbers() -> None:
    class Noisy(nn.Module):
        masks: list[Tensor] | None = None

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.more = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            mask = torch.rand(len(x), 1, 1, 1) if self.masks is None else torch.cat(self.masks)
            return self.more(x * mask).square().mean(dim=(2, 3))

    batch, sizes = data(9), (4, 3, 2)
    model, given = seeded(Noisy), window(batch, sizes)
    given = type(given)(given.micro_batches, seed=(5,))
    step = step_of(model, Exact())
    step.gradient(given)
    whole, masks = seeded(Noisy), []
    for k, size in enumerate(sizes):
        step.seed(given, k)
        masks.append(torch.rand(size, 1, 1, 1))
    whole.masks = masks  # type: ignore[assignment]
    assert relative_error(gradients(model), one_shot(whole, batch)) < 1e-13


def test_under_autocast_it_is_as_near_as_its_rounding() -> None:
    model, other, (x, y) = seeded(UNet).float(), seeded(UNet).float(), data(12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    loss.backward()  # type: ignore[no-untyped-call]
    step = step_of(other, Exact())
    step.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    step.gradient(window((x.float(), y), (5, 4, 3)))
    assert relative_error(gradients(other), gradients(model)) < 0.1
    assert relative_error(statistics(other), statistics(model)) < 1e-2


class Pictures(Task):
    def __init__(self) -> None:
        self.train_data = list(range(12))

    def build_model(self) -> nn.Module:
        return seeded(UNet)

    def weight(self, batch: Batch) -> float:
        return float(len(batch[1]))

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return loss_sum(model, batch)


def test_a_run_that_is_saved_and_resumed_goes_on_bitwise(tmp_path: Path) -> None:
    def engine() -> Engine:
        task, settings = Pictures(), StepSettings("fp32", "none", False, "window")
        sgd = SGDConfig(lr=0.1, momentum=0.9)
        return Engine(
            task, task.build_model(), settings, sgd, Ranks(), torch.device("cpu"), strategy=ExactNorm()
        )

    def train(made: Engine, first: int, last: int) -> None:
        for number in range(first, last):
            _, norm = made.step(window(data(12), (5, 4, 3)), number)
            assert norm > 0

    whole, begun, resumed = engine(), engine(), engine()
    train(whole, 0, 4)
    train(begun, 0, 2)
    progress = saved_state.Progress(2, 2, 24, 12, 0, 12)
    path = saved_state.save(tmp_path / "saved", progress, begun.model, begun.optimizer, keep=0)
    saved_state.load(path, resumed.model, resumed.optimizer)
    train(resumed, 2, 4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


# --- what is refused ----------------------------------------------------------------------------------------


class Wayward(nn.Module):
    """Computes another layer for some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.one if len(x) > 2 else self.other
        return self.head(norm(x).square().mean(dim=(2, 3)))


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean(dim=(0, 2, 3)).detach()  # type: ignore[operator]
        return self.head(self.norm(x).square().mean(dim=(2, 3)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = block(3, 4), block(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)
        return self.head(x.mean(dim=(2, 3)))


class Penalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        y = self.body(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope.square().mean()


def scripted(part: nn.Module) -> nn.Module:
    return nn.Sequential(
        torch.jit.script(part.double()), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("way", WAYS)
def test_scripted_parts_without_batch_norm_are_exact(way: str) -> None:
    def make() -> nn.Module:
        return scripted(nn.Conv2d(3, 4, 3))

    model, batch = seeded(make), data(11)
    assert (
        relative_error(split(seeded(make), batch, (4, 4, 3), ExactNorm(way)), one_shot(model, batch)) < 1e-13
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (Wayward, ExactnessError, "in the order of the first forward"),
        (Remembering, ExactnessError, "moves its buffer seen"),
        (Checkpointed, ExactnessError, "activation checkpointing of its own"),
        (lambda: Checkpointed(reentrant=True), ExactnessError, "activation checkpointing of its own"),
        (Penalised, ConfigError, "torch.autograd.grad in the forward"),
        (lambda: scripted(block(3, 4)), ConfigError, "is compiled by torch.jit.script"),
    ],
)
def test_a_model_that_would_not_be_exact_is_refused_in_words(
    make: Callable[[], nn.Module], error: type[GatrainError], said: str
) -> None:
    model = seeded(make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=said):
        split(model, data(11), (5, 4, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradient": "cached"}, "norm=exact computes gradients in a way of its own"),
        ({"compile": True}, "leave compile out"),
        ({"checkpointing": "full"}, "leave checkpointing out"),
        ({"precision": "fp16"}, "not tested with the loss scale"),
        ({"optimizer": AdamAConfig()}, "norm=exact computes gradients in a way of its own"),
    ],
)
def test_a_combination_that_is_not_exact_is_refused_before_the_run(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build.build_strategy(RunConfig(norm="exact", **given))


def test_the_cost_follows_from_the_layers_and_is_said() -> None:
    model = UNet()
    for way, wanted in (("window", (1, 0)), ("auto", (1, 0)), ("micro_batch", (4, 3))):
        cost = ExactNorm(way).cost_of(model)
        assert (cost.micro_steps, cost.forwards) == wanted
    (said,) = Exact().remarks(model)
    assert "6 BatchNorm layers" in said
    assert "about 5 times the passes" in said
    assert Exact().mixing(model) == []


def test_a_model_without_batch_norm_is_accumulated_as_always() -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    model, batch = seeded(plain), data(9)
    assert relative_error(split(model, batch, (4, 5)), one_shot(seeded(plain), batch)) < 1e-14
