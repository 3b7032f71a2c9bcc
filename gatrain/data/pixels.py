"""One image file -> pixels in their real range, or the reason why not. Nothing in a file is executed."""

from __future__ import annotations

import errno
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gatrain.data.folders import shown
from gatrain.errors import BrokenSampleError, DataError, is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".webp", ".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx",
    ".jpf", ".j2c", ".jpc", ".tga", ".pcx", ".ico", ".qoi", ".sgi", ".dds",
})  # fmt: skip
"""Endings of names that are read as images; what the file holds decides how."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000", "QOI", "DDS")
"""What Pillow may decode here: EPS, which it gives to Ghostscript to execute, and what needs helpers are not."""
FORMATS_BY_NAME = {".dib": "DIB", ".tga": "TGA", ".pcx": "PCX", ".ico": "ICO", ".sgi": "SGI"}
"""Formats whose first bytes tell too little: rubbish could be taken for one."""

ALPHA = "images with transparency, laid on white"
DEEP = "images of more than 8 bits a channel, read as floating point"
CUT = "colour images of 16 bits a channel, read at 8"
FRAMES = "images of several frames, of which the first is read"
ROTATED = "images turned upright, as their EXIF orientation says"
ODD_EXIF = "images with damaged EXIF data, taken to be upright"

_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 274
_SIGNED, _WHITE_IS_ZERO = 2, 0
_HEADS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the image. Fetch it: git lfs pull",
    b"<": "it holds text (HTML or XML), not an image",
    b"{": "it holds text (JSON), not an image",
    b"%!PS": "it is PostScript, a program that gatrain does not execute",
    b"%PDF": "it is a PDF",
    b"PK": "it is a zip archive",
}
_LIBRARIES = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
_SUFFIX_NEEDS = {".avif": "AVIF", ".avifs": "AVIF", ".webp": "WEBP", ".jp2": "JPEG2000", ".j2k": "JPEG2000"}
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def read_image(path: str | Path, broken: str = "stop", remarks: list[str] | None = None) -> Image | Tensor:
    """The image as it is seen, upright: a Pillow image in mode RGB, or float32 ``[3, H, W]`` in 0..1 where 8 bits
    would lose what the file holds.

    Args:
        broken: ``skip`` has the sample skipped, where it is one; ``stop`` gives advice.
        remarks: is given what is remarkable about it, in the words of the report.

    Raises:
        BrokenSampleError: names the file and says why it cannot be read, or why its range is not known.
        DataError: the operating system does not let it be read.
    """
    _silence_pillow()
    try:
        return _read(Path(path), remarks)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            reason = error.strerror or str(error)
            raise DataError(
                f"cannot read the image {shown(path)}: {reason}. Check the file and its permissions."
            ) from error
        what = f"cannot read the image {shown(path)}: {_reason(Path(path), error)}"
        if broken == "skip":
            raise BrokenSampleError(what, skip=True) from error
        advice = "Replace that file, or leave such images out with data.broken=skip"
        raise BrokenSampleError(f"{what}. {advice}.") from error


def has_image_name(path: str) -> bool:
    """Whether a file counts as an image by the ending of its name, or, where that is no usual one, by its first
    bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES:
        return _SUFFIX_NEEDS.get(suffix, "JPEG") in _formats()
    if suffix[1:].isalpha() and len(suffix) <= 6:  # .txt, .json: the ending says what it is
        return False
    try:
        with open(path, "rb") as file:
            return _is_image_head(file.read(16))
    except OSError:
        return False


def look_at(path: str | Path) -> list[str]:
    """What the head of a file tells that is remarkable; nothing of one that cannot be read."""
    _silence_pillow()
    try:
        with Path(path).open("rb") as file, _opened(file, Path(path)) as image:
            return [*_cut(image), *_remarks(image)]
    except Exception:  # told of by `read_image`
        return []


def _read(path: Path, remarks: list[str] | None) -> Image | Tensor:
    with path.open("rb") as file, _opened(file, path) as image:
        found = _cut(image)  # told by how it will be decoded
        image.load()  # first: what asks for EXIF data may load as well, and hide that it failed
        if remarks is not None:
            remarks += [*found, *_remarks(image)]
            image.load()  # looking for further frames leaves the first
        _turn_upright(image)
        if image.mode in (*_GREY_16, "I", "F"):
            return _deep(image)
        if image.has_transparency_data:
            return _on_white(image)
        if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
            raise _RangeError(f"its mode {image.mode} has no known way to red, green and blue")
        if _tag(image, _SAMPLE_FORMAT) == _SIGNED:
            raise _RangeError("its numbers are signed, so that black and white are not known")
        return image.convert("RGB")


def _opened(file: IO[bytes], path: Path) -> Image:
    from PIL import Image as pillow

    by_name = FORMATS_BY_NAME.get(path.suffix.lower())
    return pillow.open(file, formats=[*_formats(), *([by_name] if by_name else [])])


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow decodes."""
    from PIL import Image as pillow
    from PIL import features

    pillow.init()
    lacking = {name for name, library in _LIBRARIES.items() if not features.check(library)}
    return tuple(name for name in FORMATS if name in pillow.OPEN and name not in lacking)


class _RangeError(Exception):
    """The file is whole, but what its numbers mean is not known."""


def _turn_upright(image: Image) -> None:
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data is of no use to anybody; the pixels are whole
        return
    if orientation in range(2, 9):
        ImageOps.exif_transpose(image, in_place=True)


def _deep(image: Image) -> Tensor:
    """Grey of more than 8 bits by the range of its format, never by that of one image: 0..1, float32."""
    numbers = np.asarray(image)
    if image.mode == "F":
        low, high = float(numbers.min()), float(numbers.max())
        if not (np.isfinite(numbers).all() and low >= 0 and high <= 1):
            raise _RangeError(
                f"its floating-point numbers go from {low:g} to {high:g}, and which are black and white is not "
                "known. Scale them to 0..1"
            )
        scaled = numbers.astype(np.float32)
    else:
        bits = _bits(image, numbers)
        scaled = (numbers.astype(np.float64) / (2**bits - 1)).astype(np.float32)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 1 - scaled
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled[numbers == clear] = 1  # laid on white
    return torch.from_numpy(np.ascontiguousarray(scaled)).expand(3, -1, -1).contiguous()


def _bits(image: Image, numbers: Any) -> int:
    """Bits of an image of unsigned integers."""
    bits = _tag(image, _BITS)
    low, high = int(numbers.min()), int(numbers.max())
    known = image.mode in _GREY_16 or (image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000"))
    if image.format == "TIFF":
        known = bits in (12, 16) and _tag(image, _SAMPLE_FORMAT) != _SIGNED
    bits = bits if image.format == "TIFF" and bits else 16
    if not known or low < 0 or high >= 2**bits:
        raise _RangeError(
            f"its integers go from {low} to {high}, and which are black and white is not known. Save it with 16 "
            "bits without sign, or scaled to 8 bits"
        )
    return int(bits)


def _on_white(image: Image) -> Image:
    from PIL import Image as pillow

    seen = image.convert("RGBA")
    white = pillow.new("RGBA", seen.size, (255, 255, 255, 255))
    return pillow.alpha_composite(white, seen).convert("RGB")


def _cut(image: Image) -> list[str]:
    is_deep = any(";16" in str(getattr(tile, "args", tile)) for tile in getattr(image, "tile", ()))
    return [CUT] if is_deep and image.mode not in (*_GREY_16, "I", "F") else []


def _remarks(image: Image) -> list[str]:
    found = []
    if image.has_transparency_data:
        found.append(ALPHA)
    if image.mode in (*_GREY_16, "I", "F"):
        found.append(DEEP)
    if getattr(image, "is_animated", False):
        found.append(FRAMES)
    if image.format == "PNG" and "exif" not in image.info:
        return found  # Pillow would read the whole file for it
    try:
        if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
            found.append(ROTATED)
    except Exception:
        found.append(ODD_EXIF)
    return found


def _tag(image: Image, number: int) -> int | None:
    """One number of a TIFF's tags; None where there is none."""
    value = getattr(image, "tag_v2", {}).get(number)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _reason(path: Path, error: Exception) -> str:
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if isinstance(error, _RangeError):
        return str(error)
    if isinstance(error, pillow.DecompressionBombError):
        counts = [f"{int(number):,}" for number in re.findall(r"\d+", str(error))]
        return (
            f"its {counts[0]} pixels are more than the {counts[-1]} that are decoded (a decompression bomb?)"
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        head = b"?"
    if not head:
        return "it is empty (0 bytes)"
    for start, words in _HEADS.items():
        if head.lstrip().startswith(start):
            return words
    if isinstance(error, UnidentifiedImageError):
        return "it is none of the image formats that are read, or its head is damaged"
    return str(error).rstrip(".") or type(error).__name__


def _is_image_head(head: bytes) -> bool:
    starts = (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF8",
        b"II*\0",
        b"MM\0*",
        b"\0\0\0\x0cjP  ",
        b"\xff\x4f\xff\x51",
    )
    return (
        head.startswith(starts)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
    )


def _silence_pillow() -> None:
    """Pillow's warnings name no file, and what matters of them is an error or in the report."""
    if _QUIET not in warnings.filters:  # whoever keeps and restores filters may have dropped it
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
