"""`norm=exact` with all micro-batches together: nothing of one reaches another, and where it could, it is left."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_on_ranks
from test_exact_gradient import relative_error
from test_exact_norm import UNet, block, data, one_shot, seeded, split, statistics
from test_norm import Batch, gradients, step_of, window
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatrain.errors import ExactnessError, PeerFailed
from gatrain.train import offload
from gatrain.train.dropout import RandomNumbers
from gatrain.train.dropout.keyed import KeyedDropout
from gatrain.train.gradient import exact_norm
from gatrain.train.gradient.exact_norm import LAYERED, TOGETHER, ExactNorm
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.norm.exact import Exact
from gatrain.train.norm.room import Room
from gatrain.train.ranks import Ranks
from gatrain.train.turns import Threads, Turn

SIZES = (4, 3, 2)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads_left() == 0


def threads_left() -> int:
    """Threads of strategies that nobody has any more: those end as soon as no micro-batch is under way."""
    until = time.monotonic() + 10
    while True:
        gc.collect()
        left = sum(thread.name.startswith("gatrain-turn") for thread in threading.enumerate())
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.01)


# --- turns --------------------------------------------------------------------------------------------------


def test_functions_take_turns_and_an_error_comes_out_with_its_traceback() -> None:
    order: list[Any] = []

    def body(name: str) -> None:
        order.append((name, turns[name].pause(f"{name} here")))
        raise ZeroDivisionError(name)

    threads = Threads()
    turns = {
        name: Turn(lambda name=name: body(name), threads, nth)  # type: ignore[misc]
        for nth, name in enumerate("ab")
    }
    assert [turns[name].go() for name in "ab"] == ["a here", "b here"]
    with pytest.raises(ZeroDivisionError, match="a") as raised:
        turns["a"].go(1)
    assert "in body" in "".join(traceback.format_tb(raised.value.__traceback__))
    turns["b"].stop()
    assert order == [("a", 1)]


# --- random numbers and what else is the process's -----------------------------------------------------------


class Drops(nn.Module):
    """Draws from every generator, between and after its BatchNorm layers."""

    def __init__(self, on_host: bool) -> None:
        super().__init__()
        self.on_host = on_host
        self.first, self.second, self.head = block(3, 4), block(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(self.drop(x)))
        if self.on_host:
            x = x * (1 + random.random()) * (1 + float(np.random.rand()))
        return self.head(self.drop(self.second(x).mean(dim=(2, 3))))


def seeded_window() -> LoadedWindow:
    micro_batches = window(data(9), SIZES).micro_batches
    places = [sum(SIZES[:nth]) for nth in range(len(SIZES))]
    placed = [
        dataclasses.replace(micro, position=place) for micro, place in zip(micro_batches, places, strict=True)
    ]
    return LoadedWindow(placed, seed=(5,))


@pytest.mark.parametrize(
    ("on_host", "numbers"), [(False, RandomNumbers), (True, RandomNumbers), (False, KeyedDropout)]
)
def test_dropout_is_that_of_each_micro_batch_by_itself(
    on_host: bool, numbers: Callable[[], RandomNumbers]
) -> None:
    found = []
    for way in ("window", "micro_batch"):
        model = seeded(lambda: Drops(on_host))
        drawn = numbers()
        drawn.set_up(model)
        step, given = step_of(model, Exact(), strategy=ExactNorm(way)), seeded_window()
        step.random, step.autocast = drawn, drawn.around(step.autocast)
        for _ in range(2):
            model.zero_grad()
            step.gradient(given)
        found.append(torch.cat([gradients(model), statistics(model)]))
    assert relative_error(found[0], found[1]) < 1e-13


def test_numbers_of_the_host_that_the_first_forward_did_not_draw_are_looked_after_too() -> None:
    found = []
    for way in ("auto", "micro_batch"):
        model = seeded(lambda: Drops(False))
        step = step_of(model, Exact(), strategy=ExactNorm(way))
        given = seeded_window()
        step.gradient(given)
        model.on_host = True
        model.zero_grad()
        step.gradient(given)
        found.append(gradients(model))
        assert step.strategy.way == (TOGETHER if way == "auto" else LAYERED)
    assert relative_error(found[0], found[1]) < 1e-13


class Aside(nn.Module):
    """Puts something aside in its forward and takes it back later on."""

    def __init__(self, put: Callable[[Any, Tensor], None], take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.put, self.take = put, take
        self.first, self.second, self.head = block(3, 4), block(4, 4), nn.Linear(4, 4)
        self.losses: list[Tensor] = []
        self.register_buffer("factor", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.put(self, x.square().mean(dim=(1, 2, 3)))
        return self.head(self.second(x).mean(dim=(2, 3))) * (1 + self.take(self)[:, None])


_elsewhere: list[Any] = [None]


def _away(model: Any, aside: Tensor) -> None:
    _elsewhere[0] = aside


def _scaled(model: Any, aside: Tensor) -> None:
    model.factor.fill_(1.0)
    model.losses = [aside * model.factor]


@pytest.mark.parametrize(
    ("put", "take", "sizes", "way", "why"),
    [
        (lambda m, a: setattr(m, "aside", a), lambda m: m.aside, SIZES, TOGETHER, ""),
        (lambda m, a: setattr(m, "losses", [a]), lambda m: m.losses.pop(), SIZES, TOGETHER, ""),
        (lambda m, a: m.losses.append(a), lambda m: m.losses[-1], SIZES, LAYERED, "adds tensors to losses"),
        (_away, lambda m: _elsewhere[0], SIZES, LAYERED, "a forward among the others failed"),
        (_away, lambda m: _elsewhere[0], (3, 3, 3), LAYERED, "keeps values of one"),
        (_scaled, lambda m: m.losses[0], SIZES, LAYERED, "writes to what the backward"),
    ],
)
def test_what_a_model_puts_aside_in_its_forward_stays_with_its_micro_batch(
    put: Callable[[Any, Tensor], None],
    take: Callable[[Any], Tensor],
    sizes: Sequence[int],
    way: str,
    why: str,
) -> None:
    model, strategy = seeded(lambda: Aside(put, take)), ExactNorm()
    wanted = one_shot(seeded(lambda: Aside(put, take)), data(9))
    for _ in range(2):
        model.zero_grad()
        assert relative_error(split(model, data(9), sizes, strategy), wanted) < 1e-13
        assert strategy.way == way
    (said,) = strategy.news()
    assert why in said


def test_what_a_model_checkpoints_beside_its_batch_norm_is_computed_again_as_it_was() -> None:
    class Partly(Drops):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.drop(torch.tanh(x)), self.first(x), use_reentrant=False)
            return self.head(self.drop(self.second(x).mean(dim=(2, 3))))

    found = []
    for way in ("window", "micro_batch"):
        model = seeded(lambda: Partly(False))
        step_of(model, Exact(), strategy=ExactNorm(way)).gradient(seeded_window())
        found.append(gradients(model))
    assert relative_error(found[0], found[1]) < 1e-13


# --- layers that not all need -------------------------------------------------------------------------------


class Chooses(nn.Module):
    """Its loss depends on the last layer for large micro-batches alone, or never."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.body, self.extra, self.head = block(3, 4), block(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        extra = self.extra(x)
        return self.head((x + extra if len(x) >= self.least else x).mean(dim=(2, 3)))


def test_a_layer_that_some_losses_do_not_depend_on_is_computed_layer_by_layer_that_once() -> None:
    found = []
    for way in ("auto", "micro_batch"):
        model, strategy = seeded(lambda: Chooses(3)), ExactNorm(way)
        step = step_of(model, Exact(), strategy=strategy)
        step.gradient(window(data(9), SIZES))
        found.append(gradients(model))
        assert strategy.way == LAYERED
        model.zero_grad()
        step.gradient(window(data(9), (3, 3, 3)))
        assert strategy.way == (TOGETHER if way == "auto" else LAYERED)
    assert relative_error(found[0], found[1]) < 1e-13


def test_parameters_that_no_loss_depends_on_get_no_gradient() -> None:
    model, other = seeded(lambda: Chooses(99)), seeded(lambda: Chooses(99))
    one_shot(other, data(9))
    split(model, data(9), SIZES, ExactNorm("window"))
    for one, given in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (given.grad is None)


# --- memory -------------------------------------------------------------------------------------------------


def test_without_room_for_a_window_it_is_computed_layer_by_layer_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact_norm, "room_now", lambda *given: Room(1e4, 1e4))
    strategy, wanted = ExactNorm(), one_shot(seeded(UNet), data(9))
    model = seeded(UNet)
    assert relative_error(split(model, data(9), SIZES, strategy), wanted) < 1e-13
    (said,) = strategy.news()
    assert "layer by layer, about 5 times the passes of norm=keep" in said
    assert "main memory included" in said
    assert strategy.cost_of(model).micro_steps == 4


def test_the_first_window_that_is_computed_together_is_looked_at_whatever_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact_norm, "room_now", lambda *given: Room(0, 0))
    strategy, wanted = (
        ExactNorm(),
        one_shot(seeded(apart := lambda: Aside(_away, lambda m: _elsewhere[0])), data(9)),
    )
    model = seeded(apart)
    for room in (Room(0, 0), Room(1e9, 1e9)):
        if strategy._look is not None:
            strategy._room = room
        model.zero_grad()
        assert relative_error(split(model, data(9), (3, 3, 3), strategy), wanted) < 1e-13
    assert "keeps values of one" in strategy.news()[-1]


def test_what_does_not_fit_on_the_device_waits_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Away(offload._Away):
        def __init__(self, *args: Any) -> None:
            taken.append(args[0].numel() * args[0].element_size())
            super().__init__(*args)

    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "_Away", Away)
    strategy, wanted = ExactNorm(), one_shot(seeded(UNet), data(9))
    split(seeded(UNet), data(9), SIZES, strategy)
    assert strategy._look is not None
    needed = strategy._look.window_bytes(window(data(9), SIZES))
    strategy = ExactNorm()
    monkeypatch.setattr(exact_norm, "room_now", lambda *given: Room(needed / 2, 1e9))
    assert relative_error(split(seeded(UNet), data(9), SIZES, strategy), wanted) < 1e-13
    assert strategy.way == TOGETHER
    assert "in main memory" in strategy.news()[0]
    assert needed / 2 <= sum(taken) < needed


class Bursts(UNet):
    """Fails in one micro-batch, in its forward or its backward."""

    error: Exception | None = None
    in_backward = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.error is not None and len(x) == 3:
            if not self.in_backward:
                raise self._once()
            y.register_hook(self._fail)
        return y

    def _fail(self, gradient: Tensor) -> Tensor:
        raise self._once()

    def _once(self) -> Exception:
        error, self.error = self.error, None
        assert error is not None
        return error


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_window_that_runs_out_of_memory_is_begun_again_layer_by_layer(in_backward: bool) -> None:
    model, strategy = seeded(Bursts), ExactNorm()
    step = step_of(model, Exact(), strategy=strategy)
    step.gradient(window(data(9), SIZES))
    assert strategy.way == TOGETHER
    model.zero_grad()
    other = seeded(UNet)
    one_shot(other, data(9))
    wanted = one_shot(other, data(9))
    model.error, model.in_backward = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        in_backward,
    )
    result, _ = step.gradient(window(data(9), SIZES))
    assert strategy.way == LAYERED
    assert relative_error(gradients(model), wanted) < 1e-13
    assert relative_error(statistics(model), statistics(other)) < 1e-13
    assert "memory ran out" in strategy.news()[-1]
    assert result.weight_totals == {"loss": 9.0}


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_error_of_one_micro_batch_ends_all_and_leaves_the_state_as_it_was(in_backward: bool) -> None:
    model = seeded(Bursts)
    step = step_of(model, Exact())
    step.gradient(window(data(9), SIZES))
    before = statistics(model)
    model.error, model.in_backward = ValueError("of a user's own"), in_backward
    with pytest.raises(ValueError, match="of a user's own") as raised:
        step.gradient(window(data(9), SIZES))
    assert "self._once()" in "".join(traceback.format_tb(raised.value.__traceback__))
    assert torch.equal(statistics(model), before)


def test_a_way_that_was_asked_for_and_is_not_possible_is_refused() -> None:
    model = seeded(lambda: Aside(lambda m, a: m.losses.append(a), lambda m: m.losses[-1]))
    with pytest.raises(ExactnessError, match="adds tensors to losses in its forward"):
        split(model, data(9), SIZES, ExactNorm("window"))


# --- two processes ------------------------------------------------------------------------------------------


def on_two_ranks() -> tuple[list[Tensor], list[str]]:
    """Gradients of windows in which rank 1 runs out of memory, then has an error; and what was said."""
    ranks, found, said = Ranks.current(), [], []
    x, y = data(10)
    mine: Batch = (x[:5], y[:5]) if ranks.rank == 0 else (x[5:], y[5:])
    sizes: Sequence[int] = (4, 1) if ranks.rank == 0 else (2, 3)
    for in_backward in (False, True):
        model, strategy = seeded(Bursts), ExactNorm()
        step = step_of(model, Exact(), ranks, strategy=strategy)
        model.error, model.in_backward = torch.OutOfMemoryError("CUDA out of memory"), in_backward
        step.gradient(window(mine, sizes))
        found += [gradients(model), statistics(model)]
        said += [strategy.way]
    for in_backward in (False, True):
        model = seeded(Bursts)
        step = step_of(model, Exact(), ranks)
        step.gradient(window(mine, sizes))
        model.error, model.in_backward = ValueError("of rank 1"), in_backward
        try:
            step.gradient(window(mine, sizes))
        except (ValueError, PeerFailed) as error:
            said += [type(error).__name__]
    del step, strategy
    said += [str(threads_left())]
    return found, said


def test_ranks_leave_the_way_together_and_none_waits_for_one_that_failed() -> None:
    model = seeded(UNet)
    wanted = [one_shot(model, data(10)), statistics(model)] * 2
    for rank, (found, said) in enumerate(run_on_ranks(2, on_two_ranks)):
        for given, right in zip(found, wanted, strict=True):
            assert relative_error(given, right) < 1e-13
        error = "PeerFailed" if rank == 0 else "ValueError"
        assert said == [LAYERED, LAYERED, error, error, "0"]
