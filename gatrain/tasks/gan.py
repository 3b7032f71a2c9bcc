"""Generative adversarial networks: a generator and a discriminator, trained in turn by an optimizer each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.tasks.base import LossSum, LossSums, Samples, Task
from gatrain.tasks.latents import Keyed, latents

DRAWN = 1000
"""Images that an evaluation draws, always of the same latents."""


class GAN(Task):
    """The non-saturating game of Goodfellow et al. 2014 (arXiv 1406.2661), with ``gradient=phases``.

    Per sample x with latents z of its own, and D the discriminator's score: the discriminator's loss is
    ``softplus(-D(x)) + softplus(D(G(z)))`` and, as a second term, ``penalty / 2 * |dD/dx|^2``, without which
    training goes round in circles (R1; Mescheder et al. 2018, arXiv 1801.04406); the generator's is
    ``softplus(-D(G(z)))``.
    Latents are keyed by seed, epoch, sample, phase and update, so no split changes them.

    Args:
        model: makes a module with parts ``generator`` and ``discriminator`` and a number ``latents``
            (`gatrain.models.gan.SmallGAN`).
        data: has ``train`` and ``eval``, datasets of images, or of tuples that begin with one.
        penalty: of the square of the discriminator's slope at real images.
    """

    phases: Mapping[str, Sequence[str]] = {
        "discriminator": ("discriminator", "penalty"),
        "generator": ("generator",),
    }
    counts_samples = True

    def __init__(self, model: Callable[[], nn.Module], data: Any, penalty: float = 1.0) -> None:
        if not 0 <= penalty < math.inf:
            raise ConfigError(f"task.penalty={penalty} is not a number of at least 0.")
        self._model, self._penalty = model, penalty
        self.train_data: Samples = Keyed(data.train)
        self.eval_data = Keyed(data.eval) if data.eval is not None else None
        self._real = data.train

    def build_model(self) -> nn.Module:
        model = self._model()
        for part in (*self.phases, "latents"):
            if not hasattr(model, part):
                raise ConfigError(
                    f"{type(model).__name__} has no {part!r}. gatrain.tasks.GAN needs a module with the parts "
                    "generator and discriminator, and with latents, how many numbers the generator takes."
                )
        return model

    def weight(self, batch: list[Tensor]) -> float:
        return len(batch[0])

    def count_samples(self, batch: list[Tensor]) -> int:
        return len(batch[0])

    def loss_sum(  # type: ignore[override]
        self, model: Any, batch: list[Tensor], phase: str = "", update: int = 0
    ) -> LossSums:
        images, keys = batch
        drawn = model.generator(latents(keys, model.latents, which=([*self.phases].index(phase), update)))
        of_drawn = model.discriminator(drawn)  # [B]
        if phase == "generator":
            return F.softplus(-of_drawn).sum(), len(images)
        with torch.enable_grad():  # evaluations need the slope too
            images = images.detach().requires_grad_()
            of_real = model.discriminator(images)
            # each sample's score depends on that sample alone: the slope of the sum holds every sample's own
            (slope,) = torch.autograd.grad(of_real.sum(), images, create_graph=True)
        return {
            "discriminator": ((F.softplus(-of_real) + F.softplus(of_drawn)).sum(), len(images)),
            "penalty": (slope.square().sum() * (self._penalty / 2), len(images)),
        }

    def draw(self, model: Any, count: int) -> Tensor:
        """The first ``count`` images of those that evaluations draw: [count, ...]."""
        device = next(model.generator.parameters()).device
        keys = torch.arange(count, device=device)
        with torch.no_grad():
            return model.generator(latents(keys, model.latents))  # type: ignore[no-any-return]

    def eval_metrics(self, model: Any, batch: list[Tensor]) -> Mapping[str, LossSum]:
        """``caught``: share of real and drawn images that the discriminator tells right, 0.5 where it can only
        guess. ``distance``: L2 distance of a held-out image to the nearest of `DRAWN` drawn ones."""
        images, keys = batch
        right = (model.discriminator(images) > 0).sum()
        right = right + (model.discriminator(model.generator(latents(keys, model.latents))) < 0).sum()
        drawn = self.draw(model, DRAWN)
        nearest = torch.cdist(images.flatten(1).float(), drawn.flatten(1).float()).amin(1)
        return {"caught": (right.float(), 2 * len(images)), "distance": (nearest.sum(), len(images))}

    def showcase(self, model: nn.Module, device: torch.device) -> str | None:
        """Fréchet distances to the real images, the drawn ones' between those of real ones and of noise."""
        real = _images(self._real, 2 * DRAWN)
        drawn = self.draw(model, DRAWN).cpu()
        halves = real[::2], real[1::2]
        words = (
            ("drawn images", frechet(drawn, real)),
            ("half of the real ones against the others", frechet(*halves)),
            ("noise", frechet(torch.rand(real.shape, generator=torch.Generator().manual_seed(0)), real)),
        )
        listed = ", ".join(f"{name} {value:.2f}" for name, value in words)
        return f"Fréchet distance to real images in pixels (0 is none): {listed}"


def frechet(some: Tensor, others: Tensor) -> float:
    """Squared Fréchet distance of two sets of images, each taken for a normal distribution of its pixels (Dowson
    and Landau 1982); what FID is of Inception's features.

    Args:
        some: float [n, ...].
        others: float [m, ...].
    """
    one, other = some.flatten(1).double(), others.flatten(1).double()
    first, second = torch.cov(one.T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * mixed)


def _images(data: Samples, most: int) -> Tensor:
    """Of the first samples of a dataset, in host memory: [samples, ...]."""
    samples = (data[index] for index in range(min(most, len(data))))
    return torch.stack([each[0] if isinstance(each, tuple | list) else each for each in samples])
