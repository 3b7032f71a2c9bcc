"""`recipe=contrastive` on a GPU: cached representations against one backward of the whole effective batch.

    python tests/benchmarks/contrastive.py [--width 12288] [--fits 1024] [--too-large 4096] [--micro 128]

Where the effective batch fits at once (``--fits``), a plain loop with one forward and one backward of all of it and
`gradient=cached` in micro-batches train from the same weights on the same batches: their losses, step by step, and
the seconds of a step. Where it does not (``--too-large``), the plain loop runs out of memory and cached goes on.
The towers are wide, so that 80 GiB are little; there is no dropout, whose masks depend on the split
(`dropout=keyed`). All in fp32 without TF32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import header, result_path, write_result
from torch import Tensor

from gatrain import build
from gatrain.compose import compose
from gatrain.errors import is_out_of_memory
from gatrain.plan import StepSettings
from gatrain.train.engine import Engine
from gatrain.train.micro_batches import LoadedWindow, MicroBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Runs:
    """Runs of the recipe with towers of one width."""

    def __init__(self, width: int, effective: int) -> None:
        words = [
            "recipe=contrastive",
            f"model.width={width}",
            "model.dropout=0",
            f"batch.effective={effective}",
        ]
        self.config = compose(words).config
        self.task = build.build_task(self.config)
        self.effective = effective

    def engine(self) -> Engine:
        settings = StepSettings("fp32", "none", False, "window")
        return build.build_engine(self.task, self.config, settings, DEVICE)

    def batch(self, step: int, rows: slice = slice(None)) -> Any:
        """Pairs of a step's batch, on the host."""
        order = torch.randperm(len(self.task.train_data), generator=torch.Generator().manual_seed(step))
        indices = order[: self.effective][rows].tolist()
        return self.task.collate([self.task.train_data[index] for index in indices])

    def one_shot(self, steps: int) -> tuple[list[float], list[float]]:
        """Losses and seconds of a plain loop."""
        engine, task = self.engine(), self.task
        clip = self.config.optimizer.clip_norm
        losses, seconds = [], []
        for step in range(steps):
            batch = engine.to_device(self.batch(step))
            began = _now()
            loss: Tensor = task.window_loss(task.represent(engine.model, batch))  # type: ignore[attr-defined]
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(engine.model.parameters(), clip)
            engine.optimizer.step()
            engine.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            seconds.append(_now() - began)
        return losses, seconds

    def cached(self, steps: int, micro: int) -> tuple[list[float], list[float]]:
        """Losses and seconds of gatrain's step."""
        engine = self.engine()
        losses, seconds = [], []
        for step in range(steps):
            starts = range(0, self.effective, micro)
            batches = [self.batch(step, slice(start, min(start + micro, self.effective))) for start in starts]
            counts = [len(batch[0]) for batch in batches]
            window = LoadedWindow(
                [
                    MicroBatch(batch, {"loss": float(count)}, samples=count)
                    for batch, count in zip(batches, counts, strict=True)
                ],
                seed=(step,),
            )
            began = _now()
            result, _ = engine.step(window, step)
            losses.append(float(result.local_loss_sums["loss"]) / self.effective)
            seconds.append(_now() - began)
        return losses, seconds


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(run: Any, *arguments: int) -> dict[str, Any]:
    """Losses, the median second of a step and the peak of memory; that it does not fit, where it does not."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        losses, seconds = run(*arguments)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"fits": False}
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None
    return {"fits": True, "losses": losses, "step_s": statistics.median(seconds[1:]), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=12288)
    parser.add_argument("--fits", type=int, default=1024)
    parser.add_argument("--too-large", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    small, large = Runs(asked.width, asked.fits), Runs(asked.width, asked.too_large)
    found = {
        "one_shot": measured(small.one_shot, asked.steps),
        "cached": measured(small.cached, asked.steps, asked.micro),
        "too_large_one_shot": measured(large.one_shot, 2),
        "too_large_cached": measured(large.cached, 4, asked.micro),
    }
    answers: dict[str, Any] = {"too_large_one_shot_fits": found["too_large_one_shot"]["fits"]}
    if found["one_shot"]["fits"]:
        pairs = zip(found["one_shot"]["losses"], found["cached"]["losses"], strict=True)
        answers["largest_relative_difference_of_losses"] = max(abs(b / a - 1) for a, b in pairs)
        answers["cost_factor"] = found["cached"]["step_s"] / found["one_shot"]["step_s"]
    print(answers, flush=True)
    result = {**header(), "command": " ".join(["python", *sys.argv]), "answers": answers, **found}
    write_result(result_path("contrastive", asked.out), result)


if __name__ == "__main__":
    main()
