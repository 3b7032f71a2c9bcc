"""ResNet-50 under accumulation with `norm=keep`, `group` and `exact`: throughput, and agreement with one shot.

    python tests/benchmarks/resnet_norm.py [--effective 256] [--micro 16] [--pixels 224] [--device cuda]
        [--ways keep group exact exact-together exact-offload exact-layers]

``exact`` takes the way that memory allows and says which; ``exact-together`` computes all micro-batches together,
``exact-offload`` does so with two thirds of the activations in main memory, ``exact-layers`` goes layer by layer.

Agreement is the relative L2 difference of the gradient, and of the running statistics, from one forward and
backward of the same model over the whole effective batch: in fp64, or as ``--agreement fp32`` says without TF32,
where the one-shot gradient itself may be some percent of rounding away from fp64's. Throughput is in bf16 by
autocast, as a run trains. In fp64 one shot of 256 pictures of 224 pixels takes some 50 GiB.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import header, result_path, write_result
from torch import Tensor, nn

from gatrain.train.accumulate import gradient_step
from gatrain.train.gradient import exact_norm
from gatrain.train.gradient.exact_norm import ExactNorm
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.norm import Normalisation
from gatrain.train.norm.convert import Group
from gatrain.train.norm.exact import Exact
from gatrain.train.norm.keep import Keep
from gatrain.train.norm.room import Room, room_now
from gatrain.train.precision import forbid_tf32
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step

WAYS: dict[str, Callable[[], Normalisation]] = {
    "keep": Keep,
    "group": Group,
    "exact": Exact,
    "exact-together": lambda: Exact("window"),
    "exact-offload": lambda: Exact("window"),
    "exact-layers": lambda: Exact("micro_batch"),
}
SAMPLES = [0]
"""Of a window."""
Batch = tuple[Tensor, Tensor]


def model_of(norm: Normalisation, device: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return norm.convert(torchvision.models.resnet50(num_classes=100)).to(device)


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), float(len(batch[1]))


def step_of(model: nn.Module, norm: Normalisation, device: str, bf16: bool) -> Step:
    step = gradient_step(
        model,
        lambda batch: loss_sum(model, batch),
        term_names=["loss"],
        ranks=Ranks(),
        stage=lambda batch: lambda: batch,
        autocast=lambda: torch.autocast(device, torch.bfloat16, enabled=bf16),
        strategy=norm.strategy(),
    )
    norm.attach(step)
    return step


def window(batch: Batch, micro: int) -> LoadedWindow:
    parts = zip(batch[0].split(micro), batch[1].split(micro), strict=True)
    made = [MicroBatch(part, {"loss": float(len(part[1]))}, samples=len(part[1])) for part in parts]
    return LoadedWindow(made, seed=(0,))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def statistics(model: nn.Module) -> Tensor:
    found = [value.double().flatten() for name, value in model.named_buffers() if "running" in name]
    return torch.cat(found) if found else torch.zeros(1)


def one_shot(norm: Normalisation, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    model = model_of(norm, device).to(batch[0].dtype)
    (F.cross_entropy(model(batch[0]), batch[1])).backward()
    return gradient(model), statistics(model)


def difference(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm().clamp(min=1e-30))


def third_of_room(step: Step, micro_batches: int, fraction: float) -> Room:
    """Room on the device for a third of a window's activations."""
    assert isinstance(step.strategy, ExactNorm)
    assert step.strategy._look is not None
    return Room(step.strategy._look.sample_bytes * SAMPLES[0] / 3, math.inf)


def measure(
    way: str, batch: Batch, micro: int, device: str, steps: int, dtype: torch.dtype
) -> dict[str, Any]:
    forbid_tf32("fp32")
    exact_norm.room_now = third_of_room if way == "exact-offload" else room_now  # type: ignore[attr-defined]
    precise = batch[0].to(dtype), batch[1]
    wanted, moved = one_shot(WAYS[way](), precise, device)
    norm = WAYS[way]()
    model = model_of(norm, device).to(dtype)
    step_of(model, norm, device, bf16=False).gradient(window(precise, micro))
    found: dict[str, Any] = {
        "norm": way,
        "gradient_difference": difference(gradient(model), wanted),
        "running_statistics_difference": difference(statistics(model), moved),
    }
    del precise
    norm = WAYS[way]()
    model = model_of(norm, device)
    step, seconds = step_of(model, norm, device, bf16=True), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        step.gradient(window(batch, micro))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    best = sorted(seconds[1:])[len(seconds[1:]) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    if isinstance(step.strategy, ExactNorm):
        found |= {"way": step.strategy.way, "said": step.strategy.news()}
    return {
        **found,
        "first_step_s": seconds[0],
        "step_s": best,
        "samples_per_s": len(batch[1]) / best,
        "peak_gib": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--effective", type=int, default=256)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--agreement", default="fp64", choices=["fp64", "fp32"])
    parser.add_argument("--ways", nargs="+", default=["keep", "group", "exact"], choices=list(WAYS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(asked.effective, 3, asked.pixels, asked.pixels, generator=generator)
    images *= torch.linspace(0.5, 2, asked.effective).view(-1, 1, 1, 1)
    batch = images.to(asked.device), (torch.arange(asked.effective) % 100).to(asked.device)
    rows, dtype = [], torch.float64 if asked.agreement == "fp64" else torch.float32
    SAMPLES[0] = asked.effective
    for way in asked.ways:
        rows.append(measure(way, batch, asked.micro, asked.device, asked.steps, dtype))
        print(rows[-1], flush=True)
    result = {**header(), "command": " ".join(["python", *sys.argv]), "rows": rows}
    write_result(result_path("resnet_norm", asked.out), result)


if __name__ == "__main__":
    main()
