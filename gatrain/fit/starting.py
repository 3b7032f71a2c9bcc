"""Start the ranks on a prepared run folder, on every node, and say how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain import commands
from gatrain.errors import AfterTrainingError, DataError, WorkerError
from gatrain.fit.listener import Listener
from gatrain.fit.preparation import follow
from gatrain.hardware import Hardware
from gatrain.launch.rendezvous import Rendezvous
from gatrain.launch.world import Nodes, WorldRequest
from gatrain.rundir import RunDir, read_json

WORKER = "gatrain.worker"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    summary: dict[str, Any] = field(default_factory=dict)
    already_complete: bool = False


def rendezvous_of(nodes: Nodes, request: WorldRequest) -> Rendezvous:
    """Tells that nobody has the endpoint's name, or that the port is taken, before anything slow."""
    return Rendezvous(nodes, resolves_later=request.torchrun is not None)  # such as the name of a pod


def start_ranks(
    run_dir: RunDir, rendezvous: Rendezvous, hardware: Hardware, request: WorldRequest, cwd: Path
) -> Outcome:
    """Train, and return when all ranks of this node have ended.

    Raises:
        AfterTrainingError: all is trained and saved, and something beside the training failed.
        GatrainError: as `gatrain.launch.local.run_workers`; with what to type next where a state was saved.
    """
    from gatrain.launch.local import run_workers

    nodes = rendezvous.nodes
    if nodes.node_rank == 0:
        run_dir.summary.unlink(missing_ok=True)
    try:
        run_workers(
            WORKER,
            run_dir.path,
            nodes,
            rendezvous=rendezvous,
            device=hardware.device,
            max_restarts=request.max_restarts,
            cwd=cwd,
            in_job=request.job is not None,
        )
    except (WorkerError, DataError) as error:
        if how := _how_to_go_on(run_dir, is_mended=isinstance(error, WorkerError)):
            raise type(error)(f"{error}\n{how}") from error
        raise
    summary = read_json(run_dir.summary) if run_dir.summary.is_file() else {}
    if summary.get("failed"):
        raise AfterTrainingError(_after_training(run_dir, summary))
    return Outcome(run_dir.path, summary)


def follow_node_0(
    rendezvous: Rendezvous,
    run_dir: RunDir,
    hardware: Hardware,
    request: WorldRequest,
    listener: Listener,
    cwd: Path,
) -> Outcome:
    """On a node other than 0: wait until node 0 has prepared the run folder, then start this node's ranks."""
    from gatrain.tune.processes import Follower

    listener.progress(f"Waiting for node 0 to prepare {run_dir.path}")
    with Follower(rendezvous.nodes.node_rank, cwd) as trials:
        trains = follow(rendezvous, run_dir, hardware, trials.join)
    return start_ranks(run_dir, rendezvous, hardware, request, cwd) if trains else Outcome(run_dir.path)


def _how_to_go_on(run_dir: RunDir, is_mended: bool) -> str:
    """What to type after a failure; empty where the same command begins anew, as nothing was trained."""
    first = "" if is_mended else "Then, "
    if steps := run_dir.saved_steps():
        go_on = f"{first}to go on" if first else "To go on"
        return f"The newest saved state is that of step {steps[-1]}. {go_on}: {commands.resume(run_dir)}"
    if run_dir.metrics.is_file() and run_dir.metrics.stat().st_size:
        again = f"{first}to start over" if first else "To start over"
        return f"No state was saved yet. {again}: {commands.start_over(run_dir)}"
    return ""


def _after_training(run_dir: RunDir, summary: dict[str, Any]) -> str:
    weights = run_dir.path / str(summary.get("weights"))
    lines = [
        f"all {summary.get('step')} steps are trained and saved in {weights}, but beside the training this failed:",
        *(f"  {line}" for line in summary["failed"]),
        f"To evaluate again, without training: {commands.resume(run_dir)}",
    ]
    return "\n".join(lines)
