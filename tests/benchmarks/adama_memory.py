"""How much memory does `optimizer=adama` save on a GPU: its peak against AdamW's under plain accumulation.

    python tests/benchmarks/adama_memory.py [--micro 8] [--micro-batches 4] [--out FILE] [--smoke]

A GPT of 350 million parameters (24 layers, width 1024, context 1024; bf16 by autocast, not compiled) trains a few
steps of some micro-batches with each optimizer, in a process of its own. The peak is that of all tensors after the
first step, which makes the optimizer's state. What is wanted of the difference is the size of the
gradients less one layer, for which the largest is taken: the embedding, which is the output layer's weight, too.
`--smoke` takes a small model on whatever device there is, where only a GPU tells of peaks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import header, result_path, write_result

MODEL = ("model.layers=24", "model.heads=16", "model.width=1024")
SMALL = ("model.layers=2", "model.heads=2", "model.width=64", "data.context=64", "data.vocab_size=512")
WAYS = ("adamw", "adama")
STEPS = 3


def run(optimizer: str, micro: int, micro_batches: int, words: list[str]) -> dict[str, Any]:
    """Peak of one optimizer, and the sizes of parameters, in bytes."""
    import torch

    from gatrain import build
    from gatrain.compose import compose
    from gatrain.plan import StepSettings
    from gatrain.train.micro_batches import LoadedWindow, MicroBatch
    from gatrain.tune.trials.batches import TrialBatches

    config = compose(["recipe=gpt2", f"optimizer={optimizer}", "optimizer.clip_norm=null", *words]).config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = build.build_task(config)
    precision = "bf16" if device.type == "cuda" else "fp32"
    engine = build.build_engine(task, config, StepSettings(precision, "none", False, "window"), device)
    batch, weights = TrialBatches(task).worst_case(micro)
    window = LoadedWindow([MicroBatch(batch, weights, samples=micro)] * micro_batches, seed=(0,))
    norms = []
    for step in range(STEPS):
        if step == 1 and device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        norms.append(float(engine.step(window, step)[1]))
    sizes = [p.numel() * 4 for p in engine.model.parameters() if p.requires_grad]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "peak_bytes": peak,
        "gradient_bytes": sum(sizes),
        "largest_gradient_bytes": max(sizes),
        "norms": norms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    words = [*SMALL, "model.vocab_size=512"] if asked.smoke else [*MODEL]
    if asked.way:
        print(json.dumps(run(asked.way, asked.micro, asked.micro_batches, words)))
        return
    found = {}
    for way in WAYS:
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found[way] = json.loads(done.stdout.strip().splitlines()[-1])
        print(way, found[way], flush=True)
    result: dict[str, Any] = {**header(), "command": " ".join(["python", *sys.argv]), "ways": found}
    if found["adamw"]["peak_bytes"] is not None:
        wanted = found["adamw"]["gradient_bytes"] - found["adamw"]["largest_gradient_bytes"]
        saved = found["adamw"]["peak_bytes"] - found["adama"]["peak_bytes"]
        result |= {"saved_bytes": saved, "wanted_bytes": wanted, "ok": saved >= wanted}
        print({key: result[key] for key in ("saved_bytes", "wanted_bytes", "ok")})
    write_result(result_path("adama_memory", asked.out), result)


if __name__ == "__main__":
    main()
