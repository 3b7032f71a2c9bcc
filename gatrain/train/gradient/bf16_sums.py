"""Sums of micro-gradients in bf16 buffers, by stochastic rounding (half of fp32's memory) or Kahan summation.

A bf16 sum that rounds to nearest stops growing once a term is below 2**-9 of it, so that is not on offer. Relative
L2 error of the sum of K noisy gradients (a signal of 0.3 of the noise), measured against fp64:

====  ===============  ======  =======
K     stochastic       Kahan   nearest
====  ===============  ======  =======
8     4.4e-3           2.0e-3  3.5e-3
64    1.1e-2           1.8e-3  8.1e-3
512   3.1e-2           1.7e-3  2.2e-2
4096  6.6e-2           1.7e-3  0.49
====  ===============  ======  =======

An fp32 sum has 1e-7 there at most. (Kahan's sums here are better by what the carry still holds at the end.)
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatrain import units
from gatrain.config import RunConfig
from gatrain.tasks.base import Batch
from gatrain.train.gradient import GradientStrategy, refuse
from gatrain.train.main_gradients import gradient_bytes
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.seeding import derive_seed

if TYPE_CHECKING:
    from gatrain.train.step import Step

COMPARED = 2**24
"""Elements whose sum is kept in fp32 as well in the first window, to measure the error: 64 MiB."""
_ROUNDING = 0x726F756E64
"""The use of a micro-step's seed."""


class Bf16Sums(GradientStrategy):
    """Accumulation in bf16 buffers; reduced and applied in fp32."""

    name: str
    buffers: int
    """For each parameter."""
    adds_micro_batches = False

    def __init__(self) -> None:
        self._step: Step | None = None
        self._hooks: list[RemovableHandle] = []
        self._sums: dict[int, list[Tensor]] = {}
        """For each trained parameter, by its id: its buffers."""
        self._exact: dict[int, Tensor] | None = {}
        """fp32 sums of some of them, in the first window; None later on."""
        self._room = COMPARED
        self._key: tuple[int, ...] | None = None
        """What the rounding of the micro-step in hand follows from; None outside of micro-steps."""
        self._error: tuple[Tensor, int] | None = None

    def check(self, config: RunConfig) -> None:
        why = "the sums are bf16 until the last backward is over, and are added over the ranks in fp32"
        conflict = ("sync=overlap", config.sync == "overlap", why, "sync=window")
        refuse([conflict], f"gradient={self.name}", "use gradient=plain")

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self._attach(step)

    def remarks(self, model: nn.Module) -> list[str]:
        held = gradient_bytes(model)
        buffers = 2 * self.buffers * sum(p.numel() for p in model.parameters() if p.requires_grad)
        return [
            f"gradient={self.name} is not exact: sums over micro-steps are kept in bf16, {units.size(buffers)} "
            f"instead of {units.size(sum(held))}, until the last backward is over; then they are fp32. What they "
            "are off by is measured on the first window and told with the first step. An fp32 sum is off by 1e-7."
        ]

    def news(self) -> list[str]:
        if self._error is None:
            return []
        (error, micro_steps), self._error = self._error, None
        return [
            f"gradient={self.name}: the sum of the first window's {micro_steps} micro-gradients is off by "
            f"{float(error):.1e} (relative L2, rank 0's part, against an fp32 sum of the same)"
        ]

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        if self._step is not step:
            self._attach(step)
        self._sums.clear()  # of a window that failed
        for k, batch in step.batches(window):
            step.seed(window, k)
            self._micro_step(step, batch, None, window.seed_of(k) or (k,))
            del batch
        self._compare(len(window.micro_batches))

    def micro_step(
        self, step: Step, batch: Batch, scale: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        self._micro_step(step, batch, scale, (0,))

    def reduce(self, step: Step) -> None:
        """The buffers become fp32 gradients, one after the other, once the activations are gone."""
        for parameter in step.parallel.parameters:
            if (sums := self._sums.pop(id(parameter), None)) is not None:
                parameter.grad = self.total(sums).to(parameter.dtype)
        step.parallel.reduce()

    def _micro_step(
        self, step: Step, batch: Batch, scale: Mapping[str, float] | None, key: tuple[int, ...]
    ) -> None:
        with self._keyed(key):
            step.forward_backward(batch, scale)

    @contextlib.contextmanager
    def _keyed(self, key: tuple[int, ...]) -> Iterator[None]:
        self._key = key
        try:
            yield
        finally:
            self._key = None

    def _attach(self, step: Step) -> None:
        self._step = step
        for hook in self._hooks:
            hook.remove()
        owners = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        # 16-bit parameters have moved their gradient into an fp32 one by then: that hook was registered before
        self._hooks = [
            owner.register_post_accumulate_grad_hook(self._hook(trained, place))
            for place, (owner, trained) in enumerate(zip(owners, step.parallel.parameters, strict=True))
        ]

    def _hook(self, trained: nn.Parameter, place: int) -> Callable[[Tensor], None]:
        def take(owner: Tensor) -> None:
            gradient = trained.grad
            # a look at the model, not a window; or rows of a table, which add up by themselves
            if self._key is None or gradient is None or gradient.is_sparse:
                return
            trained.grad = None
            sums = self._sums.get(id(trained))
            if sums is None:
                sums = self._sums[id(trained)] = self.zeros(gradient)
            self.add(sums, gradient, derive_seed(*self._key, _ROUNDING, place))
            self._note(trained, gradient)

        return take

    # --- how far off it is --------------------------------------------------------------------------------

    def _note(self, trained: nn.Parameter, gradient: Tensor) -> None:
        if self._exact is None:
            return
        if id(trained) in self._exact:
            self._exact[id(trained)] += gradient
        elif gradient.numel() <= self._room:
            self._room -= gradient.numel()
            self._exact[id(trained)] = gradient.to(torch.float32, copy=True)

    def _compare(self, micro_steps: int) -> None:
        if not self._exact:
            return
        differences = [self.total(self._sums[place]) - exact for place, exact in self._exact.items()]
        off, whole = (nn.utils.get_total_norm(list(each)) for each in (differences, self._exact.values()))
        self._error = off / whole.clamp(min=1e-30), micro_steps
        self._exact = None

    # --- the two ways -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def zeros(self, gradient: Tensor) -> list[Tensor]:
        """Buffers for the sum of gradients like this one."""

    @abc.abstractmethod
    def add(self, sums: list[Tensor], gradient: Tensor, seed: int) -> None:
        """Add a gradient, in place."""

    @abc.abstractmethod
    def total(self, sums: list[Tensor]) -> Tensor:
        """The sum in fp32."""


class Stochastic(Bf16Sums):
    """``gradient=bf16_stochastic``: each sum is rounded up or down at random, right on average. 2 bytes for each
    element. What is drawn follows from the run's seed, the window, the micro-batch's place in it and the parameter,
    so a resumed run rounds alike."""

    name = "bf16_stochastic"
    buffers = 1
    exact = "not exact: a sum in bf16, rounded at random, without bias; its error is told with the first step"

    def zeros(self, gradient: Tensor) -> list[Tensor]:
        return [torch.zeros_like(gradient, dtype=torch.bfloat16)]

    def add(self, sums: list[Tensor], gradient: Tensor, seed: int) -> None:
        generator = torch.Generator(gradient.device).manual_seed(seed)
        exact = sums[0].to(torch.float32).add_(gradient)
        # a bf16 number is the upper half of an fp32 one: a random lower half carries into it as often as it should
        bits = exact.view(torch.int32)
        drawn = torch.randint(
            0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
        )
        rounded = (bits + drawn).bitwise_and_(-(2**16)).view(torch.float32)
        sums[0].copy_(torch.where(torch.isfinite(exact), rounded, exact))

    def total(self, sums: list[Tensor]) -> Tensor:
        return sums[0].to(torch.float32)


class Kahan(Bf16Sums):
    """``gradient=bf16_kahan``: what a sum has lost to rounding is carried in a second bf16 buffer. 4 bytes for each
    element, as an fp32 sum, which is better: for comparison, or where nothing but bf16 may be stored."""

    name = "bf16_kahan"
    buffers = 2
    exact = "not exact: a compensated sum in bf16; its error is told with the first step"

    def zeros(self, gradient: Tensor) -> list[Tensor]:
        return [torch.zeros_like(gradient, dtype=torch.bfloat16) for _ in range(2)]

    def add(self, sums: list[Tensor], gradient: Tensor, seed: int) -> None:
        total, lost = sums
        before = total.to(torch.float32)
        term = gradient.to(torch.float32) - lost
        total.copy_(before + term)
        lost.copy_((total - before) - term)

    def total(self, sums: list[Tensor]) -> Tensor:
        return sums[0].to(torch.float32) - sums[1]
