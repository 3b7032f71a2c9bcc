"""A user's GAN: two networks, two losses, two optimizers. Sample i comes with its own noise, whatever the split."""

from __future__ import annotations

import os
import signal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gatrain import Hook, Task, TrainedStep


class Adversaries(Task):
    phases = ("judge", "maker")

    def __init__(self, samples: int = 22) -> None:
        generator = torch.Generator().manual_seed(0)
        real = torch.randn(samples, 2, generator=generator) + 2
        self.train_data = TensorDataset(real, torch.randn(samples, 3, generator=generator))

    def build_model(self) -> nn.Module:
        maker = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 2))
        judge = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        return nn.ModuleDict({"maker": maker, "judge": judge})

    def weight(self, batch: list[Tensor]) -> float:
        return len(batch[0])

    def loss_sum(self, model: nn.Module, batch: list[Tensor], phase: str = "") -> tuple[Tensor, float]:  # type: ignore[override]
        real, noise = batch
        maker, judge = model.get_submodule("maker"), model.get_submodule("judge")
        fake = judge(maker(noise))
        if phase == "maker":
            return F.softplus(-fake).sum(), len(real)
        return (F.softplus(-judge(real)) + F.softplus(fake)).sum(), len(real)


class Kill(Hook):
    """Kills the process after an update, where the environment says so."""

    def update(self, step: TrainedStep) -> None:
        if str(step.step) == os.environ.get("PLANTED"):
            os.kill(os.getpid(), signal.SIGKILL)
