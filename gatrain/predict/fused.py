"""A torch.compile backend that computes nothing new: it runs the graphs that the compiler would get, and lets only
those results take memory that fused kernels would write out.

The split into a forward and a backward graph, and so the choice of what is saved, is the one that training gets
(PyTorch's min-cut partitioner with inductor's decompositions). Which results a fused kernel writes out is a model
of inductor's scheduler: results of matrix products, convolutions, attention and reductions, what these read, what
leaves the graph, and what is read again after such a product and made of many tensors; everything else stays in
registers, or is computed again. A pointwise result takes the place of a like operand that is read for the last
time.
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
_REORDERING = {
    "permute", "transpose", "t", "select", "slice", "split", "split_with_sizes", "unbind", "as_strided", "diagonal",
}  # fmt: skip
MOST_READS = 4
"""What is read again after a product is computed again from what it is made of, unless that is more tensors than
this (inductor's ``realize_reads_threshold``)."""
LONG_REDUCTION = 4096
"""Elements of one sum that do not stay in a multiprocessor until it is known. About what inductor keeps there."""
VIEW, PRODUCT, REDUCTION, POINTWISE = "view", "product", "reduction", "pointwise"


def fused_backend(recorder: Recorder) -> Callable[..., Any]:
    """The backend for ``torch.compile``; what its graphs allocate goes to ``recorder`` while that is active."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import lowering  # noqa: F401  # pooling's decomposition expects it to be loaded
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
        self._nodes = _scheduled(list(module.graph.nodes))
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._kinds = {node: _kind(node) for node in self._nodes if _is_operation(node)}
        self._written: set[fx.Node] = set()
        for node in self._kinds:  # in order: what a later one reads depends on it
            if self._is_written(node):
                self._written.add(node)
        self._traffic = self._count_traffic()
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
        kind = self._kinds.get(node)
        if kind is None or kind == VIEW:
            return function(*args, **kwargs)
        if kind == PRODUCT:
            with self._recorder.in_best_layout():
                return function(*args, **kwargs)
        if node not in self._written:
            with self._recorder.unseen():
                return function(*args, **kwargs)
        self._recorder.note_traffic(*self._traffic[node])
        place = None if kind == REDUCTION else self._reusable(node, values)
        if place is None:
            with self._recorder.without_work():
                return function(*args, **kwargs)
        with self._recorder.unseen():
            result = function(*args, **kwargs)
        # the operand's storage lives on as the result's, which views of the result may keep
        result.untyped_storage()._in_place_of = place.untyped_storage()
        return result

    def _count_traffic(self) -> dict[fx.Node, tuple[list[int], int]]:
        """Bytes that each kernel reads and writes, and how many kernels it is. Between two products a value is read
        once, since what reads it is one kernel; what follows a long reduction reads it again."""
        found: dict[fx.Node, tuple[list[int], int]] = {}
        at_hand: set[fx.Node] = set()
        for node, kind in self._kinds.items():
            if kind == PRODUCT:
                at_hand = set()
            if kind == PRODUCT or node not in self._written:
                continue
            operands = self._operands(node)
            new = [_value_bytes(operand) for operand in operands if operand not in at_hand]
            found[node] = [*new, _value_bytes(node)], int(bool(new))
            at_hand |= {*operands, node}
            longest = max((_elements(operand) for operand in operands), default=0)
            if kind == REDUCTION and longest > LONG_REDUCTION * max(1, _elements(node)):
                at_hand = set()
        return found

    def _reusable(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor | None:
        """An operand that this kernel may overwrite: like its result, read here for the last time, and the graph's
        own. Saved activations are the backward graph's own (inductor's ``donated_buffer``)."""
        size = _value_bytes(node)
        for operand, is_in_order in self._operands(node).items():
            is_own = operand in self._written or _is_donated(operand)
            is_last = self._last[operand] == self._position[node]
            is_like = _value_bytes(operand) == size > 0 and _dtype(operand) == _dtype(node)
            if is_own and is_last and is_like and is_in_order:
                place = values[operand]
                return place if isinstance(place, Tensor) else None
        return None

    def _operands(self, node: fx.Node) -> dict[fx.Node, bool]:
        """The values in memory that a kernel reads, through what it keeps in registers, and whether it reads them
        in the order in which it writes."""
        found: dict[fx.Node, bool] = {}
        pending = [(operand, True) for operand in node.all_input_nodes]
        seen: set[tuple[fx.Node, bool]] = set()
        while pending:
            operand, is_in_order = pending.pop()
            if (operand, is_in_order) in seen:
                continue
            seen.add((operand, is_in_order))
            if operand in self._kinds and operand not in self._written:
                keeps = is_in_order and _name(operand) not in _REORDERING
                pending += [(source, keeps) for source in operand.all_input_nodes]
            else:
                found[operand] = found.get(operand, True) and is_in_order
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
        if any(_is_operation(user) and _name(user) == "as_strided" for user in node.users):
            return True  # strides are those of memory
        readers = self._readers(node)
        if any(reader.op == "output" or self._kinds.get(reader) == PRODUCT for reader in readers):
            return True
        first, last = self._position[node], max((self._position[r] for r in readers), default=0)
        if not any(self._kinds.get(between) == PRODUCT for between in self._nodes[first:last]):
            return False
        return len(self._operands(node)) > MOST_READS

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        found = []
        for user in node.users:
            found += self._readers(user) if self._kinds.get(user) == VIEW else [user]
        return found


def _scheduled(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes, with what is made of a pointwise result and only leaves the graph moved up to it: both are one
    kernel, such as a ReLU and the mask of it that the backward wants."""
    kinds = {node: _kind(node) for node in nodes if _is_operation(node)}
    position = {node: index for index, node in enumerate(nodes)}
    after: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if kinds.get(node) != POINTWISE or any(user.op != "output" for user in node.users):
            continue
        together, sources = [node], list(node.all_input_nodes)
        while view := next((source for source in sources if kinds.get(source) == VIEW), None):
            sources = [source for source in sources if source is not view] + view.all_input_nodes
            together.append(view)
        latest = max(sources, key=position.__getitem__, default=None)
        if latest is not None and kinds.get(latest) == POINTWISE:
            later = [each for each in together if position[each] > position[latest]]
            after.setdefault(latest, []).extend(sorted(later, key=position.__getitem__))
    moved = {node for group in after.values() for node in group}
    found: list[fx.Node] = []
    placed: set[fx.Node] = set()
    for node in nodes:
        for each in [*([] if node in moved else [node]), *after.get(node, ())]:
            if each not in placed:
                placed.add(each)
                found.append(each)
    return found


def _is_operation(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _is_donated(node: fx.Node) -> bool:
    return node.op == "placeholder" and not str(node.target).startswith(("primals", "tangents", "arg"))


def _kind(node: fx.Node) -> str:
    name = _name(node)
    if name in _VIEWS:
        return VIEW
    if node.target._overloadpacket in flop_registry:  # type: ignore[union-attr]
        return PRODUCT
    if name == "scatter" and not isinstance(node.args[3], fx.Node):
        return (
            POINTWISE  # of a constant, as in the gradient of cross-entropy: inductor compares with the index
        )
    return REDUCTION if name in _REDUCTIONS else POINTWISE


def _name(node: fx.Node) -> str:
    return str(node.target._overloadpacket.__name__)  # type: ignore[union-attr]


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _values(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [
        each for each in (value if isinstance(value, tuple | list) else [value]) if isinstance(each, Tensor)
    ]


def _elements(node: fx.Node) -> int:
    return max((value.numel() for value in _values(node)), default=0)


def _value_bytes(node: fx.Node) -> int:
    return sum(value.numel() * value.element_size() for value in _values(node))
