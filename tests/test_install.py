"""From a wheel, in an empty folder, with a ten-line module and a four-line recipe of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

def points():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
""".lstrip()
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.net}
data: {_target_: mine.points}
loss: {_target_: torch.nn.MSELoss}
""".lstrip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, apart from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    python = [sys.executable, "-m"]
    subprocess.run(
        [*python, "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run(
        [*python, "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)],
        check=True,
        timeout=300,
    )
    return site


def run(site: Path, cwd: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "gatrain", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_recipes_and_configuration(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gatrain/_assets/")}
    shipped = {
        f"gatrain/_assets/{path.relative_to(REPOSITORY)}"
        for folder in ("conf", "recipes")
        for path in (REPOSITORY / folder).rglob("*.yaml")
    }
    assert shipped <= inside
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(("conf/", "recipes/"))]


def test_recipes_are_found_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    printed = run(installed, tmp_path, "recipes")
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        assert path.stem in printed
    assert "_assets" in run(installed, tmp_path, "show", "recipe=vision", "--json")


def test_a_users_own_module_and_recipe_train(installed: Path, tmp_path: Path) -> None:
    assert len(MODULE.splitlines()) <= 10
    assert len(RECIPE.splitlines()) <= 4
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    run(installed, tmp_path, "fit", "recipe=mine", "optimizer.lr=0.01", "train.steps=60", "run.dir=result")
    lines = (tmp_path / "result" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "result" / "saved" / "step_00000060" / "model.safetensors").is_file()
    plan = json.loads((tmp_path / "result" / "plan.json").read_text())
    assert sum(map(sum, plan["micro_batches"])) == plan["effective_batch"] == 32
