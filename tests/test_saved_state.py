"""A saved state is complete or absent, belongs to its run, and holds nothing that could run code."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gatrain import states
from gatrain.errors import SavedStateError
from gatrain.train import saved_state
from gatrain.train.saved_state import (
    Progress,
    check_same_run,
    find_damage,
    load,
    newest_usable,
    newest_valid,
    save,
)

PROGRESS = Progress(step=3, samples=30, tokens=0, effective_batch=10, seed=0, data_samples=100)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)


def stepped(seed: int = 0, optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    model = Tied()
    optimizer = optimizer_class(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_model_and_optimizer_come_back_bit_for_bit(
    tmp_path: Path, optimizer_class: type[torch.optim.Optimizer]
) -> None:
    model, optimizer = stepped(0, optimizer_class)
    path = save(tmp_path, PROGRESS, model, optimizer, keep=2)
    other, other_optimizer = stepped(1, optimizer_class)
    assert load(path, other, other_optimizer) == PROGRESS
    assert other.first.weight is other.second.weight
    for one, two in zip((model, optimizer), (other, other_optimizer), strict=True):
        for step in range(2):
            for thing in (model, other):
                for index, parameter in enumerate(thing.parameters()):
                    parameter.grad = torch.full_like(parameter, step + index * 0.1)
            optimizer.step()
            other_optimizer.step()
        assert type(one) is type(two)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    model, optimizer = stepped()
    (tmp_path / ".writing-step_00000001-999").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, Progress(step, 0, 0, 10, 0, 100), model, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "manifest", "link"])
def test_damage_is_found_and_the_state_before_is_used(tmp_path: Path, damage: str) -> None:
    model, optimizer = stepped()
    for step in (1, 2):
        save(tmp_path, Progress(step, 0, 0, 10, 0, 100), model, optimizer, keep=0)
    file = tmp_path / "step_00000002" / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-3])
    path, problems = newest_valid(tmp_path)
    assert path == tmp_path / "step_00000001"
    assert len(problems) == 1
    assert problems[0].startswith("step_00000002: ")


def test_a_failed_write_leaves_earlier_states_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()
    save(tmp_path, Progress(1, 0, 0, 10, 0, 100), model, optimizer, keep=1)

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_state, "save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, Progress(2, 0, 0, 10, 0, 100), model, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") is None


def test_a_state_of_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    model, optimizer = stepped()
    path = save(tmp_path, PROGRESS, model, optimizer, keep=1)
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SavedStateError, match=r"first.weight is not in the model.*|0.weight is missing"):
        load(path, other, torch.optim.AdamW(other.parameters()))
    wider = Tied()
    wider.norm = nn.BatchNorm1d(7)
    with pytest.raises(SavedStateError, match=r"norm.weight is torch.float32 \[4\], the model has .* \[7\]"):
        load(path, wider, torch.optim.AdamW(wider.parameters()))


def test_a_state_of_another_optimizer_or_of_other_windows_is_refused(tmp_path: Path) -> None:
    model, optimizer = stepped()
    path = save(tmp_path, PROGRESS, model, optimizer, keep=1)
    with pytest.raises(SavedStateError, match="AdamW"):
        load(path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(SavedStateError, match=r"batch.effective was 10 and is 20"):
        check_same_run(PROGRESS, Progress(0, 0, 0, 20, 0, 100))


def test_the_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    model, optimizer = stepped()
    path = save(tmp_path, PROGRESS, model, optimizer, keep=1)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json"
    ]  # fmt: skip
    assert json.loads((path / "progress.json").read_text())["step"] == 3


# --- which states count ---------------------------------------------------------------------------------


def at(step: int) -> Progress:
    return replace(PROGRESS, step=step, samples=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("junk", ["empty", "flipped", "cut", "file", "link"])
def test_keep_counts_whole_states_only(tmp_path: Path, keep: int, junk: str) -> None:
    model, optimizer = stepped()
    for number in (99999997, 99999998, 99999999):
        path = tmp_path / f"step_{number:08d}"
        if junk == "file":
            path.write_text("not a state")
        elif junk == "link":
            path.symlink_to(tmp_path)
        elif junk == "empty":
            path.mkdir()
        else:
            flip(save(tmp_path, at(number), model, optimizer, keep=0) / "model.safetensors")
    before = names(tmp_path)
    for step in (3, 6, 9):
        save(tmp_path, at(step), model, optimizer, keep=keep)
        assert newest_valid(tmp_path)[0] == tmp_path / f"step_{step:08d}"
    kept = ["step_00000006", "step_00000009"][-keep:]
    assert names(tmp_path) == sorted([*kept, *before])


def test_a_damaged_state_among_the_newest_makes_an_older_whole_one_stay(tmp_path: Path) -> None:
    model, optimizer = stepped()
    for step in (1, 2, 3):
        save(tmp_path, at(step), model, optimizer, keep=0)
    flip(tmp_path / "step_00000003" / "optimizer.safetensors")
    save(tmp_path, at(4), model, optimizer, keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    # what was written to after it was found whole is looked at again
    flip(tmp_path / "step_00000004" / "model.safetensors")
    save(tmp_path, at(5), model, optimizer, keep=2)
    assert names(tmp_path) == [f"step_0000000{step}" for step in (2, 3, 4, 5)]


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to a folder", "dangling link"])
def test_what_stands_in_the_place_of_a_state_is_stepped_over_and_told(tmp_path: Path, kind: str) -> None:
    model, optimizer = stepped()
    outside, folder = tmp_path / "outside", tmp_path / "saved"
    folder.mkdir()
    place = folder / "step_00000003"
    if kind == "file":
        place.write_text("somebody's notes")
    else:
        if kind == "link to a file":
            outside.write_text("somebody's notes")
        elif kind == "link to a folder":
            outside.mkdir()
        place.symlink_to(outside)
    told: list[str] = []
    save(folder, PROGRESS, model, optimizer, keep=1, tell=told.append)
    assert find_damage(place) is None
    assert names(folder) == ["step_00000003", "step_00000003.was-1"]
    assert "step_00000003.was-1" in told[0]
    assert kind != "file" or (folder / "step_00000003.was-1").read_text() == "somebody's notes"
    assert not outside.exists() or outside.is_file() or not any(outside.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_state_of_the_same_step_is_replaced_without_a_moment_that_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """Killed before or after any system call that changes names, one of the two is whole."""
    model, optimizer = stepped()
    save(tmp_path, PROGRESS, model, optimizer, keep=1)
    if not can_exchange:
        monkeypatch.setattr(states, "_exchange", lambda one, other: False)

    class Killed(BaseException):
        pass

    for nth in range(6):
        calls = 0

        def counted(original: Any, nth: int = nth) -> Any:
            def call(*given: Any, **more: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > nth:
                    raise Killed
                return original(*given, **more)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((states.os, "rename"), (states, "_exchange"), (states.shutil, "rmtree")):
                patch.setattr(module, name, counted(getattr(module, name)))
            with contextlib.suppress(Killed):
                save(tmp_path, PROGRESS, model, optimizer, keep=1)
        states.finish_interrupted(tmp_path)
        path, problems = newest_valid(tmp_path)
        assert path == tmp_path / "step_00000003", f"killed at call {nth}"
        assert problems == []


def test_a_state_that_only_lacks_its_name_gets_it_and_torn_ones_go(tmp_path: Path) -> None:
    model, optimizer = stepped()
    whole = save(tmp_path, PROGRESS, model, optimizer, keep=0)
    whole.rename(tmp_path / ".writing-step_00000003-77")
    torn = save(tmp_path, at(5), model, optimizer, keep=0)
    # the save itself sweeps; here the process was killed before it began
    assert names(tmp_path) == ["step_00000005"]
    torn.rename(tmp_path / ".writing-step_00000005-78")
    (tmp_path / ".writing-step_00000006-79").mkdir()
    (tmp_path / ".writing-step_00000006-79" / "model.safetensors").write_bytes(b"half")
    states.finish_interrupted(tmp_path)
    assert names(tmp_path) == ["step_00000005"]
    assert find_damage(tmp_path / "step_00000005") is None


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775)])
def test_all_files_of_a_state_follow_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    model, optimizer = stepped()
    before = os.umask(umask)
    try:
        path = save(tmp_path / "saved", PROGRESS, model, optimizer, keep=1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.iterdir()} == {file}
    assert stat.S_IMODE(path.stat().st_mode) == folder


# --- what is in them is not believed --------------------------------------------------------------------


def mend(path: Path) -> None:
    """Make the manifest fit whatever is there now."""
    manifest = {name: states.fingerprint(path / name) for name in states.FILES}
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_progress(path: Path, **changes: Any) -> None:
    data = json.loads((path / "progress.json").read_text())
    for key, value in changes.items():
        section = data["optimizer"] if key.startswith("optimizer_") else data
        section[key.removeprefix("optimizer_")] = value
    (path / "progress.json").write_text(json.dumps(data))


def change_tensors(path: Path, file: str, **changes: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / file)
    for key, value in changes.items():
        name = key.replace("__", ".").replace("_OF_", "/")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path / file)


NAN, ONES = torch.full((4, 4), float("nan")), torch.ones(4, 4)
ODD_PROGRESS: list[dict[str, Any]] = [
    {"step": -5}, {"step": 10**30}, {"step": 2.0}, {"step": True}, {"step": "2"}, {"step": None},
    {"samples": -1}, {"samples": 10**9}, {"samples": 1.5}, {"tokens": -1}, {"tokens": "0"}, {"tokens": 10**30},
    {"effective_batch": 0}, {"effective_batch": -10}, {"effective_batch": 20}, {"seed": -1}, {"seed": 1.0},
    {"seed": 7}, {"data_samples": 0}, {"data_samples": 101}, {"drop_last": 0}, {"drop_last": True},
    {"updates": -1}, {"updates": 3}, {"updates": 1.0}, {"skipped": -1}, {"skipped": 10**30},
    {"skipped_in_row": 5}, {"nonfinite_in_row": 1}, {"moved": "yes"}, {"scaler": 3}, {"scaler": {"scale": "big"}},
    {"scaler": {"scale": float("inf")}}, {"unheard_of": 1}, {"__class__": "os.system"},
    {"aliases": None}, {"aliases": []}, {"aliases": {"second.weight": 3}}, {"aliases": {}},
    {"aliases": {"second.weight": "nowhere"}}, {"aliases": {"second.weight": "first.weight", "x": "first.weight"}},
    {"aliases": {"second.weight": "first.weight", "second.bias": "first.bias"}},
    {"optimizer": None}, {"optimizer": []}, {"optimizer": {}}, {"optimizer_class": 3},
    {"optimizer_class": "SGD"}, {"optimizer_class": "os.system"}, {"optimizer_values": None},
    {"optimizer_values": {"nowhere/step": 1}}, {"optimizer_values": {"first.bias/exp_avg": {"a": [1]}}},
    {"optimizer_values": {"first.bias/step": 2}}, {"optimizer_values": {"step": 2}}, {"optimizer_tensors": 1},
    {"optimizer_tensors": "9"}, {"optimizer_tensors": -1},
]  # fmt: skip
ODD_MODEL: list[dict[str, Any]] = [
    {"first__weight": NAN}, {"first__weight": None}, {"first__weight": torch.ones(4, 5)},
    {"first__weight": ONES.double()}, {"first__weight": ONES.int()},
    {"more": ONES}, {"norm__running_mean": None}, {"norm__num_batches_tracked": torch.ones(())},
    {"first__bias": torch.tensor([1.0, 2.0, float("inf"), 0.0])}, {"first__weight": torch.ones(0)},
]  # fmt: skip
ODD_OPTIMIZER: list[dict[str, Any]] = [
    {"first__weight_OF_exp_avg": None}, {"first__weight_OF_exp_avg": NAN},
    {"first__weight_OF_exp_avg": torch.ones(3)}, {"first__weight_OF_exp_avg": ONES.long()},
    {"first__weight_OF_step": torch.tensor(-1.0)},
    {"first__weight_OF_step": torch.tensor(1e30)}, {"first__weight_OF_step": torch.ones(2)},
    {"first__weight_OF_step": torch.tensor(float("nan"))}, {"first__weight_OF_step": None},
    {"more_OF_exp_avg": ONES}, {"first__weight": ONES},
]  # fmt: skip
ODD_BYTES: list[tuple[str, bytes]] = [
    *((file, content) for file in ("model.safetensors", "optimizer.safetensors") for content in (
        b"", b"\x80\x04\x95", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      ", b"PK\x03\x04",
    )),
    *(("progress.json", content) for content in (
        b"", b"[]", b"null", b"[" * 200_000, b"\x80\x04\x95.", b'{"step": NaN}',
    )),
]  # fmt: skip


def odd_cases() -> list[Any]:
    cases: list[Any] = [pytest.param("progress", case, id=f"progress {case}") for case in ODD_PROGRESS]
    for kind, listed in (("model.safetensors", ODD_MODEL), ("optimizer.safetensors", ODD_OPTIMIZER)):
        cases += [pytest.param(kind, case, id=f"{kind} {nth} {[*case]}") for nth, case in enumerate(listed)]
    cases += [pytest.param("bytes", case, id=f"{case[0]} {case[1][:9]!r}") for case in ODD_BYTES]
    return cases


@pytest.fixture(scope="module")
def two_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    model, optimizer = stepped()
    for step in (1, 2):
        save(folder, replace(at(step), updates=1, skipped=step - 1), model, optimizer, keep=0)
    return folder


@pytest.mark.parametrize(("kind", "case"), odd_cases())
def test_an_odd_state_with_mended_checksums_is_passed_over_for_an_older_one(
    tmp_path: Path, two_states: Path, kind: str, case: Any
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(two_states, folder)
    newest = folder / "step_00000002"
    if kind == "progress":
        change_progress(newest, **case)
        # a name that fits what it says makes it no better
        step = case.get("step")
        if type(step) is int:
            newest = newest.rename(folder / f"step_{step:08d}")
    elif kind == "bytes":
        (newest / case[0]).write_bytes(case[1])
    else:
        change_tensors(newest, kind, **case)
    mend(newest)
    model, optimizer = stepped(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, problems = newest_usable(folder, model, optimizer, None, at(0), total_steps=10)
    assert found is not None
    assert found.path == folder / "step_00000001"
    is_listed = states.STATE_NAME.fullmatch(newest.name) is not None and newest.name > "step_00000001"
    assert [problem.partition(":")[0] for problem in problems] == [newest.name] * is_listed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.fill(model, optimizer, None).step == 1


def test_a_state_past_the_end_of_the_run_is_refused_with_what_to_type(two_states: Path) -> None:
    with pytest.raises(SavedStateError, match=r"train\.steps=2 or more"):
        newest_usable(two_states, *stepped(), None, at(0), total_steps=1)


def test_where_no_state_is_left_the_refusal_lists_each_with_its_reason_and_the_way_on(tmp_path: Path) -> None:
    model, optimizer = stepped()
    for step in (1, 2):
        flip(save(tmp_path, at(step), model, optimizer, keep=0) / "model.safetensors")
    (tmp_path / "step_00000003").mkdir()
    found, problems = newest_usable(tmp_path, model, optimizer, None, at(0), total_steps=10)
    assert found is None
    text = str(states.none_usable(tmp_path, problems))
    assert [line.strip().partition(":")[0] for line in text.splitlines()[1:-1]] == [
        "step_00000003", "step_00000002", "step_00000001"
    ]  # fmt: skip
    assert f"gatrain resume {tmp_path.parent} --from-start" in text


def test_a_state_that_was_saved_before_updates_were_counted_can_be_read(tmp_path: Path) -> None:
    model, optimizer = stepped()
    path = save(tmp_path, at(2), model, optimizer, keep=0)
    data = json.loads((path / "progress.json").read_text())
    for key in ("updates", "skipped", "skipped_in_row", "nonfinite_in_row", "moved", "drop_last"):
        del data[key]
    del data["optimizer"]["tensors"]
    (path / "progress.json").write_text(json.dumps(data))
    mend(path)
    assert load(path, model, optimizer) == replace(at(2), updates=2, moved=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adafactor", {}), ("Adagrad", {}), ("RMSprop", {"centered": True, "momentum": 0.9}), ("NAdam", {}),
     ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("SGD", {}), ("Rprop", {}),
     ("ASGD", {}), ("Adadelta", {})],
    ids=str,
)  # fmt: skip
def test_states_of_all_of_pytorchs_optimizers_are_what_they_can_be(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3))
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)

    model, optimizer = made()
    for _ in range(3):
        model(torch.ones(1, 1, 2, 2)).sum().backward()
        optimizer.step()
    progress = replace(at(3), updates=3)
    path = save(tmp_path, progress, model, optimizer, keep=0)
    assert load(path, *made()) == progress


def test_tensors_that_share_memory_are_saved_each_whole(tmp_path: Path) -> None:
    model, optimizer = stepped()
    shared = torch.arange(6.0)
    for parameter in model.parameters():
        optimizer.state[parameter]["of_all"] = shared
    kept = {"whole": shared, "part": shared[2:], "again": {"whole": shared}, "other": torch.zeros(0)}
    given = saved_state.snapshot(PROGRESS, model, optimizer, parts={"hook": kept})
    path = saved_state.write(tmp_path, given, keep=2)
    loaded = saved_state.read(path, *stepped(1))
    assert all(torch.equal(value, shared) for _, key, value in loaded.optimizer if key == "of_all")
    found = loaded.parts["hook"]
    assert [found["part"].tolist(), found["again"]["whole"].tolist()] == [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.complex128)])
def test_a_tensor_that_no_file_holds_is_told_by_its_place(value: torch.Tensor) -> None:
    with pytest.raises(SavedStateError, match=r"the state of it holds a tensor of torch\..* at a/0, which"):
        saved_state.snapshot(PROGRESS, *stepped(), parts={"it": {"a": [value]}})
