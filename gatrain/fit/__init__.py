"""The order of work from a command to the end of a run. Knows no command line and prints nothing.

    compose -> hardware -> nodes -> claim the run folder -> inspect model and data, plan -> launch

Cheap checks come first, so that most mistakes are told before anything slow begins; the run folder is claimed
before the trials, so that two runs cannot plan for the same one; and where nothing came of it, it is removed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gatrain import batch, codec, commands, guardian, scratch, states
from gatrain.commands import OVERWRITE, Again
from gatrain.compose import Composed, compose, reload
from gatrain.config import RunConfig
from gatrain.data.report import DataRecord
from gatrain.errors import (
    AfterTrainingError,
    ConfigError,
    DamagedFileError,
    DataError,
    GatrainError,
    LaunchError,
    OutdatedPlanError,
    RunFolderError,
    SavedStateError,
    WorkerError,
    nearest,
)
from gatrain.fit import record, requeue
from gatrain.fit.changes import Changes, write_record
from gatrain.fit.claim import choose_folder, claimed, set_aside
from gatrain.fit.job import StartNodes, find_job, reach_every_node
from gatrain.fit.planning import plan_run, why_plan_again
from gatrain.fit.preparation import Preparation, dismiss, follow
from gatrain.hardware import Hardware, detect_hardware, weakest
from gatrain.inspection import check_modules
from gatrain.launch.rendezvous import Rendezvous
from gatrain.launch.world import Nodes, WorldRequest
from gatrain.plan import Plan
from gatrain.rundir import RunDir, locked, open_run_dir, read_json, write_json, write_text
from gatrain.secrets import redact

WORKER = "gatrain.worker"

RESUME_KEYS = (
    "train.steps", "train.epochs", "train.log_every", "train.data_workers", "train.check", "train.nonfinite",
    "train.nonfinite_limit", "optimizer.lr", "optimizer.clip_norm", "save", "eval", "tune",
    "batch.micro", "checkpointing", "compile", "sync", "knobs", "data.broken", "scheduler",
)  # fmt: skip
"""What may change when a run goes on: how long it trains, what it writes, how a window is computed, and what
helps past a window that is not finite or a sample that cannot be read."""
_REPLAN_KEYS = ("tune", "batch.micro", "checkpointing", "compile", "sync", "knobs")


@dataclass(frozen=True)
class Listener:
    """Who hears how far preparation is. ``planned`` gets the plan, and the run folder if there is one."""

    progress: Callable[[str], None] = lambda text: None
    read: Callable[[DataRecord], None] = lambda data: None
    """Gets what was read, before anything is measured."""
    planned: Callable[[Plan, Path | None], None] = lambda plan, run_dir: None
    said: Callable[[str], None] = lambda text: None
    """Gets what a person must be able to read again later."""


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the ranks start."""

    composed: Composed
    hardware: Hardware
    nodes: Nodes
    plan: Plan
    data: DataRecord | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    summary: dict[str, Any] = field(default_factory=dict)
    already_complete: bool = False


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
    return Prepared(composed, hardware, nodes, plan, found.data)


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
    _remark(composed, listener)
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
        if named and RunDir(path).has_run() and not (overwrite and _is_older(path, request)):
            requeue.check_same(RunDir(path), composed)
            if RunDir(path).saved_entries():
                return _go_on(RunDir(path), nodes, request, listener)
            overwrite = True  # the first attempt ended before it had saved anything
        else:
            listener.progress("No earlier attempt of this job ran these settings: this run begins at step 0")
    options = [*request.words(), *(["--retune"] if retune else [])]
    again = Again((*options, *map(redact, overrides)), cwd)
    with contextlib.ExitStack() as stack:
        rendezvous = stack.enter_context(_rendezvous(nodes, request))
        if nodes.node_rank > 0:
            return _follow(rendezvous, RunDir(path), hardware, request, listener, cwd)
        claim = stack.enter_context(claimed(path, named, again, overwrite))
        run_dir = claim.run_dir
        preparation = stack.enter_context(Preparation(rendezvous, run_dir))
        hardware = weakest(hardware, preparation.hardware_of_others())
        given = composed.config, composed.yaml, hardware, nodes, listener, cwd
        plan, found = plan_run(*given, retune=retune, run_dir=run_dir, preparation=preparation)
        if replaced := claim.clear():
            listener.said(f"Replaced in {run_dir.path}: {replaced}.")
        lines = [f"recipe={composed.recipe}", *map(redact, composed.overrides)]
        env = record.environment(composed.recipe, composed.recipe_file, lines, again, request.job)
        write_json(run_dir.env, env | {"settings": requeue.digest(composed.config)})
        write_text(run_dir.overrides, "\n".join(lines) + "\n")
        _write_plan(run_dir, plan, hardware)
        write_record(run_dir, composed, plan, found, cwd)
        listener.planned(plan, run_dir.path)
        if request.torchrun is not None:
            request.torchrun.note_run(run_dir.path)
        guardian.forget_claim(run_dir.path)  # from here on it tells of a run, however that ends
        preparation.ready()
        try:
            return _launch(run_dir, rendezvous, hardware, request, cwd)
        except OutdatedPlanError as error:  # of a plan from memory, before the first step
            listener.said(f"{error} It is planned again.")
        plan, found = plan_run(*given, retune=True, run_dir=run_dir, preparation=preparation)
        _write_plan(run_dir, plan, hardware)
        write_record(run_dir, composed, plan, found, cwd)
        listener.planned(plan, run_dir.path)
        return _launch(run_dir, rendezvous, hardware, request, cwd)


def resume(
    path: Path,
    overrides: Sequence[str] = (),
    request: WorldRequest | None = None,
    listener: Listener | None = None,
    from_start: bool = False,
    accepted: Sequence[str] = (),
    start_nodes: StartNodes | None = None,
) -> Outcome:
    """Go on with a run at the window after its newest valid saved state, on this world size or another.

    Args:
        from_start: begin at step 0 instead; the states and metrics that there are get other names.
        accepted: keys of what may be another than when the run was started, such as ``data.contents``.
        start_nodes: as for `fit`.

    Raises:
        SavedStateError: data, code, settings or plan are not what they were, and that was not accepted.
        GatrainError: a leaf that names what is wrong; `Interrupted` when stopped by a signal.
    """
    request, listener = request or WorldRequest(), listener or Listener()
    scratch.sweep()
    run_dir = open_run_dir(path)
    overrides = [word for word in overrides if not _changes_nothing(run_dir, word)]
    changed = _check_resume_keys(overrides, accepted)
    options = [*request.words()[1:], *(["--from-start"] if from_start else [])]
    changes = Changes(run_dir, overrides, accepted, RESUME_KEYS, options)
    config, config_yaml = changes.reloaded.config, changes.reloaded.yaml
    cwd = _working_dir(run_dir)
    if request.job is None:  # `fit` may have asked already
        request = replace(request, job=find_job(config, cwd))
    reach_every_node(request, start_nodes, None, cwd, overwrite=False)
    if from_start and request.was_started_again and _has_whole_state(run_dir):
        from_start = False  # the first attempt of this job has begun at step 0; its states are gone on from
    if not run_dir.saved_entries() and not from_start:
        if run_dir.lock.exists():
            with locked(run_dir):  # a run that is under way has another story to tell
                pass
        raise SavedStateError(_nothing_saved(run_dir))
    if not from_start:
        _refuse_if_all_are_damaged(run_dir)
    summary = _summary_of(run_dir)
    is_complete = summary.get("status") == "completed" and not summary.get("failed")
    if is_complete and not overrides and not from_start and not changes.differences:
        return Outcome(run_dir.path, summary, already_complete=True)
    check_modules(config, cwd)
    request = _as_many_as_before(run_dir, config, request)
    hardware, nodes = find_world(config, request)
    with contextlib.ExitStack() as stack:
        rendezvous = stack.enter_context(_rendezvous(nodes, request))
        if nodes.node_rank > 0:
            return _follow(rendezvous, run_dir, hardware, request, listener, cwd)
        stack.enter_context(locked(run_dir))
        preparation = stack.enter_context(Preparation(rendezvous, run_dir))
        asks_again = changes.replans or any(_covers(known, key) for known in _REPLAN_KEYS for key in changed)
        plan = None if asks_again else _plan_of(run_dir, config)
        found = changes.inspect(cwd, plan, listener.progress)
        if from_start and (kept := set_aside(run_dir)) is not None:
            listener.progress(f"Starting from step 0; what there was is kept in {kept}")
        if found.data is not None:
            listener.read(found.data)
        if why := why_plan_again(run_dir, plan, found):
            listener.said(f"{why} It is planned again.")
        if plan is None or why or _moved(run_dir, plan, hardware, nodes):
            hardware = weakest(hardware, preparation.hardware_of_others())
            given = config, config_yaml, hardware, nodes, listener, cwd
            plan, _ = plan_run(
                *given, retune=bool(why), run_dir=run_dir, preparation=preparation, known=found
            )
            _write_plan(run_dir, plan, hardware)
        changes.write(plan, found, cwd)
        if overrides or accepted:
            at = max(run_dir.saved_steps(), default=0)
            words = [*map(redact, overrides), *(f"--accept-changes {key}" for key in accepted)]
            note = f"# resumed at step {at}: {' '.join(words)}\n"
            with contextlib.suppress(OSError):
                write_text(run_dir.overrides, run_dir.overrides.read_text(encoding="utf-8") + note)
        listener.planned(plan, run_dir.path)
        preparation.ready()
        return _launch(run_dir, rendezvous, hardware, request, cwd)


def _remark(composed: Composed, listener: Listener) -> None:
    for remark in composed.remarks:
        listener.progress(f"note: {remark}")


# --- world and plan -------------------------------------------------------------------------------------


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
        batch.Split(config.batch.effective, nodes.world_size).check_micro_batch(config.batch.micro)
    return hardware, nodes


def _rendezvous(nodes: Nodes, request: WorldRequest) -> Rendezvous:
    """Tells that nobody has the endpoint's name, or that the port is taken, before anything slow."""
    return Rendezvous(nodes, resolves_later=request.torchrun is not None)  # such as the name of a pod


def _moved(run_dir: RunDir, plan: Plan, hardware: Hardware, nodes: Nodes) -> bool:
    """Whether the run goes on with another world size or on another kind of device."""
    before = _hardware_before(run_dir)
    device = before.device if before is not None else None
    return plan.world_size != nodes.world_size or device != hardware.device


def _plan_of(run_dir: RunDir, config: RunConfig) -> Plan:
    """The plan that the run folder holds.

    Raises:
        DamagedFileError: it is none, or one for another batch.
    """
    plan = run_dir.load_plan()
    if plan.effective_batch != config.batch.effective:
        raise DamagedFileError(
            f"{run_dir.plan} is a plan for an effective batch of {plan.effective_batch}, and {run_dir.config} asks "
            f"for {config.batch.effective}. One of them was changed: restore it."
        )
    return plan


def _hardware_before(run_dir: RunDir) -> Hardware | None:
    """What the run was planned on; None where that cannot be read: then it is planned anew."""
    with contextlib.suppress(RunFolderError, ValueError):
        return codec.decode(Hardware, read_json(run_dir.hardware))
    return None


def _summary_of(run_dir: RunDir) -> dict[str, Any]:
    """How the run ended; empty where it has not, or where the file tells of a state that is not there."""
    with contextlib.suppress(RunFolderError, ValueError):
        summary = read_json(run_dir.summary)
        ended = codec.decode(_Ended, summary)
        if ended.step in run_dir.saved_steps() and (
            ended.status != "completed" or ended.step >= ended.total_steps
        ):
            return summary
    return {}


@dataclass(frozen=True)
class _Ended:
    """What is read of summary.json."""

    status: str
    step: int
    total_steps: int
    loss: float | None = None
    eval_loss: float | None = None
    failed: list[str] = field(default_factory=list)
    weights: str | None = None


def _is_older(path: Path, request: WorldRequest) -> bool:
    """Whether the run that lies there is not of the job that was started again."""
    if request.torchrun is not None and request.torchrun.attempt:
        return not request.torchrun.earlier_runs()
    return request.job is None or not requeue.is_of(RunDir(path), request.job)


def _write_plan(run_dir: RunDir, plan: Plan, hardware: Hardware) -> None:
    write_json(run_dir.hardware, codec.encode(hardware))
    write_json(run_dir.plan, plan.to_dict())


# --- launch ---------------------------------------------------------------------------------------------


def _launch(
    run_dir: RunDir, rendezvous: Rendezvous, hardware: Hardware, request: WorldRequest, cwd: Path
) -> Outcome:
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


def _follow(
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
    return _launch(run_dir, rendezvous, hardware, request, cwd) if trains else Outcome(run_dir.path)


def _go_on(run_dir: RunDir, nodes: Nodes, request: WorldRequest, listener: Listener) -> Outcome:
    """On node 0 of a job that was started again: resume the run of its first attempt."""
    requeue.mark(run_dir, request.job)
    outcome = resume(run_dir.path, (), request, listener)
    if outcome.already_complete and nodes.nnodes > 1:
        with _rendezvous(nodes, request) as rendezvous:
            dismiss(rendezvous)
    return outcome


# --- resume ---------------------------------------------------------------------------------------------


def _changes_nothing(run_dir: RunDir, word: str) -> bool:
    """Whether a setting that may not change is given as it is already."""
    if any(_covers(known, word.partition("=")[0].strip()) for known in RESUME_KEYS):
        return False
    with contextlib.suppress(GatrainError):
        return reload(run_dir.config, [word]).yaml == reload(run_dir.config, ()).yaml
    return False


def _check_resume_keys(overrides: Sequence[str], accepted: Sequence[str] = ()) -> list[str]:
    keys = []
    for word in overrides:
        key = word.partition("=")[0].strip()
        if not any(_covers(known, key) for known in (*RESUME_KEYS, *accepted)):
            why = (
                "the effective batch size belongs to the run"
                if key == "batch.effective"
                else "it would be another run"
            )
            raise ConfigError(
                f"'{word}' cannot change when a run goes on: {why}.{nearest(key, RESUME_KEYS)} "
                f"These can: {', '.join(RESUME_KEYS)}. Start a new run with gatrain fit for anything else."
            )
        keys.append(key)
    return keys


def _as_many_as_before(run_dir: RunDir, config: RunConfig, request: WorldRequest) -> WorldRequest:
    """Unless told otherwise, take as many processes as before; all GPUs if it was all, or if fewer are left."""
    has_step = request.job is not None and request.job.on_every_node  # its resources say how many
    if request.nproc is not None or request.nnodes > 1 or has_step or not run_dir.hardware.is_file():
        return request
    before = _hardware_before(run_dir)
    if before is None:
        return request
    try:
        processes, gpus_then = run_dir.load_plan().world_size, len(before.gpus)
    except DamagedFileError:  # told later, unless it is planned again
        return request
    now = detect_hardware(config.device)
    if now.device != before.device or (now.gpus and (processes >= gpus_then or processes > len(now.gpus))):
        return request
    return replace(request, nproc=processes)


def _covers(known: str, key: str) -> bool:
    return key == known or key.startswith(f"{known}.")


def _refuse_if_all_are_damaged(run_dir: RunDir) -> None:
    """Before anything slow; the ranks look closer.

    Raises:
        SavedStateError: it is seen at a glance that no state can be gone on from.
    """
    problems = []
    for _, path in reversed(run_dir.saved_entries()):
        problem = states.damage_at_a_glance(path)
        if problem is None:
            return
        problems.append(f"{path.name}: {problem}")
    if not any(run_dir.saved.glob(f"{states.TEMPORARY}*")):  # one of these may be whole
        raise states.none_usable(run_dir.saved, problems)


def _has_whole_state(run_dir: RunDir) -> bool:
    return any(states.damage_at_a_glance(path) is None for _, path in run_dir.saved_entries())


def _nothing_saved(run_dir: RunDir) -> str:
    return (
        f"{run_dir.path} has no saved state to go on from: the run ended before its first one "
        f"(save.every=100 saves every 100 steps). Start again: {commands.start_over(run_dir)}"
    )


def _working_dir(run_dir: RunDir) -> Path:
    """Folder where the run was started, whose modules its `_target_`s may name."""
    stored = read_json(run_dir.env).get("working_dir") if run_dir.env.is_file() else None
    here = Path.cwd().resolve()
    if not isinstance(stored, str) or not Path(stored).is_dir() or Path(stored).resolve() == here:
        return here
    folder = Path(stored).resolve()
    found = folder.stat()
    why = None
    if folder.is_relative_to(run_dir.path):
        why = "which lies in the run folder itself"
    elif found.st_mode & stat.S_IWOTH:
        why = "where everybody may write"
    elif os.getuid() not in (0, found.st_uid) and found.st_uid != 0:
        why = "which belongs to somebody else"
    if why is not None:
        raise RunFolderError(
            f"{run_dir.env} says that the run was started in {folder}, {why}, and modules there would be imported. "
            f"If they are yours: cd {shlex.quote(str(folder))} && {commands.resume(run_dir)}"
        )
    return folder
