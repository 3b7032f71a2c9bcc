"""A torch.compile backend that computes nothing new: it runs the graphs that the compiler would get, and lets only
those results take memory that fused kernels would write out.

The split into a forward and a backward graph, and so the choice of what is saved, is the one that training gets
(PyTorch's min-cut partitioner with inductor's decompositions). Which results a fused kernel writes out is a model
of inductor's scheduler: results of matrix products, convolutions, attention and reductions, what these read, what
leaves the graph, and what is read again after such a product; everything else stays in registers. A pointwise
result takes the place of an equally large operand that is read for the last time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from gatrain.predict.recorder import Recorder

_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "var_mean", "var", "std", "prod", "argmax", "argmin", "any", "all", "cumsum",
    "max", "min", "sort", "topk", "index_put", "scatter_add", "scatter", "scatter_reduce",
    "embedding_dense_backward",
    "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "_low_memory_max_pool_with_offsets",
    "native_group_norm", "native_group_norm_backward",
}  # fmt: skip
_VIEWS = {
    "view", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "as_strided", "alias",
    "detach", "split", "split_with_sizes", "unbind", "_unsafe_view", "reshape", "diagonal",
}  # fmt: skip
VIEW, PRODUCT, REDUCTION, POINTWISE = "view", "product", "reduction", "pointwise"


def fused_backend(recorder: Recorder) -> Callable[..., Any]:
    """The backend for ``torch.compile``; what its graphs allocate goes to ``recorder`` while that is active."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return _boxed(FusedGraph(graph, recorder))

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    return backend


def _boxed(graph: FusedGraph) -> Callable[[list[Any]], Any]:
    def run(arguments: list[Any]) -> Any:
        return graph.run(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]  # the caller gives its references away
    return run


class FusedGraph:
    """One graph with, for each node, whether its result is written out and when it is read last."""

    def __init__(self, module: fx.GraphModule, recorder: Recorder) -> None:
        self._module = module
        self._recorder = recorder
        self._nodes = list(module.graph.nodes)
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._kinds = {node: _kind(node) for node in self._nodes if _is_operation(node)}
        self._written = {node for node in self._kinds if self._is_written(node)}
        self._last: dict[fx.Node, int] = {}
        for node in reversed(self._nodes):
            self._last[node] = max((self._use(user) for user in node.users), default=self._position[node])
        self._ends: dict[int, list[fx.Node]] = {}
        for node, position in self._last.items():
            self._ends.setdefault(position, []).append(node)

    def run(self, arguments: list[Any]) -> Any:
        """Run the graph once, giving up each value after its last use."""
        values: dict[fx.Node, Any] = {}
        inputs = iter(list(arguments))
        arguments.clear()
        for position, node in enumerate(self._nodes):
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "output":
                inputs = iter(())
                return fx.node.map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                values[node] = getattr(self._module, str(node.target))
            else:
                values[node] = self._compute(node, values)
            for ended in self._ends.get(position, ()):
                values.pop(ended, None)
        raise AssertionError("a graph without an output")

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        function: Any = node.target
        if node not in self._kinds or self._kinds[node] in (VIEW, PRODUCT, REDUCTION):
            return function(*args, **kwargs)
        if node not in self._written:
            with self._recorder.unseen():
                return function(*args, **kwargs)
        place = self._reusable(node, values)
        if place is None:
            return function(*args, **kwargs)
        with self._recorder.unseen():
            result = function(*args, **kwargs)
        result._in_place_of = place  # the operand's storage lives on as the result's
        return result

    def _reusable(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor | None:
        """An operand that this kernel may overwrite: equally large, read here for the last time, and the graph's
        own. Saved activations are the backward graph's own (inductor's ``donated_buffer``)."""
        size = _value_bytes(node)
        for operand in self._operands(node):
            is_own = operand in self._written or _is_donated(operand)
            if is_own and self._last[operand] == self._position[node] and _value_bytes(operand) == size > 0:
                place = values[operand]
                return place if isinstance(place, Tensor) else None
        return None

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The values in memory that a kernel reads, through what it keeps in registers."""
        found: list[fx.Node] = []
        pending, seen = list(node.all_input_nodes), set()
        while pending:
            operand = pending.pop()
            if operand in seen:
                continue
            seen.add(operand)
            if operand in self._kinds and operand not in self._written:
                pending += operand.all_input_nodes
            else:
                found.append(operand)
        return found

    def _use(self, user: fx.Node) -> int:
        """When a read by ``user`` really happens: a value kept in registers is read where it is used."""
        if user in self._kinds and (self._kinds[user] == VIEW or user not in self._written):
            return self._last.get(user, self._position[user])
        return self._position[user]

    def _is_written(self, node: fx.Node) -> bool:
        kind = self._kinds[node]
        if kind in (PRODUCT, REDUCTION):
            return True
        if kind == VIEW:
            return False
        readers = self._readers(node)
        if any(reader.op == "output" or self._kinds.get(reader) == PRODUCT for reader in readers):
            return True
        first, last = self._position[node], max((self._position[r] for r in readers), default=0)
        return any(self._kinds.get(between) == PRODUCT for between in self._nodes[first:last])

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        found = []
        for user in node.users:
            found += self._readers(user) if self._kinds.get(user) == VIEW else [user]
        return found


def _is_operation(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _is_donated(node: fx.Node) -> bool:
    return node.op == "placeholder" and not str(node.target).startswith(("primals", "tangents", "arg"))


def _kind(node: fx.Node) -> str:
    packet = node.target._overloadpacket  # type: ignore[union-attr]
    name = packet.__name__
    if name in _VIEWS:
        return VIEW
    if packet in flop_registry:
        return PRODUCT
    if name == "scatter" and not isinstance(node.args[3], fx.Node):
        return (
            POINTWISE  # of a constant, as in the gradient of cross-entropy: inductor compares with the index
        )
    return REDUCTION if name in _REDUCTIONS else POINTWISE


def _value_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
