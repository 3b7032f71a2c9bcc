"""Windows of a number of tokens: as many whole samples, in order, as fit; for every world size the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import gatrain, metrics, project
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_batch_stages import MODULE, RECIPE

from gatrain.config import BatchConfig, RunConfig, ScheduleConfig, TrainConfig, validate
from gatrain.errors import ConfigError, DataError
from gatrain.train.order.sequential import Sequential
from gatrain.train.token_places import token_lengths
from gatrain.train.token_windows import TokenWindows


def windows(lengths: Any, budget: int, **more: Any) -> TokenWindows:
    return TokenWindows(
        len(lengths), 4, 7, budget=budget, lengths=np.asarray(lengths, dtype=np.int64), **more
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 90), st.booleans())
def test_a_window_holds_as_many_samples_as_fit_and_an_epoch_every_one_once(
    lengths: list[int], budget: int, drop_last: bool
) -> None:
    if sum(lengths) < budget:
        return
    made = windows(lengths, budget, drop_last=drop_last)
    found = [made.window(n) for n in range(made.steps(None, 3))]
    for epoch in range(3):
        mine = [w for w in found if w.epoch == epoch]
        ids = np.concatenate([w.ids for w in mine])
        order = made.ids(epoch, 0, len(lengths))
        assert ids.tolist() == order[: len(ids)].tolist()
        assert len(ids) == len(lengths) or (drop_last and len(mine) >= 1)
        for one, following in itertools.pairwise(mine):
            tokens = sum(lengths[i] for i in one.ids)
            assert tokens <= budget < tokens + lengths[following.ids[0]]
        assert sum(lengths[i] for i in mine[-1].ids) <= budget
    # from the number alone, as after a resume
    for n in (len(found) - 1, 0, len(found) // 2):
        again = windows(lengths, budget, drop_last=drop_last).window(n)
        assert (again.epoch, again.ids.tolist()) == (found[n].epoch, found[n].ids.tolist())


def test_equally_long_samples_need_no_list() -> None:
    made = TokenWindows(10, 3, 0, order=Sequential(), budget=100, lengths=30)
    assert [w.ids.tolist() for w in map(made.window, range(4))] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert (made.steps(None, 2), made.steps(None, 1.5), made.window(4).epoch) == (8, 6, 1)


def test_what_cannot_be_a_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the sample 2 has 50 tokens.*Use batch.effective=50 or more"):
        windows([3, 4, 50], 40)
    with pytest.raises(ConfigError, match="the sample 1 has 0 tokens"):
        windows([3, 0, 5], 8)
    with pytest.raises(DataError, match=r"12 tokens.*Use batch.effective=12 or less"):
        windows([3, 4, 5], 40)
    node = {"_target_": "gatrain.tasks.supervised.Supervised"}
    for batch, schedule, words in (
        (BatchConfig({0: 8, 5: 16}, count="tokens"), ScheduleConfig(), "no stages"),
        (BatchConfig(8, count="tokens"), ScheduleConfig(warmup_samples=4), "Use schedule.warmup_steps"),
        (BatchConfig(8, count="words"), ScheduleConfig(), "samples, tokens"),
    ):
        config = RunConfig(
            model=node, data=node, task=node, batch=batch, schedule=schedule, train=TrainConfig(steps=1)
        )
        with pytest.raises(ConfigError, match=words):
            validate(config)
    without = SimpleNamespace(train_data=[1, 2], variable_length=None)
    with pytest.raises(ConfigError, match=r"batch.count=tokens needs the tokens of every sample.*lengths"):
        token_lengths(without, 0, "batch.count=tokens")  # type: ignore[arg-type]


def test_one_and_two_processes_train_the_same_windows_and_a_resume_goes_on_with_them(tmp_path: Path) -> None:
    folder = project(tmp_path, MODULE.replace("Dropout(0.1)", "Identity()"), RECIPE, "staged")
    words = [
        "recipe=staged", "batch.effective=200", "batch.count=tokens", "batch.rule=none", "batch.base=null",
        "optimizer=sgd", "precision=fp32", "save.every=4",
    ]  # fmt: skip
    said = gatrain(folder, "fit", *words, "run.dir=one")
    assert "200 tokens at most, on average 6 = 1 rank x 2 accumulation steps x 3" in said
    gatrain(folder, "launch", "--nproc", "2", *words, "train.steps=8", "run.dir=two")
    gatrain(folder, "resume", "two", "train.steps=18")
    one, two = metrics(folder / "one"), metrics(folder / "two")
    assert [line["window"] for line in one] == [line["window"] for line in two]
    samples = np.diff([0] + [line["samples"] for line in one])
    assert len(set(samples.tolist())) > 2
    # 61 samples of 1 to 61 tokens, 1891 in all: at least 10 windows of 200 an epoch
    weights = [
        load_file(folder / run / "saved" / "step_00000018" / "model.safetensors") for run in ("one", "two")
    ]
    for name, value in weights[0].items():
        assert float((value - weights[1][name]).norm() / value.norm()) < 1e-5, name
    bad = gatrain(folder, "resume", "two", "batch.count=samples", expect=2)
    assert "batch.count" in bad
