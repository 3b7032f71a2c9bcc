"""BatchNorm stays as it is: Ghost BatchNorm, with running statistics that move once for each window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from gatrain.errors import ConfigError
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import batch_norms, is_scripted_norm, scripted_text
from gatrain.train.norm import Normalisation

if TYPE_CHECKING:
    from gatrain.train.step import Step


class Torch(Normalisation):
    """BatchNorm as PyTorch computes it in a loop: each micro-batch moves the running statistics by the whole
    momentum, so that K of them forget the past K times as fast."""

    exact = "the gradient of Ghost BatchNorm; running statistics depend on the number of micro-batches"
    running_statistics = (
        "Each micro-batch moves the running statistics by the whole momentum, so they depend on the split too: "
        "norm=keep corrects that."
    )


class Keep(Normalisation):
    """BatchNorm over micro-batches, with the momentum m of running statistics as 1 - (1 - m)^(n / N) for a
    micro-batch of n among the N samples of this rank's window: whatever the split, a window leaves (1 - m) of what
    was before.

    InstanceNorm's, where it keeps some, move alike. One micro-batch alone has m itself. ``momentum=None``, the mean
    over all batches, is left as it is.
    """

    exact = "the gradient of Ghost BatchNorm over micro-batches, another model than BatchNorm over the window"
    running_statistics = (
        "Running statistics move by their momentum once for each window, in shares of its micro-batches."
    )

    def __init__(self) -> None:
        self._momenta: list[tuple[_NormBase, float]] = []
        self._scripted: list[str] = []

    def attach(self, step: Step) -> None:
        names = batch_norms(step.model)
        norms = {step.model.get_submodule(name) for name in names}
        self._scripted = [name for name in names if is_scripted_norm(step.model.get_submodule(name))]
        self._momenta = [
            (m, m.momentum)
            for m in step.model.modules()
            if isinstance(m, _NormBase) and m.momentum is not None and (m in norms or _tracks_instances(m))
        ]
        if self._momenta or self._scripted:
            step.before_micro_step.append(self._share_momentum)

    def _share_momentum(self, window: LoadedWindow, k: int) -> None:
        share = share_of(window, k)
        if self._scripted and share != 1:
            raise ConfigError(scripted_text("norm=keep with several micro-batches", self._scripted[0]))
        for module, momentum in self._momenta:
            module.momentum = corrected(momentum, share)


def _tracks_instances(module: _NormBase) -> bool:
    return isinstance(module, _InstanceNorm) and module.training and module.running_mean is not None


def share_of(window: LoadedWindow, k: int) -> float:
    """Micro-batch ``k``'s part of this rank's samples of the window; equal parts where nobody counted them."""
    sizes = [micro.samples for micro in window.micro_batches]
    known = [size for size in sizes if size is not None]
    total = sum(known)
    return known[k] / total if total and len(known) == len(sizes) else 1 / len(sizes)


def corrected(momentum: float, share: float) -> float:
    """The momentum of a part of a window, so that all parts leave ``1 - momentum`` of what was before."""
    return momentum if share == 1 else 1 - (1 - momentum) ** share
