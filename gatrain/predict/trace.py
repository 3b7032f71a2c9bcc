"""The tracing process: ``python -m gatrain.predict.trace FOLDER``. Runs a recipe's real model, loss, backward and
optimizer step on tensors without data, and writes down every allocation.

Nothing here needs a GPU or much memory: `torch` computes shapes only (FakeTensorMode), whatever the model's size.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from gatrain import build, child, codec
from gatrain.compose import load_config
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, GatrainError
from gatrain.predict import request
from gatrain.predict.child import FAILED
from gatrain.predict.emulate import emulate_cuda
from gatrain.predict.request import ModeTrace, Piece, TraceRequest, TraceResult
from gatrain.predict.timeline import Held, LinearStep, Recording, same_events
from gatrain.predict.tracer import Batches, StepTracer, model_without_memory
from gatrain.tasks.base import Task
from gatrain.train.checkpointing import available_modes
from gatrain.train.lengths import Lengths, notice_lengths

SMALL_PRIMES = (5, 7, 11, 13, 17, 19, 23)
"""Sizes of a first trace: a storage whose bytes such a prime divides grows with the batch, if the prime divides no
parameter's bytes. Size 1 is avoided: dimensions of 1 are copied and broadcast differently."""
MAX_BISECTIONS = 8
MOST_LENGTHS = 500
MOST_ELEMENTS = 2**31 - 1
"""Where a tensor has more, code that counts with 32 bits goes another way."""


def trace_mode(tracer: StepTracer, mode: str, asked: TraceRequest, known: ModeTrace | None) -> ModeTrace:
    """Trace a mode so that every micro-batch up to the largest of use can be replayed.

    Args:
        known: another mode of the same model. Recomputing blocks changes nothing of where the model starts to do
            other things, nor of how the sizes of its tensors depend on the batch.
    """
    began = time.perf_counter()
    with tracer.in_mode(mode):
        only = asked.fixed if asked.share > 1 else 1
        straightness = None if known is None else known.straightness
        if only is not None:
            pieces = [Piece(1, tracer.record(only), None)]
        elif known is not None and known.is_regular:
            starts = [piece.start for piece in known.pieces]
            sizes = [_prime(tracer.held), *(_prime_from(s, tracer.held) for s in starts[1:])]
            pieces = [Piece(s, tracer.record(b), None) for s, b in zip(starts, sizes, strict=True)]
        else:
            pieces, straightness = _pieces(tracer, asked)
    held, seconds = tracer.held, time.perf_counter() - began
    return ModeTrace(
        mode, list(held.model), list(held.optimizer), pieces, straightness, seconds, list(held.gradients)
    )


def _pieces(tracer: StepTracer, asked: TraceRequest) -> tuple[list[Piece], float | None]:
    low = tracer.record(_prime(tracer.held))
    largest = asked.largest_of_use(LinearStep(low), tracer.held)
    if largest == low.micro_batch:
        return [Piece(1, low, None)], 0.0
    high = tracer.record(largest, quick=True)
    if same_events(low, high):
        step = LinearStep(low, high)
        return [Piece(1, low, high)], _straightness(tracer, step) if step.may_be_curved else 0.0
    if largest < low.micro_batch:
        return [Piece(1, tracer.record(largest), None)], None
    # below the size where the model starts to do other things, and from there on
    switch = _switch(tracer, low, largest)
    before = tracer.record(switch - 1, quick=True) if switch - 1 > low.micro_batch else low
    first = Piece(1, low, before if before is not low and same_events(low, before) else None)
    after, beyond = tracer.record(switch), tracer.record(largest, quick=True)
    if switch == largest or not same_events(after, beyond):
        beyond = tracer.record(_prime_from(switch + 1, tracer.held), quick=True)
    return [first, Piece(switch, after, beyond if same_events(after, beyond) else None)], None


def _prime(held: Held) -> int:
    sizes = [*held.model, *held.optimizer]
    return next((prime for prime in SMALL_PRIMES if all(size % prime for size in sizes)), SMALL_PRIMES[-1])


def _prime_from(start: int, held: Held) -> int:
    """The first prime from a size on that serves as one of `SMALL_PRIMES` does; the size itself if none is near."""
    sizes = [*held.model, *held.optimizer]
    near = range(start, 2 * start)
    primes = (n for n in near if n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1)))
    return next((prime for prime in primes if all(size % prime for size in sizes)), start)


def _straightness(tracer: StepTracer, step: LinearStep) -> float:
    """How far the line is from a trace between its ends, relative to the trace."""
    size = (step.low.micro_batch + step.high.micro_batch) // 2
    middle = tracer.record(size, quick=True)
    if not same_events(step.low, middle):
        return 1.0
    closing = {**step.low.phases, **middle.phases}
    traced = LinearStep(dataclasses.replace(middle, phases=closing))
    peaks = [each.peak(size, tracer.held, accumulates=True).reserved for each in (step, traced)]
    return abs(peaks[0] / peaks[1] - 1)


def _switch(tracer: StepTracer, low: Recording, largest: int) -> int:
    """The smallest size at which the model does other things than at the small sizes."""

    def differs(size: int, quick: bool = True) -> bool:
        return not same_events(low, tracer.record(size, quick=quick))

    below, above = low.micro_batch, largest
    # most likely where the largest tensor outgrows an index of 32 bits
    guess = MOST_ELEMENTS * low.micro_batch // max(1, low.largest_elements) + 1
    if below < guess - 1 and guess <= above:
        if differs(guess - 1):
            above = guess - 1
        elif guess == above or differs(guess, quick=False):
            return guess
        else:
            below = guess
    for _ in range(MAX_BISECTIONS):
        if above - below <= 1:
            break
        middle = (below + above) // 2
        below, above = (below, middle) if differs(middle) else (middle, above)
    return above


def trace_all(config: RunConfig, requests: Sequence[TraceRequest]) -> list[TraceResult]:
    """Trace every way of computing that the requests name and the model offers."""
    build.check_targets(config)
    task = build.build_task(config)
    noticed = notice_lengths(task, config.train.seed)
    batches = Batches(task, config.train.seed)
    emulate_cuda()
    gc.freeze()  # what is loaded by now is not looked at again by each collection
    lengths = _lengths(task, noticed)
    return [_trace(task, batches, config, asked, lengths) for asked in requests]


def _trace(
    task: Task, batches: Batches, config: RunConfig, asked: TraceRequest, lengths: list[float]
) -> TraceResult:
    traces: list[ModeTrace] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_without_memory(task, config.train.seed, build.build_norm(config))
        offered = available_modes(model)
        parameters = [p.numel() for p in model.parameters()]
        gradients = sum(
            p.numel() * max(p.element_size(), 4) for p in model.parameters() if p.requires_grad
        )  # fp32 at least (`gatrain.train.main_gradients`)
        if not gradients:
            raise ConfigError(f"the model {type(model).__name__} has no parameter to train.")
        tracer = StepTracer(task, model, config, asked, batches)
        for mode in [mode for mode in asked.modes if mode in offered]:
            traces.append(trace_mode(tracer, mode, asked, traces[0] if traces else None))
        passes = build.build_strategy(config).cost_of(model).in_micro_steps
    return TraceResult(sum(parameters), gradients, list(offered), traces, lengths, passes)


def _lengths(task: Task, noticed: Lengths) -> list[float]:
    """What `TraceResult.lengths` says of the samples, where the data tells their lengths or some were read."""
    known = getattr(task.train_data, "lengths", None)
    lengths = sorted((noticed.sizes if known is None else known) if task.variable_length else ())
    steps = min(MOST_LENGTHS, len(lengths))
    return [float(lengths[(2 * n + 1) * len(lengths) // (2 * steps)] / lengths[-1]) for n in range(steps)]


def _work(folder: Path, words: list[str]) -> dict[str, Any]:
    config = load_config(folder / request.CONFIG)
    asked = codec.decode(
        list[TraceRequest], json.loads((folder / request.REQUEST).read_text(encoding="utf-8"))
    )
    try:
        return {"results": codec.encode(trace_all(config, asked))}
    except GatrainError:
        raise
    except Exception as error:
        if os.environ.get("GATRAIN_DEBUG"):
            traceback.print_exc()
        text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        raise GatrainError(
            f"the model cannot be traced without data: {text} Models whose shapes depend on values "
            "(.item(), masks that select) need a real trial: gatrain autotune, on a machine with the GPU."
        ) from error


if __name__ == "__main__":
    child.main(_work, FAILED)
