"""The entry of each training rank: `python -m gatrain.worker RUN_DIR` under torchrun. The folder is all it gets."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatrain import commands
from gatrain.errors import Interrupted
from gatrain.rank import Rank, main
from gatrain.rundir import RunDir, write_json

if TYPE_CHECKING:
    from gatrain.compose import Reloaded
    from gatrain.config import RunConfig
    from gatrain.plan import Plan
    from gatrain.tasks.base import Task
    from gatrain.train.engine import Engine
    from gatrain.train.events import Sink
    from gatrain.train.hook import HookRun
    from gatrain.train.saved_state import Progress
    from gatrain.train.windows import Cut


def work(folder: Path, rank: Rank) -> None:
    """Train the run of a folder with what its plan says of the run's knobs."""
    from gatrain import build
    from gatrain.compose import reload

    run_dir = RunDir(folder)
    stored = reload(run_dir.config, ())
    plan = run_dir.load_plan()
    plan_anew = commands.resume(run_dir, "knobs=[]")
    with build.build_knobs(stored.config).applied(plan.settings.knobs, plan_anew):
        _train(run_dir, stored, plan, rank)


def _train(run_dir: RunDir, stored: Reloaded, plan: Plan, rank: Rank) -> None:
    """Build, resume from the newest saved state if there is one, train, and write the summary."""
    from gatrain import build, outdated
    from gatrain import recorded as records
    from gatrain.launch.reasons import describe
    from gatrain.report import make_sinks, save_plots
    from gatrain.report.data_lines import left_out
    from gatrain.report.jsonl import read_lines, unreadable
    from gatrain.tasks.streams import Stream
    from gatrain.train import groups, order, out_of_memory, samples
    from gatrain.train.aftermath import Aftermath
    from gatrain.train.check import check_before_first_step
    from gatrain.train.check.own_gradients import registered_hooks
    from gatrain.train.checkpointing import available_modes
    from gatrain.train.events import RunInfo
    from gatrain.train.hooks import Hooks, fingerprint_of
    from gatrain.train.lengths import notice_lengths
    from gatrain.train.loop import Trainer
    from gatrain.train.ranks import Ranks
    from gatrain.train.remainders import Splits, check_windows
    from gatrain.train.run_folder import RunFolder
    from gatrain.train.saved_state import Progress
    from gatrain.train.seeding import PROCESS, seed_everything
    from gatrain.train.stream_loader import streams_are_read

    config = stored.config
    told = _compare(run_dir, stored.leaves, plan.settings.precision) if rank.is_first else []
    task, source = build.build_task_and_source(config)
    told += Ranks.current().alone(lambda: outdated.check_data(run_dir, plan, task, source))
    schedule = build.window_schedule(config, task)
    is_stream = isinstance(task.train_data, Stream)
    total_steps = schedule.steps(config.train.steps, config.train.epochs)
    clock = build.step_clock(config, total_steps, schedule)
    cuts = _cuts(plan, rank.world_size)
    noticed = notice_lengths(task, config.train.seed) if plan.settings.compile else None
    with out_of_memory.told(config, plan, run_dir, rank.device.type, modes=()):
        engine = build.build_engine(task, config, plan.settings, rank.device, clock)
    parameters = sum(p.numel() for p in engine.model.parameters())
    told += outdated.check_model(plan, parameters)
    hooks = Hooks(build.build_hooks(config), engine.ranks, fingerprint_of(config.hooks), config.train.seed)
    if hooks.need_part_norms:
        engine.step.part_norms.want(engine.step.strategy)
    if hooks.needs_verdict:
        engine.guard.decide_at_once()
    _stop_if_asked(rank)

    fresh = Progress(
        *(0, 0, 0, config.batch.largest, config.train.seed, schedule.samples),
        drop_last=schedule.drop_last,
        stages=schedule.fingerprint,
        order=str(getattr(schedule.order, "fingerprint", "")),
    )
    # what draws outside a seeded step repeats as well
    seed_everything(config.train.seed, PROCESS, rank.rank)
    progress, problems, parts = _go_on(engine, run_dir, fresh, total_steps)
    engine.step.number = progress.updates
    if progress.step:
        with samples.read_in_a_process(config.train.data_workers > 0):
            # contents may have to be read whole, while the others wait
            engine.ranks.alone(lambda: _compare_data(run_dir, task, source))
    problems = [*told, *(f"skipped a damaged saved state, {problem}" for problem in problems)]

    def checked() -> list[str]:
        if progress.step >= total_steps:
            return []
        with (
            out_of_memory.told(config, plan, run_dir, rank.device.type, modes=available_modes(engine.model)),
            samples.read_in_a_process(config.train.data_workers > 0),
        ):
            return check_before_first_step(engine, config, schedule, progress.step, plan.micro_batch)

    problems += checked()

    def forward_of_one() -> None:
        with samples.read_in_a_process(config.train.data_workers > 0):
            sample = samples.read_one(task, task.train_data, (0, 0), config.train.seed)
            engine.forward(samples.make(task, [sample], [(0, 0)], config.train.seed).batch)

    if not engine.step.strategy.normalises_window:
        check_windows(
            engine.model,
            Splits(
                schedule,
                engine.ranks.world_size,
                plan.micro_batch,
                plan.split.shares if plan.world_size == engine.ranks.world_size else None,
                cuts,
            ),
            progress.step,
            total_steps,
            rank.device,
            forward_of_one,
        )

    _stop_if_asked(rank)
    with make_sinks(
        run_dir if rank.is_first else None,
        progress.step,
        log_every=config.train.log_every,
        loggers=build.build_loggers(config) if rank.is_first else (),
    ) as sinks:
        aftermath = Aftermath(lambda error: describe(error)[2], sinks.notice)
        baseline = None
        with aftermath.guard("the baseline"):
            baseline = task.baseline() if rank.is_first and task.eval_data is not None else None
        info = RunInfo(
            recipe=run_dir.recipe(),
            run_dir=run_dir.path,
            device=_describe_device(rank),
            world_size=rank.world_size,
            effective_batch=plan.effective_batch,
            equation=f"{config.batch.largest:,} tokens at most, on average {plan.equation}"
            if config.batch.counts_tokens
            else plan.equation,
            stages=tuple(
                (index, stage.equation)
                for (index, _), stage in zip(schedule.stage_starts, plan.stages, strict=True)
            ),
            precision=plan.settings.precision,
            checkpointing=plan.settings.checkpointing,
            compile=plan.settings.compile,
            sync=plan.settings.sync,
            parameters=parameters,
            train_samples=0 if is_stream else schedule.samples,
            eval_samples=len(task.eval_data) if task.eval_data is not None else 0,
            first_step=progress.step,
            total_steps=total_steps,
            steps_per_epoch=0
            if is_stream or schedule.stages or config.batch.counts_tokens
            else schedule.per_epoch,
            baseline_name=baseline[0] if baseline else None,
            baseline_loss=baseline[1] if baseline else None,
            settings=records.public(stored.leaves),
            half_dtypes=engine.masters.dtypes,
        )
        sinks.start(info)
        for text in groups.notices(engine.built.grouping, engine.model, config.optimizer.groups):
            sinks.notice(text)
        for text in engine.step.strategy.notices(engine, sum(map(len, plan.split.sizes(plan.micro_batch)))):
            sinks.notice(text)
        if is_stream:
            sinks.notice(streams_are_read(config, rank.world_size))
        if config.order == "shuffle" and (unused := order.unused_sampler(task.train_data, source)):
            sinks.notice(unused)
        if sentence := getattr(schedule.order, "sentence", ""):
            sinks.notice(sentence)
        if noticed is not None and noticed.sentence:
            sinks.notice(noticed.sentence)
        for problem in problems:
            sinks.notice(problem)
        without = registered_hooks(engine.model)
        for text in hooks.start(
            partial(_hook_run, engine, progress, total_steps, run_dir, sinks), parts.get("hooks")
        ):
            sinks.notice(text)
        if registered_hooks(engine.model) - without:  # the model computes otherwise now, on every rank
            for text in checked():
                if text not in problems:
                    sinks.notice(text)
        folder_watch = RunFolder(run_dir, sinks.notice, sinks.put_back) if rank.is_first else None
        trainer = Trainer(
            engine=engine,
            config=config,
            plan=plan,
            schedule=schedule,
            cuts=cuts,
            total_steps=total_steps,
            progress=progress,
            run_dir=run_dir,
            sinks=sinks,
            stop_requested=lambda: rank.stop_requested,
            pause_requested=lambda: rank.pause_requested,
            pause=rank.pause,
            aftermath=aftermath,
            hooks=hooks,
            # rank 0 comes here after the baseline and after whatever loggers do to start
            run_folder=folder_watch,
            evaluation_is_missing=engine.ranks.alone(
                lambda: _evaluation_is_missing(run_dir, config, progress)
            ),
        )
        sinks.watch(trainer.finished_steps)
        with out_of_memory.told(config, plan, run_dir, rank.device.type, available_modes(engine.model)):
            gc.collect()
            gc.freeze()  # set-up left a million objects, which no collection in a step needs to look through
            summary = trainer.run()
        if summary.status == "stopped":
            rank.stop_anywhere()  # every rank names the signal that came to one of them
        if rank.is_first:
            loss = summary.loss
            if loss is None:  # nothing was left to train
                loss = next((line.get("loss") for line in reversed(read_lines(run_dir.metrics))), None)
            summary = replace(
                summary,
                loss=loss,
                baseline={"name": baseline[0], "loss": baseline[1]} if baseline else None,
                left_out=left_out(run_dir),
                unreadable=tuple(unreadable(run_dir.metrics)),
                weights=_weights_of(run_dir, summary.step),
                exported=_exported_of(run_dir, summary.step),
            )
            write_json(run_dir.summary, summary.to_dict())  # the plots read it
            with aftermath.guard("the plots"):
                save_plots(run_dir.path)
            sinks.end(replace(summary, failed=(*aftermath.failures, *sinks.failures)))
            failed = (*aftermath.failures, *sinks.failures)  # that of a logger's end too
            write_json(run_dir.summary, replace(summary, failed=failed).to_dict())


def _cuts(plan: Plan, world_size: int) -> list[Cut]:
    """How the windows of each stage are cut; empty where the effective batch never changes."""
    from gatrain.train.windows import Cut

    is_same = plan.world_size == world_size
    return [Cut(each.micro_batch, each.split.shares if is_same else None) for each in plan.stages]


def _stop_if_asked(rank: Rank) -> None:
    """Leave before the first step, where there is nothing to save yet. Collective.

    Raises:
        Interrupted: a rank was told to stop.
    """
    if rank.stop_anywhere():
        raise Interrupted("stopped before the first step")


def _hook_run(
    engine: Engine, progress: Progress, total_steps: int, run_dir: RunDir, sinks: Sink, **asks: Any
) -> HookRun:
    """What hooks see of the run."""
    from gatrain.train.hook import HookRun

    names = dict(engine.model.named_parameters())
    stepped = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    trained = {name: engine.masters.of(parameter) for name, parameter in names.items()}
    return HookRun(
        model=engine.model,
        task=engine.task,
        effective_batch=progress.effective_batch,
        step=progress.step,
        total_steps=total_steps,
        rank=engine.ranks.rank,
        world_size=engine.ranks.world_size,
        run_dir=run_dir.path,
        trained={name: weight for name, weight in trained.items() if id(weight) in stepped},
        evaluates=engine.task.eval_data is not None,
        notice=sinks.notice,
        **asks,
    )


def _go_on(
    engine: Engine, run_dir: RunDir, fresh: Progress, total_steps: int
) -> tuple[Progress, list[str], dict[str, Any]]:
    """Fill model and optimizer from the newest state that can be used; also tell what is wrong with newer ones,
    and give the state's further parts.

    Where there never was a state the run begins. Collective.

    Raises:
        SavedStateError: there are states, and none can be used.
    """
    from gatrain import states
    from gatrain.train import saved_state

    parts = engine.model, engine.optimizer, engine.masters

    mine: list[saved_state.Loaded] = []

    def choose() -> tuple[Path | None, list[str]]:
        found, problems = saved_state.newest_usable(run_dir.saved, *parts, fresh, total_steps, engine.scaler)
        mine.extend([found] if found is not None else [])
        return found.path if found is not None else None, problems

    # rank 0 chooses, so that all ranks go on from the same one; reading may take long
    path, problems = engine.ranks.alone(choose)
    if path is None:
        if problems:
            raise states.none_usable(run_dir.saved, problems)
        return fresh, [], {}
    loaded = mine.pop() if mine else saved_state.read(path, *parts)
    progress = loaded.fill(*parts)
    if engine.scaler and progress.scaler:
        engine.scaler.load_state_dict(progress.scaler)
    engine.built.load(loaded.parts)
    engine.scaling.load(loaded.parts)
    engine.strategy_state.load(loaded.parts)
    return progress, problems, loaded.parts


def _compare(run_dir: RunDir, leaves: Mapping[str, Any], precision: str) -> list[str]:
    """Settings, plan and code as the run was started with, or as they were accepted since: also after a restart
    that no command has looked at. Returns what there is to say about versions.

    Raises:
        SavedStateError: they are not; lists the differences.
    """
    from gatrain import recorded as records

    before = records.read_recorded(run_dir)
    if before is None:
        return []
    differences = records.setting_differences(before, leaves)
    if precision != before.precision:
        differences.append(records.Difference("precision", before.precision, precision, run_dir.plan.name))
    records.refuse(run_dir, differences + records.code_differences(before, Path.cwd()))
    return records.version_notes(before, records.versions())


def _compare_data(run_dir: RunDir, task: Task, source: Any) -> None:
    """As `_compare`, for the data that a saved state goes on with.

    Raises:
        SavedStateError: it is other data.
    """
    from gatrain import recorded as records
    from gatrain.train.data_look import same_data

    if (before := records.read_data(run_dir)) is not None:
        now = same_data(task, source, before)
        records.refuse(run_dir, records.differences_of_data(before, now))


def _evaluation_is_missing(run_dir: RunDir, config: RunConfig, progress: Progress) -> bool:
    """Whether the step that the run goes on from was due for an evaluation, and the run ended before it."""
    from gatrain.report.jsonl import evaluations_path, read_lines

    if not (progress.step and config.eval.every) or progress.step % config.eval.every:
        return False
    return all(line["step"] != progress.step for line in read_lines(evaluations_path(run_dir.metrics)))


def _weights_of(run_dir: RunDir, step: int) -> str | None:
    """Path of the trained weights, relative to the run folder."""
    from gatrain.train.saved_state import weights_path

    path = weights_path(run_dir.saved, step)
    return str(path.relative_to(run_dir.path)) if path.is_file() else None


def _exported_of(run_dir: RunDir, step: int) -> dict[str, str]:
    """Further weights beside the trained ones: what hooks exported."""
    from gatrain.states import RESERVED

    files = sorted(run_dir.state(step).glob("*.safetensors"))
    return {file.stem: str(file.relative_to(run_dir.path)) for file in files if file.stem not in RESERVED}


def _describe_device(rank: Rank) -> str:
    import torch

    if rank.device.type == "cuda":
        return f"{rank.world_size} x {torch.cuda.get_device_name(rank.device)}"
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}"
    return f"CPU ({rank.world_size} processes of {threads})" if rank.world_size > 1 else f"CPU ({threads})"


if __name__ == "__main__":
    main(work)
