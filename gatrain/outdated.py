"""Whether a plan is for the model and the data that the ranks make, which no key of a remembered answer can see.

A dataset may read a file that the configuration does not name, a model may ask the clock. The ranks make both
anyway, and compare before the first step. Where the plan comes from memory, the run is planned anew; else the data
has changed within a minute or is another each time, and that is said.
"""

from __future__ import annotations

from typing import Any

from gatrain import recorded
from gatrain.errors import OutdatedPlanError
from gatrain.plan import MadeFor, Plan
from gatrain.recorded import Difference
from gatrain.rundir import RunDir
from gatrain.tasks.base import Task
from gatrain.train.data_look import same_data


def check_data(run_dir: RunDir, plan: Plan, task: Task, source: Any) -> list[str]:
    """Compare the data of a run that begins with what the plan was made for. For rank 0.

    Returns:
        what there is to say where the plan stays.

    Raises:
        OutdatedPlanError: the plan is to be made anew.
    """
    made_for = plan.made_for
    if (
        made_for is None or run_dir.saved_entries()
    ):  # a run that goes on has been compared when it was resumed
        return []
    found = _sizes(made_for, task)
    if not found and made_for.is_remembered and (before := recorded.read_data(run_dir)) is not None:
        found = recorded.differences_of_data(before, same_data(task, source, before))
    return _told(made_for, found)


def check_model(plan: Plan, parameters: int) -> list[str]:
    """As `check_data`, for the model. Every rank comes to the same."""
    made_for = plan.made_for
    if made_for is None or made_for.parameters == parameters:
        return []
    was, now = f"{made_for.parameters:,}", f"{parameters:,}"
    return _told(made_for, [Difference("model parameters", was, now)])


def _sizes(made_for: MadeFor, task: Task) -> list[Difference]:
    held_out = len(task.eval_data) if task.eval_data is not None else 0
    pairs = {
        "training samples": (made_for.samples, len(task.train_data)),
        "held-out samples": (made_for.eval_samples, held_out),
    }
    return [Difference(key, f"{was:,}", f"{now:,}") for key, (was, now) in pairs.items() if was != now]


def _told(made_for: MadeFor, found: list[Difference]) -> list[str]:
    if not found:
        return []
    what = "; ".join(each.line().strip() for each in found)
    if made_for.is_remembered:
        raise OutdatedPlanError(f"The remembered plan was measured for another model or other data ({what}).")
    return [f"model or data are not what they were when this run was planned, a moment ago ({what})"]
