"""The reduction that overlaps the last backward, and what it has to know of DistributedDataParallel.

DistributedDataParallel waits for every parameter of a bucket: one that the last micro-step leaves out keeps its own
rank's gradient, or makes the ranks wait for each other. So it is never asked to reduce here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gatrain.errors import ConfigError, ExactnessError, PeerFailed
from gatrain.train.modules import check_is_replicated
from gatrain.train.ranks import SPARSE, Ranks, buckets_of, flatten, layout_of

LATE = (
    "a parameter got a second gradient after its reduction had begun, as with reentrant checkpointing of a part "
    "that is used twice. Use sync=window (in your own loop: no DistributedDataParallel) or use_reentrant=False."
)


class OverlappedReduction:
    """Adds gradients over the ranks bucket by bucket, while the last backward of a window still runs.

    Every rank puts the same buckets into the same order of collectives, whatever its own samples used: a bucket
    starts once the last backward has reached all of its parameters, and what was not reached starts at the end
    with what earlier micro-steps left, or zeros. Parameters that no rank used in the last window come after that,
    and only if a rank has used them in this one.

    Args:
        parameters: those whose ``.grad`` is reduced, the same in the same order on every rank.
        owners: the parameters that the backward reaches, one for each; the same ones but for stand-ins.
        sparse: places of parameters that are expected to have sparse gradients: those are in no bucket.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Sequence[nn.Parameter],
        owners: Sequence[nn.Parameter],
        sparse: Sequence[int] = (),
    ) -> None:
        self._ranks = ranks
        self._parameters = parameters
        self._owners = owners
        self._usual = [place for place in range(len(parameters)) if place not in set(sparse)]
        self._arrange()

    @contextlib.contextmanager
    def during_backward(self) -> Iterator[None]:
        """The last backward of this rank's window runs in here."""
        hooks = [
            owner.register_post_accumulate_grad_hook(self._hook(place))
            for place, owner in enumerate(self._owners)
            if owner.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self, failed: bool = False) -> None:
        """Start what has not started, and wait. Collective, also for a rank without samples or with an error.

        Raises:
            PeerFailed: another rank failed.
            ExactnessError: a gradient came after its bucket had started, on any rank.
        """
        while self._started < len(self._buckets):
            self._start()
        layouts = [0.0] * len(self._parameters)
        for place in range(len(self._parameters)):
            layouts[place] = self._found.get(place, layout_of(self._parameters[place]))
        failures, late, *found = self._ranks.sum([float(failed), float(self._came_late), *layouts])
        for work in self._pending:
            work.wait()  # makes the current stream wait; the host goes on
        reduced = self._usual
        if not failures:
            self._usual = [place for place, layout in enumerate(found) if layout % SPARSE]
        try:
            if failures and not failed:
                error = PeerFailed("another rank failed in this window; its own error says why.")
                error.before_update = True
                raise error
            if late:
                raise ExactnessError(LATE)
            if not failures:
                self._complete(reduced, found)
        finally:
            self._arrange()

    def _complete(self, reduced: Sequence[int], found: Sequence[float]) -> None:
        """Leave every gradient as one process would, and reduce those that were in no bucket."""
        for place in reduced:
            parameter = self._parameters[place]
            if not found[place]:
                parameter.grad = None
            elif found[place] % SPARSE == 0 and parameter.grad is not None:  # only known now
                parameter.grad = parameter.grad.to_sparse(1)
        in_bucket = set(reduced)
        rest = [place for place in range(len(self._parameters)) if place not in in_bucket]
        parameters = [self._parameters[place] for place in rest]
        self._ranks.reduce_gradients(parameters, [found[place] for place in rest])

    def _arrange(self) -> None:
        """Forget the last window; lay out the next one's buckets, alike on all ranks."""
        places = {id(self._parameters[place]): place for place in self._usual}
        self._buckets = [
            [places[id(parameter)] for parameter in bucket]
            for bucket in buckets_of([self._parameters[place] for place in self._usual])
        ]
        self._bucket_of = {place: nth for nth, bucket in enumerate(self._buckets) for place in bucket}
        self._missing = [set(bucket) for bucket in self._buckets]
        self._pending: list[dist.Work] = []
        self._found: dict[int, float] = {}
        self._started = 0
        self._came_late = False

    def _hook(self, place: int) -> Any:
        def arrived(owner: Tensor) -> None:
            nth = self._bucket_of.get(place)
            if nth is None:
                return
            if nth < self._started:
                self._came_late = True
            self._missing[nth].discard(place)
            while self._started < len(self._buckets) and not self._missing[self._started]:
                self._start()

        return arrived

    def _start(self) -> None:
        bucket = [self._parameters[place] for place in self._buckets[self._started]]
        found = {place: layout_of(self._parameters[place]) for place in self._buckets[self._started]}
        flat = flatten(bucket)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._found |= found
        self._pending.append(work)
        self._started += 1


def wrappers_of(model: nn.Module, ranks: Ranks) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules in a model, wherever they are.

    Raises:
        ConfigError: one of a kind that cannot be kept from reducing, or that reduces over other ranks; a sharded
            model.
    """
    check_is_replicated(model)
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    for wrapper in found:
        if wrapper.static_graph:
            raise ConfigError(
                "DistributedDataParallel(static_graph=True) cannot accumulate: with no_sync it fails in its first "
                "backward, or stops reducing. Leave static_graph out: gatrain reduces by itself, and as fast."
            )
        if wrapper.process_group.size() != ranks.world_size:
            raise ConfigError(
                f"DistributedDataParallel reduces over {wrapper.process_group.size()} of {ranks.world_size} "
                "ranks; the window is that of all ranks. Leave process_group out."
            )
    return found


@contextlib.contextmanager
def without_reduction(wrappers: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """In here DistributedDataParallel neither reduces gradients nor sends buffers: both passes belong in here."""
    with contextlib.ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(wrapper.no_sync())
            wrapper.require_forward_param_sync = False
        yield


@torch.no_grad()
def share_buffers(wrappers: Sequence[DistributedDataParallel], ranks: Ranks) -> None:
    """Send rank 0's buffers, as DistributedDataParallel does before a forward (``broadcast_buffers``)."""
    buffers = [b for wrapper in wrappers if wrapper.broadcast_buffers for b in wrapper.module.buffers()]
    for kind in dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers):
        alike = [buffer for buffer in buffers if (buffer.dtype, buffer.device) == kind]
        flat = torch.cat([buffer.reshape(-1) for buffer in alike])
        ranks.broadcast_from_first([flat])
        for buffer, part in zip(alike, flat.split([buffer.numel() for buffer in alike]), strict=True):
            buffer.copy_(part.view_as(buffer))
