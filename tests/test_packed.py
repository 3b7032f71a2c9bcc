"""Packed documents: `data.packed=isolated` computes each document of a sample as if it stood alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from torch import Tensor, nn

from gatrain import accumulate
from gatrain.data.text import TextWindows, isolated
from gatrain.errors import ConfigError
from gatrain.models.gpt import GPT
from gatrain.tasks import LanguageModel

END, WORDS, CONTEXT, COUNT = 0, 11, 24, 9


class Rows:
    """Rows of documents of 0 to 10 tokens, each ended by END; the first and the last of a row may be cut."""

    variable_length = False

    def __init__(self, packed: str = "isolated") -> None:
        draw = random.Random(3)
        stream: list[int] = []
        while len(stream) <= COUNT * CONTEXT:
            stream += [draw.randrange(1, WORDS) for _ in range(draw.randrange(11))] + [END]
        self.rows = [torch.tensor(stream[i * CONTEXT : (i + 1) * CONTEXT + 1]) for i in range(COUNT)]
        self.train, self.packed = self.rows, packed
        if packed == "isolated":
            self.collate = lambda rows: isolated(torch.stack(rows), END)


def gpt(positions: str = "rotary") -> GPT:
    torch.manual_seed(0)
    return GPT(WORDS, CONTEXT, layers=2, heads=2, width=16, positions=positions).double()


def documents_of(row: Tensor) -> list[Tensor]:
    """The documents of a row, each with the token that ends it."""
    found: list[list[int]] = [[]]
    for token in row.tolist():
        found[-1].append(token)
        if token == END:
            found.append([])
    return [torch.tensor(document) for document in found if document]


def alone(model: nn.Module) -> tuple[Tensor, int]:
    """Each document by itself: a sum over the tokens that follow another of the same document, and their number."""
    total: Any = 0.0
    count = 0
    for row in Rows().rows:
        for document in documents_of(row):
            if len(document) > 1:
                logits = model(document[None, :-1])[0]
                total = total + F.cross_entropy(logits, document[1:], reduction="sum")
                count += len(document) - 1
    return total, count


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def in_pieces(positions: str, packed: str, rank: int = 0, world_size: int = 1) -> tuple[Tensor, float]:
    data = Rows(packed)
    task = LanguageModel(gpt, data)
    rows = iter(data.rows)
    batches = [task.collate(list(itertools.islice(rows, size))) for size in (1, 4, 2, 2)][rank::world_size]
    model = gpt(positions)
    result = accumulate(model, batches, loss_sum=task.loss_sum, weight=task.weight)
    return gradients(model), result.weight_totals["loss"]


def _on_rank() -> list[Tensor]:
    return [in_pieces("rotary", "isolated", torch.distributed.get_rank(), 2)[0]]


def wanted(positions: str) -> tuple[Tensor, int]:
    model = gpt(positions)
    total, count = alone(model)
    (total / count).backward()
    return gradients(model), count


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_isolated_documents_have_the_gradient_of_documents_alone(positions: str) -> None:
    right, count = wanted(positions)
    found, total = in_pieces(positions, "isolated")
    assert off(found, right) <= 1e-12
    assert total == count  # what would be predicted across an end counts nowhere
    joined, all_positions = in_pieces(positions, "joined")
    assert all_positions == COUNT * CONTEXT > count
    assert off(joined, right) > 0.1


def test_two_processes_give_the_same() -> None:
    for (found,) in run_on_ranks(2, _on_rank):
        assert off(found, wanted("rotary")[0]) <= 1e-12


def test_no_token_of_another_document_moves_a_logit() -> None:
    rows = torch.stack(Rows().rows)
    batch, model = isolated(rows, END), gpt()
    changed = batch["tokens"].clone()
    first = batch["documents"] == 0
    changed[first & (changed != END)] = 1
    before, after = (model(tokens, documents=batch["documents"]) for tokens in (batch["tokens"], changed))
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])


def test_joined_samples_are_what_they_were() -> None:
    rows = torch.stack(Rows().rows)
    model = gpt()
    torch.testing.assert_close(
        model(rows[:, :-1]), model(rows[:, :-1], documents=torch.zeros_like(rows[:, :-1]))
    )
    task = LanguageModel(gpt, Rows("joined"))
    assert torch.equal(task.collate(list(rows)), rows)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["red", "blue", "green", "one", "two", "three", "four"]
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=draw.randrange(5, 40))))
    return folder


def _text(path: Path, **options: Any) -> TextWindows:
    return TextWindows(path, vocab_size=280, context=32, cache_dir=path.parent / "cache", **options)


def test_text_says_which_tokens_are_of_which_document(text: Path) -> None:
    data = _text(text, packed="isolated")
    task = LanguageModel(lambda: GPT(320, 32, 1, 2, 16), data)
    task.build_model()
    batch = task.collate(data.train.__getitems__([0, 1, 2]))
    ends = batch["tokens"] == data.tokenizer.end_of_text
    assert ends.any()
    assert task.weight(batch) == int((~ends).sum()) == int((batch["labels"] != -100).sum())
    assert torch.equal(batch["documents"][:, 1:] - batch["documents"][:, :-1], ends[:, :-1].long())
    assert task.collates_deterministically
    assert set(task.shortened(batch)) == {"tokens", "labels", "documents"}
    assert any("first token nothing predicts" in each.what for each in data.report.omissions)


def test_what_would_attend_across_documents_is_refused(text: Path) -> None:
    class Plain(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    with pytest.raises(ConfigError, match="Did you mean 'isolated'"):
        _text(text, packed="isolate")
    task = LanguageModel(Plain, _text(text, packed="isolated"))
    with pytest.raises(ConfigError, match="takes no documents"):
        task.build_model()
    tokens = text.parent / "tokens.bin"
    torch.arange(100, dtype=torch.int16).numpy().tofile(tokens)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=gpt2"):
        _text(tokens, packed="isolated", eval_fraction=0)
