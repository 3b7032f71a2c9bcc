"""Slurm: which allocation this process is in, one launcher on each of its nodes, and batch jobs.

A multi-node job is one `gatrain launch` on each node, started by srun as a job step. Inside a step the world
follows from Slurm's environment (`nodes_from_slurm`); from the shell of an allocation, `relaunch_under_srun`
makes the step.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gatrain.errors import LaunchError
from gatrain.imports import SAFE_PATH
from gatrain.launch.nodes import Nodes

FIRST_SPECIAL_STEP = 0xFFFFFF00
"""Slurm numbers the steps that are not srun's (batch script, interactive shell) from the top of 32 bits."""
PORTS = range(15000, 30000)
"""Below the range from which systems take ports for outgoing connections."""


@dataclass(frozen=True)
class SlurmJob:
    """The allocation, or the job step, that this process runs in."""

    job_id: int
    nnodes: int
    node_list: str
    """Slurm's short form, such as ``gpu[01-04]``."""
    in_step: bool
    """Started by srun: there is a process like this on each node."""
    node_id: int = 0
    """Position of this node in the step."""
    tasks: int = 1
    """Processes of the step on all nodes."""
    step_id: int = 0
    restarts: int = 0
    """How often the job was requeued."""
    gpus_per_node: int | None = None


def detect(environ: Mapping[str, str]) -> SlurmJob | None:
    """Read the SLURM_* variables; None outside of an allocation.

    Raises:
        LaunchError: a variable does not hold what Slurm documents.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    step = _number(environ, "SLURM_STEP_ID", -1)
    in_step = 0 <= step < FIRST_SPECIAL_STEP
    nnodes = _number(environ, "SLURM_JOB_NUM_NODES", _number(environ, "SLURM_NNODES", 1))
    node_list = environ.get("SLURM_JOB_NODELIST", environ.get("SLURM_NODELIST", ""))
    if in_step:
        nnodes = _number(environ, "SLURM_STEP_NUM_NODES", nnodes)
        node_list = environ.get("SLURM_STEP_NODELIST", node_list)
    return SlurmJob(
        job_id=_number(environ, "SLURM_JOB_ID", 0),
        nnodes=nnodes,
        node_list=node_list,
        in_step=in_step,
        node_id=_number(environ, "SLURM_NODEID", 0) if in_step else 0,
        tasks=_number(environ, "SLURM_STEP_NUM_TASKS", nnodes) if in_step else 1,
        step_id=step if in_step else 0,
        restarts=_number(environ, "SLURM_RESTART_COUNT", 0),
        gpus_per_node=_gpus_per_node(environ),
    )


def nodes_from_slurm(job: SlurmJob, nproc: int) -> Nodes:
    """The world of a job step: one launcher on each node, ``nproc`` ranks under each.

    Runs scontrol to find the address of the first node, since host names need not resolve.

    Raises:
        LaunchError: the step has more than one task on a node, or scontrol fails.
    """
    if job.tasks > job.nnodes:
        raise LaunchError(
            f"this job step has {job.tasks} tasks on {job.nnodes} node(s), and gatrain starts the ranks of a "
            "node itself. Use srun --ntasks-per-node=1, and --nproc for the processes on each node."
        )
    run_id = f"slurm-{job.job_id}-{job.step_id}-{job.restarts}"
    if job.nnodes == 1:
        return Nodes(nproc, run_id=run_id)
    port = PORTS[(job.job_id * 131 + job.step_id) % len(PORTS)]
    host = first_address(job.node_list)
    endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Nodes(nproc, job.nnodes, job.node_id, endpoint, run_id)


def first_address(node_list: str) -> str:
    """Address of the first node of a Slurm node list.

    Raises:
        LaunchError: scontrol is missing or fails.
    """
    names = _slurm("scontrol", "show", "hostnames", node_list).split()
    if not names:
        raise LaunchError(f"scontrol finds no host in the node list {node_list!r}.")
    facts = _slurm("scontrol", "show", "node", "--oneliner", names[0])
    match = re.search(r"\bNodeAddr=(\S+)", facts)
    return match[1] if match else names[0]


def relaunch_under_srun(argv: Sequence[str], job: SlurmJob) -> NoReturn:
    """Replace this process by an srun that runs ``gatrain ARGV...`` once on each node of the allocation.

    srun's exit code is the highest of the nodes', so it is this process's, and signals go straight to srun.

    Raises:
        LaunchError: there is no srun.
    """
    if shutil.which("srun") is None:
        raise LaunchError("srun is not on the PATH here. Load your site's Slurm module, then start again.")
    sys.stdout.flush()
    sys.stderr.flush()
    command = [*srun_command(job.nnodes), sys.executable, SAFE_PATH, "-m", "gatrain", *argv]
    os.execvp(command[0], command)


def srun_command(nodes: int, cpus_per_node: int | None = None) -> list[str]:
    """The srun call that starts one process on each node and ends all when one fails."""
    cpus = [] if cpus_per_node is None else [f"--cpus-per-task={cpus_per_node}"]  # not inherited since 22.05
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        *cpus,
        "--kill-on-bad-exit=1",
    ]


@dataclass(frozen=True)
class BatchJob:
    """What to ask of Slurm.

    Raises:
        LaunchError: a number is below 1, or a value holds characters that a batch file cannot carry.
    """

    name: str
    output: Path
    """File for everything that the job prints; Slurm's ``%j`` is not expanded."""
    nodes: int = 1
    partition: str | None = None
    time: str | None = None
    """Slurm's form: minutes, ``HH:MM:SS`` or ``D-HH:MM:SS``; None is the partition's default."""
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    account: str | None = None
    save_before_s: int = 120
    """How long before the time limit the ranks are told to save and stop, in seconds."""
    requeue: bool = True
    """Queue again after pre-emption, a lost node or the time limit; the command must continue its run."""

    def __post_init__(self) -> None:
        for option in ("nodes", "gpus_per_node", "cpus_per_node", "save_before_s"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise LaunchError(
                    f"--{option.replace('_', '-')} {value} is below 1, the smallest value allowed."
                )
        for option in ("name", "partition", "account"):
            value = getattr(self, option)
            if value is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,@+=:/-]*", value):
                raise LaunchError(
                    f"--{option} {value!r} cannot stand in a batch file. Use letters, digits, _.,@+=:/- only."
                )
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}|UNLIMITED", self.time):
            raise LaunchError(
                f"--time {self.time!r} is not a Slurm time. Write minutes, HH:MM:SS or D-HH:MM:SS, "
                "for example --time 04:00:00."
            )
        if re.search(r"[\x00-\x1f\x7f]", str(self.output)):
            raise LaunchError(
                f"the path {str(self.output)!r} holds a line break or control character. Rename it."
            )


def sbatch_script(job: BatchJob, command: Sequence[str], *, cwd: Path) -> str:
    """Write the batch file that runs ``command`` once on each node of the job.

    Before the time limit Slurm signals the script, which passes SIGUSR1 on; the ranks save and stop (exit
    code 143), and the job queues itself again if ``job.requeue``.

    Args:
        job: what to ask of Slurm.
        command: program and arguments, such as ``[sys.executable, "-m", "gatrain", "launch", ...]``.
        cwd: working directory of the command.

    Raises:
        LaunchError: an argument or the directory holds a line break or another control character.
    """
    for text in (*command, str(cwd)):
        if re.search(r"[\x00-\x1f\x7f]", text):
            raise LaunchError(
                f"{text!r} holds a line break or control character, which a batch file cannot carry."
            )
    options = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_node,
        "output": _option_path(job.output),
        "open-mode": "append",
        "signal": f"B:USR1@{job.save_before_s}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue")
    step = shlex.join([*srun_command(job.nodes, job.cpus_per_node), *command])
    return _SCRIPT.format(
        options="\n".join(lines),
        cwd=shlex.quote(str(cwd)),
        step=step,
        again=_REQUEUE if job.requeue else "",
    )


_SCRIPT = """\
#!/bin/bash
{options}

cd -- {cwd} || exit 7

{step} &
step=$!
at_limit=
# Slurm sends SIGUSR1 before the time limit: the ranks save and stop.
trap 'at_limit=yes; kill -USR1 "$step"' USR1
trap 'kill -TERM "$step"' TERM
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
{again}exit "$code"
"""

_REQUEUE = """\
# 143: stopped and saved. The job goes on from the saved state when its turn comes again.
if [ -n "$at_limit" ] && [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
"""


def submit(script: Path) -> int:
    """Hand a batch file to Slurm and return the job id.

    Raises:
        LaunchError: sbatch is missing, or refuses the file (with its own words).
    """
    answer = _slurm("sbatch", "--parsable", str(script))
    with contextlib.suppress(ValueError):
        return int(answer.strip().split(";")[0])
    raise LaunchError(f"sbatch answered {answer.strip()!r} where a job id was expected.")


def _slurm(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"{program} is not on the PATH: this is no Slurm machine, or its module is not loaded. Log in to "
            "a Slurm login node, or leave out --slurm to train on this machine."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{program} gave no answer within 120 s. Is the Slurm controller up? Try sinfo."
        ) from error
    if done.returncode != 0:
        raise LaunchError(f"{program} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit():
        raise LaunchError(
            f"{name}={text!r} is not a number. Unset the SLURM_* variables to train without Slurm."
        )
    return int(text)


def _gpus_per_node(environ: Mapping[str, str]) -> int | None:
    """GPUs of this node, from a count or from types with counts such as ``a100:4``."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        text = environ.get(name)
        if text:
            counts = [part.rpartition(":")[2] for part in text.split(",")]
            if all(count.isascii() and count.isdigit() for count in counts):
                return sum(map(int, counts))
    return None


def _option_path(path: Path) -> str:
    """Quote a path for an #SBATCH line: Slurm's own parser, and % starts a pattern."""
    return '"' + re.sub(r'(["\\])', r"\\\1", str(path).replace("%", "%%")) + '"'
