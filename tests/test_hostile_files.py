"""What stands in files is not believed: types, ranges, sizes, depth, links and pipes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from gatrain import codec
from gatrain.batch import Split
from gatrain.errors import DamagedFileError, RunFolderError
from gatrain.fit.claim import set_aside
from gatrain.plan import Plan, StepSettings
from gatrain.rundir import RunDir, locked, read_json, write_json, write_text


def plan_dict(**changes: Any) -> dict[str, Any]:
    settings = StepSettings("fp32", "none", compile=False, sync="window")
    plan = Plan(split=Split(12, 2), micro_batch=3, settings=settings, reason="a test")
    return {**json.loads(json.dumps(plan.to_dict())), **changes}


def test_a_plan_comes_back_from_json_as_it_was() -> None:
    assert Plan.from_dict(plan_dict()).micro_batches == [[3, 3], [3, 3]]
    assert Plan.from_dict(plan_dict(of_a_newer_version=1)).micro_batch == 3


def test_a_plan_of_an_earlier_version_is_read() -> None:
    """It has no shares and no knobs, and its trials hold fewer numbers."""
    trial = {
        "micro_batch": 4,
        "precision": "fp32",
        "checkpointing": "none",
        "compile": False,
        "outcome": "fits",
    }
    found = plan_dict(micro_batch=4, micro_batches=[[4, 3], [3, 2]], trials=[trial | {"step_s": 0.1}])
    del found["shares"], found["knobs"]
    plan = Plan.from_dict(found)
    assert plan.split == Split(12, 2, (7, 5))
    assert plan.trials[0].settings.sync == "window"


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": -3}, {"micro_batch": 0}, {"micro_batch": 10**30}, {"micro_batch": 3.0},
        {"micro_batch": True}, {"micro_batch": "3"}, {"micro_batch": None},
        {"micro_batches": [[24], [-12]]}, {"micro_batches": [[3, 3], [3, 4]]}, {"micro_batches": []},
        {"micro_batches": [[12], []], "world_size": 1}, {"micro_batches": [[6], [6]]}, {"micro_batches": "3333"},
        {"micro_batches": [3, 3, 3, 3]}, {"micro_batches": [[4, 2], [3, 3]]}, {"shares": [7, 5]},
        {"effective_batch": 10**15, "micro_batches": [[10**15]], "shares": [10**15], "world_size": 1},
        {"world_size": "many"}, {"world_size": -1},
        {"effective_batch": 13}, {"effective_batch": -12}, {"effective_batch": 12.5},
        {"precision": "fp12"}, {"precision": "auto"}, {"precision": None}, {"sync": "evil"}, {"checkpointing": "x"},
        {"compile": "yes"}, {"compile": 1}, {"reason": 7}, {"trials": 3}, {"trials": [{"micro_batch": -1}]},
        {"notes": [1]}, {"predicted_peak_bytes": -1}, {"memory_budget_bytes": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_that_cannot_be_computed_is_refused_with_exit_8_and_the_files_name(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_dir = RunDir(tmp_path)
    write_json(run_dir.plan, plan_dict(**changes))
    with pytest.raises(DamagedFileError, match=r"plan\.json") as found:
        run_dir.load_plan()
    assert found.value.exit_code == 8
    assert "batch.micro=auto" in str(found.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\x80\x04\x95pickle", b"\xff\xfe\x00", b"[" * 200_000, b'{"a":' * 100_000,
     b'{"a": ' + b"9" * 10_000 + b"}"],
    ids=lambda content: repr(content[:8]) + str(len(content)),
)  # fmt: skip
def test_json_that_is_none_ends_in_a_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_json_is_read_from_files_of_a_bounded_size_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "real.json", {})
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("link.json", "pipe.json", "folder.json"):
        with pytest.raises(DamagedFileError, match=name):
            read_json(tmp_path / name)
    with pytest.raises(DamagedFileError, match="larger than 1 bytes"):
        read_json(tmp_path / "real.json", most_bytes=1)
    with pytest.raises(RunFolderError, match="No such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_keeps_its_content(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    run = tmp_path / "run"
    run.mkdir()
    if kind != "dangling":
        target.write_text("precious")
    os.link(target, run / ".lock") if kind == "hard" else (run / ".lock").symlink_to(target)
    with pytest.raises(RunFolderError, match=r"\.lock"), locked(RunDir(run)):
        pass
    assert not target.exists() if kind == "dangling" else target.read_text() == "precious"


def test_a_lock_tells_of_its_holder_only_what_it_can_know(tmp_path: Path) -> None:
    with locked(RunDir(tmp_path)):
        (tmp_path / ".lock").write_text(json.dumps({"pid": "rm -rf", "host": "\x1b[31m"}))
        with pytest.raises(RunFolderError, match="in use by another process"), locked(RunDir(tmp_path)):
            pass


@pytest.mark.parametrize(
    "name", ["saved", "logs", "metrics.jsonl", "plan.json", "config.yaml", "logs/rank_0.log"]
)
def test_a_run_folder_with_a_link_that_leads_out_of_it_is_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    if name == "logs":
        (run / "logs").rmdir()
    (run / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RunFolderError, match=name):
        RunDir(run).refuse_links()


def test_links_within_a_run_folder_and_a_run_folder_that_is_one_are_fine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "elsewhere").mkdir(parents=True)
    (run / "saved").symlink_to(run / "elsewhere")
    (tmp_path / "link").symlink_to(run)
    RunDir(run).refuse_links()
    RunDir(tmp_path / "link").refuse_links()


@pytest.mark.parametrize(("umask", "wanted"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int, wanted: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "x.json", {})
        write_text(tmp_path / "secret.yaml", "", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == wanted
    assert stat.S_IMODE((tmp_path / "secret.yaml").stat().st_mode) == 0o600


def test_starting_over_keeps_states_and_metrics_under_other_names(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for number in (1, 2):
        run_dir.saved.mkdir()
        run_dir.metrics.write_text(f"{number}\n")
        assert set_aside(run_dir) == tmp_path / f"saved.before-{number}"
        assert (tmp_path / f"metrics.before-{number}.jsonl").read_text() == f"{number}\n"
    assert not run_dir.saved_entries()


def test_whatever_has_the_name_of_a_state_counts_as_something_to_lose(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "step_00000001").write_text("")
    (saved / "step_00000002").mkdir()
    (saved / "step_00000003").symlink_to(saved / "step_00000002")
    (saved / "step_x").mkdir()
    (saved / "step_\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661").mkdir()
    assert [step for step, _ in RunDir(tmp_path).saved_entries()] == [1, 2, 3]
    assert RunDir(tmp_path).saved_steps() == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True), (int, 1.0), (int, "1"), (int, 2**63 + 1), (int, -(10**30)), (float, float("nan")),
        (float, float("inf")), (float, "1"), (str, 1), (str, None), (bool, 1), (list[int], (1,)),
        (list[int], ["1"]),
        (tuple[int, int], [1]), (dict[str, int], {"a": None}), (int | None, "none"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"not|number"):
        codec.decode(kind, value)
