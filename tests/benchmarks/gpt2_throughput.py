"""Tokens per second of `gatrain fit recipe=gpt2` beside a plain compiled loop of its model, and an earlier gatrain.

    python tests/benchmarks/gpt2_throughput.py [--gpus 1 2] [--rounds 2] [--steps 40] [--effective 512] [--micro 64]
        [--before FOLDER] [--no-plain] [--out FILE] [OVERRIDE ...]

Cards of one kind differ by more than a percent, so each round runs, one after the other on the same device:

    plain      a bare compiled loop with the same micro-batches and accumulation: autocast, clipping, fused AdamW
    before     `gatrain launch` of the gatrain in FOLDER, an earlier one, where that is given
    gatrain    `gatrain launch`, for each number of GPUs

Rates are those of the steps after the first ten. Writes one JSON file with hardware, versions, the commands and
every run; with one and two GPUs it also says whether their windows are equal, and the ratio of the rates.
`--micro auto` lets the tuner choose, and leaves the plain loop out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import header, result_path, write_result

WARM_UP_STEPS = 10
ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 1024


def child(arguments: list[str], package: Path, cache: str) -> str:
    """Standard output of a Python process that imports the gatrain in ``package``."""
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "GATRAIN_CACHE": cache}
    done = subprocess.run(
        [sys.executable, *arguments], check=True, env=environment, text=True, stdout=subprocess.PIPE
    )
    return done.stdout


def fit(gpus: int, package: Path, cache: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe through the command line and read its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            "-m", "gatrain", "launch", "--nproc", str(gpus), "recipe=gpt2", "precision=bf16", "compile=true",
            f"batch.effective={given.effective}", f"batch.micro={given.micro}", f"train.steps={given.steps}",
            "train.log_every=1", "eval.every=0", "eval.samples=64", "save.every=0", f"run.dir={run}",
            *given.overrides,
        ]  # fmt: skip
        began = time.perf_counter()
        child(command, package, cache)
        whole_s = time.perf_counter() - began
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        plan = json.loads((run / "plan.json").read_text())
    measured = records[WARM_UP_STEPS:]
    rates = [record["tokens_per_s"] for record in measured]
    tokens = measured[-1]["tokens"] - records[WARM_UP_STEPS - 1]["tokens"]
    return {
        "command": " ".join(["gatrain", *command[2:]]).replace(str(run), "RUN"),
        "gpus": gpus,
        "equation": plan["equation"],
        "reason": plan["reason"],
        "tokens_per_s": tokens / sum(record["step_s"] for record in measured),
        "tokens_per_s_median": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "losses": [records[0]["loss"], records[-1]["loss"]],
        "whole_command_s": whole_s,
        "windows": [record["window"] for record in records],
    }


def plain_loop(micro: int, micro_steps: int, steps: int) -> float:
    """Tokens per second of the same model in a loop of one's own."""
    import torch
    import torch.nn.functional as F

    from gatrain.models.gpt import GPT

    torch.manual_seed(0)
    model = GPT(
        vocab_size=50304, context=CONTEXT, layers=12, heads=12, width=768, positions="learned", bias=True
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(50257, (micro, CONTEXT + 1), device="cuda")

    @torch.compile
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def step() -> None:
        for _ in range(micro_steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(tokens)
            (loss / micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM_UP_STEPS):
        step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps - WARM_UP_STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    return float(micro * micro_steps * CONTEXT * (steps - WARM_UP_STEPS) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--effective", type=int, default=512)
    parser.add_argument("--micro", default="64")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--no-plain", action="store_true", help="leave out the bare loop")
    parser.add_argument("--plain", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.plain:
        print(plain_loop(*given.plain))
        return

    plain = not given.no_plain and given.micro != "auto"
    result: dict[str, Any] = {
        **header(),
        "command": " ".join(["python", *sys.argv]),
        "plain": [],
        "before": [],
        "gatrain": [],
    }
    path = result_path("gpt2_throughput", given.out)
    with tempfile.TemporaryDirectory() as now, tempfile.TemporaryDirectory() as then:

        def add(kind: str, run: dict[str, Any]) -> None:
            result[kind].append(run)
            write_result(path, result)  # what was measured outlives a time limit
            print(kind, run.get("equation", ""), f"{run['tokens_per_s']:,.0f} tokens/s", flush=True)

        for _ in range(given.rounds):
            if plain:
                micro = int(given.micro)
                words = [__file__, "--plain", str(micro), str(given.effective // micro), str(given.steps)]
                add("plain", {"tokens_per_s": float(child(words, ROOT, now))})
            if given.before:
                add("before", fit(1, given.before.resolve(), then, given))
            for gpus in given.gpus:
                add("gatrain", fit(gpus, ROOT, now, given))
    alone = [run["tokens_per_s"] for run in result["gatrain"] if run["gpus"] == 1]
    for kind in ("plain", "before"):
        if alone and result[kind]:
            beside = statistics.fmean(run["tokens_per_s"] for run in result[kind])
            result[f"over_{kind}"] = statistics.fmean(alone) / beside
    by_gpus = {run["gpus"]: run for run in result["gatrain"]}
    if {1, 2} <= by_gpus.keys():
        result["two_gpus"] = {
            "windows_equal": by_gpus[1]["windows"] == by_gpus[2]["windows"],
            "speed_up": by_gpus[2]["tokens_per_s"] / by_gpus[1]["tokens_per_s"],
        }
    write_result(path, result)
    print({key: value for key, value in result.items() if key.startswith(("over", "two"))})


if __name__ == "__main__":
    main()
