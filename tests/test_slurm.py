"""Slurm: its environment, batch files, and jobs on a real cluster of two nodes on this machine."""

from __future__ import annotations

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
from gatrain.launch.schedulers import slurm
from gatrain.launch.schedulers.sbatch import Resources, batch_file, submit
from gatrain.launch.schedulers.slurm import Slurm, SlurmJob

REPO = Path(__file__).resolve().parents[1]

BATCH_SHELL = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_NODEID": "0",
}
STEP = BATCH_SHELL | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_RESTART_COUNT": "5",
}


def detect(environ: dict[str, str]) -> SlurmJob:
    job = Slurm().detect(environ)
    assert job is not None
    return job


def test_detect_tells_shell_from_step() -> None:
    assert Slurm().detect({}) is None
    shell = SlurmJob("slurm", "41", 2, on_every_node=False, node_list="gpu[1-2]")
    assert detect(BATCH_SHELL) == shell
    assert shell.needs_other_nodes
    # the shell of `salloc` may itself be a special step
    assert detect(BATCH_SHELL | {"SLURM_STEP_ID": "4294967290"}) == shell
    step = SlurmJob("slurm", "41", 2, 1, restarts=5, node_list="gpu[1-2]", tasks=2, step_id=3)
    assert detect(STEP) == step
    assert not step.needs_other_nodes
    with pytest.raises(LaunchError, match="SLURM_JOB_ID='x' is not a number"):
        detect({"SLURM_JOB_ID": "x"})


def test_the_world_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "first_address", lambda nodes: "10.0.0.7")
    nodes = detect(STEP).nodes(4)
    assert (nodes.nproc, nodes.nnodes, nodes.node_rank) == (4, 2, 1)
    assert nodes.endpoint == f"10.0.0.7:{15000 + (41 * 131 + 3) % 15000}"
    assert nodes.run_id == "slurm-41-3-5"
    with pytest.raises(LaunchError, match="--ntasks-per-node=1"):
        SlurmJob("slurm", "1", 2, node_list="a", tasks=8).nodes(4)


def test_the_batch_file_is_valid_bash_and_quotes_everything(tmp_path: Path) -> None:
    odd = 'it\'s $HOME; "x" `y`'
    asked = Resources(
        "gpu",
        "1-02:30:00",
        2,
        4,
        cpus_per_gpu=12,
        mem="64G",
        account="lab",
        qos="long",
        constraint="a|[b*2&c]",
    )
    output = tmp_path / "50% of it's.log"
    text = batch_file("my run", output, asked, ["python", "-m", "gatrain", odd], cwd=tmp_path / odd)
    for line in (
        "#SBATCH --job-name=my_run",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --time=1-02:30:00",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-gpu=12",
        "#SBATCH --mem=64G",
        "#SBATCH --qos=long",
        '#SBATCH --constraint="a|[b*2&c]"',
        f'#SBATCH --output="{tmp_path}/50%% of it\'s.log"',
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue",
    ):
        assert f"\n{line}\n" in text
    step = next(line for line in text.splitlines() if line.startswith("srun"))
    assert shlex.split(step.removesuffix(" &")) == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"),
        *("--kill-on-bad-exit=1", "python", "-m", "gatrain", odd),
    ]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    plain = batch_file("x", tmp_path / "log", Resources(), ["true"], cwd=tmp_path)
    assert "None" not in plain
    assert "#SBATCH --nodes=1\n" in plain


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("qos", "x\n#SBATCH --uid=0"),
        ("constraint", "a|b #"),
        ("constraint", "-C"),
        ("mem", "64 G"),
        ("mem", "lots"),
        ("cpus_per_gpu", 0),
        ("partition", "-p"),
        ("account", "$(id)"),
        ("time", "soon"),
        ("time", "1:00\n"),
        ("nodes", 0),
        ("gpus_per_node", 0),
    ],
)
def test_odd_values_are_refused(option: str, value: object) -> None:
    with pytest.raises(LaunchError, match=f"--{option.replace('_', '-')}"):
        Resources(**{option: value})  # type: ignore[arg-type]


def test_line_breaks_in_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="line break"):
        batch_file("x", tmp_path, Resources(), ["a\nb"], cwd=tmp_path)
    with pytest.raises(LaunchError, match="line break"):
        batch_file("x", tmp_path / "a\nb", Resources(), ["true"], cwd=tmp_path)


def test_submit_without_slurm_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch is not on the PATH.*leave out --slurm"):
        submit(tmp_path / "job.sh")


def test_an_allocation_shell_becomes_srun(tmp_path: Path) -> None:
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 42\n')
    fake.chmod(0o755)
    code = (
        "import os\nfrom gatrain.launch.schedulers import Auto\n"
        "Auto().detect(os.environ).start_on_every_node(['launch', 'a b'])"
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
from gatrain.launch.schedulers import Auto
try:
    run_workers("the_worker", Path(sys.argv[1]), Auto().detect(os.environ).nodes(1), device="cpu")
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
    command = [sys.executable, "node.py", str(run)]
    script = run / "job.sh"
    script.write_text(
        batch_file("tiny", run / "job.log", Resources(nodes=2, time="5"), command, cwd=run.parent)
    )
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
def test_gatrain_launch_submits_a_job_that_trains(cluster: SlurmCluster, run: Path) -> None:
    command = [sys.executable, "-m", "gatrain", "launch", "--slurm", "--nodes", "2", "--nproc", "1"]
    command += [
        "--partition",
        "test",
        "--time",
        "5",
        "--mem",
        "100M",
        "--account",
        "lab",
        "--constraint",
        "new&fast",
    ]
    command += ["--qos", "normal", "recipe=vision", "train.steps=2", "batch.effective=8"]
    command += ["batch.micro=4", "device=cpu", "compile=false", "run.dir=trained"]
    subprocess.run(command, cwd=run.parent, check=True, timeout=120)
    for job in list(cluster.jobs()):
        cluster.wait_until_done(job)
    summary = json.loads((run.parent / "trained" / "summary.json").read_text())
    assert summary["status"] == "completed"
