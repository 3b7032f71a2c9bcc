"""Processes that torchrun has already started (Kubeflow, TorchX and SkyPilot do it too) become one run.

The first process of each node does there what `gatrain launch` does, with the world that torchrun's variables
name: it plans, starts this node's ranks and passes signals on. The node's other processes wait for it and end
with its exit code, so that torchrun sees one outcome. They meet in a folder of this user and this torchrun:

    leader.json   the first process's pid; trusted only while that process lives
    exit_PID      its exit code
    seen_PID_N   local rank N has read it
    run_dir       the run folders, one a line: what a restart by torchrun goes on with
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from gatrain.errors import LaunchError, WorkerError
from gatrain.launch import protocol
from gatrain.launch.net import address_towards
from gatrain.launch.watch import process_exists

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")
POLL_S = 0.05
PATIENCE_S = 120.0
"""Seconds that a node's processes wait for one another at the start and at the end."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class TorchrunWorld:
    """The world as torchrun described it to this process. Every node has the same number of processes."""

    local_rank: int
    nproc: int | None
    """Processes on each node; None where there is one, which starts a rank for each GPU."""
    node_rank: int
    nnodes: int
    address: str
    """``MASTER_ADDR`` and ``port``: torchrun's own store where ``has_store``, else free for ours."""
    port: int
    has_store: bool
    run_id: str
    attempt: int = 0
    """How often torchrun has restarted the processes."""
    is_last_attempt: bool = True

    @property
    def others(self) -> range:
        """Local ranks of this node's processes beside the first."""
        return range(1, self.nproc or 1)

    @property
    def is_named(self) -> bool:
        """Whether ``run_id`` tells this world from others (``--rdzv-id``): torchrun's default is ``none``."""
        return self.run_id not in ("none", "env", "")

    @property
    def folder(self) -> Path:
        """Where this node's processes meet."""
        key = f"{self.run_id} {self.address} {self.port} {self.node_rank}"
        name = f"gatrain-torchrun-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return Path(tempfile.gettempdir()) / name

    def earlier_runs(self) -> list[Path]:
        """The run folders of the attempts before this one, which torchrun has restarted, the newest first."""
        if not self.attempt:
            return []
        with contextlib.suppress(OSError):
            lines = (
                (self.folder / "run_dir").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            )
            return [Path(line) for line in reversed(lines)]
        return []

    def note_run(self, run_dir: Path) -> None:
        """Remember the run folder for a restart by torchrun."""
        with contextlib.suppress(OSError), (self.folder / "run_dir").open("ab") as file:
            file.write(os.fsencode(run_dir) + b"\n")

    def endpoint(self) -> str | None:
        """Where this world's nodes meet, the same on each of them; None for one node. Node 0 chooses.

        Raises:
            LaunchError: torchrun's store does not answer.
        """
        if self.nnodes == 1:
            return None
        if not self.has_store:
            return _joined(self.address, self.port)
        key = f"gatrain/{self.run_id}/{self.attempt}/endpoint"
        store = _open_store(self.address, self.port)
        try:
            if self.node_rank == 0:
                store.set(key, _joined(self._own_address(), _free_port()))
            return str(store.get(key).decode())
        except RuntimeError as error:
            raise LaunchError(
                f"node 0 gave no endpoint through torchrun's store at {self.address}:{self.port}: {error}"
            ) from error

    def _own_address(self) -> str:
        """Node 0's as the others see it: torchrun may host its store on another node."""
        own = address_towards(self.address, self.port)
        return self.address if ipaddress.ip_address(own).is_loopback else own


def is_left_over(environ: Mapping[str, str]) -> bool:
    """Whether a rank's variables are there that no launcher sets like this: they stayed from another program.

    torchrun tells how many processes a node has, and a cluster that starts one process in each pod numbers no
    processes within it.
    """
    return "LOCAL_RANK" in environ and not {"LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & environ.keys()


def detect(environ: Mapping[str, str]) -> TorchrunWorld | None:
    """Read torchrun's variables; None where this process is not one of several that somebody started.

    Raises:
        LaunchError: the variables name a world that cannot be joined.
    """
    if protocol.LAUNCHER_PID in environ or not {"RANK", "WORLD_SIZE"} <= environ.keys():
        return None
    is_torchrun = "TORCHELASTIC_RUN_ID" in environ
    world_size = _number(environ, "WORLD_SIZE")
    if not is_torchrun and (world_size == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys()):
        return None
    rank = _number(environ, "RANK")
    if (
        "LOCAL_RANK" not in environ and not is_torchrun
    ):  # one process in each pod, which starts the ranks there
        address, port = environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
        return TorchrunWorld(0, None, rank, world_size, address, port, has_store=False, run_id="env")
    if "LOCAL_WORLD_SIZE" not in environ:
        raise LaunchError(
            f"RANK={rank} and WORLD_SIZE={world_size} say that this is one of {world_size} processes, but "
            "LOCAL_WORLD_SIZE, how many are on this node, is not set. Start them with torchrun, or start "
            "one gatrain without these variables: it starts its ranks itself."
        )
    nproc = _number(environ, "LOCAL_WORLD_SIZE")
    if not 0 < nproc <= world_size or world_size % nproc or not 0 <= rank < world_size:
        raise LaunchError(
            f"RANK={rank}, WORLD_SIZE={world_size} and LOCAL_WORLD_SIZE={nproc} are no world of equal nodes. "
            "Give every node the same --nproc-per-node."
        )
    local_rank = rank % nproc  # torchrun numbers a node's ranks in one piece
    if _number(environ, "LOCAL_RANK") != local_rank:
        raise LaunchError(
            f"LOCAL_RANK={environ['LOCAL_RANK']} does not fit RANK={rank} with {nproc} processes on a node. "
            "torchrun --virtual-local-rank shows each process one GPU only: leave it out, gatrain gives "
            "every rank its own."
        )
    return TorchrunWorld(
        local_rank=local_rank,
        nproc=nproc,
        node_rank=rank // nproc,
        nnodes=world_size // nproc,
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT"),
        has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true",
        run_id=environ.get("TORCHELASTIC_RUN_ID", "env"),
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        is_last_attempt=environ.get("TORCHELASTIC_RESTART_COUNT") == environ.get("TORCHELASTIC_MAX_RESTARTS"),
    )


def forget(environ: MutableMapping[str, str]) -> None:
    """Take torchrun's variables out: the processes that are started from here form a world of their own."""
    threads = environ.get("OMP_NUM_THREADS")
    if threads == "1" and "TORCHELASTIC_RUN_ID" in environ and not _parent_has("OMP_NUM_THREADS"):
        del environ["OMP_NUM_THREADS"]  # torchrun's own default, not the user's
    for name in list(environ):
        if name in VARIABLES or name.startswith(PREFIXES):
            del environ[name]


def lead(world: TorchrunWorld, work: Callable[[], int]) -> int:
    """Run ``work`` on this node's first process, and let the others end with its exit code, which is returned."""
    folder, pid = _own_folder(world), os.getpid()
    if world.attempt == 0:
        (folder / "run_dir").unlink(missing_ok=True)
    for path in (*folder.glob("exit_*"), *folder.glob("seen_*")):
        path.unlink(missing_ok=True)
    _write(folder / "leader.json", json.dumps({"pid": pid}))
    code = work()
    for signum in SIGNALS:  # the work is done: all end with its code
        signal.signal(signum, signal.SIG_IGN)
    _write(folder / f"exit_{pid}", str(code))
    deadline = time.monotonic() + PATIENCE_S
    seen = [folder / f"seen_{pid}_{local_rank}" for local_rank in world.others]
    while time.monotonic() < deadline and not all(path.exists() for path in seen):
        time.sleep(POLL_S)
    if code == 0 or world.is_last_attempt:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def follow(world: TorchrunWorld) -> int:
    """Wait on one of a node's other processes for the first one, and return its exit code.

    Signals are ignored: torchrun sends them to the first one too, which saves before it ends.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    folder = _own_folder(world)
    missing_since = time.monotonic()
    while True:
        pid = _leader(folder)
        if pid is not None:
            missing_since = time.monotonic()
            while (code := _exit_code(folder, pid)) is None and process_exists(pid):
                time.sleep(POLL_S)
            code = _exit_code(folder, pid) if code is None else code  # written just before the end
            if code is not None:
                with contextlib.suppress(OSError):
                    (folder / f"seen_{pid}_{world.local_rank}").touch()
                return code
            print(f"gatrain: process {pid}, which started this node's ranks, is gone.", file=sys.stderr)
            return WorkerError.exit_code
        if time.monotonic() > missing_since + PATIENCE_S:
            print(f"gatrain: this node's local rank 0 did not appear in {folder}.", file=sys.stderr)
            return LaunchError.exit_code
        time.sleep(POLL_S)


def _leader(folder: Path) -> int | None:
    """Pid of the living first process; an older torchrun may have left its own."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        pid = int(json.loads((folder / "leader.json").read_text())["pid"])
        return pid if process_exists(pid) else None
    return None


def _exit_code(folder: Path, pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / f"exit_{pid}").read_text())
    return None


def _own_folder(world: TorchrunWorld) -> Path:
    """Make the folder; nobody else may have made it, or be able to write there."""
    folder = world.folder
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise LaunchError(
            f"{folder} belongs to somebody else. Remove it, or set TMPDIR to a folder of yours."
        )
    return folder


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _open_store(host: str, port: int) -> TCPStore:
    import torch.distributed  # noqa: F401 (the next line needs it loaded)
    from torch._C._distributed_c10d import TCPStore  # torch.distributed.TCPStore, typed

    seconds = protocol.seconds(protocol.JOIN_TIMEOUT_S, 300)
    try:
        return TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except RuntimeError as error:
        raise LaunchError(f"torchrun's store at {host}:{port} does not answer: {error}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parent_has(name: str) -> bool:
    """Whether torchrun itself was started with the variable; True where that cannot be read."""
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(f"{name}=".encode()) for entry in entries)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise LaunchError(f"{name}={text!r} is not a number. Start gatrain with torchrun, or unset {name}.")
    return int(text)
