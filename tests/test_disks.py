"""Disks that are full, read-only or gone, run folders that are deleted or moved: nothing is lost without a word."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import project

from gatrain import disk
from gatrain.errors import RunFolderError
from gatrain.rundir import RunDir, locked, open_run_dir
from gatrain.train.rescue import rescue
from gatrain.train.run_folder import RunFolder

MODULE = """
import time
import torch

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        time.sleep(float(__import__("os").environ.get("SLOW_S", 0)))
        return torch.tensor([float(index % 7), 1.0]), index % 2

def net():
    return torch.nn.Linear(2, 2)
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: tiny.net}
data: {_target_: tiny.Points}
batch: {effective: 4, micro: 4}
train: {steps: 16, seed: 3, log_every: 1, check: false}
precision: fp32
checkpointing: none
compile: false
save: {every: 4}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return project(tmp_path, MODULE, RECIPE, "tiny")


def environment(folder: Path, **more: str) -> dict[str, str]:
    package = str(Path(__file__).parent.parent)
    path = f"{package}:{os.environ.get('PYTHONPATH', '')}"
    bin_folder = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "PATH": bin_folder,
        "PWD": str(folder),
        **more,
    }


def shell(folder: Path, command: str, **more: str) -> tuple[int, str]:
    """Exit code and output of a line typed in bash."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def start(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["gatrain", *words],
        cwd=folder,
        env=environment(folder, SLOW_S="0.05", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(test: Callable[[], object], limit_s: float = 90) -> None:
    until = time.monotonic() + limit_s
    while not test():
        assert time.monotonic() < until
        time.sleep(0.02)


def steps_in(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- whole runs -----------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_run_folder_that_is_deleted_in_mid_run_is_made_again_whole(folder: Path) -> None:
    run = folder / "run"
    process = start(folder, "fit", "recipe=tiny", "run.dir=run")
    wait_for(lambda: RunDir(run).saved_steps())
    shutil.rmtree(run, ignore_errors=True)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "was deleted while the run was under way: made again" in output
    assert steps_in(run) == list(range(1, 17))
    assert RunDir(run).saved_steps()[-1] == 16
    code, output = shell(folder, "gatrain resume run train.steps=18")
    assert code == 0, output
    assert steps_in(run) == list(range(1, 19))


@pytest.mark.chaos
def test_a_run_folder_that_is_moved_in_mid_run_goes_on_where_it_is_now(folder: Path) -> None:
    process = start(folder, "fit", "recipe=tiny", "run.dir=run")
    wait_for(lambda: RunDir(folder / "run").saved_steps())
    (folder / "run").rename(folder / "else where")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 7, output
    saved = RunDir(folder / "else where").saved_steps()[-1]
    assert f"The state of step {saved} is saved there" in output
    assert output.rstrip().endswith(f"gatrain resume '{folder / 'else where'}'")
    assert steps_in(folder / "else where")[:saved] == list(range(1, saved + 1))
    assert open_run_dir(folder / "else where").has_run()
    assert not (folder / "run" / "config.yaml").exists()


@pytest.mark.chaos
def test_a_last_state_that_its_folder_does_not_take_is_saved_elsewhere(folder: Path) -> None:
    run = folder / "a run"
    words = ["recipe=tiny", "run.dir='a run'", "save.every=0", "train.steps=10"]
    process = start(folder, "fit", *words, GATRAIN_CACHE=str(folder / "cache"))
    wait_for(lambda: (run / "metrics.jsonl").exists())
    (run / "saved").write_text("a file stands here")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 8, output
    assert "something else stands in its place. It is saved in" in output
    (run / "saved").unlink()
    code, printed = shell(folder, re.findall("mkdir -p .*", output)[-1])
    assert code == 0, printed
    assert RunDir(run).saved_steps() == [10]
    assert "completed" in printed


@pytest.mark.chaos
def test_a_limit_of_file_sizes_at_the_end_is_told_with_what_works(folder: Path) -> None:
    words = "recipe=tiny run.dir=run save.every=0 train.steps=4"
    code, output = shell(folder, f"ulimit -f 0; gatrain fit {words}", GATRAIN_CACHE=str(folder / "cache"))
    assert code != 0
    assert "Traceback" not in output
    assert "mistake in gatrain" not in output


# --- words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "told", "helps"),
    [
        (errno.ENOSPC, "the disk is full", "Free some space"),
        (errno.EDQUOT, "quota", "quota"),
        (errno.EROFS, "read-only", "writable again"),
        (errno.EACCES, "not permitted", "writable for you"),
        (errno.EIO, "fails", "dmesg"),
        (errno.ENAMETOOLONG, "too long", ""),
        (errno.EFBIG, "larger than allowed", "ulimit -f"),
    ],
)
def test_each_cause_has_its_words(tmp_path: Path, number: int, told: str, helps: str) -> None:
    # as Python says it, and as safetensors does, which hands on the words alone
    for error in (
        OSError(number, "x"),
        OSError(f"Error while serializing: I/O error: x (os error {number})"),
    ):
        assert told in disk.reason(error)
        assert helps in disk.remedy(error)
        assert ("Free some space" in disk.remedy(error)) == (number == errno.ENOSPC)


def test_where_no_place_takes_a_state_the_advice_is_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    run_dir, full = RunDir(tmp_path / "run"), OSError(errno.ENOSPC, "full")

    def save(folder: Path) -> Path:
        raise full

    run_dir.path.mkdir()
    run_dir.env.write_text(json.dumps({"command": ["fit", "recipe=x"], "working_dir": str(tmp_path)}))
    text = rescue(run_dir, 9, full, save)
    assert text.endswith(f"gatrain fit recipe=x run.dir={run_dir.path} --overwrite")
    (run_dir.saved / "step_00000004").mkdir(parents=True)
    (run_dir.saved / "step_00000004" / "manifest.json").write_text("{}")
    text = rescue(run_dir, 9, full, save)
    assert text.endswith(f"step 4 is saved. Free some space, then: gatrain resume {run_dir.path}")
    assert not list((tmp_path / "cache" / "gatrain-rescued").iterdir())


# --- the folder of a run that is under way -----------------------------------------------------------------


def watched(path: Path) -> tuple[RunDir, RunFolder, list[str]]:
    run_dir, told = RunDir(path), []
    path.mkdir()
    run_dir.config.write_text("model: {}\n")
    run_dir.plan.write_text("{}")
    return run_dir, RunFolder(run_dir, told.append, lambda: None), told


def test_a_configuration_that_is_deleted_alone_is_written_again(tmp_path: Path) -> None:
    run_dir, folder, told = watched(tmp_path / "run")
    folder.look()
    assert told == []
    run_dir.config.unlink()
    folder.look()
    assert run_dir.config.read_text() == "model: {}\n"
    assert folder.needs_state
    assert len(told) == 1


def test_another_run_in_the_place_of_a_deleted_one_is_left_alone(tmp_path: Path) -> None:
    run_dir, folder, _ = watched(tmp_path / "run")
    shutil.rmtree(run_dir.path)
    run_dir.path.mkdir()
    with locked(run_dir), pytest.raises(RunFolderError, match="another run has begun there"):
        folder.look()
    run_dir.config.write_text("model: {other: 1}\n")
    with pytest.raises(RunFolderError, match="another run has begun there"):
        folder.look()
    assert run_dir.config.read_text() == "model: {other: 1}\n"
    assert not run_dir.plan.exists()


def test_a_folder_that_was_made_again_is_held_as_before(tmp_path: Path) -> None:
    run_dir, folder, _ = watched(tmp_path / "run")
    shutil.rmtree(run_dir.path)
    folder.look()
    assert run_dir.plan.read_text() == "{}"
    with pytest.raises(RunFolderError, match=f"process {os.getpid()}"), locked(run_dir):
        pass
    folder.close()
    with locked(run_dir):
        pass


# --- locks ----------------------------------------------------------------------------------------------


def test_what_a_dead_process_on_another_host_left_is_no_lock(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.lock.write_text(json.dumps({"pid": 1, "host": "node-that-is-gone"}))
    with locked(run_dir):
        assert json.loads(run_dir.lock.read_text())["pid"] == os.getpid()


def test_a_lock_says_whose_it_is_and_how_to_end_that(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with locked(run_dir), pytest.raises(RunFolderError, match=f"kill {os.getpid()}"), locked(run_dir):
        pass
    with locked(run_dir):
        run_dir.lock.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
        with (
            pytest.raises(RunFolderError, match=r"process 1 on elsewhere\. If that machine is gone"),
            locked(run_dir),
        ):
            pass
