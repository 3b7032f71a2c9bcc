"""Which mean is trained: by token or by sequence, with class weights, label smoothing and sample weights.

Each reference is written out sample by sample, without padding and without any of the package.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from torch import Tensor, nn

from gatrain import accumulate
from gatrain.errors import ConfigError, DataError, ExactnessError
from gatrain.tasks import HuggingFace, LanguageModel, Supervised
from gatrain.train.counts import agree

WORDS, LENGTH, COUNT = 7, 9, 13
CLASS_WEIGHTS = [0.1, 5.0, 1.0, 0.3, 2.0, 0.7, 1.1]
SPLITS = ((13,), (1, 5, 2, 4, 1), (6, 6, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).cumsum(1)))


class TinyForCausalLM(Net):
    """As a model of transformers is called and answers."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids))


class TinyForSequenceClassification(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids)[:, -1])


class Rows:
    """Texts of 1 to LENGTH labels, one without any, and a weight for each."""

    deterministic = True

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(i)
        tokens = torch.randint(WORDS, (LENGTH + 1,), generator=g)
        labels = tokens[1:].clone()
        labels[(i * 7) % (LENGTH + 1) :] = -100
        return {"tokens": tokens[:-1], "labels": labels, "weight": torch.tensor(0.25 + (i * 7) % 5)}


def weight_by_first_token(batch: dict[str, Tensor]) -> Tensor:
    return 1.0 + batch["tokens"][:, 0]


OPTIONS: dict[str, dict[str, Any]] = {
    f"{mean}{' classes' * classes}{' smooth' * smooth}{' samples' * samples}": {
        "mean": mean,
        **({"class_weights": CLASS_WEIGHTS} if classes else {}),
        **({"label_smoothing": 0.2} if smooth else {}),
        **({"sample_weight": "weight"} if samples else {}),
    }
    for mean, classes, smooth, samples in itertools.product(
        ("token", "sequence"), (False, True), (False, True), (False, True)
    )
}
OPTIONS["some classes"] = {"class_weights": {1: 5.0, 4: 0.0}}
OPTIONS["a function"] = {"mean": "sequence", "sample_weight": weight_by_first_token}


def reference(model: Net, options: dict[str, Any]) -> Tensor:
    """The mean as its definition has it."""
    smoothing, classes = options.get("label_smoothing", 0.0), options.get("class_weights", [1.0] * WORDS)
    if isinstance(classes, dict):
        classes = [classes.get(number, 1.0) for number in range(WORDS)]
    weigh = options.get("sample_weight")
    above: Any = 0.0
    below: Any = 0.0
    for i in range(COUNT):
        row = Rows()[i]
        batch = {name: each[None] for name, each in row.items()}
        s = float(row["weight"] if weigh == "weight" else weigh(batch)[0] if weigh else 1.0)
        logs = F.log_softmax(model(row["tokens"][None])[0], dim=-1)
        losses: Any = 0.0
        weights = 0.0
        for t, label in enumerate(row["labels"].tolist()):
            if label == -100:
                continue
            spread = sum(-classes[c] * logs[t, c] for c in range(WORDS)) / WORDS
            losses = losses - (1 - smoothing) * classes[label] * logs[t, label] + smoothing * spread
            weights += classes[label]
        if options.get("mean") != "sequence":
            above, below = above + s * losses, below + s * weights
        elif weights:
            above, below = above + s * losses / weights, below + s
    return above / below


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def wanted(name: str) -> Tensor:
    model = Net().double()
    reference(model, OPTIONS[name]).backward()
    return gradients(model)


def in_pieces(name: str, split: tuple[int, ...], rank: int = 0, world_size: int = 1) -> Tensor:
    """The gradient by the task, of every ``world_size``-th micro-batch on each rank."""
    task = LanguageModel(Net, Rows(), **OPTIONS[name])
    rows = iter([task.train_data[i] for i in range(COUNT)])
    batches = [task.collate(list(itertools.islice(rows, size))) for size in split][rank::world_size]
    model = Net().double()
    accumulate(model, batches, loss_sum=task.loss_sum, weight=task.weight)
    return gradients(model)


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", OPTIONS)
def test_ragged_pieces_give_the_gradient_of_the_mean_that_was_asked_for(name: str) -> None:
    right = wanted(name)
    for split in SPLITS:
        assert off(in_pieces(name, split), right) <= 1e-12


def test_the_means_are_different_ones() -> None:
    """By sequence, by token, with weights: otherwise the test above would hold of an option that does nothing."""
    found = [wanted(name) for name in OPTIONS]
    for one, other in itertools.combinations(found, 2):
        assert off(one, other) > 1e-3


def _on_rank(names: list[str]) -> list[Tensor]:
    return [in_pieces(name, SPLITS[1], torch.distributed.get_rank(), 2) for name in names]


def test_two_processes_give_the_same_means() -> None:
    names = ["token", "token classes smooth samples", "sequence classes smooth samples"]
    for found in run_on_ranks(2, _on_rank, names):
        for name, gradient in zip(names, found, strict=True):
            assert off(gradient, wanted(name)) <= 1e-12


def test_token_means_are_those_of_pytorch() -> None:
    model = Net().double()
    rows = [Rows()[i] for i in range(COUNT)]
    logits = model(torch.stack([row["tokens"] for row in rows])).transpose(1, 2)
    weight = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    labels = torch.stack([row["labels"] for row in rows])
    loss = F.cross_entropy(logits, labels, weight, label_smoothing=0.2)
    torch.testing.assert_close(reference(model, OPTIONS["token classes smooth"]), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["token samples", "sequence classes smooth samples"])
def test_models_of_transformers_take_the_same_options(name: str) -> None:
    """Their labels are shifted here: label t is predicted at t - 1, so the first counts nowhere."""
    options = {**OPTIONS[name]}
    right = wanted(name)

    def shifted(i: int) -> dict[str, Tensor]:
        row = Rows()[i]
        return {
            "input_ids": torch.cat([row["tokens"], row["tokens"][:1]]),
            "labels": torch.cat([row["labels"][:1], row["labels"]]),
            "weight": row["weight"],
        }

    task = HuggingFace(TinyForCausalLM, [shifted(i) for i in range(COUNT)], **options)
    for split in SPLITS:
        rows = iter([task.train_data[i] for i in range(COUNT)])
        batches = [task.collate(list(itertools.islice(rows, size))) for size in split]
        model = TinyForCausalLM().double()
        accumulate(model, batches, loss_sum=task.loss_sum, weight=task.weight)
        assert off(gradients(model), right) <= 1e-12


def test_classifications_of_transformers_weigh_classes_and_samples() -> None:
    rows = [
        {"input_ids": Rows()[i]["tokens"], "labels": torch.tensor(i % WORDS), "weight": Rows()[i]["weight"]}
        for i in range(COUNT)
    ]
    options: dict[str, Any] = {
        "class_weights": CLASS_WEIGHTS,
        "label_smoothing": 0.2,
        "sample_weight": "weight",
    }
    task = HuggingFace(TinyForSequenceClassification, rows, **options)
    batch = task.collate(rows)
    model = TinyForSequenceClassification().double()
    total, used = task.loss_sum(model, batch)
    classes = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    losses = F.cross_entropy(
        model(batch["input_ids"]).logits, batch["labels"], classes, label_smoothing=0.2, reduction="none"
    )
    s = batch["weight"].double()
    right = (s * losses).sum() / (s * classes[batch["labels"]]).sum()
    torch.testing.assert_close(total / used, right, rtol=1e-12, atol=0)
    assert task.weight(batch) == pytest.approx(float(used), rel=1e-12)
    numbers = [{**row, "labels": torch.tensor(0.5)} for row in rows]
    task = HuggingFace(TinyForSequenceClassification, numbers, sample_weight="weight")
    with pytest.raises(ConfigError, match="one label for a whole sample"):
        task.weight(task.collate(numbers))


# --- inputs and targets ---------------------------------------------------------------------------------

S = torch.arange(1.0, COUNT + 1, dtype=torch.float64) / 4
X = torch.randn(COUNT, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(5, (COUNT, 3), generator=torch.Generator().manual_seed(1))
FIVE = torch.tensor(CLASS_WEIGHTS[:5], dtype=torch.float64)


def _own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().amax(dim=(1, 2))  # one number for each sample


WEIGHED: dict[str, tuple[dict[str, Any], Tensor, Any]] = {
    "classes": (
        {"class_weights": CLASS_WEIGHTS[:5], "label_smoothing": 0.1},
        Y,
        lambda out, s: (
            (F.cross_entropy(out, Y, FIVE, label_smoothing=0.1, reduction="none") * s[:, None]).sum()
            / (FIVE[Y] * s[:, None]).sum()
        ),
    ),
    "ignored": (
        {"loss": nn.CrossEntropyLoss(ignore_index=2)},
        Y,
        lambda out, s: (
            (F.cross_entropy(out, Y, ignore_index=2, reduction="none") * s[:, None]).sum()
            / ((Y != 2) * s[:, None]).sum()
        ),
    ),
    "probabilities": (
        {},
        X.softmax(1),
        lambda out, s: (
            (F.cross_entropy(out, X.softmax(1), reduction="none") * s[:, None]).sum() / (3 * s).sum()
        ),
    ),
    "squares": (
        {"loss": nn.MSELoss()},
        X.cos(),
        lambda out, s: ((out - X.cos()).square() * s[:, None, None]).sum() / (15 * s).sum(),
    ),
    "own": (
        {"loss": _own_loss},
        X.cos(),
        lambda out, s: (_own_loss(out, X.cos()) * s).sum() / s.sum(),
    ),
}


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("form", ["triple", "mapping", "function"])
def test_a_weight_of_a_sample_counts_in_the_loss_and_in_its_mean(name: str, form: str) -> None:
    options, targets, mean = WEIGHED[name]
    column: Any = {
        "triple": 2,
        "mapping": "w",
        "function": lambda batch: batch[0].flatten(1).sum(1).square(),
    }[form]
    s = column((X, targets)) if form == "function" else S
    rows: list[Any] = list(zip(X, targets, S, strict=True))
    if form == "mapping":
        rows = [{"x": x, "y": y, "w": w} for x, y, w in rows]
    elif form == "function":
        rows = [row[:2] for row in rows]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 3).double()

    task = Supervised(model, rows, sample_weight=column, **options)
    whole, pieces = model(), model()
    mean(whole(X), s).backward()
    left = iter(rows)
    batches = [task.collate(list(itertools.islice(left, size))) for size in SPLITS[1]]
    accumulate(pieces, batches, loss_sum=task.loss_sum, weight=task.weight)
    assert off(gradients(pieces), gradients(whole)) <= 1e-12
    parts = [task.represent(pieces, batch) for batch in batches]  # as gradient=cached gathers them
    total, weight = task.window_loss({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    assert (total / weight).item() == pytest.approx(mean(whole(X), s).item(), rel=1e-12)


def _task(**options: Any) -> LanguageModel:
    return LanguageModel(Net, Rows(), **options)


def _weighed(weight: Any) -> float:
    return _task(sample_weight=lambda batch: weight).weight(_task().collate([Rows()[0], Rows()[1]]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: _task(mean="sequences"), "Did you mean 'sequence'"),
        (lambda: _task(label_smoothing=1.5), "between 0 and 1"),
        (lambda: _task(class_weights=[-1.0, 2.0]), "0 or more"),
        (lambda: _task(class_weights="balanced"), "a list of numbers"),
        (lambda: _task(sample_weight=1.5), "neither the name of a column"),
        (lambda: _task(sample_weight="w").weight(_task().collate([Rows()[0]])), "task.sample_weight=w"),
        (lambda: _weighed(torch.tensor([1.0, -2.0])), "weights are 0 or more"),
        (lambda: _weighed(torch.tensor([1.0, float("nan")])), "weights are 0 or more"),
        (lambda: _weighed(torch.ones(3)), "one number for each"),
        (
            lambda: _task(class_weights=[1.0] * 5).loss_sum(Net(), _task().collate([Rows()[3]])),
            "5 numbers",
        ),
        (
            lambda: _task(class_weights={9: 1.0}).loss_sum(Net(), _task().collate([Rows()[3]])),
            "names the class 9",
        ),
        (lambda: Supervised(Net, Rows(), nn.MSELoss(), label_smoothing=0.1), "Give them to it"),
        (lambda: Supervised(Net, Rows(), weight=len, sample_weight="w"), "both given"),
        (
            lambda: Supervised(
                nn.Identity, [(X[0], X[0], S[0])], lambda out, y: (out - y).mean(), sample_weight=2
            ).loss_sum(nn.Identity(), (X[:1], X[:1], S[:1])),
            "one number for each of the 1 samples",
        ),
        (
            lambda: HuggingFace(TinyForCausalLM, [{}], loss_weight="labels", mean="sequence"),
            "Leave loss_weight out",
        ),
    ],
)
def test_what_cannot_be_weighed_is_refused_in_words(given: Any, words: str) -> None:
    with pytest.raises((ConfigError, DataError, ExactnessError), match=words):
        given()


def test_whole_weights_agree_exactly_and_real_ones_up_to_rounding() -> None:
    assert agree(54.0, 54.0, 1e-6)
    assert not agree(54.0, 53.0, 1e-6)
    assert agree(3.0, 3.0000000000000004, 1e-6)  # real weights whose sum is whole in one order alone
    assert not agree(3.5, 3.6, 1e-6)
    assert not agree(54e6, 54e6 - 1, 1e-6)
