"""Is the tuner's plan the best there is? An exhaustive sweep beside it, for five workloads that differ in kind.

    python tests/benchmarks/tuner_sweep.py --workload gpt2 [--stage plan sweep whole soak] [--effective 512 509]
        [--seconds 540] [--out FILE] [--work FOLDER] [--smoke]

For each workload and effective batch (two of them, one prime):

    plan    `gatrain autotune` from empty caches, again from the cache, and for the other effective batch
    sweep   every micro-batch x checkpointing x compile, each as timed micro-steps, reduction and update, from which
            the step at the effective batch is composed
    whole   the best of the sweep and the chosen plan as whole steps, in one interleaved run
    soak    1,000 micro-steps (at least 20 steps) of the plan on the longest samples; peak against its budget

Results are added to one JSON file, dated, with hardware, versions and every command. A stage that was done is left
out, and a call ends after about `--seconds`: call again to go on. `--smoke` runs tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
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

STAGES = ("plan", "sweep", "whole", "soak")
FINALISTS = 3
SOAK_MICRO_STEPS, SOAK_STEPS = 1000, 20
VIT = """\
defaults: [base, {data: image_folder}, _self_]
model: {_target_: torchvision.models.VisionTransformer, image_size: 224, patch_size: 16, num_layers: 12,
  num_heads: 12, hidden_dim: 768, mlp_dim: 3072, num_classes: 8}
loss: {_target_: torch.nn.CrossEntropyLoss}
"""


@dataclass(frozen=True)
class Workload:
    """A recipe with its overrides, the tiny form of the same for a CPU, and two effective batches."""

    words: tuple[str, ...]
    tiny: tuple[str, ...]
    effective: tuple[int, int]


_IMAGES = ("data.path=images", "train.steps=20", "train.epochs=null", "train.data_workers=0")
_TINY_GPT = ("model.layers=2", "model.width=64", "model.heads=2", "data.context=32")
WORKLOADS = {
    "gpt2": Workload(("recipe=gpt2",), (*_TINY_GPT, "data.vocab_size=512", "model.vocab_size=512"), (512, 509)),
    "gpt350m": Workload(
        ("recipe=gpt2", "model.layers=24", "model.width=1024", "model.heads=16"),
        (*_TINY_GPT, "data.vocab_size=512", "model.vocab_size=512"),
        (256, 257),
    ),
    "resnet50": Workload(
        ("recipe=resnet50", "model.classes=8", *_IMAGES), ("data.size=32",), (1024, 1021)
    ),
    "vit": Workload(
        ("recipe=vit", *_IMAGES[:2], "train.data_workers=0"),
        ("data.size=32", "model.image_size=32", "model.num_layers=2", "model.hidden_dim=48",
         "model.num_heads=2", "model.mlp_dim=96"),
        (1024, 1021),
    ),
    "padded": Workload(
        ("recipe=padded", "model.layers=12", "model.heads=12", "model.width=768", "data.context=1024"),
        (*_TINY_GPT, "data.vocab_size=512"),
        (256, 251),
    ),
}  # fmt: skip
SMOKE_EFFECTIVE = (16, 13)


class Bench:
    """One workload in a folder of its own; results are written after each piece of work."""

    def __init__(self, name: str, arguments: argparse.Namespace, out: Path, result: dict[str, Any]) -> None:
        self.workload = WORKLOADS[name]
        self.smoke = bool(arguments.smoke)
        self.deadline = time.monotonic() + arguments.seconds
        self.folder = arguments.work / ("smoke" if self.smoke else "full") / name
        self._out, self._result = out, result
        self.found: dict[str, Any] = result["workloads"].setdefault(name, {})
        make_project(self.folder, 48 if self.smoke else 1280, 40 if self.smoke else 256)
        os.chdir(self.folder)
        os.environ["GATRAIN_CACHE"] = str(self.folder / "cache")

    def words(self, effective: int) -> list[str]:
        extra = (*self.workload.tiny, "device=cpu") if self.smoke else ("device=cuda",)
        return [*self.workload.words, *extra, f"batch.effective={effective}"]

    def part(self, effective: int) -> dict[str, Any]:
        return self.found.setdefault(str(effective), {})

    def save(self) -> None:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(self._result, indent=1) + "\n")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    # --- plan -------------------------------------------------------------------------------------------

    def plan(self, effective: int, other: int) -> None:
        """The command as a user types it: empty caches of plans and of compiled kernels, then remembered."""
        from gatrain.compose import compose
        from gatrain.inspection import inspect_run

        began = time.perf_counter()
        inspect_run(compose(self.words(effective)).yaml, self.folder)  # texts are tokenised once
        prepared_s = time.perf_counter() - began
        shutil.rmtree(self.folder / "cache/plans", ignore_errors=True)
        with tempfile.TemporaryDirectory() as kernels:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": kernels}
            first, first_s, command = self._autotune(effective, environment)
            cached, cached_s, _ = self._autotune(effective, environment)
            another, another_s, _ = self._autotune(other, environment)
        self.part(effective)["plan"] = {
            "command": command,
            "data_prepared_s": round(prepared_s, 2),
            "empty_caches_s": round(first_s, 2),
            "cached_s": round(cached_s, 2),
            "other_effective_batch": other,
            "other_effective_batch_s": round(another_s, 2),
            "same_from_cache": cached["micro_batches"] == first["micro_batches"],
            "other_equation": another["equation"],
            "plan": first,
        }

    def _autotune(self, effective: int, environment: dict[str, str]) -> tuple[dict[str, Any], float, str]:
        words = ["autotune", *self.words(effective), "--json"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "gatrain", *words], env=environment, stdout=subprocess.PIPE, check=True
        )
        return json.loads(done.stdout), time.perf_counter() - began, " ".join(["gatrain", *words])

    # --- sweep ------------------------------------------------------------------------------------------

    def sweep(self, effective: int) -> bool:
        """Measure every way that is still missing; returns whether all are there."""
        stored = self.found.setdefault("curves", {})
        share_sizes = sweep_sizes(max(self.effective_batches), 4 if self.smoke else 16)
        for way in self._ways(effective):
            label = f"{way.precision} {way.checkpointing} {'compiled' if way.compile else 'plain'}"
            if label in stored:
                continue
            if self.seconds_left < 30:
                return False
            curve, _ = self._runner(effective).measure(way, share_sizes, rises=False)
            stored[label] = dataclasses.asdict(curve)
            self.save()
        self.part(effective)["sweep"] = [
            {"settings": dataclasses.asdict(o.settings), "micro_batch": o.micro_batch, "step_s": o.step_s}
            for o in self._options(effective)
        ]
        return True

    @property
    def effective_batches(self) -> tuple[int, ...]:
        return SMOKE_EFFECTIVE if self.smoke else self.workload.effective

    def _ways(self, effective: int) -> list[Any]:
        from gatrain import build
        from gatrain.compose import compose
        from gatrain.tune import detect_hardware, settings

        config = compose(self.words(effective)).config
        base = settings.resolve(config, detect_hardware(config.device)).base
        modes = build.available_checkpointing(build.build_task(config))
        compiles = (False,) if self.smoke else (False, True)
        return [
            dataclasses.replace(base, checkpointing=mode, compile=compiled)
            for compiled in compiles
            for mode in modes
        ]

    def _runner(self, effective: int) -> Any:
        from gatrain.compose import compose
        from gatrain.launch.nodes import Nodes
        from gatrain.tune.rounds import Launch, TrialRunner

        composed = compose(self.words(effective)).config
        launch = Launch(Nodes(1), "cpu" if self.smoke else "cuda", self.folder)
        left = max(20.0, self.seconds_left)
        return TrialRunner(composed, launch, left, lambda curve: None, lambda text: print(text, flush=True))

    def _options(self, effective: int) -> list[Any]:
        from gatrain.tune import search
        from gatrain.tune.curve import Curve

        curves = [Curve.from_dict(stored) for stored in self.found["curves"].values()]
        judged = [search.reject_wrong_losses(curve) for curve in curves]
        return [o for curve in judged for o in search.candidates(curve, effective, 1) if o.measured]

    # --- whole steps ------------------------------------------------------------------------------------

    def whole(self, effective: int) -> None:
        """The sweep's best and the plan, each as whole steps, in turn."""
        from gatrain.plan import Plan
        from gatrain.tune.confirm import Finalist
        from gatrain.tune.spec import WholeSpec

        plan = Plan.from_dict(self.part(effective)["plan"]["plan"])
        chosen = Finalist(plan.settings, plan.micro_batch, tuple(plan.shares))
        best = sorted(self._options(effective), key=lambda o: o.step_s)[:FINALISTS]
        rivals = [Finalist(o.settings, o.micro_batch, (effective,)) for o in best]
        named = tuple(dict.fromkeys([chosen, *rivals]))
        if len(named) < 2:  # the sweep's own best is the plan: compare with its next
            next_best = sorted(self._options(effective), key=lambda o: o.step_s)[FINALISTS]
            named += (Finalist(next_best.settings, next_best.micro_batch, (effective,)),)
        seconds = min(self.seconds_left, 20.0 if self.smoke else 240.0)
        asked = WholeSpec(effective, 1, seconds, named)
        _, confirmation = self._runner(effective).measure(chosen.settings, (), whole=asked)
        if confirmation is None:
            raise SystemExit(f"whole steps at {effective} were not timed; allow more --seconds")
        entries = [dataclasses.asdict(e) | {"median_s": e.median_s} for e in confirmation.entries]
        fastest = min(e.median_s for e in confirmation.entries)
        mine = confirmation.get(chosen)
        self.part(effective)["whole"] = {
            "entries": entries,
            "plan_over_best": mine.median_s / fastest if mine else None,
        }

    # --- soak -------------------------------------------------------------------------------------------

    def soak(self, effective: int) -> None:
        """In a process of its own, as a training would be."""
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
    """Run whole steps on the longest samples and print the peak, as one JSON line."""
    import torch

    from gatrain import build
    from gatrain.compose import compose
    from gatrain.plan import Plan
    from gatrain.rank import Rank
    from gatrain.train.accumulate import MicroBatch, RankWindow
    from gatrain.tune.measure import TrialBatches
    from gatrain.tune.memory import memory_of

    config = compose(words).config
    plan = Plan.from_dict(json.loads(Path("plan.json").read_text()))
    device = torch.device("cpu" if config.device == "cpu" else "cuda:0")
    memory = memory_of(Rank(0, 0, 1, 1, device), config.tune.memory_fraction)
    task = build.build_task(config)
    engine = build.build_engine(task, config, plan.settings, device)
    batches = TrialBatches(task)
    made = {size: MicroBatch(*batches.worst_case(size)) for size in set(plan.micro_batches[0])}
    window = RankWindow([made[size] for size in plan.micro_batches[0]])
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


def sweep_sizes(effective: int, finest: int) -> list[int]:
    """Sizes of an exhaustive sweep: powers of two, the steps between them, and the near-equal cuts."""
    sizes = {2**power for power in range(effective.bit_length()) if 2**power <= effective}
    sizes |= {3 * 2**power for power in range(1, effective.bit_length()) if 3 * 2**power <= effective}
    sizes |= {-(-effective // k) for k in range(1, finest + 1)}
    return sorted(sizes)


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


def header() -> dict[str, Any]:
    """Date, hardware, versions."""
    import torch

    from gatrain.tune import detect_hardware

    hardware = detect_hardware()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {"device": hardware.describe(), "driver": hardware.driver, "cores": hardware.cpu_cores},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "commands": [],
        "workloads": {},
    }


def run_stages(bench: Bench, arguments: argparse.Namespace) -> None:
    for effective in arguments.effective or bench.effective_batches:
        other = effective - effective // 4  # within the stored curve: a re-plan, not a new trial
        stages: dict[str, Callable[[], object]] = {
            "plan": lambda e=effective, o=other: bench.plan(e, o),  # type: ignore[misc]
            "sweep": lambda e=effective: bench.sweep(e),  # type: ignore[misc]
            "whole": lambda e=effective: bench.whole(e),  # type: ignore[misc]
            "soak": lambda e=effective: bench.soak(e),  # type: ignore[misc]
        }
        for stage in arguments.stage:
            if stage in bench.part(effective):
                continue
            if bench.seconds_left < 20:
                print("time is up: call again to go on", flush=True)
                return
            print(f"--- {stage} at batch.effective={effective}", flush=True)
            done = stages[stage]()
            bench.save()
            if done is False:
                print("time is up: call again to go on", flush=True)
                return


def main() -> None:
    if sys.argv[1:2] == ["--soak"]:
        soak_here(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--effective", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gatrain_tuner_sweep")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    today = datetime.date.today().isoformat()
    kind = "tuner_sweep_smoke" if arguments.smoke else "tuner_sweep"
    out = (arguments.out or Path(__file__).parent / "results" / f"{kind}_{today}.json").resolve()
    result: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(out.read_text())
    result = result or header()
    result["commands"].append(" ".join(["python", *sys.argv]))
    for name in WORKLOADS if arguments.workload == "all" else [arguments.workload]:
        bench = Bench(name, arguments, out, result)
        run_stages(bench, arguments)
        for effective in bench.effective_batches:
            part = bench.part(effective)
            ratio = part.get("whole", {}).get("plan_over_best")
            planned = part.get("plan", {})
            print(
                name, effective, planned.get("plan", {}).get("equation"), "plan / best of the sweep:", ratio,
                "plan in", planned.get("empty_caches_s"), "s, soak:", part.get("soak", {}).get("within_budget"),
            )  # fmt: skip


if __name__ == "__main__":
    main()
