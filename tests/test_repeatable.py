"""One seed, one curve: however samples are loaded, wherever random numbers are drawn, killed and resumed or not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from command import gatrain, metrics, project, start, wait_for

MODULE = """
import os, random, time
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    # weights by numpy and random, layers dropped by random and numpy, dropout by torch
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.scale = random.uniform(0.5, 1.5)
        for layer in self.layers:
            layer.weight.data = torch.from_numpy(np.random.randn(6, 6)).float() / 3

    def forward(self, x):
        x = x * self.scale
        for nth, layer in enumerate(self.layers):
            if (random.random() if nth % 2 else np.random.rand()) < 0.8:
                x = x + nn.functional.dropout(torch.tanh(layer(x)), 0.2, self.training)
        return self.head(x)

class Points(torch.utils.data.Dataset):
    def __init__(self):
        self.classes = list({f"class {n}" for n in range(3)})  # in an order of Python's hashes

    def __len__(self):
        return 28

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("SLOW_S", 0)))
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        x = x + 0.1 * torch.from_numpy(np.random.randn(6)).float() + random.gauss(0, 0.1)
        return x + 0.1 * torch.randn(6), int(self.classes[index % 3][-1])

class Masked:
    def __init__(self):
        self.train = Points()

    def collate(self, samples):
        x, y = torch.utils.data.default_collate(samples)
        keep = torch.rand(x.shape) < 0.8
        keep[:, random.randrange(6)] = bool(np.random.rand() < 0.5)
        return x * keep, y
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: drawn.Net}
data: {_target_: drawn.Masked}
batch: {effective: 8, micro: 2}
precision: fp32
train: {steps: 12, log_every: 1, seed: 11}
save: {every: 2, keep: 0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return project(tmp_path, MODULE, RECIPE, "drawn")


def losses(run: Path) -> list[float]:
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    return [record["loss"] for record in records]


def killed(folder: Path, name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of a run whose processes are all killed in the middle, and that is resumed."""
    with monkeypatch.context() as patch:
        patch.setenv("SLOW_S", "0.03")
        process = start(folder, "launch", *words, "recipe=drawn", f"run.dir={name}")
        wait_for(folder / name / "saved" / "step_00000004", process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(2.5)  # the ranks die with their launcher
    assert not (folder / name / "saved" / "step_00000012").exists()
    gatrain(folder, "resume", name)
    return losses(folder / name)


def test_one_seed_gives_one_curve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader processes, a kill and a resume change no bit; another number of ranks only the order of sums."""
    for name, words in {
        "one": ["--nproc", "1"],
        "one_process": ["--nproc", "1", "train.data_workers=1"],
        "two": ["--nproc", "2"],
    }.items():
        gatrain(folder, "launch", *words, "recipe=drawn", f"run.dir={name}", "save.every=0")
    one, two = losses(folder / "one"), losses(folder / "two")
    assert len(set(one)) == 12
    assert losses(folder / "one_process") == one
    workers = "train.data_workers=2"
    assert killed(folder, "one_killed", "--nproc", "1", workers, monkeypatch=monkeypatch) == one
    assert killed(folder, "two_killed", "--nproc", "2", workers, monkeypatch=monkeypatch) == two
    assert two == pytest.approx(one, rel=1e-6)
