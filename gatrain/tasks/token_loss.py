"""Cross-entropy over tokens as a sum, with what its mean divides by.

With ``c`` the class weight of a label and ``s`` the weight of its sample, over the labels that are not -100:

    mean=token       sum_t s c l / sum_t s c                            long samples count for more
    mean=sequence    sum_i s (sum_t c l / sum_t c) / sum_i s            every sample counts alike

``c l`` of one label is what PyTorch's cross-entropy with these class weights and this label smoothing gives
with ``reduction="none"``; its own mean is mean=token with s = 1. A sequence without labels counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatrain.errors import ConfigError, nearest
from gatrain.labels import IGNORED

MEANS = ("token", "sequence")

MOST_LOGITS = 2**31 - 1
"""Entries of the logits in one call of a loss kernel; some count with 32 bits."""

ClassWeights = Sequence[float] | Mapping[int, float]
"""A weight for each class, or for some classes by number; the others then have 1."""


class TokenLoss:
    """Which mean over tokens is trained.

    Args:
        mean: ``token`` or ``sequence``.
        class_weights: of the labels.
        label_smoothing: share of each label that is spread over all classes.

    Raises:
        ConfigError: another mean, a smoothing outside [0, 1], class weights that are none.
    """

    def __init__(
        self, mean: str = "token", class_weights: ClassWeights | None = None, label_smoothing: float = 0.0
    ) -> None:
        if mean not in MEANS:
            raise ConfigError(f"task.mean={mean} is not one of {', '.join(MEANS)}.{nearest(mean, MEANS)}")
        self.by_sequence = mean == "sequence"
        self.label_smoothing = checked_smoothing(label_smoothing)
        self._class_weights = None if class_weights is None else checked_class_weights(class_weights)
        self._tables: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def is_plain(self) -> bool:
        """Whether it is the mean over labels, with nothing else."""
        return not self.by_sequence and self._class_weights is None and not self.label_smoothing

    def weight(self, labels: Tensor, samples: Tensor | None = None) -> Tensor:
        """What the mean divides by: a scalar on the labels' device, an integer where nothing is weighted.

        Args:
            labels: int64 ``[B, L]``.
            samples: their weights, float64 ``[B]``.
        """
        if self._class_weights is None and samples is None and not self.by_sequence:
            return label_count(labels)
        by_row = self._by_row(labels)
        if self.by_sequence:
            has_labels = by_row > 0
            return has_labels.sum() if samples is None else (samples * has_labels).sum()
        return by_row.sum() if samples is None else (samples * by_row).sum()

    def sum(
        self,
        logits: Tensor,
        labels: Tensor,
        samples: Tensor | None = None,
        cross_entropy: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """What the mean divides, a scalar: with `weight` of the same labels and samples it is the mean.

        Args:
            logits: ``[B, L, V]``.
            labels: int64 ``[B, L]``.
            samples: weights of the samples, float64 ``[B]``.
            cross_entropy: `summed_cross_entropy`, perhaps compiled.

        Raises:
            ConfigError: class weights for another number of classes.
        """
        cross_entropy = cross_entropy or summed_cross_entropy
        if self.is_plain and samples is None:
            return cross_entropy(logits, labels)
        factors: Tensor | None = None
        if self.by_sequence:
            by_row = self._by_row(labels)
            factors = torch.where(by_row > 0, 1 / by_row.clamp(min=torch.finfo(by_row.dtype).tiny), 0.0)
        if samples is not None:
            factors = samples if factors is None else factors * samples
        classes = logits.shape[-1]
        known = self._class_weights
        if isinstance(known, Mapping) and max(known) >= classes:
            raise ConfigError(
                f"task.class_weights names the class {max(known)}, but the model gives {classes} scores."
            )
        if isinstance(known, list) and len(known) != classes:
            raise ConfigError(
                f"task.class_weights has {len(known)} numbers, but the model gives {classes} scores. Give "
                "one for each, or a mapping from class to weight: '+task.class_weights={0: 0.1}'."
            )
        table = None if known is None else self._table(classes, labels.device)
        if factors is not None:
            factors = factors[:, None].expand(labels.shape)
        return cross_entropy(
            logits, labels, class_weights=table, label_smoothing=self.label_smoothing, factors=factors
        )

    def _by_row(self, labels: Tensor) -> Tensor:
        """The summed class weights of each row's labels, float64 ``[B]``: their number without class
        weights."""
        counted = labels != IGNORED
        if self._class_weights is None:
            return counted.sum(1).to(torch.float64)
        known = self._class_weights
        size = len(known) if isinstance(known, list) else max(known) + 1
        if (
            isinstance(known, list)
            and labels.device.type == "cpu"
            and labels.numel()
            and int(labels.max()) >= size
        ):
            raise ConfigError(
                f"task.class_weights has {size} numbers, but there is a label {int(labels.max())}. Give one "
                f"for each class, or a mapping from class to weight."
            )
        # classes beyond those that a mapping names weigh 1, as the last entry does
        table = self._table(size + 1, labels.device)
        return (table[torch.where(counted, labels, 0).clamp(max=size)] * counted).sum(1)

    def _table(self, size: int, device: torch.device) -> Tensor:
        """Weights of the classes 0 to ``size`` - 1, float64."""
        if (size, device) not in self._tables:
            table = torch.ones(size, dtype=torch.float64)
            known = self._class_weights
            assert known is not None
            for number, weight in enumerate(known) if isinstance(known, list) else known.items():
                if number < size:
                    table[number] = weight
            self._tables[size, device] = table.to(device)
        return self._tables[size, device]


def checked_smoothing(label_smoothing: float) -> float:
    """The share, as it is.

    Raises:
        ConfigError: outside [0, 1].
    """
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise ConfigError(f"task.label_smoothing={label_smoothing} is not between 0 and 1. Try 0.1.")
    return float(label_smoothing)


def checked_class_weights(given: Any) -> list[float] | dict[int, float]:
    """Weights of all classes, or of some by number.

    Raises:
        ConfigError: neither, or one that is negative or not finite.
    """
    try:
        if isinstance(given, Mapping):
            by_number = {int(key): float(value) for key, value in given.items()}
            found: list[float] | dict[int, float] = by_number
            numbers = [*by_number.values()]
        else:
            found = numbers = [float(value) for value in given]
    except (TypeError, ValueError):
        raise ConfigError(
            f"task.class_weights={given!r} is neither a list of numbers, one for each class, nor a mapping "
            f"from class to weight."
        ) from None
    if not numbers or any(not 0 <= number < float("inf") for number in numbers):
        raise ConfigError(f"task.class_weights={given} needs weights of 0 or more, one for each class.")
    if isinstance(found, dict) and min(found) < 0:
        raise ConfigError(f"task.class_weights={given} names the class {min(found)}; classes count from 0.")
    return found


def label_count(labels: Tensor) -> Tensor:
    """Number of labels that count, as a tensor on their device: the one mask of count and loss."""
    return (labels != IGNORED).sum()


def summed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    factors: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats, summed over the labels that are not -100, in fp32 (fp64 for fp64 logits).

    Under torch.compile the conversion to fp32 is fused into the softmax and costs no memory. Otherwise rows
    are taken in as few pieces as keep every kernel's index below 2**31.

    Args:
        logits: ``[B, L, V]``.
        labels: int64 ``[B, L]``.
        class_weights: ``[V]``.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        factors: ``[B, L]``, what each position's loss is multiplied by.
    """
    rows, labels = logits.flatten(0, 1), labels.flatten()
    factors = None if factors is None else factors.flatten()
    piece = max(1, MOST_LOGITS // rows.shape[1])
    # inductor's kernels index with 64 bits where they must, and pieces would only cost them traffic
    if rows.shape[0] <= piece or torch.compiler.is_compiling():
        return _summed(rows, labels, class_weights, label_smoothing, factors)
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, rows.shape[0], piece):
        end = start + piece
        some = None if factors is None else factors[start:end]
        total = total + _summed(rows[start:end], labels[start:end], class_weights, label_smoothing, some)
    return total


def _summed(
    rows: Tensor, labels: Tensor, class_weights: Tensor | None, label_smoothing: float, factors: Tensor | None
) -> Tensor:
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    losses = F.cross_entropy(
        wide,
        labels,
        weight=None if class_weights is None else class_weights.to(wide.dtype),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum" if factors is None else "none",
    )
    return losses if factors is None else (losses * factors.to(wide.dtype)).sum()
