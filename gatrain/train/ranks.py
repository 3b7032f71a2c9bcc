"""The collectives of a job: small host sums that every rank joins, and the one gradient reduction.

All of them are called by every rank, in the same order; a rank that leaves one out blocks the others.
"""

from __future__ import annotations

import atexit
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatrain.errors import PeerFailed
from gatrain.units import MIB

T = TypeVar("T")
P = TypeVar("P", bound=Tensor)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.2
"""Between two looks at what rank 0 does alone."""
_FAILED = "failed"
_alone = itertools.count()
"""All ranks call `Ranks.alone` in the same order, so they agree on the number."""

BUCKET_BYTES = 64 * MIB
"""Gradient bytes per all-reduce: large enough for full bandwidth, small enough to bound the extra copy."""


class Ranks:
    """This process's place among the ranks. With one process every method is a local no-op."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, host_group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._host_group = host_group

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of torch.distributed's default group, or a single one where none is initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        atexit.unregister(_let_threads_end)
        atexit.register(_let_threads_end)
        group = _host_group_beside(dist.distributed_c10d._get_default_group())
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum host numbers over all ranks, exactly for integers below 2**53. Never touches the device."""
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._host_group)
        return [float(value) for value in tensor.tolist()]

    def share_object(self, value: T) -> T:
        """Give every rank rank 0's small Python value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group, device=torch.device("cpu"))
        return box[0]

    def alone(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank, however long it takes there: a small Python value.

        The others look again and again whether it is done. In a collective they would wait until its timeout and
        take the run down, for a disk or a file system that is slow.

        Raises:
            PeerFailed: on the other ranks, when ``work`` has failed.
        """
        if self.world_size == 1:
            return work()
        store = dist.distributed_c10d._get_default_store()
        key = f"gatrain/alone/{next(_alone)}"
        if self.rank == 0:
            try:
                value = work()
            except BaseException:
                store.set(key, _FAILED)
                raise
            store.set(key, "done")
            return self.share_object(value)
        pause_s = FIRST_PAUSE_S
        while not store.check([key]):
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 1.5 * pause_s)
        if store.get(key).decode() == _FAILED:
            raise PeerFailed("rank 0 failed in what it does alone; its own error says why.")
        # and nobody ends, with the store, before all have read it
        return self.share_object(None)  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's small Python value, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._host_group)
        return box

    def any(self, flag: Tensor) -> Tensor:
        """Whether a flag is set on any rank: a scalar on its device, for which the host does not wait."""
        if self.world_size == 1:
            return flag
        flags = flag.to(torch.float32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return flags > 0

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor of shape [n, ...], in the order of the ranks; n may differ. On the device.

        A rank with n = 0 need not know the other dimensions.
        """
        if self.world_size == 1:
            return [tensor]
        shapes = self.gather((tuple(tensor.shape), tensor.dtype))
        rows = [shape[0] for shape, _ in shapes]
        shape, dtype = max(shapes, key=lambda each: each[0][0])
        padded = torch.zeros(shape, dtype=dtype, device=tensor.device)  # as long as the longest
        if len(tensor):
            padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        return [part[:count] for part, count in zip(parts, rows, strict=True)]

    def broadcast_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank rank 0's values, in place."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter], layouts: Sequence[float]) -> None:
        """Sum ``.grad`` over all ranks, each parameter once. (`MainGradients` stand in for 16-bit parameters.)

        Args:
            parameters: the same ones in the same order on every rank.
            layouts: `layout_of` each, summed over all ranks. Where NO rank has a gradient ``.grad`` stays None, as
                in one process, so that no optimizer decays a parameter that took no part. Where all are sparse
                the sum is sparse.
        """
        if self.world_size == 1:
            return
        dense: list[nn.Parameter] = []
        sparse: list[nn.Parameter] = []
        for parameter, layout in zip(parameters, layouts, strict=True):
            if layout:
                is_sparse = layout % SPARSE == 0
                (sparse if is_sparse else dense).append(parameter)
        pending = []
        for bucket in buckets_of(dense):
            flat = flatten(bucket)
            pending.append(dist.all_reduce(flat, async_op=True))  # .grad are views of it
        for parameter in sparse:
            self._reduce_sparse(parameter)
        for work in pending:
            work.wait()  # makes the current stream wait; the host goes on

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks in place, with a copy of one bucket. The same ones on every rank."""
        if self.world_size == 1:
            return
        for bucket in buckets_of(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)  # makes the current stream wait; the host goes on
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)])

    def _reduce_sparse(self, parameter: nn.Parameter) -> None:
        """Add the rows that the ranks have, without the table's other rows. Waits for the device."""
        mine = parameter.grad
        slots = [0.0] * (2 * self.world_size)
        if mine is not None:
            slots[2 * self.rank : 2 * self.rank + 2] = [
                float(mine._nnz()),
                float(mine.sparse_dim()),
            ]
        counts = self.sum(slots)
        rows, sparse_dim = [int(count) for count in counts[::2]], int(max(counts[1::2]))
        if not max(rows):  # all ranks have an empty one
            parameter.grad = mine if mine is not None else _no_rows(parameter, sparse_dim)
            return
        indices = torch.zeros(sparse_dim, max(rows), dtype=torch.int64, device=parameter.device)
        values = torch.zeros(
            max(rows), *parameter.shape[sparse_dim:], dtype=parameter.dtype, device=parameter.device
        )
        if mine is not None:
            indices[:, : rows[self.rank]] = mine._indices()
            values[: rows[self.rank]] = mine._values()
        all_indices = [torch.empty_like(indices) for _ in rows]
        all_values = [torch.empty_like(values) for _ in rows]
        dist.all_gather(all_indices, indices)
        dist.all_gather(all_values, values)
        # a row that appears twice is added by whoever takes the gradient
        parameter.grad = torch.sparse_coo_tensor(
            torch.cat([part[:, :count] for part, count in zip(all_indices, rows, strict=True)], dim=1),
            torch.cat([part[:count] for part, count in zip(all_values, rows, strict=True)]),
            parameter.shape,
            check_invariants=False,
        )


SPARSE = 2.0**24
"""How a sparse gradient counts among `layout_of`; a dense one counts 1, and there are fewer ranks than this."""


def layout_of(parameter: nn.Parameter) -> float:
    """0 without a gradient, 1 for a dense one, `SPARSE` for a sparse one: their sum over the ranks tells all."""
    if parameter.grad is None:
        return 0.0
    return SPARSE if parameter.grad.is_sparse else 1.0


def _no_rows(parameter: Tensor, sparse_dim: int) -> Tensor:
    indices = torch.zeros(sparse_dim, 0, dtype=torch.int64, device=parameter.device)
    values = torch.zeros(0, *parameter.shape[sparse_dim:], dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False).coalesce()


EXIT_PAUSE_S = 0.2


def _let_threads_end() -> None:
    """Give gloo's threads time to let go of the last tensors before Python ends.

    One that still holds a tensor then waits for the interpreter's lock and aborts the process, which had succeeded.
    """
    time.sleep(EXIT_PAUSE_S)


_host_groups: dict[str, dist.ProcessGroup] = {}
"""Groups for host tensors that were made beside default groups that cannot reduce them, by the latter's name."""


def _host_group_beside(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A group that reduces host tensors; None where the default one does. Collective at the first call else."""
    if any(device.type == "cpu" for device in group._device_types):
        return None  # a result that holds it would keep its threads past destroy_process_group
    if group.group_name not in _host_groups:
        made = dist.new_group(backend="gloo")
        assert isinstance(made, dist.ProcessGroup)  # every rank is a member
        _host_groups[group.group_name] = made
    return _host_groups[group.group_name]


def buckets_of(parameters: Sequence[P]) -> list[list[P]]:
    """Group consecutive parameters of one dtype and device into buckets, last layers first."""
    buckets: list[list[P]] = []
    size, kind = 0, None
    for parameter in reversed(parameters):
        this_kind = (parameter.dtype, parameter.device)
        if not buckets or this_kind != kind or size >= BUCKET_BYTES:
            buckets.append([])
            size, kind = 0, this_kind
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


def flatten(bucket: list[nn.Parameter]) -> Tensor:
    """Copy the gradients into one buffer and point ``.grad`` at it, so that the originals are freed at once."""
    first = bucket[0]
    flat = torch.zeros(sum(p.numel() for p in bucket), dtype=first.dtype, device=first.device)
    views, gradients, offset = [], [], 0
    for parameter in bucket:
        # the parameter's own strides: fused optimizers want gradients laid out like parameters
        view = flat.as_strided(parameter.size(), _dense_strides(parameter), offset)
        offset += parameter.numel()
        if parameter.grad is not None:
            views.append(view)
            dense = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            gradients.append(dense)
        parameter.grad = view
    if views:
        torch._foreach_copy_(views, gradients)
    return flat


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    return torch.empty_like(parameter, device="meta").stride()
