"""The GAN recipe: latents belong to samples, each phase is exact in any split, and its pictures are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import gatrain, run
from PIL import Image
from torch.utils.data import TensorDataset

from gatrain.errors import ConfigError
from gatrain.hooks.sample_grid import SampleGrid
from gatrain.tasks.gan import frechet
from gatrain.tasks.latents import Keyed, latents
from gatrain.train.samples import read


def test_latents_follow_from_the_key_alone_and_are_standard_normal() -> None:
    keys = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    whole = latents(keys, 3, 5, which=(1, 0))
    torch.manual_seed(2)
    assert torch.cat([latents(part, 3, 5, which=(1, 0)) for part in keys.split([1, 7, 3992])]).equal(whole)
    assert not latents(keys, 3, 5, which=(1, 1)).eq(whole).any()
    flat = torch.cat([whole.flatten(1), latents(keys, 15, which=(0, 0))], 1)
    assert float(flat.mean(0).abs().max()) < 5 / 4000**0.5
    assert float((torch.cov(flat.T) - torch.eye(30)).abs().max()) < 6 / 4000**0.5
    assert float(flat.pow(4).mean()) == pytest.approx(3, abs=0.1)


def test_a_sample_has_one_key_in_an_epoch_whatever_is_read_with_it() -> None:
    data = Keyed(TensorDataset(torch.arange(9.0), torch.arange(9)))

    class Reader:
        train_data = data

    def keys(epoch: int, ids: list[int]) -> list[int]:
        return [int(sample[1]) for sample in read(Reader(), data, [(epoch, i) for i in ids], 5)]  # type: ignore[arg-type]

    assert keys(0, [4, 2]) == [*keys(0, [4]), *keys(0, [2])]
    assert len({*keys(0, [0, 1, 2]), *keys(1, [0, 1, 2])}) == 6


def test_the_frechet_distance_is_that_of_two_normal_distributions() -> None:
    points = torch.randn(500, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    assert frechet(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet(points, points + 0.5) == pytest.approx(8 * 0.25)
    centred = points - points.mean(0)
    assert frechet(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(centred.flatten(1).T).trace()))


def test_the_recipe_is_exact_in_every_phase(tmp_path: Path) -> None:
    done = run("verify", "--json", "recipe=gan", "batch.effective=14", "device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    exact = [
        each["relative_error"]
        for each in json.loads(done.stdout)["cases"]
        if each["precision"] == "fp64" and not each["mutation"]
    ]
    assert len(exact) == 6  # three splits of two phases
    assert max(exact) < 1e-12


def test_a_run_leaves_a_picture_for_each_evaluation_and_says_how_good_it_is(tmp_path: Path) -> None:
    words = "recipe=gan", "run.dir=run", "train.epochs=null", "train.steps=4", "eval.every=2", "device=cpu"
    printed = gatrain(tmp_path, "fit", *words, "batch.micro=24")
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    assert [each.name for each in pictures] == ["step_00000002.png", "step_00000004.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (10 * (8 * 4 + 2) + 2,) * 2
    assert "Fréchet distance" in printed
    last = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["loss_terms"].keys() == {"discriminator", "penalty", "generator"}
    assert 0 <= last["caught"] <= 1 < last["distance"]


def test_a_grid_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole number"):
        SampleGrid(rows=0)
