"""Your own loop, exact: `python own_loop.py`, or on two processes `torchrun --nproc-per-node 2 own_loop.py`."""

import itertools
import os

import torch
import torch.distributed as dist
from torch import nn

from gatrain import accumulate, windows

if "RANK" in os.environ:
    dist.init_process_group()
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(0)
inputs = torch.randn(1000, 8)
targets = inputs.sum(1, keepdim=True).sin()
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def loss_sum(model, batch):  # a sum over samples, and how many there were
    x, y = batch
    return (model(x) - y).square().sum(), len(x)


my_windows = windows(len(inputs), effective_batch=50, seed=0, rank=rank, world_size=world_size)
for step, ids in enumerate(itertools.islice(my_windows, 40)):
    micro_batches = zip(inputs[ids].split(8), targets[ids].split(8), strict=True)
    result = accumulate(model, micro_batches, loss_sum=loss_sum, weight=lambda batch: len(batch[0]))
    optimizer.step()
    optimizer.zero_grad()
    loss = result.loss()
    if rank == 0:
        print(step, f"{loss:.6f}")
if dist.is_initialized():
    dist.destroy_process_group()
