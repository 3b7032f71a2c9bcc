"""The door `norm`: BatchNorm under accumulation, kept with its running statistics right, or converted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_exact_gradient import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from gatrain import build
from gatrain.batch import Split
from gatrain.compose import compose, reload
from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.plan import Plan, StepSettings
from gatrain.train.accumulate import gradient_step
from gatrain.train.gradient import GradientStrategy
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.modules import batch_norms
from gatrain.train.norm import Normalisation
from gatrain.train.norm.convert import Frozen, Group, Instance, Layer, Sync
from gatrain.train.norm.keep import Keep, Torch
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step
from gatrain.tune.explain import norm_note

Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    """Two BatchNorm layers in a row and one beside them."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.beside, self.norm3 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm1(self.first(x)))
            h = F.relu(self.norm2(self.second(h)) + self.norm3(self.beside(x)))
            return self.head(h.mean(dim=(2, 3)))

    return Net()


def data(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    # samples that differ in mean and size: what one micro-batch says of the whole is not much
    x = x * (0.5 + torch.rand(count, 1, 1, 1, generator=generator)) + torch.randn(
        count, 3, 1, 1, generator=generator
    )
    return x, torch.randint(4, (count,), generator=generator)


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), float(len(batch[1]))


def window(batch: Batch, sizes: Sequence[int]) -> LoadedWindow:
    parts = zip(batch[0].split(list(sizes)), batch[1].split(list(sizes)), strict=True)
    return LoadedWindow(
        [MicroBatch(part, {"loss": float(len(part[1]))}, samples=len(part[1])) for part in parts]
    )


def step_of(
    model: nn.Module,
    norm: Normalisation,
    ranks: Ranks | None = None,
    strategy: GradientStrategy | None = None,
) -> Step:
    step = gradient_step(
        model,
        lambda batch: loss_sum(model, batch),
        term_names=["loss"],
        ranks=ranks or Ranks(),
        stage=lambda batch: lambda: batch,
        strategy=strategy or norm.strategy(),
    )
    norm.attach(step)
    return step


def gradients(model: nn.Module) -> Tensor:
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("norm", [Group, Layer, Instance, Frozen])
def test_a_converted_model_has_one_gradient_whatever_the_split_and_keeps_its_weights(
    norm: type[Normalisation],
) -> None:
    found = []
    for sizes in ((11,), (4, 1, 3, 3)):
        model = net().double()
        names = [name for name, _ in model.named_parameters()]
        nn.init.uniform_(model.norm1.weight)  # type: ignore[arg-type]
        scale = model.norm1.weight
        converted = norm()
        model = converted.convert(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert model.norm1.weight is scale
        assert batch_norms(model.train()) == []
        assert "3 BatchNorm layers ('norm1' to 'norm3')" in converted.remarks(model)[0]
        step_of(model, converted).gradient(window(data(11), sizes))
        found.append(gradients(model))
    assert relative_error(found[1], found[0]) < 1e-13


@pytest.mark.parametrize(
    ("norm", "groups"),
    [
        (nn.BatchNorm2d(64), 32), (nn.BatchNorm2d(48), 24), (nn.BatchNorm2d(7), 1), (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm1d(64), 4), (nn.BatchNorm1d(10), 1),
    ],
)  # fmt: skip
def test_groups_divide_the_channels_and_hold_more_than_one(norm: nn.Module, groups: int) -> None:
    (made,) = Group().convert(nn.Sequential(norm))
    assert isinstance(made, nn.GroupNorm)
    assert made.num_groups == groups


def test_what_cannot_be_converted_is_refused_with_what_would_do() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(ConfigError, match=r"'0' is a .*Odd, a kind of BatchNorm .*norm=keep"):
        Group().convert(nn.Sequential(Odd(4)))
    with pytest.raises(ConfigError, match="does not divide the 10 channels"):
        Group(groups=4).convert(nn.Sequential(nn.BatchNorm2d(10)))
    with pytest.raises(ConfigError, match="not a whole number"):
        Group(groups=0)
    with pytest.raises(ConfigError, match=r"would be one value.*norm=layer"):
        Instance().convert(nn.Sequential(nn.BatchNorm1d(4)))(torch.randn(3, 4))
    with pytest.raises(ConfigError, match="no running statistics"):
        Frozen().convert(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))
    (said,) = Group().remarks(nn.Sequential(nn.Linear(2, 2)))
    assert "norm=group changes nothing" in said


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_layer_is_seen_and_no_norm_that_must_change_it_says_that_there_is_none() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        return nn.Sequential(scripted, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()

    assert batch_norms(model()) == ["0.1"]
    for norm in (Group(), Layer(), Instance(), Frozen(), Sync()):
        with pytest.raises(ConfigError, match="is compiled by"):
            norm.convert(model())
    images = torch.randn(6, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch, kept = (images, torch.arange(6) % 3), model()
    before = {name: value.clone() for name, value in kept.state_dict().items()}
    step_of(kept, Keep()).gradient(window(batch, [6]))  # one micro-batch: as PyTorch computes it
    kept.load_state_dict(before)
    with pytest.raises(ConfigError, match="norm=keep with several micro-batches: BatchNorm"):
        step_of(kept, Keep()).gradient(window(batch, [4, 2]))
    step_of(kept, Torch()).gradient(window(batch, [4, 2]))


def test_a_frozen_layer_stays_frozen_in_training_and_keeps_its_names_in_a_state() -> None:
    plain = nn.Sequential(nn.BatchNorm1d(4))
    plain(torch.randn(9, 4))
    state = copy.deepcopy(plain.state_dict())
    frozen = Frozen().convert(plain)
    assert list(frozen.state_dict()) == list(state)
    frozen.train()(torch.randn(9, 4))
    assert all(torch.equal(value, state[name]) for name, value in frozen.state_dict().items())


def variances(model: nn.Module) -> Tensor:
    return torch.cat([module.running_var for module in model.modules() if isinstance(module, nn.BatchNorm2d)])


@pytest.mark.parametrize("sizes", [(4,) * 16, (7, 7, 7, 7, 6, 6, 6, 6, 6, 6), (1, 3, 20, 40)])
def test_running_statistics_after_a_window_are_within_2_percent_of_the_large_batchs(
    sizes: tuple[int, ...],
) -> None:
    whole = net().double()
    step_of(whole, Torch()).gradient(window(data(64), [64]))
    after = {}
    for norm in (Keep(), Torch()):
        model = net().double()
        step_of(model, norm).gradient(window(data(64), sizes))
        after[type(norm)] = relative_error(variances(model), variances(whole))
    assert after[Keep] < 0.02 < after[Torch]


def test_running_statistics_of_instance_norm_move_once_a_window_too() -> None:
    after = {}
    for norm, sizes in ((Torch(), (64,)), (Torch(), (4,) * 16), (Keep(), (4,) * 16)):
        layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double()
        images = 1 + 2 * data(64)[0]
        step = step_of(nn.Sequential(layer, nn.Conv2d(3, 4, 1).double(), nn.Flatten()), norm)
        with torch.no_grad():
            for k, part in enumerate(images.split(sizes)):
                for listener in step.before_micro_step:
                    listener(window(data(64), sizes), k)
                step.model(part)
        after[type(norm), len(sizes)] = layer.running_var
    wanted = after[Torch, 1]
    assert relative_error(after[Keep, 16], wanted) < 0.02 < relative_error(after[Torch, 16], wanted)


def test_a_window_leaves_exactly_1_minus_m_of_what_was_before_and_one_micro_batch_changes_nothing() -> None:
    model = net().double()
    step, left = step_of(model, Keep()), 1.0
    whole = window(data(23), [8, 8, 7])
    for k in range(3):
        step.seed(whole, k)
        left *= 1 - model.norm2.momentum
    assert left == pytest.approx(0.9, abs=1e-15)
    found = []
    for norm in (Keep(), Torch()):
        model = net()
        x, y = data(8)
        step = step_of(model, norm)
        for _ in range(3):
            step.gradient(window((x.float(), y), [8]))
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_run_of_a_version_without_the_key_goes_on_as_it_was(tmp_path: Path) -> None:
    made = compose(["recipe=vision"])
    assert made.config.norm == "keep"
    stored = tmp_path / "config.yaml"
    stored.write_text(made.yaml)
    assert reload(stored, ()).config.norm == "keep"
    stored.write_text("\n".join(line for line in made.yaml.splitlines() if not line.startswith("norm:")))
    again = reload(stored, ())
    assert again.config.norm == "torch"
    assert "norm: torch" in again.yaml


def test_the_plan_counts_the_layers_and_says_what_they_see() -> None:
    way = StepSettings("fp32", "none", False, "window")
    plan = Plan(split=Split(9, 1), micro_batch=5, settings=way, reason="")
    note = norm_note(["bn1", "bn2"], plan, running_statistics=Keep.running_statistics)
    assert note is not None
    for text in (
        "2 BatchNorm layers ('bn1' to 'bn2')",
        "(4 or 5 samples)",
        "norm=group",
        "once for each window",
    ):
        assert text in note
    ranks = Plan(split=Split(10, 2), micro_batch=5, settings=way, reason="")
    assert "once" not in str(norm_note(["bn1"], ranks, running_statistics=Keep.running_statistics))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("keep", Keep),
        ("sync", Sync),
        ({"name": "group", "groups": 2}, Group),
        ({"_target_": f"{__name__}.Mine"}, None),
    ],
)
def test_norm_is_a_door(given: object, kind: type[Normalisation] | None) -> None:
    made = build.build_norm(RunConfig(norm=given))
    assert type(made) is kind or (kind is None and type(made).__name__ == "Mine")


class Mine(Normalisation):
    """Of a person's own."""


def test_what_is_no_normalisation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"norm=grup is not one of .*'group'"):
        build.build_norm(RunConfig(norm="grup"))
    with pytest.raises(ConfigError, match="Subclass Normalisation, or write norm=keep"):
        build.build_norm(RunConfig(norm={"_target_": "torch.nn.Identity"}))
