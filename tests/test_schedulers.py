"""A scheduler of the user's own, from a folder and YAML alone: it gives the world, the folder and restarts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gatrain.compose import compose
from gatrain.errors import ConfigError, LaunchError
from gatrain.fit.job import find_job, reach_every_node
from gatrain.launch.schedulers import Job
from gatrain.launch.world import Nodes, WorldRequest

PODS = """
from gatrain.launch.schedulers import Job, Scheduler

class Pods(Scheduler):
    def __init__(self, prefix):
        self.prefix = prefix

    def detect(self, environ):
        given = {key.removeprefix(self.prefix): value for key, value in environ.items()}
        if self.prefix + "JOB" not in environ:
            return None
        return Job("pods", given["JOB"], nnodes=int(given["PODS"]), node_rank=int(given["INDEX"]),
                   endpoint=given.get("FIRST"), restarts=int(given.get("RESTARTS", 0)))

class Confused(Pods):
    def detect(self, environ):
        return {"job": 1}

class Nothing:
    def __init__(self, prefix):
        pass
"""
RECIPE = """
defaults: [base, {override optimizer: sgd}, _self_]
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 3}
data: {_target_: pods.data}
loss: {_target_: torch.nn.CrossEntropyLoss}
scheduler: {_target_: pods.Pods, prefix: POD_}
batch: {effective: 8, micro: 2}
train: {steps: 2}
precision: fp32
checkpointing: none
compile: false
sync: window
device: cpu
"""
DATA = """
def data():
    import torch
    from types import SimpleNamespace
    made = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
    return SimpleNamespace(train=made, eval=None)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pods.py").write_text(PODS + DATA)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "odd.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(folder: Path, **pod: object) -> subprocess.Popen[str]:
    variables = {f"POD_{name}": str(value) for name, value in pod.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "gatrain", "launch", "--nproc", "1", "recipe=odd"],
        cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_scheduler_of_ones_own_gives_nodes_name_and_restarts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        first = f"127.0.0.1:{probe.getsockname()[1]}"

    def job(restarts: int) -> list[str]:
        nodes = [
            launch(folder, JOB="a-7", PODS=2, INDEX=index, FIRST=first, RESTARTS=restarts) for index in (0, 1)
        ]
        printed = [node.communicate(timeout=200)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
        return printed

    job(0)
    run = folder / "outputs" / "odd" / "job-a-7"
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    env = json.loads((run / "env.json").read_text())
    assert (env["scheduler"], env["job"], env["job_restarts"]) == ("pods", "a-7", 0)
    # the same commands, started again, go on with the run of the first attempt, and no node waits in vain
    assert "nothing is left to do" in job(1)[0]
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_what_a_scheduler_gives_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*words: str) -> Job | None:
        return find_job(compose(["recipe=odd", *words]).config, folder)

    assert ask() is None
    assert ask("scheduler=null") is None
    for name, value in (("JOB", "7"), ("PODS", "2"), ("INDEX", "1")):
        monkeypatch.setenv(f"POD_{name}", value)
    assert ask() == Job("pods", "7", 2, 1)
    monkeypatch.setenv("POD_JOB", "../7")
    with pytest.raises(LaunchError, match=r"id='\.\./7'"):
        ask()
    monkeypatch.setenv("POD_JOB", "7")
    with pytest.raises(ConfigError, match="detect of Confused gave a dict"):
        ask("scheduler._target_=pods.Confused")
    monkeypatch.delenv("POD_INDEX")
    with pytest.raises(ConfigError, match=r"detect of Pods failed: KeyError: 'INDEX'\. Correct it"):
        ask()
    with pytest.raises(ConfigError, match="gave a Nothing"):
        ask("scheduler._target_=pods.Nothing")
    with pytest.raises(
        ConfigError, match=r"scheduler=slrum is not one of auto, slurm\. Did you mean 'slurm'"
    ):
        ask("scheduler=slrum")


def test_who_names_nodes_is_not_asked_about_the_job() -> None:
    job = Job("pods", "7", 4, 2, "10.0.0.1:29500", restarts=1)
    assert WorldRequest(job=job).nodes(8) == Nodes(8, 4, 2, "10.0.0.1:29500", "pods-7-1")
    named = WorldRequest(1, 2, 1, "10.0.0.9:1", job=job)
    assert named.nodes(1) == Nodes(1, 2, 1, "10.0.0.9:1")
    assert named.was_started_again


def test_the_only_process_of_a_job_says_that_the_other_nodes_must_be_started() -> None:
    alone = Job("pods", "7", 4, on_every_node=False)
    assert alone.needs_other_nodes
    with pytest.raises(LaunchError, match="only one of pods job 7, which has 4 nodes"):
        reach_every_node(
            WorldRequest(job=alone), lambda job, words: job.start_on_every_node(words), None, Path(), False
        )
    reach_every_node(WorldRequest(1, 2, 0, "a:1", job=alone), None, None, Path(), False)
