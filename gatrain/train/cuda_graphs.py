"""CUDA graphs around compiled code, for ``compile=reduce-overhead``: the host hands a GPU a whole forward or
backward at once instead of kernel by kernel, which is what a small model waits for.

PyTorch records and replays them (`torch.compile` with ``triton.cudagraphs``). A replay writes into the same memory
as the one before, so what is needed for longer is copied out of it here: losses and counts when they are returned,
and gradients of a window's earlier micro-steps before the next forward. A window of one micro-step copies none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

OPTIONS = {
    "triton.cudagraphs": True,
    "triton.cudagraph_skip_dynamic_graphs": True,
    "graph_partition": False,
}
"""Of the compiler. Code for lengths that vary is not recorded: each length would have a graph and memory of its
own. A graph is recorded as one or not at all: parts of it (around each flash attention) would be recorded anew
wherever what lies between them moves in memory."""
_OWN = "_gatrain_outlives_replays"


class Replayed:
    """A compiled function whose results outlive its next call.

    Args:
        call: compiled with `OPTIONS`.
        model: whose gradients it leaves in memory that the next call writes to.
    """

    def __init__(self, call: Callable[..., Any], model: nn.Module) -> None:
        self._call = call
        self._parameters = list(model.parameters())

    def __call__(self, *args: Any, **told: Any) -> Any:
        self._keep_gradients()
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map_only(Tensor, Tensor.clone, self._call(*args, **told))

    def _keep_gradients(self) -> None:
        """Copy gradients that a backward has left in a graph's memory; later micro-steps add to the copies."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and not hasattr(gradient, _OWN):
                parameter.grad = kept = gradient.detach().clone()
                setattr(kept, _OWN, True)


def forget() -> None:
    """Free the graphs' memory, after `torch.compiler.reset`."""
    from torch._inductor import cudagraph_trees

    cudagraph_trees.reset_cudagraph_trees()
