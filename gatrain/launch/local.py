"""Run a module on every rank of this node, through torchrun's elastic agent, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain import offspring, scratch, trust
from gatrain.errors import GatrainError, LaunchError, RunFolderError, WorkerError
from gatrain.imports import SAFE_PATH
from gatrain.launch import protocol
from gatrain.launch.failure import Exit, first_cause, is_only_consequence
from gatrain.launch.rendezvous import Rendezvous
from gatrain.launch.watch import SURVIVORS_S, Watch, interrupted, name_of
from gatrain.launch.world import Nodes
from gatrain.rundir import RunDir, read_json


def run_workers(
    module: str,
    folder: Path,
    nodes: Nodes,
    *,
    max_restarts: int = 0,
    device: str | None = None,
    cwd: Path | None = None,
    in_job: bool = False,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Run ``python -m MODULE FOLDER`` on each rank of this node and wait for the end.

    Every node of the world calls this. The module hands its work to `gatrain.rank.main`. Rank 0 has this
    process's terminal; the others write to ``FOLDER/logs/rank_N.log``. SIGINT, SIGTERM, SIGHUP and SIGUSR1
    are passed on to the ranks, which stop and save on their own; a second Ctrl-C ends them at once. If this
    process dies, the ranks die with it. Call it from the main thread, since signals arrive nowhere else.

    Args:
        module: name of an importable module.
        folder: the only argument of the module; ``FOLDER/logs`` is created.
        nodes: the shape of the world.
        max_restarts: how many times torchrun starts all ranks again after one failed.
        device: ``cpu`` or ``cuda``; None takes CUDA where a rank sees a GPU.
        cwd: working directory of the ranks, also on their import path; None is the current one.
        rendezvous: that of the nodes, where there is one already; it is closed at the end.
        in_job: whether a scheduler may send signals here, which goes from a polite one to a stronger one.

    Raises:
        LaunchError: the ranks could not be started: port in use, nodes missing.
        WorkerError: a rank died, or failed with an error of the user's code.
        GatrainError: the error of the rank that failed first, of the class that the rank raised.
        Interrupted: the ranks stopped because of a signal; ``exit_code`` is 130 for SIGINT, else 143.
    """
    run_dir = RunDir(folder.resolve())
    try:
        run_dir.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot write in {folder}: {error}") from error
    grace_s = protocol.seconds(protocol.GRACE_S, 120)
    rendezvous = rendezvous or Rendezvous(nodes)
    with (
        # imports torch, which takes seconds: a signal that comes meanwhile ends the command as before
        _agent_log(run_dir.logs / f"launcher_{nodes.node_rank}.log"),
        contextlib.closing(rendezvous),
        scratch.folder("gatrain_") as private,
        offspring.stopping_together(),
        Watch(private, rendezvous, grace_s, in_job) as watch,
        _working_directory(cwd),
        _environment(
            _rank_environment(rendezvous, device)
            | {protocol.RANK_STATE: str(private), offspring.SOCKETS: str(scratch.sockets_of(private))}
        ),
    ):
        agent = _Agent(module, run_dir, nodes, max_restarts, rendezvous, watch, private)
        thread = threading.Thread(target=agent.run, name=offspring.AGENT_THREAD, daemon=True)
        thread.start()
        watch.follow(thread)
        failure = agent.outcome()
        if failure is not None:
            rendezvous.report_failure(str(failure))
            raise failure
        _raise_if_stopped(run_dir, watch, agent.since)


@dataclass
class _Agent:
    """torchrun's agent in a thread of its own; the ranks die with this thread, which outlives them."""

    module: str
    run_dir: RunDir
    nodes: Nodes
    max_restarts: int
    rendezvous: Rendezvous
    watch: Watch
    private: Path
    since: float = field(default_factory=time.time)
    _exits: list[Exit] = field(default_factory=list)
    _error: BaseException | None = None

    def run(self) -> None:
        try:
            self.rendezvous.gather()
            self.watch.started = True
            self._launch()
        except BaseException as error:
            self._error = error

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch

        # torchrun fills in $ templates in the arguments: a dollar in a path must be doubled
        safe = (
            [SAFE_PATH] if self.module.startswith("gatrain.") else []
        )  # one of the user's own lies in `cwd`
        arguments = [*safe, "-m", self.module, str(self.run_dir.path).replace("$", "$$")]
        try:
            elastic_launch(self._config(), sys.executable)(*arguments)
        except ChildFailedError as error:
            ranks = self.watch
            self._exits = [
                Exit(
                    self.nodes.rank_of(failure.local_rank),
                    failure.pid,
                    failure.exitcode,
                    ranks.died.get(failure.pid, float(failure.timestamp)),
                )
                for failure in error.failures.values()
            ]
            raise

    def _config(self) -> Any:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig

        nodes = self.nodes
        known = {f.name for f in dataclasses.fields(LaunchConfig)}
        newer: dict[str, Any] = {"shutdown_timeout": 120}  # seconds; since torch 2.14
        return LaunchConfig(
            min_nodes=nodes.nnodes,
            max_nodes=nodes.nnodes,
            nproc_per_node=nodes.nproc,
            logs_specs=DefaultLogsSpecs(log_dir=str(self.private / "torchrun")),
            run_id=nodes.run_id,
            role="rank",
            rdzv_backend="c10d",
            rdzv_endpoint=self.rendezvous.endpoint,
            rdzv_configs={
                # names may not resolve: torchrun's own guess of who hosts the store can be "nobody"
                "is_host": nodes.node_rank == 0,
                "join_timeout": int(protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)) + 1,
            },
            max_restarts=self.max_restarts,
            monitor_interval=0.1,
            local_addr=self.rendezvous.own_address,
            **{name: value for name, value in newer.items() if name in known},
        )

    def outcome(self) -> GatrainError | None:
        """What to raise once the thread has ended; None where all ranks ended well or stopped as asked."""
        killed = self.watch.killed
        if self._error is None or self._exits:
            # torchrun takes exit code 0 for success; a library or the user's own os._exit(0) gives it anywhere
            known = {each.pid for each in self._exits}
            self._exits += [
                Exit(state.rank, state.pid, 0, self.watch.died[state.pid])
                for state in self.watch.vanished()
                if state.pid not in known
            ]
        if self._error is None and not self._exits:
            return None
        if self._exits:
            stopping = self.watch.stop_signal is not None
            if stopping and is_only_consequence(self.run_dir, self._exits, killed):
                return None
            cause = first_cause(self.run_dir, self._exits, self.since, killed)
            if cause is None or cause.secondary:
                # the reason is on another node, which needs a moment to end its own ranks and tell
                reason = self.watch.lost or self.rendezvous.await_failure_elsewhere(SURVIVORS_S + 2)
                if reason is not None:
                    return WorkerError(reason)
            return (
                cause.error
                if cause
                else WorkerError(
                    f"the ranks ended and left no report of an error; see the logs in {self.run_dir.logs}"
                )
            )
        if isinstance(self._error, GatrainError):
            return self._error
        if self.watch.lost is not None:
            return WorkerError(self.watch.lost)
        error = LaunchError(
            f"the ranks could not be started: {type(self._error).__name__}: {self._error} "
            f"(details in {self.run_dir.logs / f'launcher_{self.nodes.node_rank}.log'})"
        )
        error.__cause__ = self._error
        return error


def _raise_if_stopped(run_dir: RunDir, watch: Watch, since: float) -> None:
    """Turn a stop, asked of this launcher or agreed on by the ranks, into `Interrupted`."""
    signals = [watch.stop_signal, *(s.signal for s in watch.states.values() if s.state == protocol.STOPPED)]
    signum = next((signum for signum in signals if signum), None)
    if signum is None:
        return
    with contextlib.suppress(RunFolderError, OSError):
        # the signal came while the last step was done: the run is complete
        if (
            run_dir.summary.stat().st_mtime >= since
            and read_json(run_dir.summary).get("status") == "completed"
        ):
            return
    if watch.killed:
        text = f"Stopped by {name_of(signum)}; ranks were killed before they had saved, so the newest "
        raise interrupted(signum, text + "saved state is of an earlier step.")
    raise interrupted(signum, f"Stopped by {name_of(signum)}.")


def _rank_environment(rendezvous: Rendezvous, device: str | None) -> dict[str, str]:
    """Environment for the ranks; torchrun hands them this process's own."""
    if device not in (None, "cpu", "cuda"):
        raise LaunchError(f"device={device!r} is not one of cpu, cuda.")
    fixed = trust.environment() | {
        protocol.NODE_RANK: str(rendezvous.nodes.node_rank),
        protocol.LAUNCHER_PID: str(os.getpid()),
        # with the shared store a restart can hang: new ranks read a dead rank's address (pytorch #135712)
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if device is not None:
        fixed[protocol.DEVICE] = device
    return protocol.defaults_for_ranks(rendezvous.nodes.nproc, rendezvous.own_address) | fixed


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in (*values, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _working_directory(folder: Path | None) -> Iterator[None]:
    # torchrun offers no working directory for its processes; they inherit this process's
    if folder is None:
        yield
        return
    with contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _agent_log(path: Path) -> Iterator[None]:
    """Keep torchrun's messages out of the terminal, in a file of their own."""
    import torch.distributed  # noqa: F401 (it sets up the logger that is changed here)

    logger = logging.getLogger("torch.distributed")
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    previous = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = previous
        handler.close()
