"""`gatrain explain`: numbers of the plan, the parts' own words, and commands that work when they are typed."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from gatrain import cli, doors
from gatrain.batch import Split
from gatrain.compose import compose
from gatrain.explain import Row, Situation, accumulation, explain, noise, techniques
from gatrain.inspected import Inspected
from gatrain.noise_advice import last_noise_scale
from gatrain.plan import DOES_NOT_FIT, FITS, Measurement, Plan, StepSettings, Trial
from gatrain.report.explanation import explanation_lines

SETTINGS = StepSettings("fp32", "none", False, "window")


def trial(size: int, step_s: float | None = None, outcome: str = FITS) -> Trial:
    measured = Measurement(size, outcome)
    if outcome == FITS:
        measured = Measurement(size, outcome, 100 * 2**20 + size * 2**20, 0.001 + 0.001 * size, 0.5, 0.1)
    return Trial(SETTINGS, measured, step_s=step_s)


def situation(
    *words: str, world: int = 1, trials: tuple[Trial, ...] = (), micro: int = 16, **found: Any
) -> Situation:
    """The vision recipe at batch 256 and K = 256 / (16 world)."""
    given = ["recipe=vision", "batch.effective=256", *words]
    composed = compose(given)
    plan = Plan(
        split=Split(256, world),
        micro_batch=micro,
        settings=SETTINGS,
        reason="because",
        trials=list(trials) or [trial(size) for size in (1, 4, 16)],
        predicted_peak_bytes=116 * 2**20,
        memory_budget_bytes=2**30,
    )
    facts: dict[str, Any] = {"samples": 1000, "eval_samples": 0, "fingerprint": "f", "parameters": 9}
    facts |= {"parameter_bytes": 36, "checkpointing_modes": ("none", "selective"), **found}
    return Situation(
        "vision", composed.config, Inspected(**facts), plan, "CPU", on_gpu=False, is_predicted=False,
        cwd=Path.cwd(), words=tuple(given),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def only(rows: Any) -> Row:
    (row,) = rows
    return row


@pytest.mark.parametrize(
    ("given", "state", "said"),
    [
        ({"micro": 256}, "not used", "nothing to accumulate"),
        ({"trials": (trial(16, 1.0), trial(256, 3.0))}, "fits without", "3 s a step, the plan 1 s"),
        ({"trials": (trial(16), trial(32), trial(64, outcome=DOES_NOT_FIT))}, "needed", "64 did not"),
        ({"trials": (trial(16), trial(32))}, "used", "about 356 MiB, by the line"),
    ],
)
def test_it_says_whether_accumulation_is_needed_at_all(given: Any, state: str, said: str) -> None:
    row = only(accumulation.need(situation(**given)))
    assert row.state.startswith(state)
    assert said in row.text
    assert "116 MiB of the 1.0 GiB" in row.text


def test_a_fixed_micro_batch_is_not_said_to_be_needed() -> None:
    row = only(accumulation.need(situation("batch.micro=16", trials=(trial(16),))))
    assert (row.state.split(":")[0], "batch.micro=auto tries" in row.text) == ("asked for", True)


def test_the_knee_is_the_smallest_size_with_nearly_the_best_throughput() -> None:
    row = only(
        accumulation.knee(situation(trials=tuple(trial(size) for size in (1, 4, 16, 32, 64)), micro=4))
    )
    assert row.state == "knee at micro-batch 16"  # 16 / 17 is above 95 % of 64 / 65
    assert "The plan's 4 reaches 81%" in row.text
    assert "checkpointing=selective" in row.text


def test_reductions_are_counted_over_ranks_and_there_are_none_on_one() -> None:
    assert "saves nothing" in only(accumulation.reductions(situation())).text
    row = only(accumulation.reductions(situation(world=4)))
    assert "saves 3 of 4 reductions, 1.5 s of 2 s" in row.text


def test_the_small_batch_is_a_command_that_composes_with_the_numbers_that_are_told() -> None:
    row = only(accumulation.small_batch(situation()))
    command = row.text.split("same samples: ")[1].split(". There")[0]
    words = shlex.split(command)
    assert words[:2] == ["gatrain", "fit"]
    batch = compose(words[2:]).config.batch
    assert (batch.effective, batch.rule, batch.base) == (16, "half_life", 256)
    assert f"beta2 becomes {0.95 ** (1 / 16):.6g}" in row.text
    row = only(accumulation.small_batch(situation("optimizer=sgd", "optimizer.lr=0.16")))
    assert "lr becomes 0.01" in row.text
    assert not list(accumulation.small_batch(situation(micro=256)))
    assert not list(accumulation.small_batch(situation("batch.rule=half_life", "batch.base=64")))


def test_what_a_strategy_cannot_do_is_not_proposed() -> None:
    base = situation()
    cached = dataclasses.replace(base, config=dataclasses.replace(base.config, gradient="cached"))
    assert only(noise.rows(cached)).state == "cannot be measured"
    assert not list(accumulation.small_batch(cached))


def test_small_groups_of_batch_norm_are_told_with_what_helps() -> None:
    norms = {"batch_norms": ("a", "b")}
    row, setting = techniques.batch_norm(situation(**norms))
    assert row.state == "2 of them, groups of 16"
    assert "norm=group" in row.text
    assert (setting.topic, setting.state) == ("norm", "keep")
    assert (
        "statistics are those of the large batch"
        in next(iter(techniques.batch_norm(situation(micro=256, **norms)))).text
    )


def test_every_shipped_strategy_speaks_for_itself() -> None:
    for name in doors.SHIPPED["gradient"]:
        base = situation()
        changed = dataclasses.replace(base, config=dataclasses.replace(base.config, gradient=name))
        row = next(row for row in techniques.doors_rows(changed) if row.topic == "gradient")
        assert row.state == name
        assert len(row.text) > 40


def test_the_noise_scale_of_the_newest_run_is_told_with_advice(tmp_path: Path) -> None:
    assert "batch.effective=auto" in only(noise.rows(situation())).text
    run = tmp_path / "outputs" / "vision" / "one"
    run.mkdir(parents=True)
    lines = [
        {"step": 9, "metrics": {"noise_scale": 20.0, "noise_scale_low": 18.0, "noise_scale_high": 22.0}},
        {"step": 10, "metrics": {"noise_scale_low": 19.0}},
        {"step": 11},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    row = only(noise.rows(situation()))
    assert row.state == "20 samples in outputs/vision/one"
    assert "far above" in row.text
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    assert last_noise_scale(run / "metrics.jsonl") == (float("inf"), 19.0, float("inf"))


def test_lines_are_no_wider_than_80_columns_and_every_row_says_something() -> None:
    rows = explain(situation(batch_norms=("a", "b")))
    assert all(row.topic and row.state and row.text.endswith(".") for row in rows)
    assert max(len(line) for line, _ in explanation_lines(rows)) <= 80


def test_the_command_plans_prints_json_and_predicts_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    quick = ["batch.micro=8", "precision=fp32", "checkpointing=none", "compile=false", "sync=window"]
    words = ["recipe=vision", "batch.effective=24", *quick, "device=cpu"]
    for more in (["--json"], ["--gpu", "T4", "--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["explain", *words, *more])
        out, _ = capfd.readouterr()
        assert ended.value.code == 0
        told = json.loads(out)
        topics = {row["topic"]: row["state"] for row in told["rows"]}
        assert topics["accumulation"] == "asked for: 24 = 1 rank x 3 accumulation steps x 8"
        assert told["plan"]["accumulation_steps"] == 3
        assert ("T4" in told["headline"]) == ("--gpu" in more)


def test_a_strategy_in_the_working_folder_speaks_for_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """Where it says nothing of exactness, that is said."""
    Path("strategies_here.py").write_text(
        "from gatrain.train.gradient.plain import Plain\n"
        "from gatrain.train.gradient import GradientStrategy\n"
        "class Own(Plain):\n    exact = 'as far as mine goes'\n"
        "class Silent(GradientStrategy):\n"
        "    def __call__(self, window, step):\n"
        "        for k, batch in step.batches(window):\n            step.forward_backward(batch)\n"
    )
    quick = ["batch.micro=8", "precision=fp32", "checkpointing=none", "compile=false", "sync=window"]
    for name, said in (("Own", "As far as mine goes."), ("Silent", "has no sentence")):
        own = f"gradient={{_target_: strategies_here.{name}}}"
        with pytest.raises(SystemExit) as ended:
            cli.main(["explain", "recipe=vision", "batch.effective=24", *quick, "device=cpu", own, "--json"])
        assert ended.value.code == 0
        rows = json.loads(capfd.readouterr().out)["rows"]
        assert said in next(row["text"] for row in rows if row["topic"] == "gradient")
