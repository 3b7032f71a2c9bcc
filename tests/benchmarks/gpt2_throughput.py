"""Tokens per second of `gatrain fit recipe=gpt2` on one and two GPUs, beside a plain compiled loop of its model.

    python tests/benchmarks/gpt2_throughput.py [--gpus 1 2] [--steps 50] [--micro 64] [--out FILE] [OVERRIDE ...]

Writes one JSON file with hardware, versions, the full command and, for each run, the rate of the steps after the
first ten (median and spread), the peak memory and the window hashes. With two GPUs it also says whether the
windows equal those of one GPU, and the ratio of the rates. `--micro auto` lets the tuner choose.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import result_path, write_result

WARM_UP_STEPS = 10


def fit(gpus: int, steps: int, micro: str, overrides: list[str]) -> dict[str, Any]:
    """Run the recipe through the command line and read its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "gatrain", "launch", "--nproc", str(gpus), "recipe=gpt2", "precision=bf16",
            "compile=true", f"batch.micro={micro}", f"train.steps={steps}", "eval.every=0", "eval.samples=64",
            "save.every=0", f"run.dir={folder}/run", *overrides,
        ]  # fmt: skip
        began = time.perf_counter()
        subprocess.run(command, check=True)
        whole_s = time.perf_counter() - began
        run = Path(folder) / "run"
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        plan = json.loads((run / "plan.json").read_text())
    rates = [record["tokens_per_s"] for record in records[WARM_UP_STEPS:]]
    measured = records[WARM_UP_STEPS:]
    tokens = measured[-1]["tokens"] - records[WARM_UP_STEPS - 1]["tokens"]
    return {
        "command": " ".join(command[2:]),
        "gpus": gpus,
        "equation": plan["equation"],
        "reason": plan["reason"],
        "tokens_per_s": tokens / sum(record["step_s"] for record in measured),
        "tokens_per_s_median": statistics.median(rates),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "whole_command_s": whole_s,
        "windows": [record["window"] for record in records],
    }


def plain_loop(micro: int, micro_steps: int = 40) -> dict[str, Any]:
    """The same model in a bare compiled loop: forward, backward, and a fused AdamW step every 8 micro-steps."""
    import torch
    import torch.nn.functional as F

    from gatrain.models.gpt import GPT

    torch.manual_seed(0)
    model = GPT(
        vocab_size=50304, context=1024, layers=12, heads=12, width=768, positions="learned", bias=True
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(50257, (micro, 1025), device="cuda")

    @torch.compile
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def micro_step(index: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(tokens)
        (loss / 8).backward()
        if index % 8 == 7:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for index in range(16):
        micro_step(index)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for index in range(micro_steps):
        micro_step(index)
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    return {"micro_batch": micro, "tokens_per_s": micro * 1024 * micro_steps / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--micro", default="64")
    parser.add_argument("--no-plain", action="store_true", help="leave out the bare loop")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": {"gpu": name, "count": torch.cuda.device_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "command": " ".join(["python", *sys.argv]),
        "fit": [fit(gpus, arguments.steps, arguments.micro, arguments.overrides) for gpus in arguments.gpus],
    }
    if torch.cuda.is_available() and not arguments.no_plain:
        result["plain_loop"] = [plain_loop(micro) for micro in (32, 64)]
    by_gpus = {run["gpus"]: run for run in result["fit"]}
    if {1, 2} <= by_gpus.keys():
        result["two_gpus"] = {
            "windows_equal": by_gpus[1]["windows"] == by_gpus[2]["windows"],
            "speed_up": by_gpus[2]["tokens_per_s"] / by_gpus[1]["tokens_per_s"],
        }
    write_result(result_path("gpt2_throughput", arguments.out), result)
    print(json.dumps({key: value for key, value in result.items() if key != "fit"}, indent=1))
    for run in result["fit"]:
        print(run["gpus"], "GPU:", f"{run['tokens_per_s']:,.0f} tokens/s", run["equation"])


if __name__ == "__main__":
    main()
