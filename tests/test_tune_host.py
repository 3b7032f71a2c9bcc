"""Warm trial processes: one start for many requests, and nothing left behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_tune_real import MODULE

from gatrain.config import BatchConfig, RunConfig, TrainConfig
from gatrain.errors import ConfigError, WorkerError
from gatrain.launch.world import Nodes
from gatrain.plan import FITS, StepSettings
from gatrain.rundir import RunDir
from gatrain.tune.curve import Curve
from gatrain.tune.processes import TrialHost
from gatrain.tune.runner import TrialRunner

WAY = StepSettings("fp32", "none", False, "window")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "misbehaving.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def host(project: Path) -> Iterator[TrialHost]:
    with TrialHost(Nodes(1), "cpu", project) as found:
        yield found


def runner(host: TrialHost, **model: Any) -> TrialRunner:
    config = RunConfig(
        model={"_target_": "misbehaving.Model", **model},
        data={"_target_": "misbehaving.data"},
        task={"_target_": "gatrain.tasks.Supervised"},
        train=TrainConfig(steps=1),
        batch=BatchConfig(effective=16),
    )
    return TrialRunner(config, host, 60, lambda curve: None, lambda text: None)


def sizes(curve: Curve) -> dict[int, str]:
    return {m.micro_batch: m.outcome for m in curve.measurements}


def processes_of(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group:
                found.append(int(path.name))
        except (ProcessLookupError, PermissionError):
            pass
    return found


def test_one_start_answers_many_requests(host: TrialHost, project: Path) -> None:
    asked = runner(host)
    first, _ = asked.measure(WAY, [1, 2], stop_early=False)
    assert host._process is not None
    pid = host._process.pid
    began = time.perf_counter()
    second, _ = asked.measure(WAY, [4], stop_early=False)
    third, _ = asked.measure(StepSettings("fp32", "none", False, "overlap"), [8], stop_early=False)
    assert time.perf_counter() - began < 5  # another start imports torch
    assert host._process.pid == pid
    assert (sizes(first), sizes(second), sizes(third)) == ({1: FITS, 2: FITS}, {4: FITS}, {8: FITS})
    losses = [m.loss for curve in (first, second, third) for m in curve.measurements]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    # the truth that later sizes are held to is that of the first of all
    assert {m.reference_loss for curve in (second, third) for m in curve.measurements} == {losses[0]}


def test_after_a_death_the_next_request_finds_new_processes(host: TrialHost) -> None:
    asked = runner(host, what="death", at=4)
    curve, _ = asked.measure(WAY, [2, 4], stop_early=False)
    assert sizes(curve) == {2: FITS, 4: "failed"}
    curve, _ = asked.measure(WAY, [1], stop_early=False)
    assert sizes(curve) == {1: FITS}


def test_the_users_own_error_keeps_its_class(host: TrialHost) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        runner(host, unknown=1).measure(WAY, [1])
    with pytest.raises(WorkerError, match="SIGKILL"):
        killed(host)


def test_a_log_that_a_message_names_outlives_the_processes(host: TrialHost, project: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        killed(host)
    host.close()
    (named,) = re.findall(r"\S+rank_0\.log", str(caught.value))
    assert Path(named.rstrip(":")).is_file()
    assert (project / "cache") in Path(named).parents


def killed(host: TrialHost) -> None:
    """The kernel takes a rank before it has begun."""
    host.start()
    assert host._process is not None
    assert host._folder is not None
    deadline = time.monotonic() + 60
    # a child that an import runs for a moment is no rank: a rank has a log
    while not RunDir(host._folder).rank_log(0).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    group = host._process.pid
    for pid in processes_of(group):
        if pid != group:
            os.kill(pid, signal.SIGKILL)
    runner(host).measure(WAY, [1])


def test_a_host_that_was_not_needed_leaves_nothing(project: Path) -> None:
    with TrialHost(Nodes(2), "cpu", project) as host:
        host.start()
        assert host._process is not None
        group = host._process.pid
        time.sleep(0.3)
        began = time.perf_counter()
        host.close()
        assert time.perf_counter() - began < 2
    assert processes_of(group) == []
    assert list((project / "tmp").iterdir()) == []


def test_ranks_die_with_the_command_that_started_them(project: Path) -> None:
    script = (
        "from pathlib import Path; from gatrain.launch.world import Nodes; "
        "from gatrain.tune.processes import TrialHost; import time; "
        f"host = TrialHost(Nodes(2), 'cpu', Path({str(project)!r})); host.start(); "
        "print(host._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(project / "tmp")},
    )
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while len(processes_of(group)) < 3:  # the host and two ranks
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while processes_of(group):
        assert time.monotonic() < deadline, "ranks outlived their command"
        time.sleep(0.05)
