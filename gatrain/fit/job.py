"""Where a command runs: in which job (the one place where a scheduler is asked), and on how many processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gatrain import batch, doors, imports
from gatrain.commands import setting
from gatrain.compose import Composed
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, GatrainError, LaunchError
from gatrain.fit.claim import folder_for_job
from gatrain.hardware import Hardware, detect_hardware
from gatrain.launch.schedulers import Job, Scheduler, shipped
from gatrain.launch.world import Nodes, WorldRequest

StartNodes = Callable[[Job, Sequence[str]], NoReturn]
"""Starts the present command, with some more words, on every node of a job."""


def find_job(config: RunConfig, cwd: Path) -> Job | None:
    """Ask the configuration's scheduler; None outside of a job, and where ``scheduler`` is null.

    Args:
        cwd: folder whose modules ``scheduler._target_`` may name.

    Raises:
        ConfigError: ``scheduler`` names no `Scheduler`, or its ``detect`` failed or gave no `Job`.
        LaunchError: the environment is not what the scheduler documents.
    """
    if config.scheduler is None:
        return None
    scheduler = _make(doors.node_of("scheduler", config.scheduler), cwd)
    try:
        job = scheduler.detect(os.environ)
    except Exception as error:
        if isinstance(error, GatrainError) or type(scheduler).__module__.startswith("gatrain."):
            raise
        raise ConfigError(
            f"scheduler: detect of {type(scheduler).__name__} failed: {type(error).__name__}: {error}. "
            "Correct it, or run without it: scheduler=null."
        ) from error
    if job is not None and not isinstance(job, Job):
        raise ConfigError(
            f"scheduler: detect of {type(scheduler).__name__} gave a {type(job).__name__}. Let it give a "
            "gatrain.launch.schedulers.Job, or None outside of a job."
        )
    return job


def _make(node: dict[str, object], cwd: Path) -> Scheduler:
    dotted = str(node["_target_"])
    if doors.is_shipped(dotted) and len(node) == 1:
        return shipped(dotted)  # without torch, which `build` imports
    from gatrain.build import instantiate

    imports.use_working_folder(cwd)
    made = instantiate("scheduler", node)
    if not isinstance(made, Scheduler):
        raise ConfigError(
            f"scheduler._target_={dotted} gave a {type(made).__name__}. Name a class that derives from "
            "gatrain.launch.schedulers.Scheduler."
        )
    return made


def reach_every_node(
    request: WorldRequest,
    start_nodes: StartNodes | None,
    composed: Composed | None,
    cwd: Path,
    overwrite: bool,
) -> None:
    """In the only process of a job of several nodes, start the command again on each of them: no return then.

    Args:
        composed: of a new run, whose folder is then chosen here, once for all nodes.
        overwrite: whether the command names the folder that it replaces.
    """
    job = request.job
    if job is None or start_nodes is None or request.names_nodes or not job.needs_other_nodes:
        return
    folder = folder_for_job(composed, job, cwd) if composed is not None and not overwrite else None
    start_nodes(job, [] if folder is None else [setting("run.dir", str(folder))])


def find_world(config: RunConfig, request: WorldRequest) -> tuple[Hardware, Nodes]:
    """Look at the hardware and settle how many processes train.

    Raises:
        LaunchError: more processes than GPUs, or a device that is not there.
        PlanError: a fixed micro-batch exceeds the largest share.
    """
    hardware = detect_hardware(config.device)
    nproc = request.nproc if request.nproc is not None else max(1, len(hardware.gpus))
    if hardware.gpus and nproc > len(hardware.gpus):
        raise LaunchError(
            f"--nproc {nproc} asks for more processes than this machine has GPUs "
            f"({hardware.describe()}). Use --nproc {len(hardware.gpus)} or less, or device=cpu."
        )
    nodes = request.nodes(nproc)
    if isinstance(config.batch.micro, int):
        batch.Split(config.batch.largest, nodes.world_size).check_micro_batch(config.batch.micro)
    return hardware, nodes
