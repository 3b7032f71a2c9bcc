"""Is the tuner's plan the best there is? An exhaustive sweep beside it, for five workloads that differ in kind.

    python tests/benchmarks/tuner_sweep.py [--workload gpt2 vit ...] [--stage plan sweep whole soak] [--seconds 540]
        [--checkpointing none selective full] [--merge FILE ...] [--out FILE] [--work FOLDER] [--smoke]

For each workload and two effective batches, the second of them prime:

    plan    `gatrain autotune` from empty caches for the first, again from the cache, then for the second effective
            batch, which plans from the stored curves
    sweep   micro-batch x checkpointing x compile, each as timed micro-steps, reduction and update, from which the
            step at the effective batch is composed. Recomputation only adds work at an equal micro-batch, so with
            checkpointing one size that also fits without it is measured, and those that do not
    whole   the best of the sweep and the chosen plan as full steps, in one interleaved run
    soak    1,000 micro-steps (at least 20 steps) of the plan on the longest samples; peak against its budget

Results are added to one JSON file, dated, with hardware, versions and every command. A stage that was done is left
out, and a call ends after about `--seconds`: call again to go on. With `--checkpointing` only these modes are
swept, so that several GPUs of one kind can share a sweep: merge their files with `--merge FILE ...`. `--smoke` runs
tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import VIT, header, result_path, write_result

STAGES = ("plan", "sweep", "full_steps", "soak")
MODES = ("none", "selective", "full")
LEAST_S = 40.0
"""Seconds that must be left to begin with anything."""
FINALISTS = 3
WHOLE_S = 15.0
SOAK_MICRO_STEPS, SOAK_STEPS = 1000, 20


@dataclass(frozen=True)
class Workload:
    """A recipe with its overrides, its tiny form for a CPU, two effective batches, and the sweep's sizes."""

    words: tuple[str, ...]
    tiny: tuple[str, ...]
    effective: tuple[int, int]
    sizes: tuple[int, ...]
    """Without checkpointing."""
    recomputed: tuple[int, ...]
    """With checkpointing."""


_IMAGES = ("data.path=images", "train.steps=20", "train.epochs=null", "train.data_workers=0")
_TINY_GPT = ("model.layers=2", "model.width=64", "model.heads=2", "data.context=32")
WORKLOADS = {
    "gpt2": Workload(
        ("recipe=gpt2",), (*_TINY_GPT, "data.vocab_size=512", "model.vocab_size=512"), (512, 509),
        (8, 16, 24, 32, 48, 64, 96, 128), (64, 128),
    ),
    "gpt350m": Workload(
        ("recipe=gpt2", "model.layers=24", "model.width=1024", "model.heads=16"),
        (*_TINY_GPT, "data.vocab_size=512", "model.vocab_size=512"), (256, 251),
        (8, 16, 24, 32, 48, 64), (32, 64),
    ),
    "resnet50": Workload(
        ("recipe=resnet50", "model.classes=8", *_IMAGES), ("data.size=32",), (512, 251),
        (64, 128, 251, 256, 512), (256,),
    ),
    "vit": Workload(
        ("recipe=vit", *_IMAGES[:2], "train.data_workers=0"),
        ("data.size=32", "model.image_size=32", "model.num_layers=2", "model.hidden_dim=48",
         "model.num_heads=2", "model.mlp_dim=96"), (512, 509),
        (64, 128, 255, 256, 384, 509, 512), (512,),
    ),
    "padded": Workload(
        ("recipe=padded", "model.layers=12", "model.heads=12", "model.width=768", "data.context=1024"),
        (*_TINY_GPT, "data.vocab_size=512"), (256, 251),
        (8, 16, 32, 48, 64, 96, 128, 251, 256), (64, 128),
    ),
}  # fmt: skip
SMOKE_EFFECTIVE = (16, 13)


class Bench:
    """One workload in a folder of its own; results are written after each piece of work."""

    def __init__(self, name: str, arguments: argparse.Namespace, out: Path, result: dict[str, Any]) -> None:
        self.workload = WORKLOADS[name]
        self.smoke = bool(arguments.smoke)
        self.deadline = arguments.deadline
        self._modes = arguments.checkpointing
        self.folder = arguments.work / ("smoke" if self.smoke else "full") / name
        self._out, self._result = out, result
        self.found: dict[str, Any] = result["workloads"].setdefault(name, {})
        make_project(self.folder, 48 if self.smoke else 1280, 40 if self.smoke else 256)
        os.chdir(self.folder)
        os.environ["GATRAIN_CACHE"] = str(self.folder / "cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "kernels")
        self.host: Any = None

    def close(self) -> None:
        """End the trial processes, so that their memory is free."""
        if self.host is not None:
            self.host.close()
            self.host = None

    def words(self, effective: int) -> list[str]:
        extra = (*self.workload.tiny, "device=cpu") if self.smoke else ("device=cuda",)
        return [*self.workload.words, *extra, f"batch.effective={effective}"]

    def part(self, effective: int) -> dict[str, Any]:
        found: dict[str, Any] = self.found.setdefault(str(effective), {})
        return found

    def save(self) -> None:
        write_result(self._out, self._result)

    @property
    def seconds_left(self) -> float:
        return float(self.deadline) - time.monotonic()

    # --- plan -------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """The command as a user types it: empty caches of plans and of compiled kernels, then remembered."""
        from gatrain.compose import compose
        from gatrain.inspection import inspect_run

        first_e, second_e = self.effective_batches
        began = time.perf_counter()
        inspect_run(compose(self.words(first_e)).yaml, self.folder)  # texts are tokenised once
        prepared_s = time.perf_counter() - began
        for name in ("cache/plans", "kernels"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        first, first_s, command = self._autotune(first_e)
        cached, cached_s, _ = self._autotune(first_e)
        second, second_s, second_command = self._autotune(second_e)
        self.part(first_e)["plan"] = {
            "command": command,
            "cores": os.cpu_count(),
            "data_prepared_s": round(prepared_s, 2),
            "empty_caches_s": round(first_s, 2),
            "cached_s": round(cached_s, 2),
            "same_from_cache": cached["micro_batches"] == first["micro_batches"],
            "plan": first,
        }
        self.part(second_e)["plan"] = {
            "command": second_command,
            "from_stored_curves_s": round(second_s, 2),
            "plan": second,
        }

    def _autotune(self, effective: int) -> tuple[dict[str, Any], float, str]:
        words = ["autotune", *self.words(effective), "--json"]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "gatrain", *words], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout), time.perf_counter() - began, " ".join(["gatrain", *words])

    # --- sweep ------------------------------------------------------------------------------------------

    def sweep(self) -> bool:
        """Measure every way that is still missing; returns whether all are there."""
        stored = self.found.setdefault("curves", {})
        ways = self._ways()
        for way in ways:
            label = f"{way.precision} {way.checkpointing} {'compiled' if way.compile else 'plain'}"
            sizes = self.workload.sizes if way.checkpointing == "none" else self.workload.recomputed
            if self.smoke:
                sizes = (4, 13, 16) if way.checkpointing == "none" else (16,)
            if label in stored or (self._modes is not None and way.checkpointing not in self._modes):
                continue
            if self.seconds_left < LEAST_S:
                return False
            # one size after the other, so that memory for the next is predicted from those before
            curve, _ = self._runner().measure(way, sizes, stop_early=False)
            stored[label] = dataclasses.asdict(curve)
            self.save()
        if len(stored) < len(ways):
            return False
        for effective in self.effective_batches:
            self.part(effective)["sweep"] = [
                {"settings": dataclasses.asdict(o.settings), "micro_batch": o.micro_batch, "step_s": o.step_s}
                for o in self._options(effective)
            ]
        return True

    @property
    def effective_batches(self) -> tuple[int, ...]:
        return SMOKE_EFFECTIVE if self.smoke else self.workload.effective

    def _ways(self) -> list[Any]:
        from gatrain import build
        from gatrain.compose import compose
        from gatrain.hardware import detect_hardware
        from gatrain.launch.world import Nodes
        from gatrain.train.checkpointing import available_modes
        from gatrain.tune import knobs

        config = compose(self.words(self.effective_batches[0])).config
        base = knobs.search_space(config, detect_hardware(config.device), Nodes(1)).base
        modes = available_modes(build.model_for_a_look(build.build_task(config), config.train.seed))
        compiles = (False,) if self.smoke else (False, True)
        return [
            dataclasses.replace(base, checkpointing=mode, compile=compiled)
            for compiled in compiles
            for mode in modes
        ]

    def _runner(self) -> Any:
        from gatrain.compose import compose
        from gatrain.launch.world import Nodes
        from gatrain.tune.processes import TrialHost
        from gatrain.tune.runner import TrialRunner

        device = "cpu" if self.smoke else "cuda"
        if self.host is None:
            self.host = TrialHost(Nodes(1), device, self.folder, compiles=not self.smoke)
        composed = compose(self.words(self.effective_batches[0])).config
        left = max(20.0, self.seconds_left)
        return TrialRunner(
            composed, self.host, left, lambda curve: None, lambda text: print(text, flush=True)
        )

    def _options(self, effective: int) -> list[Any]:
        from gatrain import codec
        from gatrain.batch import Split
        from gatrain.tune import judging, search
        from gatrain.tune.curve import Curve

        curves = codec.decode(list[Curve], list(self.found["curves"].values()), finite=False)
        judged = [judging.reject_wrong_losses(curve) for curve in curves]
        return [o for curve in judged for o in search.candidates(curve, Split(effective, 1)) if o.measured]

    # --- full steps ------------------------------------------------------------------------------------

    def full_steps(self) -> None:
        """The sweep's best and the plan, each as full steps, in turn; for both effective batches."""
        from gatrain.plan import Plan
        from gatrain.tune.finalists import Finalist
        from gatrain.tune.protocol import FullStepSpec

        for effective in self.effective_batches:
            plan = Plan.from_dict(self.part(effective)["plan"]["plan"])
            chosen = Finalist(plan.settings, plan.micro_batch, plan.split)
            best = sorted(self._options(effective), key=lambda o: o.step_s)[: FINALISTS + 1]
            rivals = [Finalist(o.settings, o.micro_batch, o.split) for o in best]
            named = tuple(dict.fromkeys([chosen, *rivals[:FINALISTS]]))
            if len(named) < 2:
                named = (chosen, rivals[-1])
            asked = FullStepSpec(WHOLE_S, named)
            _, confirmation = self._runner().measure(chosen.settings, (), full_steps=asked)
            if confirmation is None:
                raise RuntimeError(f"full steps at {effective} were not timed")
            entries = [dataclasses.asdict(e) | {"median_s": e.median_s} for e in confirmation.entries]
            fastest = min(e.median_s for e in confirmation.entries)
            mine = confirmation.get(chosen)
            self.part(effective)["full_steps"] = {
                "entries": entries,
                "plan_over_best": mine.median_s / fastest if mine else None,
            }
            self.save()

    # --- soak -------------------------------------------------------------------------------------------

    def soak(self, effective: int) -> None:
        """In a process of its own, as a training would be."""
        self.close()
        plan = self.part(effective)["plan"]["plan"]
        (self.folder / "plan.json").write_text(json.dumps(plan))
        micro_steps, steps = (20, 2) if self.smoke else (SOAK_MICRO_STEPS, SOAK_STEPS)
        command = [sys.executable, __file__, "--soak", str(micro_steps), str(steps), *self.words(effective)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.strip().splitlines()
        said: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
        budget = plan.get("memory_budget_bytes")
        self.part(effective)["soak"] = {
            **said,
            "ok": done.returncode == 0,
            "predicted_peak_bytes": plan.get("predicted_peak_bytes"),
            "memory_budget_bytes": budget,
            "within_budget": bool(said) and budget is not None and said["peak_bytes"] <= budget,
        }


def soak_here(micro_steps: int, steps: int, words: list[str]) -> None:
    """Run full steps on the longest samples and print the peak, as one JSON line."""
    import torch

    from gatrain import build
    from gatrain.compose import compose
    from gatrain.plan import Plan
    from gatrain.rank import Rank
    from gatrain.train.micro_batches import LoadedWindow, MicroBatch
    from gatrain.tune.trials.batches import TrialBatches
    from gatrain.tune.trials.memory import memory_of

    config = compose(words).config
    plan = Plan.from_dict(json.loads(Path("plan.json").read_text()))
    device = torch.device("cpu" if config.device == "cpu" else "cuda:0")
    memory = memory_of(Rank(0, 0, 1, 1, device), config.tune.memory_fraction)
    task = build.build_task(config)
    engine = build.build_engine(task, config, plan.settings, device)
    batches = TrialBatches(task)
    made = {size: MicroBatch(*batches.worst_case(size)) for size in set(plan.micro_batches[0])}
    window = LoadedWindow([made[size] for size in plan.micro_batches[0]])
    count = max(steps, -(-micro_steps // len(plan.micro_batches[0])))
    began = time.perf_counter()
    for step in range(count):
        engine.step(window, step)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    print(json.dumps({
        "steps": count, "micro_steps": count * len(plan.micro_batches[0]),
        "seconds": round(seconds, 2), "step_s": seconds / count, "peak_bytes": memory.peak(),
    }))  # fmt: skip


def make_project(folder: Path, images: int, side: int) -> None:
    """A user's folder with the ViT recipe and random images, made once."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "recipes/vit.yaml").write_text(VIT)
    if (folder / "images/complete").is_file():
        return
    from PIL import Image

    noise = random.Random(0)
    for index in range(images):
        path = folder / f"images/train/class_{index % 8}/{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (side, side), noise.randbytes(side * side * 3)).save(path)
    for index in range(8):
        path = folder / f"images/val/class_{index}/{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(path)
    (folder / "images/complete").touch()


def run_stages(bench: Bench, stages: list[str]) -> None:
    """Run what is missing of the stages, as far as time allows; soaks last."""
    first, second = bench.effective_batches
    done: dict[str, Callable[[], bool]] = {
        "plan": lambda: "plan" in bench.part(second),
        "sweep": lambda: "sweep" in bench.part(second),
        "full_steps": lambda: "full_steps" in bench.part(second),
        "soak": lambda: "soak" in bench.part(second),
    }
    for stage in stages:
        if done[stage]():
            continue
        print(f"--- {stage}, {bench.seconds_left:.0f} s left", flush=True)
        match stage:
            case "plan":
                bench.plan()
            case "sweep" if not bench.sweep():
                return
            case "full_steps":
                bench.full_steps()
            case "soak":
                for effective in (first, second):
                    if "soak" not in bench.part(effective) and bench.seconds_left > 60:
                        bench.soak(effective)
                        bench.save()
        bench.save()
        if bench.seconds_left < LEAST_S:
            print("time is up: call again to go on", flush=True)
            return


def merge(result: dict[str, Any], other: dict[str, Any]) -> None:
    """Add what another file holds and this one lacks: workloads, effective batches, stages, curves.

    Raises:
        ValueError: it was measured with other hardware or versions.
    """
    for key in ("device", "driver"):
        if result["hardware"][key] != other["hardware"][key]:
            raise ValueError(f"hardware differs: {result['hardware']} and {other['hardware']}")
    if result["versions"] != other["versions"]:
        raise ValueError(f"versions differ: {result['versions']} and {other['versions']}")
    result["commands"] += [each for each in other["commands"] if each not in result["commands"]]
    for name, parts in other["workloads"].items():
        for part, stages in parts.items():
            mine = result["workloads"].setdefault(name, {}).setdefault(part, {})
            mine.update({key: value for key, value in stages.items() if key not in mine})


def main() -> None:
    if sys.argv[1:2] == ["--soak"]:
        soak_here(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--checkpointing", nargs="+", choices=MODES, help="sweep these modes only")
    parser.add_argument("--merge", nargs="+", type=Path, help="first add what these result files hold")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gatrain_tuner_sweep")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + arguments.seconds
    kind = "tuner_sweep_smoke" if arguments.smoke else "tuner_sweep"
    out = result_path(kind, arguments.out)
    result: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(out.read_text())
    result = result or {**header(), "commands": [], "workloads": {}}
    for path in arguments.merge or ():
        merge(result, json.loads(path.read_text()))
    result["commands"].append(" ".join(["python", *sys.argv]))
    for name in arguments.workload:
        if arguments.deadline - time.monotonic() < LEAST_S:
            print(f"no time for {name}: call again to go on", flush=True)
            break
        bench = Bench(name, arguments, out, result)
        began = time.monotonic()
        try:
            run_stages(bench, arguments.stage)
        except Exception as error:  # the other workloads still count
            result.setdefault("errors", []).append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        finally:
            bench.close()
            bench.save()
        print(f"{name} took {time.monotonic() - began:.0f} s", flush=True)
        for effective in bench.effective_batches:
            part = bench.part(effective)
            ratio = part.get("full_steps", {}).get("plan_over_best")
            planned = part.get("plan", {})
            print(
                name, effective, planned.get("plan", {}).get("equation"), "plan / best of the sweep:", ratio,
                "plan in", planned.get("empty_caches_s", planned.get("from_stored_curves_s")),
                "s, soak:", part.get("soak", {}).get("within_budget"), flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
