"""The gradient noise scale: right on problems whose noise is known, whatever the split; saved, resumed, refused."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import gatrain, metrics
from distributed import run_on_ranks
from torch import Tensor, nn

from gatrain import build
from gatrain.compose import compose
from gatrain.errors import ConfigError, SavedStateError
from gatrain.fit import Listener, pilot
from gatrain.hooks.noise_estimate import NoiseEstimate, one_step
from gatrain.hooks.noise_scale import NoiseScale
from gatrain.launch.world import WorldRequest
from gatrain.noise_advice import batch_advice
from gatrain.train.accumulate import gradient_step
from gatrain.train.gradient import GradientStrategy
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.part_norms import window_parts
from gatrain.train.precision import LossScaler
from gatrain.train.ranks import Ranks

SIZE, SIGNAL, STEPS = 600, 30.0, 200
TRUE = SIZE / SIGNAL
"""tr(S) / |G|**2 of one row below: its gradient is the row itself, of covariance 1 in each of SIZE dimensions."""


class Tilted(nn.Module):
    """The loss of a row x is weight . x, so that its gradient is x: mean and covariance are the data's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


def rows_of(step: int, counts: list[int]) -> list[Tensor]:
    """For each sample its rows (tokens): shape [count, SIZE]."""
    generator = torch.Generator().manual_seed(step)
    mean = torch.full((SIZE,), math.sqrt(SIGNAL / SIZE))
    return [torch.randn(count, SIZE, generator=generator) + mean for count in counts]


def records(ragged: bool, sync: str, micro: list[list[int]], scaled: bool = False) -> list[dict[str, float]]:
    """What `StepMetrics` would hand to the hook, of windows cut into ``micro[rank]``; alike on every rank."""
    ranks = Ranks.current()
    model = Tilted()
    scaler = LossScaler(torch.device("cpu")) if scaled else None
    step = gradient_step(
        model,
        lambda batch: (model(batch).sum(), len(batch)),
        term_names=("loss",), ranks=ranks, sync=sync, stage=lambda batch: lambda: batch, scaler=scaler,
    )  # fmt: skip
    step.part_norms.want(step.strategy)
    samples, found = sum(map(sum, micro)), []
    for number in range(STEPS):
        counts = [1 + (7 * nth + number) % 9 for nth in range(samples)] if ragged else [1] * samples
        left = iter(rows_of(number, counts))
        parts = [[torch.cat([next(left) for _ in range(size)]) for size in sizes] for sizes in micro]
        mine = parts[ranks.rank]
        window = LoadedWindow([MicroBatch(batch, {"loss": len(batch)}) for batch in mine])
        window.counts["samples"] = sum(micro[ranks.rank])
        if scaler is not None:
            scaler.set_to(2.0 ** (3 + number % 3))
        result, _ = step.gradient(window)
        scale = scaler.get_scale() if scaler is not None else 1.0
        squared = 0.0 if result.part is None else result.squared_part(float(result.part.norm))
        whole = float(model.weight.grad.double().norm()) / scale
        given = window_parts(result.counts, result.weight_totals, ranks.sum([squared])[0])
        found.append({**given, "whole": whole})
        step.parallel.drop_gradients()
    return found


def estimated(found: list[dict[str, float]]) -> NoiseEstimate:
    estimate = NoiseEstimate(decay=0.99)
    for parts in found:
        step = one_step(parts, parts["whole"] ** 2)
        assert step is not None
        estimate.add(*step, parts["total"], parts["samples"])
    return estimate


def check_is_right(found: list[dict[str, float]]) -> None:
    now = estimated(found).now()
    assert now is not None
    per_sample = sum(p["total"] for p in found) / sum(p["samples"] for p in found)
    wanted = TRUE / per_sample
    assert now.value == pytest.approx(wanted, rel=0.05)
    assert now.low < wanted < now.high
    assert now.high - now.low < 0.25 * wanted


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("micro", [[8, 8, 8, 8], [3, 17, 2, 10]], ids=str)
def test_on_one_rank_the_known_noise_scale_is_found_within_5_percent_after_200_steps(
    ragged: bool, micro: list[int]
) -> None:
    check_is_right(records(ragged, "window", [micro]))


def on_two_ranks() -> dict[str, list[dict[str, float]]]:
    cases = {"equal": [[16], [16]], "ragged": [[5], [12, 15]], "one is empty": [[8, 24], []]}
    return {
        f"{name} {sync} {ragged}": records(ragged, sync, micro)
        for (name, micro), sync, ragged in itertools.product(
            cases.items(), ("window", "overlap"), (False, True)
        )
        if sync == "window" or name == "ragged"
    }


def test_on_two_ranks_it_is_found_too_with_equal_ragged_and_empty_shares() -> None:
    here, there = run_on_ranks(2, on_two_ranks)
    assert here == there  # every rank's state is the same
    for name, found in here.items():
        if name.startswith("one is empty"):
            # all of the window is on one rank: its share is the whole, and tells nothing
            assert all(one_step(parts, parts["whole"] ** 2) is None for parts in found)
        else:
            check_is_right(found)


def test_a_loss_scale_that_changes_changes_nothing() -> None:
    plain, scaled = (records(False, "window", [[8, 24]], scaled) for scaled in (False, True))
    for one, other in zip(plain, scaled, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_estimates_have_no_bias_for_parts_of_any_sizes_that_need_not_be_all_of_the_window() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, total = [1, 2, 5], 12  # 4 more are in no part
    mean = torch.full((9,), 0.7, dtype=torch.float64)
    steps = []
    for _ in range(4000):
        rows = mean + 2 * torch.randn(total, 9, dtype=torch.float64, generator=generator)
        parts = rows[: sum(sizes)].split(sizes)
        squared = sum(len(part) * float(part.mean(0).square().sum()) for part in parts)
        given = {"count": 3, "weight": sum(sizes), "total": total, "squared": squared}
        steps.append(one_step(given, float(rows.mean(0).square().sum())))
    noise, signal = torch.tensor(steps, dtype=torch.float64).mean(0)
    assert float(noise) == pytest.approx(4 * 9, rel=0.02)
    assert float(signal) == pytest.approx(0.49 * 9, rel=0.02)


def test_the_interval_holds_the_truth_in_about_95_of_100_runs_and_is_open_where_the_gradient_may_be_zero() -> (
    None
):
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        estimate = NoiseEstimate(0.99)
        for noise, signal in torch.randn(150, 2, generator=generator).tolist():
            estimate.add(20 + 4 * noise, 2 + 3 * signal + noise, 8, 8)
        now = estimate.now()
        assert now is not None
        inside += now.low <= 10 <= now.high
    assert 0.9 <= inside / 300 <= 0.99
    vague = NoiseEstimate(0.99)
    for signal in torch.randn(150, generator=generator).tolist():
        vague.add(20.0, signal, 8, 8)
    now = vague.now()
    assert now is not None
    assert now.high == math.inf
    assert now.low > 5


def test_with_terms_of_unequal_weights_or_one_part_nothing_is_measured() -> None:
    model = Tilted()
    step = gradient_step(
        model, lambda batch: {"a": (model(batch).sum(), 1), "b": (model(batch).sum(), len(batch))},
        term_names=("a", "b"), ranks=Ranks(), stage=lambda batch: lambda: batch,
    )  # fmt: skip
    step.part_norms.want(step.strategy)
    window = LoadedWindow([MicroBatch(torch.ones(2, SIZE), {"a": 1, "b": 2}) for _ in range(3)])
    result, _ = step.gradient(window)
    assert result.part is None
    assert window_parts(result.counts, result.weight_totals, 0.0) == {}
    assert records(False, "window", [[32]])[0].keys() == {"whole"}


class Folded(GradientStrategy):
    exact = "nothing"

    def __call__(self, window: LoadedWindow, step: Any) -> None: ...


def test_a_strategy_without_sums_in_grad_is_refused() -> None:
    step = gradient_step(
        Tilted(), lambda batch: (batch.sum(), 1), term_names=("loss",), ranks=Ranks(), strategy=Folded(),
        stage=lambda batch: lambda: batch,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"Folded, by which .* has no such parts.*gradient=plain"):
        step.part_norms.want(step.strategy)


def test_odd_values_are_refused_and_a_state_of_another_kind_too() -> None:
    for wrong in ("decay: 1", "stop_after: 0"):
        config = compose(["recipe=vision", f"hooks=[{{name: noise_scale, {wrong}}}]"]).config
        with pytest.raises(ConfigError, match=wrong.replace(": ", "=")):
            build.check_targets(config)
    hook = NoiseScale()
    for state in ({}, {"estimate": {}, "unmeasured": 0}, {"estimate": None, "unmeasured": 0}):
        with pytest.raises(SavedStateError, match="noise_scale"):
            hook.load_state_dict(state)


@pytest.mark.parametrize(
    ("size", "said"),
    [(8, "far below"), (100, "is near"), (4096, "far above the noise scale: it takes about 42 times")],
)
def test_advice_tells_a_batch_that_is_far_off_and_says_how_far_to_trust_it(size: int, said: str) -> None:
    text = batch_advice(100.0, 80.0, 130.0, size)
    assert said in text
    assert "Adam" in text
    assert "packed" in text


MODULE = """
import torch
from torch import nn

def points():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(640, 8, generator=g)
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(640, 1, generator=g))

def net():
    return nn.Linear(8, 1)
"""
RECIPE = """
defaults: [base, override optimizer: sgd, override schedule: constant, _self_]
model: {_target_: mine.net}
data: {_target_: mine.points}
loss: {_target_: torch.nn.MSELoss}
batch: {effective: 16, micro: 4}
train: {steps: 40, log_every: 7, check: "off"}
save: {every: 17, keep: 0}
optimizer: {lr: 0.01, momentum: 0.0, nesterov: false, weight_decay: 0.0}
hooks: [noise_scale]
device: cpu
"""


def measures(folder: Path) -> list[dict[str, float]]:
    return [line.get("metrics", {}) for line in metrics(folder)]


def test_a_run_records_it_and_a_resumed_run_the_same_bits_and_says_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "noisy.yaml").write_text(RECIPE)
    said = gatrain(tmp_path, "fit", "recipe=noisy", "run.dir=whole")
    assert "noise scale" in said
    assert "batch advice" in said
    assert "noise_scale" in said
    whole = measures(tmp_path / "whole")
    assert whole[0] == {}
    assert whole[-1].keys() == {"noise_scale", "noise_scale_low", "noise_scale_high"}
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["findings"].keys() == {"noise scale", "batch advice"}
    assert "batch advice" in (shown := gatrain(tmp_path, "show", "whole"))
    assert "completed, 40 of 40 steps" in shown
    assert max(map(len, shown.splitlines())) <= 80
    half = shutil.copytree(
        tmp_path / "whole", tmp_path / "half"
    )  # as if it had been killed after step 20 or so
    (half / "summary.json").unlink()
    for state in (34, 40):
        shutil.rmtree(half / "saved" / f"step_{state:08d}")
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:21]))
    shown = gatrain(tmp_path, "show", "half")
    assert "running, or ended without a word, 21 steps" in shown
    assert "batch advice" in shown
    assert "resume with" in shown
    gatrain(tmp_path, "resume", "half")
    assert measures(tmp_path / "half") == whole


def test_one_micro_batch_on_one_rank_has_no_parts_which_is_said_with_what_to_type() -> None:
    told: list[str] = []
    hook = NoiseScale()
    hook.start(SimpleNamespace(notice=told.append, world_size=1, effective_batch=16))  # type: ignore[arg-type]
    for step in (1, 2):
        assert hook.measured(SimpleNamespace(skipped=None, parts={}, step=step)) == {}  # type: ignore[arg-type]
    assert len(told) == 1
    assert "batch.micro=8 gives it two" in told[0]
    assert hook.findings()["noise scale"].startswith("not measured. A window is compared")


def test_auto_proposes_a_batch_after_a_pilot_sets_none_and_its_command_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "noisy.yaml").write_text(RECIPE)
    words = ("recipe=noisy", "train.steps=120", "optimizer.lr=0.1", "batch.effective=auto", "run.name=tried")
    said = gatrain(tmp_path, "fit", *words, expect=13)
    assert "measured in" in said
    assert "Nothing was set" in said
    command = shlex.split(next(line for line in said.splitlines() if line.startswith("Type: "))[6:])
    assert command[:3] == ["gatrain", "fit", "recipe=noisy"]
    assert "run.name=tried" in command
    assert not (tmp_path / "outputs" / "noisy" / "tried").exists()  # it is for the command that is proposed
    assert len(metrics(tmp_path / "outputs" / "noisy" / "tried_pilot")) < 120  # it ended once it knew enough
    monkeypatch.chdir(tmp_path)
    proposed = compose(command[2:]).config
    assert proposed.batch.effective > 16
    assert (proposed.batch.rule, proposed.batch.base) == ("linear", 16)


def test_auto_is_for_the_command_line_of_training_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line of gatrain fit"):
        compose(["recipe=vision", "batch.effective=auto"])
    words = ["recipe=llm", "batch.count=tokens", "batch.effective=auto"]
    with pytest.raises(ConfigError, match=r"batch.count=samples"):
        pilot.propose(words, WorldRequest(), Listener())
    assert pilot.is_asked(["batch.effective=8", "batch.effective=auto"])
    assert not pilot.is_asked(["batch.effective=auto", "batch.effective=8"])


def test_a_value_is_spelt_so_that_composing_gives_it_back() -> None:
    hooks = [
        {"_target_": "a.B", "text": "it's, a: {b}", "n": 1.5, "none": None, "yes": True, "list": [1, "x"]}
    ]
    assert compose(["recipe=vision", f"hooks={pilot.spelt(hooks)}"]).config.hooks == hooks
