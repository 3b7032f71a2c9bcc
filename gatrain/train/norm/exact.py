"""BatchNorm over the whole window: `gatrain.train.gradient.exact_norm` computes it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.exact_norm import ExactNorm, cost_of
from gatrain.train.modules import batch_norms
from gatrain.train.norm import Normalisation, counted
from gatrain.train.norm.convert import nothing_to_do, replaced


class AnyBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Exact(Normalisation):
    """BatchNorm over the whole window, across micro-batches and ranks, forward and backward."""

    exact = ExactNorm.exact

    def convert(self, model: nn.Module) -> nn.Module:
        """SyncBatchNorm would reduce by itself; its statistics are over all ranks here too."""
        names = [
            name for name in batch_norms(model) if isinstance(model.get_submodule(name), nn.SyncBatchNorm)
        ]
        return replaced(model, names, _unsynchronised)

    def mixing(self, model: nn.Module) -> list[str]:
        return []

    def strategy(self) -> GradientStrategy:
        return ExactNorm()

    def remarks(self, model: nn.Module) -> list[str]:
        names = batch_norms(model)
        if not names:
            return [nothing_to_do("norm=exact")]
        cost = cost_of(len(names))
        # a backward takes about two forwards
        times = cost.micro_steps + cost.forwards / 3
        return [
            f"norm=exact: {counted(names)} normalise over all samples of a step, exactly, across micro-batches and "
            f"ranks. For that each micro-batch goes forward up to each layer twice, once with a backward: about "
            f"{times:.0f} times the work of norm=keep. Where a step fits in one micro-batch on one rank "
            "(batch.micro as large as batch.effective) it costs nothing."
        ]


def _unsynchronised(norm: _BatchNorm) -> nn.Module:
    made = AnyBatchNorm(0, norm.eps, norm.momentum, affine=False, track_running_stats=False)
    made.__dict__.update(
        {key: value for key, value in vars(norm).items() if key in AnyBatchNorm.__constants__}
    )
    made._parameters.update(norm._parameters)
    made._buffers.update(norm._buffers)
    return made
