"""BatchNorm replaced by layers of other statistics: each sample's own, those of a trained model, or all ranks'.

Only layers that normalise by the batch are replaced; those that come in evaluation mode mix nothing. Names of
modules and parameters stay, and the trained scale and shift are carried over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gatrain.errors import ConfigError
from gatrain.train.modules import batch_norms, is_scripted_norm, scripted_text
from gatrain.train.norm import Normalisation, counted
from gatrain.train.norm.keep import Keep

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers whose forward is known; a subclass of them may do more than normalise."""
GROUPS = 32
"""Of GroupNorm, at most, as in Wu and He 2018 (arXiv 1803.08494)."""
LEAST_CHANNELS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 16}
"""Of a group, where the channels allow it: a layer that may see one value for each channel normalises few else."""


class SampleNorm(nn.GroupNorm):
    """GroupNorm that refuses groups of a single value, which would all become zero."""

    def forward(self, input: Tensor) -> Tensor:
        """
        Args:
            input: shape [samples, channels, ...].
        """
        if input.shape[1:].numel() <= self.num_groups:
            raise ConfigError(
                f"GroupNorm of {self.num_groups} groups got samples of shape {list(input.shape[1:])}: a group "
                "would be one value, which normalising makes zero. Use norm=layer, norm=keep, or fewer groups by "
                "norm='{name: group, groups: N}'."
            )
        return super().forward(input)


class _PerSample(Normalisation):
    exact = "the gradient of the converted model over the whole window: each sample is normalised by itself"

    def __init__(self) -> None:
        self._names: list[str] = []

    def groups_of(self, norm: _BatchNorm) -> int:
        raise NotImplementedError

    def convert(self, model: nn.Module) -> nn.Module:
        self._names = convertible(model, self._key)
        return replaced(model, self._names, self._converted)

    def _converted(self, norm: _BatchNorm) -> nn.Module:
        made = SampleNorm(self.groups_of(norm), norm.num_features, norm.eps, affine=False)
        made.affine, made.weight, made.bias = norm.affine, norm.weight, norm.bias
        return made

    @property
    def _key(self) -> str:
        return f"norm={type(self).__name__.lower()}"

    def remarks(self, model: nn.Module) -> list[str]:
        if not self._names:
            return [nothing_to_do(self._key)]
        layers = [m for m in model.modules() if isinstance(m, SampleNorm)]
        fewest, most = min(layer.num_groups for layer in layers), max(layer.num_groups for layer in layers)
        groups = f"{fewest} to {most} groups" if fewest < most else f"{most} group{'s' * (most > 1)}"
        return [
            f"{self._key}: {counted(self._names)} became GroupNorm of {groups}, which depends on no split. Scale "
            "and shift were carried over; running statistics are gone, so weights that were trained with BatchNorm "
            "have to be trained on."
        ]


class Group(_PerSample):
    """GroupNorm: each sample by itself, over groups of channels.

    Args:
        groups: of every layer; by default the most up to 32 that divide the channels and leave two in each (16 for
            ``BatchNorm1d``), or a single one.
    """

    def __init__(self, groups: int | None = None) -> None:
        super().__init__()
        if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
            raise ConfigError(f"norm.groups={groups!r} is not a whole number of at least 1.")
        self._groups = groups

    def groups_of(self, norm: _BatchNorm) -> int:
        channels = norm.num_features
        if self._groups is None:
            least = LEAST_CHANNELS.get(type(norm), 2)
            return max(
                (g for g in range(1, GROUPS + 1) if channels % g == 0 and channels // g >= least), default=1
            )
        if channels % self._groups:
            raise ConfigError(
                f"norm.groups={self._groups} does not divide the {channels} channels of a BatchNorm layer. Leave "
                "groups out: gatrain then takes a number that divides each layer's."
            )
        return self._groups


class Layer(_PerSample):
    """LayerNorm over channels and positions of each sample: GroupNorm of one group."""

    def groups_of(self, norm: _BatchNorm) -> int:
        return 1


class Instance(_PerSample):
    """InstanceNorm: each channel of each sample by itself, over its positions: GroupNorm of one channel a group."""

    def groups_of(self, norm: _BatchNorm) -> int:
        return norm.num_features


class FrozenBatchNorm(nn.Module):
    """BatchNorm by its running statistics, in training too; scale and shift are trained. Its state has BatchNorm's
    names."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, input: Tensor) -> Tensor:
        """
        Args:
            input: shape [samples, channels, ...].
        """
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class Frozen(Normalisation):
    """BatchNorm with the running statistics that the model comes with, for good: for fine-tuning."""

    exact = "the gradient of the model with fixed statistics over the whole window"

    def __init__(self) -> None:
        self._names: list[str] = []

    def convert(self, model: nn.Module) -> nn.Module:
        self._names = convertible(model, "norm=frozen")
        for name in self._names:
            if model.get_submodule(name).running_mean is None:
                raise ConfigError(
                    f"norm=frozen: BatchNorm ('{name}') has no running statistics to freeze (track_running_stats="
                    "False). Use norm=keep or norm=group."
                )
        return replaced(model, self._names, FrozenBatchNorm)

    def remarks(self, model: nn.Module) -> list[str]:
        if not self._names:
            return [nothing_to_do("norm=frozen")]
        return [
            f"norm=frozen: {counted(self._names)} normalise by the running statistics that the model comes with, "
            "which do not move; scale and shift are trained. That is for trained weights: the statistics of a new "
            "model (mean 0, variance 1) normalise nothing."
        ]


class Sync(Keep):
    """SyncBatchNorm: one micro-batch of all ranks together. Not over the window."""

    exact = (
        "the gradient of Ghost BatchNorm over one micro-batch of all ranks, not of BatchNorm over the window"
    )

    def convert(self, model: nn.Module) -> nn.Module:
        names = convertible(model, "norm=sync")
        return replaced(model, names, nn.SyncBatchNorm.convert_sync_batchnorm)

    def remarks(self, model: nn.Module) -> list[str]:
        return [] if batch_norms(model) else [nothing_to_do("norm=sync")]


def convertible(model: nn.Module, key: str) -> list[str]:
    """Names of the layers that normalise by the batch.

    Raises:
        ConfigError: one of them is no plain BatchNorm.
    """
    names = batch_norms(model)
    for name in names:
        module = model.get_submodule(name)
        if is_scripted_norm(module):
            raise ConfigError(scripted_text(key, name))
        if type(module) not in CONVERTED:
            raise ConfigError(
                f"{key}: '{name}' is a {type(module).__module__}.{type(module).__qualname__}, a kind of BatchNorm "
                "whose forward may do more than normalise, so it cannot be converted. Let the model be made with "
                "another layer (many take norm_layer=), or use norm=keep or norm=exact."
            )
    return names


def replaced(model: nn.Module, names: list[str], made: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """The model with other modules in the places of those named, in every place where they stand."""
    others = {}
    for name in names:
        norm = model.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        with torch.no_grad():
            others[id(norm)] = made(norm).train(norm.training)
    if id(model) in others:
        return others[id(model)]
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and id(child) in others:
                module._modules[key] = others[id(child)]
    return model


def nothing_to_do(key: str) -> str:
    """What is said where a model has no layer to convert."""
    return f"{key} changes nothing: no layer of the model normalises by its batch."
