"""The commands: what each takes, calls and prints. Heavy imports wait inside them: help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gatrain import __version__
from gatrain.cli import completion, machine, terminal
from gatrain.cli.options import (
    Endpoint,
    Json,
    MaxRestarts,
    Nnodes,
    NodeRank,
    Nproc,
    Overrides,
    Overwrite,
    Retune,
    Trust,
    slurm_option,
)  # fmt: skip
from gatrain.cli.settings_help import Command
from gatrain.errors import BatchProposed, ConfigError, DataError, VerifyError

if TYPE_CHECKING:
    from gatrain.compose import Composed
    from gatrain.fit.job import StartNodes
    from gatrain.fit.starting import Outcome
    from gatrain.fit.submit import Submission
    from gatrain.launch.schedulers import Job
    from gatrain.launch.torchrun import TorchrunWorld
    from gatrain.launch.world import WorldRequest

EXIT_CODE_HELP = {
    0: "success",
    1: "any other error",
    2: "a wrong key, value, recipe, option or _target_",
    3: "batch numbers that cannot multiply out",
    4: "data that is missing, unreadable or too small",
    5: "the model does not fit, even at one sample",
    6: "processes that cannot start",
    7: "a run folder that is in use, no run, or not writable",
    8: "no valid saved state",
    9: "a gradient that would not be exact",
    10: "verify found a difference",
    11: "an error of the user's own code in a rank",
    12: "trained and saved, but evaluation, showcase, plots or a logger failed",
    13: "batch.effective=auto: a batch was proposed, and none was set",
    130: "stopped by Ctrl-C, after saving",
    143: "stopped by SIGTERM, SIGHUP or SIGUSR1, after saving",
}


def _exit_codes() -> str:
    return "\n".join(["Exit codes:", *(f"{code:>5}  {text}" for code, text in EXIT_CODE_HELP.items())])


app = typer.Typer(
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=_exit_codes(),
    help="Name the effective batch size; gatrain trains at exactly that size, as fast as this hardware can.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gatrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def fit(
    context: typer.Context,
    overrides: Overrides = None,
    retune: Retune = False,
    overwrite: Overwrite = False,
    trusted: Trust = None,
) -> None:
    """Train: find the fastest exact split for this hardware, then run it to the end."""
    _train(context, overrides or [], world_request(), retune, overwrite)


@app.command(cls=Command)
def autotune(
    overrides: Overrides = None,
    nproc: Nproc = None,
    as_json: Json = False,
    retune: Retune = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw speed and memory into this PNG file.")
    ] = None,
    trusted: Trust = None,
) -> None:
    """Measure real optimizer steps and print the plan, without training."""
    from gatrain import fit as work

    if plot is not None:
        from gatrain.report import plan_plot

        plan_plot.check_can_draw(plot)
    with terminal.Progress() as progress:
        prepared = work.autotune(
            overrides or [], world_request(nproc), progress.listener(print_plan=not as_json), retune
        )
    if plot is not None:
        plan_plot.save_plan_plot(prepared.plan, plot)
    if as_json:
        data = prepared.data.to_dict() if prepared.data is not None else None
        terminal.print_json(prepared.plan.to_dict() | {"data": data})
    else:
        from gatrain.report import plan_plot

        terminal.print_lines(plan_plot.plan_plot_lines(prepared.plan, terminal.width()))


@app.command(cls=Command)
def plan(
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A kind of GPU, such as 'H100 80GB'.")] = None,
    every: Annotated[
        bool, typer.Option("--gpus", help="One row for every kind of GPU in the table.")
    ] = False,
    nproc: Annotated[int, typer.Option("--nproc", help="Processes, one for each GPU, in one node.")] = 1,
    as_json: Json = False,
    trusted: Trust = None,
) -> None:
    """Predict memory and time on a GPU that is not here: will it fit, and on what."""
    from gatrain.compose import compose
    from gatrain.errors import DoesNotFitError
    from gatrain.predict import GPUS, find_gpu, predict
    from gatrain.report.prediction import prediction_lines

    if (gpu is None) != every:
        raise ConfigError(
            f"plan needs {'only one of ' if every else ''}--gpu NAME or --gpus (all that it knows)."
        )
    found = list(GPUS) if gpu is None else [find_gpu(gpu)]
    composed = compose(overrides or [])
    with terminal.Progress() as progress:
        progress.tell("Tracing the model without data")
        prediction = predict(composed, found, nproc)
    if prediction.refusal is not None:
        raise DoesNotFitError(prediction.refusal)
    if as_json:
        terminal.print_json(prediction.to_dict())
    else:
        terminal.print_lines(prediction_lines(prediction))
    if not prediction.fits:
        raise typer.Exit(DoesNotFitError.exit_code)


@app.command(cls=Command)
def explain(
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Predict for a kind of GPU, such as 'H100 80GB', instead of measuring."),
    ] = None,
    nproc: Nproc = None,
    as_json: Json = False,
    retune: Retune = False,
    trusted: Trust = None,
) -> None:
    """Say what accumulation costs and buys for this recipe here, and what is exact."""
    import dataclasses

    from gatrain.cli.explained import headline, look
    from gatrain.explain import explain as rows_of
    from gatrain.report.explanation import print_explanation

    with terminal.Progress() as progress:
        situation = look(overrides or [], world_request(nproc), progress, gpu=gpu, retune=retune)
    rows = rows_of(situation)
    if as_json:
        terminal.print_json(
            {"headline": headline(situation), "rows": [dataclasses.asdict(row) for row in rows]}
            | {"plan": situation.plan.to_dict()}
        )
    else:
        print_explanation(headline(situation), rows, min(terminal.width(), 100))


@app.command(cls=Command)
def launch(
    context: typer.Context,
    overrides: Overrides = None,
    nproc: Nproc = None,
    nnodes: Nnodes = 1,
    node_rank: NodeRank = 0,
    endpoint: Endpoint = None,
    max_restarts: MaxRestarts = 0,
    slurm: Annotated[bool, slurm_option("--slurm", "Write a batch file and submit it.")] = False,
    dry_run: Annotated[bool, slurm_option("--dry-run", "Print the batch file only.")] = False,
    nodes: Annotated[int | None, slurm_option("--nodes", "Nodes, by default 1.")] = None,
    gpus_per_node: Annotated[int | None, slurm_option("--gpus-per-node", "GPUs of each node.")] = None,
    cpus_per_gpu: Annotated[int | None, slurm_option("--cpus-per-gpu", "CPU cores for each GPU.")] = None,
    mem: Annotated[
        str | None, slurm_option("--mem", "Main memory of each node, such as 64G; 0 for all of it.")
    ] = None,
    partition: Annotated[str | None, slurm_option("--partition", "Partition (queue).")] = None,
    time_limit: Annotated[str | None, slurm_option("--time", "Time limit, such as 04:00:00.")] = None,
    account: Annotated[str | None, slurm_option("--account", "Account that is charged.")] = None,
    qos: Annotated[str | None, slurm_option("--qos", "Quality of service.")] = None,
    constraint: Annotated[
        str | None, slurm_option("--constraint", "Features that nodes must have, such as 'a100|h100'.")
    ] = None,
    retune: Retune = False,
    overwrite: Overwrite = False,
    trusted: Trust = None,
) -> None:
    """Train on a stated number of processes, on several nodes, or through Slurm."""
    resources: dict[str, Any] = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "cpus_per_gpu": cpus_per_gpu, "mem": mem,
        "partition": partition, "time": time_limit, "account": account, "qos": qos, "constraint": constraint,
    }  # fmt: skip
    if slurm:
        from gatrain.fit import submit
        from gatrain.launch.schedulers.sbatch import Resources

        if torchrun_world is not None:
            raise ConfigError("--slurm submits a job, once: start gatrain launch --slurm without torchrun.")
        if nnodes != 1 or node_rank or endpoint is not None:
            raise ConfigError(
                "--slurm finds nodes, ranks and endpoint by itself. Use --nodes for their number."
            )
        submission = submit.submit(
            overrides or [],
            Resources(**resources),
            nproc=nproc,
            max_restarts=max_restarts,
            retune=retune,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        _print_submission(submission)
        return
    for name, value in (resources | {"dry_run": dry_run or None}).items():
        if value is not None:
            hint = " Did you mean '--nnodes'?" if name == "nodes" else ""
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --slurm, which is not given.{hint}")
    request = world_request(nproc, nnodes, node_rank, endpoint, max_restarts)
    _train(context, overrides or [], request, retune, overwrite)


@app.command(cls=Command)
def resume(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(help="The run folder, such as outputs/llm/2026-01-31_12-00-00.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Such as train.steps=2000.", autocompletion=completion.words
        ),
    ] = None,
    nproc: Nproc = None,
    nnodes: Nnodes = 1,
    node_rank: NodeRank = 0,
    endpoint: Endpoint = None,
    max_restarts: MaxRestarts = 0,
    from_start: Annotated[
        bool,
        typer.Option(
            "--from-start", help="Begin at step 0 again; states and metrics are kept under other names."
        ),
    ] = False,
    trusted: Trust = None,
    accept_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-changes",
            metavar="KEY",
            help="Go on although this is not what the run was started with: data.contents, code or a setting's "
            "name, as the refusal lists them. Once for each.",
        ),
    ] = None,
) -> None:
    """Resume a run from its next step, on any number of processes."""
    from gatrain import fit as work

    request = world_request(nproc, nnodes, node_rank, endpoint, max_restarts)
    with terminal.Progress() as progress:
        outcome = work.resume(
            run_dir,
            overrides or [],
            request,
            progress.listener(),
            from_start,
            accept_changes or [],
            _start_nodes(context, progress),
        )
    _print_outcome(outcome)


@app.command(cls=Command)
def verify(overrides: Overrides = None, as_json: Json = False, trusted: Trust = None) -> None:
    """Prove on this recipe that split gradients equal the gradient of the whole batch."""
    from gatrain.compose import compose

    composed = compose(overrides or [])
    from gatrain.verify import run_verify

    with terminal.Progress() as progress:
        report = run_verify(composed, progress=progress.tell)
    if as_json:
        terminal.print_json(report.to_dict())
    else:
        terminal.print_lines(report.lines())
    if not report.passed:
        raise typer.Exit(VerifyError.exit_code)


@app.command(cls=Command)
def recipes() -> None:
    """List the recipes: the shipped ones and those in ./recipes."""
    from gatrain import assets
    from gatrain.cli import views

    terminal.print_lines(views.recipe_lines(assets.list_recipes(Path.cwd()), terminal.width()))


@app.command(cls=Command)
def show(
    overrides: Overrides = None,
    as_json: Json = False,
    data: Annotated[
        bool, typer.Option("--data", help="Read the data instead, and print what it is and what is left out.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --data: read every sample once, and list what is broken.")
    ] = False,
    trusted: Trust = None,
) -> None:
    """Print the composed configuration, with where each value came from; what its data is; or, of a run folder,
    how the run went."""
    from gatrain.cli import views
    from gatrain.compose import compose

    if check and not data:
        raise ConfigError("--check belongs to --data: gatrain show --data --check recipe=NAME.")
    if len(overrides or []) == 1 and Path((overrides or [])[0]).is_dir():
        _show_run((overrides or [])[0], as_json, data)
        return
    composed = compose(overrides or [])
    if data:
        _show_data(composed, as_json, check)
        return
    if as_json:
        terminal.print_json(views.config_dict(composed))
    else:
        terminal.print_lines(views.config_lines(composed, terminal.width()))


def _show_run(folder: str, as_json: bool, data: bool) -> None:
    from gatrain.report.run_view import row_lines, run_rows
    from gatrain.rundir import open_run_dir

    if data:
        raise ConfigError(f"--data is of a recipe: gatrain show --data recipe=NAME, not of the run {folder}.")
    rows = run_rows(open_run_dir(folder))
    if as_json:
        terminal.print_json(dict(rows))
    else:
        terminal.print_lines(row_lines(rows, min(terminal.width(), 100)))


def _show_data(composed: Composed, as_json: bool, check: bool) -> None:
    from gatrain.data_view import view
    from gatrain.inspection import check_modules
    from gatrain.report.data_lines import checked_lines, whole_data_lines

    check_modules(composed.config, Path.cwd())
    with terminal.Progress() as progress:
        found = view(composed.yaml, Path.cwd(), check, progress.tell)
    if as_json:
        terminal.print_json(found.to_dict())
    else:
        terminal.print_lines([*whole_data_lines(found.record), *(f"Note: {text}" for text in found.remarks)])
        terminal.print_lines(checked_lines(found.checked, found.broken) if found.checked is not None else [])
    if found.broken:
        raise typer.Exit(DataError.exit_code)


@app.command(cls=Command)
def schema() -> None:
    """Print a JSON schema of recipes: an editor then completes keys and marks what is no value."""
    from gatrain.json_schema import recipe_schema

    terminal.print_json(recipe_schema())


@app.command(cls=Command)
def doctor(overrides: Overrides = None, as_json: Json = False, trusted: Trust = None) -> None:
    """Report hardware and versions, what would be chosen and why, and any problem found."""
    from gatrain.cli.examine import examine

    report = examine(overrides or [])
    if as_json:
        terminal.print_json(report.to_dict())
    else:
        terminal.print_lines(report.lines(terminal.width()))


torchrun_world: TorchrunWorld | None = None
"""The torchrun that has started this process among others."""


def world_request(
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int = 0,
    endpoint: str | None = None,
    max_restarts: int = 0,
) -> WorldRequest:
    """What the options ask of the world, or the world that torchrun has made already.

    Raises:
        ConfigError: the options contradict torchrun.
    """
    from gatrain.launch.world import WorldRequest

    theirs = torchrun_world
    if theirs is None:
        return WorldRequest(nproc, nnodes, node_rank, endpoint, max_restarts)
    taken = {
        "--nproc": (nproc, (None, theirs.nproc)),
        "--nnodes": (nnodes, (1, theirs.nnodes)),
        "--node-rank": (node_rank, (0, theirs.node_rank)),
        "--rdzv-endpoint": (endpoint, (None,)),
        "--max-restarts": (max_restarts, (0,)),
    }
    for option, (value, allowed) in taken.items():
        if value not in allowed:
            raise ConfigError(
                f"{option} {value} is torchrun's to say, which has started {theirs.nproc or 1} process(es) on "
                f"each of {theirs.nnodes} node(s): leave it out here, or start gatrain launch without torchrun."
            )
    return WorldRequest.of(theirs)


def _start_nodes(context: typer.Context, progress: terminal.Progress) -> StartNodes:
    """How this command is started on every node of a job."""

    def start(job: Job, words: Sequence[str]) -> NoReturn:
        progress.stop()
        machine.restore_temporary_folder()
        job.start_on_every_node([*context.obj, *words])

    return start


def _train(
    context: typer.Context, overrides: Sequence[str], request: WorldRequest, retune: bool, overwrite: bool
) -> None:
    """What `fit` and `launch` do in the world that was asked for."""
    from gatrain import fit as work

    _propose_if_asked(overrides, request, retune)
    with terminal.Progress() as progress:
        outcome = work.fit(
            overrides, request, progress.listener(), retune, overwrite, _start_nodes(context, progress)
        )
    _print_outcome(outcome)


def _propose_if_asked(overrides: Sequence[str], request: WorldRequest, retune: bool) -> None:
    """End the command with a proposal where ``batch.effective=auto`` asks for one."""
    from gatrain.fit import pilot

    if not pilot.is_asked(overrides):
        return
    with terminal.Progress() as progress:
        found = pilot.propose(overrides, request, progress.listener(), retune=retune)
    terminal.print_lines(["", *found.lines()])
    raise typer.Exit(BatchProposed.exit_code)


def _print_outcome(outcome: Outcome) -> None:
    if outcome.already_complete:
        step = int(outcome.summary["step"])
        from gatrain.commands import typed

        more = typed("resume", outcome.run_dir, f"train.steps={2 * step}")
        print(
            f"The run in {outcome.run_dir} is complete at step {step}; nothing is left to do. To train on: {more}"
        )


def _print_submission(submission: Submission) -> None:
    if submission.job_id is None:
        print(submission.script, end="")
        return
    print(f"Submitted job {submission.job_id}. Its output: {submission.run_dir / 'slurm.log'}")
