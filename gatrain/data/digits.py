"""Hand-written digits: 1,797 grey images of 8x8 pixels in ten classes, installed with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gatrain.data.text import check_lengths

SPLIT_SEED = 0


class TensorSamples:
    """Map-style dataset over two tensors with one row a sample; items are (input, target)."""

    deterministic = True

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*self.batch_of(indices), strict=True))

    def batch_of(self, indices: Sequence[int]) -> list[Tensor]:
        """Several samples as ``[inputs, targets]``."""
        chosen = torch.as_tensor(indices)
        return [self.inputs[chosen].contiguous(), self.targets[chosen]]


class Digits:
    """Data source: images float32 ``[1, 8, 8]`` in [0, 1] with int64 labels 0 to 9.

    Args:
        eval_fraction: share that is held out. The images are shuffled first, always in the same way: their
            order is by writer, and the held-out writers would be strangers.

    Raises:
        DataError: a fraction outside [0, 1).
    """

    def __init__(self, eval_fraction: float = 0.1) -> None:
        check_lengths(1, eval_fraction)
        from sklearn.datasets import load_digits  # slow to import: only where it is used

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
        inputs = torch.from_numpy(images[order].astype(np.float32) / 16).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(labels[order].astype(np.int64))
        cut = round(len(targets) * (1 - eval_fraction))
        self.train = TensorSamples(inputs[:cut], targets[:cut])
        self.eval = TensorSamples(inputs[cut:], targets[cut:]) if cut < len(targets) else None
