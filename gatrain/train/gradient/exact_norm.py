"""BatchNorm over the whole window, forward and backward: exact. ``norm: exact``.

Two ways come to the same gradient:

- together (`gatrain.train.norm.together`): every micro-batch once forward and once backward, which holds the
  activations of all micro-batches of a rank, on the device and, as far as they do not fit, in main memory;
- layer by layer (`gatrain.train.norm.layer_by_layer`): in the memory of one micro-batch, with passes for each
  layer.

The first is taken where there is memory and nothing in the model stands against it. All ranks decide alike, before
the first pass of a window; a window that finds out in its middle is begun again in the other way.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatrain.config import RunConfig, TuneConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.train.gradient import StepCost
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import batch_norms
from gatrain.train.norm.buffers import KeptBuffers
from gatrain.train.norm.calls import owners_of
from gatrain.train.norm.layer_by_layer import LayerByLayer
from gatrain.train.norm.leaving import Leave
from gatrain.train.norm.look import Look, look
from gatrain.train.norm.over_window import WindowNorms
from gatrain.train.norm.room import Room, room_now
from gatrain.train.norm.together import Together
from gatrain.train.seeding import derive_seed
from gatrain.train.turns import Threads
from gatrain.units import size

if TYPE_CHECKING:
    from gatrain.train.step import Step

ACTIVATIONS = ("auto", "window", "micro_batch")
MOST_TOGETHER = 1024
"""Micro-batches of a rank: each has a thread."""


class ExactNorm(Plain):
    """The gradient of BatchNorm over all samples of the window, whatever micro-batches and ranks they are on.

    Args:
        activations: those that are held at once: of the ``window``, of one ``micro_batch``, or what memory allows.
    """

    exact = (
        "the gradient of BatchNorm over the whole window, and its running statistics, for any loss that is a sum "
        "over samples beside it and any model that computes its BatchNorm layers in one order"
    )
    needs_whole_window = True
    overlaps = False
    adds_micro_batches = False
    normalises_window = True
    norms = WindowNorms

    def __init__(self, activations: str = "auto") -> None:
        self._asked = activations
        self._fraction = TuneConfig().memory_fraction
        self._look: Look | None = None
        self._room: Room | None = None
        self._is_compared = False
        self._threads = Threads()
        self._is_undisturbed = False
        """Whether a window has shown that its micro-batches leave one another alone."""
        self._draws_on_host = False
        self._barred: Leave | None = None
        """Why micro-batches are not computed together any more."""
        self.way = ""
        """Of the last window: ``together``, ``layer by layer``, or ``plain``, where one micro-batch is all."""
        self._told: set[str] = set()
        self._news: list[str] = []

    # --- before the run -----------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> None:
        self._fraction = config.tune.memory_fraction
        if config.compile not in ("auto", False):
            raise ConfigError(
                "norm=exact halts forwards at each BatchNorm layer, which compiled code cannot: leave compile out."
            )
        if config.precision == "fp16":
            raise ConfigError(_NO_FP16)
        if config.checkpointing not in ("auto", "none"):
            raise ConfigError(
                f"norm=exact sees to memory by itself and does not go with checkpointing={config.checkpointing}: "
                "leave checkpointing out. 'norm={name: exact, activations: micro_batch}' needs the least memory."
            )

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self._look, self._room, self._barred = None, None, None
        self._is_compared = self._is_undisturbed = False
        if _has_wrapper(step.model):
            raise ConfigError(
                "norm=exact ends forwards early, which DistributedDataParallel cannot: give the model itself."
            )
        if step.scaler is not None:
            raise ConfigError(_NO_FP16)

    def cost_of(self, model: nn.Module) -> StepCost:
        """Of the way that was taken; before the first window, of the one that is taken where there is memory."""
        layered = self._asked == "micro_batch" or self._barred is not None or self.way == LAYERED
        return layered_cost(len(batch_norms(model))) if layered else StepCost()

    def news(self) -> list[str]:
        found, self._news = self._news, []
        return found

    # --- one window ---------------------------------------------------------------------------------------

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        if step.ranks.world_size == 1 and len(window.micro_batches) == 1:
            self.way = "plain"
            super().__call__(window, step)  # all samples are in one batch: BatchNorm sees them by itself
            return
        if window.seed is None:  # every pass must draw the same numbers
            drawn = int(torch.randint(2**62, ()))
            window = dataclasses.replace(window, seed=(derive_seed(drawn),))
        names, buffers = owners_of(step.model), KeptBuffers(step.model)
        try:
            if self._look is None:
                with_graph = self._asked != "micro_batch"
                self._look = look(window, step, buffers, names, with_graph=with_graph)
                self._draws_on_host = self._look.draws_on_host
                self._room = room_now(step, len(window.micro_batches), self._fraction)
            norms = self._together(window, step, buffers, names)
            if norms is None:
                self.way = LAYERED
                norms = self.norms(step, self._look.sites, names)
                LayerByLayer(norms, window, step, buffers, compares=not self._is_compared)()
        except BaseException:
            buffers.reset()
            raise
        self._is_compared = True
        norms.move_running_statistics(step.model, counts=not window.micro_batches)

    def _together(
        self, window: LoadedWindow, step: Step, buffers: KeptBuffers, names: dict[int, str]
    ) -> WindowNorms | None:
        """None where the window has to be computed layer by layer. Collective."""
        assert self._look is not None
        away = self._away_bytes(window, step)
        has_gradients = _has_gradients(step)
        while away is not None:
            norms = self.norms(step, self._look.sites, names)
            together = Together(
                norms,
                window,
                step,
                buffers,
                self._look,
                is_first=not self._is_undisturbed,
                draws_on_host=self._draws_on_host,
                away_bytes=away,
                may_leave=self._asked == "auto",
            )
            leave = together(self._threads)
            if leave is None:
                self.way = TOGETHER
                self._is_undisturbed |= together.is_proven
                self._tell(window, self._look.window_bytes(window), away)
                return norms
            del together
            gc.collect()  # frames of an error hold one another, and activations
            if step.device.type == "cuda":
                torch.cuda.empty_cache()
            buffers.reset()
            if not has_gradients:  # else it was left before its backward
                step.reset()
            if leave.again:
                self._draws_on_host = True
            else:
                self._leave(leave, step)
                return None
        return None

    def _away_bytes(self, window: LoadedWindow, step: Step) -> float | None:
        """Bytes of a window's activations for main memory; None where micro-batches are not computed together.
        Collective: all ranks compute a window in one way."""
        if self._asked == "micro_batch" or self._barred is not None:
            return None
        assert self._look is not None
        assert self._room is not None
        needed = self._look.window_bytes(window)
        away = self._room.away(needed)
        mine = self._obstacle(window, step)
        if mine is None and away is None and self._asked == "auto":
            mine = Leave(
                f"the activations of a window take {size(needed)} and there is room for "
                f"{size(self._room.device + self._room.host)}, main memory included",
                for_good=False,
            )
        leave = next((each for each in step.parallel.gather_values(mine) if each is not None), None)
        if leave is not None:
            self._leave(leave, step)
            return None
        return max(0.0, needed - self._room.device) if away is None else away

    def _obstacle(self, window: LoadedWindow, step: Step) -> Leave | None:
        """What stands against threads, beside memory."""
        assert self._look is not None
        if _has_wrapper(step.model):
            return Leave("the model has DistributedDataParallel inside")
        if self._look.grown:
            return Leave(f"the model adds tensors to {self._look.grown} in its forward")
        if len(window.micro_batches) > MOST_TOGETHER:
            return Leave(f"a rank has more than {MOST_TOGETHER} micro-batches", for_good=False)
        if self._asked == "auto" and _has_gradients(step):
            return Leave("there are gradients already, to which those of the window are to be added", False)
        if (
            torch.is_autocast_enabled(step.device.type)
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
        ):
            return Leave("it was called in a context of PyTorch that other threads do not have", False)
        return None

    def _leave(self, leave: Leave, step: Step) -> None:
        """
        Raises:
            ExactnessError: the other way was asked for.
        """
        if self._asked == "window":
            raise ExactnessError(
                f"norm=exact: activations=window is not possible here, since {leave.why}. Leave activations out."
            )
        if leave.for_good:
            self._barred = leave
        times = layered_times(len(self._look.sites if self._look is not None else ()))
        self._say(
            leave.why,
            f"norm=exact: computed layer by layer, about {times:.0f} times the passes of norm=keep, since "
            f"{leave.why}.",
        )

    def _tell(self, window: LoadedWindow, needed: float, away: float) -> None:
        where = f", {size(away)} of them in main memory" if away else ""
        self._say(
            TOGETHER,
            f"norm=exact: the {len(window.micro_batches)} micro-batches of a step are computed together, each once "
            f"forward and once backward as with norm=keep; their activations, about {size(needed)} on each rank, "
            f"are held at once{where}.",
        )

    def _say(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._news.append(text)


TOGETHER, LAYERED = "together", "layer by layer"


def layered_cost(layers: int) -> StepCost:
    """Layer by layer, of a model with this many layers, which are as if spread evenly: a forward up to a layer is
    half of one."""
    return StepCost(micro_steps=1 + layers / 2, forwards=layers / 2)


def layered_times(layers: int) -> float:
    """The same in micro-steps."""
    return layered_cost(layers).in_micro_steps


def _has_gradients(step: Step) -> bool:
    return any(parameter.grad is not None for parameter in step.parallel.parameters)


def _has_wrapper(model: nn.Module) -> bool:
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


_NO_FP16 = "norm=exact is not tested with the loss scale of fp16. Use precision=bf16 or precision=fp32."
