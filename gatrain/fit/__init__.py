"""The order of work from a command to the end of a run. Knows no command line and prints nothing.

    compose -> job -> hardware and nodes -> claim the run folder -> inspect model and data, plan -> start the ranks

Cheap checks come first, so that most mistakes are told before anything slow begins; the run folder is claimed
before the trials, so that two runs cannot plan for the same one; and where nothing came of it, it is removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gatrain import guardian, scratch
from gatrain.commands import OVERWRITE, Again
from gatrain.compose import Composed, compose
from gatrain.data.report import DataRecord
from gatrain.errors import ConfigError, OutdatedPlanError
from gatrain.fit import record, requeue
from gatrain.fit.changes import write_record
from gatrain.fit.claim import acquire_run_dir, choose_folder
from gatrain.fit.job import StartNodes, find_job, find_world, reach_every_node
from gatrain.fit.listener import Listener as Listener
from gatrain.fit.planning import plan_run, write_plan
from gatrain.fit.preparation import Preparation, dismiss
from gatrain.fit.resuming import RESUME_KEYS as RESUME_KEYS
from gatrain.fit.resuming import resume as resume
from gatrain.fit.starting import Outcome as Outcome
from gatrain.fit.starting import follow_node_0, rendezvous_of, start_ranks
from gatrain.hardware import Hardware, weakest
from gatrain.inspected import Inspected
from gatrain.inspection import check_modules
from gatrain.launch.world import Nodes, WorldRequest
from gatrain.plan import Plan
from gatrain.rundir import RunDir
from gatrain.secrets import redact


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the ranks start."""

    composed: Composed
    hardware: Hardware
    nodes: Nodes
    plan: Plan
    inspected: Inspected

    @property
    def data(self) -> DataRecord | None:
        return self.inspected.data


def autotune(
    overrides: Sequence[str],
    request: WorldRequest | None = None,
    listener: Listener | None = None,
    retune: bool = False,
) -> Prepared:
    """Compose and plan, without a run folder.

    Raises:
        GatrainError: a leaf that names what is wrong.
    """
    request, listener = request or WorldRequest(), listener or Listener()
    scratch.sweep()
    cwd = Path.cwd().resolve()
    composed = compose(overrides)
    check_modules(composed.config, cwd)
    request = replace(request, job=find_job(composed.config, cwd))
    hardware, nodes = find_world(composed.config, request)
    if nodes.nnodes > 1:
        raise ConfigError(
            "autotune measures on one node. On several, gatrain fit makes the plan for all of them."
        )
    config, yaml = composed.config, composed.yaml
    plan, found = plan_run(config, yaml, hardware, nodes, listener, cwd, retune=retune)
    listener.planned(plan, None)
    return Prepared(composed, hardware, nodes, plan, found)


def fit(
    overrides: Sequence[str],
    request: WorldRequest | None = None,
    listener: Listener | None = None,
    retune: bool = False,
    overwrite: bool = False,
    start_nodes: StartNodes | None = None,
) -> Outcome:
    """Train a recipe to its end. On several nodes every node calls this; node 0 prepares for all.

    Args:
        start_nodes: called in the only process of a job of several nodes, to start this command on each of them.
        retune: measure again, whatever is remembered.
        overwrite: replace the run that the folder holds, once this one is ready to begin.

    Raises:
        GatrainError: a leaf that names what is wrong; `Interrupted` when stopped by a signal.
    """
    request, listener = request or WorldRequest(), listener or Listener()
    scratch.sweep()
    cwd = Path.cwd().resolve()
    composed = compose(overrides)
    for remark in composed.remarks:
        listener.progress(f"note: {remark}")
    check_modules(composed.config, cwd)
    request = replace(request, job=find_job(composed.config, cwd))
    reach_every_node(request, start_nodes, composed, cwd, overwrite)
    hardware, nodes = find_world(composed.config, request)
    path, named = choose_folder(composed, nodes, cwd, request)
    if overwrite and not named:
        raise ConfigError(
            f"{OVERWRITE} needs the folder that it may replace: run.dir=FOLDER or run.name=NAME."
        )
    if nodes.node_rank == 0 and request.was_started_again:
        earlier = requeue.earlier_attempt(RunDir(path), request, composed, overwrite) if named else None
        if earlier is None:
            listener.progress("No earlier attempt of this job ran these settings: this run begins at step 0")
        elif earlier.saved_entries():
            return _go_on(earlier, nodes, request, listener)
        overwrite = overwrite or earlier is not None  # it ended before it had saved anything
    again = Again((*request.words(), *(["--retune"] if retune else []), *map(redact, overrides)), cwd)
    with contextlib.ExitStack() as stack:
        rendezvous = stack.enter_context(rendezvous_of(nodes, request))
        if nodes.node_rank > 0:
            return follow_node_0(rendezvous, RunDir(path), hardware, request, listener, cwd)
        claim = stack.enter_context(acquire_run_dir(path, named, again, overwrite))
        run_dir = claim.run_dir
        preparation = stack.enter_context(Preparation(rendezvous, run_dir))
        hardware = weakest(hardware, preparation.hardware_of_others())
        given = composed.config, composed.yaml, hardware, nodes, listener, cwd
        plan, found = plan_run(*given, retune=retune, run_dir=run_dir, preparation=preparation)
        if replaced := claim.clear():
            listener.notice(f"Replaced in {run_dir.path}: {replaced}.")
        record.write_start(run_dir, composed, again, request.job)
        write_plan(run_dir, plan, hardware)
        write_record(run_dir, composed, plan, found, cwd)
        listener.planned(plan, run_dir.path)
        if request.torchrun is not None:
            request.torchrun.note_run(run_dir.path)
        guardian.forget_claim(run_dir.path)  # from here on it tells of a run, however that ends
        preparation.ready()
        try:
            return start_ranks(run_dir, rendezvous, hardware, request, cwd)
        except OutdatedPlanError as error:  # of a plan from memory, before the first step
            listener.notice(f"{error} It is planned again.")
        plan, found = plan_run(*given, retune=True, run_dir=run_dir, preparation=preparation)
        write_plan(run_dir, plan, hardware)
        write_record(run_dir, composed, plan, found, cwd)
        listener.planned(plan, run_dir.path)
        return start_ranks(run_dir, rendezvous, hardware, request, cwd)


def _go_on(run_dir: RunDir, nodes: Nodes, request: WorldRequest, listener: Listener) -> Outcome:
    """On node 0 of a job that was started again: resume the run of its first attempt."""
    requeue.mark(run_dir, request.job)
    outcome = resume(run_dir.path, (), request, listener)
    if outcome.already_complete and nodes.nnodes > 1:
        with rendezvous_of(nodes, request) as rendezvous:
            dismiss(rendezvous)
    return outcome
