"""Samples that cannot be read, left out with weight zero: exact over the others, same windows, counted, named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import gatrain, metrics
from distributed import run_on_ranks
from PIL import Image
from test_exact_gradient import gradient, relative_error
from test_runs import largest_relative_difference, weights
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from gatrain.data import ImageFolderData
from gatrain.errors import BrokenSampleError, DataError
from gatrain.tasks import Supervised
from gatrain.train import samples
from gatrain.train.accumulate import gradient_step
from gatrain.train.loader import WindowLoader
from gatrain.train.ranks import Ranks
from gatrain.train.windows import WindowSchedule

SEED, WINDOW = 3, 8
BROKEN = ("cat/1.png", "cat/5.png", "dog/2.png", "dog/3.png", "dog/9.png")

MODULE = """
import torch
from torch import nn
from gatrain.errors import BrokenSampleError

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

def flat(classes=2):
    return nn.Linear(6, classes)

class Points(torch.utils.data.Dataset):
    def __init__(self, broken, count=32):
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
        self.broken = broken
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenSampleError(f"point {index} is lost", skip=True)
        return self.x[index] + 0.1 * torch.randn(6), index % 2
"""


def pictures(root: Path, count: int = 12, broken: tuple[str, ...] = BROKEN) -> Path:
    numbers = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for nth in range(count):
            Image.fromarray(numbers.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(
                root / name / f"{nth}.png"
            )
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:80])
    return root


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()


def task_over(root: Path) -> Supervised:
    data = ImageFolderData(root, size=8, eval_fraction=0, broken="skip")
    return Supervised(net, data, torch.nn.CrossEntropyLoss(label_smoothing=0.1))


def double(batch: Any) -> Any:
    return batch[0].double(), batch[1]


def gradients_of_both(root: str) -> list[list[dict[str, Any]]]:
    return [gradients(root, micro) for micro in (1, 4)]


def gradients(root: str, micro: int, workers: int = 0) -> list[dict[str, Any]]:
    """Gradient and counts of each window of an epoch, on this rank's share."""
    task, ranks = task_over(Path(root)), Ranks.current()
    schedule = WindowSchedule(len(task.train_data), WINDOW, SEED)
    model = net()
    step = gradient_step(
        model,
        lambda batch: task.loss_sum(model, double(batch)),
        term_names=["loss"],
        ranks=ranks,
        stage=lambda batch: lambda: batch,
    )
    found = []
    loader = WindowLoader(task, schedule, ranks, micro_batch=micro, start=0, stop=3, workers=workers)
    for loaded in loader:
        model.zero_grad()
        result, _ = step.gradient(loaded)
        counts = {name: result.counts[name] for name in ("samples", "dropped")}
        found.append({"gradient": gradient(model), "total": result.weight_totals["loss"], **counts})
    return found


def one_shot(root: Path) -> list[dict[str, Any]]:
    """The same over the samples that can be read, each read alone, in one batch."""
    task = task_over(root)
    schedule = WindowSchedule(len(task.train_data), WINDOW, SEED)
    found = []
    for index in range(3):
        window = schedule.window(index)
        keys = [(window.epoch, int(sample)) for sample in window.ids]
        readable = [
            sample
            for key in keys
            for sample in samples.read(task, task.train_data, [key], SEED)
            if not isinstance(sample, samples.Skipped)
        ]
        model = net()
        inputs, targets = torch.utils.data.default_collate(readable)
        loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(model(inputs.double()), targets)
        loss.backward()
        found.append({"gradient": gradient(model), "total": len(readable), "dropped": WINDOW - len(readable)})
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "root")


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_that_over_the_samples_that_can_be_read(root: Path, world_size: int) -> None:
    expected = one_shot(root)
    assert [each["dropped"] for each in expected] != [0, 0, 0]
    assert sum(each["dropped"] for each in expected) == len(BROKEN)
    words = gradients_of_both, str(root)
    for both in [gradients_of_both(str(root))] if world_size == 1 else run_on_ranks(2, *words):
        for found in both:
            for one, other in zip(found, expected, strict=True):
                assert relative_error(one["gradient"], other["gradient"]) < 1e-12
                assert (one["total"], one["samples"]) == (other["total"], other["total"])
                assert one["dropped"] == other["dropped"]


def test_loader_processes_skip_the_same(root: Path) -> None:
    for one, other in zip(gradients(str(root), 4, workers=1), gradients(str(root), 4), strict=True):
        assert torch.equal(one["gradient"], other["gradient"])
        assert one["dropped"] == other["dropped"]


class Numbers(torch.utils.data.Dataset[Any]):
    """Samples of which some are broken."""

    def __init__(self, broken: set[int], skip: bool = True, together: bool = False) -> None:
        self.broken, self.skip = broken, skip
        if together:
            self.deterministic = True
            self.__getitems__ = lambda indices: [self[index] for index in indices]

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self.broken:
            raise BrokenSampleError(f"number {index} is lost", skip=self.skip)
        return torch.full((3,), float(index)), torch.tensor(1.0)


def over(data: Any) -> Supervised:
    return Supervised(lambda: nn.Linear(3, 1), data, torch.nn.MSELoss())


@pytest.mark.parametrize("together", [False, True])
def test_any_map_style_dataset_can_skip_also_behind_subsets(together: bool) -> None:
    whole = Numbers({1, 2, 150}, together=together)
    for data, ids in (
        (whole, [0, 1, 2, 3]),
        (Subset(whole, range(200)), [0, 1, 2, 3]),
        (ConcatDataset([whole]), [0, 150]),
    ):
        found = samples.load(over(data), data, [(0, each) for each in ids], 0)
        assert [int(row[0]) for row in found.batch[0]] == [each for each in ids if each not in whole.broken]
        assert found.skipped == tuple(f"number {each} is lost" for each in ids if each in whole.broken)
        assert (found.samples, found.dropped) == (len(found.batch[0]), len(found.skipped))
        assert [sample for _, sample in found.keys] == ids
    nothing = samples.load(over(whole), whole, [(0, 1), (0, 2)], 0)
    assert nothing.is_empty
    assert (nothing.samples, nothing.dropped, len(nothing.skipped)) == (0, 2, 2)
    stops = Numbers({1}, skip=False)
    with pytest.raises(BrokenSampleError, match="number 1 is lost"):
        samples.load(over(stops), stops, [(0, 0), (0, 1)], 0)


def test_measurements_find_a_sample_that_can_be_read_or_say_that_there_is_none() -> None:
    mostly = Numbers(set(range(100)))
    assert float(samples.read_one(over(mostly), mostly, (0, 3), 0)[0][0]) >= 100
    with pytest.raises(DataError, match=r"none of the samples .* number \d+ is lost"):
        samples.read_one(over(mostly), Numbers(set(range(200))), (0, 3), 0)


class Files(Numbers):
    def __init__(self) -> None:
        super().__init__(set())
        self.paths = [f"photos/{index}.png" for index in range(200)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 7:
            raise ValueError("bad header")
        return super().__getitem__(index)


def test_an_error_of_any_dataset_names_the_file_of_the_one_sample_that_failed() -> None:
    data = Files()
    with pytest.raises(
        DataError, match=r"cannot load the samples 7 \(photos/7.png\): ValueError: bad header"
    ):
        samples.load(over(data), data, [(0, 3), (0, 7), (0, 9)], 0)
    part = Subset(data, range(3, 12))
    with pytest.raises(DataError, match=r"the samples 4 \(photos/7.png\): ValueError"):
        samples.load(over(part), part, [(0, 1), (0, 4)], 0)


# Whole runs

RECIPE = """
defaults: [base, data: image_folder, _self_]
model: {_target_: points.net}
data: {path: root, size: 8, eval_fraction: 0.25, broken: skip}
loss: {_target_: torch.nn.CrossEntropyLoss}
batch: {effective: 6, micro: 2}
"""
WORDS = [
    "optimizer=sgd", "optimizer.lr=0.05", "precision=fp32", "train.seed=3", "save.every=4", "save.keep=0",
    "eval.every=4", "train.steps=8", "checkpointing=none", "compile=false", "sync=window",
]  # fmt: skip


def test_a_run_skips_counts_and_lists_and_goes_on_with_other_processes_to_the_same_weights(
    tmp_path: Path,
) -> None:
    pictures(tmp_path / "root")
    (tmp_path / "points.py").write_text(MODULE)
    (tmp_path / "images.yaml").write_text(RECIPE)
    printed = gatrain(tmp_path, "fit", "recipe=images.yaml", *WORDS, "run.dir=one")
    lines = metrics(tmp_path / "one")
    total = sum(line["unreadable_samples"] for line in lines)
    assert total > 0
    named = [text for line in lines for text in line.get("unreadable", [])]
    assert len(named) == total
    assert all("cannot read the image" in text and "root/" in text for text in named)
    assert "could not be read and have weight zero" in printed
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["unreadable_samples"] == total
    assert summary["unreadable"] == list(dict.fromkeys(named))
    assert f"{total} samples" in printed
    evaluations = [
        json.loads(line) for line in (tmp_path / "one" / "evaluations.jsonl").read_text().splitlines()
    ]
    held_out_broken = 5 - len(set(named))
    assert [line.get("unreadable_samples", 0) for line in evaluations] == [held_out_broken] * len(evaluations)

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "saved" / "step_00000008")
    (tmp_path / "two" / "summary.json").unlink()
    gatrain(tmp_path, "resume", "two", "--nproc", "2")
    again = metrics(tmp_path / "two")
    assert [line["window"] for line in again] == [line["window"] for line in lines]
    assert [sorted(line.get("unreadable", [])) for line in again] == [
        sorted(line.get("unreadable", [])) for line in lines
    ]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["unreadable_samples"] == total
    assert largest_relative_difference(weights(tmp_path / "one", 8), weights(tmp_path / "two", 8)) < 1e-5

    shutil.rmtree(tmp_path / "two")
    seed = seed_with_a_whole_first_window(tmp_path / "root")
    words = [*WORDS, f"train.seed={seed}", "save.every=1", "eval.every=0", "data.broken=stop"]
    printed = gatrain(tmp_path, "fit", "recipe=images.yaml", *words, "run.dir=two", expect=4)
    assert "cannot read the image" in printed
    assert "Traceback" not in printed
    (advice,) = re.findall(r"with (data\.broken=skip)", printed)
    assert "skipped with weight zero" in gatrain(tmp_path, "resume", "two", advice)
    assert [line["step"] for line in metrics(tmp_path / "two")] == list(range(1, 9))


def seed_with_a_whole_first_window(root: Path) -> int:
    data = ImageFolderData(root, size=8, eval_fraction=0.25)
    broken = {nth for nth, (path, _) in enumerate(data.train.samples) if path.endswith(BROKEN)}
    return next(
        seed
        for seed in range(1000)
        if not broken & set(WindowSchedule(len(data.train), 6, seed).window(0).ids.tolist())
    )


def test_a_window_of_which_nothing_can_be_read_makes_no_update_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "points.py").write_text(MODULE)
    lost = WindowSchedule(32, 4, 3).window(1).ids.tolist()
    (tmp_path / "points.yaml").write_text(
        f"defaults: [base, _self_]\nmodel: {{_target_: points.flat}}\n"
        f"data: {{_target_: points.Points, broken: {lost}}}\n"
        "loss: {_target_: torch.nn.CrossEntropyLoss}\nbatch: {effective: 4, micro: 2}\n"
    )
    words = ["recipe=points.yaml", *WORDS[:-5], "train.steps=4", *WORDS[-3:], "run.dir=run"]
    printed = gatrain(tmp_path, "launch", "--nproc", "2", *words)
    assert "step 2: no sample of the window can be read; no update was made" in printed
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [None, "no sample that can be read", None, None]
    assert lines[1]["loss"] is None
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 3
