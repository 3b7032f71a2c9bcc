"""Models and batches of Hugging Face transformers, trained on the exact sums that their own losses are means of.

A batch is a mapping as their tokenizers and collators give it: the model is called with its entries by name,
without the labels, and its logits are compared with the labels here. What the labels mean follows from the head:

    causal_lm                labels[t] is the token AT position t, predicted at t - 1; without labels, the inputs
    masked_lm, seq2seq_lm    labels[t] is predicted at t; -100 counts nowhere
    token_classification     the same, with classes
    sequence_classification  one label a sample; images, audio and video too: classes, or numbers (num_labels=1), or
                             several yes-or-no labels, as ``problem_type`` and the labels say
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gatrain.construction import build_without_memory_or_really
from gatrain.errors import ConfigError, nearest
from gatrain.labels import IGNORED
from gatrain.tasks.base import Batch, LossSum, Task, declares
from gatrain.tasks.forms import shown
from gatrain.tasks.parts import check_factory, declared_length, find_splits, make_model
from gatrain.tasks.sample_weights import SampleWeights
from gatrain.tasks.token_loss import ClassWeights, TokenLoss, summed_cross_entropy

CAUSAL, MASKED, SEQ2SEQ = "causal_lm", "masked_lm", "seq2seq_lm"
TOKENS, SAMPLES = "token_classification", "sequence_classification"
KINDS = (CAUSAL, MASKED, SEQ2SEQ, TOKENS, SAMPLES)
LOSS_WEIGHTS = ("samples", "labels", "shifted_labels")

_ENDINGS = {
    "ForCausalLM": CAUSAL,
    "ForMaskedLM": MASKED,
    "ForTokenClassification": TOKENS,
    "ForSequenceClassification": SAMPLES,
    "ForImageClassification": SAMPLES,
    "ForAudioClassification": SAMPLES,
    "ForVideoClassification": SAMPLES,
}
_OLDER_CAUSAL = {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel", "BertLMHeadModel"}
_OWN_LOSS = {"ProphetNetForConditionalGeneration", "ProphetNetForCausalLM", "XLNetLMHeadModel"}
_LABELS = ("labels", "label", "label_ids")
_NOT_FOR_THE_MODEL = {*_LABELS, "special_tokens_mask", "num_items_in_batch"}
_FOR_ATTENTION = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Taken through ``**kwargs`` by transformers."""
_PADDING = {"labels": IGNORED, "special_tokens_mask": 1}
"""What lengthens a sample, where it is not 0; ``input_ids`` take the model's own padding token."""

CrossEntropy = Callable[..., Tensor]
"""`summed_cross_entropy`, perhaps compiled."""


@dataclass(frozen=True)
class Head:
    """What a model's class and configuration say of its loss."""

    model: str
    kind: str
    problem: str | None
    """``problem_type`` of a classification; None lets the labels say it."""
    accepts: frozenset[str]
    padding: int


class HuggingFace(Task):
    """A model of transformers (or a PEFT model around one) and batches as tokenizers and collators give them.

    Args:
        model: function without arguments that makes the model.
        data: a data source (``train``, perhaps ``eval`` and ``collate``), or a map-style dataset of mappings such
            as ``input_ids``, ``attention_mask``, ``labels``. Without ``collate``, samples of different lengths
            are padded at their ends.
        loss: must be None: the loss follows from the model's head.
        kind: one of `KINDS`, where the model's class does not tell.
        loss_weight: takes the model's own ``loss`` instead of its logits, as a mean over ``samples``, over the
            ``labels`` that are not -100, or over ``shifted_labels``, all but each sample's first.
        drop: entries of a batch that are not for the model.
        eval_fraction: of a plain dataset, the share at its end that is held out.
        mean: over the ``token`` labels of all samples, or over the samples (``sequence``) of the means over
            their own labels; for heads with a label at each position.
        class_weights: of the labels: a list of all, or a mapping of some.
        label_smoothing: share of each label that is spread over all classes.
        sample_weight: the column of a batch with one weight for each sample, or a function of the batch.

    Raises:
        ConfigError: a model, dataset or head that cannot be used; the message says what to do.
        DataError: nothing to train on.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        loss: Any = None,
        kind: str | None = None,
        loss_weight: str | None = None,
        drop: Sequence[str] = (),
        eval_fraction: float = 0.0,
        mean: str = "token",
        class_weights: ClassWeights | None = None,
        label_smoothing: float = 0.0,
        sample_weight: str | int | Callable[[Batch], Tensor] | None = None,
    ) -> None:
        if loss is not None:
            raise ConfigError(
                "task=huggingface computes the loss of the model's head, but a loss is given. Set loss=null, or "
                "use task=supervised."
            )
        for name, value, allowed in (("kind", kind, KINDS), ("loss_weight", loss_weight, LOSS_WEIGHTS)):
            if value is not None and value not in allowed:
                raise ConfigError(
                    f"task.{name}={value} is not one of {', '.join(allowed)}.{nearest(value, allowed)}"
                )
        self._over_labels = TokenLoss(mean, class_weights, label_smoothing)
        self._samples = SampleWeights(sample_weight)
        if loss_weight is not None and not (self._over_labels.is_plain and not self._samples.are_given):
            raise ConfigError(
                f"task.loss_weight={loss_weight} takes the model's own loss as it is, so task.mean, "
                f"class_weights, label_smoothing and sample_weight do not apply. Leave loss_weight out: "
                f"gatrain computes the loss."
            )
        self._factory = check_factory(model)
        self.train_data, self.eval_data = find_splits(data, eval_fraction)
        self._collate = getattr(data, "collate", None)
        self._declared = self._collate is None or declares(data, "deterministic_collate", "collate")
        self._kind, self._loss_weight, self._drop = kind, loss_weight, frozenset(drop)
        self._known: Head | None = None
        self.variable_length = declared_length(data)

    def build_model(self) -> nn.Module:
        model = make_model(self._factory)
        self._known = self._head_of(model)
        return model

    def collate(self, samples: list[Any]) -> Batch:
        return self._collate(samples) if self._collate is not None else self._padded(samples)

    @property
    def collates_deterministically(self) -> bool:
        own = type(self).collate is HuggingFace.collate
        return self._declared if own else super().collates_deterministically

    def count_samples(self, batch: Batch) -> int | None:
        tensors = [each for each in _entries(batch).values() if isinstance(each, Tensor) and each.dim()]
        return int(tensors[0].shape[0]) if tensors else None

    def weight(self, batch: Batch) -> float:
        """Labels that count, on the host; samples, numbers or summed weights for other means."""
        count = self._count(batch)
        return count.item() if isinstance(count, Tensor) else count

    def loss_sum(self, model: nn.Module, batch: Batch) -> LossSum:
        return self._loss(model, batch, summed_cross_entropy)

    def partly_compiled_loss_sum(
        self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> Callable[[nn.Module, Batch], LossSum]:
        cross_entropy = compiled(summed_cross_entropy)  # else softmax and its gradient are kept in fp32
        return lambda model, batch: self._loss(model, batch, cross_entropy)

    def tokens(self, batch: Batch) -> int | None:
        ids = _entries(batch).get("input_ids")
        return int(ids.numel()) if isinstance(ids, Tensor) else None

    def worst_case_indices(self, count: int) -> Sequence[int]:
        lengths = getattr(self.train_data, "lengths", None)
        if lengths is None:
            return super().worst_case_indices(count)
        longest = np.argsort(-np.asarray(lengths), kind="stable")[:count]
        return [int(longest[index % len(longest)]) for index in range(count)]

    def eval_metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, LossSum]:
        """``accuracy`` of classifications."""
        head = self._head
        if self._loss_weight is not None or head.kind not in (TOKENS, SAMPLES):
            return {}
        labels = self._labels(batch)
        if head.kind == SAMPLES and _problem(head, labels) != "single_label_classification":
            return {}
        counted = labels != IGNORED
        correct = self._logits(model, batch).argmax(dim=-1).view_as(labels) == labels
        return {"accuracy": ((correct & counted).sum(), counted.sum())}

    # --- the loss -----------------------------------------------------------------------------------------

    def _loss(self, model: nn.Module, batch: Batch, cross_entropy: CrossEntropy) -> LossSum:
        count = self._count(batch)
        if self._loss_weight is not None:
            return self._own_loss(model, batch) * count, count
        head, labels, logits = self._head, self._labels(batch), self._logits(model, batch)
        if head.kind == SAMPLES:
            if not self._is_changed:
                return _classification_sum(head, logits, labels), count
            rows = self._one_label_each(labels)
            if logits.dim() != 2 or len(logits) != len(rows):
                raise _unfit(head, logits, labels)
            return self._over_labels.sum(
                logits[:, None], rows, self._weights(batch, rows), cross_entropy
            ), count
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise ConfigError(
                f"{head.model} gives {list(logits.shape)}, but the labels are {list(labels.shape)}: as "
                f"{head.kind}, there must be one label for each position. Name another task.kind, or write a "
                "task of your own."
            )
        if head.kind == CAUSAL:
            # moved by padding: the logits, which are large, stay in one piece
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        return self._over_labels.sum(logits, labels, self._weights(batch, labels), cross_entropy), count

    @property
    def _is_changed(self) -> bool:
        """Whether another mean than that of the model's own loss is trained."""
        return not self._over_labels.is_plain or self._samples.are_given

    def _weights(self, batch: Batch, labels: Tensor) -> Tensor | None:
        return self._samples.of(batch, len(labels))

    def _one_label_each(self, labels: Tensor) -> Tensor:
        """The classes of samples as rows of one label, int64 ``[B, 1]``.

        Raises:
            ConfigError: the labels are no classes, or sequences are asked for.
        """
        problem = _problem(self._head, labels)
        if problem != "single_label_classification" or self._over_labels.by_sequence:
            setting = (
                "task.mean=sequence"
                if self._over_labels.by_sequence
                else ("task.class_weights, label_smoothing or sample_weight")
            )
            raise ConfigError(
                f"{setting} does not apply to {self._head.model}, which has one label for a whole sample"
                f"{'' if problem == 'single_label_classification' else f' ({problem})'}. Leave it out, or "
                f"write a task of your own: class MyTask(gatrain.tasks.Task)."
            )
        return labels.reshape(-1, 1)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        head, entries = self._head, _entries(batch)
        inputs = {
            n: each
            for n, each in entries.items()
            if n not in _NOT_FOR_THE_MODEL and n not in self._drop and n != self._samples.column
        }
        if "token_type_ids" not in head.accepts:
            inputs.pop("token_type_ids", None)  # tokenizers give them to every model
        unknown = sorted(set(inputs) - head.accepts - _FOR_ATTENTION)
        if unknown:
            raise ConfigError(
                f"a batch has {unknown[0]!r}, which {head.model}.forward does not name."
                f"{nearest(unknown[0], head.accepts)} Leave it out in collate, or set '+task.drop=[{unknown[0]}]'."
            )
        if head.kind == SEQ2SEQ and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
            shift = getattr(_unwrapped(model), "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise ConfigError(
                    f"{head.model} does not say how labels become decoder_input_ids. Let collate give them."
                )
            inputs["decoder_input_ids"] = shift(labels=self._labels(batch))
        if "use_cache" in head.accepts:
            inputs["use_cache"] = False  # keys and values of the past serve generation alone
        outputs = model(**inputs)
        if getattr(outputs, "aux_loss", None) is not None:
            raise ConfigError(_ROUTER.format(model=head.model))
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{head.model} returns {shown(outputs)}, but task=huggingface needs its logits. Leave return_dict "
                "at true, or write a task of your own: class MyTask(gatrain.tasks.Task)."
            )
        return logits

    def _own_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(**{name: each for name, each in _entries(batch).items() if name not in self._drop})
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor) or loss.dim():
            raise ConfigError(
                f"task.loss_weight={self._loss_weight} takes the model's own loss, but it returns {shown(outputs)} "
                "without a loss that is one number. Let the batch hold its labels."
            )
        return loss.float() if loss.dtype in (torch.bfloat16, torch.float16) else loss

    def _count(self, batch: Batch) -> Tensor | int:
        if self._loss_weight == "samples":
            return self.count_samples(batch) or 0
        labels = self._labels(batch)
        if self._loss_weight == "shifted_labels" or (self._loss_weight is None and self._head.kind == CAUSAL):
            return self._over_labels.weight(labels[:, 1:], self._weights(batch, labels))
        if self._loss_weight is None and self._head.kind == SAMPLES:
            if self._is_changed:
                rows = self._one_label_each(labels)
                return self._over_labels.weight(rows, self._weights(batch, rows))
            is_classes = _problem(self._head, labels) == "single_label_classification"
            return (labels != IGNORED).sum() if is_classes else labels.numel()
        return self._over_labels.weight(labels, self._weights(batch, labels))

    def _labels(self, batch: Batch) -> Tensor:
        entries = _entries(batch)
        for name in _LABELS:
            labels = entries.get(name)
            if isinstance(labels, Tensor):
                return labels if labels.is_floating_point() else labels.long()
        ids = entries.get("input_ids")
        if self._loss_weight is None and self._head.kind == CAUSAL and isinstance(ids, Tensor):
            mask = entries.get("attention_mask")
            return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
        raise ConfigError(
            f"a batch is {shown(batch)}, without labels. Let the samples have labels, -100 where nothing is to be "
            "learnt."
        )

    # --- the head -----------------------------------------------------------------------------------------

    @property
    def _head(self) -> Head:
        """Known once the model was made; asked earlier, a model is made for a look, without memory if possible."""
        if self._known is None:
            states = random.getstate(), np.random.get_state(), torch.get_rng_state()
            try:
                self._known = self._head_of(build_without_memory_or_really(self._factory, self._factory))
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
                torch.set_rng_state(states[2])
        return self._known

    def _head_of(self, model: nn.Module) -> Head:
        inner = _unwrapped(model)
        config = getattr(inner, "config", None)
        if getattr(config, "output_router_logits", False):
            raise ConfigError(_ROUTER.format(model=type(inner).__name__))
        kind = self._kind or (SAMPLES if self._loss_weight is not None else _kind_of(inner))
        problem = getattr(config, "problem_type", None)
        if problem is None and getattr(config, "num_labels", None) == 1:
            problem = "regression"
        padding = getattr(config, "pad_token_id", None)
        return Head(
            model=type(inner).__name__,
            kind=kind,
            problem=problem,
            accepts=frozenset(inspect.signature(inner.forward).parameters) - {"self", "args", "kwargs"},
            padding=padding if isinstance(padding, int) and padding >= 0 else 0,
        )

    def _padded(self, samples: list[Any]) -> dict[str, Tensor]:
        """One batch of mappings: rows of different lengths are made as long as the longest, at their ends."""
        if not all(isinstance(sample, Mapping) for sample in samples):
            raise ConfigError(
                f"a sample is {shown(samples[0])}, but task=huggingface needs mappings such as input_ids and "
                "labels. For tensors of tokens use task=language_model; for (inputs, targets) task=supervised."
            )
        batch: dict[str, Tensor] = {}
        names = [name for name in samples[0] if name not in self._drop]
        if "input_ids" in names and "attention_mask" not in names:
            samples = [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
            names.append("attention_mask")
        for name in names:
            rows = [torch.as_tensor(sample[name]) for sample in samples]
            key = "labels" if name in _LABELS else name
            if len({row.shape for row in rows}) > 1:
                if rows[0].dim() != 1:
                    raise ConfigError(
                        f"samples differ in the shape of {name!r}, as {list(rows[0].shape)}. Give the data a "
                        "collate(samples) that makes them alike."
                    )
                longest = max(len(row) for row in rows)
                fill = self._head.padding if name == "input_ids" else _PADDING.get(key, 0)
                rows = [F.pad(row, (0, longest - len(row)), value=fill) for row in rows]
            batch[key] = torch.stack(rows)
        return batch


_ROUTER = (
    "{model} adds a loss over its routers, which compares the tokens of a micro-batch with one another: it has no "
    "exact sum. Set output_router_logits=false in the model's configuration."
)


def _kind_of(model: nn.Module) -> str:
    """What the labels mean to the model, by the class that its forward comes from.

    Raises:
        ConfigError: the class does not tell.
    """
    for cls in type(model).__mro__:
        name = cls.__name__
        if name in _OWN_LOSS:
            break
        if name in _OLDER_CAUSAL:
            return CAUSAL
        for ending, kind in _ENDINGS.items():
            if name.endswith(ending):
                return kind
        if name.endswith("ForConditionalGeneration"):
            if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                return SEQ2SEQ
            break
        if "forward" in cls.__dict__:
            break  # it may compute another loss than the classes that it builds on
    raise ConfigError(
        f"the class {type(model).__name__} does not tell what its labels mean. Set +task.kind to one of "
        f"{', '.join(KINDS)} ({CAUSAL}: labels are the inputs, shifted here; the others: labels where they "
        "are predicted), or take the model's own loss with +task.loss_weight=samples, labels or shifted_labels, "
        "whatever it is a mean over."
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, torch.compile and PEFT."""
    inner = model._modules.get(
        "_orig_mod", model.module if isinstance(model, DistributedDataParallel) else None
    )
    if isinstance(inner, nn.Module):
        return _unwrapped(inner)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _entries(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    raise ConfigError(
        f"a batch is {shown(batch)}, but task=huggingface needs a mapping such as input_ids and labels. For "
        "tensors of tokens use task=language_model; for (inputs, targets) task=supervised."
    )


def _problem(head: Head, labels: Tensor) -> str:
    """As transformers decides it: one number, classes, or several yes-or-no labels."""
    if head.problem is not None:
        return head.problem
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _classification_sum(head: Head, logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    problem = _problem(head, labels)
    if problem == "single_label_classification":
        if logits.dim() == 2 and labels.numel() == len(logits) and not labels.is_floating_point():
            return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    elif problem == "regression" and (len(logits), logits.numel()) == (len(labels), labels.numel()):
        return F.mse_loss(wide.view_as(labels), labels.to(wide.dtype), reduction="sum")
    elif problem == "multi_label_classification" and logits.shape == labels.shape:
        return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")
    raise _unfit(head, logits, labels)


def _unfit(head: Head, logits: Tensor, labels: Tensor) -> ConfigError:
    return ConfigError(
        f"{head.model} gives {list(logits.shape)} and the labels are {list(labels.shape)} of {labels.dtype}, "
        f"which do not fit for {_problem(head, labels)}. Set num_labels or problem_type in the model's "
        f"configuration, or mend the labels."
    )
