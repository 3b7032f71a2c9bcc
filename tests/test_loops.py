"""Loops that were written for other frameworks: their words, the exact gradient of the whole window."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gatrain
from gatrain.errors import ConfigError, ExactnessError

WORDS, LENGTH, RATE = 7, 6, 0.3
SIZES = (3, 1, 4, 2, 2, 3, 1, 3, 1)
"""Samples of each micro-batch of an epoch: with 4 to a window the last has one of them."""
Pair = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).cumsum(1))).transpose(1, 2)  # [B, classes, L]


def micro_batches(sizes: tuple[int, ...] = SIZES) -> list[Pair]:
    """Rows of tokens with 0 to LENGTH labels each; the second micro-batch has none."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(WORDS, (sum(sizes), LENGTH), generator=g)
    labels = torch.randint(WORDS, (sum(sizes), LENGTH), generator=g)
    labels[torch.arange(LENGTH) >= torch.randint(LENGTH + 1, (sum(sizes), 1), generator=g)] = -100
    found = list(zip(tokens.split(sizes), labels.split(sizes), strict=True))
    found[1][1].fill_(-100)
    return found


def label_count(pair: Pair) -> int:
    return int((pair[1] != -100).sum())


def whole_batches(model: nn.Module, windows: list[list[Pair]], clip: float | None = None) -> list[Tensor]:
    """Plain PyTorch with each window in one batch; gives the parameters after SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for window in windows:
        tokens, labels = (torch.cat(part) for part in zip(*window, strict=True))
        if not (labels != -100).any():
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), labels, ignore_index=-100).backward()  # a mean over all labels
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def windows_of(batches: list[Pair], steps: int) -> list[list[Pair]]:
    return [batches[i : i + steps] for i in range(0, len(batches), steps)]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    start = [p.detach() for p in Tagger().double().parameters()]
    moved = [(a - s).flatten() for a, s in zip(found, start, strict=True)]
    right = [(b - s).flatten() for b, s in zip(wanted, start, strict=True)]
    return float((torch.cat(moved) - torch.cat(right)).norm() / torch.cat(right).norm())


def in_windows(
    batches: list[Pair], *, wrap: bool = False, mean: bool = False, **options: Any
) -> list[Tensor]:
    """The loop of Accelerate's users: a context around each micro-step."""
    model: nn.Module = Tagger().double()
    parameters = list(model.parameters())
    model = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    accumulator = gatrain.Accumulator(model, weight=label_count, **{"accumulation_steps": 4, **options})
    for window in accumulator.windows(batches):
        for tokens, labels in window:
            with window.accumulate(model):
                count = (labels != -100).sum()
                reduction = "mean" if mean else "sum"
                loss = F.cross_entropy(model(tokens), labels, ignore_index=-100, reduction=reduction)
                window.backward(**{"mean_loss" if mean else "loss_sum": loss}, weight=count)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters]


def with_optimizer(
    batches: list[Pair], *, wrap: bool = False, epochs: int = 1, schedule: bool = False, **options: Any
) -> tuple[list[Tensor], list[bool]]:
    """The loop of everybody else: `step` in each micro-step. Gives the parameters, and which calls made updates."""
    model: nn.Module = Tagger().double()
    parameters = list(model.parameters())
    model = DistributedDataParallel(model) if wrap else model
    optimizer = gatrain.AccumulatingOptimizer(
        torch.optim.SGD(parameters, lr=RATE), model, **{"accumulation_steps": 4, **options}
    )
    made = []
    for epoch in range(epochs):
        if schedule:
            optimizer.set_epoch(epoch)
        for tokens, labels in batches:
            loss = F.cross_entropy(model(tokens), labels, ignore_index=-100)
            optimizer.backward(mean_loss=loss, weight=label_count((tokens, labels)))
            made.append(optimizer.step())
            optimizer.zero_grad()
        optimizer.flush()
    return [p.detach() for p in parameters], made


@pytest.mark.parametrize("mean", [False, True])
def test_a_context_around_each_micro_step_gives_the_gradient_of_the_window(mean: bool) -> None:
    """Ragged micro-batches, one without any label, and a short window at the end: each is one step of its own."""
    batches = micro_batches()
    wanted = whole_batches(Tagger().double(), windows_of(batches, 4))
    assert distance(in_windows(batches, mean=mean), wanted) <= 1e-12


def test_an_optimizer_that_steps_once_in_k_calls_makes_the_step_of_the_whole_window() -> None:
    batches = micro_batches()
    wanted = whole_batches(Tagger().double(), windows_of(batches, 4), clip=0.02)
    found, made = with_optimizer(batches, clip_norm=0.02)
    assert distance(found, wanted) <= 1e-12
    assert made == [False, False, False, True] * 2 + [False]


def test_steps_by_epoch_begin_where_they_say() -> None:
    """{0: 2, 1: 3} as Lightning's GradientAccumulationScheduler has it; before the first epoch named it is 1."""
    batches = micro_batches()
    epochs = [windows_of(batches, 1), windows_of(batches, 2), windows_of(batches, 2), windows_of(batches, 5)]
    wanted = whole_batches(Tagger().double(), list(itertools.chain(*epochs)))
    found, _ = with_optimizer(batches, accumulation_steps={1: 2, 3: 5}, epochs=4, schedule=True)
    assert distance(found, wanted) <= 1e-12
    accumulator = gatrain.Accumulator(Tagger(), accumulation_steps={1: 2, 3: 5}, weight=lambda batch: 1)
    for epoch, steps in enumerate((1, 2, 2, 5)):
        lengths = []
        for window in accumulator.windows(batches, epoch=epoch):
            lengths.append(len(window))
            for tokens, _ in window:
                with window.accumulate():
                    window.backward(loss_sum=0 * accumulator.model(tokens).sum(), weight=1)
        assert lengths == [len(window) for window in windows_of(batches, steps)]


def test_a_window_without_any_label_is_no_step() -> None:
    batches = micro_batches()
    with pytest.warns(UserWarning, match="without any weight"):
        found = in_windows(batches, accumulation_steps=1)
    wanted = whole_batches(Tagger().double(), windows_of(batches, 1))
    assert distance(found, wanted) <= 1e-12
    found, made = with_optimizer(batches, accumulation_steps=1)
    assert distance(found, wanted) <= 1e-12
    assert made == [label_count(batch) > 0 for batch in batches]


def with_terms(batches: list[Pair], wrap: bool = False) -> list[Tensor]:
    """Two loss terms: tags over their labels, and a length over the samples that have one."""
    model: nn.Module = Tagger().double()
    parameters = list(model.parameters())
    model = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(parameters, lr=RATE)

    def weight(pair: Pair) -> dict[str, float]:
        return {"tags": label_count(pair), "length": int((pair[0][:, 0] < 3).sum())}

    accumulator = gatrain.Accumulator(
        model, accumulation_steps=4, weight=weight, term_names=("tags", "length")
    )
    for window in accumulator.windows(batches):
        for tokens, labels in window:
            with window.accumulate(model):
                scores, has_length = model(tokens), tokens[:, 0] < 3
                sums = {
                    "tags": F.cross_entropy(scores, labels, ignore_index=-100, reduction="sum"),
                    "length": (scores.square().mean((1, 2)) * has_length).sum(),
                }
                window.backward(
                    loss_sum=sums, weight={"tags": (labels != -100).sum(), "length": has_length.sum()}
                )
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters]


def whole_with_terms(windows: list[list[Pair]]) -> list[Tensor]:
    model = Tagger().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for window in windows:
        tokens, labels = (torch.cat(part) for part in zip(*window, strict=True))
        optimizer.zero_grad()
        scores = model(tokens)
        lengths = scores[tokens[:, 0] < 3].square().mean((1, 2))
        loss = F.cross_entropy(scores, labels, ignore_index=-100)
        (loss + (lengths.mean() if len(lengths) else 0)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_each_loss_term_is_divided_by_its_own_weight() -> None:
    batches = micro_batches()
    assert distance(with_terms(batches), whole_with_terms(windows_of(batches, 4))) <= 1e-12


# --- ranks ----------------------------------------------------------------------------------------------

FORMS = ("windows", "windows ddp", "optimizer", "optimizer ddp")


PARTS = {"unequal": [[0, 1, 2, 3, 4], [5, 6, 7, 8]], "a rank without data": [[], list(range(9))]}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(2, _on_rank)


def _on_rank() -> dict[str, Any]:
    """Each form on this rank's micro-batches, which are a part of all; then what failures come to."""
    found: dict[str, Any] = {}
    for name, parts in PARTS.items():
        mine = [micro_batches()[i] for i in parts[torch.distributed.get_rank()]]
        found[name] = {
            "windows": in_windows(mine),
            "terms": with_terms(mine),
            "terms ddp": with_terms(mine, wrap=True),
            "windows ddp": in_windows(mine, wrap=True, mean=True),
            "optimizer": with_optimizer(mine)[0],
            "optimizer ddp": with_optimizer(mine, wrap=True)[0],
        }
    return {**found, "failures": [_reader_that_fails(), _pass_that_fails()]}


@pytest.mark.parametrize("name", PARTS)
def test_two_processes_make_the_steps_of_one(ranks: list[dict[str, Any]], name: str) -> None:
    """Unequally many micro-batches, so that the ranks' last windows differ, and a rank that has none at all."""
    batches = micro_batches()
    first, second = (windows_of([batches[i] for i in part], 4) for part in PARTS[name])
    together = [a + b for a, b in itertools.zip_longest(first, second, fillvalue=[])]
    wanted = whole_batches(Tagger().double(), together)
    with_two_terms = whole_with_terms(together)
    for rank in ranks:
        for form in FORMS:
            assert distance(rank[name][form], wanted) <= 1e-12, form
        for form in ("terms", "terms ddp"):
            assert distance(rank[name][form], with_two_terms) <= 1e-12, form


def _reader_that_fails() -> str:
    def reader() -> Iterator[Pair]:
        yield from micro_batches()[:2]
        if torch.distributed.get_rank() == 1:
            raise OSError("the disk is gone")
        yield from micro_batches()[2:]

    try:
        in_windows(reader())  # type: ignore[arg-type]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _pass_that_fails() -> str:
    model = Tagger().double()
    accumulator = gatrain.Accumulator(model, accumulation_steps=4, weight=label_count)
    try:
        for window in accumulator.windows(micro_batches()):
            for tokens, labels in window:
                with window.accumulate(model):
                    if torch.distributed.get_rank() == 1:
                        raise MemoryError("out of memory")
                    loss = F.cross_entropy(model(tokens), labels, reduction="sum")
                    window.backward(loss_sum=loss, weight=label_count((tokens, labels)))
    except Exception as error:
        return type(error).__name__
    return ""


def test_a_failure_on_one_rank_ends_the_window_on_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["failures"] for rank in ranks)
    assert "another rank failed" in first[0]
    assert second[0] == "OSError: the disk is gone"
    assert (first[1], second[1]) == ("PeerFailed", "MemoryError")


# --- precision ------------------------------------------------------------------------------------------


def test_sums_of_many_tokens_stay_in_the_range_of_fp16_under_a_loss_scale() -> None:
    """The gradient of a sum over 60,000 labels would overflow at a scale that the gradient of their mean fits."""

    def run(scaler: torch.amp.GradScaler | None, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model, inputs = nn.Linear(4, 2, dtype=torch.float32), torch.randn(8000, 4)
        optimizer = gatrain.AccumulatingOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, accumulation_steps=3, scaler=scaler
        )
        for part in inputs.split(3000):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(part).square().mean()
            optimizer.backward(mean_loss=loss, weight=2 * len(part))
            made = optimizer.step()
        assert made
        return model.weight.detach()

    exact = run(None, torch.float32)
    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.float16)
    torch.testing.assert_close(scaled, exact, rtol=5e-3, atol=5e-3)


def test_bf16_parameters_are_stepped_through_fp32_masters() -> None:
    batches = micro_batches()

    def run(step_with: Callable[..., None]) -> list[Tensor]:
        model = Tagger().bfloat16()
        masters = gatrain.MasterWeights(model)
        step_with(model, masters, torch.optim.SGD(masters.parameters(), lr=RATE))
        return [p.detach() for p in masters.parameters()]

    def ours(model: nn.Module, masters: Any, inner: torch.optim.Optimizer) -> None:
        optimizer = gatrain.AccumulatingOptimizer(inner, model, accumulation_steps=4, master_weights=masters)
        for tokens, labels in batches:
            loss = F.cross_entropy(model(tokens).float(), labels, ignore_index=-100, reduction="sum")
            optimizer.backward(loss_sum=loss, weight=label_count((tokens, labels)))
            optimizer.step()
        optimizer.flush()

    def in_window(model: nn.Module, masters: Any, inner: torch.optim.Optimizer) -> None:
        accumulator = gatrain.Accumulator(
            model, accumulation_steps=4, weight=label_count, master_weights=masters
        )
        for window in accumulator.windows(batches):
            for tokens, labels in window:
                with window.accumulate(model):
                    loss = F.cross_entropy(model(tokens).float(), labels, ignore_index=-100, reduction="sum")
                    window.backward(loss_sum=loss, weight=label_count((tokens, labels)))
            inner.step()
            masters.copy_to_model()
            inner.zero_grad()

    for one, other in zip(run(ours), run(in_window), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
    half = Tagger().bfloat16()  # without masters: added up in fp32, and rounded once
    in_window_alone = gatrain.Accumulator(half, accumulation_steps=9, weight=label_count)
    for window in in_window_alone.windows(batches):
        for tokens, labels in window:
            with window.accumulate(half):
                loss = F.cross_entropy(half(tokens).float(), labels, ignore_index=-100, reduction="sum")
                window.backward(loss_sum=loss, weight=label_count((tokens, labels)))
    reference = Tagger().bfloat16()
    gatrain.accumulate(
        reference,
        batches,
        loss_sum=lambda model, pair: (
            F.cross_entropy(model(pair[0]).float(), pair[1], ignore_index=-100, reduction="sum"),
            label_count(pair),
        ),
        weight=label_count,
    )
    for one, other in zip(half.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    half = Tagger().bfloat16()
    with pytest.raises(ConfigError, match="MasterWeights"):
        gatrain.AccumulatingOptimizer(torch.optim.SGD(half.parameters()), half, accumulation_steps=4)


# --- what is refused ------------------------------------------------------------------------------------


def _optimizer(steps: Any = 4) -> tuple[Tagger, gatrain.AccumulatingOptimizer, Tensor]:
    model = Tagger()
    optimizer = gatrain.AccumulatingOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE), model, accumulation_steps=steps
    )
    tokens, labels = micro_batches()[0]
    return model, optimizer, F.cross_entropy(model(tokens), labels, ignore_index=-100)


def _step_after_own_backward() -> None:
    _, optimizer, loss = _optimizer()
    loss.backward()
    optimizer.step()


def _mean_without_weight() -> None:
    _, optimizer, loss = _optimizer()
    optimizer.backward(mean_loss=loss)


def _two_denominators() -> None:
    _, optimizer, loss = _optimizer()
    optimizer.backward(mean_loss={"a": loss, "b": loss}, weight={"a": 1, "b": 2})


def _clipped_in_the_loop() -> None:
    model, optimizer, loss = _optimizer()
    optimizer.backward(mean_loss=loss, weight=3)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.flush()


def _zeroed_in_the_loop() -> None:
    model, optimizer, loss = _optimizer()
    optimizer.backward(mean_loss=loss, weight=3)
    model.zero_grad()
    optimizer.flush()


def _backward_of_ones_own_between() -> None:
    _, optimizer, loss = _optimizer()
    optimizer.backward(mean_loss=loss * 1, weight=3)
    _optimizer()
    optimizer._step.model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    optimizer.flush()


def _saved_in_a_window() -> None:
    _, optimizer, loss = _optimizer()
    optimizer.backward(mean_loss=loss, weight=3)
    optimizer.state_dict()


def _schedule_without_epoch() -> None:
    _, optimizer, loss = _optimizer({0: 4, 8: 8})
    optimizer.backward(mean_loss=loss, weight=3)


def _window(weight: Any = label_count, **options: Any) -> tuple[Tagger, Iterator[Any]]:
    model = Tagger()
    accumulator = gatrain.Accumulator(model, weight=weight, **{"accumulation_steps": 4, **options})
    return model, accumulator.windows(micro_batches())


def _through(model: nn.Module, window: Any, weight: Callable[[Pair], Any]) -> None:
    for tokens, labels in window:
        with window.accumulate(model):
            loss = F.cross_entropy(model(tokens), labels, ignore_index=-100, reduction="sum")
            window.backward(loss_sum=loss, weight=weight((tokens, labels)))


def _counted_another_weight() -> None:
    model, windows = _window(lambda pair: pair[1].numel())
    _through(model, next(windows), label_count)


def _left_early() -> None:
    model, windows = _window()
    for window in windows:
        for tokens, _ in window:
            with window.accumulate(model):
                window.backward(loss_sum=model(tokens).sum(), weight=1)
            break


def _never_zeroed() -> None:
    model, windows = _window()
    for window in windows:
        _through(model, window, label_count)


def _stepped_inside() -> None:
    """As Accelerate's loop has it, whose wrapped optimizer steps in the last micro-step alone."""
    model, windows = _window()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    window = next(windows)
    for tokens, labels in window:
        with window.accumulate(model):
            loss = F.cross_entropy(model(tokens), labels, ignore_index=-100, reduction="sum")
            window.backward(loss_sum=loss, weight=label_count((tokens, labels)))
            optimizer.step()


def _another_model() -> None:
    _, windows = _window()
    _through(Tagger(), next(windows), label_count)


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (_step_after_own_backward, "an optimizer alone does not know how many samples"),
        (_mean_without_weight, "weight=<what the mean divides by>"),
        (_two_denominators, "gatrain.Accumulator counts them beforehand"),
        (_clipped_in_the_loop, "Give clip_norm to AccumulatingOptimizer"),
        (_zeroed_in_the_loop, "changed between two micro-steps"),
        (_backward_of_ones_own_between, "changed between two micro-steps"),
        (_saved_in_a_window, "Save after a step that returned True"),
        (_schedule_without_epoch, r"optimizer\.set_epoch"),
        (lambda: _optimizer({0: 0}), "at least 1"),
        (lambda: _optimizer({-1: 2}), "at least 0"),
        (_counted_another_weight, "counted 60 .* used"),
        (_left_early, "left after 1 of its 4 micro-batches"),
        (_never_zeroed, "optimizer.zero_grad"),
        (_another_model, "another Tagger"),
        (_stepped_inside, "belong after the inner loop"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(loop: Callable[[], object], words: str) -> None:
    with pytest.raises((ConfigError, ExactnessError), match=words):
        loop()
