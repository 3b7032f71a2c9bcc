"""The examples of FROM_OTHER_FRAMEWORKS.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gatrain.compose import compose

PAGE = (Path(__file__).parent.parent / "FROM_OTHER_FRAMEWORKS.md").read_text(encoding="utf-8")
SETUP = "The examples' set-up"
WHOLE = (16, 6)
WINDOWS = {
    "Accelerate": WHOLE,
    "Lightning": (*WHOLE, 8, 8, 6),
    "DeepSpeed": WHOLE,
    "Composer": WHOLE,
    "Plain PyTorch": WHOLE,
}
"""Samples of each step that an example makes."""


def example(heading: str, language: str = "python") -> str:
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section
    return str(re.search(rf"```{language}\n(.*?)```", section[1], re.DOTALL)[1])  # type: ignore[index]


def test_every_example_is_run() -> None:
    assert PAGE.count("```python") == len(WINDOWS) + 2  # and the set-up, and Keras: test_keras.py


@pytest.mark.parametrize("heading", WINDOWS)
def test_an_example_makes_the_steps_of_the_whole_windows(heading: str) -> None:
    found: dict[str, Any] = {}
    exec(example(SETUP) + example(heading), found)
    right: dict[str, Any] = {}
    exec(example(SETUP), right)
    model, inputs, targets = right["model"], right["inputs"], right["targets"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = 0
    for size in WINDOWS[heading]:
        optimizer.zero_grad()
        nn.MSELoss()(model(inputs[first : first + size]), targets[first : first + size]).backward()
        optimizer.step()
        first = (first + size) % len(inputs)
    for one, other in zip(found["model"].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_recipe_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(example("HF Trainer", "yaml"))
    composed = compose(["recipe=mine", "+task.mean=sequence", "+task.label_smoothing=0.1"])
    assert composed.config.batch.effective == 128
    assert composed.leaves["task._target_"] == "gatrain.tasks.HuggingFace"
