"""`--overwrite` replaces a run on purpose: only gatrain's own, what gatrain wrote, and when nobody holds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatrain.commands import Again
from gatrain.errors import RunFolderError
from gatrain.fit.claim import acquire_run_dir
from gatrain.rundir import RunDir, locked

AGAIN = Again(("launch", "--nproc", "2", "recipe=x"), Path("/nowhere else"))


def a_run(path: Path) -> RunDir:
    """A folder as a run leaves it that has saved one state."""
    run_dir = RunDir(path)
    (run_dir.saved / "step_00000004").mkdir(parents=True)
    (run_dir.saved / "step_00000004" / "model.safetensors").write_bytes(b"weights")
    (run_dir.saved / "step_00000004" / "manifest.json").write_text("{}")
    run_dir.logs.mkdir()
    run_dir.rank_log(0).write_text("log")
    run_dir.config.write_text("model: {}\n")
    run_dir.metrics.write_text('{"step": 1}\n')
    run_dir.plan.write_text("{}")
    run_dir.env.write_text(json.dumps({"recipe": "x", "command": ["fit", "recipe=x"], "working_dir": "/"}))
    return run_dir


def names(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*") if not each.is_dir()}


def test_a_run_is_not_replaced_by_default_and_both_ways_on_are_named(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "a run")
    with pytest.raises(RunFolderError) as caught, acquire_run_dir(run_dir.path, True, AGAIN):
        pass
    assert f"gatrain resume '{run_dir.path}'" in str(caught.value)
    assert "cd '/nowhere else' && gatrain launch --nproc 2 recipe=x --overwrite" in str(caught.value)
    assert run_dir.saved_steps() == [4]


def test_what_others_put_into_the_folder_stays(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    for name in ("notes.txt", "saved/best/model.safetensors", "saved/step_best", "logs/mine.log"):
        (run_dir.path / name).parent.mkdir(exist_ok=True)
        (run_dir.path / name).write_text("mine")
    with acquire_run_dir(run_dir.path, True, AGAIN, overwrite=True) as claim:
        assert run_dir.saved_steps() == [4]  # until the next run is ready
        said = claim.clear()
    assert "1 saved state, that of step 4" in str(said)
    mine = {"notes.txt", "saved/best/model.safetensors", "saved/step_best", "logs/mine.log"}
    assert names(run_dir.path) == mine | {"env.json", "plan.json", ".lock"}


def test_a_failure_before_the_next_run_is_ready_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    before = names(run_dir.path)

    def prepare() -> None:
        with acquire_run_dir(run_dir.path, True, AGAIN, overwrite=True):
            (run_dir.path / ".session").write_text("5e55")
            raise RuntimeError("the plan failed")

    with pytest.raises(RuntimeError):
        prepare()
    assert names(run_dir.path) == before


@pytest.mark.parametrize("missing", ["env", "plan"])
def test_a_folder_that_is_not_gatrains_is_never_touched(tmp_path: Path, missing: str) -> None:
    run_dir = a_run(tmp_path / "run")
    getattr(run_dir, missing).unlink()
    before = names(run_dir.path)
    with (
        pytest.raises(RunFolderError, match="left alone"),
        acquire_run_dir(run_dir.path, True, AGAIN, overwrite=True),
    ):
        pass
    assert names(run_dir.path) == before


def test_a_run_that_is_under_way_is_not_replaced(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    with (
        locked(run_dir),
        pytest.raises(RunFolderError, match="is in use by process"),
        acquire_run_dir(run_dir.path, True, AGAIN, overwrite=True),
    ):
        pass
    assert run_dir.saved_steps() == [4]
