"""What is said or refused of modules before the first step: modes, BatchNorm's remainders, sparse gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gatrain import codec
from gatrain.batch import Split
from gatrain.config import AdamWConfig, OptimizerConfig, SGDConfig
from gatrain.errors import ConfigError, PlanError
from gatrain.inspected import Inspected
from gatrain.plan import Plan, StepSettings
from gatrain.tasks import Supervised
from gatrain.train import remainders
from gatrain.train.engine import Engine
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.modules import batch_norms, mode_remarks
from gatrain.train.ranks import Ranks
from gatrain.train.remainders import Splits, check_windows
from gatrain.train.windows import WindowSchedule
from gatrain.tune.explain import norm_note

CPU = torch.device("cpu")


class OwnDrop(nn.Module):
    """Drops layers as it likes, in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Attention(nn.Module):
    """As transformers has it: a rate, and a forward that asks for the mode."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.attention_dropout = rate
        self.project = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.project(x), self.attention_dropout, self.training)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval(), ["The model comes", "no dropout ('1')"]),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), ["running statistics ('1')"]),
        (nn.Sequential(nn.Linear(2, 2), OwnDrop()).eval(), ["self.training is off ('1')"]),
        (nn.Sequential(Attention(0.1), Attention(0.1)).eval(), ["no dropout ('0' and 1 more)"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval()), ["Parts of the model come"]),
        (nn.LSTM(2, 2, 2, dropout=0.3).eval(), ["no dropout"]),
        # nothing to say: training mode, a mode that changes nothing, and what is frozen on purpose
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), None),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.GroupNorm(1, 2)).eval(), None),
        (nn.Sequential(Attention(0.0)).eval(), None),
        (nn.Sequential(frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)))), None),
        (nn.Sequential(frozen(nn.BatchNorm1d(2)), nn.Linear(2, 2)), None),
    ],
)
def test_a_model_in_evaluation_mode_is_named_where_that_changes_something(
    model: nn.Module, said: list[str] | None
) -> None:
    remarks = mode_remarks(model)
    if said is None:
        assert remarks == []
    else:
        assert len(remarks) == 1
        assert "model.train()" in remarks[0]
        assert all(text in remarks[0] for text in said), remarks


def test_batch_norm_is_said_in_one_line_where_it_depends_on_the_split() -> None:
    way = StepSettings("fp32", "none", False, "window")
    whole, split = (Plan(split=Split(9, 1), micro_batch=size, settings=way, reason="") for size in (9, 4))
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert norm_note(batch_norms(model), whole) is None  # it sees the whole batch
    note = norm_note(batch_norms(model), split)
    assert note is not None
    assert "(3 samples)" in note
    ranks = Plan(split=Split(8, 2), micro_batch=4, settings=way, reason="")
    assert norm_note(["1"], ranks) is not None  # each rank by itself
    assert norm_note(["1"], ranks, synchronises=True) is None  # all ranks together see the whole batch
    assert norm_note(batch_norms(model.eval()), split) is None  # running statistics depend on no split


def splits(samples: int, effective: int, micro: int, ranks: int = 1, drop_last: bool = False) -> Splits:
    return Splits(WindowSchedule(samples, effective, 0, drop_last), ranks, micro)


def check(model: nn.Module, given: Splits, x: Tensor, steps: int | None = None) -> None:
    last = given.schedule.per_epoch if steps is None else steps
    check_windows(model, given, 0, last, CPU, lambda: model(x))


def test_a_single_sample_under_batch_norm_is_refused_before_the_run_with_what_would_do() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = model.state_dict()[("1.running_mean")].clone()
    one = torch.ones(1, 4)
    check(model, splits(18, 9, 4), one)  # evened out: 3 + 3 + 3
    check(model, splits(17, 8, 4, drop_last=True), one)
    check(model, splits(17, 8, 4), one, steps=2)  # the run ends before the short window
    with pytest.raises(PlanError, match=r"train\.drop_last=true") as short:
        check(model, splits(17, 8, 4), one)
    assert "17 samples" in str(short.value)
    with pytest.raises(PlanError, match=r"batch\.micro=2"):
        check(model, splits(16, 8, 1), one)
    with pytest.raises(
        PlanError, match=r"batch\.effective=5 with batch\.micro=3"
    ):  # 3 = 2 + 1 over two ranks
        check(model, splits(30, 3, 2, ranks=2), one)
    assert torch.equal(model.state_dict()["1.running_mean"], before)


def test_one_sample_with_several_values_for_a_channel_is_none_of_our_business() -> None:
    conv = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))
    check(conv, splits(17, 8, 4), torch.ones(1, 2, 9))
    assert conv[1].num_batches_tracked == 0
    frozen_norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval())
    check(frozen_norm, splits(17, 8, 4), torch.ones(1, 4))
    check(nn.Linear(4, 3), splits(17, 8, 1), torch.ones(1, 4))


def test_unequal_micro_steps_are_refused_for_synchronised_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3))
    with pytest.raises(ConfigError, match="GPUs only"):
        check(model, splits(17, 8, 4, ranks=2), torch.ones(1, 4))
    monkeypatch.setattr(remainders, "synchronised_norms", lambda model, device: batch_norms(model))
    check(model, splits(16, 8, 4, ranks=2), torch.ones(1, 4))
    check(model, splits(17, 8, 4, ranks=2, drop_last=True), torch.ones(1, 4))
    with pytest.raises(PlanError, match=r"1, 0.*train.drop_last=true"):
        check(model, splits(17, 8, 4, ranks=2), torch.ones(1, 4))
    with pytest.raises(PlanError, match=r"3, 2.*batch.effective=\d"):
        check(model, splits(18, 9, 2, ranks=2), torch.ones(1, 4))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_the_kinds_of_windows_are_those_that_are_trained(
    samples: int, effective: int, micro: int, ranks: int, drop_last: bool
) -> None:
    if effective > samples:
        return
    given_ = splits(samples, effective, micro, ranks, drop_last)
    for first, last in ((0, 1), (0, given_.schedule.per_epoch), (1, given_.schedule.per_epoch + 2)):
        trained = {len(given_.schedule.window(index).ids) for index in range(first, last)}
        assert {split.samples for split in given_.of(first, last)} == trained


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 20), st.integers(1, 3))
def test_the_advice_holds_when_it_is_taken(samples: int, effective: int, micro: int, ranks: int) -> None:
    if effective > samples or micro > -(-effective // ranks):
        return

    def single(of: Splits) -> bool:
        return any(split.has_single for split in of.of(0, of.schedule.per_epoch))

    given_ = splits(samples, effective, micro, ranks)
    for advice in filter(None, given_.better(lambda split: not split.has_single).split(" or ")):
        taken = {"train.drop_last": 0, "batch.micro": micro, "batch.effective": effective}
        for word in advice.split(" with "):
            key, value = word.split("=")
            taken[key] = 1 if value == "true" else int(value)
        most = -(-taken["batch.effective"] // ranks)
        size = min(taken["batch.micro"], most)
        assert not single(
            splits(samples, taken["batch.effective"], size, ranks, bool(taken["train.drop_last"]))
        )


class Rows(nn.Module):
    def __init__(self, sparse: bool, functional: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 4, sparse=sparse), nn.Linear(4, 3)
        self.functional = functional

    def forward(self, ids: Tensor) -> Tensor:
        rows = (
            nn.functional.embedding(ids, self.table.weight, sparse=True)
            if self.functional
            else self.table(ids)
        )
        return self.head(rows.mean(1))


def engine_of(model: nn.Module, optimizer: OptimizerConfig) -> Engine:
    ids = torch.utils.data.TensorDataset(
        torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    )
    task = Supervised(lambda: model, ids)
    return Engine(task, model, StepSettings("fp32", "none", False, "window"), optimizer, Ranks(), CPU)


def trained(model: nn.Module, optimizer: OptimizerConfig) -> list[Tensor]:
    engine = engine_of(model, optimizer)
    for step in range(4):
        parts = [
            (torch.tensor([[step, 1], [1, 1]]), torch.tensor([0, 2])),
            (torch.tensor([[5, step + 4]]), torch.tensor([1])),
        ]
        micro_batches = [MicroBatch(part, {"loss": float(len(part[1]))}) for part in parts]
        engine.step(LoadedWindow(micro_batches), step)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (AdamWConfig(), "optimizer=adamw"),
        (SGDConfig(weight_decay=0.1), "optimizer.weight_decay=0.1"),
        (SGDConfig(momentum=0.9, nesterov=True), "optimizer.nesterov=true"),
    ],
)
def test_optimizers_that_take_no_sparse_gradient_are_refused_first(optimizer: Any, named: str) -> None:
    with pytest.raises(ConfigError, match="sparse=False") as refused:
        engine_of(Rows(sparse=True), optimizer)
    assert named in str(refused.value)
    assert "'table'" in str(refused.value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_train_as_dense_ones_do(momentum: float) -> None:
    optimizer = SGDConfig(lr=0.3, momentum=momentum, clip_norm=0.05)
    for sparse, dense in zip(
        trained(Rows(sparse=True), optimizer), trained(Rows(sparse=False), optimizer), strict=True
    ):
        torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-7)


def test_a_sparse_function_trains_with_any_optimizer() -> None:
    for sparse, dense in zip(
        trained(Rows(sparse=False, functional=True), AdamWConfig(lr=0.1, weight_decay=0.1)),
        trained(Rows(sparse=False), AdamWConfig(lr=0.1, weight_decay=0.1)),
        strict=True,
    ):
        torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-7)


def test_what_is_thawed_later_is_told_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    engine = engine_of(model, SGDConfig(lr=0.1))
    assert engine.newly_thawed() == []
    model[0].requires_grad_(True)
    assert engine.newly_thawed() == ["0.weight", "0.bias"]
    assert engine.newly_thawed() == []


def test_what_was_found_survives_the_memory_of_it() -> None:
    found = Inspected(4, 0, "x", 1, 4, ("none",), batch_norms=("1",), synchronises=True, remarks=("said",))
    assert codec.decode(Inspected, codec.encode(found)) == found
