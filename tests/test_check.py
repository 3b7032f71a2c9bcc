"""The check of the loss before the first step: what is wrong is refused, what is right is left alone.

Planted faults: each is one thing that people get wrong in a Task, a loss, a collate function or a dataset. What the
check cannot see is listed in `UNSEEN`, with the reason.
"""

from __future__ import annotations

import copy
import random
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import project, run
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.utils.checkpoint import checkpoint

from gatrain.config import SGDConfig
from gatrain.errors import ExactnessError
from gatrain.plan import StepSettings
from gatrain.tasks import Supervised, Task
from gatrain.train.check import check_loss
from gatrain.train.check.computing import Precisions
from gatrain.train.engine import Engine
from gatrain.train.frozen import _Constants
from gatrain.train.ranks import Ranks

CLASSES, WIDTH, IGNORED = 5, 6, -100


class Points(torch.utils.data.Dataset):
    """Feature vectors with a class each; some classes are ignored, and each sample weighs something."""

    deterministic = True

    def __init__(self, count: int = 24) -> None:
        made = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, WIDTH, generator=made)
        self.y = torch.randint(0, CLASSES, (count,), generator=made)
        self.weight = torch.rand(count, generator=made) + 0.5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "weight": self.weight[index]}


class Texts(torch.utils.data.Dataset):
    """Token sequences of unlike length; the labels of a prompt are ignored."""

    deterministic = True

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        made = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, 13, (5 + 3 * index % 11,), generator=made)
        labels = tokens.clone()
        labels[: 1 + index % 3] = IGNORED
        return {"tokens": tokens, "labels": labels}


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "tokens": pad([s["tokens"] for s in samples], batch_first=True),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=IGNORED),
    }


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES))


class Reader(nn.Module):
    """A language model without any mixing of positions, so that padding does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.drop = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(tokens)))


class Frequent(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, scale_grad_by_freq=True)


class SparseReader(Reader):
    """Its embedding's sparse gradient goes through a hook that clamps its values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, sparse=True)
        self.embed.weight.register_hook(
            lambda g: torch.sparse_coo_tensor(
                g.coalesce().indices(), g.coalesce().values().clamp(-0.01, 0.01), g.shape
            )
        )


class Averaging(Reader):
    """Reads the mean of all positions, padding included."""

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.embed(tokens)
        return self.head(seen + seen.mean(1, keepdim=True))


class OwnTask(Task):
    """A Task made of functions, to plant one fault at a time."""

    def __init__(
        self,
        loss_sum: Callable[[nn.Module, Any], Any],
        weight: Callable[[Any], Any] = lambda batch: len(batch["y"]),
        *,
        data: Any = None,
        model: Callable[[], nn.Module] = net,
        collate: Callable[[list[Any]], Any] | None = None,
        terms: tuple[str, ...] = ("loss",),
    ) -> None:
        self._loss_sum, self._weight, self._model, self._collate = loss_sum, weight, model, collate
        self.train_data = Points() if data is None else data
        self.loss_terms = terms

    def build_model(self) -> nn.Module:
        return self._model()

    def weight(self, batch: Any) -> Any:
        return self._weight(batch)

    def loss_sum(self, model: nn.Module, batch: Any) -> Any:
        return self._loss_sum(model, batch)

    def collate(self, samples: list[Any]) -> Any:
        return self._collate(samples) if self._collate else super().collate(samples)


def of_texts(loss_sum: Any, weight: Any, model: Any = Reader, collate: Any = padded) -> OwnTask:
    return OwnTask(loss_sum, weight, data=Texts(), model=model, collate=collate)


def check(
    task: Task, *, precision: str = "fp32", mode: str = "error", micro_batch: int = 8, samples: int = 16
) -> list[str]:
    torch.manual_seed(0)
    settings = StepSettings(precision=precision, checkpointing="none", compile=False, sync="window")
    engine = Engine(
        task, task.build_model().train(), settings, SGDConfig(), Ranks.current(), torch.device("cpu")
    )
    ids = range(min(samples, len(task.train_data)))[::-1]
    return check_loss(engine, ids, seed=1, mode=mode, micro_batch=micro_batch)


# --- what is right --------------------------------------------------------------------------------------


def losses(model: nn.Module, batch: Any, **options: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none", **options)


def label_count(batch: Any) -> float:
    return float((batch["labels"][:, 1:] != IGNORED).sum())


def shifted_losses(model: nn.Module, batch: Any, reduction: str = "none") -> Tensor:
    logits = model(batch["tokens"][:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, batch["labels"][:, 1:], ignore_index=IGNORED, reduction=reduction)


class Casting(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.head, self.dtype = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES), dtype

    def forward(self, x: Tensor) -> Tensor:
        narrow = [each.to(self.dtype) for each in (x, self.body.weight, self.body.bias)]
        return self.head(F.linear(*narrow).to(x.dtype).tanh())


def on_policy(model: nn.Module, batch: Any) -> Any:
    """Of each sample, four answers with advantages that add up to 0, as in GRPO."""
    chosen = model(batch["x"]).log_softmax(-1)[:, :4]
    ratio = (chosen - chosen.detach()).exp()
    advantages = torch.tensor([1.3, -0.2, -0.4, -0.7], dtype=ratio.dtype)
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum(), len(batch["y"])


RIGHT: dict[str, Callable[[], Task]] = {
    "a data set that gives what it keeps": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), data=InPlace(again=1.0)
    ),
    "samples that share a constant": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * b["scale"][:, 0]).sum(), len(b["y"])), data=OneBuffer(copies=True)
    ),
    "a sum over samples": lambda: OwnTask(lambda m, b: (losses(m, b).sum(), len(b["y"]))),
    "advantages of a group, which cancel at the first step": lambda: OwnTask(on_policy),
    "a layer that casts to bf16 by itself": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=lambda: Casting(torch.bfloat16)
    ),
    "a layer that casts to fp16 by itself": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=lambda: Casting(torch.float16)
    ),
    "weighted samples": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * b["weight"]).sum(), b["weight"].double().sum()),
        lambda b: float(b["weight"].double().sum()),
    ),
    "a sum over tokens": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()), label_count
    ),
    "a mean over each sequence": lambda: of_texts(
        lambda m, b: (
            (shifted_losses(m, b).sum(1) / (b["labels"][:, 1:] != IGNORED).sum(1)).sum(),
            len(b["tokens"]),
        ),
        lambda b: len(b["tokens"]),
    ),
    "two terms": lambda: OwnTask(
        lambda m, b: {
            "class": (losses(m, b).sum(), len(b["y"])),
            "size": (m(b["x"]).square().mean(1)[b["y"] == 0].sum(), (b["y"] == 0).sum()),
        },
        lambda b: {"class": len(b["y"]), "size": int((b["y"] == 0).sum())},
        terms=("class", "size"),
    ),
    "a regulariser by weight": lambda: OwnTask(
        lambda m, b: (
            losses(m, b).sum() + 0.1 * len(b["y"]) * sum(p.square().sum() for p in m.parameters()),
            len(b["y"]),
        )
    ),
    "a counter that nothing reads": lambda: Counted(reads=False),
    "the smoothed loss of a class-weighted task": lambda: Supervised(
        net,
        PairsOf(Points()),
        nn.CrossEntropyLoss(weight=torch.rand(CLASSES) + 0.1, label_smoothing=0.1, ignore_index=0),
    ),
    "random data": lambda: OwnTask(lambda m, b: (losses(m, b).sum(), len(b["y"])), data=Drawing(own=False)),
    "random collate": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()),
        label_count,
        collate=lambda samples: masked(samples, torch.default_generator),
    ),
    "a critic without a lower bound": lambda: OwnTask(lambda m, b: (m(b["x"])[:, 0].sum(), len(b["y"]))),
    "a gradient that is masked, reversed or clamped place by place": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=ShapedGradient
    ),
    "places of each sample in a random order": lambda: OwnTask(
        lambda m, b: (losses(m, {**b, "x": shuffled_places(b["x"])}).sum(), len(b["y"]))
    ),
    "samples computed in a random order": lambda: OwnTask(
        lambda m, b: (losses(m, {k: v[torch.randperm(len(v))] for k, v in b.items()}).sum(), len(b["y"])),
        data=PlainPoints(),
    ),
    "random collate that draws for each sample": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), collate=jittered
    ),
    "a loss that needs its own gradient": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum() + gradient_penalty(m, b["x"]), len(b["y"]))
    ),
}


class Backward(torch.autograd.Function):
    """The identity, with a backward of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.change(gradient), None


class ShapedGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)
        self.body.weight.register_hook(lambda gradient: gradient * (torch.arange(16) % 2)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return self.head(Backward.apply(hidden, lambda gradient: -0.3 * gradient))


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A net whose parameters' gradients go through ``hook``."""

    def make() -> nn.Module:
        model = net()
        for parameter in model.parameters():
            parameter.register_hook(hook)
        return model

    return make


class OwnBackward(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.change = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES), change

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Backward.apply(self.body(x).tanh(), self.change))


def adversarial(*, clears: bool) -> Callable[[nn.Module, Any], Any]:
    """Samples moved against the model, by a backward within the loss."""

    def loss_sum(model: nn.Module, batch: Any) -> Any:
        with torch.enable_grad():
            moved = batch["x"].clone().requires_grad_()
            F.cross_entropy(model(moved), batch["y"], reduction="sum").backward()
            x = (moved + 0.1 * moved.grad.sign()).detach()
            if clears:
                model.zero_grad()
        return F.cross_entropy(model(x), batch["y"], reduction="sum"), len(batch["y"])

    return loss_sum


def halved() -> nn.Module:
    model = net()
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
    return model


class InFp32Alone(nn.Module):
    """Like a model of kernels that are written for one precision."""

    def __init__(self, hook: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = hooked(hook)()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("not implemented for 'Double'")
        return self.net(x.float())


class AddedAuxiliary(torch.autograd.Function):
    """Hands an output on and adds an auxiliary loss in the backward (as DeepSeek's mixtures of experts do)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, auxiliary: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, torch.ones(())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.body = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return AddedAuxiliary.apply(self.body(shares), shares.square().mean())


class Paired(nn.Module):
    """Mixes each sample with one that an order pairs it with."""

    def __init__(self, order: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.body, self.order = net(), order

    def forward(self, x: Tensor) -> Tensor:
        share = np.random.beta(1.0, 1.0)
        return self.body(share * x + (1 - share) * x[self.order(len(x))])


class PlainPoints(Points):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


def shuffled_places(x: Tensor) -> Tensor:
    return x[:, torch.randperm(WIDTH)] * (torch.rand(x.shape).argsort(1) < 4)


def jittered(samples: list[Any]) -> Any:
    """Noise for each sample, some of it twice as often for some."""
    return torch.utils.data.default_collate(
        [{**s, "x": s["x"] + sum(torch.rand(WIDTH) for _ in range(1 + int(s["y"])))} for s in samples]
    )


def mixed_at_random(samples: list[Any]) -> Any:
    batch = torch.utils.data.default_collate(samples)
    share, order = float(np.random.beta(1.0, 1.0)), torch.randperm(len(samples))
    return {**batch, "x": share * batch["x"] + (1 - share) * batch["x"][order]}


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().sum()


class PairsOf(torch.utils.data.Dataset):
    deterministic = True

    def __init__(self, data: Points) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data.x[index], self.data.y[index]


class Counted(OwnTask):
    """Counts its calls; the loss reads the counter or not."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__(self._counted)
        self.calls, self.reads = 0, reads

    def _counted(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        factor = min(1.0, self.calls / 1000) if self.reads else 1.0
        return losses(model, batch).sum() + factor * model(batch["x"]).square().sum(), len(batch["y"])


class Drawing(Points):
    """Adds noise to its samples, from the generators that gatrain seeds or from one of its own."""

    deterministic = False

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own = np.random.default_rng() if own else None

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = self.own.normal(size=WIDTH) if self.own is not None else np.random.normal(size=WIDTH)
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] + torch.tensor(noise, dtype=torch.float32) + random.random()}


class InPlace(Points):
    """Scales what it keeps, and gives that."""

    deterministic = False

    def __init__(self, again: float) -> None:
        super().__init__()
        self.kept = [super(InPlace, self).__getitem__(index) for index in range(len(self))]
        self.again = again

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.kept[index]
        sample["x"].mul_(self.again)
        return sample


class Sorted(Points):
    """Reads several samples at once, in the order of its file."""

    deterministic = True

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        return [self[index] for index in sorted(indices)]


class OneBuffer(Points):
    """Fills one tensor again and again; what all samples share may well be the same."""

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.buffer, self.ones = torch.zeros(WIDTH), torch.ones(WIDTH)
        self.copies = copies

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        self.buffer.copy_(sample["x"])
        return {**sample, "x": self.buffer.clone() if self.copies else self.buffer, "scale": self.ones}


def masked(samples: list[Any], generator: torch.Generator) -> dict[str, Tensor]:
    batch = padded(samples)
    hide = torch.rand(batch["tokens"].shape, generator=generator) < 0.3
    return {**batch, "tokens": batch["tokens"].masked_fill(hide, 0)}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_right_loss_is_not_refused(name: str, precision: str) -> None:
    assert check(RIGHT[name](), precision=precision) == []


# --- planted faults -------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A student and a moving average of it, moved in the forward of training."""

    def __init__(self) -> None:
        super().__init__()
        self.student = net()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
        return self.student(x), self.teacher(x)


class Queue(nn.Module):
    """Compares with the embeddings of earlier micro-batches (momentum contrast)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("queue", torch.randn(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        scores = out @ self.queue.t()
        self.queue = torch.cat([out.detach(), self.queue])[:8]
        return scores


class Remembering(OwnTask):
    """Compares with what it saw before, in a list."""

    def __init__(self) -> None:
        super().__init__(self._remembered)
        self.seen: deque[Tensor] = deque(maxlen=4)

    def _remembered(self, model: nn.Module, batch: Any) -> Any:
        out = model(batch["x"])
        past = sum((out - each).square().mean() for each in self.seen)
        self.seen.append(out.detach().mean(0))
        return losses(model, batch).sum() + past * len(out), len(out)


class Noisy(nn.Module):
    """Drops with a generator of its own, which nobody seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.own = net(), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * (torch.rand(x.shape, generator=self.own) > 0.2))


class BatchStatistics(nn.Module):
    """Normalises over the micro-batch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-3))


def contrastive(model: nn.Module, batch: Any) -> Any:
    one, other = F.normalize(model(batch["x"]), dim=1), F.normalize(model(batch["x"].flip(1)), dim=1)
    scores = one @ other.t() / 0.1
    return F.cross_entropy(scores, torch.arange(len(one)), reduction="sum"), len(one)


def first_counts_twice(samples: list[Any]) -> dict[str, Tensor]:
    batch = torch.utils.data.default_collate(samples)
    batch["weight"] = torch.ones(len(samples))
    batch["weight"][0] = 2.0
    return batch


def mixed_with_neighbour(samples: list[Any]) -> dict[str, Tensor]:
    batch = torch.utils.data.default_collate(samples)
    batch["x"] = 0.5 * batch["x"] + 0.5 * batch["x"].roll(1, 0)
    return batch


def hard_negatives(model: nn.Module, batch: Any) -> Any:
    each = losses(model, batch)
    return each.topk(max(1, len(each) // 2)).values.sum() * 2, len(each)


def boxes(samples: list[Any]) -> dict[str, Any]:
    """Detection: each image has its own number of boxes."""
    return {
        "x": torch.stack([s["x"] for s in samples]),
        "boxes": [s["x"].repeat(1 + int(s["y"]), 1) for s in samples],
    }


def box_losses(model: nn.Module, batch: Any) -> list[Tensor]:
    out = model(batch["x"])
    return [(out[i, :1] - each).square().mean(1) for i, each in enumerate(batch["boxes"])]


OWN_GENERATOR = torch.Generator()
CALLS = iter(range(10**6))


def normalised(values: Tensor) -> Tensor:
    """Not a number for a single sample."""
    distances = values - values.mean()
    return distances / (distances.square().sum() / (len(values) - 1)).sqrt()


FAULTS: dict[str, Callable[[], Task]] = {
    "targets normalised over the batch": lambda: OwnTask(
        lambda m, b: ((m(b["x"])[:, 0] - normalised(b["y"].float())).square().sum(), len(b["y"]))
    ),
    "a mean handed on as a sum": lambda: OwnTask(lambda m, b: (losses(m, b).mean(), len(b["y"]))),
    "a mean with a weight of one": lambda: OwnTask(lambda m, b: (losses(m, b).mean(), 1), lambda b: 1),
    "a sum divided by the batch size": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum() / len(b["y"]), len(b["y"]))
    ),
    "a mean over tokens counted as over samples": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b).sum() / label_count(b) * len(b["tokens"]), len(b["tokens"])),
        lambda b: len(b["tokens"]),
    ),
    "a mean over samples counted as over tokens": lambda: of_texts(
        lambda m, b: (
            (shifted_losses(m, b).sum(1) / (b["labels"][:, 1:] != IGNORED).sum(1)).mean() * label_count(b),
            label_count(b),
        ),
        label_count,
    ),
    "the wrong mask: padding is counted": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), b["labels"][:, 1:].numel()),
        lambda b: b["labels"][:, 1:].numel(),
    ),
    "a forgotten shift in the count": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()),
        lambda b: float((b["labels"] != IGNORED).sum()) + 1,
    ),
    "the wrong dimension counted": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), b["x"].shape[1]), lambda b: b["x"].shape[1]
    ),
    "sample weights are not counted": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * b["weight"]).sum(), b["weight"].sum())
    ),
    "normalised by the weights of the batch": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * b["weight"]).sum() / b["weight"].sum() * len(b["y"]), len(b["y"]))
    ),
    "class weights are not counted": lambda: Supervised(
        net, PairsOf(Points()), lambda o, t: F.cross_entropy(o, t, weight=torch.arange(1.0, CLASSES + 1))
    ),
    "ignored targets are not counted": lambda: Supervised(
        net, PairsOf(Points()), lambda o, t: F.cross_entropy(o, t, ignore_index=0)
    ),
    "smoothing with class weights": lambda: OwnTask(
        lambda m, b: (
            losses(m, b, weight=torch.arange(1.0, CLASSES + 1), label_smoothing=0.1).sum()
            / torch.arange(1.0, CLASSES + 1)[b["y"]].sum()
            * len(b["y"]),
            len(b["y"]),
        )
    ),
    "in-batch negatives": lambda: OwnTask(contrastive),
    "hard negatives of the batch": lambda: OwnTask(hard_negatives),
    "a maximum over the batch": lambda: OwnTask(lambda m, b: (losses(m, b).max() * len(b["y"]), len(b["y"]))),
    "sorting the batch (optimal transport)": lambda: OwnTask(
        lambda m, b: (
            (m(b["x"])[:, 0].sort().values - b["x"][:, 0].sort().values).square().sum(),
            len(b["y"]),
        )
    ),
    "a squared sum over the batch": lambda: OwnTask(lambda m, b: (m(b["x"]).sum().square(), len(b["y"]))),
    "the variance of the batch (VICReg)": lambda: OwnTask(
        lambda m, b: (len(b["y"]) * m(b["x"]).var(0, unbiased=False).sum() + losses(m, b).sum(), len(b["y"]))
    ),
    "normalising by the batch's maximum": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * b["weight"] / b["weight"].max()).sum(), len(b["y"]))
    ),
    "batch statistics in the model": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=BatchStatistics
    ),
    "load balancing over the batch": lambda: OwnTask(
        lambda m, b: (
            losses(m, b).sum() + len(b["y"]) * m(b["x"]).softmax(1).mean(0).square().sum(),
            len(b["y"]),
        )
    ),
    "a regulariser in every micro-batch": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum() + sum(p.square().sum() for p in m.parameters()), len(b["y"]))
    ),
    "an auxiliary mean added to the sum": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum() + m(b["x"]).square().mean(), len(b["y"]))
    ),
    "a term missing in weight": lambda: OwnTask(
        lambda m, b: {
            "loss": (losses(m, b).sum(), len(b["y"])),
            "size": (m(b["x"]).square().sum(), len(b["y"])),
        },
        lambda b: {"loss": len(b["y"])},
    ),
    "detection: boxes counted as images": lambda: OwnTask(
        lambda m, b: (
            torch.cat(box_losses(m, b)).mean() * len(b["boxes"]),
            len(b["boxes"]),
        ),
        lambda b: len(b["boxes"]),
        collate=boxes,
    ),
    "detection: images counted, boxes used": lambda: OwnTask(
        lambda m, b: (torch.cat(box_losses(m, b)).sum(), sum(map(len, b["boxes"]))),
        lambda b: len(b["boxes"]),
        collate=boxes,
    ),
    "padding that is not masked in the model": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()),
        label_count,
        Averaging,
    ),
    "padding that is not masked in the loss": lambda: of_texts(
        lambda m, b: (
            F.cross_entropy(m(b["tokens"][:, :-1]).transpose(1, 2), b["tokens"][:, 1:], reduction="sum"),
            len(b["tokens"]),
        ),
        lambda b: len(b["tokens"]),
    ),
    "collate goes by position": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * b["weight"]).sum(), len(b["y"])), collate=first_counts_twice
    ),
    "collate mixes samples at random": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), collate=mixed_at_random
    ),
    "samples mixed in the forward, by a random permutation": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=lambda: Paired(torch.randperm)
    ),
    "samples mixed in the forward, by the order of random numbers": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])),
        model=lambda: Paired(lambda n: torch.rand(n).argsort()),
    ),
    "samples mixed in the forward, drawn without replacement": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])),
        model=lambda: Paired(lambda n: torch.ones(n).multinomial(n)),
    ),
    "a loss that runs a backward of its own": lambda: OwnTask(adversarial(clears=False)),
    "a loss that clears gradients": lambda: OwnTask(adversarial(clears=True)),
    "a hook on the sum of the micro-steps so far": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=halved
    ),
    "a hook on sparse gradients": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()),
        label_count,
        SparseReader,
    ),
    "gradients that a hook clamps": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=hooked(lambda g: g.clamp(-0.01, 0.01))
    ),
    "gradients that a hook clamps in a model that computes in fp32 alone": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])),
        model=lambda: InFp32Alone(lambda g: g.clamp(-0.01, 0.01)),
    ),
    "gradients that a hook would clamp were they larger": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=hooked(lambda g: g.clamp(-5, 5))
    ),
    "a backward that normalises over the batch": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=lambda: OwnBackward(lambda g: g / g.norm())
    ),
    "gradients divided by how often the batch has a word": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()),
        label_count,
        Frequent,
    ),
    "an auxiliary loss that only the backward knows": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=Experts
    ),
    "collate mixes neighbours": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), collate=mixed_with_neighbour
    ),
    "data with a generator of its own": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), data=Drawing(own=True)
    ),
    "data that changes what it keeps": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), data=InPlace(again=1.01)
    ),
    "data that reads several samples in another order": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), data=Sorted()
    ),
    "data that hands out one buffer": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), data=OneBuffer()
    ),
    "collate with a generator of its own": lambda: of_texts(
        lambda m, b: (shifted_losses(m, b, "sum"), (b["labels"][:, 1:] != IGNORED).sum()),
        label_count,
        collate=lambda samples: masked(samples, OWN_GENERATOR),
    ),
    "collate that counts its calls": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * (1 + b["call"] % 2)).sum(), len(b["y"])),
        collate=lambda samples: {**torch.utils.data.default_collate(samples), "call": next(CALLS)},
    ),
    "a model with a generator of its own": lambda: OwnTask(
        lambda m, b: (losses(m, b).sum(), len(b["y"])), model=Noisy
    ),
    "a loss with numbers of its own": lambda: OwnTask(
        lambda m, b: ((losses(m, b) * np.random.default_rng().random()).sum(), len(b["y"]))
    ),
    "a factor that counts its own calls": lambda: Counted(reads=True),
    "a moving average in the forward": lambda: OwnTask(
        lambda m, b: ((m(b["x"])[0] - m(b["x"])[1] - 1).square().sum(), len(b["y"])), model=Teacher
    ),
    "a queue of earlier embeddings": lambda: OwnTask(
        lambda m, b: (F.cross_entropy(m(b["x"]), b["y"], reduction="sum"), len(b["y"])), model=Queue
    ),
    "a list of earlier outputs": Remembering,
    "a detached loss": lambda: OwnTask(lambda m, b: (losses(m, b).sum().detach(), len(b["y"]))),
    "a loss made of a number": lambda: OwnTask(
        lambda m, b: (torch.tensor(losses(m, b).sum().item()), len(b["y"]))
    ),
    "a vector instead of a sum": lambda: OwnTask(lambda m, b: (losses(m, b), len(b["y"]))),
}

UNSEEN: dict[str, tuple[str, Callable[[], Task]]] = {
    "an auxiliary loss counted twice for each sample": (
        "it is a sum over samples: another loss than was meant, but the same for every split",
        lambda: OwnTask(lambda m, b: (losses(m, b).sum() + 2 * m(b["x"]).square().sum(), len(b["y"]))),
    ),
    "targets that are not shifted, neither in the loss nor in the count": (
        "it is a sum over tokens: the model learns to copy, whatever the split",
        lambda: of_texts(
            lambda m, b: (
                F.cross_entropy(
                    m(b["tokens"]).transpose(1, 2), b["labels"], ignore_index=IGNORED, reduction="sum"
                ),
                (b["labels"] != IGNORED).sum(),
            ),
            lambda b: float((b["labels"] != IGNORED).sum()),
        ),
    ),
}


def test_there_are_enough_kinds_of_faults() -> None:
    assert len(FAULTS) >= 25
    assert len(FAULTS) >= 23 / 25 * (len(FAULTS) + len(UNSEEN))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_before_the_first_step(name: str) -> None:
    with pytest.raises(ExactnessError, match=r"Nothing was trained\. train\.check=warn"):
        check(FAULTS[name]())


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_check_cannot_see_is_listed(name: str) -> None:
    assert check(UNSEEN[name][1]()) == []


def test_a_regulariser_is_told_from_samples_that_are_compared() -> None:
    found = {}
    for name in ("in-batch negatives", "a regulariser in every micro-batch", "a mean handed on as a sum"):
        with pytest.raises(ExactnessError) as caught:
            check(FAULTS[name]())
        found[name] = str(caught.value)
    assert "compares or combines the samples" in found["in-batch negatives"]
    assert "added once for every micro-batch" in found["a regulariser in every micro-batch"]
    assert "returns a mean over what weight() counts" in found["a mean handed on as a sum"]


class RunningMean(nn.Module):
    """Moves a mean in each forward of training; only evaluation reads it, or nobody."""

    def __init__(self, is_read: bool) -> None:
        super().__init__()
        self.body, self.is_read = net(), is_read
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.body(x - self.mean if self.is_read and not self.training else x)


@pytest.mark.parametrize("is_read", [True, False])
def test_state_that_each_forward_moves_is_told_of_where_evaluation_reads_it(is_read: bool) -> None:
    notices = check(
        OwnTask(lambda m, b: (losses(m, b).sum(), len(b["y"])), model=lambda: RunningMean(is_read))
    )
    assert len(notices) == is_read
    assert all("evaluation reads (RunningMean.mean)" in notice for notice in notices)


def test_operators_of_higher_order_pass_through_what_watches_the_forward() -> None:
    for mode in (
        Precisions,
        _Constants,
    ):  # without it torch refuses flex_attention and checkpointed layers in them
        assert mode.supports_higher_order_operators


def test_a_backward_that_cannot_be_compared_is_told_of_and_training_may_begin() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=True))

    (notice,) = check(OwnTask(lambda m, b: (losses(m, b).sum(), len(b["y"])), model=Recomputed))
    assert "gradients could not be compared before the first step (reentrant checkpointing hides" in notice


class HandWrittenBatchNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() if self.training else x


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (HandWrittenBatchNorm, "as BatchNorm by its name"),
        (lambda: spectral_norm(nn.Linear(8, 8)), "moves its"),
    ],
)
def test_what_is_set_aside_and_depends_on_the_split_is_told(
    layer: Callable[[], nn.Module], words: str
) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 8), layer(), nn.Linear(8, CLASSES))

    (notice,) = check(OwnTask(lambda m, b: (losses(m, b).sum(), len(b["y"])), model=model))
    assert words in notice


def test_an_error_while_gradients_are_compared_is_the_users_own() -> None:
    def raises_on_whole_batches_with_a_graph(model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled() and len(batch["y"]) > 4:
            raise ValueError("planted")
        return losses(model, batch).sum(), len(batch["y"])

    with pytest.raises(ValueError, match="planted"):
        check(OwnTask(raises_on_whole_batches_with_a_graph), micro_batch=9)


def test_the_check_leaves_everything_as_it_was() -> None:
    task = Remembering()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    ).train()
    settings = StepSettings(precision="fp32", checkpointing="none", compile=False, sync="window")
    engine = Engine(task, model, settings, SGDConfig(), Ranks.current(), torch.device("cpu"))
    before = copy.deepcopy(model.state_dict())
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert check_loss(engine, range(16), mode="warn")[0].startswith(
        "Wrong result ahead: loss_sum() keeps state"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not task.seen
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]


def test_batch_norm_without_running_statistics_is_set_aside_as_any_other() -> None:
    def through_norm(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    task = OwnTask(through_norm)
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(WIDTH, 8), norm, nn.Linear(8, CLASSES)).train()
    settings = StepSettings(precision="fp32", checkpointing="none", compile=False, sync="window")
    engine = Engine(task, model, settings, SGDConfig(), Ranks.current(), torch.device("cpu"))
    assert check_loss(engine, range(16)) == []
    assert norm.running_mean is norm.running_var is None
    assert norm.training


def test_an_error_of_the_users_own_is_shown_as_it_is() -> None:
    def misspelt(model: nn.Module, batch: Any) -> Any:
        return model(batch["inputs"]).sum(), 1

    with pytest.raises(KeyError, match="inputs"):
        check(OwnTask(misspelt))


def test_a_batch_of_one_sample_need_not_work() -> None:
    def squeezing(model: nn.Module, batch: Any) -> Any:
        if len(batch["y"]) == 1:
            raise ValueError("more than one, please")
        return losses(model, batch).sum(), len(batch["y"])

    assert check(OwnTask(squeezing)) == []
    with pytest.raises(ExactnessError, match="as 2 \\+ 6"):
        check(OwnTask(lambda m, b: (squeezing(m, b)[0] / len(b["y"]), len(b["y"]))))


def test_a_model_of_one_batch_size_is_said_not_to_be_checked() -> None:
    def fixed(model: nn.Module, batch: Any) -> Any:
        return losses(model, batch).view(2).sum(), len(batch["y"])

    (notice,) = check(OwnTask(fixed), micro_batch=2)
    assert "could not be checked" in notice
    assert "a micro-batch of 2 samples, but no other number" in notice


# --- through the command line ---------------------------------------------------------------------------

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

import gatrain


def net():
    return nn.Linear(6, 5)


def points():
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=made), torch.randint(0, 5, (64,), generator=made)
    return torch.utils.data.TensorDataset(x, y)


class Slip(gatrain.Task):
    def __init__(self, model, data):
        self.build_model, self.train_data = model, data

    def build_model(self):
        raise NotImplementedError

    def weight(self, batch):
        return len(batch[1])

    def loss_sum(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]), len(batch[1])
"""
RECIPE = """
defaults: [base, override optimizer: sgd, override schedule: constant, _self_]
model: {_target_: slip.net}
data: {_target_: slip.points}
task: {_target_: slip.Slip}
batch: {effective: 16}
train: {steps: 2}
run: {dir: run}
device: cpu
"""


def gatrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(*words, cwd=folder, GATRAIN_CACHE=str(folder / "cache"))


def test_launch_autotune_and_resume_refuse_and_warn_goes_on(tmp_path: Path) -> None:
    project(tmp_path, MODULE, RECIPE, "slip")

    refused = gatrain(tmp_path, "launch", "--nproc", "2", "recipe=slip", "batch.micro=4", "run.dir=warned")
    assert refused.returncode == 9, refused.stderr
    assert "returns a mean over what weight() counts, not a sum" in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    assert not list(tmp_path.glob("warned/saved/*"))

    untuned = gatrain(tmp_path, "autotune", "recipe=slip")
    assert untuned.returncode == 9, untuned.stderr
    assert "accumulation step" not in untuned.stdout

    # the folder of what was refused before its first step is free again
    warned = gatrain(tmp_path, "fit", "recipe=slip", "batch.micro=4", "train.check=warn", "run.dir=warned")
    assert warned.returncode == 0, warned.stderr
    assert "Wrong result ahead" in warned.stdout + warned.stderr
    saved = sorted(path.name for path in tmp_path.glob("warned/saved/*"))
    assert saved

    resumed = gatrain(tmp_path, "resume", "warned", "train.steps=4", "train.check=error")
    assert resumed.returncode == 9, resumed.stderr
    assert sorted(path.name for path in tmp_path.glob("warned/saved/*")) == saved


def test_a_loss_that_writes_into_its_batch_is_not_mistaken_for_one_that_remembers() -> None:
    def loss_sum(model: nn.Module, batch: Any) -> Any:
        batch["x"].mul_(0.5)
        return losses(model, batch).sum(), len(batch["y"])

    assert check(OwnTask(loss_sum)) == []
