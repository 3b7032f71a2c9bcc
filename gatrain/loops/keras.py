"""`gatrain.accumulate_in_fit`: a Keras 3 model on the torch backend whose ``fit`` accumulates.

The batch that ``fit`` hands over is the window: it is computed in micro-batches, and the optimizer, the
metrics and the callbacks see it as one. So ``batch_size`` is the effective batch, the last batch of an epoch
may be short, and no update is left half-done, as with ``gradient_accumulation_steps`` of Keras's optimizers,
which averages means.
"""

from __future__ import annotations

import itertools
import types
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor

from gatrain.errors import ConfigError, ExactnessError
from gatrain.train.accumulate import accumulate
from gatrain.train.ranks import Ranks

Model = TypeVar("Model")

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative difference between the loss of a whole batch and its micro-batches' that is rounding; of 16 bits
2e-2."""


def accumulate_in_fit(model: Model, micro_batch: int) -> Model:
    """Let ``fit`` and ``train_on_batch`` compute each batch in pieces of at most ``micro_batch`` samples.

    .. code-block:: python

        model = gatrain.accumulate_in_fit(model, micro_batch=8)
        model.compile(optimizer="adam", loss="mse")
        model.fit(x, y, batch_size=64)   # the steps of 64 samples, with the memory of 8

    Exact for losses that are means over the batch: in each step the loss of the whole batch is computed from the
    outputs and compared, so a loss that sums, is masked or compares samples with one another is refused before its
    update. Layers that look at a whole batch (BatchNormalization) see micro-batches, with a warning; Dropout
    is equal in distribution.

    Args:
        model: a `keras.Model` with the ``train_step`` of Keras itself, compiled now or later.
        micro_batch: most samples of a forward and backward.

    Returns:
        The same model.

    Raises:
        ConfigError: another backend than torch, a ``train_step`` of one's own, several processes.
    """
    import keras

    if keras.backend.backend() != "torch":
        raise ConfigError(
            f"Keras runs on {keras.backend.backend()}, but gatrain accumulates on torch. Set "
            f"KERAS_BACKEND=torch before keras is imported."
        )
    if not isinstance(model, keras.Model):
        raise ConfigError(f"accumulate_in_fit takes a keras.Model, not a {type(model).__name__}.")
    if type(model).train_step is not keras.Model.train_step:
        raise ConfigError(
            f"{type(model).__name__} has a train_step of its own, which accumulate_in_fit would replace. Call "
            "gatrain.accumulate in it."
        )
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise ConfigError(f"micro_batch={micro_batch!r} must be a whole number of at least 1.")
    _warn_of_batch_statistics(keras, model)
    model.train_step = types.MethodType(_TrainStep(keras, micro_batch), model)
    return model


class _TrainStep:
    """In the place of ``keras.Model.train_step``."""

    def __init__(self, keras: Any, micro_batch: int) -> None:
        self._keras, self._micro_batch = keras, micro_batch

    def __call__(self, model: Any, data: Any) -> Any:
        tree = self._keras.tree
        x, y, sample_weight = self._keras.utils.unpack_x_y_sample_weight(data)
        total = _samples_in(tree, x)
        _check_compiled(model)
        pieces = [
            tree.map_structure(
                lambda part, rows=slice(a, a + self._micro_batch): None if part is None else part[rows],
                (x, y, sample_weight),
            )
            for a in range(0, total, self._micro_batch)
        ]
        outputs: list[Any] = []
        means: list[Tensor] = []

        def loss_sum(model: Any, piece: Any) -> tuple[Tensor, int]:
            loss, predicted = _forward(model, *piece)
            outputs.append(tree.map_structure(lambda each: each.detach(), predicted))
            count = _samples_in(tree, piece[0])
            means.append(loss.detach() * (count / total))
            return model.optimizer.scale_loss(loss) * count, count

        model.zero_grad()
        accumulate(model, pieces, loss_sum=loss_sum, weight=lambda piece: _samples_in(tree, piece[0]))
        whole = tree.map_structure(lambda *parts: torch.cat(parts), *outputs)
        loss = torch.stack(means).sum()
        _check_is_mean(model, loss, x, y, whole, sample_weight)
        model._loss_tracker.update_state(loss, sample_weight=total)
        weights = model.trainable_weights[:]
        with torch.no_grad():
            model.optimizer.apply([weight.value.grad for weight in weights], weights)
        return model.compute_metrics(x, y, whole, sample_weight=sample_weight)


def _forward(model: Any, x: Any, y: Any, sample_weight: Any) -> tuple[Tensor, Any]:
    predicted = model(x, training=True) if model._call_has_training_arg else model(x)
    loss = model._compute_loss(x=x, y=y, y_pred=predicted, sample_weight=sample_weight, training=True)
    if len(model.losses) > len(model._get_regularization_losses()):
        raise ConfigError(
            "a layer adds a loss of its own over a micro-batch (add_loss, activity_regularizer), which need "
            "not be a mean over samples. Compute it in the model's loss, or write a task: class "
            "MyTask(gatrain.Task)."
        )
    return loss, predicted


@torch.no_grad()
def _check_is_mean(model: Any, loss: Tensor, x: Any, y: Any, whole: Any, sample_weight: Any) -> None:
    """Compare the loss with that of all outputs at once; metrics stay as they are."""
    variables = list(itertools.chain.from_iterable(metric.variables for metric in model.metrics))
    kept = [variable.value.clone() for variable in variables]
    at_once = model._compute_loss(x=x, y=y, y_pred=whole, sample_weight=sample_weight, training=True)
    for variable, value in zip(variables, kept, strict=True):
        variable.assign(value)
    tolerance = TOLERANCE.get(min((loss.dtype, at_once.dtype), key=lambda dtype: dtype.itemsize), 2e-2)
    difference = abs(float(loss) - float(at_once))
    if difference > tolerance * max(abs(float(loss)), abs(float(at_once)), 1e-30):
        raise ExactnessError(
            f"the loss of the whole batch is {float(at_once):g}, but the mean over its micro-batches is "
            f"{float(loss):g}: it is not a mean over the batch's samples (reduction='sum', a mask, or a loss "
            f"that compares samples). Use reduction='sum_over_batch_size' without masks, or "
            f"gatrain.accumulate with your own weights. No update was made."
        )


def _check_compiled(model: Any) -> None:
    """
    Raises:
        ConfigError: it was compiled with what does not go together with micro-batches.
    """
    if getattr(model.optimizer, "gradient_accumulation_steps", None):
        raise ConfigError(
            "the optimizer has gradient_accumulation_steps, which averages the means of unequal batches. "
            "Leave it out: batch_size is the effective batch already."
        )
    if getattr(model, "jit_compile", False):
        raise ConfigError("compile(jit_compile=True) compiles the whole step. Leave it out.")
    if Ranks.current().world_size > 1:
        raise ConfigError(
            "fit knows nothing of other processes: its epochs, metrics and callbacks are this one's. Keep "
            "your own loop with gatrain.Accumulator, or use gatrain fit."
        )


def _samples_in(tree: Any, nested: Any) -> int:
    return int(next(each for each in tree.flatten(nested) if each is not None).shape[0])


def _warn_of_batch_statistics(keras: Any, model: Any) -> None:
    names = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if names:
        warnings.warn(
            f"{', '.join(names[:3])}: BatchNormalization takes its statistics from each micro-batch, so the "
            "step is not that of the whole batch. GroupNormalization and LayerNormalization are exact; so is "
            "trainable=False.",
            stacklevel=3,
        )
