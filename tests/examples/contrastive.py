"""A gradient strategy of one's own: a contrastive loss over the whole window, exact although it does not decompose.

Two passes (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"): the first
keeps nothing but representations, whose gradients follow from the loss over all of them, on all ranks; the second
computes each micro-batch again, with the same random numbers, and carries its part of them into the parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatrain import Task
from gatrain.train.gradient import GradientStrategy, StepCost
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.step import Step


class Cached(GradientStrategy):
    exact = "the gradient of a loss of the whole window, for models that compute each sample by itself"
    needs_whole_window = True
    needs_sum_over_samples = False
    cost = StepCost(micro_steps=1, forwards=1)

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        kept = [torch.zeros(0, device=step.device)]
        for k, batch in step.batches(window):
            with torch.no_grad():
                kept.append(self.represent(window, step, k, batch))  # [n_k, 2, d]
        mine = torch.cat(kept[1:]) if kept[1:] else kept[0]
        parts = step.parallel.gather(mine)  # one [n, 2, d] for each rank
        leaf = torch.cat([part for part in parts if len(part)]).requires_grad_()  # [N, 2, d]
        total, _ = step.task.window_loss(leaf)
        (cached,) = torch.autograd.grad(total * step.scale["loss"], leaf)
        first = sum(len(part) for part in parts[: step.ranks.rank])
        for k, batch in step.batches(window):
            again = self.represent(window, step, k, batch)
            assert torch.equal(again.detach(), leaf[first : first + len(again)].detach())
            step.backward((again * cached[first : first + len(again)]).sum())
            first += len(again)
        step.counts.add({"loss": (total * (step.ranks.rank == 0), float(len(mine)))})

    def represent(self, window: LoadedWindow, step: Step, k: int, batch: Tensor) -> Tensor:
        step.seed(window, k)
        with step.parallel.micro_step(), step.autocast():
            return step.task.represent(step.model, batch)


class Pairs(Task):
    """Two noisy views of each point; each must find the other among all of the window's."""

    def __init__(self, dropout: float = 0.0, count: int = 29) -> None:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(count, 1, 5, generator=generator)
        views = points + 0.3 * torch.randn(count, 2, 5, generator=generator)
        self.train_data = torch.utils.data.TensorDataset(views)
        self.dropout = dropout

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 4))

    def weight(self, batch: list[Tensor]) -> int:
        return len(batch[0])

    def represent(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.normalize(model(batch[0]), dim=-1)

    def window_loss(self, views: Tensor) -> tuple[Tensor, float]:
        scores = views[:, 0] @ views[:, 1].T / 0.1  # [N, N]
        return F.cross_entropy(scores, torch.arange(len(views)), reduction="sum"), float(len(views))

    def loss_sum(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, float]:
        return self.window_loss(self.represent(model, batch))
