"""`gradient=cached`: the exact gradient of a loss of all samples of a window, in two passes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from test_exact_gradient import gradient, relative_error
from test_runs import gatrain, metrics
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gatrain.config import RunConfig, SGDConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.plan import StepSettings
from gatrain.tasks import Supervised, WindowTask
from gatrain.train.accumulate import gradient_step
from gatrain.train.check import check_before_first_step
from gatrain.train.dropout.keyed import KeyedDropout
from gatrain.train.engine import Engine
from gatrain.train.evaluate import evaluate
from gatrain.train.gradient.cached import Cached
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.precision import LossScaler
from gatrain.train.ranks import Ranks
from gatrain.train.seeding import seed_everything
from gatrain.train.step import Step

SAMPLES = 13
SPLITS = [[[3, 1, 2], [5, 2]], [[13], []], [[], [6, 7]]]


class Views(WindowTask):
    """Two views and a class of each point: views must find each other among others, and repel other classes."""

    def __init__(self, dropout: float = 0.0, count: int = 29, mean: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(count, 1, 5, generator=generator)
        views = points + 0.3 * torch.randn(count, 2, 5, generator=generator)
        data = torch.utils.data.TensorDataset(views, torch.arange(count) % 3)
        self.train_data, self.eval_data, self.dropout, self.mean = data, data, dropout, mean

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 4))

    def weight(self, batch: list[Tensor]) -> int:
        return len(batch[0])

    def represent(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Any]:
        found = F.normalize(model(batch[0].to(model[0].weight.dtype)), dim=-1)  # [n, 2, d]
        return {"views": (found[:, 0], found[:, 1]), "classes": batch[1]}

    def window_loss(self, rows: dict[str, Any]) -> Any:
        one, other = rows["views"]
        scores = one @ other.T / 0.1  # [N, N]
        scores = scores + (rows["classes"][:, None] == rows["classes"][None]).logical_not()
        found = F.cross_entropy(scores, torch.arange(len(one)), reduction="mean" if self.mean else "sum")
        return found if self.mean else (found, float(len(one)))

    def window_metrics(self, rows: dict[str, Any]) -> dict[str, Any]:
        one, other = rows["views"]
        found = (one @ other.T).argmax(1) == torch.arange(len(one))
        return {"recall": (found.sum(), len(one))}


def cut(task: Views, sizes: list[int], first: int = 0) -> list[list[Tensor]]:
    columns = [column[first : first + sum(sizes)] for column in task.train_data.tensors]
    return (
        [list(parts) for parts in zip(*(column.split(sizes) for column in columns), strict=True)]
        if sizes
        else []
    )


def window(batches: list[list[Tensor]], seed: tuple[int, ...] | None = None) -> LoadedWindow:
    return LoadedWindow([MicroBatch(each, {"loss": float(len(each[0]))}) for each in batches], seed=seed)


def step_of(task: Any, model: nn.Module, ranks: Ranks | None = None, **options: Any) -> Step:
    return gradient_step(
        model,
        lambda batch: task.loss_sum(model, batch),
        term_names=["loss"],
        ranks=ranks or Ranks(),
        stage=lambda batch: lambda: batch,
        strategy=Cached(),
        task=task,
        **options,
    )


def one_shot(task: Views) -> tuple[Tensor, float]:
    model = task.build_model().double()
    total, count = task.loss_sum(model, cut(task, [SAMPLES])[0])
    (total / count).backward()
    return gradient(model), float(total.detach()) / count


def _gradients_on_two_ranks() -> list[tuple[Tensor, float]]:
    found = []
    for sync in ("window", "overlap"):
        for split in SPLITS:
            task, ranks = Views(mean=sync == "overlap"), Ranks.current()
            model = task.build_model().double()
            parts = cut(task, split[ranks.rank], sum(split[0]) * ranks.rank)
            result, _ = step_of(task, model, ranks, sync=sync).gradient(window(parts))
            found.append((gradient(model), result.loss()))
    return found


def test_the_gradient_is_that_of_the_whole_window_for_any_split_over_ranks() -> None:
    """Unequal and empty shares; rows nested, some of them whole numbers; the loss is counted once."""
    wanted, loss = one_shot(Views())
    for found in run_on_ranks(2, _gradients_on_two_ranks):
        assert len(found) == 2 * len(SPLITS)
        for each, mean in found:
            assert relative_error(each, wanted) < 1e-13
            assert mean == pytest.approx(loss, rel=1e-13)


@pytest.mark.parametrize("seed", [None, (1, 2, 3)])
def test_dropout_is_that_of_the_first_pass(seed: tuple[int, ...] | None) -> None:
    """The reference holds every micro-batch's graph at once, with the same masks."""
    task, sizes = Views(dropout=0.5), [4, 1, 6, 2]
    model = task.build_model().double()
    given = window(cut(task, sizes), seed)
    torch.manual_seed(7)
    step_of(task, model).gradient(given)
    found = gradient(model)
    model.zero_grad()
    torch.manual_seed(7)
    parts = []
    for k, micro in enumerate(given.micro_batches):
        if seed is not None:
            seed_everything(*given.seed_of(k))
        parts.append(task.represent(model, micro.batch))
    views = tuple(torch.cat([part["views"][n] for part in parts]) for n in range(2))
    total, count = task.window_loss(
        {"views": views, "classes": torch.cat([part["classes"] for part in parts])}
    )
    (total / count).backward()
    assert relative_error(found, gradient(model)) < 1e-13


class Sampled(Views):
    """Each view is told from five others, drawn at random."""

    def window_loss(self, rows: dict[str, Any]) -> Any:
        one, other = rows["views"]
        others = one @ other[torch.randperm(len(other))[:5]].T
        scores = torch.cat([(one * other).sum(1, keepdim=True), others], dim=1)
        return F.cross_entropy(scores, torch.zeros(len(one), dtype=torch.long), reduction="sum"), float(
            len(one)
        )


def _sampled_on_two_ranks() -> tuple[list[Tensor], str]:
    ranks, found = Ranks.current(), []
    for split in SPLITS:
        task = Sampled(dropout=0.0)
        model, first = task.build_model().double(), sum(split[0]) * ranks.rank
        made = window(cut(task, split[ranks.rank], first), (1, 2))
        for place, micro_batch in enumerate(made.micro_batches):  # as a run does: ranks draw other numbers
            made.micro_batches[place] = dataclasses.replace(micro_batch, position=first + place)  # type: ignore[index]
        step_of(task, model, ranks).gradient(made)
        found.append(gradient(model))
    try:
        step_of(task, model, ranks).gradient(window(cut(task, split[ranks.rank], first)))
    except ExactnessError as error:
        return found, str(error)
    return found, ""


def test_a_windows_loss_that_draws_at_random_evaluates_alike_for_any_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Sampled()
    make, found = task.build_model, []
    for size in (4, 7, 13):
        monkeypatch.setattr(task, "build_model", lambda size=size: (make(), torch.manual_seed(size))[0])
        found.append(
            _evaluated(size, task=task)["loss"]
        )  # a step leaves the generator where it has brought it
    assert found == [pytest.approx(found[0], rel=1e-6)] * 3


def test_a_windows_loss_that_draws_at_random_is_the_same_one_on_every_rank_and_for_any_split() -> None:
    task = Sampled()
    model = task.build_model().double()
    step_of(task, model).gradient(window(cut(task, [SAMPLES]), (1, 2)))
    for found, refused in run_on_ranks(2, _sampled_on_two_ranks):
        for each in found:
            assert relative_error(each, gradient(model)) < 1e-12
        assert "window_loss() draws random numbers" in refused


class DroppedRows(Views):
    def window_loss(self, rows: dict[str, Any]) -> Any:
        one, other = rows["views"]
        return super().window_loss({**rows, "views": (F.dropout(one, 0.5), other)})


def test_keyed_dropout_within_a_windows_loss_goes_by_the_window_whatever_the_micro_batches_are() -> None:
    """Rows of a window are a multiple of those of a micro-batch: no shape gives the wrong masks away."""
    found = []
    for sizes in ([12], [6, 6], [4, 4, 4], [5, 1, 6]):
        task = DroppedRows()
        model, random = task.build_model().double(), KeyedDropout(flattened=True)
        random.set_up(model)
        made = window(cut(task, sizes), (1, 2))
        for nth, micro_batch in enumerate(made.micro_batches):
            at = sum(sizes[:nth])
            made.micro_batches[nth] = dataclasses.replace(  # type: ignore[index]
                micro_batch, position=at, samples=sizes[nth]
            )
        step_of(task, model, random=random).gradient(made)
        found.append(gradient(model))
    assert max(relative_error(each, found[0]) for each in found) < 1e-12


def test_the_scaler_scales_the_cache_and_the_second_pass_once() -> None:
    task = Views()
    model = task.build_model().double()
    scaler = LossScaler(torch.device("cpu"))
    scaler.set_to(2.0**10)
    step_of(task, model, scaler=scaler).gradient(window(cut(task, [4, 9])))
    assert relative_error(gradient(model) / 2**10, one_shot(task)[0]) < 1e-13


def test_small_gradients_of_16_bit_rows_are_not_lost() -> None:
    """fp16 ends at 6e-8, where the share of one of many samples may well lie."""
    task = Views()
    model = task.build_model()
    autocast = lambda: torch.autocast("cpu", torch.float16)  # noqa: E731
    scaler = LossScaler(torch.device("cpu"))
    step_of(task, model, autocast=autocast, scaler=scaler).gradient(window(cut(task, [4, 9])))
    assert relative_error(gradient(model) / scaler.get_scale(), one_shot(task)[0]) < 0.02


def test_supervised_losses_that_compare_samples_are_computed_over_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(SAMPLES, 5, generator=generator).double(),
        torch.rand(SAMPLES, generator=generator).double(),
    )

    def spread(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(outputs[:, 0] - outputs.mean(), targets - targets.mean(), dim=0)

    task = Supervised(lambda: nn.Linear(5, 1).double(), data, spread)
    torch.manual_seed(0)
    model = task.build_model()
    value = spread(model(data.tensors[0]), data.tensors[1])
    value.backward()
    wanted = gradient(model)
    model.zero_grad()
    parts = zip(*(column.split([2, 7, 4]) for column in data.tensors), strict=True)
    result, _ = step_of(task, model).gradient(window([list(part) for part in parts]))
    assert relative_error(gradient(model), wanted) < 1e-12
    assert result.loss() == pytest.approx(value.item(), rel=1e-12)


def test_what_would_not_be_exact_is_refused() -> None:
    task = Views()
    with pytest.raises(ConfigError, match=r"BatchNorm \('0'\) mixes .* Add norm=group"):
        engine(task, nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)))
    engine(task, nn.Sequential(nn.BatchNorm1d(5).eval(), nn.Linear(5, 4)))
    with pytest.raises(
        ConfigError, match=r"gradient=cached needs a task with represent.*gatrain.tasks.WindowTask"
    ):
        step_of(None, task.build_model()).gradient(window(cut(task, [4])))

    def refused(kind: type[Exception], text: str, **methods: Any) -> None:
        task = Views()
        for name, method in methods.items():
            setattr(task, name, method)
        with pytest.raises(kind, match=text):
            step_of(task, task.build_model()).gradient(window(cut(task, [4, 9])))

    own = torch.Generator().manual_seed(0)
    loose = Views()
    loss = loose.window_loss
    refused(
        ExactnessError,
        "draws from a generator of its own",
        represent=lambda model, batch: (model(batch[0] * torch.rand(5, generator=own)).sum(1),),
        window_loss=lambda rows: rows[0].var(),
    )
    refused(
        ConfigError,
        "rows of different shapes for different micro-batches",
        represent=lambda model, batch: model(batch[0]).transpose(0, 2).flatten(1),
    )
    refused(ConfigError, "different numbers of rows", represent=lambda m, b: (m(b[0]), m(b[0])[:1]))
    refused(
        ExactnessError, "counted 13 .* window_loss\\(\\) used 26", window_loss=lambda r: (loss(r)[0], 26.0)
    )
    refused(ExactnessError, "loss without a graph", window_loss=lambda r: (loss(r)[0].detach(), 13.0))
    own_scale = nn.Parameter(torch.ones(()))
    refused(ExactnessError, "would not be trained", window_loss=lambda r: (loss(r)[0] * own_scale, 13.0))
    refused(
        ExactnessError,
        "rows without a graph",
        represent=lambda model, batch: tree_map(Tensor.detach, loose.represent(model, batch)),
    )


def engine(task: Any, model: nn.Module | None = None) -> Engine:
    settings = StepSettings("fp32", "none", False, "window")
    model = model or task.build_model()
    device = torch.device("cpu")
    return Engine(task, model, settings, SGDConfig(lr=0.1), Ranks(), device, strategy=Cached())


def test_a_window_that_overflows_in_fp16_is_computed_again_at_lower_scales() -> None:
    """No micro-batch by itself tells which scale fits a loss of all samples: it is halved until one does."""
    task = Views()
    task.window_loss = lambda rows: (rows["views"][0].float().sum() * 40.0, 13.0)  # type: ignore[method-assign]
    task.represent = lambda m, b: {"views": (m(b[0])[:, 0],), "classes": b[1]}  # type: ignore[method-assign]
    settings = StepSettings("fp16", "none", False, "window")
    cpu = torch.device("cpu")
    one = Engine(task, nn.Linear(5, 4), settings, SGDConfig(lr=0.1), Ranks(), cpu, strategy=Cached())
    assert one.scaler is not None
    before, scale = one.model.weight.clone(), one.scaler.get_scale()
    result, norm = one.step(window(cut(task, [4, 9])), 0)
    assert not result.skipped
    assert bool(norm.isfinite())
    assert scale / 2**12 <= one.scaler.get_scale() < scale
    assert not torch.equal(one.model.weight, before)


class Counting(nn.Linear):
    """Counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return super().forward(x)


def test_buffers_move_once() -> None:
    task = Views()
    one = engine(task, nn.Sequential(Counting()))
    one.step(window(cut(task, [4, 4, 5])), 0)
    assert float(one.model[0].forwards) == 3


def test_rows_that_depend_on_other_samples_are_found_before_the_first_step() -> None:
    from gatrain.train.windows import WindowSchedule

    def checked(task: Views) -> list[str]:
        schedule = WindowSchedule(len(task.train_data), SAMPLES, 0)
        return check_before_first_step(engine(task), RunConfig(), schedule, 0, 4)

    assert checked(Views(dropout=0.5)) == []
    task = Views()
    task.represent = lambda m, b: Views().represent(m, [b[0] - b[0].mean(0), b[1]])  # type: ignore[method-assign]
    with pytest.raises(
        ExactnessError, match=r"represent\(\) must compute each sample by itself.*window_loss"
    ):
        checked(task)


def _evaluated(micro_batch: int = 4, window_samples: int = 12, task: Views | None = None) -> dict[str, float]:
    task = task or Views()
    one = Engine(
        task,
        task.build_model(),
        StepSettings("fp32", "none", False, "window"),
        SGDConfig(lr=0.1),
        Ranks.current(),
        torch.device("cpu"),
        strategy=Cached(),
    )
    return evaluate(one, samples=None, micro_batch=micro_batch, window_samples=window_samples)


def test_evaluation_is_over_whole_windows_whatever_the_split() -> None:
    """29 held-out samples in windows of 12: two, and 5 left out. Of 100: one of all 29."""
    task = Views()
    model = task.build_model()
    with torch.no_grad():
        rows = task.represent(model, list(task.eval_data.tensors))
        halves = [
            {
                "views": tuple(view[low : low + 12] for view in rows["views"]),
                "classes": rows["classes"][low : low + 12],
            }
            for low in (0, 12)
        ]
        losses = [task.window_loss(half)[0] for half in halves]
        recalls = [task.window_metrics(half)["recall"][0] for half in halves]
        whole = float(task.window_loss(rows)[0]) / 29
    wanted = {"loss": float(sum(losses)) / 24, "recall": float(sum(recalls)) / 24}
    for found in [_evaluated(4), _evaluated(7), *run_on_ranks(2, _evaluated)]:
        assert found == pytest.approx(wanted, rel=1e-6)
    assert _evaluated(4, 100)["loss"] == pytest.approx(whole, rel=1e-6)


def test_the_contrastive_recipe_goes_on_from_where_it_was_saved_on_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    """Words of the library's docstrings and code; evaluated among as many as a step has."""
    words = ["fit", "recipe=contrastive", "batch.effective=96", "batch.micro=40", "schedule=constant"]
    words += [
        "train.epochs=null",
        "eval.every=2",
        "checkpointing=none",
        "precision=fp32",
        "model.dropout=0.0",
    ]
    gatrain(tmp_path, *words, "train.steps=4", "run.dir=whole")
    said = gatrain(tmp_path, *words, "train.steps=2", "run.dir=parts")
    assert "each of its 3 micro-batches is computed forward once more" in said
    gatrain(tmp_path, "resume", "parts", "train.steps=4", "--nproc", "2")
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [each["loss"] for each in parts] == pytest.approx([each["loss"] for each in whole], rel=1e-5)
    evaluations = [
        [json.loads(line) for line in (tmp_path / name / "evaluations.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [line["step"] for line in evaluations[0]] == [2, 4]
    for one, other in zip(*evaluations, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert evaluations[0][1]["recall_at_1"] > 10 / 96
    assert evaluations[0][1]["loss"] < math.log(96)
