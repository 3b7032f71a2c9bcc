"""Go on with a run: what may change then, and whether it can be gone on from."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gatrain import codec, commands, scratch, states
from gatrain.compose import reload
from gatrain.config import RunConfig
from gatrain.errors import (
    ConfigError,
    DamagedFileError,
    GatrainError,
    RunFolderError,
    SavedStateError,
    nearest,
)
from gatrain.fit.changes import Changes
from gatrain.fit.claim import set_aside
from gatrain.fit.job import StartNodes, find_job, find_world, reach_every_node
from gatrain.fit.listener import Listener
from gatrain.fit.planning import plan_run, why_plan_again, write_plan
from gatrain.fit.preparation import Preparation
from gatrain.fit.starting import Outcome, follow_node_0, rendezvous_of, start_ranks
from gatrain.hardware import Hardware, detect_hardware, weakest
from gatrain.inspection import check_modules
from gatrain.launch.world import Nodes, WorldRequest
from gatrain.plan import Plan
from gatrain.rundir import RunDir, locked, open_run_dir, read_json, write_text
from gatrain.secrets import redact

RESUME_KEYS = (
    "train.steps", "train.epochs", "train.log_every", "train.data_workers", "train.check", "train.nonfinite",
    "train.nonfinite_limit", "optimizer.lr", "optimizer.clip_norm", "optimizer.clip_agc",
    "optimizer.clip_agc_exclude", "save", "eval", "tune",
    "batch.micro", "checkpointing", "compile", "sync", "knobs", "data.broken", "scheduler", "logger",
)  # fmt: skip
"""What may change when a run goes on: how long it trains, what it writes, how a window is computed, and what
helps past a window that is not finite or a sample that cannot be read."""
_REPLAN_KEYS = ("tune", "batch.micro", "checkpointing", "compile", "sync", "knobs")


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
        if config.train.steps is not None:
            _refuse_if_past_the_end(run_dir, config.train.steps)
    summary = _summary_of(run_dir)
    is_complete = summary.get("status") == "completed" and not summary.get("failed")
    if is_complete and not overrides and not from_start and not changes.differences:
        return Outcome(run_dir.path, summary, already_complete=True)
    check_modules(config, cwd)
    request = _as_many_as_before(run_dir, config, request)
    hardware, nodes = find_world(config, request)
    with contextlib.ExitStack() as stack:
        rendezvous = stack.enter_context(rendezvous_of(nodes, request))
        if nodes.node_rank > 0:
            return follow_node_0(rendezvous, run_dir, hardware, request, listener, cwd)
        stack.enter_context(locked(run_dir))
        preparation = stack.enter_context(Preparation(rendezvous, run_dir))
        asks_again = changes.replans or any(_covers(known, key) for known in _REPLAN_KEYS for key in changed)
        plan = None if asks_again else _plan_of(run_dir, config)
        found = changes.inspect(cwd, plan, listener.progress)
        if from_start and (kept := set_aside(run_dir)) is not None:
            listener.progress(f"Starting from step 0; what there was is kept in {kept}")
        if not from_start and (steps := _steps_of_epochs(config, found.samples)) is not None:
            _refuse_if_past_the_end(run_dir, steps)
        if found.data is not None:
            listener.read(found.data)
        if why := why_plan_again(run_dir, plan, found):
            listener.notice(f"{why} It is planned again.")
        if plan is None or why or _moved(run_dir, plan, hardware, nodes):
            hardware = weakest(hardware, preparation.hardware_of_others())
            given = config, config_yaml, hardware, nodes, listener, cwd
            plan, _ = plan_run(
                *given, retune=bool(why), run_dir=run_dir, preparation=preparation, known=found
            )
            write_plan(run_dir, plan, hardware)
        changes.write(plan, found, cwd)
        if overrides or accepted:
            at = max(run_dir.saved_steps(), default=0)
            words = [*map(redact, overrides), *(f"--accept-changes {key}" for key in accepted)]
            note = f"# resumed at step {at}: {' '.join(words)}\n"
            with contextlib.suppress(OSError):
                write_text(run_dir.overrides, run_dir.overrides.read_text(encoding="utf-8") + note)
        listener.planned(plan, run_dir.path)
        preparation.ready()
        return start_ranks(run_dir, rendezvous, hardware, request, cwd)


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


def _refuse_if_past_the_end(run_dir: RunDir, total_steps: int) -> None:
    """Before the run's configuration is written: what the ranks would refuse shall not stay in it.

    Raises:
        SavedStateError: the newest state is of a later step.
    """
    for step, path in reversed(run_dir.saved_entries()):
        if states.damage_at_a_glance(path) is None:
            if step > total_steps:
                raise states.past_the_end(path, step, total_steps)
            return


def _steps_of_epochs(config: RunConfig, samples: int) -> int | None:
    """The steps that ``train.epochs`` come to; None where only the ranks can tell, or where steps are given."""
    batch, epochs = config.batch, config.train.epochs
    if epochs is None or samples < 1 or batch.counts_tokens or not batch.stages.is_constant:
        return None
    if config.order != "shuffle":
        return None
    from gatrain.train.windows import WindowSchedule

    schedule = WindowSchedule(samples, batch.largest, config.train.seed, config.train.drop_last)
    return schedule.steps(None, epochs)


def _has_whole_state(run_dir: RunDir) -> bool:
    return any(states.damage_at_a_glance(path) is None for _, path in run_dir.saved_entries())


def _nothing_saved(run_dir: RunDir) -> str:
    return (
        f"{run_dir.path} has no saved state to go on from. Start again: {commands.start_over(run_dir)} "
        "(the run ended before its first saved state; save.every=100 saves every 100 steps)"
    )


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
    except RunFolderError:  # told later, unless it is planned again
        return request
    now = detect_hardware(config.device)
    if now.device != before.device or (now.gpus and (processes >= gpus_then or processes > len(now.gpus))):
        return request
    return replace(request, nproc=processes)


def _plan_of(run_dir: RunDir, config: RunConfig) -> Plan:
    """The plan that the run folder holds.

    Raises:
        DamagedFileError: it is none, or one for another batch.
    """
    plan = run_dir.load_plan()
    stages = config.batch.stages
    planned = [each.split.effective_batch for each in plan.stages] or [plan.effective_batch]
    if not config.batch.counts_tokens and planned != list(stages.sizes):
        raise DamagedFileError(
            f"{run_dir.plan} is a plan for an effective batch of {', '.join(map(str, planned))}, and "
            f"{run_dir.config} asks for {', '.join(map(str, stages.sizes))}. One of them was changed: restore it."
        )
    return plan


def _moved(run_dir: RunDir, plan: Plan, hardware: Hardware, nodes: Nodes) -> bool:
    """Whether the run goes on with another world size or on another kind of device."""
    before = _hardware_before(run_dir)
    device = before.device if before is not None else None
    return plan.world_size != nodes.world_size or device != hardware.device


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
