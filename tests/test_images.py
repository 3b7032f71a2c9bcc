"""Images as people have them: every format in its real range, and what cannot be read named, counted, skipped."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from gatrain.data import ImageFolderData, folders, image_folder, pixels
from gatrain.data.pixels import read_image
from gatrain.errors import BrokenSampleError, ConfigError, DataError


def picture(path: Path, value: int = 100, size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)
    return path


def classes(root: Path, names: str = "cat,dog", count: int = 6, suffix: str = "png") -> Path:
    for place, name in enumerate(names.split(",")):
        for nth in range(count):
            picture(root / name / f"{nth}.{suffix}", 10 + 20 * nth + place)
    return root


def seen(path: Path) -> np.ndarray[Any, Any]:
    """Float ``[3, H, W]`` in 0..1, whatever kind of image it is."""
    found = read_image(path)
    if isinstance(found, Tensor):
        assert found.dtype == torch.float32
        return found.numpy()
    assert found.mode == "RGB"
    return np.asarray(found).transpose(2, 0, 1) / 255


def left_out(data: ImageFolderData) -> dict[str, int]:
    return {each.what: each.count for each in data.report.omissions}


GREY16 = np.array([[0, 319], [32768, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_grey_of_16_bits_keeps_its_range_and_its_steps(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(GREY16).save(path)
    np.testing.assert_allclose(seen(path), np.broadcast_to(GREY16 / 65535, (3, 2, 2)), rtol=1e-6)


def test_other_deep_images_keep_their_range_or_are_refused_with_the_range_that_was_found(
    tmp_path: Path,
) -> None:
    Image.frombytes("I;16B", (2, 2), GREY16.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    np.testing.assert_allclose(seen(tmp_path / "b.tif")[0], GREY16 / 65535, rtol=1e-6)
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 1000\n" + struct.pack(">HH", 0, 500))
    np.testing.assert_allclose(seen(tmp_path / "x.pgm")[0], [[0, 0.5]], atol=1e-4)
    inverted = tmp_path / "inverted.tif"
    Image.fromarray(GREY16).save(inverted, tiffinfo={262: 0})
    np.testing.assert_allclose(seen(inverted)[0], 1 - GREY16 / 65535, atol=1e-6)
    Image.fromarray(np.array([[0.25, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    np.testing.assert_allclose(seen(tmp_path / "f.tif")[1], [[0.25, 1.0]])
    for name, numbers, words in (
        ("f255.tif", np.array([[0, 255]], dtype=np.float32), "from 0 to 255"),
        ("below.tif", np.array([[-0.5, 0.5]], dtype=np.float32), "from -0.5 to 0.5"),
        ("nan.tif", np.array([[np.nan, 0.5]], dtype=np.float32), "nan"),
        ("i32.tif", np.array([[0, 70000]], dtype=np.int32), "from 0 to 70000"),
    ):
        Image.fromarray(numbers).save(tmp_path / name)
        with pytest.raises(BrokenSampleError, match=f"{name}: its .*{words}"):
            read_image(tmp_path / name)


def test_palettes_alpha_cmyk_and_one_bit_are_read_as_they_are_seen(tmp_path: Path) -> None:
    red = (255, 0, 0)
    Image.new("RGB", (2, 2), red).quantize(4).save(tmp_path / "p.png")
    assert seen(tmp_path / "p.png")[:, 0, 0].tolist() == [1, 0, 0]
    Image.new("1", (2, 2), 1).save(tmp_path / "one.png")
    assert seen(tmp_path / "one.png").min() == 1
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    assert seen(tmp_path / "c.tif")[:, 0, 0].tolist() == [1, 0, 0]
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    half.save(tmp_path / "rgba.png")
    half.convert("LA").save(tmp_path / "la.png")
    for name in ("rgba.png", "la.png"):
        np.testing.assert_allclose(seen(tmp_path / name), 0.8, atol=0.01)
    clear = Image.new("P", (2, 2), 0)
    clear.putpalette([0, 0, 0, 255, 0, 0])
    clear.save(tmp_path / "clear.png", transparency=0)
    assert seen(tmp_path / "clear.png").min() == 1
    rgb16 = np.full((1, 2, 3), 0x8000, dtype=">u2")
    (tmp_path / "rgb16.png").write_bytes(png(2, 1, 16, 2, rgb16.tobytes()))
    np.testing.assert_allclose(seen(tmp_path / "rgb16.png"), 0.5, atol=0.003)
    remarks: list[str] = []
    read_image(tmp_path / "rgb16.png", remarks=remarks)
    assert remarks == pixels.look_at(tmp_path / "rgb16.png") == [pixels.CUT]
    clear_7 = struct.pack(">I", 2) + b"tRNS\0\x07" + struct.pack(">I", zlib.crc32(b"tRNS\0\x07"))
    (tmp_path / "t.png").write_bytes(png(2, 1, 16, 0, struct.pack(">HH", 7, 0), clear_7))
    assert seen(tmp_path / "t.png")[0].tolist() == [[1, 0]]


def png(width: int, height: int, bits: int, kind: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of raw rows of one height."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + extra
        + chunk(b"IDAT", zlib.compress(b"\0" + rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["rgb.jpg", "grey16.png", "x.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    numbers = np.zeros((4, 6), dtype=np.uint16 if kind == "grey16.png" else np.uint8)
    numbers[0] = np.iinfo(numbers.dtype).max
    image = Image.fromarray(numbers)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / kind, exif=exif)
    upright = [
        numbers, numbers[:, ::-1], numbers[::-1, ::-1], numbers[::-1], numbers.T, numbers.T[:, ::-1],
        numbers.T[::-1, ::-1], numbers.T[::-1],
    ][orientation - 1]  # fmt: skip
    np.testing.assert_allclose(seen(tmp_path / kind)[0] > 0.5, upright > 0)


def test_every_usual_ending_is_read_and_the_first_of_several_frames_is_said(tmp_path: Path) -> None:
    root = classes(tmp_path, suffix="jpg")
    endings = [
        "jfif",
        "JPEG",
        "gif",
        "webp",
        "bmp",
        "tiff",
        "ppm",
        "jp2",
        "tga",
        "ico",
        *(["avif"] * features.check("avif")),
    ]
    for ending in endings:
        picture(root / "cat" / f"x.{ending}", format={"jfif": "JPEG"}.get(ending))
    picture(root / "dog" / "without_ending", format="PNG")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "dog" / "labels.csv").write_text("no image")
    (root / "dog" / "x.heic").write_bytes(b"not read here")
    picture(root / "beside.png")
    data = ImageFolderData(root, size=8, eval_fraction=0)
    assert data.report.classes == {"cat": 6 + len(endings), "dog": 8}
    assert seen(root / "dog" / "moving.gif")[:, 0, 0].tolist() == [1, 0, 0]
    assert left_out(data) == {
        "files that are not read as images, by the ending .csv": 1,
        "files that are not read as images, by the ending .heic": 1,
        "files that are not read as images, by the ending .txt": 1,
        image_folder.NO_CLASS: 1,
        pixels.FRAMES: 1,
    }
    for index in range(len(data.train)):
        assert data.train[index][0].shape == (3, 8, 8)


def test_hidden_folders_are_no_classes_and_links_in_a_circle_give_each_image_once(tmp_path: Path) -> None:
    root = classes(tmp_path / "n")
    (root / ".ipynb_checkpoints").mkdir()
    picture(root / ".ipynb_checkpoints" / "0-checkpoint.png")
    (root / "dog" / "up").symlink_to("../../n")
    (root / "feline").symlink_to("cat")
    data = ImageFolderData(root, size=8, eval_fraction=0.25)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.eval or [])) == (9, 3)
    assert left_out(data) == {folders.HIDDEN_FOLDERS: 1, folders.ABOVE: 1, folders.FOLDER_TWICE: 1}


def test_classes_may_be_links_to_folders_elsewhere(tmp_path: Path) -> None:
    classes(tmp_path / "store", "a,b")
    (tmp_path / "root").mkdir()
    for name in "ab":
        (tmp_path / "root" / f"class_{name}").symlink_to(tmp_path / "store" / name)
    data = ImageFolderData(tmp_path / "root", size=8, eval_fraction=0)
    assert data.report.classes == {"class_a": 6, "class_b": 6}
    assert left_out(data) == {folders.OUTSIDE: 12}


def test_the_report_tells_of_splits_that_share_images_and_of_classes_that_are_not_held_out(
    tmp_path: Path,
) -> None:
    classes(tmp_path / "Train", "cat,dog")
    (tmp_path / "Valid").mkdir()
    (tmp_path / "Valid" / "cat").symlink_to(tmp_path / "Train" / "cat")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    data = ImageFolderData(tmp_path, size=8)
    assert (len(data.train), len(data.eval or [])) == (12, 6)
    assert left_out(data) == {
        "folders beside the splits, not read": 1,
        folders.OUTSIDE: 6,
        image_folder.NOT_HELD_OUT: 1,
        image_folder.BOTH: 6,
    }


@pytest.mark.parametrize(
    ("arrange", "options", "kind", "words"),
    [
        (lambda root: None, {"path": ""}, ConfigError, "data.path= is empty"),
        (lambda root: None, {"path": None}, ConfigError, "data.path is not set"),
        (lambda root: None, {"eval_path": " "}, ConfigError, "data.eval_path= is empty"),
        (lambda root: (root / "hors").mkdir(), {}, DataError, "class folder hors holds no images"),
        (
            lambda root: (root / "m").mkdir() or (root / "m/x.heic").touch(),
            {},
            DataError,
            "none of its 1 files is read",
        ),
        (lambda root: None, {"broken": "skp"}, DataError, "Did you mean 'skip'"),
        (lambda root: classes(root, "train_set,test_set"), {}, DataError, "look like splits"),
        (
            lambda root: picture(root / "val" / "x.png"),
            {"splits": "none", "eval_path": "root/val"},
            DataError,
            "no class",
        ),
        (
            lambda root: picture(root / "e\u0301" / "1.png") and picture(root / "\u00e9" / "1.png"),
            {},
            DataError,
            "NFD",
        ),
        (lambda root: None, {"path": "."}, DataError, "only, root, .* folders cat, dog.*data.path=.*root"),
        (lambda root: None, {"path": "s3://bucket/images"}, ConfigError, "is an address"),
        (
            lambda root: (root / "x.zip").touch(),
            {"path": "x.zip"},
            DataError,
            "is a file, not a folder: unpack it",
        ),
        (lambda root: None, {"path": "rot"}, DataError, "is not a folder. Did you mean 'root'"),
    ],
)
def test_what_is_no_image_folder_is_refused_with_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Callable[[Path], Any],
    options: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    root = classes(tmp_path / "root")
    monkeypatch.chdir(root if options.get("path") == "x.zip" else tmp_path)
    arrange(root)
    with pytest.raises(kind, match=words):
        ImageFolderData(**{"path": root, **options})


def test_folders_named_as_splits_are_classes_if_one_says_so(tmp_path: Path) -> None:
    classes(tmp_path, "train,bus")
    assert ImageFolderData(tmp_path, size=8, splits="none").classes == ["bus", "train"]


# A corpus of broken and hostile files


def jpeg(size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
        stream, kind, **options
    )
    return stream.getvalue()


BOMB = png(65000, 65000, 8, 2, b"\0")
HUGE_TEXT = struct.pack(">I", 200) + b"zTXt" + b"k\0\0" + zlib.compress(b"\0" * 99_000_000)[:197]
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"hello, I am no image", "none of the image formats"),
    "page.jpg": (b"<html><body>404</body></html>", "HTML"),
    "answer.png": (b'{"error": "rate limit"}', "JSON"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "program.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(pwned) print (/tmp/x) (w) file\n",
        "PostScript",
    ),
    "page.tif": (b"%PDF-1.4\n", "PDF"),
    "archive.png": (b"PK\x03\x04rest", "zip"),
    "cut.jpg": (jpeg()[:1500], "truncated"),
    "cut.png": (encoded("PNG")[:1000], "truncated"),
    "cut.gif": (encoded("GIF")[:300], ""),
    "cut.webp": (encoded("WEBP")[:200], ""),
    "cut.tif": (encoded("TIFF")[:200], ""),
    "cut.jp2": (encoded("JPEG2000")[:120], ""),
    "cut.bmp": (encoded("BMP")[:500], "truncated"),
    "head.jpg": (b"\xff\xd8\xff", ""),
    "zeros.png": (bytes(5000), "none of the image formats"),
    "bomb.png": (BOMB, "its 4,225,000,000 pixels are more than"),
    "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20), ""),
    "bomb.bmp": (
        b"BM" + struct.pack("<IIIIiiHHI", 100, 0, 54, 40, 60000, 60000, 1, 24, 0) + bytes(24),
        "pixels are more than",
    ),
    "bomb.ppm": (b"P6 60000 60000 255\n", "pixels are more than"),
    "crc.png": (encoded("PNG").replace(b"IDAT", b"IDAX", 1), ""),
    "flipped.png": (encoded("PNG")[:200] + bytes(100) + encoded("PNG")[300:], ""),
    "none.png": (png(0, 0, 8, 2, b""), ""),
    "text.png": (png(8, 8, 8, 2, bytes(24), HUGE_TEXT), ""),
    "loop.tif": (b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0xFFFF) + bytes(8), ""),
    "signed.tif": (b"", "signed"),
    "rubbish.tga": (bytes(range(256)), ""),
    "rubbish.ico": (b"\0\0\1\0\xff\xff" + bytes(range(200)), ""),
    "rubbish.avif": (b"\0\0\0\x20ftypavif" + bytes(100), ""),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = classes(tmp_path_factory.mktemp("corpus") / "root")
    for name, (content, _) in BROKEN.items():
        (root / "dog" / name).write_bytes(content)
    Image.fromarray(np.array([[1, 2]], dtype=np.int32)).save(root / "dog" / "signed.tif", tiffinfo={339: 2})
    hostile = root / "cat" / "name\x1b[2J\nof two lines.png"
    hostile.write_bytes(b"x")
    os.fsdecode(b"\xff")
    (root / "cat" / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"x")
    return root


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_file_is_named_with_the_reason_and_nothing_of_it_is_executed(
    corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    path = corpus / "dog" / name
    with pytest.raises(BrokenSampleError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"cannot read the image {path}: ")
    assert BROKEN[name][1] in str(caught.value)
    assert "data.broken=skip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_reads_every_file_once_and_lists_all_that_cannot_be_read(corpus: Path) -> None:
    data = ImageFolderData(corpus, size=8)
    report = data.check()
    (found,) = [each for each in report.omissions if each.what == image_folder.UNREADABLE]
    for name in BROKEN:
        assert any(f"/dog/{name}: " in line for line in found.examples), name
    assert found.count == len(found.examples) == len(BROKEN) + 2
    assert found.of == report.files == 12 + len(BROKEN) + 2
    printed = "".join(found.examples)
    assert printed.isprintable()
    assert r"name\x1b[2J\nof two lines.png" in printed
    printed.encode("utf-8")
    assert data.report.files == report.files


def test_check_counts_what_is_remarkable_about_whole_images(tmp_path: Path) -> None:
    root = classes(tmp_path)
    Image.fromarray(GREY16).save(root / "cat" / "deep.png")
    Image.new("RGBA", (8, 8)).save(root / "cat" / "alpha.png")
    exif = Image.Exif()
    exif[274] = 6
    picture(root / "dog" / "turned.jpg", exif=exif)
    picture(root / "dog" / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    found = {each.what: each.count for each in ImageFolderData(root, size=8).check().omissions}
    assert found == {pixels.DEEP: 1, pixels.ALPHA: 1, pixels.ROTATED: 1}


def test_a_file_that_vanishes_is_not_called_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file") as caught:
        read_image(tmp_path / "x.png")
    assert not isinstance(caught.value, BrokenSampleError)


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_an_image_that_is_written_to_after_it_was_found_ends_the_run_whole_or_half(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "CLOCKS_NS", 0)
    root = classes(tmp_path / "root")
    os.utime(root / "dog" / "2.png", (4e9, 4e9))  # a clock that was wrong: in the future before and after
    data = ImageFolderData(root, size=8, eval_fraction=0, broken=broken)
    elsewhere = pickle.loads(pickle.dumps(data.train))
    assert len([elsewhere[place] for place in range(12)]) == 12
    time.sleep(0.02)  # coarse clocks of file systems
    picture(root / "cat" / "1.png", 200)
    (root / "cat" / "2.png").write_bytes((root / "cat" / "3.png").read_bytes()[:40])
    for place in (1, 2):
        with pytest.raises(DataError, match=rf"{place}.png was written to while it was in use") as told:
            elsewhere[place]
        assert not isinstance(told.value, BrokenSampleError)
    assert len([elsewhere[place] for place in range(3, 12)]) == 9
    assert len(ImageFolderData(root, size=8, eval_fraction=0, broken="skip").train[1]) == 2
