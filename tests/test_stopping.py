"""Signals, kills and what is left: everything that a command has started ends, stops and goes on with it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from processes import Place, state_of, wait_until

from gatrain import scratch
from gatrain.cli.terminal import Terminable
from gatrain.launch.watch import SCHEDULERS, Watch
from gatrain.rank import StopFlag

LOOK = """
import os, subprocess, sys, time
from filelock import FileLock
FileLock("cache.lock").acquire()
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])  # the user's own helper
open("looking", "w").close()
time.sleep(600)
"""
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from gatrain import offspring, rank

class Points:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        time.sleep(0.05)
        return index

def work(folder, r):
    import torch
    mode = os.environ["MODE"]
    if mode == "children" and r.rank == 0:
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        loader = torch.utils.data.DataLoader(Points(), num_workers=1, worker_init_fn=offspring.follow_parent)
        items = iter(loader)
        next(items)
    (folder / f"ready_{r.rank}").write_text(str(os.getpid()))
    steps = 0
    while not (stop := r.stop_anywhere() if mode != "deaf" else False):
        steps += 1
        (folder / f"steps_{r.rank}").write_text(str(steps))
        time.sleep(4 if mode == "long" else 0.5 if mode == "unequal" and r.rank else 0.02)
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
    run_workers("the_worker", Path("run"), Nodes(int(sys.argv[1])), device="cpu")
except GatrainError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    (tmp_path / "the_worker.py").write_text(WORKER)
    yield place
    place.end()


def launched(place: Place, mode: str, nproc: int = 1, **options: Any) -> subprocess.Popen[str]:
    """A launcher whose ranks are at work."""
    process = place.start("-c", PARENT, str(nproc), MODE=mode, **options)
    run = place.folder / "run"
    wait_until(
        lambda: all((run / f"steps_{rank}").exists() for rank in range(nproc)) or process.poll() is not None,
        90,
    )
    assert process.poll() is None, place.said()
    return process


def pid_of(place: Place, rank: int) -> int:
    return int((place.folder / "run" / f"ready_{rank}").read_text())


def steps_of(place: Place, rank: int) -> int:
    return int((place.folder / f"run/steps_{rank}").read_text() or 0)


def nothing_is_left(place: Place, limit_s: float = 4) -> None:
    wait_until(lambda: not place.processes(), limit_s)
    assert place.left() == []


# --- before training ------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGHUP, 143),
        (signal.SIGUSR1, 143),
        (signal.SIGINT, 130),
        (signal.SIGQUIT, -signal.SIGQUIT),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_look_that_is_ended_leaves_nothing_whatever_the_user_has_started(
    place: Place, signum: int, code: int
) -> None:
    (place.folder / "mine.py").write_text(LOOK)
    words = ["data._target_=mine.points", "batch.micro=2", "run.dir=a/run"]
    process = place.start("-m", "gatrain", "fit", "recipe=vision", *words)
    wait_until((place.folder / "looking").exists)
    assert place.processes("time.sleep(600)")
    process.send_signal(signum)
    assert process.wait(10) == code
    nothing_is_left(place)
    assert not (place.folder / "a").exists()
    with FileLock(place.folder / "cache.lock", timeout=1):  # the cache's, say
        pass
    if code == 143:
        assert place.said().strip().endswith(f"stopped by {signal.Signals(signum).name}.")
    assert "Traceback" not in place.said()


@pytest.mark.chaos
def test_killed_trials_leave_nothing(place: Place) -> None:
    words = ["recipe=vision", "batch.effective=64", "run.dir=run", "tune.max_seconds=60"]
    process = place.start("-m", "gatrain", "fit", "--retune", *words)
    wait_until(lambda: list(place.tmp.glob("gatrain_tune_*")) or process.poll() is not None, 120)
    assert process.poll() is None, place.said()
    process.kill()
    process.wait()
    nothing_is_left(place)
    assert not (place.folder / "run").exists()


SLOW = """
import os, time
import torch
class Points(torch.utils.data.Dataset):
    def __len__(self):
        if "TORCHELASTIC_RUN_ID" in os.environ and not os.path.exists("preparing"):
            open("preparing", "w").close()
            time.sleep(3)
        return 64
    def __getitem__(self, index):
        return torch.randn(6), index % 3
def net():
    return torch.nn.Linear(6, 3)
"""


@pytest.mark.chaos
def test_a_stop_while_a_rank_prepares_takes_no_step_and_leaves_no_run(place: Place) -> None:
    (place.folder / "mine.py").write_text(SLOW)
    (place.folder / "r.yaml").write_text(
        "defaults: [base, _self_]\nmodel: {_target_: mine.net}\ndata: {_target_: mine.Points}\n"
        "loss: {_target_: torch.nn.CrossEntropyLoss}\nbatch: {effective: 8, micro: 4}\nprecision: fp32\n"
    )
    process = place.start("-m", "gatrain", "fit", "recipe=r.yaml", "run.dir=run", "train.steps=100000")
    wait_until(lambda: (place.folder / "preparing").exists() or process.poll() is not None, 90)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 143, place.said()
    assert "Stopped by SIGUSR1." in place.said()
    nothing_is_left(place)
    assert not (place.folder / "run").exists()


# --- in training ----------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_killed_launcher_leaves_no_process_and_no_folder(place: Place) -> None:
    """Nor a loader process, nor what the user's own code has started."""
    process = launched(place, "children", 2)
    assert len(place.processes("-m the_worker")) == 3  # one reads samples
    process.kill()
    process.wait()
    nothing_is_left(place)


@pytest.mark.chaos
def test_loader_processes_end_with_a_killed_rank(place: Place) -> None:
    launched(place, "children")
    rank = pid_of(place, 0)
    (loader,) = set(place.processes("-m the_worker")) - {rank}
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: state_of(loader) in "ZX", 1.5)


@pytest.mark.chaos
def test_ctrl_z_stops_the_ranks_and_they_go_on_with_their_launcher(place: Place) -> None:
    """However long: rank 0 mostly waits in a collective for rank 1, which may take two seconds here."""
    process = launched(place, "unequal", 2, GATRAIN_TIMEOUT_S="5")
    pids = [process.pid, pid_of(place, 0), pid_of(place, 1)]
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: {state_of(pid) for pid in pids} == {"T"}, 5)
    steps = steps_of(place, 1)
    time.sleep(7)
    assert steps_of(place, 1) == steps
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: steps_of(place, 1) > steps + 3, 10)
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: {state_of(pid) for pid in pids} == {"T"}, 5)
    process.kill()  # stopped ones die, too
    process.wait()
    nothing_is_left(place)


@pytest.mark.chaos
def test_what_nohup_and_background_shells_ignore_stays_ignored(place: Place) -> None:
    process = launched(place, "loop", ignored=(signal.SIGHUP, signal.SIGINT))
    rank = pid_of(place, 0)
    for pid in (process.pid, rank):
        for signum in (signal.SIGHUP, signal.SIGINT):
            os.kill(pid, signum)
    time.sleep(0.5)
    before = steps_of(place, 0)
    wait_until(lambda: steps_of(place, 0) > before, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (place.folder / "run/saved_0").read_text() == str(int(signal.SIGTERM))


@pytest.mark.chaos
def test_a_launchers_signal_long_after_a_ranks_is_the_first_one(place: Place) -> None:
    process = launched(place, "long", 2)
    os.kill(pid_of(place, 1), signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert [(place.folder / f"run/saved_{rank}").exists() for rank in (0, 1)] == [True, True]
    assert place.said().strip() == "Stopped by SIGTERM."
    nothing_is_left(place)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("first", "second", "code", "words"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143, "by the second SIGTERM; nothing was saved"),
        (signal.SIGUSR1, signal.SIGTERM, 143, "by SIGUSR1, then SIGTERM; nothing was saved"),
        (signal.SIGTERM, signal.SIGINT, 130, "by SIGTERM, then Ctrl-C; nothing was saved"),
        (signal.SIGINT, signal.SIGINT, 130, "by the second Ctrl-C; nothing was saved"),
    ],
)
def test_a_second_signal_ends_at_once_and_leaves_nothing(
    place: Place, first: int, second: int, code: int, words: str
) -> None:
    process = launched(place, "deaf")
    process.send_signal(first)
    time.sleep(0.8)
    assert process.poll() is None
    rank = pid_of(place, 0)
    process.send_signal(second)
    wait_until(
        lambda: state_of(rank) in "ZX", 3
    )  # a tenth on a machine with time to spare; it never ends by itself
    assert process.wait(20) == code
    assert words in place.said()
    assert "terminate called" not in place.said()
    nothing_is_left(place)


@pytest.mark.chaos
def test_sigint_to_one_rank_within_an_evaluation_saves_first_and_is_told_as_ctrl_c(place: Place) -> None:
    """One rank alone knows of it; the others leave the evaluation with it."""
    (place.folder / "mine.py").write_text(
        SLOW
        + """
from gatrain.tasks import Supervised
class Task(Supervised):
    def loss_sum(self, model, batch):
        if not model.training:
            open("evaluating", "w").close()
            time.sleep(1)
        return super().loss_sum(model, batch)
"""
    )
    (place.folder / "r.yaml").write_text(
        "defaults: [base, _self_]\nmodel: {_target_: mine.net}\ndata: {_target_: mine.Points}\n"
        "task: {_target_: mine.Task, eval_fraction: 0.9}\nbatch: {effective: 4, micro: 1}\nprecision: fp32\n"
        "train: {steps: 100000, check: 'off'}\neval: {every: 3}\nsave: {every: 0}\n"
    )
    process = place.start("-m", "gatrain", "launch", "--nproc", "2", "recipe=r.yaml", "run.dir=run")
    wait_until(lambda: (place.folder / "evaluating").exists() or process.poll() is not None, 90)
    (rank,) = [
        pid
        for pid in place.processes("gatrain.worker")
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(rank, signal.SIGINT)
    assert process.wait(20) == 130, place.said()  # the whole evaluation takes half a minute
    assert "Stopped by Ctrl-C." in place.said()
    assert [path.name for path in (place.folder / "run/saved").iterdir()] == ["step_00000003"]
    nothing_is_left(place)


# --- which signal means what ----------------------------------------------------------------------------


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    for name in SCHEDULERS:
        monkeypatch.delenv(name, raising=False)
    meeting: Any = None
    return Watch(tmp_path, meeting, 120)


def second(watch: Watch, first: int, then: int) -> bool:
    """Whether the launcher ends at once."""
    watch._handle(first, None)
    watch.stop_since -= 10
    watch._handle(then, None)
    return watch.kill_signal is not None


HUP, INT, TERM, USR1 = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(
    "pair", [(TERM, TERM), (INT, INT), (TERM, INT), (INT, TERM), (USR1, TERM), (HUP, INT)]
)
def test_who_insists_is_obeyed(watch: Watch, pair: tuple[int, int]) -> None:
    assert second(watch, *pair)


@pytest.mark.parametrize(
    "pair", [(HUP, HUP), (HUP, TERM), (TERM, HUP), (TERM, USR1), (USR1, USR1), (USR1, HUP)]
)
def test_what_machines_send_one_after_another_cuts_no_save_short(watch: Watch, pair: tuple[int, int]) -> None:
    assert not second(watch, *pair)


@pytest.mark.parametrize("pair", [(USR1, TERM), (INT, TERM)])
def test_a_schedulers_limit_after_its_notice_cuts_no_save_short(
    watch: Watch, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not second(watch, *pair)


def test_signals_that_come_together_are_one(watch: Watch) -> None:
    watch._handle(TERM, None)
    watch._handle(TERM, None)
    assert watch.kill_signal is None


def test_a_rank_leaves_counting_to_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for has_launcher in (True, False):
        stop = StopFlag(has_launcher=has_launcher)
        stop.handle(TERM, None)
        stop.since -= 10
        stop.handle(TERM, None)
        assert bool(ended) is not has_launcher


def test_a_command_takes_signals_that_were_not_ignored_at_its_start() -> None:
    before = signal.getsignal(HUP), signal.getsignal(USR1)
    try:
        signal.signal(HUP, signal.SIG_IGN)
        stop = Terminable()
        with stop:
            assert signal.getsignal(HUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(USR1)
        assert stop.asked == USR1
    finally:
        signal.signal(HUP, before[0])
    assert signal.getsignal(USR1) == before[1]


def test_tests_start_processes_that_ignore_nothing() -> None:
    code = "import signal; print([s.name for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ignored = set(json.loads(done.stdout.replace("'", '"')))
    assert ignored <= {"SIGPIPE", "SIGXFSZ", "SIGXFZ"}  # Python's own


@pytest.mark.chaos
def test_the_tests_pass_under_nohup_without_a_terminal(place: Place) -> None:
    """That of a closed terminal waited for ever for a signal that nohup had made its launcher ignore."""
    ignored = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT)
    named = f"{Path(__file__).parent}/test_launch.py::test_a_closed_terminal_stops_and_saves"
    process = place.start("-m", "pytest", "-q", "-p", "no:cacheprovider", named, ignored=ignored)
    assert process.wait(120) == 0, place.said()


# --- temporary folders ----------------------------------------------------------------------------------


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_swept", set())
    return tmp_path


def dead(parent: Path, prefix: str) -> Path:
    """A folder whose owner was killed, guardian and all."""
    code = (
        "import os, signal; from pathlib import Path; from gatrain import guardian, scratch; "
        "guardian._tell = lambda *words: None; scratch.sweep = lambda parent: None; "
        f"print(scratch.make({prefix!r}, Path({str(parent)!r})), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return Path(done.stdout.strip())


def test_the_next_start_sweeps_what_dead_owners_have_left(tmp: Path) -> None:
    left = [dead(tmp, prefix) for prefix in ("gatrain_", "gatrain_host_")]
    (left[0] / "sub").mkdir()
    (left[0] / "sub/file").write_text("x")
    mine = scratch.make("gatrain-inspect-")
    assert not any(folder.exists() for folder in left)
    assert mine.exists()
    scratch.remove(mine)
    assert list(tmp.iterdir()) == []


def test_folders_of_the_living_of_others_and_of_nobody_known_are_left_alone(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = scratch.make("gatrain_tune_")
    lock = os.open(tmp / "held", os.O_CREAT | os.O_RDWR)
    foreign = tmp / "gatrain_other"  # of another process: this one's locks would not tell
    foreign.mkdir()
    os.link(tmp / "held", foreign / scratch.OWNER)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unknown = tmp / "gatrain_1234abcd"
    unknown.mkdir()
    target = dead(tmp, "gatrain_")
    moved = target.rename(tmp / "elsewhere")
    (tmp / "gatrain_link").symlink_to(moved)
    users = dead(tmp, "gatrain_")
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    monkeypatch.setattr(scratch, "_swept", set())
    scratch.sweep()
    assert users.exists()  # not ours
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp))
    monkeypatch.setattr(scratch, "_swept", set())
    scratch.sweep()
    assert all(path.exists() for path in (alive, foreign, unknown, moved))
    assert not users.exists()
    os.close(lock)
    scratch.remove(alive)


def test_a_claim_is_cleared_only_while_nobody_else_has_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "a/run"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / "mine.txt").write_text("was here before")
    (run / "plan.json").write_text("{}")
    code = (
        "import os, signal; from pathlib import Path; from gatrain import guardian; "
        f"guardian.guard_claim(Path({str(run)!r}), ['mine.txt'], []); print(guardian._process.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with open(run / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        wait_until(lambda: state_of(pid) in "ZX", 10)
        assert (run / "plan.json").exists()
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    wait_until(lambda: state_of(pid) in "ZX", 10)
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_children_of_a_thread_that_has_ended_live_on_and_die_with_the_process() -> None:
    """The kernel's own signal would come with the end of the thread that forked them."""
    code = (
        "import os, threading, time\nfrom gatrain import offspring\n"
        "def fork():\n    pid = os.fork()\n    if pid == 0:\n        offspring.follow_parent(); time.sleep(60)\n"
        "    print(pid, flush=True)\n"
        "t = threading.Thread(target=fork); t.start(); t.join(); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    assert state_of(child) == "S"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: state_of(child) in "ZX", 2)


def test_sockets_have_short_names_and_go_with_their_folder(tmp: Path) -> None:
    short = Path("/tmp") / f"g{os.getpid()}"
    short.mkdir()
    try:
        near = scratch.make("gatrain_", short)
        assert scratch.sockets_of(near).parent == near
        scratch.remove(near)
    finally:
        short.rmdir()
    deep = tmp / ("d" * 90)
    deep.mkdir()
    folder = scratch.make("gatrain_", deep)
    sockets = scratch.sockets_of(folder)
    assert len(str(sockets)) < scratch.LONGEST_BYTES
    assert sockets.stat().st_mode & 0o077 == 0
    scratch.remove(folder)
    assert not sockets.exists()
