"""ResNet-50 compiled in several ways: seconds of compilation against seconds of a micro-step.

    python tests/benchmarks/resnet_compile.py [--ways WAY ...] [--images 128] [--device cuda] [--out FILE]

A way is one of `eager`, `whole` (model and loss as one graph), `blocks` (each of the 16 blocks for itself; the 8
that differ are compiled) and `last_blocks` (blocks that also give their result with the channels last, and the stem
and the head), with `-channels_last` for weights and images in that layout and `-untuned` for element-wise kernels
without a search for their best form. Each runs in a process of its own with an empty cache of kernels, in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import header, result_path, write_result

WAYS = (
    "eager", "eager-channels_last", "whole", "whole-channels_last", "whole-untuned", "blocks-channels_last",
    "blocks-channels_last-untuned", "last_blocks-channels_last-untuned",
)  # fmt: skip
ROUNDS, STEPS = 4, 4
PARTS = (
    "fx_codegen_and_compile", "Scheduler.codegen", "CachingAutotuner.benchmark_all_configs",
    "async_compile.wait", "aot_trace_joint_graph",
)  # fmt: skip


def loss_in(kind: str, model: Any) -> Callable[[Any, Any], Any]:
    """The summed loss of images and classes, compiled in one way on its first call."""
    import torch
    import torch.nn.functional as F

    from gatrain.train.checkpointing import blocks_of

    def compiled(function: Any) -> Any:
        return torch.compile(function, dynamic=False)

    def loss(images: Any, classes: Any) -> Any:
        return F.cross_entropy(model(images).float(), classes, reduction="sum")

    if kind == "whole":
        return compiled(loss)  # type: ignore[no-any-return]
    if kind == "blocks":
        for block in blocks_of(model):
            block.compile(dynamic=False)
    if kind != "last_blocks":
        return loss

    def last(function: Any) -> Any:
        return compiled(lambda x: function(x).contiguous(memory_format=torch.channels_last))

    for block in blocks_of(model):
        block.forward = last(block.forward)
    stem = last(lambda images: model.maxpool(model.relu(model.bn1(model.conv1(images)))))
    head = compiled(
        lambda x, classes: F.cross_entropy(
            model.fc(model.avgpool(x).flatten(1)).float(), classes, reduction="sum"
        )
    )

    def in_parts(images: Any, classes: Any) -> Any:
        x = stem(images)
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
        return head(x, classes)

    return in_parts


def measure(way: str, images: int, device: str) -> dict[str, Any]:
    """In a process of its own: seconds of the first micro-step and of later ones."""
    import torch
    import torch._dynamo.utils
    import torch._inductor.config

    from gatrain.models.resnet import resnet50
    from gatrain.train.compiling import RECOMPILATIONS

    kind, *options = way.split("-")
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    if "untuned" in options:
        torch._inductor.config.triton.autotune_pointwise = False
    layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
    torch.manual_seed(0)
    with torch.device(device):
        model = resnet50(classes=8).to(memory_format=layout)
        batch = torch.randn(images, 3, 224, 224).to(memory_format=layout), torch.randint(0, 8, (images,))
    loss = loss_in(kind, model)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            total = loss(*batch)
        total.backward()

    def seconds(call: Callable[[], None], times: int = 1) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    first_s = seconds(step)
    seconds(step, STEPS)
    parts = torch._dynamo.utils.compilation_time_metrics
    return {
        "first_micro_step_s": first_s,
        "micro_step_s": min(seconds(step, STEPS) for _ in range(ROUNDS)),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "compile_parts_s": {name: sum(parts[name]) for name in PARTS if parts.get(name)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="measure one way in this process and print it")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.ways[0], arguments.images, arguments.device)))
        return
    result: dict[str, Any] = {**header(), "command": " ".join(["python", *sys.argv]), "ways": {}}
    result["images"] = arguments.images
    for way in arguments.ways:
        command = [sys.executable, __file__, "--here", "--ways", way, "--images", str(arguments.images)]
        with tempfile.TemporaryDirectory() as kernels:
            done = subprocess.run(
                [*command, "--device", arguments.device],
                stdout=subprocess.PIPE, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": kernels},
            )  # fmt: skip
        found = (
            json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        )
        result["ways"][way] = found
        print(way, found, flush=True)
    write_result(result_path("resnet_compile", arguments.out), result)


if __name__ == "__main__":
    main()
