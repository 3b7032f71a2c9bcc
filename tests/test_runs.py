"""Whole runs through the command line: any number of processes, killed and resumed, trains the same model."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from command import gatrain, metrics, project, start, wait_for
from safetensors.torch import load_file

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=32, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))

    def forward(self, x):
        return self.body(x)

class Points(torch.utils.data.Dataset):
    # noise is drawn when a sample is read: it must not depend on who reads it
    def __init__(self, count=101, slow_s=0.0):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = torch.randint(3, (count,), generator=generator)
        self.slow_s = slow_s

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        import time
        time.sleep(self.slow_s)
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: points.Net, dropout: 0.0}
data: {_target_: points.Points, slow_s: 0.0}
batch: {effective: 23}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: one module, one recipe."""
    return project(tmp_path, MODULE, RECIPE, "points")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "saved" / f"step_{step:08d}" / "model.safetensors")


def largest_relative_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).norm() / one[k].norm().clamp_min(1e-12)) for k in one)


SGD = ["optimizer=sgd", "optimizer.lr=0.05", "precision=fp32", "train.seed=3"]


def test_one_and_three_processes_train_the_same_model(folder: Path) -> None:
    words = ["recipe=points", *SGD, "train.steps=20"]
    gatrain(folder, "fit", *words, "batch.micro=23", "run.dir=one")
    one = metrics(folder / "one")
    assert len({r["window"] for r in one}) == 20
    assert one[4]["samples"] - one[3]["samples"] == 9  # 101 samples in windows of 23: the fifth is short
    for sync in ("window", "overlap"):
        gatrain(folder, "launch", "--nproc", "3", *words, f"sync={sync}", "batch.micro=2", f"run.dir={sync}")
        three = metrics(folder / sync)
        assert [r["window"] for r in one] == [r["window"] for r in three]
        assert [r["samples"] for r in one] == [r["samples"] for r in three]
        assert largest_relative_difference(weights(folder / "one", 20), weights(folder / sync, 20)) < 1e-5
        for a, b in zip(one, three, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_text_with_most_labels_ignored_trains_the_same_model(folder: Path) -> None:
    lines = [
        {"prompt": "name the number " * (1 + i % 5), "completion": str(i * 7919 % 1000) * (1 + i % 3)}
        for i in range(120)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    words = [
        "recipe=padded", "data.path=pairs.jsonl", "data.vocab_size=300", "data.context=48", "model.width=32",
        "model.layers=1", "model.heads=2", "batch.effective=23", "train.steps=8", "optimizer=sgd",
        "optimizer.lr=0.05", "precision=fp32",
    ]  # fmt: skip
    gatrain(folder, "fit", *words, "batch.micro=23", "run.dir=one")
    gatrain(folder, "launch", "--nproc", "3", *words, "batch.micro=2", "run.dir=three")
    one, three = metrics(folder / "one"), metrics(folder / "three")
    assert [r["window"] for r in one] == [r["window"] for r in three]
    assert largest_relative_difference(weights(folder / "one", 8), weights(folder / "three", 8)) < 1e-5


KILLED = [
    "recipe=points", "train.seed=5", "precision=fp32", "batch.micro=4", "save.every=4", "train.log_every=3",
    "train.steps=40", "model.dropout=0.2", "data.slow_s=0.001", "run.dir=killed",
]  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path) -> None:
    """kill -9 of the launcher after a save; momentum, dropout and random samples are all in play."""
    process = start(folder, "launch", "--nproc", "2", *KILLED)
    wait_for(folder / "killed" / "saved" / "step_00000008", process)
    process.kill()
    process.wait()
    time.sleep(2.5)  # the ranks die with their launcher
    newest = sorted((folder / "killed" / "saved").glob("step_*"))[-1].name
    assert newest < "step_00000040"
    gatrain(folder, "resume", "killed")
    gatrain(folder, "launch", "--nproc", "2", *KILLED[:-1], "run.dir=whole", "save.every=0")
    killed, whole = weights(folder / "killed", 40), weights(folder / "whole", 40)
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert [r["step"] for r in metrics(folder / "killed")] == list(range(1, 41))
    for a, b in zip(metrics(folder / "killed"), metrics(folder / "whole"), strict=True):
        assert (a["loss"], a["window"]) == (b["loss"], b["window"])


def test_a_stopped_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    """SIGTERM saves at the window in hand; two processes continue what one began."""
    words = [word for word in KILLED if not word.startswith("model.dropout")]
    process = start(folder, "fit", *words, *SGD[:2])
    wait_for(folder / "killed" / "saved" / "step_00000004", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    stopped_at = json.loads((folder / "killed" / "summary.json").read_text())
    assert stopped_at["status"] == "stopped"
    assert (folder / "killed" / "saved" / f"step_{stopped_at['step']:08d}").is_dir()
    gatrain(folder, "launch", "--nproc", "3", *words[:-1], *SGD[:2], "run.dir=whole")
    gatrain(folder, "resume", "killed", "--nproc", "2")
    assert json.loads((folder / "killed" / "plan.json").read_text())["world_size"] == 2
    difference = largest_relative_difference(weights(folder / "killed", 40), weights(folder / "whole", 40))
    assert difference < 1e-5
    assert [r["window"] for r in metrics(folder / "killed")] == [
        r["window"] for r in metrics(folder / "whole")
    ]


def test_a_torn_saved_state_falls_back_to_the_one_before(folder: Path) -> None:
    words = [*KILLED[:5], "train.log_every=3", "train.steps=12", "save.keep=0", "run.dir=torn"]
    gatrain(folder, "fit", *words)
    whole = weights(folder / "torn", 12)
    for step, damage in (("step_00000012", "cut"), ("step_00000008", "flip")):
        path = folder / "torn" / "saved" / step / "optimizer.safetensors"
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-1] ^= 1
        path.write_bytes(content[:-10] if damage == "cut" else content)
    (folder / "torn" / "summary.json").unlink()
    printed = gatrain(folder, "resume", "torn")
    assert "step_00000012: optimizer.safetensors does not match its checksum" in printed
    again = weights(folder / "torn", 12)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
