"""Two nodes plan together: both take part in the trials, the weaker one is respected, and nobody hangs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_tune_real import MODULE

from gatrain import codec
from gatrain.errors import LaunchError
from gatrain.fit.preparation import Preparation, follow
from gatrain.hardware import Hardware, weakest
from gatrain.launch.rendezvous import Rendezvous
from gatrain.launch.world import Nodes
from gatrain.nvml import Gpu
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS
from gatrain.rundir import RunDir

RECIPE = """
defaults: [base, {override optimizer: sgd}, _self_]
model: {_target_: misbehaving.Model, what: WHAT, at: 4, rank: 1}
data: {_target_: misbehaving.data}
loss: {_target_: torch.nn.CrossEntropyLoss}
train: {steps: 2}
tune: {max_seconds: 60}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fit_on_two_nodes(folder: Path, what: str, *words: str) -> tuple[list[int], list[str], Path]:
    """``gatrain launch`` on two nodes that are this machine: (exit codes, outputs, run folder)."""
    (folder / "misbehaving.py").write_text(MODULE)
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes/odd.yaml").write_text(RECIPE.replace("WHAT", what))
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "gatrain", "launch", "--nproc", "1", "--nnodes", "2", "--node-rank", str(node),
             "--rdzv-endpoint", f"127.0.0.1:{port}", "recipe=odd", "device=cpu", "run.dir=run", *words],
            cwd=folder,
            env=os.environ | {"GATRAIN_CACHE": str(folder / f"cache_{node}"), "GATRAIN_JOIN_TIMEOUT_S": "90"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    return [node.returncode for node in nodes], outputs, folder / "run"


def plan_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return found


@pytest.mark.parametrize(("what", "outcome"), [("memory", DOES_NOT_FIT), ("death", FAILED)])
def test_what_fails_on_the_other_node_alone_counts_for_both(tmp_path: Path, what: str, outcome: str) -> None:
    codes, outputs, run = fit_on_two_nodes(tmp_path, what, "batch.effective=17")
    assert codes == [0, 0], "\n".join(outputs)
    plan = plan_of(run)
    # a share of 9 is cut evenly: at 4 or less by 3, at 8 or less by 5
    tried = {t["micro_batch"]: t["outcome"] for t in plan["trials"]}
    assert tried == {1: FITS, 2: FITS, 3: FITS, 5: outcome}
    assert plan["world_size"] == 2
    assert [sum(sizes) for sizes in plan["micro_batches"]] == [9, 8]
    assert plan["micro_batch"] <= 3
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2  # and they trained by it
    assert not list(run.glob("gatrain_*"))
    assert not (run / ".session").exists()


def test_a_second_run_answers_from_the_cache_on_two_nodes(tmp_path: Path) -> None:
    fit_on_two_nodes(tmp_path, "nothing", "batch.effective=8")
    codes, outputs, run = fit_on_two_nodes(tmp_path, "nothing", "batch.effective=8", "run.dir=again")
    assert codes == [0, 0], "\n".join(outputs)
    assert "remembered" in plan_of(tmp_path / "again")["reason"]
    assert "micro-batch 1: fits" not in "".join(outputs)
    assert plan_of(run)["micro_batches"] == plan_of(tmp_path / "again")["micro_batches"]


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    (tmp_path / "misbehaving.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/odd.yaml").write_text(RECIPE.replace("WHAT", "nothing"))
    done = subprocess.run(
        [sys.executable, "-m", "gatrain", "launch", "--nproc", "1", "--nnodes", "2", "--node-rank", "0",
         "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "recipe=odd", "device=cpu", "run.dir=run"],
        cwd=tmp_path,
        env=os.environ | {"GATRAIN_JOIN_TIMEOUT_S": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == LaunchError.exit_code
    assert re.search(r"1 of 2 nodes met at \S+ within 2 s; missing: node rank 1\.", done.stderr)
    assert not (tmp_path / "run").exists()


def gpu(name: str, total: int, free: int, capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu(0, name, total, free, "GPU-1", capability)


def test_the_weakest_node_speaks_for_all() -> None:
    own = Hardware("cuda", "", [gpu("H100", 80, 70)], memory_bytes=9, total_memory_bytes=10)
    other = Hardware("cuda", "", [gpu("A100", 40, 39, (8, 0))], memory_bytes=5, total_memory_bytes=6)
    (found,) = (both := weakest(own, [other])).gpus
    assert (found.name, found.total_bytes, found.free_bytes, found.capability) == (
        "H100 / A100",
        40,
        39,
        (8, 0),
    )
    assert (both.memory_bytes, both.total_memory_bytes) == (5, 6)
    assert both.fingerprint() != own.fingerprint()
    assert weakest(own, []) == weakest(own, [own]) == own
    with pytest.raises(LaunchError, match="node 0 computes on 1 x H100"):
        weakest(own, [Hardware("cpu", "no driver")])


# --- the rendezvous -------------------------------------------------------------------------------------

CPU = Hardware("cpu", "")


@contextlib.contextmanager
def meeting(monkeypatch: pytest.MonkeyPatch, wait_s: float = 20) -> Iterator[list[Rendezvous]]:
    """Both nodes' ends, in this process."""
    monkeypatch.setenv("GATRAIN_JOIN_TIMEOUT_S", str(wait_s))
    endpoint = f"127.0.0.1:{free_port()}"
    ends = [Rendezvous(Nodes(1, 2, node_rank, endpoint)) for node_rank in (0, 1)]
    with ends[0], ends[1]:
        yield ends


def test_one_node_waits_for_nobody(tmp_path: Path) -> None:
    with Rendezvous(Nodes(2)) as rendezvous, Preparation(rendezvous, RunDir(tmp_path)) as prepared:
        assert prepared.hardware_of_others() == []
        prepared.ready()
    assert not list(tmp_path.iterdir())


def test_the_other_node_gives_its_hardware_joins_the_trials_and_starts_when_all_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[str | None] = []
    with meeting(monkeypatch) as (first, second), ThreadPoolExecutor(1) as pool:
        other = pool.submit(follow, second, RunDir(tmp_path), CPU, joined.append)
        with Preparation(first, RunDir(tmp_path)) as prepared:
            assert prepared.hardware_of_others() == [CPU]
            prepared.announce(tmp_path / "gatrain_host_1")
            while str(tmp_path / "gatrain_host_1") not in joined:
                assert not other.done()
                time.sleep(0.05)
            prepared.ready()
            assert other.result(20) is True
        assert not list(tmp_path.iterdir())


def test_a_node_does_not_take_part_in_an_earlier_run_whose_end_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One script on each node, two trainings: node 1's second begins while node 0 still ends its first."""
    with meeting(monkeypatch) as (first, second), ThreadPoolExecutor(1) as pool:
        first.open()
        first.give("state", {"state": "ready"})
        second.open()
        again = Rendezvous(second.nodes)
        other = pool.submit(follow, again, RunDir(tmp_path), CPU, lambda trials: None)
        with pytest.raises(TimeoutError):
            other.result(1)
        second.close()
        first.close()  # as its process ends
        with Rendezvous(first.nodes) as now, Preparation(now, RunDir(tmp_path)) as prepared:
            prepared.hardware_of_others()
            prepared.ready()
            assert other.result(20) is True
            again.close()


def test_two_processes_of_one_node_rank_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with meeting(monkeypatch, 0.5) as (first, second):
        first.open()
        second.open()
        with pytest.raises(LaunchError, match=r"a process with node rank 1 at .* already"):
            Rendezvous(second.nodes).open()


def test_a_folder_that_the_nodes_do_not_share_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatrain.fit.preparation.SHARED_S", 0.5)
    (tmp_path / "mine").mkdir()
    with meeting(monkeypatch) as (first, second), ThreadPoolExecutor(1) as pool:
        other = pool.submit(follow, second, RunDir(tmp_path), CPU, lambda trials: None)
        with (
            Preparation(first, RunDir(tmp_path / "mine")),
            pytest.raises(LaunchError, match=r"on node 1 is another\. Give every node the same run\.dir"),
        ):
            other.result(20)


def test_a_failure_of_either_node_is_told_on_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with meeting(monkeypatch) as (first, second), ThreadPoolExecutor(1) as pool:
        other = pool.submit(follow, second, RunDir(tmp_path), CPU, lambda trials: None)
        with Preparation(first, RunDir(tmp_path)) as prepared:
            prepared.hardware_of_others()
            first.report_failure("the model does not fit")
            with pytest.raises(LaunchError, match="node 0 failed: the model does not fit"):
                other.result(20)
    with meeting(monkeypatch) as (first, second), ThreadPoolExecutor(1) as pool:
        early = pool.submit(first.report_failure, "the folder holds a run")  # before the other node has come
        with pytest.raises(LaunchError, match="node 0 failed: the folder holds a run"):
            follow(second, RunDir(tmp_path), CPU, lambda trials: None)
        early.result(20)
    with meeting(monkeypatch) as (first, second):
        first.open()
        second.open()
        second.report_failure("no GPU")
        with pytest.raises(LaunchError, match="node 1 failed: no GPU"):
            Preparation(first, RunDir(tmp_path)).hardware_of_others()


def test_nodes_of_unlike_size_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_JOIN_TIMEOUT_S", "20")
    endpoint = f"127.0.0.1:{free_port()}"
    with Rendezvous(Nodes(2, 2, 0, endpoint)) as first, Rendezvous(Nodes(3, 2, 1, endpoint)) as second:
        first.open()
        second.open()
        second.give("hardware", codec.encode(CPU))
        with pytest.raises(LaunchError, match=r"node 0 was started with --nproc 2, and node 1 .* --nproc 3"):
            Preparation(first, RunDir(tmp_path)).hardware_of_others()
