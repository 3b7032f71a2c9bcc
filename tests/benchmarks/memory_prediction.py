"""Predicted against measured peak memory: five workloads, three micro-batches each, with and without checkpointing.

    python tests/benchmarks/memory_prediction.py --measure-all FILE [--workload NAME ...] [--events]
    python tests/benchmarks/memory_prediction.py --compare FILE [--out FILE]
    python tests/benchmarks/memory_prediction.py --smoke

The first is for a machine with a GPU. One process for each workload and mode runs two real optimizer steps of two
micro-steps at rising sizes, on worst-case samples; model, optimizer, cache and cuBLAS's workspaces are made anew
for each size, so that each is what a process of its own would hold. It reports ``max_memory_allocated``,
``max_memory_reserved`` and what the process holds beside them. FILE is written after each process; a second call
measures what is missing, or again the workloads that are named. ``--events`` adds every allocation of one step at
the largest size.

The second runs anywhere: it predicts what FILE holds, times each prediction, and writes one dated result with
hardware, versions, commands, errors, their median and worst. ``--smoke`` does both on the CPU, where there is
nothing to measure, with smaller models and two sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import VIT, result_path, write_result

MODES = ("none", "full")
STEPS, MICRO_STEPS = 2, 2
MOST_S = 120.0
"""A measuring process that takes longer is stopped; what it had measured counts."""
STATE_FIRST, STATE_LATER = "made before the first step", "made in the first update"
"""When the training code made the optimizer's state, which decides how memory is cut up. Predictions are of the
first; files that say nothing were measured with the second, which shows in "reserved" and "in_all"."""
KEYS = ("allocated", "reserved", "in_all")


@dataclass(frozen=True)
class Workload:
    """A recipe with its overrides, its micro-batches, and its tiny form for a CPU."""

    words: tuple[str, ...]
    sizes: tuple[int, ...]
    tiny: tuple[str, ...] | None = None


_DEEP = ("model.layers=24", "model.heads=16", "model.width=1024")
_TINY_TEXT = ("model.layers=2", "model.width=64", "model.heads=2", "data.context=64")
_PADDED = ("model.layers=12", "model.heads=12", "model.width=768", "data.context=1024")
_IMAGES = ("data.path=images", "data.eval_fraction=0")
WORKLOADS = {
    "gpt2": Workload(
        ("recipe=gpt2",), (4, 16, 32), (*_TINY_TEXT, "data.vocab_size=512", "model.vocab_size=512")
    ),
    "gpt_350m": Workload(("recipe=gpt2", *_DEEP), (2, 8, 16)),
    "resnet50": Workload(("recipe=resnet50", "model.classes=8", *_IMAGES), (16, 64, 128)),
    "vit": Workload(
        ("recipe=vit", *_IMAGES),
        (16, 64, 128),
        ("model.num_layers=2", "model.hidden_dim=64", "model.mlp_dim=128", "model.num_heads=2"),
    ),
    "padded": Workload(("recipe=padded", *_PADDED), (4, 16, 32), _TINY_TEXT),
}


def chosen(names: list[str] | None, smoke: bool) -> dict[str, Workload]:
    """The workloads that are asked for; in the smoke mode those with a tiny form, at two sizes."""
    found = {name: load for name, load in WORKLOADS.items() if names is None or name in names}
    if not smoke:
        return found
    return {
        name: Workload((*load.words, *load.tiny), (1, 2))
        for name, load in found.items()
        if load.tiny is not None
    }


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A folder with the images and the recipe of the ViT, as the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        random_images(folder / "images")
        (folder / "recipes").mkdir()
        (folder / "recipes" / "vit.yaml").write_text(VIT)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def random_images(folder: Path) -> None:
    """Two random images of each of eight classes; what they show changes no memory."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in "abcdefgh":
        (folder / name).mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 255, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")


# --- measuring ------------------------------------------------------------------------------------------


def measure_sizes(asked: dict[str, Any]) -> None:
    """In a process of its own: a line of JSON for each size. Waits for a line before it touches the GPU, so that
    it can get ready while another process measures."""
    import torch

    from gatrain import build
    from gatrain.compose import load_config
    from gatrain.plan import StepSettings

    config = load_config(Path(asked["config"]))
    task = build.build_task(config)
    model = build.build_model(task, config.train.seed, torch.device("cpu"))
    settings = StepSettings(asked["precision"], asked["mode"], asked["compile"], "window")
    indices = list(task.worst_case_indices(2))
    samples = [task.train_data[index] for index in indices]
    sys.stdin.readline()
    device = torch.device("cpu" if asked["smoke"] else "cuda:0")
    torch.zeros(1, device=device)  # before there is a context, the allocator knows no device
    for size in asked["sizes"]:
        host = task.collate([samples[i % len(samples)] for i in range(size)])
        takes_events = asked["events"] and size == asked["sizes"][-1]
        try:
            row = measure(task, model, host, settings, config, device, takes_events)
        except Exception as error:  # out of memory, say: the other rows count all the same
            lines = str(error).strip().splitlines() or [""]
            row = {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
        print(json.dumps({"micro_batch": size, **row}), flush=True)


def measure(
    task: Any, model: Any, host: Any, settings: Any, config: Any, device: Any, takes_events: bool
) -> dict[str, Any]:
    """Two real steps at one size, as the first ones of a process."""
    import torch

    from gatrain.tasks.base import named_weights
    from gatrain.train.engine import Engine
    from gatrain.train.micro_batches import LoadedWindow, MicroBatch
    from gatrain.train.ranks import Ranks

    began = time.perf_counter()
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(
        task, copy.deepcopy(model).to(device), settings, config.optimizer, Ranks.current(), device
    )
    window = LoadedWindow([MicroBatch(host, named_weights(task.weight(host)))] * MICRO_STEPS)
    for step in range(STEPS):
        engine.step.gradient(window)
        engine.update(step)
    if not on_gpu:
        return {"seconds": time.perf_counter() - began}
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)  # the rest of the GPU is empty: main() checked
    beside = total - free - torch.cuda.memory_reserved(device)
    reserved = torch.cuda.max_memory_reserved(device)
    row = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": reserved,
        "beside": beside,
        "in_all": reserved + beside,
        "seconds": time.perf_counter() - began,
    }
    return {**row, "events": allocations(lambda: engine.step.gradient(window))} if takes_events else row


def allocations(call: Any) -> list[int]:
    """Bytes of each allocation of a call, and -n where the n-th of them (from 1) was freed."""
    import torch

    torch.cuda.memory._record_memory_history(context=None, max_entries=1_000_000)
    call()
    torch.cuda.synchronize()
    traces = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    events: list[int] = []
    live: dict[int, int] = {}
    count = 0
    for entry in traces:
        if entry["action"] == "alloc":
            count += 1
            live[entry["addr"]] = count
            events.append(entry["size"])
        elif entry["action"] == "free_requested" and entry["addr"] in live:
            events.append(-live.pop(entry["addr"]))
    return events


class Measuring:
    """One measuring process. It gets ready at once and measures when `rows` is called."""

    def __init__(
        self, folder: Path, name: str, load: Workload, mode: str, arguments: argparse.Namespace
    ) -> None:
        from gatrain.compose import compose

        self.sizes, self.mode = load.sizes, mode
        self._output, self._errors = folder / f"{name}_{mode}.jsonl", folder / f"{name}_{mode}.log"
        config = folder / f"{name}_{mode}.yaml"
        config.write_text(compose([*load.words, f"checkpointing={mode}"]).yaml)
        asked = {
            "config": str(config),
            "sizes": load.sizes,
            "mode": mode,
            "compile": arguments.compile,
            "precision": "fp32" if arguments.smoke else "bf16",
            "smoke": arguments.smoke,
            "events": arguments.events,
        }
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(asked)],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                text=True,
            )

    def rows(self) -> list[dict[str, Any]]:
        """A row for each size; what was not measured says why."""
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate("\n", timeout=MOST_S)
        self.stop()
        lines = [line for line in self._output.read_text().splitlines() if line.startswith("{")]
        found = {row["micro_batch"]: row for row in map(json.loads, lines)}
        errors = self._errors.read_text().strip().splitlines() or [f"ended with {self._process.returncode}"]
        return [
            {"checkpointing": self.mode, **found.get(size, {"micro_batch": size, "failed": errors[-1][:300]})}
            for size in self.sizes
        ]

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()


def measure_all(folder: Path, target: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the file lacks, one process at a time on the GPU while the next one gets ready."""
    loads = chosen(arguments.workload, arguments.smoke)
    results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    results |= header(arguments)
    kept = results.setdefault("rows", {})
    wanted = [
        (name, load, mode)
        for name, load in loads.items()
        for mode in MODES
        if arguments.workload is not None or not complete(kept.get(f"{name} {mode}", []))
    ]
    ready: Measuring | None = None
    for index, (name, load, mode) in enumerate(wanted):
        current = ready or Measuring(folder, name, load, mode, arguments)
        following = wanted[index + 1 : index + 2]
        ready = Measuring(folder, *following[0], arguments) if following else None
        began = time.perf_counter()
        try:
            kept[f"{name} {mode}"] = current.rows()
        except BaseException:
            for process in (current, ready):
                if process is not None:
                    process.stop()
            raise
        write_result(target, results)
        shown = [row.get("failed") or row.get("reserved") for row in kept[f"{name} {mode}"]]
        print(f"{name} {mode}: {shown} in {time.perf_counter() - began:.1f} s", flush=True)
    return results


def complete(rows: list[dict[str, Any]]) -> bool:
    return bool(rows) and not any("failed" in row for row in rows)


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and how was measured."""
    from gatrain.hardware import detect_hardware
    from gatrain.recorded import versions

    hardware = detect_hardware("cpu" if arguments.smoke else "auto")
    if not hardware.gpus and not arguments.smoke:
        sys.exit("There is no GPU to measure on. Use --smoke for the code path alone.")
    if any(gpu.free_bytes < 0.97 * gpu.total_bytes for gpu in hardware.gpus):
        sys.exit("Another process uses the GPU: a measurement would count its memory.")
    return {
        "date": datetime.date.today().isoformat(),
        "smoke": arguments.smoke,
        "compile": arguments.compile,
        "hardware": hardware.describe(),
        "gpu": hardware.gpus[0].name if hardware.gpus else None,
        "total_bytes": hardware.gpus[0].total_bytes if hardware.gpus else None,
        "driver": hardware.driver,
        "versions": {**versions(), "cuda": hardware.cuda},
        "command": command(),
        "optimizer_state": STATE_FIRST,
    }


def command() -> str:
    return " ".join(["python", *sys.argv])


# --- comparing ------------------------------------------------------------------------------------------


def compare(folder: Path, measured: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict every row that was measured."""
    from gatrain.predict import find_gpu
    from gatrain.recorded import versions

    gpu = find_gpu(arguments.gpu or measured["gpu"] or "H100 80GB")
    rows = []
    prepare_s = {}
    for name, load in chosen(arguments.workload, measured["smoke"]).items():
        prepare_s[name] = prepare(folder, load)
        for mode in MODES:
            for found in measured["rows"].get(f"{name} {mode}", []):
                row = predicted(folder, load, mode, found["micro_batch"], measured["compile"], gpu)
                found = {key: value for key, value in found.items() if key not in ("checkpointing", "events")}
                row = {"workload": name, "checkpointing": mode, **row, "measured": found}
                row["error"] = {
                    key: row["predicted"][key] / found[key] - 1
                    for key in KEYS
                    if found.get(key) and row["predicted"] is not None
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    summary = {}
    for key in KEYS:
        errors = sorted(abs(row["error"][key]) for row in rows if key in row["error"])
        if errors:
            summary[key] = {"median": statistics.median(errors), "worst": errors[-1], "count": len(errors)}
    return {
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "absolute_error": summary,
        "slowest_prediction_s": max((row["predict_s"] for row in rows), default=None),
        "slowest_prediction_cpu_s": max((row["predict_cpu_s"] for row in rows), default=None),
        "data_prepared_before_s": prepare_s,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "table_entry": dataclasses.asdict(gpu),
        "measured": {
            "optimizer_state": STATE_LATER,
            **{key: value for key, value in measured.items() if key != "rows"},
        },
        "rows": rows,
    }


def predicted(folder: Path, load: Workload, mode: str, size: int, compiled: bool, gpu: Any) -> dict[str, Any]:
    """One prediction, as the command makes it, with its seconds and those of the processors."""
    from gatrain.compose import compose
    from gatrain.predict import predict

    words = [*load.words, f"checkpointing={mode}", f"compile={str(compiled).lower()}"]
    words += [f"batch.micro={size}", f"batch.effective={MICRO_STEPS * size}"]
    row: dict[str, Any] = {"micro_batch": size, "overrides": words, "predicted": None}
    began, cpu_began = time.perf_counter(), processor_s()
    try:
        (forecast,) = predict(compose(words), [gpu], cwd=folder).gpus
        expected = forecast.modes[0].sizes[0]
        values = expected.allocated_bytes, expected.reserved_bytes, expected.peak_bytes
        row["predicted"] = dict(zip(KEYS, values, strict=True))
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"
    return row | {"predict_s": time.perf_counter() - began, "predict_cpu_s": processor_s() - cpu_began}


def processor_s() -> float:
    """Seconds of all processors for this process and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def prepare(folder: Path, load: Workload) -> float:
    """Read and tokenise a workload's data once, so that no prediction is timed with it; returns the seconds."""
    from gatrain.compose import compose

    (folder / "config.yaml").write_text(compose(list(load.words)).yaml)
    code = (
        "import sys; from pathlib import Path; from gatrain import build, compose; "
        "build.build_task(compose.load_config(Path(sys.argv[1])))"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(folder / "config.yaml")], cwd=folder, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure-all", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--gpu", help="name in gatrain's table; by default the one that was measured")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--events", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.path.insert(0, str(Path.cwd()))
        measure_sizes(json.loads(arguments.measure))
        return
    if sum(map(bool, (arguments.measure_all, arguments.compare, arguments.smoke))) != 1:
        parser.error("give one of --measure-all FILE, --compare FILE and --smoke")
    target = (arguments.measure_all or Path()).resolve()
    measured = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    out = result_path("memory_prediction", arguments.out)
    with work_folder() as folder:
        if not arguments.compare:
            measured = measure_all(
                folder, target if arguments.measure_all else folder / "raw.json", arguments
            )
        if arguments.measure_all:
            return
        result = compare(folder, measured, arguments)
    if not arguments.smoke or arguments.out:
        write_result(out, result)
    shown = ("absolute_error", "slowest_prediction_s", "slowest_prediction_cpu_s")
    print(json.dumps({key: result[key] for key in shown}, indent=1))


if __name__ == "__main__":
    main()
