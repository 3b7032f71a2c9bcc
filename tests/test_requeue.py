"""Commands that a scheduler starts again go on with their own run, and with nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gatrain.compose import Composed, compose
from gatrain.errors import ConfigError, RunFolderError
from gatrain.fit import requeue
from gatrain.fit.claim import acquire_run_dir, choose_folder, folder_for_job
from gatrain.launch.schedulers import Auto, Job
from gatrain.launch.torchrun import TorchrunWorld
from gatrain.launch.world import Nodes, WorldRequest
from gatrain.rundir import RunDir

SMALL = (
    "recipe=llm", "model.layers=1", "model.heads=2", "model.width=16", "data.context=16", "data.vocab_size=300",
    "batch.effective=4", "batch.micro=4", "checkpointing=none", "compile=false", "sync=window", "train.steps=2",
    "schedule.warmup_steps=0", "data.path=corpus.txt", "train.check=off",
)  # fmt: skip


def job() -> Job:
    found = Auto().detect(os.environ)
    assert found is not None
    return found


def choose(composed: Composed, nodes: Nodes | None = None) -> tuple[Path, bool]:
    request = WorldRequest(job=Auto().detect(os.environ))
    return choose_folder(composed, nodes or Nodes(1), Path.cwd(), request)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how often the job was queued again."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def restarted(restarts: int) -> None:
        variables = {"ID": "77", "NUM_NODES": "1", "NODELIST": "localhost"}
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_JOB_{name}", value)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))

    return restarted


def started(folder: Path, composed: Composed, **env: object) -> Path:
    """A run folder as an attempt leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(composed.yaml)
    (folder / "plan.json").write_text("{}")
    facts = {"recipe": composed.recipe, "slurm_job": 77, "slurm_restarts": 0, "started": "2026-01-31"}
    (folder / "env.json").write_text(
        json.dumps({**facts, "settings": requeue.digest(composed.config), **env})
    )
    return folder


def test_each_training_of_a_requeued_job_finds_its_own_folder(
    slurm: Callable[[int], None], tmp_path: Path
) -> None:
    low, high = (compose(["recipe=llm", f"optimizer.lr={rate}"]) for rate in (1e-3, 3e-2))
    parent = tmp_path / "outputs" / "llm"
    slurm(0)
    assert choose(low) == (parent / "job-77", False)
    started(parent / "job-77", low)
    slurm(1)
    assert choose(low) == (parent / "job-77", True)
    path, named = choose(high)
    assert not named
    with acquire_run_dir(path, named, requeue.commands.Again((), tmp_path)) as claim:
        assert claim.run_dir.path == parent / "job-77-2"
    started(parent / "job-77-2", high)
    assert choose(high) == (parent / "job-77-2", True)
    assert choose(compose(["recipe=padded"]))[0].parent.name == "padded"


def test_two_trainings_with_the_same_settings_each_go_on(
    slurm: Callable[[int], None], tmp_path: Path
) -> None:
    composed = compose(["recipe=llm"])
    first, second = (
        started(tmp_path / "outputs" / "llm" / name, composed, started=name)
        for name in ("job-77", "job-77-2")
    )
    slurm(1)
    assert choose(composed)[0] == first
    requeue.mark(RunDir(first), job())
    assert choose(composed)[0] == second
    requeue.mark(RunDir(second), job())
    assert choose(composed)[0] == first  # a loop that tries again


def test_what_an_environment_variable_says_tells_two_trainings_apart(
    slurm: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LR", "1e-3")
    started(tmp_path / "outputs" / "llm" / "job-77", compose(["recipe=llm", "optimizer.lr=${oc.env:LR}"]))
    slurm(1)
    monkeypatch.setenv("LR", "1.0")
    composed = compose(["recipe=llm", "optimizer.lr=${oc.env:LR}"])
    assert not choose(composed)[1]


def test_runs_of_another_job_are_left_alone(slurm: Callable[[int], None], tmp_path: Path) -> None:
    composed = compose(["recipe=llm"])
    started(tmp_path / "outputs" / "llm" / "job-77", composed, slurm_job=76)
    slurm(1)
    assert not choose(composed)[1]


def test_a_folder_named_by_the_clock_is_found_again(slurm: Callable[[int], None], tmp_path: Path) -> None:
    composed = compose(["recipe=llm", "run.dir=out/${now:%f}"])
    first = started(tmp_path / "out" / "000001", composed)
    slurm(0)
    assert choose(composed)[0] != first
    slurm(1)
    assert choose(compose(["recipe=llm", "run.dir=out/${now:%f}"])) == (
        first,
        True,
    )
    with pytest.raises(ConfigError, match="differs between them"):
        choose(composed, Nodes(1, 2, 0, "localhost:29500"))


def test_a_named_folder_of_other_settings_is_refused_with_the_differences(
    slurm: Callable[[int], None], tmp_path: Path
) -> None:
    there = started(tmp_path / "r", compose(["recipe=llm", "optimizer.lr=1e-3"]))
    with pytest.raises(RunFolderError, match=r"optimizer\.lr is 0\.001 there and 0\.03 here") as caught:
        requeue.check_same(RunDir(there), compose(["recipe=llm", "optimizer.lr=3e-2", "run.dir=r"]))
    assert caught.value.exit_code == 7
    requeue.check_same(RunDir(there), compose(["recipe=llm", "optimizer.lr=1e-3", "run.dir=r"]))


def test_settings_that_resume_has_changed_are_still_those_of_the_run(
    slurm: Callable[[int], None], tmp_path: Path
) -> None:
    composed = compose(["recipe=llm"])
    folder = started(tmp_path / "r", composed)
    (folder / "config.yaml").write_text(compose(["recipe=llm", "train.steps=999"]).yaml)
    requeue.check_same(RunDir(folder), composed)


def test_torchrun_restarts_go_on_with_the_run_of_their_own_settings(
    slurm: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    world = TorchrunWorld(0, 1, 0, 1, "127.0.0.1", 29500, True, "job", attempt=1)
    world.folder.mkdir()
    llm, padded = compose(["recipe=llm"]), compose(["recipe=padded"])
    folders = {each.recipe: started(tmp_path / each.recipe, each) for each in (llm, padded)}
    for folder in folders.values():
        world.note_run(folder)
    assert choose_folder(llm, Nodes(1), tmp_path, WorldRequest(torchrun=world)) == (folders["llm"], True)
    assert choose_folder(padded, Nodes(1), tmp_path, WorldRequest(torchrun=world)) == (
        folders["padded"],
        True,
    )
    assert not choose_folder(
        compose(["recipe=llm", "train.seed=9"]), Nodes(1), tmp_path, WorldRequest(torchrun=world)
    )[1]


def test_several_nodes_get_one_folder_chosen_before_they_start(
    slurm: Callable[[int], None], tmp_path: Path
) -> None:
    slurm(0)
    low, high = (compose(["recipe=llm", f"optimizer.lr={rate}"]) for rate in (1e-3, 3e-2))
    first = folder_for_job(low, job(), tmp_path)
    assert first == tmp_path / "outputs" / "llm" / "job-77"
    started(first, low)
    assert folder_for_job(high, job(), tmp_path) == first.with_name("job-77-2")
    slurm(1)
    assert folder_for_job(low, job(), tmp_path) == first
    assert folder_for_job(compose(["recipe=llm", "run.name=x"]), job(), tmp_path) is None


def test_a_path_that_is_too_long_is_refused_before_anything(
    slurm: Callable[[int], None], tmp_path: Path
) -> None:
    for words, part in (
        (["run.name=" + "n" * 300], "has 300 bytes"),
        (["run.name=" + "é" * 130], "has 260 bytes"),
        (["run.dir=" + "/d" * 1950], "has 3900 bytes"),
    ):
        with pytest.raises(RunFolderError, match=part):
            choose(compose(["recipe=llm", *words]))
    choose(compose(["recipe=llm", "run.name=" + "é" * 127]))


def test_two_trainings_in_one_requeued_job_for_real(slurm: Callable[[int], None], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat and saw a rat\n" * 200)

    def fit(rate: str) -> str:
        command = [sys.executable, "-m", "gatrain", "fit", *SMALL, f"optimizer.lr={rate}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    slurm(0)
    fit("1e-3")
    slurm(1)
    assert "nothing is left to do" in fit("1e-3")
    assert "completed" in fit("3e-2")
    rates = {
        path.parent.name: "lr: 0.03" in path.read_text()
        for path in (tmp_path / "outputs").rglob("config.yaml")
    }
    assert rates == {"job-77": False, "job-77-2": True}
