"""Gradients over several ranks where parameters are not all used, are sparse, or a wrapper would reduce as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gatrain import accumulate, batch
from gatrain.config import RunConfig, SGDConfig
from gatrain.errors import ConfigError, ExactnessError, PeerFailed
from gatrain.plan import StepSettings
from gatrain.rank import Rank
from gatrain.tasks import Supervised
from gatrain.train import ranks as ranks_module
from gatrain.train.accumulate import gradient_step
from gatrain.train.engine import Engine
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step
from gatrain.tune.finalists import VARYING, Finalist
from gatrain.tune.trials.batches import TrialBatches
from gatrain.tune.trials.full_step import FullStepTimer
from gatrain.tune.trials.measure import Peers

LAYERS = 4
Split = list[list[list[int]]]
"""Of every rank, of every micro-step: the layers that it uses."""

SPLITS: dict[str, Split] = {
    "all used": [[[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]],
    "not in the last micro-step": [[[0, 1, 2], [0]], [[0, 1, 2], [0]]],
    "in the last micro-step of one rank": [[[0], [0, 2]], [[1], [0]]],
    "on one rank only": [[[0, 1]], [[2]]],
    "another number of micro-steps": [[[0], [3], [1, 3]], [[2]]],
    "a rank without samples": [[[0, 1], [3]], []],
    "the first rank without samples": [[], [[2], [1]]],
}


class Skipping(nn.Module):
    """Layers of which each batch names those that it goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(LAYERS))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for place in used:
            x = x + torch.tanh(self.layers[place](x))
        return self.head(x)


class Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Tensor:
        return self.inner(*args)


def batches_of(steps: list[list[int]], rank: int) -> list[tuple[Tensor, list[int]]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(2 + nth, 4, generator=generator, dtype=torch.float64), used)
        for nth, used in enumerate(steps)
    ]


def loss_sum(model: nn.Module, batch: tuple[Tensor, list[int]]) -> tuple[Tensor, float]:
    return model(*batch).square().sum(), float(len(batch[0]))


def weight(batch: tuple[Tensor, list[int]]) -> float:
    return float(len(batch[0]))


def gradients(model: nn.Module) -> list[Tensor]:
    """Empty tensors where there is none; sparse ones made dense."""
    found = [p.grad for p in model.parameters()]
    return [torch.zeros(0) if g is None else g.to_dense().clone() for g in found]


def wanted(split: Split) -> list[Tensor]:
    """In one process, without any of the training core."""
    model = Skipping().double()
    parts = [part for rank, steps in enumerate(split) for part in batches_of(steps, rank)]
    total = sum(map(weight, parts))
    for part in parts:
        (loss_sum(model, part)[0] / total).backward()
    return gradients(model)


@contextlib.contextmanager
def bucket_bytes(count: int) -> Any:
    before, ranks_module.BUCKET_BYTES = ranks_module.BUCKET_BYTES, count
    try:
        yield
    finally:
        ranks_module.BUCKET_BYTES = before


def _window(sync: str) -> Callable[[nn.Module, list[Any]], None]:
    steps: dict[int, Step] = {}

    def run(model: nn.Module, parts: list[Any]) -> None:
        if id(model) not in steps:
            steps[id(model)] = gradient_step(
                model,
                lambda part: loss_sum(model, part),
                term_names=["loss"],
                ranks=Ranks.current(),
                sync=sync,
                stage=lambda part: lambda: part,
            )
        listed = [MicroBatch(part, {"loss": weight(part)}) for part in parts]
        steps[id(model)].gradient(LoadedWindow(listed))

    return run


def _library(model: nn.Module, parts: list[Any]) -> None:
    accumulate(model, parts, loss_sum=loss_sum, weight=weight)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "find unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "both": lambda model: DistributedDataParallel(
        model, find_unused_parameters=True, gradient_as_bucket_view=True
    ),
    "inside another module": lambda model: Inside(DistributedDataParallel(model)),
}


def _every_way() -> dict[str, list[list[Tensor]]]:
    """Gradients of all splits, one after the other, through one model: what a window left must not matter."""
    found = {}
    for bucket in (1, 2**26):
        with bucket_bytes(bucket):
            for name, wrap in WRAPPERS.items():
                found[f"library, {name}, {bucket}"] = _go(wrap(Skipping().double()), _library)
            for sync in ("window", "overlap"):
                found[f"{sync}, {bucket}"] = _go(Skipping().double(), _window(sync))
    return found


def _go(model: nn.Module, run: Callable[[nn.Module, list[Any]], None]) -> list[list[Tensor]]:
    rank, found = dist.get_rank(), []
    for split in [*SPLITS.values()] * 2:
        run(model, batches_of(split[rank], rank))
        found.append(gradients(model))
        model.zero_grad(set_to_none=True)
    return found


def test_whatever_is_used_where_the_gradient_is_that_of_one_process() -> None:
    """Every option of DistributedDataParallel, every split, the second window as the first."""
    right = [wanted(split) for split in [*SPLITS.values()] * 2]
    for rank, ways in enumerate(run_on_ranks(2, _every_way)):
        assert len(ways) == 2 * (len(WRAPPERS) + 2)
        for way, windows in ways.items():
            for nth, (found, expected) in enumerate(zip(windows, right, strict=True)):
                name = [*SPLITS][nth % len(SPLITS)]
                for given, value in zip(found, expected, strict=True):
                    assert given.shape == value.shape, (
                        rank,
                        way,
                        name,
                        "None where it should not be, or not",
                    )
                    torch.testing.assert_close(
                        given, value, rtol=1e-12, atol=1e-14, msg=lambda m, w=(rank, way, name): f"{w}: {m}"
                    )


def test_the_splits_would_fool_ddp_itself() -> None:
    """At least half of the splits leave a parameter out of somebody's last micro-step."""
    last = [[set(steps[-1]) if steps else set() for steps in split] for split in SPLITS.values()]
    assert sum(any(used != set(range(LAYERS)) for used in ranks) for ranks in last) >= len(last) // 2


class Table(nn.Module):
    def __init__(self, sparse: bool, functional: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 3, sparse=sparse and not functional)
        self.head = nn.Linear(3, 2)
        self.functional = functional

    def forward(self, ids: Tensor, used: list[int]) -> Tensor:
        if self.functional:
            rows = nn.functional.embedding(ids, self.table.weight, sparse=True)
        else:
            rows = self.table(ids)
        return self.head(torch.tanh(rows.mean(1)))


def rows_of(rank: int) -> list[tuple[Tensor, list[int]]]:
    """Rows that the ranks share, rows that one alone has, and rows twice; rank 1 has nothing in ``split`` 1."""
    return [
        (torch.tensor([[0, 1], [1, 1], [2 + rank, 5]]), []),
        (torch.tensor([[10 * rank, 4], [7, 7]]), []),
    ]


def _sparse() -> dict[str, list[Tensor]]:
    rank, found = dist.get_rank(), {}
    for functional in (False, True):
        for name, run in {
            "window": _window("window"),
            "overlap": _window("overlap"),
            "ddp": _library,
        }.items():
            model: nn.Module = Table(sparse=True, functional=functional).double()
            model = DistributedDataParallel(model) if name == "ddp" else model
            for window, parts in enumerate(
                [rows_of(rank), rows_of(rank) if rank == 0 else [], rows_of(rank)]
            ):
                model.zero_grad(set_to_none=True)
                run(model, parts)
                for parameter, each in model.named_parameters():
                    if "table" in parameter:
                        assert each.grad is not None
                        assert each.grad.is_sparse, (name, window, functional)
                        assert each.grad._nnz() <= 20  # what the samples look up, not the table
                found[f"{name} {window} {functional}"] = gradients(model)
    return found


def test_sparse_gradients_are_added_row_by_row() -> None:
    def right(ranks: list[int]) -> list[Tensor]:
        model = Table(sparse=False).double()
        parts = [part for rank in ranks for part in rows_of(rank)]
        total = sum(map(weight, parts))
        for part in parts:
            (loss_sum(model, part)[0] / total).backward()
        return gradients(model)

    both, first = right([0, 1]), right([0])
    for ways in run_on_ranks(2, _sparse):
        assert len(ways) == 18
        for way, found in ways.items():
            for given, value in zip(found, first if " 1 " in way else both, strict=True):
                torch.testing.assert_close(given, value, rtol=1e-12, atol=1e-14, msg=way)


def _refused() -> list[str]:
    """What each rank is told, in turn; a hang would end the test."""
    rank = dist.get_rank()
    told = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
            told.append("nothing")
        except (ConfigError, ExactnessError, PeerFailed, torch.OutOfMemoryError) as error:
            told.append(f"{type(error).__name__}: {error}")

    parts = batches_of([[0, 1], [0, 1, 2, 3]], rank)
    static = DistributedDataParallel(Skipping().double(), static_graph=True)
    attempt(lambda: _library(static, parts))
    sharded = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    attempt(lambda: _library(sharded, parts[: 1 + rank]))
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    attempt(lambda: _library(DistributedDataParallel(Skipping().double(), process_group=alone), parts))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, used: list[int]) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.shared, x, use_reentrant=True)
            return checkpoint(self.shared, x, use_reentrant=True)

    with bucket_bytes(1):
        attempt(lambda: _window("overlap")(Twice().double(), parts))

    def failing(model: nn.Module, part: tuple[Tensor, list[int]]) -> tuple[Tensor, float]:
        if rank == 1 and len(part[0]) == 3:  # its last micro-step
            raise torch.OutOfMemoryError("planted")
        return loss_sum(model, part)

    model = DistributedDataParallel(Skipping().double())
    attempt(lambda: accumulate(model, parts, loss_sum=failing, weight=weight))
    synchronised = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)).double()
    attempt(lambda: _library(synchronised, parts))
    import gatrain.train.step as core

    core.synchronised_norms = lambda model, device: ["bn1"]  # as on a GPU
    attempt(lambda: _library(Skipping().double(), parts[: 1 + rank]))
    attempt(lambda: _library(Skipping().double(), parts))
    return told


def test_what_cannot_be_right_is_refused_on_every_rank_and_nobody_waits() -> None:
    for rank, told in enumerate(run_on_ranks(2, _refused)):
        static, sharded, group, late, failed, on_cpu, unequal, equal = told
        assert static.startswith("ConfigError")
        assert "static_graph" in static
        assert sharded.startswith("ConfigError")
        assert "'0.weight' is a DTensor" in sharded
        assert group.startswith("ConfigError")
        assert "1 of 2 ranks" in group
        assert late.startswith("ExactnessError")
        assert "sync=window" in late
        assert failed.startswith("OutOfMemoryError" if rank else "PeerFailed")
        assert on_cpu.startswith("ConfigError")
        assert "SyncBatchNorm" in on_cpu
        assert unequal.startswith("ExactnessError")
        assert "1, 2" in unequal
        assert equal == "nothing"


def _buffers() -> list[Tensor]:
    """Running statistics after two windows; the ranks see other samples, and one of them none at first."""
    rank = dist.get_rank()
    found = []
    for broadcast in (True, False):
        model = DistributedDataParallel(
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), broadcast_buffers=broadcast
        )
        for parts in (batches_of([[0], [0]], rank) if rank == 0 else [], batches_of([[0]], rank)):
            accumulate(
                model,
                [part[0] for part in parts],
                loss_sum=lambda m, x: (m(x).square().sum(), float(len(x))),
                weight=lambda x: float(len(x)),
            )
        accumulate(
            model,
            [],
            loss_sum=lambda m, x: (m(x).sum(), 1.0),
            weight=lambda x: 1.0,
        )
        found.append(model.module[1].num_batches_tracked.clone())
    return found


def test_buffers_are_sent_where_the_wrapper_would_send_them_and_an_empty_rank_hangs_nobody() -> None:
    first, second = run_on_ranks(2, _buffers)
    assert [int(value) for value in first] == [3, 3]
    assert [int(value) for value in second] == [3, 1]  # rank 0's two, then its own one


@pytest.mark.parametrize("count", [1, 2**26])
def test_one_process_needs_no_ranks(count: int) -> None:
    with bucket_bytes(count):
        model = Skipping().double()
        _window("overlap")(model, batches_of([[0], [1, 2]], 0))
        for given, value in zip(gradients(model), wanted([[[0], [1, 2]]]), strict=True):
            torch.testing.assert_close(given, value, rtol=1e-12, atol=1e-14)


class Dropping(nn.Module):
    """Leaves layers out by chance, as speech models do."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chance = chance
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            if float(torch.rand(())) >= self.chance:
                x = layer(x)
        return self.layers[-1](x)


def _told_of_varying() -> list[str]:
    rank = dist.get_rank()
    told = []
    for chance in (0.0, 0.5):
        model = Dropping(chance)
        data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 4)
        task = Supervised(lambda model=model: model, data)  # type: ignore[misc]
        way = StepSettings("fp32", "none", False, "overlap")
        engine = Engine(task, model, way, SGDConfig(lr=1e-9), Ranks.current(), torch.device("cpu"))
        this = Rank(rank, rank, 2, 2, torch.device("cpu"))
        timer = FullStepTimer(RunConfig(), TrialBatches(task), this, Peers(this), engine, {}, {})
        failure = timer._varying(Finalist(way, 4, batch.Split(16, 2)))
        told.append(failure.text if failure else "")
        assert all(p.grad is None for p in model.parameters())
        assert float(engine.last_loss_sums()[1]) == 0
    return told


def test_trials_see_that_the_used_parameters_vary() -> None:
    for always, sometimes in run_on_ranks(2, _told_of_varying):
        assert always == ""
        assert sometimes.startswith(VARYING)
        assert "of 12" in sometimes  # six micro-steps of each rank
