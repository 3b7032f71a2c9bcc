"""What every rank process does around its work: set-up, signals, error reports, a clean end.

A module that is started as ``python -m MODULE FOLDER`` on each rank ends with

    if __name__ == "__main__":
        rank.main(work)

Exit codes: 0 when ``work`` returned, also after a stop that was asked for (the launcher knows from the
rank's state file); the code of the `GatrainError` that it raised; 11 for any other error; without a launcher
128 + n on a second signal.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from gatrain import imports, offspring
from gatrain.errors import (
    EXIT_CODES,
    GatrainError,
    Interrupted,
    LaunchError,
    RunFolderError,
    WorkerError,
)
from gatrain.hardware import rank_device
from gatrain.launch import protocol
from gatrain.launch.net import listen
from gatrain.launch.reasons import describe, is_consequence
from gatrain.launch.world import TorchrunEnv
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.secrets import hide

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import TCPStore

SAME_SIGNAL_S = 1.0
"""Signals this close count as one."""

_log = logging.getLogger(__name__)


@dataclass
class StopFlag:
    """Set by a signal handler and read by the work; nothing is interrupted."""

    signum: int | None = None
    since: float = 0.0
    on_hangup: Callable[[], None] | None = None
    has_launcher: bool = False
    """The launcher counts signals and ends what must end at once. Here a second one says nothing: a scheduler
    signals the ranks too, and the launcher passes its own on much later, perhaps."""
    pause_file: Path | None = None
    wants_pause: bool = False
    """The launcher is about to stop, as at Ctrl-Z."""

    def install(self) -> None:
        for signum in offspring.handled():
            signal.signal(signum, self.handle)
        if self.pause_file is not None and offspring.handled([signal.SIGTSTP]):
            signal.signal(signal.SIGTSTP, self.handle_pause)

    def handle_pause(self, signum: int, frame: FrameType | None) -> None:
        self.wants_pause = True

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP and self.on_hangup is not None:
            self.on_hangup()
        # SIGUSR1 is an early notice: the SIGTERM that follows at the limit must not cut the save short
        if self.signum in (None, signal.SIGUSR1):
            self.signum, self.since = signum, time.monotonic()
        elif time.monotonic() - self.since >= SAME_SIGNAL_S and not self.has_launcher:
            os._exit(128 + signum)


@dataclass
class Rank:
    """This process within the world, and whether it was asked to stop."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    stop: StopFlag = field(default_factory=StopFlag)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes for all."""
        return self.rank == 0

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was told to stop: by a signal, or by another rank through `stop_anywhere`."""
        return self.stop.signum is not None

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked for the stop."""
        return self.stop.signum

    def request_stop(self, signum: int = signal.SIGTERM) -> None:
        """Note that the world agreed to stop, so that this rank's launcher reports a stop too."""
        if self.stop.signum is None:
            self.stop.signum, self.stop.since = signum, time.monotonic()

    @property
    def pause_requested(self) -> bool:
        """Whether the launcher is about to stop: let all ranks `pause` together, where none waits for another."""
        return self.stop.wants_pause

    def pause(self) -> None:
        """Stop here until the launcher lets this rank go on, which is at once where it did not ask."""
        if self.stop.pause_file is not None and self.stop.pause_file.exists():
            if self.device.type == "cuda":
                import torch

                torch.cuda.synchronize(self.device)
            os.kill(os.getpid(), signal.SIGSTOP)
        self.stop.wants_pause = False

    def stop_anywhere(self) -> bool:
        """Whether any rank was told to stop; then every rank's flag is set.

        A collective on host memory (gloo): every rank must call it, at the same point of its work.
        """
        if self.world_size == 1:
            if self.pause_requested:
                self.pause()
            return self.stop_requested
        import torch
        import torch.distributed as dist

        flags = torch.tensor([self.stop.signum or 0, self.pause_requested])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        signum, pauses = flags.tolist()
        if pauses:
            self.pause()
        if signum:
            self.request_stop(signum)
        # a signal that came meanwhile waits for the next call: the others have not heard of it
        return bool(signum)


def main(work: Callable[[Path, Rank], None]) -> NoReturn:
    """Run ``work(folder, rank)`` as this rank of the world, then end the process.

    The folder is the only command-line argument. Ranks other than 0 write to ``logs/rank_N.log`` from the
    start; rank 0 keeps the console, and its log records and warnings go to ``logs/rank_0.log``. With more
    than one rank the default process group exists while ``work`` runs: gloo for CPU tensors, NCCL for CUDA
    tensors. An exception of ``work`` becomes ``logs/error_rank_N.json``, which the launcher reads.
    """
    if len(sys.argv) != 2:
        sys.exit(
            "usage: python -m MODULE FOLDER (gatrain starts this; use `gatrain fit` or `gatrain launch`)"
        )
    offspring.die_with_parent()
    imports.use_working_folder()
    env, run_dir = TorchrunEnv.read(os.environ), RunDir(Path(sys.argv[1]))
    folder = os.environ.get(protocol.RANK_STATE)
    state_folder = Path(folder) if folder else None
    stop = StopFlag(has_launcher=offspring.PARENT_PID in os.environ)
    if state_folder is not None:
        stop.pause_file = state_folder / protocol.PAUSE
    if state_folder is not None and not state_folder.is_dir():
        os._exit(0)  # the launcher gave up before this process was ready
    stop.install()
    try:
        _write_state(state_folder, env.rank, protocol.RUNNING)
        _end_if_hopeless(run_dir.rank_error(env.rank))
        _redirect(run_dir, env.rank, stop)
        rank = _join_world(env, stop, run_dir.rank_log(env.rank))
        with contextlib.suppress(Interrupted):  # another way of saying "stopped as asked"
            work(run_dir.path, rank)
        _write_state(state_folder, env.rank, protocol.STOPPED if stop.signum else protocol.DONE, stop.signum)
        _leave_world()
    except BaseException as error:  # also sys.exit(0): only work that returns is done
        _fail(error, run_dir, env.rank)
    # Exit handlers of libraries run, but a thread of theirs that never ends must not keep the world waiting.
    _exit_within(10.0)
    for signum in offspring.STOP_SIGNALS:  # the work is done and said to be: nothing is left to stop
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            OSError, ValueError, AttributeError
        ):  # full, or closed by the user's own code
            stream.flush()
    # native threads that outlive the interpreter have been seen to abort a process that had succeeded
    os._exit(0)


def _write_state(folder: Path | None, rank: int, state: str, signum: int | None = None) -> None:
    if folder is not None:
        protocol.write_rank_state(folder, protocol.RankState(os.getpid(), rank, state, signum))


def _exit_within(limit_s: float) -> None:
    watchdog = threading.Timer(limit_s, os._exit, (0,))
    watchdog.daemon = True
    watchdog.start()


def _end_if_hopeless(report: Path) -> None:
    """On a restart, end at once where the last attempt failed with an error that a restart cannot cure."""
    if report.exists() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        with contextlib.suppress(RunFolderError):
            code = read_json(report).get("exit_code")
            if code in EXIT_CODES and code not in (GatrainError.exit_code, WorkerError.exit_code):
                os._exit(code)
    report.unlink(missing_ok=True)


def _redirect(run_dir: RunDir, rank: int, stop: StopFlag) -> None:
    """Send output where it belongs, below Python, so that C++ libraries and crashes land there too."""
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    path = run_dir.rank_log(rank)
    log = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (open until the process ends)

    def to_log() -> None:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    if rank != 0:
        to_log()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    else:
        stop.on_hangup = to_log  # the terminal is gone: writing to it would fail while the state is saved
    log.write(f"{protocol.LOG_START} rank {rank}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    faulthandler.enable(log, all_threads=False)
    handler = logging.StreamHandler(log)
    handler.setFormatter(_HidingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


class _HidingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


@contextlib.contextmanager
def stdout_to(path: Path) -> Iterator[None]:
    """Send standard output to the end of a file for a while, also what C++ libraries write there.

    Standard output may be one JSON object for a script; gloo, in some versions of torch, greets its peers on it.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(path, "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _join_world(env: TorchrunEnv, stop: StopFlag, log: Path) -> Rank:
    device = rank_device(os.environ.get(protocol.DEVICE), env.local_rank, env.local_world_size)
    if env.world_size > 1:
        import torch.distributed as dist

        # Every rank of the world takes part. The store is given, not found through the environment, because
        # ranks are numbered differently from torchrun's (see TorchrunEnv): its server may be on another than 0.
        timeout = timedelta(seconds=protocol.seconds(protocol.TIMEOUT_S, 600))
        with stdout_to(log):
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=_open_store(env, timeout),
                rank=env.rank,
                world_size=env.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        os.environ["RANK"] = str(env.rank)
    return Rank(**vars(env), device=device, stop=stop)


def _open_store(env: TorchrunEnv, timeout: timedelta) -> TCPStore:
    """Open the key-value store of the world; on one node it listens to this machine only."""
    from torch._C._distributed_c10d import TCPStore  # torch.distributed.TCPStore, typed

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] != "0":
        return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    one_node = env.world_size == env.local_world_size
    try:
        listener = listen("127.0.0.1" if one_node else "", port)
    except OSError as error:
        raise LaunchError(
            f"port {port}, chosen for the ranks, was taken meanwhile ({error}). Start again."
        ) from error
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _leave_world() -> None:
    # No barrier: a rank that ends late, or never, must not hold the others.
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _fail(error: BaseException, run_dir: RunDir, rank: int) -> NoReturn:
    """Report the error and end at once: threads waiting in a collective would block a normal exit."""
    code = WorkerError.exit_code
    try:
        now, full = time.time(), hide("".join(traceback.format_exception(error)))
        code, kind, message = describe(error)
        message = hide(message)
        _log.error("rank %d failed\n%s", rank, full)
        report = {
            "rank": rank,
            "pid": os.getpid(),
            "time": now,
            "exit_code": code,
            "kind": kind,
            "message": message,
            "secondary": is_consequence(error),
            "traceback": full,
        }
        write_json(run_dir.rank_error(rank), report)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
