"""Does a small model train as fast in gatrain as in a plain loop of one's own, and what does the host do meanwhile?

    python tests/benchmarks/small_model.py [--steps 800] [--rounds 2] [--before FOLDER] [--splits NAME ...]
                                           [--plain-loops NAME ...] [--out FILE] [--smoke]

`recipe=llm` (4 layers, width 192, context 128) is so small that a step is the host's work more than the GPU's. Each
round runs, one after the other on the same device:

    eager, compiled     a plain loop of the same model: autocast, cross-entropy, clipping, fused AdamW, batches
                        stacked from the same data, pinned, copied ahead
    gatrain             `gatrain fit recipe=llm` with its own plan, which is made before the first round
    before              the same with the gatrain in FOLDER, an earlier one, where that is given

at an effective batch of 32, and at 1 and 8 samples in micro-batches of one: what the seven more micro-steps of the
last two cost, over seven, is the host's time for a micro-step. Samples per second are those of the steps after the
first quarter, everything between two steps included. `--splits effective_32 --plain-loops compiled` measures the
comparison alone. `--smoke` runs a few steps on whatever device there is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import header, result_path, write_result

EFFECTIVE = 32
SPLITS = {"effective_32": (EFFECTIVE, EFFECTIVE), "one_of_1": (1, 1), "eight_of_1": (8, 1)}
"""Name of a measurement -> (effective batch, micro-batch)."""
ROOT = Path(__file__).resolve().parents[2]
CACHES = Path(tempfile.mkdtemp())
PLAIN = ("eager", "compiled")
SMALL = ["compile=true"]
"""How gatrain computes the micro-batches of one: as the compiled loop does."""


def plain_loop(kind: str, steps: int, splits: Sequence[str] = tuple(SPLITS)) -> dict[str, float]:
    """Seconds of a step of a person's own loop, for each of ``splits``."""
    import torch

    from gatrain import build
    from gatrain.compose import compose

    task = build.build_task(compose(["recipe=llm"]).config)
    found = {}
    for name in splits:
        effective, micro = SPLITS[name]
        torch.compiler.reset()
        found[name] = step_seconds(task, kind == "compiled", effective, micro, steps)
    return found


def step_seconds(task: Any, compiled: bool, effective: int, micro: int, steps: int) -> float:
    """Seconds of a step, on average, after the first quarter."""
    import torch
    from torch import Tensor, nn

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = task.build_model().to(device)
    run = torch.compile(model, dynamic=False) if compiled else model
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=on_gpu)
    data = task.train_data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    ids = itertools.cycle(order)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.stack([torch.as_tensor(data[index]) for index in itertools.islice(ids, micro)]).long()
        rows = (rows.pin_memory() if on_gpu else rows).to(device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = run(tokens)
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    ahead = batch()
    began = time.perf_counter()
    for step in range(steps):
        if step == steps // 4:
            if on_gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
        for _ in range(effective // micro):
            tokens, labels = ahead
            loss = loss_of(tokens, labels) * (micro / effective)
            ahead = batch()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            float(loss.detach())  # what a loop prints
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (steps - steps // 4)


def run_plain(kind: str, steps: int, splits: Sequence[str]) -> dict[str, float]:
    """`plain_loop` in a process of its own."""
    command = [sys.executable, __file__, "--plain", kind, "--steps", str(steps), "--splits", *splits]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def run_gatrain(
    folder: Path, steps: int, package: Path, splits: Sequence[str], words: Sequence[str]
) -> dict[str, Any]:
    """Seconds of a step of `gatrain fit`, for each of ``splits``, and the plan of the first.

    Args:
        package: the folder that holds the gatrain to run.
    """
    found: dict[str, Any] = {}
    for name in splits:
        effective, micro = SPLITS[name]
        run_dir = folder / f"{name}_{time.monotonic_ns()}"
        split = [] if effective == EFFECTIVE else [f"batch.micro={micro}", "checkpointing=none", *SMALL]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "gatrain", "fit", "recipe=llm", f"batch.effective={effective}"),
                *(f"train.steps={steps}", f"run.dir={run_dir}", "eval.samples=32", "train.check=off"),
                "train.drop_last=true",  # the plain loop has no short window, which is compiled anew
                *(*split, *words),
            ],
            capture_output=True,
            text=True,
            env=environment(package),
            cwd=package,  # `python -m` looks there first
        )
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        times = [line["step_s"] for line in lines if line["step"] > steps // 4]
        found[name] = statistics.fmean(times)
        if effective == EFFECTIVE:
            plan = json.loads((run_dir / "plan.json").read_text())
            found["plan"] = {
                key: plan.get(key)
                for key in ("micro_batch", "micro_batches", "compile", "checkpointing", "precision")
            }
    return found


def environment(package: Path) -> dict[str, str]:
    """Of a process that imports gatrain from ``package``, with a cache of its own."""
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "GATRAIN_CACHE": str(CACHES / package.name)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain", choices=PLAIN, help=argparse.SUPPRESS)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--plain-loops", nargs="+", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    steps = 8 if arguments.smoke else arguments.steps
    if arguments.smoke:
        SMALL.clear()
    if arguments.plain:
        print(json.dumps(plain_loop(arguments.plain, steps, arguments.splits)))
        return
    out = result_path("small_model", arguments.out)
    result: dict[str, Any] = {
        **header(),
        "command": " ".join(["python", *sys.argv]),
        "steps": steps,
        "rounds": [],
    }
    packages = {"gatrain": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    with tempfile.TemporaryDirectory() as folder:
        words = ["tune.max_seconds=10"] if arguments.smoke else []
        for name, package in packages.items():
            began = time.monotonic()
            command = [
                sys.executable,
                "-m",
                "gatrain",
                "autotune",
                "recipe=llm",
                f"batch.effective={EFFECTIVE}",
            ]
            subprocess.run([*command, *words], capture_output=True, env=environment(package), cwd=package)
            result[f"plan_s_{name}"] = round(time.monotonic() - began, 1)
        for nth in range(1 if arguments.smoke else arguments.rounds):
            splits = arguments.splits[
                : 1 if nth else None
            ]  # the small ones once: they tell of the host alone
            times: dict[str, Any] = {kind: run_plain(kind, steps, splits) for kind in arguments.plain_loops}
            for name, package in packages.items():
                times[name] = run_gatrain(Path(folder), steps, package, splits, words)
            result["rounds"].append(times)
            print(json.dumps(times), flush=True)
            result["answers"] = answers(result["rounds"])
            write_result(out, result)
    print(json.dumps(result["answers"], indent=1))


def answers(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples per second and the host's seconds for a micro-step, of each way, the median of the rounds."""
    found: dict[str, Any] = {}
    for way in rounds[0]:
        step_s = {
            name: statistics.median(each[way][name] for each in rounds if name in each[way])
            for name in SPLITS
            if name in rounds[0][way]
        }
        found[way] = told = {}
        if "effective_32" in step_s:
            told["samples_per_s"] = round(EFFECTIVE / step_s["effective_32"], 1)
        if "one_of_1" in step_s:
            told["step_of_one_micro_step_ms"] = round(1000 * step_s["one_of_1"], 3)
        if "one_of_1" in step_s and "eight_of_1" in step_s:
            told["micro_step_ms"] = round(1000 * (step_s["eight_of_1"] - step_s["one_of_1"]) / 7, 3)
    gatrain, compiled = (found.get(way, {}).get("samples_per_s") for way in ("gatrain", "compiled"))
    if gatrain and compiled:
        found["gatrain_over_compiled"] = round(gatrain / compiled, 3)
    return found


if __name__ == "__main__":
    main()
