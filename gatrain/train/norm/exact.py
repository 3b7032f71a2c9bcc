"""BatchNorm over the whole window: `gatrain.train.gradient.exact_norm` computes it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatrain.errors import ConfigError
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.exact_norm import ACTIVATIONS, ExactNorm, layered_times
from gatrain.train.modules import batch_norms
from gatrain.train.norm import Normalisation, counted
from gatrain.train.norm.convert import nothing_to_do, replaced


class AnyBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Exact(Normalisation):
    """BatchNorm over the whole window, across micro-batches and ranks, forward and backward.

    Args:
        activations: which are held at once. ``window``: those of all micro-batches of a rank, each of which is then
            computed once. ``micro_batch``: those of one, with passes for each layer instead. ``auto``: the first
            where they fit on the device and in main memory, else the second.
    """

    exact = ExactNorm.exact

    def __init__(self, activations: str = "auto") -> None:
        if activations not in ACTIVATIONS:
            raise ConfigError(f"norm.activations={activations!r} is none of {', '.join(ACTIVATIONS)}.")
        self._activations = activations

    def convert(self, model: nn.Module) -> nn.Module:
        """SyncBatchNorm would reduce by itself; its statistics are over all ranks here too."""
        names = [
            name for name in batch_norms(model) if isinstance(model.get_submodule(name), nn.SyncBatchNorm)
        ]
        return replaced(model, names, _unsynchronised)

    def mixing(self, model: nn.Module) -> list[str]:
        return []

    def strategy(self) -> GradientStrategy:
        return ExactNorm(self._activations)

    def remarks(self, model: nn.Module) -> list[str]:
        names = batch_norms(model)
        if not names:
            return [nothing_to_do("norm=exact")]
        times = f"about {layered_times(len(names)):.0f} times the passes of norm=keep"
        said = (
            f"norm=exact: {counted(names)} normalise over all samples of a step, exactly, across micro-batches and "
            "ranks. "
        )
        if self._activations == "micro_batch":
            said += f"For that each micro-batch goes forward up to each layer twice, once with a backward: {times}."
        elif self._activations == "window":
            said += "Each micro-batch is computed once; the activations of all of a rank's are held at once."
        else:
            said += (
                "Where the activations of all micro-batches of a rank fit on the device and in main memory, each "
                f"is computed once; else layer by layer, {times}. The first step says which."
            )
        return [said]


def _unsynchronised(norm: _BatchNorm) -> nn.Module:
    made = AnyBatchNorm(0, norm.eps, norm.momentum, affine=False, track_running_stats=False)
    made.__dict__.update(
        {key: value for key, value in vars(norm).items() if key in AnyBatchNorm.__constants__}
    )
    made._parameters.update(norm._parameters)
    made._buffers.update(norm._buffers)
    return made
