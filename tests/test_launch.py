"""The launcher with real processes: worlds, errors, signals and deaths, on gloo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gatrain import rank as rank_module
from gatrain.causes import user_frames
from gatrain.errors import DataError, Interrupted, LaunchError, WorkerError
from gatrain.launch import protocol
from gatrain.launch.failure import Exit, first_cause
from gatrain.launch.local import run_workers
from gatrain.launch.reasons import describe
from gatrain.launch.world import Nodes
from gatrain.rundir import RunDir, write_json

REPO = Path(__file__).resolve().parents[1]

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from gatrain import rank
from gatrain.errors import DataError

def work(folder, r):
    import torch, torch.distributed as dist
    total = torch.tensor([r.rank + 1.0])
    if r.world_size > 1:
        dist.all_reduce(total)
    facts = {"rank": r.rank, "world": r.world_size, "total": total.item(), "device": str(r.device),
             "omp": os.environ["OMP_NUM_THREADS"], "cwd": os.getcwd(), "pid": os.getpid()}
    print("hello from rank", r.rank, flush=True)
    temporary = folder / f".{r.rank}.tmp"
    temporary.write_text(json.dumps(facts))
    temporary.rename(folder / f"rank_{r.rank}.json")
    mode, _, victim = os.environ.get("TEST_MODE", "").partition(":")
    mine = victim == str(r.rank)
    if mode == "raise" and mine:
        raise DataError("the data is gone")
    if mode == "kill" and mine:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "kill_once" and mine and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "leave" and mine:
        os._exit(0)                # as success, to everybody who counts exit codes
    if mode in ("raise", "kill", "kill_once"):
        dist.all_reduce(total)     # the others wait here for the one that failed
    if mode == "deaf":
        time.sleep(60)
    while mode == "loop" and not r.stop_anywhere():
        time.sleep(0.02)
    if r.stop_requested:
        print("saving", flush=True)
        time.sleep(0.3)
        (folder / f"saved_{r.rank}").write_text(str(r.stop_signal))

if __name__ == "__main__":
    rank.main(work)
"""

PARENT = """
import json, sys
from pathlib import Path
from gatrain.errors import GatrainError
from gatrain.launch.local import run_workers
from gatrain.launch.world import Nodes
try:
    run_workers("the_worker", Path(sys.argv[1]), Nodes(**json.loads(sys.argv[2])), device="cpu")
except GatrainError as error:
    print(json.dumps([type(error).__name__, str(error)]))
    sys.exit(error.exit_code)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory with the worker module in it, and with a name that needs care."""
    home = tmp_path / 'it\'s a "home", $HOME'
    home.mkdir()
    (home / "the_worker.py").write_text(WORKER)
    return home


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def launch(home: Path, mode: str = "", nproc: int = 2, **options: Any) -> Path:
    folder = home / "run, 'one' $$"
    with mock.patch.dict(os.environ, TEST_MODE=mode):
        run_workers("the_worker", folder, Nodes(nproc), device="cpu", cwd=home, **options)
    return folder


@contextlib.contextmanager
def parent(home: Path, folder: Path, mode: str, **nodes: Any) -> Iterator[subprocess.Popen[str]]:
    """A launcher in a process of its own, and nothing left of it afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), json.dumps(nodes)],
        cwd=home,
        env={**os.environ, "TEST_MODE": mode, "TMPDIR": str(home)},  # a killed launcher leaves a folder
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def facts(folder: Path, rank: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"rank_{rank}.json").read_text()))


def wait_until(done: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def ready(folder: Path, ranks: int) -> None:
    wait_until(lambda: all((folder / f"rank_{rank}.json").exists() for rank in range(ranks)))


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that waits for its new parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_two_ranks_form_one_world(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGTERM)
    folder = launch(home)
    for rank in (0, 1):
        seen = facts(folder, rank)
        assert seen["world"] == 2
        assert seen["total"] == 3.0
        assert seen["cwd"] == str(home)
        assert seen["omp"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    out, err = capfd.readouterr()
    assert out == "hello from rank 0\n"
    assert err == ""
    assert "hello from rank 1" in (folder / "logs/rank_1.log").read_text()
    assert (dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGTERM)) == before


def test_the_users_omp_num_threads_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert facts(launch(home, nproc=1), 0)["omp"] == "7"


def test_the_error_of_the_failing_rank_is_raised(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"^the data is gone$"):
        launch(home, "raise:1")
    assert capfd.readouterr() == ("hello from rank 0\n", "")
    folder = home / "run, 'one' $$"
    assert "DataError: the data is gone" in (folder / "logs/rank_1.log").read_text()


def test_a_killed_rank_is_named(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError) as raised:
        launch(home, "kill:1")
    pid = facts(home / "run, 'one' $$", 1)["pid"]
    text = str(raised.value)
    assert text.startswith(f"rank 1 (pid {pid}) was killed by SIGKILL.")
    assert "memory" in text
    assert "logs/rank_1.log" in text
    assert "hello from rank 1" in text
    assert capfd.readouterr().err == ""


def test_a_rank_that_leaves_with_exit_code_0_before_its_work_is_done_has_failed(home: Path) -> None:
    with pytest.raises(WorkerError) as raised:
        launch(home, "leave:1")
    assert re.match(r"rank 1 \(pid \d+\) ended with exit code 0 .*\n.*os\._exit\(0\)", str(raised.value))


def test_a_killed_rank_is_started_again(home: Path) -> None:
    folder = launch(home, "kill_once:1", max_restarts=1)
    assert (folder / "logs/rank_1.log").read_text().count(protocol.LOG_START) == 2


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_stops_and_saves(home: Path, signum: int, code: int) -> None:
    folder = home / "run"
    with parent(home, folder, "loop", nproc=2) as process:
        ready(folder, 2)
        process.send_signal(signum)
        process.send_signal(signum)  # as a terminal and a wrapper such as `uv run` would both do
        out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert json.loads(out.splitlines()[-1])[0] == "Interrupted"
    assert [(folder / f"saved_{rank}").read_text() for rank in (0, 1)] == [str(int(signum))] * 2


def test_a_signal_to_one_rank_stops_all(home: Path) -> None:
    folder = home / "run"
    with parent(home, folder, "loop", nproc=2) as process:
        ready(folder, 2)
        os.kill(facts(folder, 1)["pid"], signal.SIGUSR1)
        assert process.wait(timeout=30) == 143
    assert (folder / "saved_0").exists()


def test_a_closed_terminal_stops_and_saves(home: Path) -> None:
    folder = home / "run"
    master, terminal = os.openpty()
    own_terminal = f"import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{PARENT}"
    process = subprocess.Popen(
        [sys.executable, "-c", own_terminal, str(folder), '{"nproc": 1}'],
        cwd=home,
        env={**os.environ, "TEST_MODE": "loop"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    with process:
        os.close(terminal)
        ready(folder, 1)
        os.close(master)
        assert process.wait(timeout=30) == 143
    assert (folder / "saved_0").read_text() == str(int(signal.SIGHUP))
    assert "saving" in (folder / "logs/rank_0.log").read_text()


def test_a_second_ctrl_c_ends_at_once(home: Path) -> None:
    folder = home / "run"
    with parent(home, folder, "deaf", nproc=1) as process:
        ready(folder, 1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
    wait_until(lambda: not is_running(facts(folder, 0)["pid"]), 2)


def test_ranks_die_with_a_killed_launcher_and_not_before(home: Path) -> None:
    folder = home / "run"
    with parent(home, folder, "loop", nproc=2) as process:
        ready(folder, 2)
        pids = [facts(folder, rank)["pid"] for rank in (0, 1)]
        time.sleep(2)
        assert all(map(is_running, pids))
        process.kill()
        wait_until(lambda: not any(map(is_running, pids)), 2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def two_nodes(port: int) -> tuple[dict[str, Any], dict[str, Any]]:
    shared = {"nproc": 1, "nnodes": 2, "endpoint": f"127.0.0.1:{port}"}
    return {**shared, "node_rank": 0}, {**shared, "node_rank": 1}


def test_two_launchers_form_one_world(home: Path) -> None:
    folder = home / "run"
    first, second = two_nodes(free_port())
    # node 1 starts first: it waits for node 0
    with parent(home, folder, "", **second) as other, parent(home, folder, "", **first) as process:
        assert process.wait(timeout=60) == 0
        assert other.wait(timeout=20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "hello from rank 0\n"
    assert [facts(folder, rank)["total"] for rank in (0, 1)] == [3.0, 3.0]


def test_a_failure_on_one_node_is_told_on_the_other(home: Path) -> None:
    first, second = two_nodes(free_port())
    with (
        parent(home, home / "a", "kill:1", **first) as process,
        parent(home, home / "b", "kill:1", **second) as other,
    ):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == other.wait(timeout=20) == 11
    kind, message = json.loads(out.splitlines()[-1])
    assert kind == "WorkerError"
    assert "node 1 failed: rank 1 (pid" in message


def test_a_port_in_use_is_refused_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        start = time.monotonic()
        for nnodes in (1, 2):
            with pytest.raises(LaunchError, match=f"port {port} is already in use"):
                run_workers("the_worker", tmp_path, Nodes(1, nnodes, 0, f"127.0.0.1:{port}"))
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("node_rank", "text"),
    [(0, "1 of 2 nodes met at .* missing: node rank 1"), (1, "node 0 did not answer at ")],
)
def test_a_missing_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node_rank: int, text: str
) -> None:
    monkeypatch.setenv(protocol.JOIN_TIMEOUT_S, "0.5")
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(LaunchError, match=text):
        run_workers("the_worker", tmp_path, Nodes(1, 2, node_rank, endpoint))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"nproc": 0}, "Use --nproc 1"),
        ({"nproc": 1, "nnodes": 0}, "Use --nnodes 1"),
        ({"nproc": 1, "node_rank": 1}, "only 0 is allowed"),
        ({"nproc": 1, "nnodes": 2, "node_rank": 2, "endpoint": "h:1"}, "0 to 1 is allowed"),
        ({"nproc": 1, "nnodes": 2}, "--rdzv-endpoint HOST:PORT"),
        ({"nproc": 1, "endpoint": "host"}, "is not HOST:PORT"),
        ({"nproc": 1, "endpoint": "::1:80"}, "is not HOST:PORT"),
        ({"nproc": 1, "endpoint": "host:0"}, "between 1 and 65535"),
        ({"nproc": 1, "endpoint": "host:65536"}, "between 1 and 65535"),
        ({"nproc": 1, "endpoint": "host:http"}, "between 1 and 65535"),
        ({"nproc": 1, "run_id": "a/b"}, "run id"),
    ],
)
def test_impossible_worlds_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(LaunchError, match=text):
        Nodes(**arguments)


def test_world_size_and_rank_order() -> None:
    nodes = Nodes(4, 2, 1, "[fe80::1]:29500")
    assert nodes.world_size == 8
    assert [nodes.rank_of(local) for local in range(4)] == [4, 5, 6, 7]


def report(run_dir: RunDir, rank: int, code: int, at: float, secondary: bool = False) -> None:
    data = {"rank": rank, "pid": 100 + rank, "time": at, "exit_code": code, "message": f"error {rank}"}
    write_json(run_dir.rank_error(rank), {**data, "secondary": secondary})


def test_the_first_cause_wins_over_its_consequences(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    report(run_dir, 0, 11, 10.0, secondary=True)
    report(run_dir, 1, 11, 12.0)
    report(run_dir, 2, 4, 5.0)  # of an earlier launch
    exits = [Exit(rank, 100 + rank, 11, 12.0) for rank in (0, 1)] + [Exit(3, 103, -signal.SIGKILL, 13.0)]
    cause = first_cause(run_dir, exits, since=9.0, killed=set())
    assert cause is not None
    assert str(cause.error).startswith("rank 1: error 1")
    report(run_dir, 4, 4, 14.0)
    cause = first_cause(run_dir, exits, since=9.0, killed=set())
    assert cause is not None
    assert isinstance(cause.error, DataError)
    only = first_cause(run_dir, [Exit(3, 103, -signal.SIGKILL, 13.0)], since=20.0, killed={103})
    assert only is None


def test_an_error_of_the_users_code_shows_the_users_lines() -> None:
    def users_model() -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError) as raised:
        users_model()
    code, kind, message = describe(raised.value)
    assert (code, kind) == (11, "ValueError")
    assert message.splitlines()[0] == "ValueError: boom"
    assert f"{__file__}:" in message.splitlines()[-1]
    assert user_frames(raised.value)[-1].name == "users_model"


def test_signals_that_come_together_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = rank_module.StopFlag()
    stop.handle(signal.SIGUSR1, None)
    stop.since -= 100
    stop.handle(signal.SIGTERM, None)  # the time limit after its early notice: the save goes on
    stop.handle(signal.SIGINT, None)
    assert (stop.signum, ended) == (signal.SIGTERM, [])
    stop.since -= 2
    stop.handle(signal.SIGTERM, None)
    assert ended == [143]


def test_interrupted_is_no_class_wide_change() -> None:
    from gatrain.launch.watch import interrupted

    assert interrupted(signal.SIGTERM, "x").exit_code == 143
    assert Interrupted.exit_code == 130
