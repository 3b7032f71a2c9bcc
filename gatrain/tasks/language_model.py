"""Next-token prediction with a sum over label tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.labels import IGNORED
from gatrain.tasks.base import Batch, LossSum, LossSums, Task, declares
from gatrain.tasks.forms import fields_of, scores_of, shown
from gatrain.tasks.parts import check_factory, declared_length, find_splits, make_model
from gatrain.tasks.sample_weights import SampleWeights
from gatrain.tasks.token_loss import ClassWeights, TokenLoss, summed_cross_entropy

SHORT = 128
"""Positions that `LanguageModel.shortened` keeps."""


class LanguageModel(Task):
    """A model from int64 tokens ``[B, L]`` to logits ``[B, L, V]``, trained on the following tokens.

    A batch is one of two things. A tensor ``[B, L + 1]``: positions 0 to L-1 are inputs, 1 to L are labels.
    Or a dict of ``tokens`` and ``labels``, both ``[B, L]``, with labels ALREADY aligned: ``labels[:, t]`` is
    what the model must predict at position ``t``, and -100 where nothing is predicted. They are not shifted
    again. Of data with ``packed = "isolated"`` the dict has ``documents`` ``[B, L]`` too, a number for each
    document of a row, and the model is called with it.

    Args:
        model: function without arguments that makes the module.
        data: a data source such as `gatrain.data.TextWindows` or `gatrain.data.PaddedText`, or a map-style
            dataset
            whose samples are equally long tensors of tokens.
        loss: must be None: the loss is cross-entropy.
        eval_fraction: of a plain dataset, the share at its end that is held out.
        output: name or position of the logits, where the model returns several tensors.
        mean: over the ``token`` labels of all samples, or over the samples (``sequence``) of the means over
            their own labels.
        class_weights: of the tokens as labels: a list of all, or a mapping of some.
        label_smoothing: share of each label that is spread over all tokens.
        sample_weight: the column of a batch with one weight for each sample, or a function of the batch.

    Raises:
        ConfigError: a model or dataset that cannot be used, or a loss.
    """

    # for a subclass with a constructor of its own
    _loss = TokenLoss()
    _samples = SampleWeights(None)
    _isolates = False

    def __init__(
        self,
        model: Any,
        data: Any,
        loss: Any = None,
        eval_fraction: float = 0.0,
        output: Any = None,
        mean: str = "token",
        class_weights: ClassWeights | None = None,
        label_smoothing: float = 0.0,
        sample_weight: str | int | Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self._output = output
        self._loss = TokenLoss(mean, class_weights, label_smoothing)
        self._samples = SampleWeights(sample_weight)
        if loss is not None:
            raise ConfigError(
                "task=language_model computes its own cross-entropy, but a loss is given. Set loss=null, or "
                "use task=supervised."
            )
        self._factory = check_factory(model)
        self.train_data, self.eval_data = find_splits(data, eval_fraction)
        self.data = data
        self._collate = getattr(data, "collate", None)
        self._collates_deterministically = self._collate is None or declares(
            data, "deterministic_collate", "collate"
        )
        self.variable_length = declared_length(data)
        self._isolates = getattr(data, "packed", "joined") == "isolated"

    def build_model(self) -> nn.Module:
        model = make_model(self._factory)
        if self._isolates and "documents" not in inspect.signature(model.forward).parameters:
            raise ConfigError(
                f"data.packed=isolated, but {type(model).__name__}.forward takes no documents, so it would "
                f"attend across them. Use data.packed=joined, or a model with forward(tokens, documents) such as "
                "gatrain.models.gpt.GPT."
            )
        known = getattr(getattr(model, "config", None), "vocab_size", None)  # as transformers' models have it
        given, needed = getattr(model, "vocab_size", known), getattr(self.data, "vocab_size", None)
        if isinstance(given, int) and isinstance(needed, int) and given < needed:
            raise ConfigError(
                f"model.vocab_size={given} is smaller than data.vocab_size={needed}. "
                f"Use model.vocab_size={-(-needed // 64) * 64} (a multiple of 64 is fastest)."
            )
        given, needed = getattr(model, "context", None), getattr(self.data, "context", None)
        if isinstance(given, int) and isinstance(needed, int) and given < needed:
            raise ConfigError(
                f"model.context={given} is smaller than data.context={needed}. "
                f"Use model.context={needed}, or data.context={given}."
            )
        return model

    def collate(self, samples: list[Any]) -> Batch:
        return self._collate(samples) if self._collate is not None else super().collate(samples)

    @property
    def collates_deterministically(self) -> bool:
        own = type(self).collate is LanguageModel.collate
        return self._collates_deterministically if own else super().collates_deterministically

    @property
    def collates_by_default(self) -> bool:
        return self._collate is None and type(self).collate is LanguageModel.collate

    def count_samples(self, batch: Batch) -> int | None:
        return len(split(batch)[0])

    def weight(self, batch: Batch) -> float:
        """What the mean divides by, on the host: label tokens, sequences, or their summed weights."""
        labels = split(batch)[1]
        return self._loss.weight(labels, self._samples.of(batch, len(labels))).item()

    def loss_sum(self, model: nn.Module, batch: Batch) -> LossSum:
        return self._summed(model, batch, summed_cross_entropy)

    def _summed(self, model: nn.Module, batch: Batch, cross_entropy: Callable[..., Tensor]) -> LossSum:
        tokens, labels = split(batch)
        samples = self._samples.of(batch, len(labels))
        logits = self._logits(model, tokens, batch["documents"] if self._isolates else None)
        return self._loss.sum(logits, labels, samples, cross_entropy), self._loss.weight(labels, samples)

    def _logits(self, model: nn.Module, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        outputs = model(tokens) if documents is None else model(tokens, documents=documents)
        logits = scores_of(outputs, self._output, "language_model")
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            raise ConfigError(
                f"the model gives {list(logits.shape)} for tokens {list(tokens.shape)}, but "
                "task=language_model needs logits [batch, length, vocabulary]: one prediction for each position."
            )
        return logits

    def partly_compiled_loss_sum(
        self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> Callable[..., LossSums]:
        if type(self).loss_sum is not LanguageModel.loss_sum:  # a subclass with a loss of its own
            return super().partly_compiled_loss_sum(compiled)
        cross_entropy = compiled(summed_cross_entropy)  # else softmax and its gradient are kept in fp32
        return lambda model, batch: self._summed(model, batch, cross_entropy)

    def tokens(self, batch: Batch) -> int:
        """Positions that the model computes, padding included."""
        return int(split(batch)[0].numel())

    def worst_case_indices(self, count: int) -> Sequence[int]:
        """The longest samples, where they differ; one of them makes the whole micro-batch as long."""
        lengths = getattr(self.train_data, "lengths", None)
        if lengths is None:
            return super().worst_case_indices(count)
        longest = np.argsort(-np.asarray(lengths), kind="stable")[:count]
        return [int(longest[index % len(longest)]) for index in range(count)]

    def baseline(self) -> tuple[str, float] | None:
        unigram_loss = getattr(self.data, "unigram_loss", None)
        if unigram_loss is None or self.eval_data is None:
            return None
        return "unigram", float(unigram_loss())

    def showcase(self, model: nn.Module, device: torch.device) -> str | None:
        """About 200 tokens that the model writes, starting from nothing; None without a tokenizer, and where
        documents are isolated: no first token was ever predicted."""
        tokenizer = getattr(self.data, "tokenizer", None)
        context = getattr(self.data, "context", None)
        if tokenizer is None or not isinstance(context, int) or self._isolates:
            return None
        ids = generate(model, device, tokenizer.end_of_text, tokenizer.size, context, output=self._output)
        return str(tokenizer.decode(ids))

    def shortened(self, batch: Batch) -> Batch:
        """At most the first 128 positions. Where that leaves padded batches without a label, the last 128."""
        if isinstance(batch, Tensor):
            return batch[:, : SHORT + 1]
        labels = split(batch)[1]
        has_labels = bool((labels[:, :SHORT] != IGNORED).any())
        kept = slice(SHORT) if has_labels else slice(-SHORT, None)
        names = ("tokens", "labels", *(["documents"] if self._isolates else []))
        return {**batch, **{name: batch[name][:, kept] for name in names}}


def split(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs and aligned labels, int64 ``[B, L]`` each, of either form of batch.

    Raises:
        ConfigError: it has another form.
    """
    if isinstance(batch, Tensor) and batch.dim() == 2:
        return batch[:, :-1], batch[:, 1:]
    if isinstance(batch, Mapping) and "tokens" in batch and "labels" in batch:
        return batch["tokens"], batch["labels"]
    remedy = "Let the dataset return token tensors"
    if "input_ids" in (fields_of(batch) or {}):
        remedy = "Use task=huggingface, which knows whether such labels are shifted"
    raise ConfigError(
        f"a batch is {shown(batch)}, but task=language_model needs a tensor [batch, length + 1] of tokens, or a "
        f"dict of tokens and labels. {remedy}, or write a task: class MyTask(gatrain.tasks.Task)."
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    device: torch.device,
    end_of_text: int,
    vocab_size: int,
    context: int,
    count: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    output: Any = None,
) -> list[int]:
    """Sample ``count`` tokens of one document from the model, always the same ones for the same weights.

    The input is padded to a multiple of 64 positions, which causal attention does not see: a compiled model
    then meets few shapes.

    Returns:
        token ids without the end-of-text token that starts the document.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that devices draw alike
    ids = [end_of_text]
    try:
        for _ in range(count):
            window = ids[-context:]
            padded = torch.zeros(1, min(context, -(-len(window) // 64) * 64), dtype=torch.int64)
            padded[0, : len(window)] = torch.tensor(window)
            logits = (
                scores_of(model(padded.to(device)), output, "language_model")[0, len(window) - 1, :vocab_size]
                .float()
                .cpu()
            )
            logits[end_of_text] = -torch.inf
            best, candidates = logits.topk(min(top_k, vocab_size - 1))
            choice = torch.multinomial(torch.softmax(best / temperature, dim=0), 1, generator=generator)
            ids.append(int(candidates[choice]))
    finally:
        model.train(was_training)
    return ids[1:]
