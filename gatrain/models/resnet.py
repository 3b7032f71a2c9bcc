"""Residual networks for images (He et al. 2015, arXiv 1512.03385).

The default norm is GroupNorm (Wu and He 2018, arXiv 1803.08494): it looks at one sample at a time, so the
gradient of an effective batch does not depend on how the batch is split. BatchNorm sees only its micro-batch:
a legitimate model, but another one for each micro-batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gatrain.errors import ConfigError, nearest

NORMS = ("group", "batch")


class SmallResNet(nn.Module):
    """A residual network for small images: float ``[B, in_channels, height, width]`` -> ``[B, classes]``.

    The image is halved between stages; each stage has one width and ``blocks_per_stage`` blocks.
    """

    def __init__(
        self, classes: int, channels: Sequence[int], in_channels: int, blocks_per_stage: int, norm: str
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.stem_norm = make_norm(norm, channels[0])
        self.blocks = nn.ModuleList()
        width = channels[0]
        for stage, next_width in enumerate(channels):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(ResidualBlock(width, next_width, stride, norm))
                width = next_width
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, width: int, next_width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, next_width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, next_width)
        self.conv2 = nn.Conv2d(next_width, next_width, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, next_width)
        same = stride == 1 and width == next_width
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, next_width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(self.shortcut(x) + y)


def small_resnet(
    classes: int,
    channels: Sequence[int] = (32, 64),
    in_channels: int = 1,
    blocks_per_stage: int = 1,
    norm: str = "group",
) -> nn.Module:
    """Make a `SmallResNet`; the defaults suit 8x8 grey images.

    Args:
        classes: number of outputs.
        channels: width of each stage; a multiple of 8 for ``norm="group"``.
        in_channels: 1 for grey, 3 for colour.
        blocks_per_stage: residual blocks of each stage.
        norm: ``group`` (exact under any split) or ``batch``.

    Raises:
        ConfigError: an unknown norm, or sizes below one.
    """
    channels = list(channels)
    sizes = {"classes": classes, "in_channels": in_channels, "blocks_per_stage": blocks_per_stage}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"model.{name}={value} is below 1, the smallest value allowed.")
    if not channels or min(channels) < 1:
        raise ConfigError(f"model.channels={channels} must list one width for each stage, such as [32,64].")
    return SmallResNet(classes, channels, in_channels, blocks_per_stage, norm)


def resnet50(classes: int = 1000, norm: str = "group") -> nn.Module:
    """Make torchvision's ResNet-50 with fresh weights: float ``[B, 3, H, W]`` -> logits ``[B, classes]``.

    Args:
        classes: number of outputs.
        norm: ``group`` (GroupNorm of 32 groups, exact under any split) or ``batch`` (the classic; its
            statistics are those of a micro-batch, so the split is part of the model).

    Raises:
        ConfigError: an unknown norm or no classes.
    """
    if classes < 1:
        raise ConfigError(f"model.classes={classes} is below 1, the smallest value allowed.")
    _check_norm(norm)
    from torchvision.models import resnet50 as torchvision_resnet50  # slow to import: only where it is used

    norm_layer = functools.partial(nn.GroupNorm, 32) if norm == "group" else nn.BatchNorm2d
    model: nn.Module = torchvision_resnet50(weights=None, num_classes=classes, norm_layer=norm_layer)
    return model


def make_norm(norm: str, channels: int) -> nn.Module:
    """The named norm for ``channels`` channels; GroupNorm has 8 channels in a group where they divide."""
    _check_norm(norm)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ConfigError(f"model.norm={norm} is not one of {', '.join(NORMS)}.{nearest(norm, NORMS)}")
