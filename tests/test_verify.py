"""`gatrain verify` says exact where it is, and says what is not and why where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import run

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, norm="none", dropout=0.0):
        super().__init__()
        norms = {"none": nn.Identity(), "batch": nn.BatchNorm1d(16), "layer": nn.LayerNorm(16)}
        self.body = nn.Sequential(
            nn.Linear(6, 16), norms[norm], nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)
        )

    def forward(self, x):
        return self.body(x)

def data(count=60):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(3, (count,), generator=generator))

def contrastive(outputs, targets):
    # every sample is compared with all others of its batch: a mean that does not decompose
    return torch.nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "defaults: [base, _self_]\n"
        "model: {_target_: mine.Net, norm: none, dropout: 0.0}\n"
        "data: {_target_: mine.data}\n"
        "loss: {_target_: torch.nn.CrossEntropyLoss}\n"
    )
    return tmp_path


def verify(folder: Path, *words: str, expect: int) -> dict[str, Any]:
    done = run("verify", "--json", *words, cwd=folder, timeout_s=600)
    assert done.returncode == expect, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def errors_of(report: dict[str, Any], precision: str, mutation: bool = False) -> list[float]:
    return [
        case["relative_error"]
        for case in report["cases"]
        if case["precision"] == precision and case["mutation"] == mutation
    ]


SMALL = {
    "llm": ["data.context=32", "model.layers=2", "model.width=48"],
    "gpt2": [
        "data.context=48", "data.vocab_size=512", "model.context=48", "model.layers=2", "model.width=48",
        "model.heads=4", "model.vocab_size=512", "batch.effective=24",
    ],
    "padded": ["data.vocab_size=400", "model.width=32", "model.layers=1"],
    "vision": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real text, so that no test waits for a tokenizer of eleven megabytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(Path(json.__file__).parent.joinpath(f"{n}.py").read_text() for n in
                                ("__init__", "decoder", "encoder", "scanner")))  # fmt: skip
    return path


@pytest.mark.parametrize("recipe", SMALL)
def test_every_recipe_is_exact_and_the_mutations_are_caught(tmp_path: Path, text: Path, recipe: str) -> None:
    words = [f"recipe={recipe}", *SMALL[recipe]]
    if recipe != "vision":
        words.append(f"data.path={text}")
    report = verify(tmp_path, *words, expect=0)
    assert max(errors_of(report, "fp64")) <= 1e-12
    assert max(errors_of(report, "fp32")) <= 2e-6
    assert len(errors_of(report, "fp64")) == 3  # planned, awkward, two processes
    assert min(errors_of(report, "fp64", mutation=True)) > 1e-3
    assert {case["name"] for case in report["cases"] if case["mutation"]} == {
        "mutation: mean of means", "mutation: ranks averaged"
    }  # fmt: skip


def test_batch_norm_is_not_called_exact(folder: Path) -> None:
    report = verify(folder, "recipe=mine", "model.norm=batch", expect=10)
    assert not report["passed"]
    assert max(error for error in errors_of(report, "fp64") if error is not None) > 1e-3
    assert any("BatchNorm" in note and "body.1" in note for note in report["notes"])


def test_dropout_is_left_out_and_said_so(folder: Path) -> None:
    report = verify(folder, "recipe=mine", "model.dropout=0.5", "model.norm=layer", expect=0)
    assert any("Dropout" in note for note in report["notes"])


def test_a_loss_that_does_not_decompose_is_named(folder: Path) -> None:
    recipe = (folder / "recipes" / "mine.yaml").read_text()
    (folder / "recipes" / "pairs.yaml").write_text(
        recipe.replace("torch.nn.CrossEntropyLoss", "mine.contrastive, _partial_: true")
    )
    report = verify(folder, "recipe=pairs", expect=10)
    broken = [case for case in report["cases"] if not case["passed"]]
    assert broken
    assert any("which samples share a micro-batch" in (case["error"] or "") for case in broken)
