"""Images on disk, in one folder for each class, decoded when they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gatrain.data.text import check_lengths
from gatrain.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet, which torchvision's models expect."""

SPLIT_SEED = 0


class Images:
    """Map-style dataset over (path, class) pairs: items are float32 ``[3, size, size]`` with an int class.

    Random crops and flips draw from the global generators only, which the loader seeds for every sample.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], transform: Callable[[Any], Tensor], deterministic: bool
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.deterministic = deterministic

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error}. Replace or delete that file.") from error
        return self.transform(pixels), label


class ImageFolderData:
    """Data source: a folder of images in one subfolder a class, or such folders under ``train`` and ``val``.

    Training images get a random resized crop and a random flip; held-out images are resized and cropped at
    the centre. Both are normalised with the channel statistics of ImageNet.

    Args:
        path: the folder. If it has a subfolder ``train``, that is the training split, and ``val`` (or
            ``eval``)
            beside it is the held-out split.
        size: height and width of the images that the model sees, in pixels.
        eval_path: folder of the held-out split, if it is elsewhere.
        eval_fraction: share of the images that is held out, where there is no folder for it.

    Attributes:
        train, eval: `Images`.
        classes: names of the classes; the number of a class is its place in this list.

    Raises:
        DataError: no such folder, no classes or images in it, or other classes in the held-out split.
    """

    variable_length = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int = 224,
        eval_path: str | os.PathLike[str] | None = None,
        eval_fraction: float = 0.05,
    ) -> None:
        check_lengths(1, eval_fraction)
        if size < 1:
            raise DataError(f"data.size={size} is below 1 pixel. Try data.size=224.")
        root = Path(path).expanduser()
        train_folder = root / "train" if (root / "train").is_dir() else root
        held_out_folder = None if eval_path is None else Path(eval_path).expanduser()
        if held_out_folder is None and train_folder != root:
            beside = [root / name for name in ("val", "eval", "valid", "validation")]
            held_out_folder = next((folder for folder in beside if folder.is_dir()), None)
        self.classes, samples = find_images(train_folder, "data.path")
        if held_out_folder is not None:
            classes, held_out = find_images(held_out_folder, "data.eval_path")
            if unknown := sorted(set(classes) - set(self.classes)):
                raise DataError(
                    f"{held_out_folder} has classes that {train_folder} lacks: {', '.join(unknown[:5])}. "
                    "Both splits need folders of the same names."
                )
            renumbered = [self.classes.index(name) for name in classes]
            held_out = [(file, renumbered[label]) for file, label in held_out]
        else:
            order = np.random.default_rng(SPLIT_SEED).permutation(len(samples))
            cut = round(len(samples) * (1 - eval_fraction))
            held_out = [samples[i] for i in sorted(order[cut:])]
            samples = [samples[i] for i in sorted(order[:cut])]
        if not samples:
            raise DataError(
                f"data.eval_fraction={eval_fraction} leaves no image to train on. Use a smaller one."
            )
        train_transform, eval_transform = transforms(size)
        self.train = Images(samples, train_transform, deterministic=False)
        self.eval = Images(held_out, eval_transform, deterministic=True) if held_out else None


def find_images(folder: Path, option: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, and (file, class number) of every image, by torchvision's ``ImageFolder``.

    Raises:
        DataError: no folder, no class folders, or a class without images.
    """
    layout = f"Expected one folder a class: {folder}/cat/1.jpg, {folder}/dog/2.jpg."
    if not folder.is_dir():
        raise DataError(f"{option}={folder} is not a folder. {layout}")
    from torchvision.datasets import ImageFolder  # slow to import: only where it is used

    try:
        found = ImageFolder(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{option}={folder}: {str(error).splitlines()[0].rstrip('.')}. {layout}") from None
    return list(found.classes), [(str(file), int(label)) for file, label in found.samples]


def transforms(size: int) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """The training and the held-out transform, PIL image -> float32 ``[3, size, size]``, as in torchvision's
    reference training: held-out images are resized to 8/7 of ``size`` and cropped at the centre."""
    import torch
    from torchvision.transforms import v2

    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish])
    held_out = v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), *finish])
    return train, held_out
