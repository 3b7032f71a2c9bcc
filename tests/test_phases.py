"""Phases: each update is that of the whole window, whatever the split; all of a window's updates or none."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gatrain, run
from distributed import run_on_ranks
from examples.phases import Adversaries
from safetensors.torch import load_file
from torch import Tensor, nn

from gatrain import build
from gatrain.compose import compose
from gatrain.config import AdamWConfig, OptimizerConfig, RunConfig, SGDConfig
from gatrain.errors import ConfigError, ExactnessError, SavedStateError
from gatrain.optimizer_config import AdamAConfig
from gatrain.phase_config import phase_configs
from gatrain.plan import StepSettings
from gatrain.report.run_view import _phases
from gatrain.tasks.base import phases_of, weights_of
from gatrain.train import saved_state
from gatrain.train.engine import Engine
from gatrain.train.gradient.phases import Phases
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.saved_state import Progress

CPU = torch.device("cpu")
WINDOW, STEPS = 11, 4
SGD = SGDConfig(lr=0.3, phases={"maker": {"lr": 0.2, "clip_norm": 0.1}})
ADAM = AdamWConfig(lr=0.01, betas=(0.5, 0.9), phases={"maker": {"name": "sgd", "lr": 0.2, "momentum": 0.9}})


def engine_of(
    config: OptimizerConfig = SGD, strategy: Phases | None = None, task: Adversaries | None = None
) -> Engine:
    task = task or Adversaries()
    torch.manual_seed(3)
    model = task.build_model().double()
    settings = StepSettings("fp32", "none", False, "window")
    return Engine(task, model, settings, config, Ranks.current(), CPU, strategy=strategy or Phases())


def window_of(
    task: Adversaries, step: int, sizes: list[int], rank: int = 0, world_size: int = 1
) -> LoadedWindow:
    """This rank's part of window ``step``; ``sizes`` are those of all ranks, dealt out in turn."""
    first = step % 2 * WINDOW
    real, noise = (t[first : first + WINDOW].double() for t in task.train_data.tensors)  # type: ignore[attr-defined]
    made = [
        MicroBatch([a, b], weights_of(task, [a, b]))
        for a, b in zip(real.split(sizes), noise.split(sizes), strict=True)
    ]
    return LoadedWindow(made[rank::world_size])


def trained(engine: Engine, sizes: list[int], start: int = 0, stop: int = STEPS) -> dict[str, Tensor]:
    for step in range(start, stop):
        ranks = engine.ranks
        _, norm = engine.step(window_of(engine.task, step, sizes, ranks.rank, ranks.world_size), step)  # type: ignore[arg-type]
        assert torch.isfinite(norm)
    return engine.model.state_dict()


def by_hand(updates: Mapping[str, int], every: Mapping[str, int]) -> dict[str, Tensor]:
    """Alternating updates with the gradient of the whole window, in plain torch; with SGD as above."""
    task = Adversaries()
    torch.manual_seed(3)
    model = task.build_model().double()
    parts = {name: list(model.get_submodule(name).parameters()) for name in task.phases}
    optimizers = {name: torch.optim.SGD(parts[name], lr=0.3 if name == "judge" else 0.2) for name in parts}
    for step in range(STEPS):
        whole = window_of(task, step, [WINDOW]).micro_batches[0].batch
        for phase in task.phases:
            for _ in range(updates.get(phase, 1) if (step + 1) % every.get(phase, 1) == 0 else 0):
                model.zero_grad(set_to_none=True)
                total, weight = task.loss_sum(model, whole, phase)
                (total / weight).backward()  # type: ignore[no-untyped-call]
                if phase == "maker":
                    nn.utils.clip_grad_norm_(parts[phase], 0.1)
                optimizers[phase].step()
    return model.state_dict()


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other)


TURNS: list[dict[str, dict[str, int]]] = [{}, {"updates": {"judge": 3}}, {"every": {"maker": 2}}]


def _on_two_ranks() -> list[dict[str, Tensor]]:
    return [
        trained(engine_of(strategy=Phases(**turns)), sizes) for turns in TURNS for sizes in ([4, 1, 6], [11])
    ]


def test_any_split_on_any_number_of_ranks_trains_like_whole_windows_in_turn() -> None:
    """The second split leaves a rank without a sample."""
    wanted = [by_hand(turns.get("updates", {}), turns.get("every", {})) for turns in TURNS]
    for turns, whole in zip(TURNS, wanted, strict=True):
        for sizes in ([11], [4, 4, 3], [1, 3, 2, 5]):
            assert distance(trained(engine_of(strategy=Phases(**turns)), sizes), whole) < 1e-12, (
                turns,
                sizes,
            )
    for found in run_on_ranks(2, _on_two_ranks):
        for nth, each in enumerate(found):
            assert distance(each, wanted[nth // 2]) < 1e-12, TURNS[nth // 2]
    assert distance(wanted[1], wanted[0]) > 1e-3 < distance(wanted[2], wanted[0])


def test_a_recipe_with_a_list_of_optimizers_is_shown_the_way() -> None:
    with pytest.raises(ConfigError, match=r"gradient=phases, and 'optimizer\.phases"):
        compose(["recipe=gan", "optimizers=[{name: sgd}]"])


def test_show_tells_the_rate_of_every_phase() -> None:
    steps = [{"metrics": {"judge.lr": 0.3, "maker.lr": 0.2}}, {"metrics": {"judge.lr": 0.15, "seen": 1}}, {}]
    assert _phases(steps) == [("phases", "judge lr 0.15, maker lr 0.2")]
    assert _phases([{"metrics": {"zero": 1.0}}]) == []


def test_what_a_hook_has_frozen_in_one_phase_stays_frozen_after_another() -> None:
    engine = engine_of()
    frozen = next(engine.model.maker.parameters()).requires_grad_(False)  # type: ignore[union-attr,operator]
    before = frozen.clone()
    trained(engine, [11], 0, 2)
    assert not frozen.requires_grad
    assert torch.equal(frozen, before)


def test_a_phase_leaves_no_gradient_in_the_parameters_of_another() -> None:
    seen: dict[str, set[str]] = {}

    class Watched(Adversaries):
        def loss_sum(self, model: nn.Module, batch: Any, phase: str = "") -> Any:
            seen[phase] = {name for name, p in model.named_parameters() if p.requires_grad}
            assert all(p.grad is None for name, p in model.named_parameters() if name not in seen[phase])
            return super().loss_sum(model, batch, phase)

    engine = engine_of(task=Watched())
    trained(engine, [4, 4, 3], stop=2)
    assert {phase: {name.partition(".")[0] for name in names} for phase, names in seen.items()} == {
        "judge": {"judge"},
        "maker": {"maker"},
    }
    assert all(p.requires_grad and p.grad is None for p in engine.model.parameters())


def test_each_phase_has_its_own_rate_norm_and_mean_loss_over_its_updates() -> None:
    engine = engine_of(strategy=Phases(updates={"judge": 3}, every={"maker": 2}))
    first, _ = engine.step(window_of(engine.task, 0, [4, 7]), 0)  # type: ignore[arg-type]
    assert first.weight_totals == {"judge": 3 * WINDOW, "maker": 0}
    assert set(first.metrics) == {"judge.grad_norm", "judge.lr"}
    second, norm = engine.step(window_of(engine.task, 1, [4, 7]), 1)  # type: ignore[arg-type]
    assert second.weight_totals == {"judge": 3 * WINDOW, "maker": WINDOW}
    assert (second.metrics["judge.lr"], second.metrics["maker.lr"]) == (0.3, 0.2)
    norms = [float(second.metrics[f"{name}.grad_norm"]) for name in ("judge", "maker")]
    assert float(norm) == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert 0 < second.loss() < 5


def test_each_phase_is_clipped_in_its_own_way() -> None:
    """By the norm of a group of parameters, and unit by unit."""
    rule = {"match": "judge.0.*", "clip_norm": 0.05}
    engine = engine_of(SGDConfig(lr=0.3, phases={"judge": {"groups": [rule]}, "maker": {"clip_agc": 0.01}}))
    before = copy.deepcopy(engine.model.state_dict())
    after = trained(engine, [4, 7], stop=1)
    moved = {name: after[name] - before[name] for name in before}
    clipped = torch.cat([moved["judge.0.weight"].flatten(), moved["judge.0.bias"]])
    assert float(clipped.norm()) == pytest.approx(0.3 * 0.05, rel=1e-4)
    assert float(moved["judge.2.weight"].norm()) > 0.3 * 0.05
    rows = moved["maker.0.weight"].norm(dim=1) / before["maker.0.weight"].norm(dim=1)
    assert float(rows.max()) == pytest.approx(0.3 * 0.01)


# --- all or nothing ----------------------------------------------------------------------------------------


def _bits(engine: Engine) -> dict[str, Any]:
    named = engine.model.named_parameters()
    state = {
        n: copy.deepcopy(dict(engine.optimizer.state[p])) for n, p in named if p in engine.optimizer.state
    }
    return {"model": copy.deepcopy(engine.model.state_dict()), "state": state}


def _same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one["model"][n].equal(other["model"][n]) for n in one["model"]) and str(one["state"]) == str(
        other["state"]
    )


class Planted(Adversaries):
    fault: Callable[[Tensor], Tensor] | None = None
    """Of the maker's loss."""

    def loss_sum(self, model: nn.Module, batch: Any, phase: str = "") -> Any:
        total, weight = super().loss_sum(model, batch, phase)
        return (self.fault(total) if phase == "maker" and self.fault is not None else total), weight


@pytest.mark.parametrize("updates", [{}, {"maker": 2}])
def test_a_phase_that_is_not_finite_takes_the_windows_other_updates_back(updates: dict[str, int]) -> None:
    task = Planted()
    engine = engine_of(ADAM, Phases(updates=updates), task)
    trained(engine, [4, 7], stop=1)
    before = _bits(engine)
    task.fault = lambda total: total * float("nan")
    result, norm = engine.step(window_of(engine.task, 1, [4, 7]), 1)  # type: ignore[arg-type]
    assert result.skipped
    assert not torch.isfinite(norm)
    assert _same_bits(_bits(engine), before)
    task.fault = None
    assert not _same_bits({**_bits(engine), "model": trained(engine, [4, 7], 1, 2)}, before)


def test_an_error_in_a_later_phase_takes_the_windows_updates_back_so_that_its_state_can_be_saved() -> None:
    task = Planted()
    engine = engine_of(ADAM, task=task)
    trained(engine, [4, 7], stop=1)
    before = _bits(engine)

    def fail(total: Tensor) -> Tensor:
        raise RuntimeError("planted")

    task.fault = fail
    with pytest.raises(RuntimeError, match="planted") as caught:
        engine.step(window_of(engine.task, 1, [4, 7]), 1)  # type: ignore[arg-type]
    assert caught.value.before_update  # type: ignore[attr-defined]
    assert _same_bits(_bits(engine), before)
    assert all(p.requires_grad for p in engine.model.parameters())


# --- saved and resumed -------------------------------------------------------------------------------------


def test_the_state_of_every_optimizer_is_saved_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    turns = Phases(updates={"judge": 3})
    straight = trained(engine_of(ADAM, turns), [4, 7])
    engine = engine_of(ADAM, Phases(updates={"judge": 3}))
    trained(engine, [4, 7], stop=2)
    saved_state.save(
        tmp_path, Progress(2, 22, 0, WINDOW, 0, 22, updates=2), engine.model, engine.optimizer, 1
    )
    again = engine_of(ADAM, Phases(updates={"judge": 3}))
    path = tmp_path / "step_00000002"
    saved_state.load(path, again.model, again.optimizer)
    assert _same_bits(_bits(again), _bits(engine))
    resumed = trained(again, [4, 7], start=2)
    assert all(resumed[name].equal(straight[name]) for name in straight)
    other = engine_of(SGD)
    with pytest.raises(SavedStateError, match=r"judge: AdamW, maker: SGD.*judge: SGD, maker: SGD"):
        saved_state.load(path, other.model, other.optimizer)


RECIPE = """
defaults: [base, _self_]
task: {_target_: mine.Adversaries}
gradient: {name: phases, updates: {judge: 2}}
optimizer: {phases: {maker: {name: sgd, lr: 0.2, momentum: 0.9, schedule: constant}}}
hooks: [{_target_: mine.Kill}]
batch: {effective: 5, micro: 2}
train: {steps: 7, log_every: 1}
save: {every: 1}
device: cpu
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("phases")
    shutil.copy(Path(__file__).parent / "examples" / "phases.py", made / "mine.py")
    (made / "recipes").mkdir()
    (made / "recipes" / "mine.yaml").write_text(RECIPE)
    return made


def test_a_killed_run_resumes_to_the_same_bits_of_model_and_optimizers(folder: Path) -> None:
    gatrain(folder, "fit", "recipe=mine", "run.dir=whole")
    gatrain(folder, "fit", "recipe=mine", "run.dir=killed", expect=11, PLANTED="4")
    gatrain(folder, "resume", "killed")
    for name in ("model", "optimizer"):
        whole, killed = (
            load_file(folder / run / "saved" / "step_00000007" / f"{name}.safetensors")
            for run in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        assert all(whole[key].equal(killed[key]) for key in whole), name
    assert {key.rpartition("/")[2] for key in whole} == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    assert float(whole["judge.0.weight/step"]) == 14
    lines = [json.loads(line) for line in (folder / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert {"judge", "maker"} == set(lines[-1]["loss_terms"])
    assert lines[-1]["metrics"]["maker.lr"] == 0.2 > lines[-1]["metrics"]["judge.lr"]


def test_verify_compares_every_phase_with_its_own_one_shot_gradient(folder: Path) -> None:
    done = run("verify", "--json", "recipe=mine", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(done.stdout)["cases"]
    for phase in ("judge", "maker"):
        exact = [
            c for c in cases if c["name"].startswith(phase) and c["precision"] == "fp64" and not c["mutation"]
        ]
        assert {c["name"].partition(": ")[2] for c in exact} == {
            "planned split",
            "awkward split",
            "two processes",
        }
        assert all(c["relative_error"] < 1e-12 for c in exact)
        mutated = [c for c in cases if c["name"].startswith(phase) and c["mutation"]]
        assert mutated
        assert all(c["relative_error"] > 1e-3 and c["error"] is None for c in mutated)


# --- what is refused ---------------------------------------------------------------------------------------


class Detached(Adversaries):
    def loss_sum(self, model: nn.Module, batch: Any, phase: str = "") -> Any:
        total, weight = super().loss_sum(model, batch, phase)
        return (total.detach() if phase == "maker" else total), weight


class Shared(Adversaries):
    """The judge's loss given to both: the maker's parameters take no part in it."""

    def loss_sum(self, model: nn.Module, batch: Any, phase: str = "") -> Any:
        real, _ = batch
        return model.get_submodule("judge")(real).sum() + sum(p.sum() * 0 for p in ()), len(real)


@pytest.mark.parametrize("task", [Detached(), Shared()])
def test_a_loss_that_does_not_reach_its_phases_parameters_is_refused_before_it_trains(
    task: Adversaries,
) -> None:
    engine = engine_of(ADAM, task=task)
    before = _bits(engine)
    with pytest.raises(ExactnessError, match="'maker' gives none of its parameters a gradient"):
        engine.step(window_of(task, 0, [4, 7]), 0)
    assert _same_bits(_bits(engine), before)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"juge": {}}, "no such phase.*'judge'"),
        ({"judge": {"match": "*"}}, "maker.0.weight belongs to the phases judge and maker"),
        ({"judge": {"match": "judge.0.*"}}, "judge.2.weight belongs to no phase"),
        ({"judge": {"match": "critic.*"}}, r"match=\['critic.\*'\] matches no parameter"),
        ({"judge": {"lr_": 1}}, "lr_ is no key of a phase with adamw.*Did you mean 'lr'"),
        ({"judge": {"lr": -1}}, "optimizer.phases.judge.lr=-1"),
        ({"judge": {"name": "adm"}}, "Did you mean 'adamw'"),
        ({"judge": {"groups": [{"match": "*", "thaw_at": 3}]}}, "thaw_at is not for a phase"),
        ({"judge": {"schedule": {"name": "step"}}}, "judge.schedule.milestones"),
        ({"judge": {"groups": [{"match": "*", "frozen": True}]}}, "freezes every parameter"),
        (["judge"], "names no phases"),
    ],
)
def test_phases_that_cannot_be_are_refused_in_words(phases: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_of(AdamWConfig(phases=phases))


def test_what_does_not_go_with_phases_is_refused_with_what_to_type_instead() -> None:
    task = {"_target_": "examples.phases.Adversaries"}

    def make(**values: Any) -> None:
        config = RunConfig(**{"task": task, "gradient": "phases", **values})
        build.build_task(config)
        build.inspect_optimizer(config, Adversaries(), Adversaries().build_model())

    def refused(words: str, **values: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            make(**values)

    refused("Use gradient=phases", gradient="plain")
    refused("Use precision=bf16 or precision=fp32", precision="fp16")
    refused("another way. Use optimizer=adamw.$", optimizer=AdamAConfig())  # its task needs gradient=phases
    refused("^optimizer=adama .* Use optimizer=adamw.$", optimizer=AdamAConfig(phases={"judge": {}}))
    refused(
        "Use optimizer.phases.judge.name=adamw.$", optimizer=AdamWConfig(phases={"judge": {"name": "adama"}})
    )
    refused("needs a task with phases", task={"_target_": "examples.contrastive.Pairs"})
    refused(
        "optimizer.groups is given beside",
        optimizer=AdamWConfig(groups=[{"match": "*", "lr": 1}], phases={"judge": {}}),
    )
    with pytest.raises(ConfigError, match=r"no such phase.*'judge'"):
        engine_of(strategy=Phases(updates={"jugde": 2}))
    with pytest.raises(ConfigError, match="is not a whole number of at least 1"):
        Phases(updates={"judge": 0})
    with pytest.raises(ConfigError, match="no phase has its turn"):
        engine_of(strategy=Phases(every={"judge": 2, "maker": 2}))


def test_a_phase_takes_what_it_leaves_out_from_the_optimizer_around_it() -> None:
    outer = AdamWConfig(
        lr=0.5, betas=(0.1, 0.2), clip_norm=3.0, phases={"a": {"lr": 1}, "b": {"name": "lion"}, "c": None}
    )
    found = phase_configs(outer)
    assert found["a"].optimizer == AdamWConfig(lr=1, betas=(0.1, 0.2), clip_norm=3.0)
    assert (found["b"].optimizer.name, found["b"].optimizer.lr, found["b"].optimizer.clip_norm) == (
        "lion",
        1e-4,
        3.0,
    )
    assert found["c"].optimizer == AdamWConfig(lr=0.5, betas=(0.1, 0.2), clip_norm=3.0)
    assert phases_of(Adversaries()) == {"judge": ("judge",), "maker": ("maker",)}
