"""`compile=reduce-overhead` computes what `compile=true` does: whatever a replay overwrites was copied before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import Regression
from torch import Tensor, nn

from gatrain.config import REDUCE_OVERHEAD, SGDConfig
from gatrain.models.gpt import GPT
from gatrain.plan import StepSettings
from gatrain.train import cuda_graphs
from gatrain.train.cuda_graphs import Replayed
from gatrain.train.engine import Engine
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks


class _OneMemory:
    """A loss whose results and gradients lie in the same memory at each call, as those of a CUDA graph do."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight
        self._result, self._gradient = torch.zeros(()), torch.zeros_like(weight)

    def __call__(self, batch: Tensor) -> tuple[Tensor, float]:
        self._result.copy_((self._weight.detach() * batch).sum())
        self._gradient.fill_(float(batch.sum()))
        return self._result, float(len(batch))


def test_losses_and_gradients_outlive_the_next_replay() -> None:
    model = nn.Linear(1, 1, bias=False)
    loss = _OneMemory(model.weight)
    replayed = Replayed(loss, model)
    losses = []
    for number in (1.0, 2.0, 3.0):
        total, _ = replayed(torch.tensor([number]))
        losses.append(total)
        if model.weight.grad is None:  # as autograd: the first gradient is taken over, later ones are added
            model.weight.grad = loss._gradient
        else:
            model.weight.grad += number
    weight = float(model.weight.detach())
    assert [float(each) for each in losses] == pytest.approx([weight, 2 * weight, 3 * weight])
    assert float(model.weight.grad) == 6.0  # type: ignore[arg-type]
    assert float(loss._gradient) == 3.0


def test_a_window_of_one_micro_step_copies_no_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    loss = _OneMemory(model.weight)
    replayed = Replayed(loss, model)
    replayed(torch.ones(1))
    model.weight.grad = loss._gradient
    assert model.weight.grad is loss._gradient
    model.weight.grad = None
    replayed(torch.ones(1))
    assert model.weight.grad is None


# --- on a GPU ----------------------------------------------------------------------------------------------


def _gpt(dropout: float = 0.0) -> nn.Module:
    return GPT(vocab_size=17, context=8, layers=2, heads=2, width=16, dropout=dropout)


class _Images(nn.Module):
    """Running statistics, a dropout layer and a parameter that one kind of batch alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 4, 3)
        )
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


TOKENS = torch.randint(17, (24, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Any, Tensor]] = {
    "gpt": (_gpt, TOKENS),
    "dropout": (lambda: _gpt(0.2), TOKENS),
    "images": (_Images, IMAGES),
}
SIZES = {"one": [8], "even": [4, 4], "ragged": [3, 3, 2]}


def _trained(
    make: Any, data: Tensor, sizes: list[int], compile: bool | str, precision: str
) -> dict[str, Tensor]:
    """Parameters, buffers, losses and norms after some steps, with an evaluation between."""
    torch.compiler.reset()
    cuda_graphs.forget()
    device = torch.device("cuda")
    task = Regression(make)
    settings = StepSettings(precision, "none", compile, "window")
    model = task.build_model().to(device)
    one = Engine(task, model, settings, SGDConfig(lr=0.01, clip_norm=1.0), Ranks(), device)
    losses, norms, evaluated = [], [], []
    for step in range(6):
        parts = data.roll(step, 0)[: sum(sizes)].split(sizes)
        micro_batches = [MicroBatch(part, {"loss": float(len(part))}, samples=len(part)) for part in parts]
        result, norm = one.step(LoadedWindow(micro_batches, seed=(step,)), step)
        losses.append(result.local_loss_sums["loss"])
        norms.append(norm)
        if step % 2:
            evaluated.append(one.evaluate(data[:5].to(device))[0]["loss"][0])
    found = {name: value.detach().double().cpu() for name, value in one.model.state_dict().items()}
    for name, values in {"losses": losses, "norms": norms, "evaluated": evaluated}.items():
        found[name] = torch.stack([value.detach().double().cpu() for value in values])
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_steps_are_those_of_compiled_code(name: str, split: str, precision: str) -> None:
    make, data = MODELS[name]
    wanted = _trained(make, data, SIZES[split], True, precision)
    found = _trained(make, data, SIZES[split], REDUCE_OVERHEAD, precision)
    for key, value in wanted.items():  # backwards of embeddings add in any order
        rounding = 1e-5 if precision == "fp32" else 1e-2
        assert float((found[key] - value).norm()) <= rounding * float(value.norm()), key
