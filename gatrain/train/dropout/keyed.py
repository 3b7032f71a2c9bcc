"""Dropout keyed by sample: ``dropout: keyed``.

A mask follows from the run's seed, the window, the sample's place in it, the block that draws, how often that block
was called, and the number of the draw in it. So it is the same in any micro-batch, on any rank, in any world size,
after a resume, in a second pass over the window and where a block is computed again. Its cost: uncompiled about a
dozen element-wise passes over integers for each mask, where torch has one kernel; compiled they are one. Attention
with dropout makes its matrix, as no fused kernel takes a mask of one's own.

Covered is what draws through ``torch.nn.functional`` (`gatrain.train.dropout.functions`), and stochastic depth by
row (timm, torchvision, transformers). Other draws in a forward (``torch.rand``, a recurrent layer's own dropout)
stay torch's: the check before the first step and ``gatrain verify`` name them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, ExactnessError
from gatrain.train.checkpointing import blocks_of
from gatrain.train.dropout import Context, RandomNumbers
from gatrain.train.dropout.functions import current, drawing, in_backward, install
from gatrain.train.dropout.masks import DROPOUT, STEP, keep_mask, keep_mask_as_one, sample_keys
from gatrain.train.dropout.places import places_of
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.seeding import derive_seed, mixed


@dataclass
class _Scope:
    """A block that draws: its draws are counted from its own beginning."""

    salt: Tensor
    """A number of the block, a scalar on the device, so that like blocks share compiled code."""
    calls: int = 0


class KeyedDropout(RandomNumbers):
    """Masks by sample.

    Args:
        batch_dim: the dimension of what is dropped that counts samples; attention's is always the first.
        flattened: a dimension of n times as many rows as samples holds n rows of each sample in turn, as where
            windows of an image or tokens are a part of the batch. Otherwise it is refused.
    """

    exact = "masks belong to samples: no split, rank, resume or recomputation changes them"
    is_keyed = True

    def __init__(self, batch_dim: int = 0, flattened: bool = False) -> None:
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(f"batch_dim={batch_dim!r} is not a dimension: 0, or 1 where time comes first")
        self._batch_dim, self._flattened = batch_dim, flattened
        self._keys: Tensor | None = None
        """[samples], int64: of the block under way. Where no sample is known a scalar, which stands for
        any number of them, or None."""
        self._count = 0
        """Draws in the block under way, or outside of all blocks."""
        self._scopes: list[_Scope] = []
        self._device = torch.device("cpu")

    # --- the model -----------------------------------------------------------------------------------------

    def set_up(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            _check(name, module)
        install()
        if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            # counts go on in the forward alone: a block that is computed again begins at its first draw
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        self._device = next((p.device for p in model.parameters()), self._device)
        for nth, block in enumerate(blocks_of(model)):
            salt = torch.tensor(derive_seed(nth + 1), dtype=torch.int64, device=self._device)
            scope = _Scope(salt)
            self._scopes.append(scope)
            block.forward = self._scoped(scope, block.forward)  # type: ignore[method-assign]
        for module in model.modules():
            if (rate := _row_rate(module)) is not None:
                module.forward = _by_row(module, module.forward, rate)  # type: ignore[method-assign]

    def _scoped(self, scope: _Scope, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if current.draws is self:
                return self._in_scope(scope, scope.calls, forward, args, kwargs)
            if torch.compiler.is_compiling() or current.last is not self or not in_backward():
                return forward(*args, **kwargs)
            if scope.calls != 1:  # the model computes it again by itself, and nobody knows which call
                self.refuse_recomputation()
            with self._under_way():
                return self._in_scope(scope, 0, forward, args, kwargs)

        return run

    def _in_scope(self, scope: _Scope, call: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        keys, count = self._keys, self._count
        scope.calls = call + 1
        self._count = 0
        if keys is not None:
            self._keys = keys + (scope.salt + call * STEP)
        try:
            return forward(*args, **kwargs)
        finally:
            self._keys, self._count = keys, count

    # --- whose numbers -------------------------------------------------------------------------------------

    def seed(self, window: LoadedWindow, k: int) -> None:
        super().seed(window, k)
        if window.seed is None:
            raise ExactnessError("dropout=keyed needs the seed of a window, and this one has none.")
        self._begin(sample_keys(window.seed, places_of(window.micro_batches[k]), self._device))

    def start(self, seed: tuple[int, ...], places: Sequence[int] | None) -> None:
        super().start(seed, places)
        if places is None:
            self._begin(torch.tensor(derive_seed(*seed, DROPOUT)).to(self._device, non_blocking=True))
        else:
            self._begin(sample_keys(seed, places, self._device))

    def _begin(self, keys: Tensor | None) -> None:
        self._keys, self._count, current.last = keys, 0, self
        for scope in self._scopes:
            scope.calls = 0

    def around(self, forward: Context) -> Context:
        @contextlib.contextmanager
        def both() -> Iterator[None]:
            with forward(), self._under_way():
                if (
                    self._keys is None or self._keys.dim() == 0
                ):  # a measurement may seed once for many forwards
                    self._begin(self._keys)
                yield

        return both

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        before, current.draws = current.draws, self
        try:
            yield
        finally:
            current.draws = before

    def state(self) -> Any:
        calls = [scope.calls for scope in self._scopes]
        return super().state(), (self._keys, self._count, calls), (current.draws, current.last)

    def resume(self, state: Any) -> None:
        drawn, place, (current.draws, current.last) = state
        super().resume(drawn)
        self._set(*place)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        before, last = current.draws, current.last
        current.draws = current.last = None
        try:
            yield
        finally:
            current.draws, current.last = before, last

    def replay(self) -> AbstractContextManager[Any]:
        """For a part of the forward that begins now: the context in which it is computed again."""
        keys, count, calls = self._keys, self._count, [scope.calls for scope in self._scopes]

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            now = self._keys, self._count, [scope.calls for scope in self._scopes]
            self._set(keys, count, calls)
            try:
                with self._under_way():
                    yield
            finally:
                self._set(*now)

        return again()

    def _set(self, keys: Tensor | None, count: int, calls: Sequence[int]) -> None:
        self._keys, self._count = keys, count
        for scope, number in zip(self._scopes, calls, strict=True):
            scope.calls = number

    def refuse_recomputation(self) -> NoReturn:
        """Raises: ExactnessError."""
        raise ExactnessError(
            "dropout=keyed: the model computes a part of its forward again in the backward by itself (gradient "
            "checkpointing of its own), and which masks that part drew is not known. Turn that off and use "
            "checkpointing=selective or checkpointing=full, or use dropout=torch."
        )

    # --- masks ---------------------------------------------------------------------------------------------

    def mask(self, input: Tensor, shape: Sequence[int], p: float, batch_dim: int | None = None) -> Tensor:
        """What is kept of ``input``, by sample: bool, of ``shape``, which may be 1 in other dimensions.

        Raises:
            ExactnessError: the dimension of samples has another size.
        """
        dim = self._batch_dim if batch_dim is None else batch_dim
        nth, self._count = self._count, self._count + 1
        rows = shape[dim] if dim < len(shape) else 0
        keys = self._keys
        if keys is None or keys.dim() == 0:
            numbers = torch.arange(rows, dtype=torch.int64, device=input.device)
            keys = numbers if keys is None else mixed(numbers + keys)
        samples = keys.shape[0]
        if rows == samples:
            return _drawn(keys, nth, shape, dim, 1 - p)
        if not self._flattened or not samples or rows % samples:
            _refuse_shape(tuple(input.shape), dim, samples, self._flattened)
        parts = [*shape[:dim], samples, rows // samples, *shape[dim + 1 :]]
        return _drawn(keys, nth, parts, dim, 1 - p).reshape(tuple(shape))

    def channel_mask(self, input: Tensor, p: float) -> Tensor:
        """One decision for each sample and channel, to be broadcast over ``input`` [samples, channels, ...]."""
        if input.dim() < 3:
            raise ExactnessError(
                f"dropout=keyed: dropout of whole channels got {list(input.shape)}, which has no dimension of "
                "samples beside channels and places. Give it [samples, channels, ...]."
            )
        shape = [*input.shape[:2], *[1] * (input.dim() - 2)]
        return self.mask(input, shape, p, batch_dim=0)


def _drawn(keys: Tensor, nth: int, shape: Sequence[int], batch_dim: int, keep: float) -> Tensor:
    if torch.compiler.is_compiling() and keys.device.type == "cpu":
        mask: Tensor = keep_mask_as_one(keys, nth, list(shape), batch_dim, keep)
        return mask
    return keep_mask(keys, nth, shape, batch_dim, keep)


def _refuse_shape(shape: tuple[int, ...], dim: int, samples: int, flattened: bool) -> NoReturn:
    ways = ["'dropout={name: keyed, batch_dim: 1}' where time comes first"] if dim == 0 else []
    if not flattened:
        ways.append(
            "'dropout={name: keyed, flattened: true}' where each sample has several rows, sample by sample"
        )
    raise ExactnessError(
        f"dropout=keyed: dropout got {list(shape)} in a micro-batch of {samples} samples, so dimension {dim} does "
        f"not count samples. Use {', '.join(ways)}{', or ' if ways else ''}dropout=torch."
    )


def _check(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
        raise ConfigError(
            f"dropout=keyed: {type(module).__name__} ({name}) draws its own dropout of {module.dropout:g} between "
            "its layers, inside one kernel. Set its dropout to 0 and put nn.Dropout between single layers, or use "
            "dropout=torch."
        )
    if type(module).__name__ == "StochasticDepth" and getattr(module, "mode", "row") != "row":
        raise ConfigError(
            f"dropout=keyed: StochasticDepth ({name}) with mode={module.mode!r} draws one number for a whole "
            "micro-batch, which no sample owns. Use mode='row', or dropout=torch."
        )


def _row_rate(module: nn.Module) -> Callable[[], float] | None:
    """How to ask a module of stochastic depth by row for its rate; None for any other module."""
    kind = type(module).__name__
    if kind == "StochasticDepth" and hasattr(module, "p"):
        return lambda: float(vars(module)["p"])
    if kind.endswith("DropPath") and hasattr(module, "drop_prob"):
        return lambda: float(vars(module)["drop_prob"] or 0.0)
    return None


def _by_row(module: nn.Module, forward: Callable[..., Any], rate: Callable[[], float]) -> Callable[..., Any]:
    """Each sample's path is kept whole or dropped whole (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""

    @functools.wraps(forward)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        p = rate()
        draws = drawing() if module.training and p > 0 else None
        if draws is None:
            return forward(input, *args, **kwargs)  # type: ignore[no-any-return]
        mask = draws.mask(input, [input.shape[0], *[1] * (input.dim() - 1)], p, batch_dim=0)
        scales = getattr(module, "scale_by_keep", True) and p < 1
        return input * mask * (1 / (1 - p) if scales else 1.0)

    return run
