"""`gatrain verify`: proof, on the user's own recipe, that the split gradient is the gradient of the whole window.

    run_verify (parent: chooses the splits) -> rank processes (gatrain.verify.ranks) -> VerifyReport

The reference is one forward and backward over the whole window, written without any of the training core. Each
case computes the same window with the training core, in fp64 and fp32. A mutation, the usual mean of means, has to
be caught: a check that nothing can fail proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatrain import scratch
from gatrain.compose import Composed
from gatrain.config import RunConfig
from gatrain.hardware import Hardware, choose_precision, detect_hardware
from gatrain.inspected import Inspected
from gatrain.inspection import inspect_run
from gatrain.launch.local import run_workers
from gatrain.launch.world import Nodes
from gatrain.rundir import read_json, write_json, write_text
from gatrain.verify.report import Case, VerifyReport

__all__ = ["Case", "VerifyReport", "run_verify"]

SECONDS = 60.0
"""Time for all cases together; a window that would take longer is cut to its first samples."""


def run_verify(
    composed: Composed,
    progress: Callable[[str], None] = lambda text: None,
) -> VerifyReport:
    """Compare split gradients with the one-shot gradient for the composed recipe.

    Args:
        composed: the recipe; its first window is the one that is computed, split as ``batch.micro`` or the tuner's
            cached plan says, or into quarters where nothing is planned yet.
        progress: told one sentence at a time.

    Raises:
        ConfigError, DataError: the recipe cannot be built.
        WorkerError: the user's code failed.
    """
    config, cwd = composed.config, Path.cwd()
    progress("Inspecting the model and the data")
    inspected = inspect_run(composed.yaml, cwd)
    hardware = detect_hardware(config.device)
    planned, planned_by, settings = _planned(config, inspected, hardware, cwd)
    with scratch.folder("gatrain-verify-") as folder:
        write_text(folder / "config.yaml", composed.yaml, mode=0o600)
        spec: dict[str, Any] = {"planned": planned, "seconds": SECONDS, "processes": 1, **settings}
        progress("Comparing splits in one process")
        found = _run(folder, spec, hardware.device, 1, cwd)
        # two processes: on two GPUs if there are two, else on the CPU
        device = hardware.device if len(hardware.gpus) >= 2 else "cpu"
        progress("Comparing two processes")
        two = _run(folder, {**spec, **found["window"], "processes": 2}, device, 2, cwd)
    return _report(composed, found, two, planned_by)


def _planned(
    config: RunConfig, inspected: Inspected, hardware: Hardware, cwd: Path
) -> tuple[int | None, str, dict[str, str]]:
    """What training would use, as far as that is known without measuring: the micro-batch, who says so, and
    precision and checkpointing."""
    precision, _ = choose_precision(config, hardware)
    settings = {"precision": precision, "checkpointing": config.checkpointing}
    if isinstance(config.batch.micro, int):
        return config.batch.micro, f"batch.micro={config.batch.micro}", settings
    from gatrain.tune import Tuner

    nodes = Nodes(max(1, len(hardware.gpus)))
    plan = Tuner(config, hardware, nodes, cwd).remembered_plan(inspected)
    if plan is not None:
        settings = {"precision": plan.settings.precision, "checkpointing": plan.settings.checkpointing}
        return plan.micro_batch, "the remembered plan", settings
    standing_in = "no plan yet (gatrain autotune makes one); a quarter of the window is used instead"
    return None, standing_in, settings


def _run(folder: Path, spec: dict[str, Any], device: str, nproc: int, cwd: Path) -> dict[str, Any]:
    write_json(folder / "verify.json", spec)
    run_workers("gatrain.verify.ranks", folder, Nodes(nproc), device=device, cwd=cwd)
    return read_json(folder / "result.json")


def _report(composed: Composed, found: dict[str, Any], two: dict[str, Any], planned_by: str) -> VerifyReport:
    cases = [Case(**raw) for raw in [*found["cases"], *two["cases"]]]
    return VerifyReport(
        recipe=composed.recipe,
        samples=found["window"]["samples"],
        effective_batch=found["window"]["full"],
        planned_by=planned_by,
        cases=cases,
        notes=list(dict.fromkeys([*found["notes"], *two["notes"]])),
    )
