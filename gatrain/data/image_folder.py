"""Images on disk, in one folder for each class, decoded when they are read."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatrain.data import folders
from gatrain.data.fingerprint import content_fingerprint
from gatrain.data.folders import shown, written_to
from gatrain.data.pixels import has_image_name, look_at, read_image
from gatrain.data.report import DataReport, Omission, Omissions
from gatrain.data.splits import splits as find_splits
from gatrain.data.text import check_lengths
from gatrain.errors import BrokenSampleError, DataError, nearest

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet, which torchvision's models expect."""

SPLIT_SEED = 0
LOOKED_AT = 200
"""Images whose heads are read for the report; `ImageFolderData.check` reads all, and whole."""

CLOCKS_NS = 2_000_000_000
"""By how much clocks of a file server and of this machine may differ, in nanoseconds."""

UNREAD = "files that are not read as images, by the ending {}"
OTHER_ENDINGS = "files that are not read as images, by other endings"
MOST_ENDINGS = 8
NO_ENDING = "files without the ending of an image's name"
NO_CLASS = "images that lie in no class folder"
ONE_CLASS = "class only: all images have the same label"
BOTH = "held-out images that are also trained on, by a link"
NOT_HELD_OUT = "classes of which no image is held out"
UNREADABLE = "images that cannot be read"


class Images:
    """Map-style dataset over (path, class) pairs: items are float32 ``[3, size, size]`` with an int class.

    Random crops and flips draw from the global generators only, which the loader seeds for every sample. A file
    that was written to since the run found it ends the run (`DataError`): the next epoch would see other data.

    Args:
        broken: ``stop`` or ``skip``: what becomes of a sample whose file cannot be read (`BrokenSampleError`).
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Any], Tensor],
        deterministic: bool,
        broken: str = "stop",
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.deterministic = deterministic
        self.broken = broken
        self._found_ns = time.time_ns()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = read_image(path, self.broken)
        except BrokenSampleError:
            self._check_unchanged(path)
            raise
        self._check_unchanged(path)
        return self.transform(image), label

    def _check_unchanged(self, path: str) -> None:
        """Whether a file was left alone since it was found, by its own time of change: no state of a million files
        is kept, and a time that lies in the future says nothing. Asked after reading: no write falls between."""
        with contextlib.suppress(OSError):
            written_ns = os.stat(path).st_mtime_ns
            if self._found_ns + CLOCKS_NS < written_ns <= time.time_ns() + CLOCKS_NS:
                raise written_to(Path(path), "images")


class ImageFolderData:
    """Data source: a folder of images in one subfolder a class, or such folders under ``train`` and ``val``.

    Training images get a random resized crop and a random flip; held-out images are resized and cropped at
    the centre. Both are normalised with the channel statistics of ImageNet. Images are turned upright as their EXIF
    orientation says, transparent ones are laid on white, and grey of 16 bits or of floating point in 0..1 keeps its
    range.

    Args:
        path: the folder. Splits in it are known by their usual names (`gatrain.data.splits`); what only looks like
            splits is refused.
        size: height and width of the images that the model sees, in pixels.
        eval_path: folder of the held-out split, if it is elsewhere.
        eval_fraction: share of the images that is held out, where there is no folder for it.
        broken: ``stop`` ends the run at a file that cannot be read; ``skip`` leaves the sample out of its window,
            with weight zero, and counts it.
        splits: ``auto``, or ``none`` where folders called train or test are classes.

    Attributes:
        train, eval: `Images`.
        classes: names of the classes; the number of a class is its place in this list.

    Raises:
        ConfigError: an empty path, or a value that is not allowed.
        DataError: no such folder, no classes or images in it, or other classes in the held-out split.
    """

    variable_length = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int = 224,
        eval_path: str | os.PathLike[str] | None = None,
        eval_fraction: float = 0.05,
        broken: str = "stop",
        splits: str = "auto",
    ) -> None:
        check_lengths(1, eval_fraction)
        if size < 1:
            raise DataError(f"data.size={size} is below 1 pixel. Try data.size=224.")
        _check_one_of("data.broken", broken, ("stop", "skip"))
        _check_one_of("data.splits", splits, ("auto", "none"))
        self._omissions = Omissions()
        self._root = _folder(path, "data.path")
        found = find_splits(self._root, self._omissions) if splits == "auto" else None
        train_folder = found.train if found else self._root
        held_out_folder = found.held_out if found else None
        held_out_name = f"the split {shown(held_out_folder)}" if held_out_folder else ""
        if eval_path is not None:
            held_out_folder = _folder(eval_path, "data.eval_path")
            held_out_name = f"data.eval_path={shown(held_out_folder)}"
        where = "data.path=" if found is None else "the split "
        train = find_images(train_folder, f"{where}{shown(train_folder)}", self._omissions)
        if splits == "auto":
            _refuse_one_level_too_high(train_folder, train, self._omissions)
        self.classes, samples = train.classes, train.samples
        if held_out_folder is not None:
            held_out = self._other_split(held_out_folder, held_out_name, train_folder, train)
        else:
            order = np.random.default_rng(SPLIT_SEED).permutation(len(samples))
            cut = round(len(samples) * (1 - eval_fraction))
            held_out = [samples[i] for i in sorted(order[cut:])]
            samples = [samples[i] for i in sorted(order[:cut])]
        if not samples:
            raise DataError(
                f"data.eval_fraction={eval_fraction} leaves no image to train on. Use a smaller one."
            )
        self._split_names = f", {train_folder.name} and {held_out_folder.name}" if held_out_folder else ""
        train_transform, eval_transform = transforms(size)
        self.train = Images(samples, train_transform, False, broken)
        self.eval = Images(held_out, eval_transform, True, broken) if held_out else None

    def _other_split(
        self, folder: Path, name: str, train_folder: Path, train: Found
    ) -> list[tuple[str, int]]:
        found = find_images(folder, name, self._omissions)
        if unknown := sorted(set(found.classes) - set(self.classes)):
            raise DataError(
                f"{shown(folder)} has classes that {shown(train_folder)} lacks: "
                f"{', '.join(map(shown, unknown[:5]))}. Both splits need folders of the same names."
            )
        for name in self.classes:
            if name not in found.classes:
                self._omissions.add(NOT_HELD_OUT, shown(name))
        for identity in found.identities.keys() & train.identities.keys():
            self._omissions.add(BOTH, shown(found.identities[identity]))
        number = {name: place for place, name in enumerate(self.classes)}
        return [(file, number[found.classes[label]]) for file, label in found.samples]

    @cached_property
    def report(self) -> DataReport:
        """What was found, and what was left out; the heads of some images are read for it."""
        samples = self._all_samples()
        step = max(1, len(samples) // LOOKED_AT)
        remarks = Omissions()
        looked = samples[::step]
        for path, _ in looked:
            for text in look_at(path):
                remarks.add(text, self._name(path))
        of = f" (of {len(looked)} looked at)" if step > 1 else ""
        seen = [replace(each, what=f"{each.what}{of}") for each in remarks.found()]
        return self._report([*self._omissions.found(), *seen])

    def check(self) -> DataReport:
        """Read every file once, whole: the report with all files that cannot be read, each with the reason."""
        samples = self._all_samples()
        remarks, broken = Omissions(), []

        def one(sample: tuple[str, int]) -> tuple[str, list[str], str]:
            found: list[str] = []
            try:
                read_image(sample[0], "skip", found)
            except DataError as error:
                return sample[0], [], str(error)
            return sample[0], found, ""

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoders work outside of Python's lock
            for path, found, problem in pool.map(one, samples):
                for text in found:
                    remarks.add(text, self._name(path))
                if problem:
                    broken.append(problem)
        broken.sort()
        unreadable = [Omission(UNREADABLE, len(broken), tuple(broken), len(samples))] if broken else []
        return self._report([*self._omissions.found(), *remarks.found(), *unreadable])

    def _report(self, omissions: Sequence[Omission]) -> DataReport:
        samples = self._all_samples()
        files = [Path(path) for path, _ in samples]
        counts = Counter(label for _, label in samples)
        return DataReport(
            kind=f"images in class folders{self._split_names}",
            files=len(files),
            size_bytes=sum(file.stat().st_size for file in files),
            items=len(files),
            item_name="images",
            classes={shown(name): counts[place] for place, name in enumerate(self.classes)},
            omissions=tuple(omissions),
            fingerprint=content_fingerprint(files, self._root),
        )

    def _all_samples(self) -> list[tuple[str, int]]:
        return [*self.train.samples, *(self.eval.samples if self.eval is not None else [])]

    def _name(self, path: str) -> str:
        file = Path(path)
        return shown(file.relative_to(self._root) if file.is_relative_to(self._root) else file)


@dataclass(frozen=True)
class Found:
    """What one split's folder holds."""

    classes: list[str]
    samples: list[tuple[str, int]]
    """(file, class number)."""
    identities: dict[Any, str]
    """Each file under what the file system knows it by."""


def find_images(folder: Path, name: str, omissions: Omissions) -> Found:
    """The images of each class, a class being a folder in ``folder``, all that lies below it included.

    Args:
        name: what the folder is called in errors.

    Raises:
        DataError: no class folders, a class without images, or two classes of one name.
    """
    files, identities = folders.walk_names(folder, omissions)
    start = len(os.path.join(str(folder), ""))
    images: dict[str, list[str]] = {
        each.name: [] for each in folders.subfolders(folder) if not each.is_symlink()
    }
    unread: dict[str, list[Path]] = {}
    for name_of_file in files:
        first, _, below = name_of_file[start:].partition(os.sep)
        if not has_image_name(name_of_file):
            unread.setdefault(first if below else "", []).append(Path(name_of_file))
        elif below:
            images.setdefault(first, []).append(name_of_file)
        else:
            omissions.add(NO_CLASS, shown(first))
    _count_unread([file for inside in unread.values() for file in inside], folder, omissions)
    layout = f"Expected one folder a class: {shown(folder)}/cat/1.jpg, {shown(folder)}/dog/2.jpg"
    if not any(images.values()):
        what = "has no images in class folders" if images else "has no class folders"
        raise DataError(f"{name} {what}{omissions.told()}. {layout}.")
    classes = sorted(images, key=folders.by_name)
    for each in classes:
        if not images[each]:
            left_out = f": none of its {len(unread[each])} files is read as one" if each in unread else ""
            raise DataError(
                f"{name}: the class folder {shown(each)} holds no images{left_out}. Move it away, or put images "
                f"in it (all that is left out:{omissions.told() or ' nothing'})."
            )
    for one, other in pairwise(classes):
        if folders.by_name(one)[0] == folders.by_name(other)[0]:
            raise DataError(
                f"{name} has two class folders called {shown(one)}, whose accents are written differently (Unicode "
                "NFC and NFD, as a copy from a Mac gives). Put their images into one folder."
            )
    samples = [(file, place) for place, name in enumerate(classes) for file in images[name]]
    return Found(classes, samples, identities)


def _refuse_one_level_too_high(folder: Path, found: Found, omissions: Omissions) -> None:
    """
    Raises:
        DataError: there is one class only, and in it lie folders as classes do.
    """
    if len(found.classes) == 1:
        omissions.add(ONE_CLASS)
        only = folder / found.classes[0]
        inner = folders.subfolders(only)
        if len(inner) > 1:
            names = ", ".join(shown(each.name) for each in inner[:4])
            raise DataError(
                f"{shown(folder)} has one class folder only, {shown(only.name)}, and in it lie the folders "
                f"{names}: are these the classes? Then write {shlex.quote(f'data.path={only}')}. If all images are "
                "of one class, write data.splits=none."
            )


def _count_unread(files: Sequence[Path], folder: Path, omissions: Omissions) -> None:
    """Files that are no images by their names, by ending."""
    common = [
        suffix for suffix, _ in Counter(file.suffix.lower() for file in files).most_common(MOST_ENDINGS)
    ]
    for file in files:
        suffix = file.suffix.lower()
        kind = (
            NO_ENDING if not suffix else UNREAD.format(shown(suffix)) if suffix in common else OTHER_ENDINGS
        )
        omissions.add(kind, shown(file.relative_to(folder)))


def _folder(value: Any, option: str) -> Path:
    """The folder that is named; one that lies in an archive or is a pattern is not.

    Raises:
        ConfigError: an empty path.
        DataError: it is no folder.
    """
    path = folders.require_path(value, option).absolute()
    if not path.is_dir():
        where = f"{option}={shown(path)}"
        layout = f"Expected one folder a class: {shown(path)}/cat/1.jpg, {shown(path)}/dog/2.jpg."
        if path.is_file():
            raise DataError(f"{where} is a file, not a folder: unpack it if it is an archive. {layout}")
        raise DataError(f"{where} is not a folder.{folders.similar(path)} {layout}")
    return path


def _check_one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise DataError(f"{option}={value} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def transforms(size: int) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """The training and the held-out transform, PIL image or float32 ``[3, H, W]`` -> float32
    ``[3, size, size]``, as in torchvision's reference training: held-out images are resized to 8/7 of ``size`` and
    cropped at the centre."""
    from torchvision.transforms import v2

    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish])
    held_out = v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), *finish])
    return train, held_out
