"""Compilation of a task's loss: each repeated block once where that is as good, else model and loss as one.

A transformer repeats one block: compiling that block compiles them all, in a fraction of the time that the whole
model takes, at a cost of about 1 % in speed (``tests/benchmarks/results``). Convolutions are compiled as one graph:
their memory layout is chosen across blocks, and their blocks differ in shape, so there is less to share. One by
one, ResNet-50's blocks saved at most a fifth of the compilation and took half as long again in each micro-step
(``tests/benchmarks/results/resnet_compile_2026-11-26.json``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from gatrain.tasks.base import Batch, LossSums, Task
from gatrain.train.checkpointing import blocks_of

RECOMPILATIONS = 64
"""Shapes that one function may be compiled for: beyond PyTorch's 8 it would silently run uncompiled."""
FEWEST_REPEATS = 4
"""Blocks for each different block: below that, compiling the model as one costs about as little."""


def compiled_loss_sum(task: Task, model: nn.Module, backend: Any = "inductor") -> Callable[[Batch], LossSums]:
    """A function from a batch on the device to the task's loss sums, compiled on its first calls.

    A window has at most two shapes unless lengths vary, so shapes are static: dynamic ones cost some speed. Where
    lengths vary, they alone become dynamic.

    Args:
        model: its repeated blocks run compiled inside this function, and as they are everywhere else.
        backend: of `torch.compile`.
    """
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILATIONS)
    dynamic = None if task.variable_length else False

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        made = torch.compile(function, dynamic=dynamic, backend=backend)
        return _with_static_batch(made) if task.variable_length else made

    blocks = repeated_blocks(model)
    if not blocks:
        return compiled(lambda batch: task.loss_sum(model, batch))
    # Dynamo looks at the gradient of a block's input, which is a result and has none (seen in 2.11 to 2.15)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    loss_sum = task.partly_compiled_loss_sum(compiled)
    calls = [(block, compiled(block._call_impl)) for block in blocks]

    def run(batch: Batch) -> LossSums:
        for block, call in calls:
            block.__dict__["_compiled_call_impl"] = call  # what nn.Module.compile sets
        try:
            return loss_sum(model, batch)
        finally:
            for block, _ in calls:
                block.__dict__["_compiled_call_impl"] = None

    return run


def _with_static_batch(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let lengths become dynamic, but compile for each number of samples; a window has two of them. Kernels for any
    number depend on the one that came first: 32 samples took 61 or 39 ms on an H100, by the order of sizes."""
    import torch._dynamo

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, torch.Tensor)]
        for leaf in leaves:
            # a table of positions has as many rows as there are positions
            if leaf.dim() > 1 and leaf.shape[0] == leaves[0].shape[0]:
                torch._dynamo.mark_static(leaf, 0)
        return call(*args, **kwargs)

    return run


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks to compile one by one: like each other in all shapes, and without convolutions; else none."""
    blocks = blocks_of(model)
    different = len({_shape_of(block) for block in blocks})
    if not blocks or len(blocks) < FEWEST_REPEATS * different:
        return []
    if any(isinstance(module, _ConvNd) for block in blocks for module in block.modules()):
        return []
    return blocks


def _shape_of(block: nn.Module) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())
    return type(block), shapes
