"""A real Slurm of two nodes on this machine, for tests: its own ports, keys and folders, gone afterwards.

No systemd and no cgroups are needed. Both nodes are this machine under two names that no resolver knows, as
on clusters whose host names do not resolve.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "squeue", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("here1", "here2")

CONFIG = """\
ClusterName=gatrain-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType={accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=5
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=10
"""


def missing() -> str | None:
    """Why no cluster can be started here; None when it can. Installs the packages where CI runs as root."""
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if not absent:
        return None
    if os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"DEBIAN_FRONTEND": "noninteractive", **os.environ}
        subprocess.run(["apt-get", "-qq", "update"], check=True, env=quiet)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *PACKAGES]
        subprocess.run(install, check=True, env=quiet, stdout=subprocess.DEVNULL)
        return None
    return f"no {', '.join(absent)} here: apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"


class SlurmCluster:
    """A context manager; inside it ``SLURM_CONF`` points at the cluster, whose daemons are children here."""

    def __enter__(self) -> SlurmCluster:
        # a short path: the socket's may have 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.folder.chmod(0o755)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._previous = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(self._daemons) > 1:
            subprocess.run(
                ["scancel", "--full", "--user", getpass.getuser()], timeout=20, capture_output=True
            )
            self._wait_for(lambda: not self.jobs(), 15)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name, value in self._previous.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)

    def jobs(self) -> dict[int, str]:
        """State of each job that has not ended, by id."""
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%i %T"], timeout=20, capture_output=True, text=True
        )
        return {int(job): state for job, state in map(str.split, done.stdout.splitlines())}

    def wait_until_done(self, job: int, limit_s: float = 90) -> None:
        """Poll the queue (``sbatch --wait`` pauses longer and longer) until the job has left it."""
        if not self._wait_for(lambda: job not in self.jobs(), limit_s):
            raise TimeoutError(f"job {job} is still {self.jobs().get(job)} after {limit_s} s")

    def wait_until(self, job: int, state: str, limit_s: float = 60) -> None:
        """Poll the queue until the job has this state, such as ``RUNNING``."""
        if not self._wait_for(lambda: self.jobs().get(job) == state, limit_s):
            raise TimeoutError(f"job {job} is {self.jobs().get(job)}, not {state}, after {limit_s} s")

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for name in (*NODES, "controller"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(self._config())
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid"}
        files |= {"log-file": munge / "log", "seed-file": munge / "seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        if not self._wait_for((munge / "socket").exists, 10):
            raise RuntimeError(f"munged did not start: {(self.folder / 'munged.out').read_text()}")
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name, log=name)
        if not self._wait_for(self._all_idle, 30):
            logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.out")]
            raise RuntimeError("the nodes of the test's Slurm did not become idle\n" + "\n".join(logs))

    def _config(self) -> str:
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 "
            "Feature=new,fast State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
        release = tuple(map(int, version.split()[-1].split(".")[:2]))
        if release >= (24, 5):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        return CONFIG.format(
            host=host,
            controller_port=ports[0],
            user=getpass.getuser(),
            folder=self.folder,
            # the name that means "none" went away
            accounting="accounting_storage/none" if release < (23, 11) else "",
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )

    def _daemon(self, program: str, *arguments: str, log: str | None = None) -> None:
        with open(self.folder / f"{log or program}.out", "wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], stdout=output, stderr=output, stdin=subprocess.DEVNULL
                )
            )

    def _all_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N %T"], timeout=20, capture_output=True, text=True
        )
        return sorted(done.stdout.split()) == sorted([*NODES, "idle", "idle"])

    @staticmethod
    def _wait_for(done: Callable[[], bool], limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
