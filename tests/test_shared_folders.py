"""Folders that others may write into are not believed: the cache, and the folder that a run says it started in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatrain import assets
from gatrain.cli import machine
from gatrain.compose import compose
from gatrain.data.cache import build_once
from gatrain.errors import ConfigError, RunFolderError
from gatrain.fit import submit
from gatrain.fit.resuming import _working_dir
from gatrain.launch.schedulers.sbatch import Resources
from gatrain.rundir import RunDir, write_json
from gatrain.tune.runner import TrialRunner


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GATRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_cache_that_everybody_may_write_is_refused_with_the_command_that_closes_it(cache: Path) -> None:
    assert assets.cache_dir() == cache  # not there yet
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(
        ConfigError, match=f"everybody may write in {cache}.*chmod o-w {cache}.*GATRAIN_CACHE"
    ):
        assets.cache_dir()
    with pytest.raises(ConfigError):
        build_once("x", {}, lambda folder: None, cache)
    assert list(cache.iterdir()) == []
    for mode in (0o755, 0o775, 0o700, 0o2775):  # a group may share it
        cache.chmod(mode)
        assert assets.cache_dir() == cache


def test_a_command_goes_on_with_a_cache_of_its_own_and_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    machine._settle_cache()
    own = assets.cache_dir()
    assert own.parent == temporary
    assert own.stat().st_mode & 0o077 == 0
    said = capfd.readouterr().err
    assert f"chmod o-w {cache}" in said
    assert f"Until then {own} holds the cache." in said
    machine._settle_cache()  # once: nothing to say about its own
    assert capfd.readouterr().err == ""


def test_its_parts_and_the_folder_above_count_too(cache: Path) -> None:
    (cache / "plans").mkdir(parents=True)
    (cache / "plans").chmod(0o777)
    with pytest.raises(ConfigError, match="plans"):
        assets.cache_dir()
    (cache / "plans").chmod(0o755)
    cache.parent.chmod(0o777)
    with pytest.raises(ConfigError):
        assets.cache_dir()
    cache.parent.chmod(0o1777)  # as /tmp is: nobody may replace what is another's
    assert assets.cache_dir() == cache
    cache.chmod(0o1777)  # the cache itself, where anybody may come first
    with pytest.raises(ConfigError):
        assets.cache_dir()
    cache.parent.chmod(0o755)


@pytest.mark.usefixtures("open_umask")
def test_what_gatrain_makes_is_never_open_to_everybody(cache: Path) -> None:
    write_json(cache / "plans" / "a.json", {})
    for folder in (cache, cache / "plans"):
        assert not folder.stat().st_mode & 0o002
    assert assets.cache_dir() == cache


def test_a_run_folder_cannot_choose_whose_modules_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mine, inside = RunDir(tmp_path / "run"), tmp_path / "project", tmp_path / "run" / "code"
    for folder in (mine, inside):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_json(run.env, {"working_dir": str(mine)})
    assert _working_dir(run) == mine
    mine.chmod(0o777)
    with pytest.raises(RunFolderError, match=f"everybody may write.*cd {mine} && gatrain resume {run.path}"):
        _working_dir(run)
    write_json(run.env, {"working_dir": str(inside)})
    with pytest.raises(RunFolderError, match="in the run folder itself"):
        _working_dir(run)
    monkeypatch.chdir(inside)  # what the message says to do
    assert _working_dir(run) == inside


def test_a_batch_file_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"\+data.token=<redacted>.*\+data.token='\$\{oc.env:MY_SECRET\}'"):
        submit.submit(["recipe=vision", "+data.token=S3CRET"], Resources(), dry_run=True)
    monkeypatch.setenv("MY_SECRET", "S3CRET")
    script = submit.submit(
        ["recipe=vision", "+data.token=${oc.env:MY_SECRET}"], Resources(), dry_run=True
    ).script
    assert "S3CRET" not in script


def test_trials_read_references_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "S3CRET-of-the-environment")
    composed = compose(["recipe=vision", "+data.token=${oc.env:MY_SECRET}"])
    assert composed.config.data is not None
    assert composed.config.data["token"] == "S3CRET-of-the-environment"
    read: list[tuple[str, int]] = []

    def run(folder: Path) -> None:
        path = folder / "config.yaml"
        read.append((path.read_text(), path.stat().st_mode & 0o777))
        raise KeyboardInterrupt

    from gatrain.plan import StepSettings

    way = StepSettings("fp32", "none", False, "window")
    runner = TrialRunner(
        composed.config, run, 1.0, lambda curve: None, lambda text: None, config_yaml=composed.yaml
    )
    with pytest.raises(KeyboardInterrupt):
        runner.measure(way, [1])
    assert "${oc.env:MY_SECRET}" in read[0][0]
    assert "S3CRET" not in read[0][0]
    assert read[0][1] == 0o600
