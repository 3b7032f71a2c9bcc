"""Mixtures: exact shares in every epoch, no sample twice before all of its part came, for any number of ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from gatrain import build, targets
from gatrain.config import BatchConfig, RunConfig, TrainConfig
from gatrain.data import Mixture, TextWindows
from gatrain.errors import ConfigError
from gatrain.train.data_look import look_at_data
from gatrain.train.loader import WindowLoader
from gatrain.train.ranks import Ranks

SIZES = {"web": 50, "books": 20, "code": 7}


class Part(Dataset[Any]):
    """``size`` samples that are ``first`` to ``first + size - 1``, augmented at random."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(self.first + index)]) + torch.rand(1) / 2, torch.zeros(1)


class Source:
    def __init__(self, first: int, size: int) -> None:
        self.train = Part(first, size)
        self.eval = Part(1000 + first, 2)


def config_of(**data: Any) -> RunConfig:
    firsts = dict(zip(SIZES, (0, 50, 70), strict=True))
    parts = {
        name: {"_target_": "test_mixture.Source", "first": firsts[name], "size": size}
        for name, size in SIZES.items()
    }
    return dataclasses.replace(
        RunConfig(),
        data={"_target_": "gatrain.data.Mixture", "parts": parts, **data},
        model={"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
        loss={"_target_": "torch.nn.MSELoss"},
        task={"_target_": "gatrain.tasks.Supervised"},
        train=TrainConfig(steps=9, seed=5),
        batch=BatchConfig(effective=12),
    )


def test_every_epoch_has_the_exact_shares_and_a_part_repeats_only_when_it_is_used_up() -> None:
    mixture = Mixture({name: Part(0, size) for name, size in SIZES.items()}, [0.5, 0.2, 0.3], samples=60)
    assert mixture.train.shares == [30, 12, 18]
    order = mixture.train.window_order(3)
    drawn = [order.ids(epoch, np.arange(60)) for epoch in range(10)]
    for ids in drawn:
        parts = Counter(np.searchsorted([50, 70, 77], ids, side="right").tolist())
        assert parts == {0: 30, 1: 12, 2: 18}
    whole = np.concatenate(drawn)
    for first, size, draws in ((0, 50, 300), (50, 20, 120), (70, 7, 180)):
        times = Counter(whole[(whole >= first) & (whole < first + size)].tolist())
        assert set(times) == set(range(first, first + size))
        assert max(times.values()) - min(times.values()) <= 1  # no sample comes again before all came
        assert sum(times.values()) == draws
    assert np.array_equal(order.ids(4, np.arange(10, 20)), drawn[4][10:20])
    again = order.draws(0, np.arange(60))
    assert len({*zip(drawn[0].tolist(), again.tolist(), strict=True)}) == 60


def test_a_mixture_in_a_recipe_gives_any_number_of_ranks_the_same_samples() -> None:
    config = config_of(weights={"web": 1, "code": 3, "books": 2})
    build.check_targets(config)
    task, source = build.build_task_and_source(config)
    schedule = build.window_schedule(config, task)
    assert (schedule.samples, schedule.per_epoch) == (77, 7)

    def read(rank: int, ranks: int, micro: int) -> list[list[float]]:
        loader = WindowLoader(task, schedule, Ranks(rank, ranks), micro_batch=micro, start=3, stop=9)
        return [[float(x) for micro in window.micro_batches for x in micro.batch[0]] for window in loader]

    alone = read(0, 1, 12)
    assert [a + b for a, b in zip(read(0, 2, 5), read(1, 2, 1), strict=True)] == alone
    assert len({x for window in alone for x in window}) == sum(
        map(len, alone)
    )  # each augmented in its own way
    assert task.eval_data is not None
    assert len(task.eval_data) == 6
    record = look_at_data(task, source)
    assert record.report.kind == (
        "mixture of web 16.9% (0.26 passes an epoch), books 33.8% (1.3 passes an epoch), "
        "code 49.4% (5.43 passes an epoch)"
    )


def test_parts_and_weights_that_do_not_fit_are_refused() -> None:
    parts = {name: Part(0, size) for name, size in SIZES.items()}
    for given, message in (
        ({"weights": [1, 2]}, "2 numbers for 3 parts"),
        ({"weights": {"web": 1}}, "has web, and the parts are web, books, code"),
        ({"weights": [0, 0, 0]}, "one above 0"),
        ({"weights": [1, -1, 1]}, "not numbers of 0 or more"),
        ({"weights": [1e9, 1, 1]}, "the weight of part books is 1, which is not one of the 77 samples"),
        ({"samples": 0}, "data.samples=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mixture(parts, **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="part 0 of the mixture is a generator"):
        Mixture([(x for x in range(3))])
    config = dataclasses.replace(config_of(), order="sequential")
    task = build.build_task(config)
    with pytest.raises(ConfigError, match="has an order of its own"):
        build.window_schedule(config, task)
    assert Mixture(parts).train.shares == list(SIZES.values())
    targets.admit("data", {"_target_": "gatrain.data.Mixture"})


def test_parts_whose_numbers_mean_different_things_are_refused(tmp_path: Path) -> None:
    for name, text in (("en", "the cat sat on a mat " * 60), ("de", "wörter größer straße " * 60)):
        (tmp_path / f"{name}.txt").write_text(text)

    def read(name: str, tokenizer: str = "bpe") -> TextWindows:
        path = [tmp_path / each for each in name.split()]
        return TextWindows(path, vocab_size=280, context=8, tokenizer=tokenizer, cache_dir=tmp_path / "cache")

    en, de = read("en.txt"), read("de.txt")
    with pytest.raises(ConfigError, match=r"en and de .* same tokenizer: .* path: \[A, B\]"):
        Mixture({"en": en, "de": de})
    both = read("en.txt de.txt")  # as the message says: one source, or one tokenizer for all parts
    both.tokenizer.save(tmp_path / "tokenizer.json")
    own = [read(f"{name}.txt", str(tmp_path / "tokenizer.json")) for name in ("en", "de")]
    assert own[0].tokenizer is not own[1].tokenizer
    assert Mixture(own).tokenizer == both.tokenizer

    first, other = Source(0, 5), Source(5, 5)
    first.classes, other.classes = ["cat", "dog"], ["dog", "emu"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"0 and 1 .* same classes"):
        Mixture([first, other])
    other.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert Mixture([first, other]).classes == ["cat", "dog"]
    other.collate = list  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="make batches in different ways"):
        Mixture([first, other])
