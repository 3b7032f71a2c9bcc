"""Rendezvous: the nodes of a run meet at one store, and hear there of each other and of each other's failures.

Node 0 opens a small key-value store (torch's TCPStore, which torchrun's rendezvous then shares) before anything
slow, and keeps it until its ranks have ended. It has no authentication, so on one node it listens to this machine
only. Its keys, below ``gatrain/RUN_ID``:

    session             node 0's, new in each command: an earlier run's store, about to end, is not this one's
    SESSION/place/N     counts the processes that came as node N
    SESSION/KIND/N      what node N gives: its shape, its hardware, that it launches, why it failed
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gatrain.errors import LaunchError
from gatrain.launch import protocol
from gatrain.launch.net import LOOPBACK, address_towards, check_resolves, listen
from gatrain.launch.world import Nodes, parse_endpoint

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

POLL_S = 0.2
ANSWER_S, TRAINING_ANSWER_S = 60.0, 10.0
"""Seconds that node 0's store may take to answer. Before the training its process may be stopped for a while, as at
Ctrl-Z; in the training nobody goes on without it."""
REPORT_S = 3.0
"""Seconds that node 0 stays, so that the others can read why it failed."""


class Rendezvous:
    """The store that the nodes of one run share. A context manager: the others hear of an error that leaves it.

    Creating it on node 0 takes the port, which is the test whether it is free; `open` waits for node 0 elsewhere.

    Args:
        resolves_later: the endpoint's name may be unknown for a while, as that of a pod that is being started.

    Raises:
        LaunchError: the port is taken, or nobody has the endpoint's name.
    """

    def __init__(self, nodes: Nodes, resolves_later: bool = False) -> None:
        self.nodes = nodes
        self.store: TCPStore | None = None
        self.session = ""
        self._listener: socket.socket | None = None
        host, port = parse_endpoint(nodes.endpoint) if nodes.endpoint else (LOOPBACK, 0)
        if nodes.nnodes == 1:
            host = LOOPBACK
        elif not resolves_later:
            _check_name(host, port, nodes.endpoint)
        self.host, self.port = host, port
        if nodes.node_rank == 0:
            self._listen()

    def __enter__(self) -> Rendezvous:
        if self.nodes.nnodes > 1 and self.nodes.node_rank == 0:
            self.open()  # so that the others are told of whatever fails from here on
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self.report_failure(str(error))
        self.close()

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def own_address(self) -> str:
        """This node's on the way to node 0, which calls itself as the endpoint does."""
        if self.nodes.node_rank == 0:
            return self.host
        try:
            return address_towards(self.host, self.port)
        except OSError as error:
            raise _nobody_has(self.host, self.nodes.endpoint, error) from error

    def close(self) -> None:
        """Leave the store, and give the port back."""
        if self._listener is not None:
            self._listener.close()
        self._listener = self.store = None

    # --- meeting ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """On node 0 open the store, also once more after `close`; elsewhere wait for it and take this node's place.

        Raises:
            LaunchError: node 0 does not answer in time, or there is a process with this node rank already.
        """
        if self.store is not None:
            return
        if self.nodes.node_rank == 0:
            store = self._connect((self._listener or self._listen()).detach())
            self.session, self._listener = uuid.uuid4().hex, None
            store.set(f"gatrain/{self.nodes.run_id}/session", self.session)
        else:
            store = self._join()
        self.store = store
        shape = {"nproc": self.nodes.nproc, "nnodes": self.nodes.nnodes, "host": socket.gethostname()}
        self.give("shape", shape)

    def gather(self) -> None:
        """Wait until every node is about to launch. All nodes take part.

        Raises:
            LaunchError: not all came in time (names the missing ones), or they disagree about the world.
        """
        self.open()
        assert self.store is not None
        self.give("launch", True)
        self.collect("launch")
        self.compare_shapes()
        self.store.set_timeout(timedelta(seconds=TRAINING_ANSWER_S))

    def _listen(self) -> socket.socket:
        port = parse_endpoint(self.nodes.endpoint)[1] if self.nodes.endpoint else 0
        try:
            listener = listen(LOOPBACK if self.nodes.nnodes == 1 else "", port)
        except OSError as error:
            raise LaunchError(
                f"port {port} is already in use on this machine ({error.strerror}). Another run "
                "may have it: give every node another, for example "
                f"--rdzv-endpoint {self.host}:{_next_port(port)}."
            ) from error
        self._listener, self.port = listener, listener.getsockname()[1]
        return listener

    def _join(self) -> TCPStore:
        """Find node 0's store of this very run: one that has no process with this node rank yet."""
        limit_s = protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
        deadline = time.monotonic() + limit_s
        while True:
            self._await_node_0(deadline, limit_s)
            problem = (
                f"something else than gatrain's node 0 answers at {self.endpoint}, or it ended again. "
                "Check that address and port are the same on every node."
            )
            with contextlib.suppress(RuntimeError):  # an earlier run's store, which ends just now
                store, key = self._connect(), f"gatrain/{self.nodes.run_id}/session"
                if store.check([key]):
                    self.session = store.get(key).decode()
                    if store.add(self._key("place", self.nodes.node_rank), 1) == 1:
                        return store
                    problem = (
                        f"there is a process with node rank {self.nodes.node_rank} at {self.endpoint} already. "
                        "Start gatrain once on each node, each with its own --node-rank."
                    )
            if time.monotonic() > deadline:
                raise LaunchError(problem)
            time.sleep(POLL_S)

    def _await_node_0(self, deadline: float, limit_s: float) -> None:
        # with a plain socket: the store's own client logs a page of C++ frames when it gives up
        while True:
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

    def _connect(self, listener: int | None = None) -> TCPStore:
        # read when torch is loaded: a store that ends is told in our words, without C++ frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch.distributed  # noqa: F401 (the next line needs it loaded)
        from torch._C._distributed_c10d import TCPStore  # torch.distributed.TCPStore, typed

        store = TCPStore(
            self.host,
            self.port,
            is_master=listener is not None,
            timeout=timedelta(seconds=30),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener,
        )
        store.set_timeout(timedelta(seconds=ANSWER_S))
        return store

    def compare_shapes(self) -> None:
        """Refuse nodes that were started with other numbers. Waits for all of them.

        Raises:
            LaunchError: a node has another --nproc or --nnodes than this one.
        """
        for rank, other in enumerate(self.collect("shape")):
            for name, own in (("nproc", self.nodes.nproc), ("nnodes", self.nodes.nnodes)):
                if other[name] != own:
                    raise LaunchError(
                        f"node {self.nodes.node_rank} was started with --{name} {own}, and node {rank} "
                        f"({other['host']}) with --{name} {other[name]}. Give every node the same."
                    )

    # --- what the nodes tell each other -----------------------------------------------------------------

    def give(self, kind: str, value: Any) -> None:
        """Let all nodes read a JSON value of this node.

        Raises:
            LaunchError: node 0 is gone.
        """
        assert self.store is not None
        try:
            self.store.set(self._key(kind, self.nodes.node_rank), json.dumps(value))
        except RuntimeError as error:
            raise LaunchError(self._lost()) from error

    def read(self, kind: str, node_rank: int) -> Any:
        """What a node gives now; None as long as it gives nothing, and where the store is gone."""
        assert self.store is not None
        key = self._key(kind, node_rank)
        with contextlib.suppress(RuntimeError):  # gone: `failure_elsewhere` says so
            return json.loads(self.store.get(key)) if self.store.check([key]) else None
        return None

    def collect(self, kind: str, first: int = 0) -> list[Any]:
        """What the nodes from ``first`` on give, by their ranks. Waits for all of them.

        Raises:
            LaunchError: a node gave nothing in time (names it), or failed.
        """
        assert self.store is not None
        nodes, limit_s = self.nodes, protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
        deadline = time.monotonic() + limit_s
        found: dict[int, Any] = {}
        while missing := [rank for rank in range(first, nodes.nnodes) if found.get(rank) is None]:
            found |= {rank: self.read(kind, rank) for rank in missing}
            if all(found[rank] is not None for rank in missing):
                break
            if (reason := self.failure_elsewhere()) is not None:
                raise LaunchError(reason)
            if time.monotonic() > deadline:
                missing = [rank for rank in missing if found[rank] is None]
                raise LaunchError(
                    f"{nodes.nnodes - len(missing)} of {nodes.nnodes} nodes met at {self.endpoint} within "
                    f"{limit_s:g} s; missing: node rank {', '.join(map(str, missing))}. Start gatrain there with "
                    "the same --nnodes, --rdzv-endpoint and run.dir, each with its own --node-rank. "
                    f"{protocol.JOIN_TIMEOUT_S} changes how long they wait."
                )
            time.sleep(POLL_S)
        return [found[rank] for rank in range(first, nodes.nnodes)]

    def _key(self, kind: str, node_rank: int) -> str:
        return f"gatrain/{self.nodes.run_id}/{self.session}/{kind}/{node_rank}"

    # --- failures ---------------------------------------------------------------------------------------

    def report_failure(self, text: str) -> None:
        """Let the other nodes know that this one failed; their ranks could wait for minutes otherwise."""
        store = self.store
        if store is None or self.nodes.nnodes == 1:
            return
        with contextlib.suppress(RuntimeError, LaunchError):
            self.give("failed", text)
            # the store ends with node 0's process: stay until the others have read it, who may be on their way
            deadline = time.monotonic() + REPORT_S
            others = [self._key("read", rank) for rank in range(1, self.nodes.nnodes)]
            while self.nodes.node_rank == 0 and time.monotonic() < deadline and not store.check(others):
                time.sleep(POLL_S)

    def failure_elsewhere(self) -> str | None:
        """What another node reported; None while all is well."""
        nodes = self.nodes
        if self.store is None or nodes.nnodes == 1:
            return None
        try:
            for rank in range(nodes.nnodes):
                key = self._key("failed", rank)
                if rank != nodes.node_rank and self.store.check([key]):
                    text = json.loads(self.store.get(key))
                    with contextlib.suppress(LaunchError):
                        self.give("read", True)
                    return f"node {rank} failed: {text}"
        except RuntimeError:
            return self._lost()
        return None

    def _lost(self) -> str:
        return f"lost node 0 at {self.endpoint}: its process or its machine is gone."

    def await_failure_elsewhere(self, limit_s: float) -> str | None:
        """As `failure_elsewhere`, waiting up to ``limit_s`` seconds for it; at once on a single node."""
        deadline = time.monotonic() + limit_s
        while (reason := self.failure_elsewhere()) is None and time.monotonic() < deadline:
            if self.store is None or self.nodes.nnodes == 1:
                return None
            time.sleep(POLL_S)
        return reason


def _check_name(host: str, port: int, endpoint: str | None) -> None:
    """Tell at once on every node that nobody has the endpoint's name, not when the others do not come.

    Raises:
        LaunchError: it does not resolve.
    """
    try:
        check_resolves(host, port)
    except OSError as error:
        raise _nobody_has(host, endpoint, error) from error


def _nobody_has(host: str, endpoint: str | None, error: OSError) -> LaunchError:
    return LaunchError(
        f"cannot find {host!r} of endpoint {endpoint!r} ({error.strerror}). "
        "Host names often do not resolve between nodes: give node 0's IP address."
    )


def _next_port(port: int) -> int:
    return port + 1 if port < 65535 else 29500
