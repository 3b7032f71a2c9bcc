"""Two encoders for things that belong together and share their words: each pools one side to one vector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tower(nn.Module):
    """Words int64 ``[B, T]``, 0 for none, to vectors of length one ``[B, width]``.

    A mean of the words, each with a weight that this side learns, and a small network added to it. It begins as the
    plain mean.
    """

    def __init__(self, words: nn.Embedding, dropout: float) -> None:
        super().__init__()
        width = words.embedding_dim
        self.words = words
        self.importance = nn.Embedding(words.num_embeddings, 1)
        self.dropout = nn.Dropout(dropout)
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        for zeros in (self.importance.weight, self.net[-1].weight, self.net[-1].bias):
            nn.init.zeros_(zeros)  # type: ignore[arg-type]

    def forward(self, words: Tensor) -> Tensor:
        weights = self.importance(words).exp() * (words != 0)[..., None]  # [B, T, 1]
        kept = self.dropout(weights)
        # a few words may all be dropped: their sum would be zero, which has no direction and an endless gradient
        kept = torch.where((kept != 0).any(dim=1, keepdim=True), kept, weights)
        pooled = F.normalize((kept * self.words(words)).sum(dim=1), dim=-1)  # [B, width]
        return F.normalize(pooled + self.net(pooled), dim=-1)


class TwoTowers(nn.Module):
    """``model(left, right)``: two ``[B, width]``, whose products ``left @ right.T`` are scores.

    The temperature is learned. It is in the vectors, a root in each, not in the loss: a loss of all samples of a
    window (`gatrain.tasks.WindowTask`) trains what its rows depend on.

    Args:
        vocab_size: different words, 0 for none included.
        dropout: of words.
        temperature: at the start.
    """

    def __init__(
        self, vocab_size: int = 8192, width: int = 128, dropout: float = 0.5, temperature: float = 0.1
    ) -> None:
        super().__init__()
        words = nn.Embedding(vocab_size, width)
        nn.init.normal_(words.weight, std=width**-0.5)
        self.left, self.right = Tower(words, dropout), Tower(words, dropout)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        root = (self.log_scale / 2).exp()
        return self.left(left) * root, self.right(right) * root
