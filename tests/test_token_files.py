"""Laws of token files: every id is looked at once, wrong widths are noticed, shards are one sequence."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Payload

from gatrain import cli
from gatrain.data import TextWindows, token_file, token_scan
from gatrain.data.token_file import TokenFile, open_tokens
from gatrain.errors import DataError

IDS = (np.random.default_rng(0).zipf(1.3, 4000) % 300).astype("uint16")


pytestmark = pytest.mark.usefixtures("own_cache")


def windows(path: Any, **options: Any) -> TextWindows:
    return TextWindows(path, **{"vocab_size": 300, "context": 16, **options})


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def llm_c(ids: np.ndarray[Any, Any], magic: int = 20240520, count: int | None = None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 7 if magic == 20240801 else 1, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()


def megatron_index(sizes: list[int], code: int = 8, version: int = 1) -> bytes:
    pointers = np.cumsum([0, *sizes[:-1]]) * 2
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, len(sizes), len(sizes) + 1)
    tail = np.asarray(sizes, "<i4").tobytes() + pointers.astype("<i8").tobytes()
    return head + tail + np.arange(len(sizes) + 1, dtype="<i8").tobytes()


def with_id(value: int, place: int = 1300) -> bytes:
    ids = IDS.copy()
    ids[place] = value
    return ids.tobytes()


@dataclass(frozen=True)
class Hostile:
    name: str
    content: bytes | Callable[[], bytes]
    message: str
    options: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, bytes] = field(default_factory=dict)


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\0\x76\0" + text.ljust(117) + b"\n"


SHAPE = b"{'descr': '<u2', 'fortran_order': False, 'shape': (%s,)}"
HOSTILE = [
    Hostile("id.bin", with_id(40_000), r"token id 40000 at place 1,300 \(byte 2,600\).*data.vocab_size=40001"),
    Hostile("id.npy", npy(np.append(IDS, [300])), r"token id 300 at place 4,000 "),
    Hostile("negative.npy", npy(np.append(IDS, [-1]).astype("i4")), "token id -1 at place 4,000"),
    Hostile("as32.bin", IDS.astype("uint32").tobytes(), "every second id is 0.*data.token_dtype=uint32"),
    Hostile("as64.bin", IDS.astype("int64").tobytes(), "three of four ids are 0.*data.token_dtype=int64"),
    Hostile("as64_as32.bin", IDS.astype("int64").tobytes(), "data.token_dtype=int64", {"token_dtype": "uint32"}),
    Hostile(
        "large32.bin", (IDS.astype("uint32") * 400).tobytes(), "every second id is 0 or nearly.*token_dtype=uint32",
        {"vocab_size": 128_000},
    ),
    Hostile("as16.bin", IDS.tobytes(), "fit as uint16: data.token_dtype=uint16", {"token_dtype": "uint32"}),
    Hostile("as16_as64.bin", IDS.tobytes(), "fit as uint16", {"token_dtype": "int64"}),
    Hostile("big.bin", IDS.astype(">u2").tobytes(), r"fit as uint16 big-endian: convert.*'>u2'.*'<u2'"),
    Hostile("big32.bin", IDS.astype(">u4").tobytes(), r"every second id is 0.*big-endian uint32: convert.*'>u4'"),
    Hostile("big64.bin", IDS.astype(">i8").tobytes(), r"three of four ids are 0.*big-endian int64"),
    Hostile("version.bin", np.array([20240520, 2, *[0] * 254], "<i4").tobytes() + IDS.tobytes(), "of version 2"),
    Hostile("big_header.bin", np.full(256, 20240520, ">i4").tobytes() + IDS.tobytes(), "big-endian"),
    Hostile("odd.bin", IDS.tobytes()[:-1], "odd.bin as a sequence of uint16.*no multiple of 2.*data.token_dtype"),
    Hostile("empty.bin", b"", "is empty"),
    Hostile("header_cut.bin", llm_c(IDS)[:-2], r"tells 4,000 tokens of uint16, but 7,998 bytes.*3,999"),
    Hostile("header_long.bin", llm_c(IDS, count=3000), "tells 3,000 tokens"),
    Hostile("header_minus.bin", llm_c(IDS, count=-4), "tells -4 tokens"),
    Hostile("header_only.bin", llm_c(IDS[:0]), "a header and no token"),
    Hostile("header_other.bin", llm_c(IDS, magic=20240522), "magic number 20240522"),
    Hostile("header_id.bin", llm_c(np.append(IDS, [999]).astype("uint16")), r"999 at place 4,000 \(byte 9,024\)"),
    Hostile("m.bin", IDS.tobytes(), "but m.idx tells 3,000", beside={"m.idx": megatron_index([3000])}),
    Hostile("f.bin", IDS.tobytes(), "numbers of type 7", beside={"f.idx": megatron_index([4000], code=7)}),
    Hostile("v.bin", IDS.tobytes(), "version 9", beside={"v.idx": megatron_index([4000], version=9)}),
    Hostile("c.bin", IDS.tobytes(), "c.idx is cut off", beside={"c.idx": megatron_index([4000])[:20]}),
    Hostile("h.bin", IDS.tobytes(), "h.idx is cut off", beside={"h.idx": megatron_index([1, 2])[:34]}),
    Hostile("n.bin", IDS.tobytes(), "n.idx is damaged", beside={"n.idx": megatron_index([-4000])}),
    Hostile("chunk-0-0.bin", IDS.tobytes(), "a chunk of LitData", beside={"index.json": b'{"chunks": []}'}),
    Hostile("text.bin", b"the cat sat on a mat\n" * 40, "is plain text"),
    Hostile("model.bin", b"PK\x03\x04" + bytes(60), "a zip archive"),
    Hostile("old_model.bin", pickle.dumps(Payload()), "a pickle"),
    Hostile("packed.bin", b"\x1f\x8b\x08" + bytes(60), "compressed with gzip"),
    Hostile("packed.bin.gz", b"\x1f\x8b\x08" + bytes(60), "compressed with gzip"),
    Hostile("array.bin", npy(IDS), "a NumPy array: rename it to .npy"),
    Hostile("objects.npy", lambda: npy(np.array([Payload()], dtype=object), allow_pickle=True), "object numbers"),
    Hostile("pickle.npy", pickle.dumps(Payload()), "does not begin like one"),
    Hostile("archive.npy", b"PK\x03\x04" + bytes(60), "a .npz archive"),
    Hostile("cut.npy", npy(IDS)[:-10], "tells 4,000 numbers of uint16, but 7,990 bytes"),
    Hostile("two.npy", npy(IDS) + npy(IDS), "holds several arrays"),
    Hostile("float.npy", npy(IDS.astype("f4")), "one flat array of integers"),
    Hostile("square.npy", npy(IDS.reshape(2, -1)), "one flat array of integers"),
    Hostile("scalar.npy", npy(np.uint16(3)), "one flat array of integers"),
    Hostile("none.npy", npy(IDS[:0]), "is empty"),
    Hostile("shape.npy", header(SHAPE % b"10**99"), "cannot read .*shape.npy"),
    Hostile("minus.npy", header(SHAPE % b"-4"), "tells -4 numbers"),
    Hostile("call.npy", header(b"__import__('os').system('touch executed')"), "cannot read .*call.npy"),
    Hostile("long.npy", b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + b"(" * 90_000, "cannot read .*long.npy"),
    Hostile("type.bin", IDS.tobytes(), "Did you mean 'uint16'", {"token_dtype": "uint61"}),
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_broken_and_hostile_token_files_are_refused(hostile: Hostile, tmp_path: Path) -> None:
    path = tmp_path / hostile.name
    path.write_bytes(hostile.content() if callable(hostile.content) else hostile.content)
    for name, content in hostile.beside.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=hostile.message) as caught:
        windows(path, **hostile.options)
    assert caught.value.exit_code == 4
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


KNOWN: dict[str, tuple[bytes, dict[str, bytes], dict[str, Any], str]] = {
    "raw.bin": (IDS.tobytes(), {}, {}, "raw uint16"),
    "wide.bin": (IDS.astype("uint32").tobytes(), {}, {"token_dtype": "uint32"}, "raw uint32"),
    "small.bin": ((IDS % 250).astype("uint8").tobytes(), {}, {"token_dtype": "uint8"}, "raw uint8"),
    "llmc.bin": (llm_c(IDS), {}, {}, "llm.c uint16"),
    "llama.bin": (llm_c(IDS.astype("uint32"), 20240801), {}, {}, "llm.c uint32"),
    "m.bin": (IDS.astype("i4").tobytes(), {"m.idx": megatron_index([1500, 2500], 4)}, {}, "Megatron int32"),
    "plain.npy": (npy(IDS), {}, {}, "npy uint16"),
    "big.npy": (npy(IDS.astype(">u4")), {}, {}, "npy uint32"),
    "long.npy": (npy(IDS.astype("int64")), {}, {}, "npy int64"),
    "UPPER.BIN": (IDS.tobytes(), {}, {}, "raw uint16"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_headers_are_read_and_ids_come_as_they_are(name: str, tmp_path: Path) -> None:
    content, beside, options, kind = KNOWN[name]
    for each, data in {name: content, **beside}.items():
        (tmp_path / each).write_bytes(data)
    data = windows(tmp_path / name if not beside else tmp_path, **options)
    expected = (IDS % 250 if "uint8" in kind else IDS).astype(np.int64)
    assert data.tokens.size == 4000
    assert torch.equal(data.train[2], torch.from_numpy(expected[32:49]))
    assert np.shares_memory(data.tokens.read(0, 9), data.tokens.array)
    assert data.report.kind == f"token files ({kind})"
    assert (data.report.items, data.report.item_name) == (4000, "tokens")


def test_shards_are_one_sequence_and_windows_go_on_over_their_ends(tmp_path: Path) -> None:
    whole = windows_of(tmp_path, "whole.bin", IDS)
    cuts = [0, 7, 8, 900, 4000]
    for number in range(4):
        IDS[cuts[number] : cuts[number + 1]].tofile(tmp_path / f"part_{number}.bin")
    (tmp_path / "folder").mkdir()
    for number in range(4):
        np.save(tmp_path / "folder" / f"{number}.npy", IDS[cuts[number] : cuts[number + 1]].astype("i8"))
    for path in ("part_*.bin", [f"part_{number}.bin" for number in range(4)], "folder"):
        shards = windows(path)
        assert len(shards.train) == len(whole.train)
        assert shards.eval is not None
        assert whole.eval is not None
        for index in range(len(whole.train)):
            assert torch.equal(shards.train[index], whole.train[index])
        assert torch.equal(shards.eval[0], whole.eval[0])
        assert shards.unigram_loss() == pytest.approx(whole.unigram_loss())
        assert shards.report.files == 4
        assert len(pickle.dumps(shards.train)) < 4000


def windows_of(folder: Path, name: str, ids: np.ndarray[Any, Any]) -> TextWindows:
    ids.tofile(folder / name)
    return windows(folder / name)


def test_an_id_outside_is_found_in_whichever_shard_or_held_out_file(tmp_path: Path) -> None:
    IDS.tofile("train_0.bin")
    Path("train_1.bin").write_bytes(with_id(777, 3999))
    with pytest.raises(DataError, match=r"train_1\.bin.*token id 777 at place 3,999"):
        windows("train_*.bin")
    with pytest.raises(DataError, match=r"train_1\.bin.*token id 777"):
        windows("train_0.bin", eval_path="train_1.bin")


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (("train.bin", "val.bin"), "val.bin"),
        (
            ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"),
            "fineweb_val_000000.bin",
        ),
        (("train.npy", "test.npy", "valid.npy"), "valid.npy"),
        (("train/0.bin", "dev/0.bin"), "dev/0.bin"),
    ],
)
def test_a_folder_with_a_held_out_file_needs_no_more(
    names: tuple[str, ...], held_out: str, tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = IDS[: 1000 + number]
        path.write_bytes(npy(ids) if name.endswith("npy") else ids.tobytes())
    data = windows("set")
    assert data.eval is not None
    assert data.eval.stop == 1000 + names.index(held_out)
    assert data.tokens.size == sum(1000 + number for number, name in enumerate(names) if "train" in name)
    same = windows([f"set/{name}" for name in names if "train" in name], eval_path=f"set/{held_out}")
    assert torch.equal(data.train[0], same.train[0])
    assert torch.equal(data.eval[0], same.eval[0])
    beside = [each.count for each in data.report.omissions if "beside the splits" in each.what]
    assert beside == ([1] if "test.npy" in names else [])


def test_held_out_files_in_the_folder_are_left_out_of_the_training_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("a.bin", "b.bin", "c.bin"):
        IDS.tofile(tmp_path / "set" / name)
    data = windows("set", eval_path="set/b.bin")
    assert data.tokens.size == 8000
    assert [(each.count, each.examples) for each in data.report.omissions if "eval_path" in each.what] == [
        (1, ("b.bin",))
    ]


def test_the_scan_of_a_large_file_is_remembered_by_the_files_identity(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scan, "KEPT_BYTES", 1000)
    monkeypatch.setattr(token_scan, "SETTLED_NS", -(10**18))  # the file is new
    IDS.tofile("a.bin")
    windows("a.bin")
    (kept,) = own_cache.glob("token_scans/*.json")
    monkeypatch.setattr(token_scan, "BLOCK", None)  # a further pass would fail
    windows("a.bin")
    monkeypatch.setattr(token_scan, "BLOCK", 1 << 22)
    highest = int(IDS.max())
    with pytest.raises(DataError, match=rf"token id {highest} at place"):
        windows("a.bin", vocab_size=highest)
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "high": "many"}))  # damaged: looked at again
    windows("a.bin")
    Path("a.bin").write_bytes(with_id(500))  # of the same size
    os.utime("a.bin", ns=(1, 1))  # older than before, as a restored copy is
    with pytest.raises(DataError, match="token id 500"):
        windows("a.bin")


def test_every_id_counts_also_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scan, "BLOCK", 64)
    for place in (0, 1, 63, 64, 65, 2047, 3998, 3999):
        Path("a.bin").write_bytes(with_id(300, place))
        with pytest.raises(DataError, match=rf"token id 300 at place {place:,} \(byte {2 * place:,}\)"):
            TokenFile(Path("a.bin")).check_ids(300)
    assert TokenFile(Path("a.bin")).check_ids(301).high == 300


def test_ids_of_small_vocabularies_are_not_taken_for_wide_numbers(tmp_path: Path) -> None:
    for ids in (
        np.zeros(400),
        np.arange(400) % 7,
        np.arange(400) % 300,
        np.full(400, 299),
        np.repeat([9, 1], 200),
    ):
        ids.astype("uint16").tofile("a.bin")
        assert windows("a.bin").tokens.size == 400


def test_reading_over_the_ends_of_shards(tmp_path: Path) -> None:
    for number, size in enumerate((3, 1, 5)):
        np.arange(10 * number, 10 * number + size, dtype="uint16").tofile(f"{number}.bin")
    tokens = open_tokens([Path(f"{number}.bin") for number in range(3)], "uint16")
    flat = [0, 1, 2, 10, 20, 21, 22, 23, 24]
    for start in range(9):
        for stop in range(start + 1, 10):
            assert tokens.read(start, stop).tolist() == flat[start:stop]


def test_text_and_tokens_do_not_mix(tmp_path: Path) -> None:
    IDS.tofile("a.bin")
    Path("b.txt").write_text("words " * 99)
    with pytest.raises(DataError, match=r"2 files.*token file .*a\.bin.*b\.txt"):
        windows(["a.bin", "b.txt"])
    with pytest.raises(DataError, match=r"token file .*a\.bin"):
        windows("b.txt", eval_path="a.bin")


def test_the_command_line_names_file_place_and_id(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.bin").write_bytes(with_id(40_000))
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "recipe=llm", "data.path=[a.bin]", "data.vocab_size=300"])
    _, err = capfd.readouterr()
    assert ended.value.code == 4, err
    assert "token id 40000 at place 1,300" in err
    assert not (tmp_path / "outputs").exists()


def test_a_file_that_is_written_to_while_it_is_read_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "LOOKS_S", 0.0)
    path = tmp_path / "a.bin"
    first, other = IDS, np.ascontiguousarray(IDS[::-1])
    first.tofile(path)
    data = windows(path)
    sample, elsewhere = data.train[0], pickle.dumps(data.train)
    path.rename(tmp_path / "b.bin")
    assert torch.equal(data.train[0], sample)  # what is mapped is still there
    with pytest.raises(DataError, match="cannot read"):
        pickle.loads(elsewhere)[0]
    other.tofile(path)
    assert torch.equal(data.train[0], sample)  # another file, which is not mapped
    with pytest.raises(DataError, match="was written to while it was in use"):
        pickle.loads(elsewhere)[0]
    data = windows(path)
    data.train[0]
    first.tofile(path)  # in place
    with pytest.raises(DataError, match="was written to while it was in use"):
        data.train[0]
