"""The ordinary task: a module, a dataset of (inputs, targets), and a loss that returns a mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.tasks.base import Batch, LossSum, Task, Weights, declares
from gatrain.tasks.forms import pair_of, scores_of
from gatrain.tasks.losses import SummedLoss, WeightFunction, samples_in
from gatrain.tasks.parts import check_factory, declared_length, find_splits, make_model
from gatrain.tasks.sample_weights import SampleWeights
from gatrain.tasks.token_loss import checked_class_weights, checked_smoothing


class Supervised(Task):
    """Adapter from a plain ``nn.Module`` and a mean-reduced loss to an exact sum with its weight.

    Args:
        model: function without arguments that makes the module; it is called as ``module(inputs)``.
        data: a data source (``train``, perhaps ``eval`` and ``collate``), or a map-style dataset of
            (inputs, targets).
        loss: a loss module or a function ``(outputs, targets)``; None is cross-entropy. PyTorch's losses
            count as
            their own mean does (class weights, ignored targets, elements); any other is taken to be a mean
            over samples.
        weight: for a loss whose mean is over something else: a function of the targets that gives what the
            mean
            divides by.
        eval_fraction: of a plain dataset, the share at its end that is held out.
        output: name or position of the tensor to train on, where the model returns several.
        inputs, targets: names or positions in the batch, where it is no pair.
        class_weights: of cross-entropy, where no ``loss`` is given: a list, one for each class.
        label_smoothing: of cross-entropy, where no ``loss`` is given: the share of each label that is spread
            over all classes.
        sample_weight: the column of a batch with one weight for each sample, or a function of the batch. The
            mean divides by the summed weights; a loss of your own must return one number for each sample.

    Raises:
        ConfigError: a model, dataset or loss that cannot be used; the message says what to do.
        DataError: nothing to train on.
    """

    _samples = SampleWeights(None)  # for a subclass with a constructor of its own

    def __init__(
        self,
        model: Any,
        data: Any,
        loss: Any = None,
        weight: WeightFunction | None = None,
        eval_fraction: float = 0.0,
        output: str | int | None = None,
        inputs: str | int | None = None,
        targets: str | int | None = None,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        sample_weight: str | int | Callable[[Batch], Tensor] | None = None,
    ) -> None:
        if (inputs is None) != (targets is None):
            raise ConfigError("task.inputs and task.targets go together: give both, or neither.")
        self._output, self._names = output, (inputs, targets)
        self._factory = check_factory(model)
        self.train_data, self.eval_data = find_splits(data, eval_fraction)
        self._collate = getattr(data, "collate", None)
        self._collates_deterministically = self._collate is None or declares(
            data, "deterministic_collate", "collate"
        )
        self._samples = SampleWeights(sample_weight)
        if class_weights is not None or label_smoothing:
            loss = _cross_entropy(loss, class_weights, label_smoothing)
        self._loss = SummedLoss(loss, weight, self._samples.are_given)
        self.variable_length = declared_length(data)

    def build_model(self) -> nn.Module:
        return make_model(self._factory)

    def collate(self, samples: list[Any]) -> Batch:
        return self._collate(samples) if self._collate is not None else super().collate(samples)

    @property
    def collates_deterministically(self) -> bool:
        own = type(self).collate is Supervised.collate
        return self._collates_deterministically if own else super().collates_deterministically

    @property
    def counts_samples(self) -> bool:  # type: ignore[override]
        return self._loss.kind == "samples" and not self._samples.are_given

    @property
    def collates_by_default(self) -> bool:
        return self._collate is None and type(self).collate is Supervised.collate

    def count_samples(self, batch: Batch) -> int | None:
        try:
            inputs, targets = self._pair(batch)
            return samples_in(targets, inputs)
        except ConfigError:
            return None

    def weight(self, batch: Batch) -> Weights:
        inputs, targets = self._pair(batch)
        weight = self._loss.weight(targets, inputs, self._weights(batch, inputs, targets))
        return weight.item() if isinstance(weight, Tensor) else weight

    def loss_sum(self, model: nn.Module, batch: Batch) -> LossSum:
        inputs, targets = self._pair(batch)
        samples = self._weights(batch, inputs, targets)
        return self._loss.sum(self._scores(model(inputs)), targets, inputs, samples)

    def represent(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """For ``gradient=cached``: what the loss compares, outputs and targets, one row for each sample, with its
        weight, float64 ``[B]``, where samples have one."""
        inputs, targets = self._pair(batch)
        rows = {"outputs": self._scores(model(inputs)), "targets": targets}
        weights = self._weights(batch, inputs, targets)
        return rows if weights is None else {**rows, "weights": weights}

    def window_loss(self, rows: Mapping[str, Any]) -> LossSum:
        """The loss over all outputs and targets of a window: one that is a mean over them need not be a sum."""
        return self._loss.sum(rows["outputs"], rows["targets"], samples=rows.get("weights"))

    def eval_metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, LossSum]:
        """``accuracy``, where targets are class numbers and outputs are scores ``[B, classes, ...]``."""
        inputs, targets = self._pair(batch)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
            return {}
        if self._loss.kind == "elements":
            return {}
        scores = self._scores(model(inputs))
        if not isinstance(scores, Tensor) or scores.shape[:1] + scores.shape[2:] != targets.shape:
            return {}
        correct = scores.argmax(dim=1) == targets
        if self._loss.ignore_index is None:
            return {"accuracy": (correct.sum(), targets.numel())}
        counted = targets != self._loss.ignore_index
        return {"accuracy": ((correct & counted).sum(), counted.sum())}

    def _pair(self, batch: Batch) -> tuple[Any, Any]:
        return pair_of(self._samples.without_column(batch), *self._names)

    def _weights(self, batch: Batch, inputs: Any, targets: Any) -> Tensor | None:
        return self._samples.of(batch, samples_in(targets, inputs)) if self._samples.are_given else None

    def _scores(self, outputs: Any) -> Any:
        """What the loss is given: one tensor for PyTorch's own losses, the outputs as they are for any other."""
        if self._output is None and not self._loss.needs_tensor:
            return outputs
        return scores_of(outputs, self._output, "supervised")


def _cross_entropy(loss: Any, class_weights: Sequence[float] | None, label_smoothing: float) -> nn.Module:
    """Raises:
    ConfigError: another loss is given beside what is said of cross-entropy.
    """
    if loss is not None:
        raise ConfigError(
            "task.class_weights and task.label_smoothing are of cross-entropy, the loss without loss=..., "
            "but a loss is given too. Give them to it: loss={_target_: torch.nn.CrossEntropyLoss, "
            "label_smoothing: 0.1}."
        )
    weights = None if class_weights is None else checked_class_weights(class_weights)
    if isinstance(weights, dict):
        raise ConfigError(f"task.class_weights={class_weights} must be a list, one for each class.")
    return nn.CrossEntropyLoss(
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=checked_smoothing(label_smoothing),
    )
