"""16-bit parameters train as if they were fp32: gradients summed and reduced, weights stepped and saved in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gatrain
from gatrain.config import AdamWConfig, SGDConfig
from gatrain.errors import ExactnessError
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, LossSums, Task
from gatrain.train import saved_state
from gatrain.train.engine import Engine
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.saved_state import Progress

PROGRESS = Progress(step=2, samples=8, tokens=0, effective_batch=4, seed=0, data_samples=64)


class Net(nn.Module):
    """Embedding tied to its head, a frozen 16-bit layer, one that is never used, and perhaps an fp32 norm."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, mixed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8, dtype=dtype)
        self.mix = nn.Linear(8, 8, dtype=dtype)
        self.frozen = nn.Linear(8, 8, dtype=dtype).requires_grad_(False)
        self.never_used = nn.Linear(3, 3, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=torch.float32 if mixed else dtype)
        self.head = nn.Linear(8, 13, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.frozen(torch.tanh(self.mix(self.embedding(tokens)))).to(self.norm.weight.dtype)
        return self.head(self.norm(hidden).to(self.head.weight.dtype))


def new_net(dtype: torch.dtype = torch.bfloat16, mixed: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(dtype, mixed)


def samples(count: int) -> Tensor:
    return torch.randint(13, (count, 7), generator=torch.Generator().manual_seed(1))


def loss_sum(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    logits = model(tokens[:, :-1]).float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"), 6 * len(tokens)


def weight(tokens: Tensor) -> int:
    return 6 * len(tokens)


def fp32_sum(model: nn.Module, parts: list[Tensor], total: int) -> dict[str, Tensor]:
    """Each micro-batch's own gradient, summed outside of the training core, in fp64."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        model.zero_grad(set_to_none=True)
        (loss_sum(model, part)[0] / total).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0.0) + parameter.grad.double()
    model.zero_grad(set_to_none=True)
    return sums


def relative_error(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert given.keys() == wanted.keys()
    one, two = (torch.cat([each[name].double().flatten() for name in wanted]) for each in (given, wanted))
    return float((one - two).norm() / two.norm())


def main_gradients(model: nn.Module, masters: MasterWeights) -> dict[str, Tensor]:
    found = {name: masters.of(parameter).grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(("micro_steps", "mixed"), [(512, True), (1024, False)], ids=["512 mixed", "1024"])
def test_the_gradient_is_the_fp32_sum_of_the_micro_gradients(micro_steps: int, mixed: bool) -> None:
    model, parts = new_net(mixed=mixed), list(samples(micro_steps).split(1))
    wanted = fp32_sum(model, parts, weight(samples(micro_steps)))
    masters = gatrain.MasterWeights(model)
    gatrain.accumulate(model, parts, loss_sum=loss_sum, weight=weight, master_weights=masters)
    given = main_gradients(model, masters)
    assert set(given) == {"embedding.weight", "mix.weight", "mix.bias", "norm.weight", "norm.bias"}
    assert all(gradient.dtype == torch.float32 for gradient in given.values())
    assert relative_error(given, wanted) < 1e-6
    masters.close()
    # the usual way, on the same parts, is what this is about
    for part in parts:
        (loss_sum(model, part)[0] / weight(samples(micro_steps))).backward()
    swamped = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(swamped, wanted) > 1e-2


def test_without_masters_the_sum_is_rounded_once() -> None:
    model, parts = new_net(), list(samples(512).split(1))
    wanted = fp32_sum(model, parts, weight(samples(512)))
    for _ in range(2):  # a gradient that is there already is added to, as backward() does
        gatrain.accumulate(model, parts, loss_sum=loss_sum, weight=weight)
    given = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(given, wanted) < 2**-8
    rounded = {name: value.bfloat16() for name, value in wanted.items()}
    assert relative_error(given, rounded) < 2**-8
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def _on_two_ranks() -> list[Tensor]:
    """Main gradients of a plain model (one reduction) and of one in DistributedDataParallel (in the backward)."""
    found: list[Tensor] = []
    for use_ddp in (False, True):
        model = new_net(mixed=True)
        masters = gatrain.MasterWeights(model)
        wrapped = DistributedDataParallel(model) if use_ddp else model
        rank = Ranks.current().rank
        parts = list(samples(65).split(1))[rank * 40 : 40 + rank * 40]
        gatrain.accumulate(wrapped, parts, loss_sum=loss_sum, weight=weight, master_weights=masters)
        found.append(torch.cat([value.flatten() for value in main_gradients(model, masters).values()]))
        masters.close()
    for parameter in model.parameters():
        parameter.grad = None
    gatrain.accumulate(model, parts, loss_sum=loss_sum, weight=weight)
    found.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    return found


def test_ranks_add_main_gradients_in_fp32() -> None:
    wanted = fp32_sum(new_net(mixed=True), list(samples(65).split(1)), weight(samples(65)))
    flat = torch.cat([value.flatten() for value in wanted.values()])
    for plain, ddp, rounded in run_on_ranks(2, _on_two_ranks):
        assert relative_error({"": plain}, {"": flat}) < 1e-6
        assert relative_error({"": ddp}, {"": flat}) < 1e-6
        assert relative_error({"": rounded}, {"": flat}) < 2**-8


def test_masters_that_were_not_copied_are_told() -> None:
    model = new_net()
    masters = gatrain.MasterWeights(model)
    optimizer = torch.optim.SGD(masters.parameters(), lr=0.1)
    gatrain.accumulate(model, [samples(4)], loss_sum=loss_sum, weight=weight, master_weights=masters)
    optimizer.step()
    with pytest.raises(ExactnessError, match="copy_to_model"):
        gatrain.accumulate(model, [samples(4)], loss_sum=loss_sum, weight=weight, master_weights=masters)


class NetTask(Task):
    def __init__(self, make: Any = new_net) -> None:
        self.train_data = list(samples(64))  # type: ignore[assignment]
        self._make = make

    def build_model(self) -> nn.Module:
        return self._make()  # type: ignore[no-any-return]

    def weight(self, batch: Batch) -> float:
        return weight(batch)

    def loss_sum(self, model: nn.Module, batch: Batch) -> LossSums:
        return loss_sum(model, batch)


def engine(
    make: Any = new_net, optimizer: Any = None, sync: str = "window", precision: str = "fp32"
) -> Engine:
    task, settings = NetTask(make), StepSettings(precision, "none", False, sync)
    given = optimizer or AdamWConfig(lr=0.01)
    return Engine(task, task.build_model(), settings, given, Ranks.current(), torch.device("cpu"))


def window(step: int, micro_batch: int = 4) -> LoadedWindow:
    return LoadedWindow(
        [
            MicroBatch(part, {"loss": weight(part)})
            for part in samples(64)[8 * step : 8 * step + 8].split(micro_batch)
        ]
    )


def test_updates_below_the_weights_resolution_are_not_lost() -> None:
    one = engine(optimizer=SGDConfig(lr=1e-4))
    before = {name: p.detach().float() for name, p in one.model.named_parameters()}
    wanted = fp32_sum(new_net(), list(samples(64)[:8].split(4)), 48)
    masters = dict(before)
    for _ in range(3):  # small enough that the 16-bit weights, and so the gradients, hardly change
        one.step(window(0), 0)
    for name, parameter in one.model.named_parameters():
        master = one.masters.of(parameter)
        if name in wanted:
            moved = (masters[name] - master.detach()) / 3e-4
            assert relative_error({"": moved}, {"": wanted[name]}) < 0.02, name
            assert torch.equal(parameter, master.to(parameter.dtype))
    assert torch.equal(one.model.frozen.weight.float(), before["frozen.weight"])


def test_optimizer_state_is_fp32_and_norms_are_of_main_gradients() -> None:
    one = engine(optimizer=AdamWConfig(lr=0.01, clip_norm=0.01))
    wanted = fp32_sum(new_net(), list(samples(64)[:8].split(4)), 48)
    _, norm = one.step(window(0), 0)
    assert float(norm) == pytest.approx(
        float(torch.cat([g.flatten() for g in wanted.values()]).norm()), rel=1e-5
    )
    state = [value for each in one.optimizer.state.values() for value in each.values()]
    assert all(value.dtype == torch.float32 for value in state)


@pytest.mark.parametrize(
    "optimizer", [AdamWConfig(lr=0.01), SGDConfig(lr=0.1, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path, optimizer: Any) -> None:
    straight = engine(optimizer=optimizer)
    for step in range(2):
        straight.step(window(step), step)
    path = saved_state.save(
        tmp_path, PROGRESS, straight.model, straight.optimizer, keep=1, masters=straight.masters
    )
    resumed = engine(optimizer=optimizer)
    assert saved_state.load(path, resumed.model, resumed.optimizer, resumed.masters) == PROGRESS
    for step in range(2, 6):
        for each in (straight, resumed):
            each.step(window(step), step)
    for one, two in zip(straight.masters.trained, resumed.masters.trained, strict=True):
        assert torch.equal(one, two)
    for name, value in straight.model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_what_others_do_to_the_weights_stays_done() -> None:
    one = engine(optimizer=SGDConfig(lr=0.0))
    one.model.mix.weight.data.clamp_(-0.01, 0.01)
    one.step(window(0), 0)
    assert float(one.model.mix.weight.detach().abs().max()) <= 0.0101


def test_fp32_parameters_are_their_own_masters() -> None:
    one = engine(lambda: new_net(torch.float32))
    own = [id(p) for p in one.model.parameters() if p.requires_grad]
    assert [id(p) for p in one.masters.trained] == own
    assert one.masters.dtypes == ""
    assert not any(p._post_accumulate_grad_hooks for p in one.model.parameters())


def test_fp16_parameters_get_a_loss_scale_and_finite_steps() -> None:
    one = engine(lambda: new_net(torch.float16))
    assert one.scaler is not None
    one.scaler.load_state_dict({**one.scaler.state_dict(), "scale": 64.0})
    wanted = fp32_sum(new_net(torch.float16), list(samples(64)[:8].split(4)), 48)
    _, norm = one.step(window(0), 0)
    assert float(norm) == pytest.approx(
        float(torch.cat([g.flatten() for g in wanted.values()]).norm()), rel=1e-2
    )


def test_compiled_micro_steps_add_up_in_fp32_as_well() -> None:
    found = []
    for compiles in (False, True):
        model = new_net()
        masters = gatrain.MasterWeights(model)
        called = torch.compile(model, backend="aot_eager") if compiles else model

        def compiled_sum(_: nn.Module, tokens: Tensor, called: Any = called) -> tuple[Tensor, int]:
            return loss_sum(called, tokens)

        parts = samples(8).split(4)
        gatrain.accumulate(model, parts, loss_sum=compiled_sum, weight=weight, master_weights=masters)
        found.append(main_gradients(model, masters))
    assert relative_error(found[1], found[0]) < 0.02
