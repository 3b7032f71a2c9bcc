"""No rank waits in a collective for a disk: a save may take longer than the collectives' timeout."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import environment, project

from gatrain.train.ranks import Ranks

TIMEOUT_S, SAVE_S = 6, 9

MODULE = """
import os, time
import torch
from torch import nn
import gatrain.train.saved_state as states

written, whole = 0, states.save_file

def slow(tensors, path, *more, **words):
    global written
    written += 1
    if written % 2 and written < 4:  # the first file of the first two states
        time.sleep(float(os.environ.get("SAVE_S", 0)))
        if written == 3 and "FULL" in os.environ:
            raise OSError(28, "No space left on device")
    whole(tensors, path, *more, **words)

states.save_file = slow

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(6), index % 3
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: slow.Net}
data: {_target_: slow.Points}
batch: {effective: 8, micro: 2}
train: {steps: 6, log_every: 1, check: 'off'}
precision: fp32
save: {every: 2, keep: 0, minutes: 0}
"""
WORDS = ["launch", "--nproc", "2", "recipe=slow"]


def start(folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gatrain", *words],
        cwd=folder,
        env=environment(GATRAIN_TIMEOUT_S=str(TIMEOUT_S), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def states_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "saved").iterdir())


@pytest.mark.chaos
def test_saves_longer_than_the_timeout_go_well_fail_and_are_interrupted_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    """One run has a slow save and a slow one that fails; another is stopped within its slow save and goes on."""
    project(tmp_path, MODULE, RECIPE, "slow")

    failing = start(tmp_path, *WORDS, "run.dir=failing", SAVE_S=str(SAVE_S), FULL="1")
    printed = failing.communicate(timeout=200)[0]
    assert failing.returncode == 0, printed
    assert "could not save the state of step 4: " in printed
    assert states_of(tmp_path / "failing") == ["step_00000002", "step_00000006"]

    stopped, saved = (
        start(tmp_path, *WORDS, "run.dir=stopped", SAVE_S=str(SAVE_S)),
        tmp_path / "stopped" / "saved",
    )
    deadline = time.monotonic() + 150
    while not (saved.is_dir() and any(saved.glob(".writing-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    stopped.send_signal(signal.SIGTERM)
    printed = stopped.communicate(timeout=200)[0]
    assert stopped.returncode == 143, printed
    # what the signal met is what is saved: no further step, no second write
    assert states_of(tmp_path / "stopped") == ["step_00000002"]
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) == 2

    resumed = start(tmp_path, "resume", "stopped")
    printed = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0, printed
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (
            (tmp_path / run / "saved" / "step_00000006" / file).read_bytes() for run in ("failing", "stopped")
        )
        assert one == two, file
    rows = [
        [(row["step"], row["loss"], row["window"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "failing" / "metrics.jsonl", tmp_path / "stopped" / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


def test_what_one_process_does_alone_is_done_at_once() -> None:
    assert Ranks().alone(lambda: 3) == 3
