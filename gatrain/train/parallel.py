"""The door `parallel`: how model, gradients and optimizer state lie on the ranks. ``parallel: replicated``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, PeerFailed, WorkerError
from gatrain.tasks.window import Rows
from gatrain.train.gathered_rows import gathered
from gatrain.train.main_gradients import MainGradients
from gatrain.train.modules import sparse_parameters
from gatrain.train.optimizer import clip_with_sparse
from gatrain.train.overlap import OverlappedReduction, share_buffers, without_reduction, wrappers_of
from gatrain.train.ranks import Ranks, layout_of

T = TypeVar("T")

_NOTHING = contextlib.nullcontext()


class Replicated:
    """Every rank holds the whole model and optimizer; gradients are added over the ranks, once a window.

    A model in DistributedDataParallel, or with such modules inside, is kept from reducing by itself.
    """

    factor = 1.0
    """What a micro-batch's share of the loss is multiplied by: gradients are added, not averaged."""

    def wrap(self, model: nn.Module, ranks: Ranks) -> nn.Module:
        """Make all ranks begin with rank 0's parameters and buffers. Collective."""
        ranks.broadcast_from_first(p.data for p in model.parameters())
        ranks.broadcast_from_first(model.buffers())
        return model

    def set_up(
        self,
        model: nn.Module,
        ranks: Ranks,
        *,
        main_gradients: MainGradients | None = None,
        overlaps: bool = False,
    ) -> None:
        """Find what is reduced.

        Args:
            model: as `wrap` gave it.
            main_gradients: stand-ins for its 16-bit parameters, if it has any.
            overlaps: reduce bucket by bucket in the last backward of a window. Otherwise all of them run without
                communication, the ranks agree that nobody failed, and the gradients are added at once.

        Raises:
            ConfigError: DistributedDataParallel that cannot be kept from reducing; a sharded model.
        """
        self.ranks = ranks
        self._wrappers = wrappers_of(model, ranks)
        ignored = {
            id(parameter)
            for wrapper in self._wrappers
            for name, parameter in wrapper.module.named_parameters()
            if name in wrapper.parameters_to_ignore
        }
        owners = [p for p in model.parameters() if p.requires_grad]
        trained = owners if main_gradients is None else main_gradients.trained
        pairs = [(p, owner) for p, owner in zip(trained, owners, strict=True) if id(owner) not in ignored]
        self.parameters = list(trained)
        """Those that get gradients: fp32 stand-ins instead of 16-bit ones. The same on every rank."""
        self._reduced = [parameter for parameter, _ in pairs]
        declared = sparse_parameters(model)
        self._sparse = [parameter for parameter, owner in pairs if id(owner) in declared]
        self._overlap: OverlappedReduction | None = None
        if overlaps and ranks.world_size > 1:
            places = [place for place, (_, owner) in enumerate(pairs) if id(owner) in declared]
            owners = [owner for _, owner in pairs]
            self._overlap = OverlappedReduction(ranks, self._reduced, owners, places)

    @property
    def overlaps(self) -> bool:
        """Whether the reduction starts in the last backward."""
        return self._overlap is not None

    def begin_window(self) -> None:
        """Send buffers where DistributedDataParallel would. Collective if there is such a module."""
        if self._wrappers:
            share_buffers(self._wrappers, self.ranks)

    def micro_step(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward of a micro-step belong in here: no module reduces by itself."""
        return without_reduction(self._wrappers) if self._wrappers else _NOTHING

    def backward(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A backward belongs in here; ``last`` lets the reduction start in it."""
        return self._overlap.during_backward() if last and self._overlap is not None else _NOTHING

    def settle(self) -> None:
        """After a backward: a sparse gradient in which rows come again and again gets no larger than its table."""
        for parameter in self._sparse:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse and gradient._nnz() > len(gradient):
                parameter.grad = gradient.coalesce()

    def reduce(self) -> None:
        """Add the gradients over the ranks after they agreed that nobody failed. Collective."""
        if self._overlap is not None:
            self._overlap.finish()
        elif self.ranks.world_size > 1:
            self.ranks.reduce_gradients(self._reduced, self._agree())

    def reduce_in_place_of_gradients(
        self, tensors_of: Callable[[nn.Parameter], Sequence[Tensor]], used: Collection[int]
    ) -> None:
        """Add what parameters have instead of gradients over the ranks, after they agreed. Collective.

        Args:
            tensors_of: a parameter's tensors, dense, as many and as large on every rank.
            used: ids of the parameters of which this rank has something to add; what no rank uses stays as it is.
        """
        if self.ranks.world_size == 1:
            return
        if len(self._reduced) < len(self.parameters):
            raise ConfigError(
                "DistributedDataParallel is told to ignore parameters, whose ranks go ways of their own; only "
                "gradient=plain with another optimizer can leave them so. Use optimizer=adamw."
            )
        found = self._agree([float(id(parameter) in used) for parameter in self._reduced])
        taken = [parameter for parameter, count in zip(self._reduced, found, strict=True) if count]
        self.ranks.add([tensor for parameter in taken for tensor in tensors_of(parameter)])

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's rows of a tensor, in the order of the ranks. Collective within a window.

        Args:
            tensor: shape [n, ...]; n may differ between the ranks, and be 0.
        """
        if self.ranks.world_size == 1:
            return [tensor]
        self._agree()
        return self.ranks.gather_rows(tensor)

    def gather_nested(self, rows: Rows | None) -> tuple[Rows, int]:
        """`gathered` within a window: rows of all ranks, and the place of this rank's first one. Collective."""
        if self.ranks.world_size > 1:
            self._agree()
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        return gathered(self.ranks, rows, device)

    def gather_values(self, value: T) -> list[T]:
        """Every rank's small Python value, in the order of the ranks. Collective within a window."""
        if self.ranks.world_size > 1:
            self._agree()
        return self.ranks.gather(value)

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank. Collective within a window."""
        if self.ranks.world_size == 1:
            return flag
        self._agree()
        return self.ranks.sum([float(flag)])[0] > 0

    def _agree(self, mine: Sequence[float] | None = None) -> list[float]:
        """Meet the other ranks in a window. Collective.

        Args:
            mine: a number for each reduced parameter; `layout_of` it by default. Gives their sums over the ranks.

        Every collective of a window begins with it, so that a rank that fails between two knows what the others
        wait in.

        Raises:
            PeerFailed: a rank has come through `tell_of_failure`.
        """
        mine = [layout_of(parameter) for parameter in self._reduced] if mine is None else mine
        failed, *sums = self.ranks.sum([0.0, *mine])
        if failed:
            error = PeerFailed("another rank failed in this window; its own error says why.")
            error.before_update = True
            raise error
        return sums

    def tell_of_failure(self, error: Exception) -> None:
        """The others wait in this window's next collective: let them know, so that all leave it together."""
        if self.ranks.world_size == 1 or isinstance(error, PeerFailed):
            return
        if self._overlap is None:
            self.ranks.sum([1.0, *(0.0 for _ in self._reduced)])
            return
        self.drop_gradients()  # nothing of this window is of use; the buckets need the memory
        try:
            self._overlap.finish(failed=True)
        except Exception as failure:  # now this process must end, or the others wait for it for ever
            raise WorkerError(f"{type(failure).__name__}: {failure}") from failure

    def clip(self, limit: float | None, parameters: Sequence[nn.Parameter] | None = None) -> Tensor:
        """Scale the reduced gradient down to an L2 norm of ``limit``; None leaves it as it is.

        Args:
            parameters: those of `parameters` whose gradient it is; all of them by default.

        Returns:
            The norm before: a scalar on the device, the same on every rank.
        """
        parameters = self.parameters if parameters is None else parameters
        declared = {id(parameter) for parameter in self._sparse}
        for parameter in parameters:
            # a function of the user's own that is sparse: told of by no module, so the optimizer may not take it
            if parameter.grad is not None and parameter.grad.is_sparse and id(parameter) not in declared:
                parameter.grad = parameter.grad.to_dense()
        if self._sparse:
            return clip_with_sparse(parameters, limit)
        if limit is not None:
            return nn.utils.clip_grad_norm_(parameters, limit)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def drop_gradients(self) -> None:
        """Forget them, and free their memory."""
        for parameter in self.parameters:
            parameter.grad = None

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics). Collective."""
        self.ranks.broadcast_from_first(model.buffers())
