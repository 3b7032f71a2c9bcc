"""Laws of the ready tasks: sums split anywhere, and sum over weight is the mean that PyTorch gives."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatrain.errors import ConfigError, DataError, ExactnessError
from gatrain.models.gpt import GPT
from gatrain.tasks import LanguageModel, Supervised, Task, token_loss
from gatrain.train.step import share_of

N, C = 12, 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(*shape: int, integers: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if integers is not None:
        return torch.randint(integers, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=dtype)


class Pairs:
    """A plain map-style dataset."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.rows = list(zip(inputs, targets, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index]


def supervised(loss: Any, targets: Tensor, outputs: Tensor, **options: Any) -> tuple[Supervised, Any]:
    """A task whose model passes its input through, and its only batch."""
    task = Supervised(nn.Identity, Pairs(outputs, targets), loss, **options)
    return task, task.collate([task.train_data[i] for i in range(len(task.train_data))])


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.25, 0.1, 3.0], dtype=torch.float64)
INDEX, IMAGE_INDEX = seeded(N, integers=C), seeded(N, 3, 2, integers=C)
SCORES, IMAGE_SCORES = seeded(N, C), seeded(N, C, 3, 2)
PROBABILITIES = torch.softmax(seeded(N, C) * 2, dim=1)
IMAGE_PROBABILITIES = torch.softmax(seeded(N, C, 3, 2), dim=1)
UNIT = torch.sigmoid(seeded(N, C))

CASES: dict[str, tuple[Any, Tensor, Tensor]] = {
    f"{kind.__name__}-{name}-{places}": (kind(**options), targets, scores)
    for kind in (nn.CrossEntropyLoss, nn.NLLLoss)
    for name, options in {
        "plain": {},
        "ignore": {"ignore_index": 2},
        "weight": {"weight": CLASS_WEIGHTS},
        "both": {"weight": CLASS_WEIGHTS, "ignore_index": 2},
    }.items()
    for places, targets, scores in (("flat", INDEX, SCORES), ("image", IMAGE_INDEX, IMAGE_SCORES))
}
for name, options in {
    "plain": {"label_smoothing": 0.1},
    "ignore": {"label_smoothing": 0.3, "ignore_index": 1},
    "both": {"label_smoothing": 0.2, "ignore_index": 1, "weight": CLASS_WEIGHTS},
}.items():
    CASES[f"smooth-{name}-flat"] = (nn.CrossEntropyLoss(**options), INDEX, SCORES)
    CASES[f"smooth-{name}-image"] = (nn.CrossEntropyLoss(**options), IMAGE_INDEX, IMAGE_SCORES)
for name, options in {
    "plain": {},
    "weight": {"weight": CLASS_WEIGHTS},
    "smooth": {"label_smoothing": 0.1},
}.items():
    CASES[f"probabilities-{name}-flat"] = (nn.CrossEntropyLoss(**options), PROBABILITIES, SCORES)
    CASES[f"probabilities-{name}-image"] = (nn.CrossEntropyLoss(**options), IMAGE_PROBABILITIES, IMAGE_SCORES)
CASES |= {
    "mse": (nn.MSELoss(), UNIT, SCORES),
    "l1": (nn.L1Loss(), UNIT, SCORES),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.5), UNIT, SCORES),
    "huber": (nn.HuberLoss(delta=0.5), UNIT, SCORES),
    "bce": (nn.BCELoss(), (UNIT > 0.5).double(), UNIT),
    "bce-logits": (nn.BCEWithLogitsLoss(), UNIT, SCORES),
    "bce-logits-weights": (
        nn.BCEWithLogitsLoss(weight=CLASS_WEIGHTS, pos_weight=CLASS_WEIGHTS),
        UNIT,
        SCORES,
    ),
    "poisson": (nn.PoissonNLLLoss(), UNIT, SCORES),
    "soft-margin": (nn.SoftMarginLoss(), (UNIT > 0.5) * 2.0 - 1, SCORES),
    "kl-batchmean": (nn.KLDivLoss(reduction="batchmean"), PROBABILITIES, SCORES.log_softmax(1)),
    "multi-margin": (nn.MultiMarginLoss(), INDEX, SCORES),
    "multilabel-soft-margin": (nn.MultiLabelSoftMarginLoss(), (UNIT > 0.5).double(), SCORES),
    "function": (F.cross_entropy, INDEX, SCORES),
    "partial": (functools.partial(F.cross_entropy, ignore_index=3, weight=CLASS_WEIGHTS), INDEX, SCORES),
    "own-function": (lambda o, t: (o - t).abs().amax(dim=1).mean(), UNIT, SCORES),
}


@pytest.mark.parametrize("name", CASES)
def test_sum_over_weight_is_the_mean_of_pytorch(name: str) -> None:
    loss, targets, outputs = CASES[name]
    task, batch = supervised(loss, targets, outputs)
    total, used = task.loss_sum(nn.Identity(), batch)
    expected = loss(outputs, targets)
    torch.testing.assert_close(total / used, expected, rtol=1e-12, atol=1e-12)
    assert task.weight(batch) == pytest.approx(float(used), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_sums_and_weights_split_anywhere(name: str) -> None:
    loss, targets, outputs = CASES[name]
    task, batch = supervised(loss, targets, outputs)
    parts = [(batch[0][:5], batch[1][:5]), (batch[0][5:6], batch[1][5:6]), (batch[0][6:], batch[1][6:])]
    whole, _ = task.loss_sum(nn.Identity(), batch)
    torch.testing.assert_close(
        sum(task.loss_sum(nn.Identity(), part)[0] for part in parts), whole, rtol=1e-12, atol=1e-12
    )
    assert sum(float(task.weight(part)) for part in parts) == pytest.approx(float(task.weight(batch)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["CrossEntropyLoss-both-flat", "smooth-both-image", "bce-logits-weights", "mse"]
)
def test_loss_and_count_compile_into_one_graph(name: str) -> None:
    loss, targets, outputs = CASES[name]
    task, batch = supervised(loss, targets, outputs)
    model = nn.Identity()
    compiled = torch.compile(lambda b: task.loss_sum(model, b), fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(batch), task.loss_sum(model, batch), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_users_loss_object_is_not_changed() -> None:
    loss = nn.CrossEntropyLoss()
    supervised(loss, INDEX, SCORES)
    assert loss.reduction == "mean"


def test_default_loss_is_cross_entropy_with_accuracy() -> None:
    task, batch = supervised(None, INDEX, SCORES)
    total, used = task.loss_sum(nn.Identity(), batch)
    torch.testing.assert_close(total / used, F.cross_entropy(SCORES, INDEX))
    correct, count = task.eval_metrics(nn.Identity(), batch)["accuracy"]
    assert int(correct) == int((SCORES.argmax(1) == INDEX).sum())
    assert count == N


def test_accuracy_leaves_out_ignored_targets() -> None:
    task, batch = supervised(nn.CrossEntropyLoss(ignore_index=2), IMAGE_INDEX, IMAGE_SCORES)
    correct, count = task.eval_metrics(nn.Identity(), batch)["accuracy"]
    counted = IMAGE_INDEX != 2
    assert int(count) == int(counted.sum())
    assert int(correct) == int(((IMAGE_SCORES.argmax(1) == IMAGE_INDEX) & counted).sum())


def test_regression_has_no_accuracy() -> None:
    task, batch = supervised(nn.MSELoss(), UNIT, SCORES)
    assert task.eval_metrics(nn.Identity(), batch) == {}


def test_bf16_outputs_are_summed_in_fp32() -> None:
    task, batch = supervised(None, INDEX, SCORES.bfloat16())
    assert task.loss_sum(nn.Identity(), batch)[0].dtype == torch.float32


def test_custom_weight_counts_what_the_mean_divides_by() -> None:
    def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() * (targets > 0)).sum() / (targets > 0).sum()

    targets = seeded(N, C)
    task, batch = supervised(masked_mean, targets, SCORES, weight=lambda t: (t > 0).sum())
    total, used = task.loss_sum(nn.Identity(), batch)
    torch.testing.assert_close(total / used, masked_mean(SCORES, targets))
    assert task.weight(batch) == int((targets > 0).sum())


def test_one_loss_for_each_sample_is_summed() -> None:
    task, batch = supervised(lambda o, t: (o - t).square().mean(1), UNIT, SCORES)
    total, used = task.loss_sum(nn.Identity(), batch)
    torch.testing.assert_close(total / used, F.mse_loss(SCORES, UNIT))


def test_a_subclass_that_computes_something_else_is_a_mean_over_samples() -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    task, batch = supervised(Own(), INDEX, SCORES)
    total, used = task.loss_sum(nn.Identity(), batch)
    torch.testing.assert_close(total / used, 2 * F.cross_entropy(SCORES, INDEX))
    assert used == N


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: Supervised(nn.Linear(2, 2), Pairs(SCORES, INDEX)), "a function that makes it"),
        (lambda: Supervised(3, Pairs(SCORES, INDEX)), "not callable"),
        (lambda: Supervised(lambda: 3, Pairs(SCORES, INDEX)).build_model(), "not a torch.nn.Module"),
        (lambda: Supervised(nn.Identity, iter([])), "can be read only once"),
        (lambda: Supervised(nn.Identity, 3), "a int"),
        (lambda: Supervised(nn.Identity, Pairs(SCORES, INDEX), nn.MSELoss(reduction="sum")), "'mean'"),
        (lambda: Supervised(nn.Identity, Pairs(SCORES, INDEX), nn.PReLU()), "has parameters"),
        (lambda: Supervised(nn.Identity, Pairs(SCORES, INDEX), 3), "loss=3"),
        (lambda: Supervised(nn.Identity, Pairs(SCORES, INDEX), eval_fraction=1.5), "eval_fraction"),
        (lambda: LanguageModel(nn.Identity, Pairs(SCORES, INDEX), nn.MSELoss()), "loss=null"),
        (lambda: Supervised(nn.Identity, Pairs(SCORES, INDEX)).weight({"x": 1}), "a batch is a dict"),
        (lambda: LanguageModel(nn.Identity, Pairs(SCORES, INDEX)).weight((1, 2)), "a batch is a tuple"),
    ],
)
def test_what_cannot_be_used_is_refused_with_advice(make: Any, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        make()


def test_shapes_that_would_broadcast_are_refused() -> None:
    task, batch = supervised(nn.MSELoss(), seeded(N), seeded(N, 1))
    with pytest.raises(ConfigError, match=r"\[12, 1\].*\[12\]"):
        task.loss_sum(nn.Identity(), batch)


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    task, batch = supervised(lambda o, t: o, UNIT, SCORES)
    with pytest.raises(ConfigError, match=r"shape \[12, 5\]"):
        task.loss_sum(nn.Identity(), batch)


def test_plain_dataset_holds_out_its_end() -> None:
    task = Supervised(nn.Identity, Pairs(SCORES, INDEX), eval_fraction=0.25)
    assert task.eval_data is not None
    assert (len(task.train_data), len(task.eval_data)) == (9, 3)
    assert torch.equal(task.eval_data[0][0], SCORES[9])
    with pytest.raises(IndexError):
        task.train_data[9]
    assert Supervised(nn.Identity, Pairs(SCORES, INDEX)).eval_data is None


def test_empty_data_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Supervised(nn.Identity, Pairs(SCORES[:0], INDEX[:0]))


# Language models


class Tokens:
    """Fixed windows of random tokens."""

    vocab_size, context = 50, 16

    def __init__(self) -> None:
        self.train = list(seeded(20, 17, integers=50))
        self.eval = None


class Padded:
    """Samples of different lengths with aligned labels."""

    vocab_size, context, variable_length = 50, 16, True

    def __init__(self) -> None:
        self.train = Ragged()

    def collate(self, samples: list[int]) -> dict[str, Tensor]:
        lengths = torch.tensor(samples)
        tokens = seeded(len(samples), int(lengths.max()), integers=50)
        position = torch.arange(tokens.shape[1])
        labels = torch.where(
            (position < lengths[:, None]) & (position >= lengths[:, None] // 2), tokens, -100
        )
        return {"tokens": tokens, "labels": labels}


class Ragged:
    lengths = (3, 9, 16, 5, 12)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        return self.lengths[index]


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(50, 16, layers=1, heads=2, width=16)


@pytest.mark.parametrize("data", [Tokens, Padded])
def test_language_model_sums_split_anywhere_in_fp64(data: Any) -> None:
    task = LanguageModel(gpt, data())
    model = task.build_model().double()
    batch = task.collate([task.train_data[i] for i in range(5)])

    def part(start: int, stop: int) -> Any:
        return (
            batch[start:stop]
            if isinstance(batch, Tensor)
            else {name: value[start:stop] for name, value in batch.items()}
        )

    total, used = task.loss_sum(model, batch)
    assert total.dtype == torch.float64
    first, rest = task.loss_sum(model, part(0, 2)), task.loss_sum(model, part(2, 5))
    torch.testing.assert_close(first[0] + rest[0], total, rtol=1e-13, atol=1e-12)
    assert int(first[1]) + int(rest[1]) == int(used) == task.weight(batch)
    assert isinstance(used, Tensor)


def test_windows_predict_every_following_token() -> None:
    task = LanguageModel(gpt, Tokens())
    batch = task.collate([task.train_data[0], task.train_data[1]])
    assert batch.shape == (2, 17)
    assert task.weight(batch) == task.tokens(batch) == 32
    model = task.build_model()
    expected = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(task.loss_sum(model, batch)[0] / 32, expected)


def test_language_model_compiles_into_one_graph() -> None:
    task = LanguageModel(gpt, Tokens())
    model = task.build_model()
    batch = task.collate([task.train_data[0], task.train_data[1]])
    compiled = torch.compile(lambda b: task.loss_sum(model, b), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch), task.loss_sum(model, batch))


def test_padded_counts_vary_and_padding_does_not_matter() -> None:
    task = LanguageModel(gpt, Padded())
    assert task.variable_length
    weights = [task.weight(task.collate([task.train_data[i]])) for i in range(5)]
    assert len(set(weights)) == 5
    model = task.build_model().double()
    batch = task.collate([3, 5])
    longer = {
        "tokens": F.pad(batch["tokens"], (0, 4), value=7),
        "labels": F.pad(batch["labels"], (0, 4), value=-100),
    }
    torch.testing.assert_close(
        task.loss_sum(model, batch)[0], task.loss_sum(model, longer)[0], rtol=1e-13, atol=1e-12
    )
    assert task.weight(batch) == task.weight(longer)


def test_worst_case_is_the_longest_samples() -> None:
    task = LanguageModel(gpt, Padded())
    assert list(task.worst_case_indices(3)) == [2, 4, 1]
    assert list(task.worst_case_indices(7)) == [2, 4, 1, 3, 0, 2, 4]
    assert list(LanguageModel(gpt, Tokens()).worst_case_indices(2)) == [0, 1]


def test_cross_entropy_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = seeded(3, 7, C).requires_grad_()
    labels = seeded(3, 7, integers=C)
    labels[0, :3] = -100
    whole = token_loss.summed_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(token_loss, "MOST_LOGITS", 4 * C + 1)
    pieces = token_loss.summed_cross_entropy(logits, labels)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, logits)[0], gradient)


def test_bf16_logits_give_an_fp32_loss() -> None:
    logits = seeded(2, 3, C).bfloat16()
    loss = token_loss.summed_cross_entropy(logits, seeded(2, 3, integers=C))
    assert loss.dtype == torch.float32


def test_all_labels_ignored_gives_zero_weight_and_zero_loss() -> None:
    labels = torch.full((2, 3), -100)
    assert int(token_loss.label_count(labels)) == 0
    assert token_loss.summed_cross_entropy(seeded(2, 3, C), labels).item() == 0


def test_shortened_keeps_some_labels() -> None:
    task = LanguageModel(gpt, Tokens())
    assert task.shortened(torch.zeros(2, 1025)).shape == (2, 129)
    labels = torch.full((2, 300), -100)
    labels[:, 250:] = 1
    short = task.shortened({"tokens": torch.zeros_like(labels), "labels": labels})
    assert short["tokens"].shape == (2, 128)
    assert task.weight(short) == 100


def test_sizes_of_model_and_data_are_compared() -> None:
    data = Tokens()
    data.vocab_size = 60
    with pytest.raises(ConfigError, match=r"model\.vocab_size=50.*data\.vocab_size=60.*=64"):
        LanguageModel(gpt, data).build_model()
    data.vocab_size, data.context = 50, 32
    with pytest.raises(ConfigError, match=r"model\.context=16.*data\.context=32"):
        LanguageModel(gpt, data).build_model()


class Letters:
    end_of_text, size = 0, 40

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(48 + i) for i in ids)


def test_showcase_is_repeatable_and_leaves_the_model_and_random_state_alone() -> None:
    data: Any = Tokens()
    task = LanguageModel(gpt, data)
    model = task.build_model()
    assert task.showcase(model, torch.device("cpu")) is None
    assert task.baseline() is None
    data.tokenizer = Letters()
    before = torch.get_rng_state()
    text = task.showcase(model, torch.device("cpu"))
    assert text == task.showcase(model, torch.device("cpu"))
    assert text is not None
    assert len(text) == 200
    assert all("0" < letter < chr(48 + 40) for letter in text)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_the_users_own_task_needs_three_methods() -> None:
    class Own(Task):
        train_data = [torch.ones(3)] * 4

        def build_model(self) -> nn.Module:
            return nn.Linear(3, 1)

        def weight(self, batch: Tensor) -> float:
            return len(batch)

        def loss_sum(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
            return model(batch).sum(), len(batch)

    task = Own()
    batch = task.collate([task.train_data[i] for i in task.worst_case_indices(6)])
    assert task.loss_sum(task.build_model(), batch)[1] == task.weight(batch) == 6


def test_a_loss_that_leaves_out_every_term_of_a_masked_micro_batch_is_refused_in_words() -> None:
    with pytest.raises(ExactnessError, match="Return every loss term each time"):
        share_of({}, {"loss": 1.0})
