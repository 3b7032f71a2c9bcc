"""An optimizer, a schedule and rules of the user's folder alone train and are resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import gatrain
from safetensors.torch import load_file
from torch import nn

MODULE = """
import torch
from torch import nn

class Tuned(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()).requires_grad_(False)
        self.body.eval()
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x))

def points():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))

class Heavy(torch.optim.Optimizer):
    # momentum that grows with the number of steps, which it keeps in its groups
    def __init__(self, params, lr, inertia=0.5):
        super().__init__(params, {"lr": lr, "inertia": inertia})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    held = self.state[p].setdefault("held", torch.zeros_like(p))
                    held.mul_(group["inertia"]).add_(p.grad)
                    p.add_(held, alpha=-group["lr"] / group["taken"] ** 0.5)

def stairs(step, height=0.5):
    return height ** (step // 2)
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.Tuned}
data: {_target_: mine.points}
loss: {_target_: torch.nn.MSELoss}
batch: {effective: 12, micro: 5}
train: {steps: 3}
optimizer:
  _target_: mine.Heavy
  lr: 0.1
  inertia: 0.7
  groups:
    - {match: 'body.*', thaw_at: 3, lr_scale: 0.5}
schedule: {_target_: mine.stairs, height: 0.25}
device: cpu
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    return tmp_path


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """Plain torch on whole batches, with the user's own classes."""
    scope: dict[str, object] = {}
    exec(MODULE, scope)
    model: nn.Module = scope["Tuned"]()  # type: ignore[operator]
    x, y = scope["points"]().tensors  # type: ignore[operator]
    groups = [{"params": [*model.head.parameters()]}, {"params": [*model.body.parameters()]}]
    optimizer = scope["Heavy"](groups, 0.1, inertia=0.7)  # type: ignore[operator]
    for step in range(6):
        model.body.requires_grad_(step >= 2)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        for group, scale in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = 0.1 * 0.25 ** (step // 2) * scale
        optimizer.step()
    return model.state_dict()


def test_a_folder_and_yaml_alone_train_and_resume_with_it(folder: Path) -> None:
    run = folder / "run"
    gatrain(folder, "fit", "recipe=mine", f"run.dir={run}")
    said = gatrain(folder, "resume", str(run), "train.steps=6", "optimizer.inertia=0.1", expect=2)
    assert "optimizer.inertia" in said
    gatrain(folder, "resume", str(run), "train.steps=6")
    found, wanted = load_file(run / "saved" / "step_00000006" / "model.safetensors"), by_hand(folder)
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-5, atol=1e-6), name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.1 * 0.25 ** (s // 2) for s in range(6)])
