"""Schedulers: in which job is this process, on which node of it, and was it started again?

That is asked once, by `gatrain.fit.job.find_job`; what comes back travels as a `Job`. Slurm is the first file of
its kind here. One of your own is a class with a `detect`, named in the recipe::

    scheduler: {_target_: my_module.Pods}

    class Pods(Scheduler):
        def detect(self, environ):
            if "POD_JOB" not in environ:
                return None
            return Job("pods", environ["POD_JOB"], nnodes=int(environ["PODS"]), node_rank=int(environ["POD"]),
                       endpoint=f"{environ['POD_0']}:29500", restarts=int(environ["POD_RESTARTS"]))
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from gatrain import doors
from gatrain.errors import LaunchError
from gatrain.launch.world import Nodes


@dataclass(frozen=True)
class Job:
    """The job that this process runs in, as its scheduler describes it.

    Raises:
        LaunchError: the id cannot be part of a folder's name, or a number is below what it counts from.
    """

    scheduler: str
    """Name of the scheduler, such as ``slurm``."""
    id: str
    """The same on every node, and after the job was started again."""
    nnodes: int = 1
    node_rank: int = 0
    """This node's number in the job, from 0."""
    endpoint: str | None = None
    """``host:port`` of a port of node 0 that is free for this job, the same on every node; None for one node."""
    restarts: int = 0
    """How often the scheduler has started the job again, after pre-emption or a time limit."""
    on_every_node: bool = True
    """Whether there is a process like this one on each node of the job. Where it is False this process is the
    first of the job, and `start_on_every_node` starts the others."""

    def __post_init__(self) -> None:
        for name in ("scheduler", "id"):
            if not re.fullmatch(r"[\w.-]+", str(getattr(self, name))):
                raise LaunchError(
                    f"the scheduler gave {name}={getattr(self, name)!r}, and folders are named after it: give "
                    "letters, digits, '_', '.' and '-' only."
                )
        for name, lowest in (("nnodes", 1), ("node_rank", 0), ("restarts", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise LaunchError(
                    f"the scheduler gave {name}={value!r}, which is no whole number of at least {lowest}."
                )

    @property
    def run_name(self) -> str:
        """Name of the run's folder where the user names none: the same on every node and at every restart."""
        return f"job-{self.id}"

    @property
    def needs_other_nodes(self) -> bool:
        """Whether the job has nodes on which nothing runs yet."""
        return self.nnodes > 1 and not self.on_every_node

    def nodes(self, nproc: int) -> Nodes:
        """The world of the job, with ``nproc`` ranks on each node.

        Raises:
            LaunchError: the job cannot be one world.
        """
        if not self.on_every_node:
            return Nodes(nproc)
        run_id = f"{self.scheduler}-{self.id}-{self.restarts}"
        return Nodes(nproc, self.nnodes, self.node_rank, self.endpoint, run_id)

    def start_on_every_node(self, argv: Sequence[str]) -> NoReturn:
        """Replace this process by one that runs ``gatrain ARGV...`` on each node of the job.

        Raises:
            LaunchError: the scheduler has no way to do so.
        """
        raise LaunchError(
            f"this process is the only one of {self.scheduler} job {self.id}, which has {self.nnodes} nodes, and "
            "its scheduler's class does not say how to reach them. Start gatrain on each node, with --nnodes, "
            "--node-rank and --rdzv-endpoint."
        )


class Scheduler:
    """A kind of cluster."""

    def detect(self, environ: Mapping[str, str]) -> Job | None:
        """The job that a process with this environment runs in; None where it is in none of this scheduler's.

        Called once in each command, before anything slow; it may run the scheduler's programs.

        Raises:
            LaunchError: the environment is not what the scheduler documents.
        """
        raise NotImplementedError


class Auto(Scheduler):
    """The first shipped scheduler that finds itself in a job."""

    def detect(self, environ: Mapping[str, str]) -> Job | None:
        for name, dotted in doors.SHIPPED["scheduler"].items():
            if name != "auto" and (job := shipped(dotted).detect(environ)) is not None:
                return job
        return None


def shipped(dotted: str) -> Scheduler:
    """Make a scheduler of gatrain's own; imports nothing heavy."""
    module, _, name = dotted.rpartition(".")
    made: Scheduler = getattr(importlib.import_module(module), name)()
    return made
