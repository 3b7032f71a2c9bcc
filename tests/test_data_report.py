"""What was read is said, kept and compared: reports of data sources, and hashes of their contents."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from gatrain.data import fingerprint
from gatrain.data.fingerprint import content_fingerprint
from gatrain.errors import DataError


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def corpus(root: Path) -> Path:
    for name, text in {"a/1.txt": b"one", "a/2.txt": b"two", "b/1.txt": b"three" * 100}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return root


# --- fingerprints of files ------------------------------------------------------------------------------


def test_a_copy_elsewhere_has_the_same_fingerprint_and_any_change_of_content_or_name_another(
    tmp_path: Path,
) -> None:
    root = corpus(tmp_path / "here")
    before = content_fingerprint(files_of(root), root)
    moved = Path(shutil.copytree(root, tmp_path / "far" / "away"))
    assert content_fingerprint(files_of(moved), moved) == before
    (moved / "a" / "2.txt").write_bytes(b"twO")
    changed = content_fingerprint(files_of(moved), moved)
    (root / "a" / "2.txt").rename(root / "a" / "3.txt")
    renamed = content_fingerprint(files_of(root), root)
    assert len({before, changed, renamed}) == 3


def test_the_name_of_a_single_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"123")
    (tmp_path / "copy.bin").write_bytes(b"123")
    assert content_fingerprint([tmp_path / "t.bin"]) == content_fingerprint([tmp_path / "copy.bin"])
    (tmp_path / "copy.bin").write_bytes(b"124")
    assert content_fingerprint([tmp_path / "t.bin"]) != content_fingerprint([tmp_path / "copy.bin"])


def test_of_data_beyond_the_limit_every_file_counts_with_blocks_spread_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 4096)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 256)
    paths = [tmp_path / f"{nth}.bin" for nth in range(3)]
    for path in paths:
        path.write_bytes(bytes(8192))
    before = content_fingerprint(paths)
    for nth, place in (
        (0, 0),
        (1, 8191),
        (2, 4100),
    ):  # the first block, the last one, another content altogether
        content = bytearray(8192)
        content[place : place + 600] = b"x" * len(content[place : place + 600])
        paths[nth].write_bytes(content[:8192] if nth < 2 else os.urandom(8192))
        assert content_fingerprint(paths) != before, nth
        paths[nth].write_bytes(bytes(8192))
    assert content_fingerprint(paths) == before


def test_hashes_are_kept_until_size_time_or_inode_of_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "KEPT_BYTES", 1)
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -(10**12))
    root = corpus(tmp_path / "data")
    hashed: list[str] = []
    real = fingerprint._hash_file
    monkeypatch.setattr(
        fingerprint,
        "_hash_file",
        lambda path, *more: hashed.append(os.path.basename(path)) or real(path, *more),
    )
    before = content_fingerprint(files_of(root), root)
    assert sorted(hashed) == ["1.txt", "1.txt", "2.txt"]
    assert content_fingerprint(files_of(root), root) == before
    assert len(hashed) == 3
    times = (root / "a" / "2.txt").stat()
    (root / "a" / "new").write_bytes(b"TWO")  # same size, and made to bear the same time
    (root / "a" / "new").replace(root / "a" / "2.txt")
    os.utime(root / "a" / "2.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_fingerprint(files_of(root), root) != before
    assert hashed[3:] == ["2.txt"]
    for path in (tmp_path / "cache" / "fingerprints").iterdir():
        path.write_text('{"1.txt": 3, "2.txt": [[1], 2]}')
    assert content_fingerprint(files_of(root), root) != before


def test_a_file_that_was_just_written_is_hashed_again_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "KEPT_BYTES", 1)
    (tmp_path / "t.bin").write_bytes(b"123")
    content_fingerprint([tmp_path / "t.bin"])
    assert not (tmp_path / "cache").exists()
    old = time.time() - 100
    os.utime(tmp_path / "t.bin", (old, old))  # the time of the change of state stays


def test_a_file_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*t\.bin"):
        content_fingerprint([tmp_path / "t.bin"])
