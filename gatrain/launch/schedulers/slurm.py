"""Slurm: which allocation this process is in, and one launcher on each of its nodes.

A multi-node job is one `gatrain launch` on each node, started by srun as a job step. Inside a step the world
follows from Slurm's environment; from the shell of an allocation, `SlurmJob.start_on_every_node` makes the step.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from gatrain.errors import LaunchError
from gatrain.imports import SAFE_PATH
from gatrain.launch.schedulers import Job, Scheduler
from gatrain.launch.world import Nodes

FIRST_SPECIAL_STEP = 0xFFFFFF00
"""Slurm numbers the steps that are not srun's (batch script, interactive shell) from the top of 32 bits."""
PORTS = range(15000, 30000)
"""Below the range from which systems take ports for outgoing connections."""


@dataclass(frozen=True)
class SlurmJob(Job):
    """An allocation, or a job step, which has a process like this on each node."""

    node_list: str = ""
    """Slurm's short form, such as ``gpu[01-04]``."""
    tasks: int = 1
    """Processes of the step on all nodes."""
    step_id: int = 0

    def nodes(self, nproc: int) -> Nodes:
        """The world of a job step: one launcher on each node, ``nproc`` ranks under each.

        Runs scontrol to find the address of the first node, since host names need not resolve.

        Raises:
            LaunchError: the step has more than one task on a node, or scontrol fails.
        """
        if not self.on_every_node:
            return Nodes(nproc)
        if self.tasks > self.nnodes:
            raise LaunchError(
                f"this job step has {self.tasks} tasks on {self.nnodes} node(s), and gatrain starts the ranks of "
                "a node itself. Use srun --ntasks-per-node=1, and --nproc for the processes on each node."
            )
        run_id = f"slurm-{self.id}-{self.step_id}-{self.restarts}"
        if self.nnodes == 1:
            return Nodes(nproc, run_id=run_id)
        port = PORTS[(int(self.id) * 131 + self.step_id) % len(PORTS)]
        host = first_address(self.node_list)
        endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Nodes(nproc, self.nnodes, self.node_rank, endpoint, run_id)

    def start_on_every_node(self, argv: Sequence[str]) -> NoReturn:
        """Replace this process by an srun that runs ``gatrain ARGV...`` once on each node of the allocation.

        srun's exit code is the highest of the nodes', so it is this process's, and signals go straight to srun.

        Raises:
            LaunchError: there is no srun.
        """
        if shutil.which("srun") is None:
            raise LaunchError(
                "srun is not on the PATH here. Load your site's Slurm module, then start again."
            )
        sys.stdout.flush()
        sys.stderr.flush()
        command = [*srun_command(self.nnodes), sys.executable, SAFE_PATH, "-m", "gatrain", *argv]
        os.execvp(command[0], command)


class Slurm(Scheduler):
    """The SLURM_* variables, as `sbatch`'s and `srun`'s manuals list them."""

    def detect(self, environ: Mapping[str, str]) -> SlurmJob | None:
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
            scheduler="slurm",
            id=str(_number(environ, "SLURM_JOB_ID", 0)),
            nnodes=nnodes,
            node_rank=_number(environ, "SLURM_NODEID", 0) if in_step else 0,
            restarts=_number(environ, "SLURM_RESTART_COUNT", 0),
            on_every_node=in_step,
            node_list=node_list,
            tasks=_number(environ, "SLURM_STEP_NUM_TASKS", nnodes) if in_step else 1,
            step_id=step if in_step else 0,
        )


def first_address(node_list: str) -> str:
    """Address of the first node of a Slurm node list.

    Raises:
        LaunchError: scontrol is missing or fails.
    """
    names = run("scontrol", "show", "hostnames", node_list).split()
    if not names:
        raise LaunchError(f"scontrol finds no host in the node list {node_list!r}.")
    shown = run("scontrol", "show", "node", "--oneliner", names[0])
    match = re.search(r"\bNodeAddr=(\S+)", shown)
    return match[1] if match else names[0]


def srun_command(nodes: int) -> list[str]:
    """The srun call that starts one process on each node and ends all when one fails."""
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]


def run(program: str, *arguments: str) -> str:
    """Run one of Slurm's programs and return what it prints.

    Raises:
        LaunchError: it is missing, or fails (with its own words).
    """
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
        raise LaunchError(f"{name}={text!r} is not a number. Use scheduler=null to train without Slurm.")
    return int(text)
