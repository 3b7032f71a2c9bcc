"""Bring the nodes of a run together before torchrun's agents start; let them hear of each other's failures.

Node 0 hosts a small key-value store (torch's TCPStore, which torchrun's rendezvous then shares). It has no
authentication, so on one node it listens to this machine only.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from gatrain.errors import LaunchError
from gatrain.launch import protocol
from gatrain.launch.net import LOOPBACK, address_towards, check_resolves, listen
from gatrain.launch.world import Nodes, parse_endpoint

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

POLL_S = 0.2


def check_name(nodes: Nodes) -> None:
    """Tell at once on every node that nobody has the endpoint's name, not when the others do not come.

    Raises:
        LaunchError: it does not resolve.
    """
    if nodes.nnodes == 1 or nodes.endpoint is None:
        return
    host, port = parse_endpoint(nodes.endpoint)
    try:
        check_resolves(host, port)
    except OSError as error:
        raise LaunchError(
            f"cannot find {host!r} of endpoint {nodes.endpoint!r} ({error.strerror}). "
            "Host names often do not resolve between nodes: give node 0's IP address."
        ) from error


class MeetingPoint:
    """The store that the nodes of one run share.

    Creating it on node 0 takes the port, which is the test whether it is free.

    Raises:
        LaunchError: the port is taken, or the endpoint's name does not resolve.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.store: TCPStore | None = None
        self._listener: socket.socket | None = None
        host, port = parse_endpoint(nodes.endpoint) if nodes.endpoint else (LOOPBACK, 0)
        if nodes.nnodes == 1:
            host = LOOPBACK
        if nodes.node_rank == 0:
            try:
                self._listener = listen(LOOPBACK if nodes.nnodes == 1 else "", port)
            except OSError as error:
                raise LaunchError(
                    f"port {port} is already in use on this machine ({error.strerror}). Another run "
                    "may have it: give every node another, for example "
                    f"--rdzv-endpoint {host}:{_next_port(port)}."
                ) from error
            port = self._listener.getsockname()[1]
        self.host, self.port = host, port
        self.own_address = host if nodes.node_rank == 0 else self._address_towards_node_0()

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def close(self) -> None:
        """Give the port back if the store never took it."""
        if self._listener is not None:
            self._listener.close()

    def gather(self) -> None:
        """Wait until every node is here. All nodes take part; node 0 may come last.

        Raises:
            LaunchError: not all came in time (names the missing ones), or they disagree about the world.
        """
        limit_s = protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
        deadline = time.monotonic() + limit_s
        self._await_node_0(deadline, limit_s)
        store = self.store = self._open()
        store.set_timeout(timedelta(seconds=10))
        nodes = self.nodes
        about = json.dumps({"nproc": nodes.nproc, "nnodes": nodes.nnodes, "host": socket.gethostname()})
        store.set(self._key("node", nodes.node_rank), about)
        missing = [rank for rank in range(nodes.nnodes) if rank != nodes.node_rank]
        while missing:
            missing = [rank for rank in missing if not store.check([self._key("node", rank)])]
            if missing and time.monotonic() > deadline:
                raise LaunchError(
                    f"{nodes.nnodes - len(missing)} of {nodes.nnodes} nodes met at {self.endpoint} within "
                    f"{limit_s:g} s; missing: node rank {', '.join(map(str, missing))}. Start gatrain there "
                    f"with the same --nnodes and --rdzv-endpoint, each with its own --node-rank. "
                    f"{protocol.JOIN_TIMEOUT_S} changes how long they wait."
                )
            time.sleep(POLL_S if missing else 0)
        for rank in range(nodes.nnodes):
            other = json.loads(store.get(self._key("node", rank)))
            for name, own in (("nproc", nodes.nproc), ("nnodes", nodes.nnodes)):
                if other[name] != own:
                    raise LaunchError(
                        f"node {nodes.node_rank} was started with --{name} {own}, and node {rank} "
                        f"({other['host']}) with --{name} {other[name]}. Give every node the same."
                    )

    def tell_failure(self, text: str) -> None:
        """Let the other nodes know that this one failed; their ranks could wait for minutes otherwise."""
        if self.store is None or self.nodes.nnodes == 1:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(self._key("failed", self.nodes.node_rank), text)
            # the store ends with node 0's process: stay until the others have read it, or three seconds
            deadline = time.monotonic() + 3
            others = [self._key("heard", rank) for rank in range(1, self.nodes.nnodes)]
            while self.nodes.node_rank == 0 and time.monotonic() < deadline and not self.store.check(others):
                time.sleep(POLL_S)

    def failure_elsewhere(self) -> str | None:
        """What another node reported; None while all is well."""
        nodes = self.nodes
        if self.store is None or nodes.nnodes == 1:
            return None
        try:
            for rank in range(nodes.nnodes):
                if rank != nodes.node_rank and self.store.check([self._key("failed", rank)]):
                    text = self.store.get(self._key("failed", rank)).decode()
                    self.store.set(self._key("heard", nodes.node_rank), "1")
                    return f"node {rank} failed: {text}"
        except RuntimeError:
            return f"lost node 0 at {self.endpoint}: its process or its machine is gone."
        return None

    def await_failure_elsewhere(self, limit_s: float) -> str | None:
        """As `failure_elsewhere`, waiting up to ``limit_s`` seconds for it; at once on a single node."""
        deadline = time.monotonic() + limit_s
        while (reason := self.failure_elsewhere()) is None and time.monotonic() < deadline:
            if self.store is None or self.nodes.nnodes == 1:
                return None
            time.sleep(POLL_S)
        return reason

    def _await_node_0(self, deadline: float, limit_s: float) -> None:
        # with a plain socket: the store's own client logs a page of C++ frames when it gives up
        while self._listener is None:
            try:
                socket.create_connection((self.host, self.port), timeout=2).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"node 0 did not answer at {self.endpoint} within {limit_s:g} s ({error}). Is "
                        "gatrain running there with --node-rank 0, is the address node 0's, and does a "
                        f"firewall let the port through? {protocol.JOIN_TIMEOUT_S} changes the wait."
                    ) from error
            time.sleep(POLL_S)

    def _open(self) -> TCPStore:
        import torch.distributed  # noqa: F401 (the next line needs it loaded)
        from torch._C._distributed_c10d import TCPStore  # torch.distributed.TCPStore, typed

        fd = self._listener.detach() if self._listener is not None else None
        try:
            return TCPStore(
                self.host,
                self.port,
                is_master=fd is not None,
                timeout=timedelta(seconds=30),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=fd,
            )
        except RuntimeError as error:
            raise LaunchError(
                f"something else than gatrain's node 0 answers at {self.endpoint}, or it ended again. "
                "Check that address and port are the same on every node."
            ) from error

    def _address_towards_node_0(self) -> str:
        try:
            return address_towards(self.host, self.port)
        except OSError as error:
            raise LaunchError(
                f"cannot reach {self.host!r} of endpoint {self.endpoint!r} ({error.strerror}). "
                "Host names often do not resolve between nodes: give node 0's IP address."
            ) from error

    def _key(self, kind: str, rank: int) -> str:
        return f"gatrain/{self.nodes.run_id}/{kind}/{rank}"


def _next_port(port: int) -> int:
    return port + 1 if port < 65535 else 29500
