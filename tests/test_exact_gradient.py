"""The promise: any split of a window, on any number of ranks, gives the gradient of the whole window."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gatrain import accumulate, batch
from gatrain.errors import ExactnessError, PeerFailed
from gatrain.train.accumulate import gradient_step
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.windows import WindowSchedule

VOCABULARY, LENGTH = 11, 9


class RaggedLanguageModel(nn.Module):
    """Embedding, one mixing layer and a head: enough for gradients that depend on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)
        self.never_used = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).cumsum(1)
        return self.head(torch.tanh(self.mix(hidden)))


def ragged_samples(count: int = 23) -> tuple[Tensor, Tensor]:
    """Token rows of which most labels are ignored, unevenly: some rows keep one label, some all, one none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    kept = torch.randint(1, LENGTH + 1, (count,), generator=generator)
    kept[count // 2] = 0
    labels[torch.arange(LENGTH) >= kept[:, None]] = -100
    return tokens, labels


def loss_sum(model: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, labels = pair
    total = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


def weight(pair: tuple[Tensor, Tensor]) -> int:
    return int((pair[1] != -100).sum())


def new_model(dtype: torch.dtype) -> RaggedLanguageModel:
    torch.manual_seed(0)
    return RaggedLanguageModel().to(dtype)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_shot_gradient(dtype: torch.dtype, samples: tuple[Tensor, Tensor]) -> Tensor:
    model = new_model(dtype)
    total, count = loss_sum(model, samples)
    (total / count).backward()
    return gradient(model)


def cut(samples: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(samples[0].split(sizes), samples[1].split(sizes), strict=True))


def relative_error(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 2, 5, 22, 23])
def test_micro_batches_equal_the_whole_batch(dtype: torch.dtype, micro_batch: int) -> None:
    samples, model = ragged_samples(), new_model(dtype)
    sizes = batch.micro_batch_sizes(23, micro_batch)
    result = accumulate(model, cut(samples, sizes), loss_sum=loss_sum, weight=weight)
    wanted = one_shot_gradient(dtype, samples)
    assert relative_error(gradient(model), wanted) < TOLERANCE[dtype]
    total, count = loss_sum(new_model(dtype), samples)
    assert result.loss() == pytest.approx(float((total / count).detach()), rel=1e-6)


def test_mean_of_means_would_fail_these_tests() -> None:
    """The usual loss / K on this data is far off, so the tolerance above means something."""
    samples, model = ragged_samples(), new_model(torch.float64)
    parts = [part for part in cut(samples, batch.micro_batch_sizes(23, 5)) if weight(part)]
    for part in parts:
        total, count = loss_sum(model, part)
        (total / count / len(parts)).backward()
    assert relative_error(gradient(model), one_shot_gradient(torch.float64, samples)) > 0.05


# effective batch, micro-batch, through DistributedDataParallel or not
Case = tuple[int, int, bool]


def _rank_gradients(cases: list[Case]) -> list[Tensor]:
    return [_rank_gradient(*case) for case in cases]


def _rank_gradient(effective: int, micro_batch: int, use_ddp: bool) -> Tensor:
    ranks = Ranks.current()
    tokens, labels = ragged_samples()
    shares = batch.rank_shares(effective, ranks.world_size)
    mine = cut((tokens[:effective], labels[:effective]), shares)[ranks.rank]
    model = new_model(torch.float64)
    wrapped: nn.Module = model
    if use_ddp:
        model.never_used.requires_grad_(False)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(2):  # the second time DDP has rebuilt its buckets
        wrapped.zero_grad(set_to_none=True)
        parts = cut(mine, batch.micro_batch_sizes(shares[ranks.rank], micro_batch)) if len(mine[0]) else []
        accumulate(wrapped, parts, loss_sum=loss_sum, weight=weight)
    assert model.never_used.weight.grad is None
    return gradient(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size: int) -> None:
    """Uneven shares, a single micro-step, a last one of one sample, and ranks without any sample."""
    cases: list[Case] = [
        (effective, micro_batch, use_ddp)
        for effective, micro_batch in [(23, 4), (23, 2), (23, 12), (2, 1), (1, 1)]
        for use_ddp in (False, True)
    ]
    for given in run_on_ranks(world_size, _rank_gradients, cases):
        for (effective, micro_batch, use_ddp), found in zip(cases, given, strict=True):
            tokens, labels = ragged_samples()
            wanted = one_shot_gradient(torch.float64, (tokens[:effective], labels[:effective]))
            assert relative_error(found, wanted) < 1e-13, (effective, micro_batch, use_ddp)


def _reductions_per_step(micro_batches: list[int]) -> list[list[int]]:
    return [
        _count_reductions(micro_batch, use_ddp) for use_ddp in (False, True) for micro_batch in micro_batches
    ]


def _count_reductions(micro_batch: int, use_ddp: bool) -> list[int]:
    """Elements of gradient that this rank put into collectives, for three steps."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = new_model(torch.float32)
    model.never_used.requires_grad_(False)
    reduced = [0]
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        # weights, counts and agreement travel as float64; gradients here are float32
        reduced[-1] += tensor.numel() if tensor.dtype == torch.float32 else 0
        return real(tensor, *args, **kwargs)

    wrapped: nn.Module = model
    if use_ddp:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        ddp.register_comm_hook(None, allreduce_hook)  # DDP's own reduction, through Python
        wrapped = ddp
    dist.all_reduce = counting
    tokens, labels = ragged_samples(24)
    mine = cut((tokens, labels), [12, 12])[dist.get_rank()]
    for _ in range(3):
        accumulate(
            wrapped, cut(mine, batch.micro_batch_sizes(12, micro_batch)), loss_sum=loss_sum, weight=weight
        )
        wrapped.zero_grad(set_to_none=True)
        reduced.append(0)
    dist.all_reduce = real
    return reduced[:3]


def test_one_reduction_per_step_at_any_number_of_micro_steps() -> None:
    model = new_model(torch.float32)
    elements = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("never_used"))
    for rank in run_on_ranks(2, _reductions_per_step, [12, 4, 1]):
        assert rank == [[elements] * 3] * 6  # every element once, whatever K, explicit or in DDP


def test_a_loss_that_uses_another_count_is_an_error() -> None:
    """A count of unshifted labels, or a padding mask forgotten on one side, is caught before any update."""
    model = new_model(torch.float32)
    with pytest.raises(ExactnessError, match=r"counted \d+ .* used \d+"):
        accumulate(
            model, cut(ragged_samples(), [12, 11]), loss_sum=loss_sum, weight=lambda pair: pair[1].numel()
        )


def test_weights_may_be_real_numbers() -> None:
    samples = ragged_samples()
    class_weights = torch.linspace(0.1, 1.7, VOCABULARY, dtype=torch.float64)

    def weighted_sum(model: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = model(pair[0]).flatten(0, 1), pair[1].flatten()
        total = F.cross_entropy(logits, labels, class_weights, ignore_index=-100, reduction="sum")
        return total, class_weights[labels[labels != -100]].sum()

    def count(pair: tuple[Tensor, Tensor]) -> float:
        return float(class_weights[pair[1][pair[1] != -100]].sum())

    model, whole = new_model(torch.float64), new_model(torch.float64)
    accumulate(model, cut(samples, [7, 7, 7, 2]), loss_sum=weighted_sum, weight=count)
    F.cross_entropy(
        whole(samples[0]).flatten(0, 1), samples[1].flatten(), class_weights, ignore_index=-100
    ).backward()
    assert relative_error(gradient(model), gradient(whole)) < 1e-13


def test_each_loss_term_has_a_denominator_of_its_own() -> None:
    """Token loss over tokens plus sample loss over samples: neither count serves for both."""
    samples = ragged_samples()

    def terms(model: nn.Module, pair: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor | float]]:
        spread = model(pair[0]).std(dim=(1, 2))
        return {"tokens": loss_sum(model, pair), "spread": (0.3 * spread.sum(), float(len(spread)))}

    def counts(pair: tuple[Tensor, Tensor]) -> dict[str, float]:
        return {"tokens": weight(pair), "spread": len(pair[0])}

    model, whole = new_model(torch.float64), new_model(torch.float64)
    accumulate(model, cut(samples, [9, 9, 5]), loss_sum=terms, weight=counts, term_names=("tokens", "spread"))
    both = terms(whole, samples)
    sum(total / count for total, count in both.values()).backward()  # type: ignore[union-attr]
    assert relative_error(gradient(model), gradient(whole)) < 1e-13


def test_a_window_without_any_weight_has_no_gradient() -> None:
    tokens, labels = ragged_samples(4)
    model = new_model(torch.float32)
    result = accumulate(model, [(tokens, torch.full_like(labels, -100))], loss_sum=loss_sum, weight=weight)
    assert result.is_empty
    assert all(p.grad is None for p in model.parameters())


def _failing_rank() -> str:
    ranks = Ranks.current()

    def sometimes_failing(model: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("planted")
        return loss_sum(model, pair)

    try:
        accumulate(new_model(torch.float32), [ragged_samples(4)], loss_sum=sometimes_failing, weight=weight)
    except (PeerFailed, torch.OutOfMemoryError) as error:
        return type(error).__name__
    return "no error"


def test_a_failure_on_one_rank_ends_the_window_on_all_without_a_hang() -> None:
    assert run_on_ranks(2, _failing_rank) == ["PeerFailed", "OutOfMemoryError"]


def _used_on_one_rank_only() -> Tensor:
    model = new_model(torch.float64)
    rank = dist.get_rank()

    def with_extra(module: RaggedLanguageModel, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        total, count = loss_sum(module, pair)
        return (
            total + module.never_used(torch.ones(1, 3, dtype=total.dtype)).sum() if rank else total
        ), count

    accumulate(model, [ragged_samples(4)], loss_sum=with_extra, weight=weight)
    assert model.never_used.weight.grad is not None
    return model.never_used.weight.grad


def test_a_parameter_used_on_one_rank_only_gets_its_gradient_on_all() -> None:
    first, second = run_on_ranks(2, _used_on_one_rank_only)
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_dropout_masks_are_keyed_by_window_rank_and_micro_step() -> None:
    def run(seed: tuple[int, ...]) -> Tensor:
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        for p in model.parameters():
            nn.init.ones_(p)
        step = gradient_step(
            model,
            lambda x: (model(x).sum(), float(len(x))),
            term_names=["loss"],
            ranks=Ranks(),
            stage=lambda x: lambda: x,
        )
        torch.rand(3)  # whatever was drawn before must not matter
        step.gradient(LoadedWindow([MicroBatch(torch.ones(2, 8), {"loss": 2.0})] * 2, seed=seed))
        return gradient(model)

    assert torch.equal(run((0, 7, 0)), run((0, 7, 0)))
    assert not torch.equal(run((0, 7, 0)), run((0, 8, 0)))


def test_each_micro_step_draws_numbers_of_its_own() -> None:
    """By its place in the window where that is known, whatever rank computes it."""
    micros = [MicroBatch(None, {"loss": 1.0}) for _ in range(2)]
    placed = [MicroBatch(None, {"loss": 1.0}, position=place) for place in (5, 9)]
    assert [LoadedWindow(micros, seed=(1, 2)).seed_of(k) for k in range(2)] == [(1, 2, 0), (1, 2, 1)]
    assert [LoadedWindow(placed, seed=(1, 2)).seed_of(k) for k in range(2)] == [(1, 2, 5), (1, 2, 9)]


def test_every_world_size_sees_the_same_windows() -> None:
    schedule = WindowSchedule(samples=101, effective_batch=23, seed=5)
    for index in range(12):
        window = schedule.window(index)
        for world_size in (1, 2, 3, 7, 30):
            parts = [window.slice_of(rank, world_size)[1].tolist() for rank in range(world_size)]
            assert list(itertools.chain(*parts)) == window.ids.tolist()
