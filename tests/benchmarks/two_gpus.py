"""Two real GPUs, one of them partly taken by another process: the plan respects the weaker one, and nobody hangs.

    python tests/benchmarks/two_gpus.py [--held-gib 50] [--out FILE] [OVERRIDE ...]

    free    `gatrain autotune` of GPT-2 124M on both GPUs, from empty caches; the way of reducing is measured too
    held    the same while another process holds memory of the second GPU
    fit     `gatrain launch --nproc 2` by the second plan, while that memory is still held

Writes one dated JSON file with hardware, versions, the commands, both plans and the seconds that each took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import header, result_path, write_result

HOLD = """
import sys, torch
kept = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda:1")
kept.fill_(1)
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


def gatrain(command: str, words: list[str]) -> tuple[str, float]:
    """Standard output and seconds of one command, which must succeed within ten minutes."""
    began = time.perf_counter()
    arguments = [sys.executable, "-m", "gatrain", command, *words]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return done.stdout, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-gib", type=float, default=50.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    from gatrain.hardware import detect_hardware

    hardware = detect_hardware()
    if len(hardware.gpus) < 2:
        sys.exit("This needs two GPUs.")
    words = ["recipe=gpt2", "batch.effective=512", *arguments.overrides]
    with tempfile.TemporaryDirectory() as name:
        os.environ["GATRAIN_CACHE"] = f"{name}/cache"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/kernels"
        free, free_s = gatrain("autotune", [*words, "--json"])
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(int(arguments.held_gib * 2**30))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline().strip() == "held"
            second_free = detect_hardware("cuda").gpus[1].free_bytes
            held, held_s = gatrain("autotune", [*words, "--retune", "--json"])
            run = [
                "--nproc", "2", *words, "train.steps=10", "eval.every=0", "save.every=0", "eval.samples=64",
                f"run.dir={name}/run",
            ]  # fmt: skip
            _, fit_s = gatrain("launch", run)
            lines = [json.loads(line) for line in Path(f"{name}/run/metrics.jsonl").read_text().splitlines()]
        finally:
            holder.communicate("")
    plans: dict[str, dict[str, Any]] = {"free": json.loads(free), "held": json.loads(held)}
    steps = [line["step_s"] for line in lines[5:]]
    result = {
        **header(),
        "command": " ".join(["python", *sys.argv]),
        "held_gib": arguments.held_gib,
        "free_bytes_of_the_second": second_free,
        "plans": plans,
        "seconds": {"free": free_s, "held": held_s, "fit": fit_s},
        "respects_the_weaker": plans["held"]["memory_budget_bytes"] <= second_free
        and plans["held"]["predicted_peak_bytes"] <= plans["held"]["memory_budget_bytes"],
        "fit_steps": len(lines),
        "fit_peak_bytes": max(line["peak_memory_bytes"] for line in lines),
        "fit_step_s": sorted(steps)[len(steps) // 2],
    }
    write_result(result_path("two_gpus", arguments.out), result)
    for kind, plan in plans.items():
        print(kind, plan["equation"], plan["sync"], plan["predicted_peak_bytes"], plan["memory_budget_bytes"])
    print({key: result[key] for key in ("seconds", "respects_the_weaker", "fit_step_s")})


if __name__ == "__main__":
    main()
