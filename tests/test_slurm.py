"""Slurm: its environment, batch files, and jobs on a real cluster of two nodes on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, missing

from gatrain.errors import LaunchError
from gatrain.launch import slurm
from gatrain.launch.slurm import BatchJob, SlurmJob, detect, nodes_from_slurm, sbatch_script, submit

REPO = Path(__file__).resolve().parents[1]

BATCH_SHELL = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_NODEID": "0",
    "SLURM_GPUS_ON_NODE": "4",
}
STEP = BATCH_SHELL | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_RESTART_COUNT": "5",
}


def test_detect_tells_shell_from_step() -> None:
    assert detect({}) is None
    shell = SlurmJob(job_id=41, nnodes=2, node_list="gpu[1-2]", in_step=False, gpus_per_node=4)
    assert detect(BATCH_SHELL) == shell
    # the shell of `salloc` may itself be a special step
    assert detect(BATCH_SHELL | {"SLURM_STEP_ID": "4294967290"}) == shell
    assert detect(STEP) == SlurmJob(41, 2, "gpu[1-2]", True, 1, 2, 3, 5, 4)
    with pytest.raises(LaunchError, match="SLURM_JOB_ID='x' is not a number"):
        detect({"SLURM_JOB_ID": "x"})


@pytest.mark.parametrize(("text", "count"), [("8", 8), ("a100:4", 4), ("a100:2,v100:1", 3), ("all", None)])
def test_gpus_per_node(text: str, count: int | None) -> None:
    job = detect({"SLURM_JOB_ID": "1", "SLURM_GPUS_PER_NODE": text})
    assert job is not None
    assert job.gpus_per_node == count


def test_the_world_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    job = detect(STEP)
    assert job is not None
    monkeypatch.setattr(slurm, "first_address", lambda nodes: "10.0.0.7")
    nodes = nodes_from_slurm(job, 4)
    assert (nodes.nproc, nodes.nnodes, nodes.node_rank) == (4, 2, 1)
    assert nodes.endpoint == f"10.0.0.7:{15000 + (41 * 131 + 3) % 15000}"
    assert nodes.run_id == "slurm-41-3-5"
    with pytest.raises(LaunchError, match="--ntasks-per-node=1"):
        nodes_from_slurm(SlurmJob(1, 2, "a", True, tasks=8), 4)


def test_the_batch_file_is_valid_bash_and_quotes_everything(tmp_path: Path) -> None:
    odd = 'it\'s $HOME; "x" `y`'
    job = BatchJob("my-run", tmp_path / "50% of it's.log", 2, "gpu", "1-02:30:00", 4, 12, "lab")
    text = sbatch_script(job, ["python", "-m", "gatrain", odd], cwd=tmp_path / odd)
    for line in (
        "#SBATCH --job-name=my-run",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --time=1-02:30:00",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=12",
        f'#SBATCH --output="{tmp_path}/50%% of it\'s.log"',
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue",
    ):
        assert f"\n{line}\n" in text
    step = next(line for line in text.splitlines() if line.startswith("srun"))
    assert shlex.split(step.removesuffix(" &")) == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12"),
        *("--kill-on-bad-exit=1", "python", "-m", "gatrain", odd),
    ]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    plain = sbatch_script(BatchJob("x", tmp_path / "log", requeue=False), ["true"], cwd=tmp_path)
    assert "scontrol requeue" not in plain
    assert "None" not in plain


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "a b"),
        ("name", "x\n#SBATCH --uid=0"),
        ("partition", "-p"),
        ("account", "$(id)"),
        ("time", "soon"),
        ("time", "1:00\n"),
        ("nodes", 0),
        ("gpus_per_node", 0),
        ("output", Path("a\nb")),
    ],
)
def test_odd_values_are_refused(option: str, value: object) -> None:
    with pytest.raises(LaunchError):
        BatchJob(**{"name": "x", "output": Path("log"), option: value})  # type: ignore[arg-type]


def test_line_breaks_in_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="line break"):
        sbatch_script(BatchJob("x", tmp_path), ["a\nb"], cwd=tmp_path)


def test_submit_without_slurm_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch is not on the PATH.*leave out --slurm"):
        submit(tmp_path / "job.sh")


def test_an_allocation_shell_becomes_srun(tmp_path: Path) -> None:
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 42\n')
    fake.chmod(0o755)
    code = (
        "import os\nfrom gatrain.launch.slurm import detect, relaunch_under_srun\n"
        "relaunch_under_srun(['launch', 'a b'], detect(os.environ))"
    )
    environ = os.environ | BATCH_SHELL | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 42
    assert done.stdout.splitlines()[-6:] == [sys.executable, "-P", "-m", "gatrain", "launch", "a b"]
    assert "--nodes=2" in done.stdout


# Below, a real cluster.

WORKER = """
import json, time
from gatrain import rank

def work(folder, r):
    import torch, torch.distributed as dist
    total = torch.tensor([r.rank + 1.0])
    dist.all_reduce(total)
    (folder / f"rank_{r.rank}.json").write_text(json.dumps({"world": r.world_size, "total": total.item()}))
    while (folder / "loop").exists() and not r.stop_anywhere():
        time.sleep(0.05)
    if r.stop_requested:
        (folder / f"saved_{r.rank}").write_text(str(r.stop_signal))

if __name__ == "__main__":
    rank.main(work)
"""

NODE = """
import os, sys
from pathlib import Path
from gatrain.errors import GatrainError
from gatrain.launch.local import run_workers
from gatrain.launch.slurm import detect, nodes_from_slurm
try:
    run_workers("the_worker", Path(sys.argv[1]), nodes_from_slurm(detect(os.environ), 1), device="cpu")
except GatrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose path needs quoting, beside a worker module and a launcher."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    home = tmp_path / 'it\'s 100% "home"'
    run = home / "run"
    run.mkdir(parents=True)
    (home / "the_worker.py").write_text(WORKER)
    (home / "node.py").write_text(NODE)
    return run


def send(run: Path) -> int:
    job = BatchJob("tiny", run / "job.log", nodes=2, time="5")
    script = run / "job.sh"
    script.write_text(sbatch_script(job, [sys.executable, "node.py", str(run)], cwd=run.parent))
    return submit(script)


@pytest.mark.slurm
def test_two_nodes_under_slurm_form_one_world(cluster: SlurmCluster, run: Path) -> None:
    cluster.wait_until_done(send(run))
    results = [json.loads((run / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert results == [{"world": 2, "total": 3.0}] * 2
    assert (run / "job.log").read_text() == ""


@pytest.mark.slurm
def test_the_time_limit_saves_and_queues_again(cluster: SlurmCluster, run: Path) -> None:
    (run / "loop").touch()
    job = send(run)
    deadline = time.monotonic() + 60
    while not all((run / f"rank_{rank}.json").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, (run / "job.log").read_text()
        time.sleep(0.1)
    # what Slurm does by itself 120 s before the limit
    subprocess.run(["scancel", "--batch", "--signal=USR1", str(job)], check=True)
    cluster.wait_until(job, "PENDING")
    subprocess.run(["scancel", str(job)], check=True)
    assert [(run / f"saved_{rank}").exists() for rank in (0, 1)] == [True, True]
    assert "Stopped by SIGUSR1" in (run / "job.log").read_text()


@pytest.mark.slurm
@pytest.mark.skipif(importlib.util.find_spec("gatrain.cli") is None, reason="there is no command line yet")
def test_gatrain_launch_submits_a_job_that_trains(cluster: SlurmCluster, run: Path) -> None:
    command = [sys.executable, "-m", "gatrain", "launch", "--slurm", "--nodes", "2", "--nproc", "1"]
    command += ["--partition", "test", "--time", "5", "recipe=vision", "train.steps=2", "batch.effective=8"]
    command += ["batch.micro=4", "device=cpu", "compile=false", "run.dir=trained"]
    subprocess.run(command, cwd=run.parent, check=True, timeout=120)
    for job in list(cluster.jobs()):
        cluster.wait_until_done(job)
    summary = json.loads((run.parent / "trained" / "summary.json").read_text())
    assert summary["status"] == "completed"
