"""The tuner with real trial processes on the CPU: what fits, what is fastest, and models that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gatrain import tune
from gatrain.config import BatchConfig, RunConfig, TrainConfig, TuneConfig
from gatrain.errors import ConfigError, DoesNotFitError, WorkerError
from gatrain.hardware import detect_hardware
from gatrain.inspected import Inspected
from gatrain.launch.world import Nodes
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, SKIPPED

FACTS = Inspected(64, 0, "data", 36, 144, ("none",))

MODULE = '''
import os
import time

import torch
from torch import nn


class Model(nn.Module):
    """A layer that does to a batch of `at` samples or more whatever `what` says, on the ranks named."""

    def __init__(self, what="", at=10**9, rank=None):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.what, self.at = what, at
        self.concerned = rank is None or int(os.environ.get("RANK", "0")) == rank

    def forward(self, x):
        y = self.layer(x)
        if self.concerned and len(x) >= self.at:
            if self.what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")
            if self.what == "error":
                raise ValueError("an odd batch")
            if self.what == "death":
                os._exit(9)
            if self.what == "wrong":
                y = y * 3 + 1
        if self.what == "one" and len(x) == 1:
            raise ValueError("more than one sample, please")
        if self.what in ("slow", "three"):
            time.sleep(0.02 * len(x))
        if self.what == "three" and self.concerned and len(x) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        if self.what == "print":
            print("noise of the model", flush=True)
        return y


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.arange(64) % 4)
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a module of their own; the cache is empty."""
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "misbehaving.py").write_text(MODULE)
    return folder


def plan_in(project: Path, effective: int = 16, nproc: int = 1, max_seconds: float = 60, **model: Any) -> Any:
    config = RunConfig(
        model={"_target_": "misbehaving.Model", **model},
        data={"_target_": "misbehaving.data"},
        task={"_target_": "gatrain.tasks.Supervised"},
        train=TrainConfig(steps=1),
        batch=BatchConfig(effective=effective),
        tune=TuneConfig(max_seconds=max_seconds),
    )
    hardware = detect_hardware("cpu")
    tuner = tune.Tuner(config, hardware, Nodes(nproc), cwd=project)
    with tuner.trial_host() as host:
        return tuner.plan(FACTS, host)


INTERRUPTED = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_tune_real
if __name__ == "__main__":
    test_tune_real.plan_in(Path({project!r}), effective=256, what="slow")
"""


def outcomes(plan: Any) -> dict[int, str]:
    return {trial.micro_batch: trial.outcome for trial in plan.trials}


def test_a_plan_from_real_trials_and_the_same_from_the_cache(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_in(project, what="print")
    assert capfd.readouterr().out == ""  # standard output belongs to the command
    assert sum(map(sum, plan.micro_batches)) == 16
    fitting = [trial for trial in plan.trials if trial.outcome == FITS]
    assert {1, 2} <= {trial.micro_batch for trial in fitting}
    for trial in fitting:
        assert trial.measured.micro_step_s > 0
        assert trial.measured.optimizer_s > 0
        assert trial.peak_memory_bytes > 2**20
        assert trial.measured.loss == pytest.approx(fitting[0].measured.loss, rel=1e-5)
    assert "takes" in plan.reason
    started = time.perf_counter()
    again = plan_in(project, what="print")
    assert time.perf_counter() - started < 1
    assert again.micro_batches == plan.micro_batches
    assert "remembered" in again.reason
    assert not list(project.glob("**/trials.jsonl"))


def test_the_users_imports_take_no_time_from_the_trials(project: Path) -> None:
    """At the sizes of this model trials need a second or two; the import and the data alone take longer."""
    module = project / "misbehaving.py"
    slow = MODULE.replace("def data():", "time.sleep(6)\n\n\ndef data():\n    time.sleep(6)")
    module.write_text(slow)
    plan = plan_in(project, effective=4, max_seconds=8)
    assert outcomes(plan) == {1: FITS, 2: FITS, 4: FITS}
    assert not any("ran out" in note for note in plan.notes)


def test_close_calls_are_timed_as_whole_steps_on_all_ranks(project: Path) -> None:
    plan = plan_in(project, effective=17, nproc=2, what="slow")  # shares of 9 and 8, and 0.02 s a sample
    confirmed = {t.micro_batch: t for t in plan.trials if t.confirmed_step_s is not None}
    assert len(confirmed) >= 2
    for trial in confirmed.values():
        assert trial.confirmed_step_s > 0.02 * 9  # all micro-steps of the slowest rank
        assert trial.confirmed_steps >= 3
    assert "full steps" in plan.reason
    assert plan.micro_batch in confirmed
    assert 0 < plan.predicted_peak_bytes <= plan.memory_budget_bytes


def test_a_remainder_that_fails_on_one_rank_in_whole_steps_hangs_nobody_and_is_not_chosen(
    project: Path,
) -> None:
    plan = plan_in(project, effective=22, nproc=2, what="three", rank=1)
    assert sum(map(sum, plan.micro_batches)) == 22
    assert all(size != 3 for size in plan.micro_batches[1])


def test_out_of_memory_ends_the_rise(project: Path) -> None:
    plan = plan_in(project, what="memory", at=4)
    assert outcomes(plan) == {1: FITS, 2: FITS, 4: DOES_NOT_FIT}
    assert plan.micro_batch <= 2
    assert "4 does not fit" in plan.reason
    (row,) = (trial for trial in plan.trials if trial.outcome == DOES_NOT_FIT)
    assert "Tried to allocate 7 GiB" in row.error


def test_out_of_memory_on_one_rank_counts_for_all_and_hangs_nobody(project: Path) -> None:
    plan = plan_in(project, effective=17, nproc=2, what="memory", at=4, rank=1)
    assert outcomes(plan) == {
        1: FITS,
        2: FITS,
        3: FITS,
        5: DOES_NOT_FIT,
    }  # a share of 9 has no micro-batch of 4
    assert sum(map(sum, plan.micro_batches)) == 17
    assert all(size <= 3 for sizes in plan.micro_batches for size in sizes)


def test_nothing_fits(project: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"does not fit at micro-batch 1.*Use "):
        plan_in(project, what="memory", at=1)


def test_an_error_at_some_sizes_is_a_third_outcome(project: Path) -> None:
    plan = plan_in(project, what="error", at=4)
    seen = outcomes(plan)
    assert (seen[1], seen[2], seen[4], seen[8]) == (FITS, FITS, FAILED, FAILED)
    assert "ValueError: an odd batch" in next(t.error for t in plan.trials if t.outcome == FAILED)
    assert plan.micro_batch <= 2


def test_one_sample_may_be_too_few(project: Path) -> None:
    plan = plan_in(project, effective=9, what="one")
    assert outcomes(plan)[1] == FAILED
    assert all(1 not in sizes for sizes in plan.micro_batches)


def test_an_error_at_every_size_is_the_users(project: Path) -> None:
    with pytest.raises(WorkerError, match=r"ValueError: an odd batch at .*misbehaving\.py:\d+"):
        plan_in(project, what="error", at=1)


def test_a_process_that_dies_fails_its_size(project: Path) -> None:
    plan = plan_in(project, what="death", at=2)
    assert outcomes(plan) == {1: FITS, 2: FAILED}
    assert plan.micro_batch == 1


def test_a_wrong_loss_is_refused(project: Path) -> None:
    plan = plan_in(project, effective=64, what="wrong", at=8)
    seen = outcomes(plan)
    assert all(outcome in (FAILED, SKIPPED) for size, outcome in seen.items() if size >= 8)
    assert plan.micro_batch < 8
    if 8 in seen:  # unless the rise had ended before: the machine is shared
        assert any("wrong result" in str(trial.error) for trial in plan.trials)


def test_a_model_that_cannot_be_made_is_not_a_trial(project: Path) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        plan_in(project, unknown=1)


def test_ctrl_c_keeps_what_was_measured_and_leaves_nothing_behind(project: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(tests=str(Path(__file__).parent), project=str(project)))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
    )
    lines = "gatrain_tune_*/trials.jsonl"
    deadline = time.monotonic() + 120
    while not any('"trial"' in file.read_text() for file in (tmp_path / "tmp").glob(lines)):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert not list((tmp_path / "tmp").glob("gatrain_*"))
    (stored,) = (tmp_path / "cache/plans").iterdir()
    (kept,) = json.loads(stored.read_text())["curves"]
    assert kept["stopped"] == "interrupted"
    assert kept["measurements"][0]["outcome"] == FITS
