"""Optimizers beside PyTorch's own, one file each: plain `torch.optim.Optimizer`, of use in any loop."""

from gatrain.optimizers.adama import AdamA
from gatrain.optimizers.lion import Lion
from gatrain.optimizers.muon import Muon

__all__ = ["AdamA", "Lion", "Muon"]
