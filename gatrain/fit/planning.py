"""From a checked configuration to a plan: remembered by the tuner, or after an inspection of model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gatrain import codec
from gatrain.config import RunConfig
from gatrain.fit.listener import Listener
from gatrain.fit.preparation import Preparation
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected
from gatrain.inspection import begin_inspection, inspected
from gatrain.launch.world import Nodes
from gatrain.plan import Plan
from gatrain.recorded import read_data
from gatrain.rundir import RunDir, write_json


def plan_run(
    config: RunConfig,
    config_yaml: str,
    hardware: Hardware,
    nodes: Nodes,
    listener: Listener,
    cwd: Path,
    *,
    retune: bool = False,
    run_dir: RunDir | None = None,
    preparation: Preparation | None = None,
    known: Inspected | None = None,
) -> tuple[Plan, Inspected]:
    """Find the plan, and what model and data it is for.

    An answer from memory inspects nothing: `plan.made_for.is_remembered` says so, and the ranks compare. On several
    nodes model and data are always inspected, so that no rank has to ask for another plan.

    Args:
        retune: inspect and measure anew, whatever is remembered.
        run_dir, preparation: of a run, for trials on several nodes.
        known: what an inspection has found just now, and the listener knows of.

    Raises:
        GatrainError: as `gatrain.tune.Tuner.plan`, or as found by the inspection.
    """
    from gatrain.tune import Tuner

    tuner = Tuner(config, hardware, nodes, cwd)
    if known is None and not retune and nodes.nnodes == 1:
        answer = tuner.remembered()
        if answer is not None:
            if answer[1].data is not None:
                listener.read(answer[1].data)
            return answer
    options: dict[str, Any] = {} if preparation is None else {"announce": preparation.announce}
    if run_dir is not None and nodes.nnodes > 1:
        options["shared"] = run_dir.path
    with tuner.trial_host(**options) as host:
        found = known
        if found is None:
            listener.progress("Inspecting the model and the data")
            with begin_inspection(config_yaml, cwd) as inspection:
                if hardware.device == "cuda" and tuner.space.needs_trials:
                    host.start()  # its imports take as long as the inspection
                found = inspected(inspection)
            if found.data is not None:
                listener.read(found.data)
        progress = listener.progress
        plan = tuner.plan(found, host, progress=progress, retune=retune, config_yaml=config_yaml)
        return plan, found


def why_plan_again(run_dir: RunDir, plan: Plan | None, found: Inspected) -> str:
    """Why the plan of a run that goes on does not count for what was found now; empty where it does.

    Contents that were accepted change no plan: their number and their size do.
    """
    if plan is None:
        return ""
    pairs = []
    if (made_for := plan.made_for) is not None:
        pairs += [
            ("model parameters", made_for.parameters, found.parameters),
            ("training samples", made_for.samples, found.samples),
            ("held-out samples", made_for.eval_samples, found.eval_samples),
        ]
    before, now = read_data(run_dir), found.data
    if before is not None and now is not None:
        pairs += [
            ("bytes of data", before.report.size_bytes, now.report.size_bytes),
            (before.report.item_name, before.report.items, now.report.items),
        ]
        if before.shapes != now.shapes:
            return f"The plan was measured for samples of {before.shapes}, and they are {now.shapes} now."
    other = [f"{name}: was {was:,}, is {is_now:,}" for name, was, is_now in pairs if was != is_now]
    return f"The plan was measured for another model or other data ({'; '.join(other)})." if other else ""


def write_plan(run_dir: RunDir, plan: Plan, hardware: Hardware) -> None:
    """Keep the plan, and what it was made on, in the run folder."""
    write_json(run_dir.hardware, codec.encode(hardware))
    write_json(run_dir.plan, plan.to_dict())
