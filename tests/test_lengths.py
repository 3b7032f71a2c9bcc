"""Batches whose shapes differ are noticed by reading some; what the user declares is never changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatrain.data.padded import PaddedText
from gatrain.tasks import Supervised
from gatrain.tasks.base import Task
from gatrain.train.lengths import notice_lengths
from gatrain.tune.trials.batches import TrialBatches


class Ragged:
    """``count`` samples of 3 to 12 numbers, or all of ``length``."""

    def __init__(self, count: int = 40, length: int | None = None) -> None:
        self.count, self.length, self.reads = count, length, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return torch.arange(self.length or 3 + index % 10).float()


class Sums(Task):
    def __init__(self, data: Any, to: int | None = None) -> None:
        self.train_data, self._to = data, to

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def collate(self, samples: list[Any]) -> Tensor:
        longest = self._to or max(map(len, samples))
        return torch.stack([nn.functional.pad(x, (0, longest - len(x))) for x in samples])

    def weight(self, batch: Tensor) -> int:
        return len(batch)

    def loss_sum(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return model(batch[..., None]).sum(), len(batch)


def test_lengths_that_vary_are_noticed_and_said() -> None:
    task = Sums(Ragged())
    found = notice_lengths(task, seed=0)
    assert task.variable_length is True
    assert TrialBatches(task).vary
    assert "Batches differ in shape" in found.sentence
    assert max(found.sizes) == 12


def test_a_collate_that_pads_all_batches_to_one_length_makes_none_that_differ() -> None:
    task = Sums(Ragged(), to=12)
    assert notice_lengths(task, seed=0).sentence == ""
    assert task.variable_length is False
    equal = Sums(Ragged(length=7))
    notice_lengths(equal, seed=0)
    assert equal.variable_length is False


def test_equal_samples_whose_collate_cuts_them_are_noticed() -> None:
    class Cropping(Sums):
        def collate(self, samples: list[Any]) -> Tensor:
            return super().collate([x[: int(torch.randint(3, 9, ()))] for x in samples])

    task = Cropping(Ragged(length=9))
    before = torch.get_rng_state()
    notice_lengths(task, seed=0)
    assert task.variable_length is True
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("declared", [True, False])
def test_a_declaration_is_taken_and_nothing_is_read(declared: bool) -> None:
    task = Sums(Ragged())
    task.variable_length = declared
    assert notice_lengths(task, seed=0).vary is declared
    assert task.variable_length is declared
    assert task.train_data.reads == 0


def test_what_cannot_be_read_is_left_to_the_training_to_tell() -> None:
    class Broken(Ragged):
        def __getitem__(self, index: int) -> Tensor:
            raise OSError("no such file")

    task = Sums(Broken())
    assert notice_lengths(task, seed=0).sentence == ""
    assert task.variable_length is False


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_few_samples_are_enough(count: int) -> None:
    task = Sums(Ragged(count))
    notice_lengths(task, seed=0)
    assert task.variable_length is (count > 1)


def test_data_may_declare_it_and_shipped_data_does() -> None:
    class Source:
        train, variable_length = Ragged(), False

    assert Supervised(nn.Linear, Source()).variable_length is False
    del Source.variable_length
    assert Supervised(nn.Linear, Source()).variable_length is None
    Source.train.variable_length = True  # type: ignore[attr-defined]
    assert Supervised(nn.Linear, Source()).variable_length is True
    assert PaddedText.variable_length is True
