"""What is promised of one GPU, in one call of a few minutes: the plan, its rate, what the check of the loss costs.

    python tests/benchmarks/one_gpu.py [--steps 50] [--seconds 520] [--out FILE] [--work FOLDER] [--byte-code]
                                       [--smoke]

GPT-2 124M at an effective batch of 512 (`recipe=gpt2`), in this order:

    plan    `gatrain autotune` from empty caches of plans and of compiled kernels: seconds, and what was chosen
    rate    `gatrain fit` with that plan: tokens per second of the steps after the first ten
    check   four short runs with `train.check=off` and `train.check=error` in turn: the seconds between them
    best    every compiled size that fits, then the best of them beside the plan as full steps, in turn

One JSON file with hardware, versions and commands is written after each part; what time does not allow is left out
and named. `--byte-code` first compiles torch's sources, where an installation came without byte code:
pip would have left it. `--smoke` runs a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import header, make_byte_code, result_path, write_result
from tuner_sweep import FINALISTS, WHOLE_S, Bench

PROMISED_TOKENS_PER_S = 503_600
"""On one H100 80GB; a day's measurement is held to 1 % of it."""
PROMISED = {"plan_s": 60.0, "check_s": 3.0, "plan_over_best": 1.03}
WARM_UP_STEPS = 10
SIZES = (32, 48, 64, 86, 103, 128, 171, 205, 256)
LONGEST_S = {"rate": 120.0, "check": 150.0, "best": 150.0}
"""Seconds that must be left to begin a part."""


class OneGpu:
    """The parts, in a folder and with caches of their own."""

    def __init__(self, arguments: argparse.Namespace, out: Path) -> None:
        self.result: dict[str, Any] = {**header(), "command": " ".join(["python", *sys.argv]), "left_out": []}
        self._arguments, self._out = arguments, out
        self._deadline = arguments.deadline
        scratch: dict[str, Any] = {"workloads": {}}
        bench_out = Path(tempfile.mkdtemp()) / "bench.json"  # the sweep's own file, which nobody needs
        self._bench = Bench("gpt2", arguments, bench_out, scratch)
        self._effective = self._bench.effective_batches[0]

    def run(self) -> None:
        """All parts, as far as time allows."""
        parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            ("plan", self.plan), ("rate", self.rate), ("check", self.check), ("best", self.best),
        ]  # fmt: skip
        for name, part in parts:
            left = self._deadline - time.monotonic()
            if not self._arguments.smoke and left < LONGEST_S.get(name, 0.0):
                self.result["left_out"].append(f"{name}: {left:.0f} s were left")
                continue
            print(f"--- {name}, {left:.0f} s left", flush=True)
            began = time.monotonic()
            try:
                self.result[name] = part()
            except Exception as error:  # the other parts still count
                self.result[name] = {"error": f"{type(error).__name__}: {error}"}
            self.result[name]["took_s"] = round(time.monotonic() - began, 1)
            print(json.dumps({k: v for k, v in self.result[name].items() if k != "plan"}), flush=True)
            write_result(self._out, self.result)
        self._bench.close()
        self.result["answers"] = self.answers()
        write_result(self._out, self.result)
        print(json.dumps(self.result["answers"], indent=1))

    def plan(self) -> dict[str, Any]:
        """From empty caches, as a user types it; then from the cache."""
        self._bench.plan()
        found = self._bench.part(self._effective)["plan"]
        other = self._bench.part(self._bench.effective_batches[1])["plan"]
        return {
            **found,
            "equation": found["plan"]["equation"],
            "compile": found["plan"]["compile"],
            "reason": found["plan"]["reason"],
            "another_effective_batch": {
                "equation": other["plan"]["equation"], "seconds": other["from_stored_curves_s"],
            },
        }  # fmt: skip

    def rate(self) -> dict[str, Any]:
        """Tokens per second of gatrain's own plan."""
        steps = 12 if self._arguments.smoke else self._arguments.steps
        run, seconds, command = self._fit(steps)
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        plan = json.loads((run / "plan.json").read_text())
        measured = records[WARM_UP_STEPS:]
        tokens = measured[-1]["tokens"] - records[WARM_UP_STEPS - 1]["tokens"]
        rates = [record["tokens_per_s"] for record in measured]
        return {
            "command": command,
            "equation": plan["equation"],
            "settings": {key: plan[key] for key in ("precision", "checkpointing", "compile", "sync")},
            "steps": len(measured),
            "tokens_per_s": tokens / sum(record["step_s"] for record in measured),
            "tokens_per_s_median": statistics.median(rates),
            "tokens_per_s_range": [min(rates), max(rates)],
            "peak_memory_bytes": records[-1]["peak_memory_bytes"],
            "losses": [records[0]["loss"], records[-1]["loss"]],
            "whole_command_s": round(seconds, 2),
        }

    def check(self) -> dict[str, Any]:
        """Seconds that the check of the loss adds to a run: short runs without and with it, in turn."""
        seconds: dict[str, list[float]] = {"off": [], "error": []}
        command = ""
        for _ in range(2):
            for mode in ("off", "error"):
                _, taken, command = self._fit(2, f"train.check={mode}")
                seconds[mode].append(round(taken, 2))
        adds = min(seconds["error"]) - min(seconds["off"])  # what disturbs a run only adds
        return {"command": command, "whole_command_s": seconds, "adds_s": round(adds, 2)}

    def _fit(self, steps: int, *words: str) -> tuple[Path, float, str]:
        run = self._bench.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        command = [
            "fit", *self._bench.words(self._effective), f"train.steps={steps}", "train.log_every=1", "eval.every=0",
            "eval.samples=64", "save.every=0", f"run.dir={run}", *words,
        ]  # fmt: skip
        if self._arguments.smoke:
            command = [word for word in command if word != "eval.samples=64"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "gatrain", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        taken = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(f"exit {done.returncode}: {done.stdout[-1500:]}")
        return run, taken, " ".join(["gatrain", *command])

    def best(self) -> dict[str, Any]:
        """The plan beside the best of every compiled size that fits."""
        from gatrain.plan import Plan
        from gatrain.tune import search
        from gatrain.tune.finalists import Finalist
        from gatrain.tune.protocol import FullStepSpec

        plan = Plan.from_dict(self._bench.part(self._effective)["plan"]["plan"])
        way = dataclasses.replace(plan.settings, compile=not self._arguments.smoke, checkpointing="none")
        sizes = (4, 8, 16) if self._arguments.smoke else SIZES
        runner = self._bench._runner()
        curve, _ = runner.measure(way, sizes, stop_early=False)
        options = [o for o in search.candidates(curve, plan.split) if o.measured]
        best = sorted(options, key=lambda o: o.step_s)[: FINALISTS + 1]
        chosen = Finalist(plan.settings, plan.micro_batch, plan.split)
        rivals = [Finalist(o.settings, o.micro_batch, o.split) for o in best]
        named = tuple(dict.fromkeys([chosen, *rivals]))[: FINALISTS + 1]
        asked = FullStepSpec(WHOLE_S, named)
        _, confirmation = self._bench._runner().measure(chosen.settings, (), full_steps=asked)
        found: dict[str, Any] = {
            "sizes": [
                {"micro_batch": m.micro_batch, "outcome": m.outcome, "micro_step_s": m.micro_step_s,
                 "peak_memory_bytes": m.peak_memory_bytes, "error": m.error}
                for m in curve.measurements
            ],
        }  # fmt: skip
        if confirmation is not None:
            fastest = min(each.median_s for each in confirmation.entries)
            mine = confirmation.get(chosen)
            found["whole_steps"] = [
                {"micro_batch": e.finalist.micro_batch, "compile": e.finalist.settings.compile,
                 "median_s": e.median_s, "seconds": list(e.seconds), "error": e.error}
                for e in confirmation.entries
            ]  # fmt: skip
            found["plan_over_best"] = mine.median_s / fastest if mine else None
        return found

    def answers(self) -> dict[str, Any]:
        """What was promised beside what was found."""
        rate = self.result.get("rate", {}).get("tokens_per_s")
        return {
            "device": self.result["hardware"]["device"],
            "equation": self.result.get("plan", {}).get("equation"),
            "tokens_per_s": rate,
            "of_promised_rate": rate / PROMISED_TOKENS_PER_S if rate else None,
            "plan_s": self.result.get("plan", {}).get("empty_caches_s"),
            "plan_over_best": self.result.get("best", {}).get("plan_over_best"),
            "check_adds_s": self.result.get("check", {}).get("adds_s"),
            "promised": {"tokens_per_s": PROMISED_TOKENS_PER_S, **PROMISED},
            "left_out": self.result["left_out"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gatrain_one_gpu")
    parser.add_argument("--byte-code", action="store_true", help="compile torch's sources first, as pip does")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    arguments = parser.parse_args()
    if arguments.byte_code:
        make_byte_code()
    arguments.deadline = time.monotonic() + arguments.seconds
    arguments.checkpointing = None
    OneGpu(arguments, result_path("one_gpu_smoke" if arguments.smoke else "one_gpu", arguments.out)).run()


if __name__ == "__main__":
    main()
