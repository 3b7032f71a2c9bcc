"""Compilation of a task's loss: each repeated block once where that is as good, else model and loss as one.

A transformer repeats one block: compiling that block compiles them all, in a fraction of the time that the whole
model takes, at a cost of about 1 % in speed (``tests/benchmarks/results``). Convolutions are compiled as one graph:
their memory layout is chosen across blocks, and their blocks differ in shape, so there is less to share. One by
one, ResNet-50's blocks saved at most a fifth of the compilation and took half as long again in each micro-step
(``tests/benchmarks/results/resnet_compile_2026-11-26.json``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from gatrain.tasks.base import Batch, Task, asks_for_step
from gatrain.train import cuda_graphs
from gatrain.train.checkpointing import blocks_of
from gatrain.train.lengths import shapes_of

RECOMPILATIONS = 64
"""Shapes that one function may be compiled for: beyond PyTorch's 8 it would silently run uncompiled."""
MOST_LENGTHS, MOST_SHAPES = 2, 8
"""Shapes of one sample, and of whole batches, beyond which lengths vary, whatever was declared."""
MOST_AGAIN = 12
"""Batches of a new shape that may compile again although lengths are dynamic, before nothing is compiled."""
FEWEST_REPEATS = 8
"""Blocks for each different block: below that, compiling the model as one takes little longer, and each micro-step
runs two graphs instead of two for each block, which a small model feels (``tests/benchmarks/small_model.py``)."""


class CompiledLossSum:
    """A function from a batch on the device to the task's loss sums, compiled on its first calls.
    Or to what another ``method`` ``(model, batch)`` of the task gives.

    A window has at most two shapes unless lengths vary, so shapes are static: dynamic ones cost some speed. Where
    lengths vary, they alone become dynamic. Where they turn out to vary although the task says that they do not,
    they become dynamic from then on; where even that compiles again and again, nothing is compiled any more. Both
    are told in `notices`.

    Args:
        model: its repeated blocks run compiled inside this function, and as they are everywhere else.
        backend: of `torch.compile`.
        replays: as CUDA graphs (`gatrain.train.cuda_graphs`), where each backward follows its forward at once.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        backend: Any = "inductor",
        method: str = "loss_sum",
        *,
        replays: bool = False,
    ) -> None:
        import torch._dynamo

        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, RECOMPILATIONS)
        self._task, self._model, self._method = task, model, method
        self._options = {"backend": backend, **({"options": cuda_graphs.OPTIONS} if replays else {})}
        self._is_dynamic = bool(task.variable_length)
        self._replays = replays
        self._call: Callable[..., Any] = self._compile()
        self._stopped = False
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._lengths: set[tuple[tuple[int, ...], ...]] = set()
        self._again = 0
        self.notices: list[str] = []
        """What a person has to know, in order; whoever tells it clears it."""

    def __call__(self, batch: Batch, **told: Any) -> Any:
        """``told``: what the loss asks for beside the batch (`gatrain.tasks.base.asks_for`), such as ``step``."""
        shapes = shapes_of(batch)
        if self._stopped or shapes in self._shapes:
            return self._call(batch, **told)
        self._shapes.add(shapes)
        if not self._is_dynamic:
            self._lengths.add(_without_count(shapes))
            if len(self._lengths) > MOST_LENGTHS or len(self._shapes) > MOST_SHAPES:
                self._become_dynamic()
            return self._call(batch, **told)
        before = _compilations()
        result = self._call(batch, **told)
        self._again += _compilations() > before
        if self._again > MOST_AGAIN:
            self._stop()
        return result

    def _compile(self) -> Callable[..., Any]:
        call = _compiled(self._task, self._model, self._options, self._is_dynamic, self._method)
        return cuda_graphs.Replayed(call, self._model) if self._replays else call

    def _become_dynamic(self) -> None:
        self._is_dynamic = True
        self._call = self._compile()
        self.notices.append(
            f"batches came in {len(self._shapes)} shapes, so lengths are compiled as dynamic from here on; "
            "variable_length = True on the data does so from the start."
        )

    def _stop(self) -> None:
        self._stopped = True
        self._call = functools.partial(getattr(self._task, self._method), self._model)
        self.notices.append(
            f"{len(self._shapes)} shapes of batches made torch compile {self._again} times and more, so nothing is "
            "compiled from here on; pad batches to fewer shapes, or set compile=false."
        )


def _compilations() -> int:
    """Graphs that were compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _without_count(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes without the number of samples, where a tensor begins with it as the first one does."""
    count = next((shape[0] for shape in shapes if shape), None)
    return tuple(shape[1:] if shape and shape[0] == count else shape for shape in shapes)


def _compiled(
    task: Task, model: nn.Module, options: dict[str, Any], is_dynamic: bool, method: str
) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(task, method)
    is_loss = method == "loss_sum"

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        made = torch.compile(function, dynamic=None if is_dynamic else False, **options)
        return _with_static_batch(made) if is_dynamic else made

    blocks = repeated_blocks(model)
    if not blocks and is_loss and asks_for_step(task):
        blocks = [model]  # a number that changes with each step would compile the loss again and again
    if not blocks:
        return compiled(lambda batch, **told: plain(model, batch, **told))
    # Dynamo looks at the gradient of a block's input, which is a result and has none (seen in 2.11 to 2.15)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    call_task = task.partly_compiled_loss_sum(compiled) if is_loss else plain
    calls = [(block, compiled(block._call_impl)) for block in blocks]

    def run(batch: Batch, **told: Any) -> Any:
        for block, call in calls:
            block.__dict__["_compiled_call_impl"] = call  # what nn.Module.compile sets
        try:
            return call_task(model, batch, **told)
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
