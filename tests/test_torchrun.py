"""Processes that torchrun has started become one run: the same bits, one exit code, saved on a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import environment, gatrain, metrics, project
from test_runs import MODULE, RECIPE, weights

from gatrain import cli
from gatrain.errors import ConfigError, LaunchError
from gatrain.launch import torchrun
from gatrain.launch.torchrun import TorchrunWorld, detect

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "job-7",
    "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


def test_torchruns_variables_name_the_world() -> None:
    assert detect(TORCHRUN) == TorchrunWorld(
        1, 4, 1, 2, "10.0.0.1", 29500, has_store=True, run_id="job-7", attempt=1, is_last_attempt=False
    )


def test_pods_without_torchrun_are_nodes() -> None:
    pod = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456"}
    world = detect(pod)
    assert world == TorchrunWorld(0, None, 1, 3, "master-0", 23456, has_store=False, run_id="env")
    assert world is not None
    assert world.endpoint() == "master-0:23456"


@pytest.mark.parametrize(
    "environ", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, TORCHRUN | {"GATRAIN_LAUNCHER_PID": "1"}]
)
def test_a_process_alone_and_a_rank_of_gatrains_own_join_nothing(environ: dict[str, str]) -> None:
    assert detect(environ) is None


def test_launch_with_a_number_of_processes_passes_over_what_is_left_of_another_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = {"RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    for name in (*torchrun.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    seen: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        seen.append([*arguments, *(set(left) & os.environ.keys())])
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli._run_within_torchrun(["launch", "--nproc", "2"]) == 0
    assert seen == [["launch", "--nproc", "2"]]
    assert "RANK=5 of the environment is not torchrun's" in capsys.readouterr().err
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert (
        cli._run_within_torchrun(["fit"]) == LaunchError.exit_code
    )  # or N runs would train beside each other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOCAL_WORLD_SIZE": "3"}, "equal nodes"),
        ({"LOCAL_RANK": "0"}, "--virtual-local-rank"),
        ({"RANK": "x"}, "RANK='x' is not a number"),
    ],
)
def test_a_world_that_cannot_be_joined_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        detect(TORCHRUN | change)


def test_what_starts_from_here_does_not_see_torchruns_variables() -> None:
    environ = TORCHRUN | {"HOME": "/home/me", "OMP_NUM_THREADS": "3"}
    torchrun.forget(environ)
    assert environ == {"HOME": "/home/me", "OMP_NUM_THREADS": "3"}


def test_the_others_of_a_node_end_with_the_code_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun.signal, "signal", lambda *anything: None)  # threads may not
    monkeypatch.setattr(torchrun.tempfile, "gettempdir", lambda: str(tmp_path))
    first = TorchrunWorld(0, 3, 0, 1, "127.0.0.1", 1, has_store=True, run_id="none")
    # another torchrun of the same name has ended with 0 a moment ago: its word must not be taken
    old = first.folder
    old.mkdir(mode=0o700)
    (old / "leader.json").write_text('{"pid": 999999999}')
    (old / "exit_999999999").write_text("0")
    codes: dict[int, int] = {}
    others = [
        threading.Thread(target=lambda n=n: codes.update({n: torchrun.follow(replace(first, local_rank=n))}))
        for n in (1, 2)
    ]
    for thread in others:
        thread.start()
    time.sleep(0.3)
    codes[0] = torchrun.lead(first, lambda: 143)
    for thread in others:
        thread.join(10)
    assert codes == {0: 143, 1: 143, 2: 143}
    assert not first.folder.exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return project(tmp_path, MODULE, RECIPE, "points")


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gatrain", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


WORDS = [
    "recipe=points",
    "train.steps=30",
    "batch.micro=3",
    "precision=fp32",
    "model.dropout=0.1",
    "train.seed=4",
]


def test_torchrun_trains_one_run_equal_to_launch_and_saves_on_a_signal(folder: Path) -> None:
    """Signalled in the middle, then gone on with under torchrun again: the bits are those of `gatrain launch`."""
    process = started(folder, "fit", *WORDS, "data.slow_s=0.01", "run.dir=theirs", "train.log_every=1")
    deadline = time.monotonic() + 120
    while not (folder / "theirs" / "metrics.jsonl").exists() or len(metrics(folder / "theirs")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    stopped_at = int(sorted((folder / "theirs" / "saved").glob("step_*"))[-1].name[5:])
    assert 3 <= stopped_at < 30

    process = started(folder, "resume", "theirs")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert printed.count("completed") == 1

    gatrain(folder, "launch", "--nproc", "2", *WORDS, "data.slow_s=0.0", "run.dir=ours")
    ours, theirs = weights(folder / "ours", 30), weights(folder / "theirs", 30)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [(r["loss"], r["window"]) for r in metrics(folder / "ours")] == [
        (r["loss"], r["window"]) for r in metrics(folder / "theirs")
    ]


def test_options_that_contradict_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cli.subcommands,
        "torchrun_world",
        TorchrunWorld(0, 2, 0, 1, "127.0.0.1", 1, has_store=True, run_id="none"),
    )
    assert cli.subcommands.world_request(nproc=2).nproc == cli.subcommands.world_request().nproc == 2
    with pytest.raises(ConfigError, match="--nproc 3 is torchrun's to say"):
        cli.subcommands.world_request(nproc=3)
    with pytest.raises(ConfigError, match="--nnodes 2 is torchrun's to say"):
        cli.subcommands.world_request(nnodes=2)
