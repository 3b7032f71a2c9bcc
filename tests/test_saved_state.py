"""A saved state is complete or absent, belongs to its run, and holds nothing that could run code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gatrain.errors import SavedStateError
from gatrain.train import saved_state
from gatrain.train.saved_state import Progress, check_same_run, find_damage, load, newest_valid, save

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
