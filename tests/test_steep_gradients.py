"""A vector of zeros has an endless gradient: the shipped two towers give none, and it is said of others."""

from __future__ import annotations

from pathlib import Path

import torch
from command import gatrain

from gatrain.models.two_towers import TwoTowers


def test_a_side_whose_words_are_all_dropped_keeps_them() -> None:
    torch.manual_seed(0)
    model = TwoTowers(vocab_size=50, width=16, dropout=0.9)
    words = torch.randint(1, 50, (64, 2))  # 0.8 of the rows lose both words
    left, right = model(words, words.flip(0))
    lengths = torch.cat([left, right]).norm(dim=1)
    assert torch.allclose(lengths, lengths[0].expand_as(lengths))
    (left @ right.T).logsumexp(dim=1).sum().backward()
    assert max(float(each.grad.norm()) for each in model.parameters() if each.grad is not None) < 1e4


def test_without_training_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    model = TwoTowers(vocab_size=50, width=16, dropout=0.9).eval()
    words = torch.randint(1, 50, (8, 3))
    assert torch.equal(model(words, words)[0], model(words, words)[0])


MODULE = '''
import torch
from torch import nn

class Steep(nn.Module):
    """One sample is a vector of zeros, whose direction has an endless gradient."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return nn.functional.normalize(x + self.shift, dim=-1)

def points(zeros=1):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    x[:zeros] = 0
    return torch.utils.data.TensorDataset(x, torch.arange(16) % 4)
'''
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.Steep}
data: {_target_: mine.points}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {lr: 0.01, clip_norm: 1.0}
train: {steps: 2, epochs: null}
batch: {effective: 16, micro: 8}
device: cpu
"""


def test_a_gradient_of_which_clipping_left_next_to_nothing_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "steep.yaml").write_text(RECIPE)
    shown = gatrain(tmp_path, "fit", "recipe=steep", "run.dir=a")
    assert shown.count("the gradient's norm is") == 1
    assert "step 1: the gradient's norm is" in shown
    assert "the gradient's norm is" not in gatrain(
        tmp_path, "fit", "recipe=steep", "run.dir=b", "+data.zeros=0"
    )
    assert "the gradient's norm is" not in gatrain(
        tmp_path, "fit", "recipe=steep", "run.dir=c", "optimizer.clip_norm=null"
    )
