"""Predicted against measured peak memory: five workloads, three micro-batches each, with and without checkpointing.

    python tests/benchmarks/memory_prediction.py [--gpu NAME] [--compile] [--out FILE]    on a machine with a GPU
    python tests/benchmarks/memory_prediction.py --smoke                                  anywhere, small and quick

Each measurement is a process of its own that runs two real optimizer steps of two micro-steps on worst-case samples
and reports ``max_memory_allocated``, ``max_memory_reserved`` and what NVML says that the process holds. Writes one
dated JSON file with hardware, versions, the full command, the errors and their median and worst. The smoke mode
runs the same path on the CPU, where there is nothing to measure, with smaller models and two sizes.
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

SIZES = {"gpt2": (4, 16, 32), "gpt_350m": (2, 8, 16), "resnet50": (16, 64, 128), "vit": (16, 64, 128)}
PADDED_SIZES = (16, 64, 256)
MODES = ("none", "full")

VIT = """
import torchvision


def vit(classes=2):
    model = torchvision.models.vit_b_16(weights=None, num_classes=classes)
    model.checkpoint_blocks = lambda: list(model.encoder.layers)
    return model
"""


def workloads(folder: Path, smoke: bool) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Overrides and micro-batches of each workload."""
    random_images(folder / "images")
    (folder / "vit_model.py").write_text(VIT)
    deep = ["model.layers=24", "model.heads=16", "model.width=1024"]
    pictures = ["recipe=resnet50", "data.path=images", "model.classes=2", "data.eval_fraction=0"]
    (folder / "recipes").mkdir()
    vit = "defaults: [resnet50, override model: vit_b]\n"
    (folder / "recipes" / "vit.yaml").write_text(vit)
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "vit_b.yaml").write_text("_target_: vit_model.vit\n")
    every = {
        "gpt2": (["recipe=gpt2"], SIZES["gpt2"]),
        "gpt_350m": (["recipe=gpt2", *deep], SIZES["gpt_350m"]),
        "resnet50": (pictures, SIZES["resnet50"]),
        "vit": (["recipe=vit", "data.path=images", "data.eval_fraction=0"], SIZES["vit"]),
        "padded": (["recipe=padded", "model.layers=8", "model.width=512", "data.context=512"], PADDED_SIZES),
    }
    if not smoke:
        return every
    tiny = ["model.layers=2", "model.width=64", "model.heads=2", "data.context=64"]
    short = {
        "gpt2": [*every["gpt2"][0], *tiny, "data.vocab_size=512", "model.vocab_size=512"],
        "padded": ["recipe=padded", "data.context=64"],
        "vit": [*every["vit"][0], "data.size=224"],
    }
    return {name: (words, (1, 2)) for name, words in short.items()}


def random_images(folder: Path) -> None:
    """Eight random images of each of two classes; what they show changes no memory."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 255, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")


def measure(config_yaml: Path, micro_batch: int, mode: str, compiled: bool, precision: str) -> dict[str, Any]:
    """In a process of its own: two real steps of two micro-steps."""
    import torch

    from gatrain import build
    from gatrain.compose import load_config
    from gatrain.plan import StepSettings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(config_yaml)
    task = build.build_task(config)
    settings = StepSettings(precision, mode, compiled, "window")
    engine = build.build_engine(task, config, settings, device)
    indices = list(task.worst_case_indices(min(micro_batch, 8)))
    samples = [task.train_data[indices[i % len(indices)]] for i in range(micro_batch)]
    host = task.collate(samples)
    scale = dict.fromkeys(build_terms(task, host), 1e-6)
    began = time.perf_counter()
    for step in range(2):
        batches = [engine.to_device(host) for _ in range(2)]  # one is in use, one is staged ahead
        for batch in batches:
            engine.micro_step(batch, scale)
        del batch, batches
        engine.last_loss_sums()
        engine.update(step)
    if device.type == "cpu":
        return {"allocated": None, "reserved": None, "in_all": None, "seconds": time.perf_counter() - began}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(device)  # the rest of the GPU is empty: main() checked
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "in_all": nvml_used() or total - free,
        "seconds": time.perf_counter() - began,
    }


def build_terms(task: Any, host: Any) -> list[str]:
    from gatrain.tasks.base import named_weights

    return list(named_weights(task.weight(host)))


def nvml_used() -> int | None:
    """Bytes that this process holds of its GPU, by the driver's own count."""
    import os

    import pynvml

    pynvml.nvmlInit()
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
    return None


def measured_in_child(folder: Path, yaml: str, *words: str) -> dict[str, Any]:
    """Run `measure` in a new process; an out-of-memory error is an answer too."""
    (folder / "config.yaml").write_text(yaml)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--measure",
        str(folder / "config.yaml"),
        *words,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(folder: Path, arguments: argparse.Namespace, gpu: Any) -> list[dict[str, Any]]:
    """Every workload, size and mode: predicted and measured."""
    import os

    from gatrain.compose import compose
    from gatrain.predict import predict

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    rows = []
    for name, (words, sizes) in workloads(folder, arguments.smoke).items():
        for mode in MODES:
            for size in sizes:
                compiled = f"compile={str(arguments.compile).lower()}"
                given = [*words, compiled, f"checkpointing={mode}", f"batch.micro={size}"]
                composed = compose([*given, f"batch.effective={2 * size}"])
                began = time.perf_counter()
                (forecast,) = predict(composed, [gpu], cwd=folder, raises=False).gpus
                predict_s = time.perf_counter() - began
                expected = forecast.modes[0].sizes[0]
                precision = "fp32" if arguments.smoke else forecast.precision
                found = measured_in_child(
                    folder, composed.yaml, str(size), mode, str(arguments.compile), precision
                )
                row: dict[str, Any] = {"workload": name, "checkpointing": mode, "micro_batch": size}
                row |= {"overrides": given, "predict_s": predict_s, "measured": found}
                row["predicted"] = {
                    "allocated": expected.allocated_bytes,
                    "reserved": expected.reserved_bytes,
                    "in_all": expected.peak_bytes,
                }
                row["error"] = {
                    key: row["predicted"][key] / found[key] - 1 for key in row["predicted"] if found.get(key)
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", help="name in gatrain's table; by default the one found")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        config, size, mode, compiled, precision = arguments.measure
        sys.path.insert(0, str(Path.cwd()))
        print(json.dumps(measure(Path(config), int(size), mode, compiled == "True", precision)))
        return

    from gatrain.fit.record import versions
    from gatrain.predict import find_gpu
    from gatrain.tune import detect_hardware

    hardware = detect_hardware("cpu" if arguments.smoke else "auto")
    if not hardware.gpus and not arguments.smoke:
        sys.exit("There is no GPU to measure on. Use --smoke for the code path alone.")
    if any(gpu.free_bytes < 0.97 * gpu.total_bytes for gpu in hardware.gpus):
        sys.exit("Another process uses the GPU: a measurement would count its memory.")
    gpu = find_gpu(arguments.gpu or (hardware.gpus[0].name if hardware.gpus else "H100 80GB"))
    out = arguments.out.resolve() if arguments.out else None
    today = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as name:
        rows = compare(Path(name).resolve(), arguments, gpu)
    errors = {
        key: [abs(row["error"][key]) for row in rows if key in row["error"]]
        for key in ("allocated", "reserved", "in_all")
    }
    result = {
        "date": today,
        "smoke": arguments.smoke,
        "hardware": hardware.describe(),
        "driver": hardware.driver,
        "versions": {**versions(), "python": platform.python_version(), "cuda": hardware.cuda},
        "command": " ".join(["python", *sys.argv]),
        "table_entry": gpu.to_dict(),
        "rows": rows,
        "absolute_error": {
            key: {"median": statistics.median(values), "worst": max(values), "count": len(values)}
            for key, values in errors.items()
            if values
        },
        "slowest_prediction_s": max(row["predict_s"] for row in rows),
    }
    target = out or Path(__file__).resolve().parent / "results" / f"memory_prediction_{today}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("absolute_error", "slowest_prediction_s")}, indent=1))


if __name__ == "__main__":
    main()
