"""The command line: parse, call, print, exit code. Heavy imports wait inside the commands: help is quick.

Settings are Hydra override words, not options: `gatrain fit recipe=llm optimizer.lr=1e-3`. The few options
are about where and how the processes start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gatrain import __version__, offspring, secrets, trust
from gatrain.cli import completion, machine, streams, terminal
from gatrain.cli.settings_help import Command
from gatrain.errors import BatchProposed, ConfigError, DataError, GatrainError, Interrupted, VerifyError

if TYPE_CHECKING:
    from gatrain.compose import Composed
    from gatrain.fit.job import StartNodes
    from gatrain.fit.starting import Outcome
    from gatrain.fit.submit import Submission
    from gatrain.launch.schedulers import Job
    from gatrain.launch.torchrun import TorchrunWorld
    from gatrain.launch.world import WorldRequest

COMMANDS = (
    "fit",
    "autotune",
    "plan",
    "explain",
    "launch",
    "resume",
    "verify",
    "recipes",
    "show",
    "schema",
    "doctor",
)

COMPLETES = "_GATRAIN_COMPLETE"
"""Set by the shell's completion."""

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="recipe=NAME KEY=VALUE",
        help="A recipe and overrides.",
        show_default=False,
        autocompletion=completion.words,
    ),
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
_Retune = Annotated[bool, typer.Option("--retune", help="Measure again, whatever is remembered.")]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that the run folder holds, on purpose.")
]
_Nproc = Annotated[
    int | None, typer.Option("--nproc", help="Processes on this node, by default one for each GPU.")
]
_Nnodes = Annotated[int, typer.Option("--nnodes", help="Nodes of the run.")]
_NodeRank = Annotated[int, typer.Option("--node-rank", help="This node's number, from 0.")]
_Endpoint = Annotated[
    str | None, typer.Option("--rdzv-endpoint", help="HOST:PORT of node 0, the same on every node.")
]
_Trust = Annotated[
    list[str] | None,
    typer.Option(
        trust.OPTION,
        metavar="NAME",
        callback=lambda names: trust.accept(names or ()),
        help="Let _target_ name this one thing that is refused otherwise; may be repeated.",
        show_default=False,
    ),
]
_MaxRestarts = Annotated[int, typer.Option("--max-restarts", help="Restarts after a failed rank.")]


def _slurm_option(option: str, text: str) -> Any:
    return typer.Option(option, rich_help_panel="Slurm", help=text)


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
    overrides: _Overrides = None,
    retune: _Retune = False,
    overwrite: _Overwrite = False,
    trusted: _Trust = None,
) -> None:
    """Train: find the fastest exact split for this hardware, then run it to the end."""
    from gatrain import fit as work

    request = _world_request()
    _propose_if_asked(overrides or [], request, retune)
    with terminal.Progress() as progress:
        outcome = work.fit(
            overrides or [], request, progress.listener(), retune, overwrite, _start_nodes(context, progress)
        )
    _print_outcome(outcome)


@app.command(cls=Command)
def autotune(
    overrides: _Overrides = None,
    nproc: _Nproc = None,
    as_json: _Json = False,
    retune: _Retune = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw speed and memory into this PNG file.")
    ] = None,
    trusted: _Trust = None,
) -> None:
    """Measure real optimizer steps and print the plan, without training."""
    from gatrain import fit as work

    if plot is not None:
        from gatrain.report import plan_plot

        plan_plot.check_can_draw(plot)
    with terminal.Progress() as progress:
        prepared = work.autotune(
            overrides or [], _world_request(nproc), progress.listener(print_plan=not as_json), retune
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
    overrides: _Overrides = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A kind of GPU, such as 'H100 80GB'.")] = None,
    every: Annotated[
        bool, typer.Option("--gpus", help="One row for every kind of GPU in the table.")
    ] = False,
    nproc: Annotated[int, typer.Option("--nproc", help="Processes, one for each GPU, in one node.")] = 1,
    as_json: _Json = False,
    trusted: _Trust = None,
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
    overrides: _Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Predict for a kind of GPU, such as 'H100 80GB', instead of measuring."),
    ] = None,
    nproc: _Nproc = None,
    as_json: _Json = False,
    retune: _Retune = False,
    trusted: _Trust = None,
) -> None:
    """Say what accumulation costs and buys for this recipe here, and what is exact."""
    import dataclasses

    from gatrain.cli.explained import headline, look
    from gatrain.explain import explain as rows_of
    from gatrain.report.explanation import print_explanation

    with terminal.Progress() as progress:
        situation = look(overrides or [], _world_request(nproc), progress, gpu=gpu, retune=retune)
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
    overrides: _Overrides = None,
    nproc: _Nproc = None,
    nnodes: _Nnodes = 1,
    node_rank: _NodeRank = 0,
    endpoint: _Endpoint = None,
    max_restarts: _MaxRestarts = 0,
    slurm: Annotated[bool, _slurm_option("--slurm", "Write a batch file and submit it.")] = False,
    dry_run: Annotated[bool, _slurm_option("--dry-run", "Print the batch file only.")] = False,
    nodes: Annotated[int | None, _slurm_option("--nodes", "Nodes, by default 1.")] = None,
    gpus_per_node: Annotated[int | None, _slurm_option("--gpus-per-node", "GPUs of each node.")] = None,
    cpus_per_gpu: Annotated[int | None, _slurm_option("--cpus-per-gpu", "CPU cores for each GPU.")] = None,
    mem: Annotated[
        str | None, _slurm_option("--mem", "Main memory of each node, such as 64G; 0 for all of it.")
    ] = None,
    partition: Annotated[str | None, _slurm_option("--partition", "Partition (queue).")] = None,
    time_limit: Annotated[str | None, _slurm_option("--time", "Time limit, such as 04:00:00.")] = None,
    account: Annotated[str | None, _slurm_option("--account", "Account that is charged.")] = None,
    qos: Annotated[str | None, _slurm_option("--qos", "Quality of service.")] = None,
    constraint: Annotated[
        str | None, _slurm_option("--constraint", "Features that nodes must have, such as 'a100|h100'.")
    ] = None,
    retune: _Retune = False,
    overwrite: _Overwrite = False,
    trusted: _Trust = None,
) -> None:
    """Train on a stated number of processes, on several nodes, or through Slurm."""
    from gatrain import fit as work

    resources: dict[str, Any] = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "cpus_per_gpu": cpus_per_gpu, "mem": mem,
        "partition": partition, "time": time_limit, "account": account, "qos": qos, "constraint": constraint,
    }  # fmt: skip
    if slurm:
        from gatrain.fit import submit
        from gatrain.launch.schedulers.sbatch import Resources

        if _torchrun is not None:
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
    request = _world_request(nproc, nnodes, node_rank, endpoint, max_restarts)
    _propose_if_asked(overrides or [], request, retune)
    with terminal.Progress() as progress:
        outcome = work.fit(
            overrides or [], request, progress.listener(), retune, overwrite, _start_nodes(context, progress)
        )
    _print_outcome(outcome)


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
    nproc: _Nproc = None,
    nnodes: _Nnodes = 1,
    node_rank: _NodeRank = 0,
    endpoint: _Endpoint = None,
    max_restarts: _MaxRestarts = 0,
    from_start: Annotated[
        bool,
        typer.Option(
            "--from-start", help="Begin at step 0 again; states and metrics are kept under other names."
        ),
    ] = False,
    trusted: _Trust = None,
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

    request = _world_request(nproc, nnodes, node_rank, endpoint, max_restarts)
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
def verify(overrides: _Overrides = None, as_json: _Json = False, trusted: _Trust = None) -> None:
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
    overrides: _Overrides = None,
    as_json: _Json = False,
    data: Annotated[
        bool, typer.Option("--data", help="Read the data instead, and print what it is and what is left out.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --data: read every sample once, and list what is broken.")
    ] = False,
    trusted: _Trust = None,
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
def doctor(overrides: _Overrides = None, as_json: _Json = False, trusted: _Trust = None) -> None:
    """Report hardware and versions, what would be chosen and why, and any problem found."""
    from gatrain.cli.examine import examine

    report = examine(overrides or [])
    if as_json:
        terminal.print_json(report.to_dict())
    else:
        terminal.print_lines(report.lines(terminal.width()))


_torchrun: TorchrunWorld | None = None
"""The torchrun that has started this process among others."""


def _world_request(
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

    if _torchrun is None:
        return WorldRequest(nproc, nnodes, node_rank, endpoint, max_restarts)
    theirs = {
        "--nproc": (nproc, (None, _torchrun.nproc)),
        "--nnodes": (nnodes, (1, _torchrun.nnodes)),
        "--node-rank": (node_rank, (0, _torchrun.node_rank)),
        "--rdzv-endpoint": (endpoint, (None,)),
        "--max-restarts": (max_restarts, (0,)),
    }
    for option, (value, allowed) in theirs.items():
        if value not in allowed:
            raise ConfigError(
                f"{option} {value} is torchrun's to say, which has started {_torchrun.nproc or 1} process(es) on "
                f"each of {_torchrun.nnodes} node(s): leave it out here, or start gatrain launch without torchrun."
            )
    return WorldRequest.of(_torchrun)


def _start_nodes(context: typer.Context, progress: terminal.Progress) -> StartNodes:
    """How this command is started on every node of a job."""

    def start(job: Job, words: Sequence[str]) -> NoReturn:
        progress.stop()
        machine.restore_temporary_folder()
        job.start_on_every_node([*context.obj, *words])

    return start


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


# --- errors ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; every error is one message on standard error."""
    if COMPLETES in os.environ:  # a shell asks; Typer answers it and ends the process
        app(prog_name="gatrain")
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    secrets.note_words(arguments)
    secrets.mask_command_line(arguments)
    with streams.forgiving():
        code = streams.exit_code(_run_settled(arguments), arguments[0])
    terminal.leave(code, is_program=argv is None)


def _run_settled(arguments: list[str]) -> int:
    if arguments[0].startswith("-"):
        return _run(arguments)
    try:
        with machine.settled():
            return _run_within_torchrun(arguments) if "RANK" in os.environ else _run(arguments)
    except GatrainError as error:
        terminal.print_error(str(error))
        return int(error.exit_code)


def _run_within_torchrun(arguments: list[str]) -> int:
    """Where torchrun started several of these processes, they become one run instead of as many runs."""
    global _torchrun
    from gatrain.launch import torchrun

    if arguments[0] == "launch" and "--nproc" in arguments and torchrun.is_left_over(os.environ):
        machine.note(
            f"RANK={os.environ['RANK']} of the environment is not torchrun's (no LOCAL_WORLD_SIZE) and counts for "
            "nothing: launch --nproc starts the ranks."
        )
        torchrun.forget(os.environ)
        return _run(arguments)
    try:
        _torchrun = torchrun.detect(os.environ)
        if _torchrun is None:
            return _run(arguments)
        if _torchrun.local_rank:
            return torchrun.follow(_torchrun)
        torchrun.forget(os.environ)
        # what is no training is done once, on node 0
        here = _torchrun.node_rank == 0 or arguments[0] in ("fit", "launch", "resume", "autotune", "explain")
        return torchrun.lead(_torchrun, lambda: _run(arguments) if here else 0)
    except GatrainError as error:
        terminal.print_error(str(error))
        return int(error.exit_code)


def _run(arguments: list[str]) -> int:
    stop = terminal.Terminable()
    trust.accept(())  # of this command alone
    try:
        with offspring.stopping_together(), stop:
            returned = app(arguments, prog_name="gatrain", standalone_mode=False, obj=arguments)
        if (
            stop.asked is not None or returned == Interrupted.exit_code
        ):  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except GatrainError as error:
        terminal.debug_traceback()
        terminal.print_error(str(error))
        return int(getattr(error, "exit_code", 1))
    except terminal.UsageError as error:
        terminal.print_error(terminal.usage_text(error, arguments, COMMANDS))
        return ConfigError.exit_code
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        terminal.debug_traceback()
        if stop.asked is None:
            terminal.print_error("interrupted")
            return Interrupted.exit_code
        terminal.print_error(f"stopped by {signal.Signals(stop.asked).name}.")
        return stop.EXIT_CODE
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return terminal.unexpected(error)
