"""A loss as a sum, and the weight that its mean would divide by: the two numbers that exactness needs.

``sum / weight`` equals what the loss returns with ``reduction="mean"`` (stated by tests for every loss here).
Source for cross-entropy: PyTorch's aten/src/ATen/native/LossNLL.cpp. With class indices, the plain and the
smoothed part are both divided by the summed class weights of the targets that are not ignored; with class
probabilities the sum is divided by the number of samples, whatever the class weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gatrain.errors import ConfigError
from gatrain.tasks.forms import shown

Weight = Tensor | float
WeightFunction = Callable[[Any], Weight]

ELEMENTWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
"""Their mean divides by the number of elements of the targets."""

FUNCTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
"""Losses as functions mean the same as their modules with the same options."""


class SummedLoss:
    """Calls a loss so that it returns a sum, and counts the weight of targets on any device.

    Args:
        loss: a loss module, a function ``(outputs, targets)`` that returns a mean over samples, or None for
            cross-entropy.
        weight: for a loss whose mean is over something else: a function of the targets that gives what the
            mean
            divides by.
        weighs_samples: whether each sample has a weight of its own (`samples` below).

    Raises:
        ConfigError: a loss that is not a mean, or has parameters.
    """

    def __init__(
        self, loss: Any = None, weight: WeightFunction | None = None, weighs_samples: bool = False
    ) -> None:
        loss = _as_module(nn.CrossEntropyLoss() if loss is None else loss)
        if not callable(loss):
            raise ConfigError(
                f"loss={loss!r} is not callable. Give a loss module or a function (outputs, targets)."
            )
        if weight is not None and not callable(weight):
            raise ConfigError(f"task.weight={weight!r} is not callable. Give a function of the targets.")
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise ConfigError(
                f"{type(loss).__name__} has parameters, which would not be trained. Put it into the model "
                "and let the model return what the loss needs."
            )
        self.name = getattr(loss, "__name__", type(loss).__name__)
        self.kind = "custom" if weight is not None else _kind(loss)
        self._weight = weight
        if self.kind in ("classes", "elements"):
            _check_reduction(loss)
            loss = copy.deepcopy(loss)
            loss.reduction = "none" if weighs_samples else "sum"
        elif getattr(loss, "reduction", "mean") not in ("mean", "batchmean"):
            _check_reduction(loss)
        self._loss = loss
        if weighs_samples and self.kind == "custom":
            raise ConfigError(
                "task.weight and task.sample_weight are both given. Let the loss weigh its samples and "
                "task.weight count their weights, or leave task.weight out."
            )

    @property
    def ignore_index(self) -> int | None:
        """The target that does not count, where the loss has one."""
        return self._loss.ignore_index if self.kind == "classes" else None

    @property
    def needs_tensor(self) -> bool:
        """Whether the loss is PyTorch's own, which compares one tensor; the user's may take any output."""
        loss = self._loss
        return self.kind in ("classes", "elements") or (isinstance(loss, nn.Module) and _own_forward(loss))

    def weight(self, targets: Any, inputs: Any = None, samples: Tensor | None = None) -> Weight:
        """What the mean over ``targets`` divides by; a tensor on their device only where class weights or
        ignored targets must be summed. ``inputs`` of the same batch tell lists of samples from lists of columns.
        ``samples`` are the weights of the samples, float64 ``[B]``.
        """
        if samples is not None:
            return self._weight_of_weighed(targets, samples)
        if self._weight is not None:
            return self._weight(targets)
        if self.kind == "samples":
            return samples_in(targets, inputs)
        if not isinstance(targets, Tensor):
            raise ConfigError(
                f"{self.name} needs a tensor of targets, but the data gives a {type(targets).__name__}."
            )
        if self.kind == "elements":
            return targets.numel()
        if targets.is_floating_point():  # class probabilities [B, C, ...]
            return targets.numel() // targets.shape[1] if targets.dim() > 1 else 1
        counted = targets != self._loss.ignore_index
        if self._loss.weight is None:
            count: Tensor = counted.sum()
            return count
        total: Tensor = self._class_weights_of(targets, counted).sum()
        return total

    def _class_weights_of(self, targets: Tensor, counted: Tensor) -> Tensor:
        """Of each target; 0 where it is ignored. fp64, so that host and device agree although they add in
        different orders."""
        class_weights = self._loss.weight.to(targets.device, torch.float64)
        return class_weights[torch.where(counted, targets, 0)] * counted  # type: ignore[no-any-return]

    def _weight_of_weighed(self, targets: Any, samples: Tensor) -> Tensor:
        """Each sample's own part of `weight`, times its weight, summed."""
        if self.kind == "samples":
            return samples.sum()
        if self.kind == "elements" or targets.is_floating_point():
            part = self.weight(targets)  # alike for all samples
            return samples.sum() * (float(part) / max(1, len(targets)))
        counted = targets != self._loss.ignore_index
        is_plain = self._loss.weight is None
        parts = counted.to(torch.float64) if is_plain else self._class_weights_of(targets, counted)
        by_sample = parts.reshape(len(samples), -1).sum(1)
        return (by_sample * samples).sum()

    def sum(
        self, outputs: Any, targets: Any, inputs: Any = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Weight]:
        """(summed loss, weight used) of one micro-batch, in fp32 or better; ``samples`` as in `weight`.

        Raises:
            ConfigError: shapes that the loss would broadcast, or a result that is not one number.
        """
        outputs, targets = _widened(outputs), targets
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and targets.is_floating_point():
            targets = targets.to(outputs.dtype)
        weight = self.weight(targets, inputs, samples)
        if self.kind == "classes":
            return _weighed(self._class_loss(outputs, targets), samples), weight
        if self.kind == "elements":
            if outputs.shape != targets.shape:
                raise ConfigError(
                    f"{self.name} compares element by element, but the model gives {list(outputs.shape)} "
                    f"and the data {list(targets.shape)}. Make them equal, for example with unsqueeze(1) on "
                    "the targets."
                )
            return _weighed(self._element_loss(outputs, targets), samples), weight
        value = self._loss(outputs, targets)
        if samples is not None:
            if not isinstance(value, Tensor) or value.shape != samples.shape:
                raise ConfigError(
                    f"{self.name} returned {shown(value)}. With task.sample_weight a loss must return one number "
                    f"for each of the {len(samples)} samples: its mean cannot be weighed any more."
                )
            return _weighed(value, samples), weight
        if isinstance(value, Tensor) and value.dim() == 0:
            return value * weight, weight
        if isinstance(value, Tensor) and self.kind == "samples" and list(value.shape) == [weight]:
            return value.sum(), weight  # one loss for each sample
        given = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(
            f"{self.name} returned {given}. A loss must return its mean over the samples (a tensor with one "
            "number), or one number for each sample."
        )

    def _class_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss
        self._check_classes(outputs, targets)
        weight = None if loss.weight is None else loss.weight.to(outputs.device, outputs.dtype)
        options = {"weight": weight, "ignore_index": loss.ignore_index, "reduction": loss.reduction}
        if isinstance(loss, nn.NLLLoss):
            return F.nll_loss(outputs, targets, **options)
        return F.cross_entropy(outputs, targets, label_smoothing=loss.label_smoothing, **options)

    def _check_classes(self, outputs: Tensor, targets: Tensor) -> None:
        as_numbers = outputs.shape[:1] + outputs.shape[2:] if outputs.dim() > 1 else outputs.shape[1:]
        if targets.shape == (outputs.shape if targets.is_floating_point() else as_numbers):
            return
        hint = "Let the model return one score for each class."
        if outputs.dim() > 2 and outputs.shape[:-1] == targets.shape:
            hint = (
                "The classes are the last dimension: let the model return scores.movedim(-1, 1), or use "
                "task=language_model where the targets are the next tokens."
            )
        elif outputs.dim() > 1 and targets.dim() == 2 and targets.shape[1:] == (1,):
            hint = "Let the data give targets without the last dimension: targets.squeeze(1)."
        raise ConfigError(
            f"{self.name} needs scores [batch, classes, ...] and targets [batch, ...], but the model gives "
            f"{list(outputs.shape)} and the data {list(targets.shape)}. {hint}"
        )

    def _element_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss
        if isinstance(loss, nn.BCEWithLogitsLoss):  # the one with buffers that must follow the outputs
            moved = [
                None if buffer is None else buffer.to(outputs.device, outputs.dtype)
                for buffer in (loss.weight, loss.pos_weight)
            ]
            return F.binary_cross_entropy_with_logits(
                outputs, targets, weight=moved[0], pos_weight=moved[1], reduction=loss.reduction
            )
        return loss(outputs, targets)  # type: ignore[no-any-return]


def _weighed(losses: Tensor, samples: Tensor | None) -> Tensor:
    """The sum of a sum, or of losses ``[B, ...]`` times the weights of their samples ``[B]``."""
    if samples is None:
        return losses
    return (losses * samples.to(losses.dtype).view(-1, *[1] * (losses.dim() - 1))).sum()


def samples_in(targets: Any, inputs: Any = None) -> int:
    """Number of samples in a batch of targets: the first size of a tensor, the length of a list of samples.

    A list or tuple may also hold columns, one tensor with all samples each; ``inputs`` of the same batch decide
    where the list could be either. The entries of a dict must agree.

    Raises:
        ConfigError: there is no tensor with a batch dimension, or the entries of a dict disagree.
    """
    found = _possible_counts(targets)
    if len(found) > 1 and inputs is not None:
        found = [count for count in found if count in _possible_counts(inputs)] or found
    if found:
        return found[0]
    if isinstance(targets, Mapping):
        shapes = ", ".join(
            f"{name}: {list(part.shape)}" for name, part in targets.items() if isinstance(part, Tensor)
        )
        raise ConfigError(
            f"cannot count the samples in a dict of targets ({shapes or 'no tensors'}): the first dimensions of "
            "its tensors must be the samples. Give task.weight, a function of the targets that counts what the "
            "loss's mean divides by."
        )
    raise ConfigError(
        f"cannot count the samples in targets of type {type(targets).__name__}: expected a tensor whose "
        "first dimension is the batch, or a list, tuple or dict of them. Or give task.weight, a function of the "
        "targets."
    )


def _possible_counts(nested: Any) -> list[int]:
    """Numbers of samples that a part of a batch may hold, the likeliest first; none if it does not tell."""
    if isinstance(nested, Tensor):
        return [int(nested.size(0))] if nested.dim() > 0 else []
    if isinstance(nested, PackedSequence):
        return [int(nested.batch_sizes[0])] if len(nested.batch_sizes) else [0]
    if isinstance(nested, Mapping):
        return _agreed(nested.values())
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return _agreed(nested)
    if isinstance(nested, (list, tuple)):
        columns = [count for count in _agreed(nested) if count != len(nested)]
        return [len(nested), *columns]
    return []


def _agreed(parts: Iterable[Any]) -> list[int]:
    """The counts that are possible for every part that tells one."""
    each = [counts for part in parts if (counts := _possible_counts(part))]
    return [count for count in each[0] if all(count in other for other in each)] if each else []


def _kind(loss: Any) -> str:
    """How the loss forms its mean: over class targets, over elements, or over samples."""
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and _own_forward(loss):
        return "classes"
    if isinstance(loss, ELEMENTWISE) and _own_forward(loss):
        return "elements"
    if isinstance(loss, nn.KLDivLoss) and loss.reduction == "mean":
        return "elements" if _own_forward(loss) else "samples"
    return "samples"


def _own_forward(loss: nn.Module) -> bool:
    """False for a user's subclass that computes something else: its mean is taken to be over samples."""
    return type(loss).forward.__module__.startswith("torch.")


def _check_reduction(loss: Any) -> None:
    if loss.reduction != "mean":
        raise ConfigError(
            f"{type(loss).__name__}(reduction={loss.reduction!r}): gatrain trains the mean over the "
            "effective batch and forms the sums itself. Leave loss.reduction at 'mean', its default."
        )


def _as_module(loss: Any) -> Any:
    """A function of torch.nn.functional, alone or with options, as its module."""
    function, options = loss, {}
    if isinstance(loss, functools.partial):
        if loss.args:
            return loss
        function, options = loss.func, loss.keywords
    module = FUNCTIONS.get(function) if callable(function) and getattr(function, "__hash__", None) else None
    if module is None:
        return loss
    return module(**options)


def _widened(outputs: Any) -> Any:
    """bf16 and fp16 outputs in fp32, so that sums over many terms keep their digits; others as they are."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
        return outputs.float()
    return outputs
