"""What a loop hands over for one micro-batch: a sum over samples or a mean over them, and its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gatrain.errors import ConfigError
from gatrain.tasks.base import LossSum, named_weights

Losses = Tensor | Mapping[str, Tensor]
Used = Tensor | float | Mapping[str, Tensor | float]

NEEDED = (
    "backward needs the loss by name and its weight: loss_sum=<sum over samples or tokens>, or "
    "mean_loss=<their mean>, and weight=<what the mean divides by>. A mean without its weight cannot be "
    "added to others exactly."
)


def named_terms(loss_sum: Losses | None, mean_loss: Losses | None, weight: Used | None) -> dict[str, LossSum]:
    """The loss terms as sums. A mean of nothing, which is NaN, is left out.

    Raises:
        ConfigError: not exactly one of the two losses, no weight, or other names in one than in the other.
    """
    if (loss_sum is None) == (mean_loss is None) or weight is None:
        raise ConfigError(NEEDED)
    losses: Any = loss_sum if mean_loss is None else mean_loss
    named: dict[str, Tensor] = dict(losses) if isinstance(losses, Mapping) else {"loss": losses}
    weights: dict[str, Any] = named_weights(weight)  # type: ignore[arg-type]
    if named.keys() != weights.keys():
        raise ConfigError(f"the losses are {sorted(named)}, but the weights are {sorted(weights)}.")
    for name, loss in named.items():
        if not isinstance(loss, Tensor) or loss.dim():
            given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigError(
                f"the {name} given to backward has {given}; it must be a tensor with one number."
            )
    if mean_loss is None:
        return {name: (loss, weights[name]) for name, loss in named.items()}
    return {
        name: (loss * weights[name], weights[name]) for name, loss in named.items() if float(weights[name])
    }
