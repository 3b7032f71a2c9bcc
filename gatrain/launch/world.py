"""Which processes form the world: how many on each node, how many nodes, and where they meet.

WorldRequest   what the options, a torchrun or a scheduler's job ask of the world
Nodes          the world that comes of it, as one node sees it
TorchrunEnv    the place in it that torchrun gives to a rank
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gatrain.errors import LaunchError
from gatrain.launch import protocol

if TYPE_CHECKING:
    from gatrain.launch.schedulers import Job
    from gatrain.launch.torchrun import TorchrunWorld


@dataclass(frozen=True)
class Nodes:
    """The shape of the world as one node sees it. Every node has the same number of processes.

    Global ranks follow the nodes: rank = ``node_rank`` x ``nproc`` + local rank, so rank 0 is on node 0.

    Raises:
        LaunchError: a value is out of its range, or several nodes are given without an endpoint.
    """

    nproc: int
    """Processes on this node: one for each GPU."""
    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    """``host:port`` on node 0, reachable from every node; None for one node."""
    run_id: str = "gatrain"
    """The same on every node of one run."""

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise LaunchError(f"{self.nproc} processes cannot train. Use --nproc 1 or more.")
        if self.nnodes < 1:
            raise LaunchError(f"{self.nnodes} nodes cannot train. Use --nnodes 1 or more.")
        if not 0 <= self.node_rank < self.nnodes:
            allowed = "only 0" if self.nnodes == 1 else f"0 to {self.nnodes - 1}"
            raise LaunchError(
                f"node rank {self.node_rank} does not exist with {self.nnodes} node(s): {allowed} is allowed."
                " Give every node its own --node-rank, counted from 0, and all of them the same --nnodes."
            )
        if self.nnodes > 1 and self.endpoint is None:
            raise LaunchError(
                f"{self.nnodes} nodes need a place to meet. Add --rdzv-endpoint HOST:PORT, where HOST is the "
                "address of node 0 and PORT a free port there, for example --rdzv-endpoint 10.0.0.1:29500."
            )
        if self.endpoint is not None:
            parse_endpoint(self.endpoint)
        if not re.fullmatch(r"[\w.-]+", self.run_id):
            raise LaunchError(f"run id {self.run_id!r} may hold letters, digits, '_', '.' and '-' only.")

    @property
    def world_size(self) -> int:
        """Processes on all nodes together."""
        return self.nproc * self.nnodes

    def rank_of(self, local_rank: int) -> int:
        """Global rank of a process of this node."""
        return self.node_rank * self.nproc + local_rank


@dataclass(frozen=True)
class WorldRequest:
    """What was asked of the world; the rest is found out from the hardware and the job.

    Raises:
        LaunchError: a value is out of its range, or several nodes are named without an endpoint.
    """

    nproc: int | None = None
    """Processes on this node; None takes every visible GPU, or one process on a CPU."""
    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    max_restarts: int = 0
    torchrun: TorchrunWorld | None = None
    """The world of a torchrun that was started by somebody else; the fields above are then its."""
    job: Job | None = None
    """The job that this process runs in. Its nodes count where none are named above."""

    @classmethod
    def of(cls, torchrun: TorchrunWorld) -> WorldRequest:
        """The request that joins the processes which torchrun has started."""
        return cls(
            torchrun.nproc, torchrun.nnodes, torchrun.node_rank, torchrun.endpoint(), torchrun=torchrun
        )

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise LaunchError(f"--max-restarts {self.max_restarts} is below 0.")
        self._named_nodes(self.nproc if self.nproc is not None else 1)  # its ranges, before anything slow

    @property
    def names_nodes(self) -> bool:
        """Whether somebody has said which nodes there are, so that no job is asked for them."""
        return self.nnodes > 1 or self.endpoint is not None or self.torchrun is not None

    @property
    def was_started_again(self) -> bool:
        """Whether a scheduler has started this command before: a requeued job, or a restart by torchrun."""
        if self.torchrun is not None and self.torchrun.attempt:
            return True
        return self.job is not None and self.job.restarts > 0

    def nodes(self, nproc: int) -> Nodes:
        """The world, with ``nproc`` processes on each node.

        Raises:
            LaunchError: the job cannot be one world.
        """
        if self.job is not None and not self.names_nodes:
            return self.job.nodes(nproc)
        return self._named_nodes(nproc)

    def words(self) -> list[str]:
        """The command and the options that ask for this world."""
        options: list[str] = []
        for option, value, default in (
            ("--nproc", self.nproc, None),
            ("--nnodes", self.nnodes, 1),
            ("--node-rank", self.node_rank, 0),
            ("--rdzv-endpoint", self.endpoint, None),
            ("--max-restarts", self.max_restarts, 0),
        ):
            options += [option, str(value)] if value != default else []
        return ["launch", *options] if options else ["fit"]

    def _named_nodes(self, nproc: int) -> Nodes:
        return Nodes(nproc, self.nnodes, self.node_rank, self.endpoint)


@dataclass(frozen=True)
class TorchrunEnv:
    """Where torchrun put this process; one that was started by hand is a world of one."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> TorchrunEnv:
        local_rank, local_size = (
            int(environ.get("LOCAL_RANK", "0")),
            int(environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        # torchrun numbers nodes by address; going by node rank keeps rank 0 at the user's terminal
        rank = int(environ.get(protocol.NODE_RANK, "0")) * local_size + local_rank
        return cls(rank, local_rank, int(environ.get("WORLD_SIZE", "1")), local_size)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Split ``host:port``; an IPv6 address stands in brackets.

    Raises:
        LaunchError: there is no host or no port, or the port is not between 1 and 65535.
    """
    host, colon, port = endpoint.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or re.search(r"[\s/\[\]]", bare) or (":" in bare and bare == host):
        raise LaunchError(
            f"endpoint {endpoint!r} is not HOST:PORT. Write for example 10.0.0.1:29500 or [fe80::1]:29500."
        )
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise LaunchError(
            f"port {port!r} of endpoint {endpoint!r} is not between 1 and 65535. Try {host}:29500."
        )
    return bare, int(port)
