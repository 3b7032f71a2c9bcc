"""Run folders with hostile files, checksums mended: refused with the documented exit code, or passed over."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import gatrain, project
from hostile import MARKER, Payload

from gatrain import fit, states
from gatrain.errors import GatrainError
from gatrain.fit import resuming
from gatrain.report.jsonl import read_lines
from gatrain.rundir import RunDir, write_json

Change = Callable[[Path], Any]


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(6), index % 3
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: hostile_points.Net}
data: {_target_: hostile_points.Points}
batch: {effective: 8, micro: 4}
train: {steps: 6, log_every: 1, check: 'off'}
precision: fp32
save: {every: 1, keep: 0, minutes: 0}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with one run of six steps, each of them saved."""
    folder = tmp_path_factory.mktemp("user")
    project(folder, MODULE, RECIPE, "hostile_points")
    gatrain(folder, "fit", "recipe=hostile_points", "run.dir=run")
    return folder


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A run folder for one case; nothing in it may have been executed."""
    shutil.copytree(prepared / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    yield tmp_path / "run"
    assert not (tmp_path / MARKER).exists()


def mend(state: Path) -> None:
    manifest = {name: states.fingerprint(state / name) for name in states.FILES}
    (state / "manifest.json").write_text(json.dumps(manifest))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def tensors(state: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(state / file)
    change(held)
    save_file(held, state / file)


def same_end(one: Path, two: Path) -> bool:
    files = [run / "saved" / "step_00000006" / "model.safetensors" for run in (one, two)]
    rows = [
        [(row["step"], row["loss"], row["window"]) for row in read_lines(run / "metrics.jsonl")]
        for run in (one, two)
    ]
    return files[0].read_bytes() == files[1].read_bytes() and rows[0] == rows[1]


@pytest.mark.chaos
def test_odd_states_are_passed_over_one_by_one_and_the_run_ends_the_same(
    prepared: Path, copied: Path
) -> None:
    saved, payload = copied / "saved", pickle.dumps(Payload(copied.parent))
    (saved / "step_00000006" / "model.safetensors").write_bytes(payload)
    (saved / "step_00000005" / "progress.json").write_bytes(payload)
    rewrite(saved / "step_00000004" / "progress.json", lambda data: data.update(step=-5))
    tensors(saved / "step_00000003", "optimizer.safetensors", dict.clear)
    tensors(
        saved / "step_00000002", "model.safetensors", lambda held: held["body.0.weight"].fill_(float("nan"))
    )
    for number in range(2, 7):
        mend(saved / f"step_{number:08d}")
    (saved / f"step_{10**30}").mkdir()
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(payload.replace(b"\n", b"") + b"\n" + b"[" * 100_000 + b"\n")
    for name in ("summary.json", ".session", "logs/error_rank_0.json", "evaluations.jsonl"):
        (copied / name).write_bytes(payload)
    printed = gatrain(copied.parent, "resume", "run")
    for number in (2, 3, 4, 5, 6, 10**30):
        assert f"step_{number:08d}: " in printed
    assert "is not whole" not in printed
    assert same_end(prepared / "run", copied)


@pytest.mark.chaos
def test_where_all_states_are_odd_nothing_is_replaced_and_the_printed_way_to_start_over_works(
    prepared: Path, copied: Path
) -> None:
    saved = copied / "saved"
    for state in saved.iterdir():
        tensors(state, "optimizer.safetensors", dict.clear)
        mend(state)
    rows = (copied / "metrics.jsonl").read_bytes()
    printed = gatrain(copied.parent, "resume", "run", "--max-restarts", "2", expect=8)
    assert all(f"step_{number:08d}: " in printed for number in range(1, 7))
    assert (copied / "metrics.jsonl").read_bytes() == rows
    assert len(list(saved.iterdir())) == 6
    command = printed[printed.index("gatrain resume") :].split("\n")[0]
    assert command == f"gatrain resume {copied} --from-start"
    gatrain(copied.parent, *command.split()[1:])
    assert same_end(prepared / "run", copied)
    assert len(list((copied / "saved.before-1").iterdir())) == 6
    assert (copied / "metrics.before-1.jsonl").read_bytes() == rows


def each_state(run: Path, change: Callable[[Path], Any], mended: bool = True) -> None:
    for state in sorted((run / "saved").iterdir()):
        change(state)
        if mended:
            mend(state)


def link_out(run: Path, name: str) -> None:
    path = run / name
    target = run.parent / f"outside-{path.name}"
    path.rename(target) if path.exists() else target.mkdir()
    path.symlink_to(target)


def in_plan(**changes: Any) -> Callable[[Path], Any]:
    return lambda run: rewrite(run / "plan.json", lambda data: data.update(changes))


def in_config(old: str, new: str) -> Callable[[Path], Any]:
    def change(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new, 1))

    return change


def with_bytes(name: str, content: bytes | None) -> Callable[[Path], Any]:
    """None is a pickle that leaves the marker."""
    return lambda run: (run / name).write_bytes(
        content if content is not None else pickle.dumps(Payload(run.parent))
    )


def in_progress(**changes: Any) -> Callable[[Path], Any]:
    return lambda run: each_state(
        run, lambda state: rewrite(state / "progress.json", lambda data: data.update(changes))
    )


def on_states(change: Callable[[Path], Any], mended: bool = False) -> Change:
    """The same to every saved state."""
    return lambda run: each_state(run, change, mended)


def holding(file: str, content: bytes | None, mended: bool = True) -> Change:
    """All states with other contents of one file; None is a pickle that leaves the marker."""

    def change(run: Path) -> None:
        payload = content if content is not None else pickle.dumps(Payload(run.parent))
        each_state(run, lambda state: (state / file).write_bytes(payload), mended)

    return change


def as_lock(make: Callable[[Path, Path], Any]) -> Change:
    """What ``make`` makes of (the plan, the place of the lock)."""

    def change(run: Path) -> None:
        (run / ".lock").unlink(missing_ok=True)
        make(run / "plan.json", run / ".lock")

    return change


def elsewhere(state: Path, file: str = "") -> None:
    """A state, or a file of it, that is a link to where it really is."""
    path, real = state / file, state.parent.parent / f"real-{state.name}"
    path.rename(real)
    path.symlink_to(real)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_file(state: Path) -> None:
    shutil.rmtree(state)
    state.write_text("x")


def as_empty(state: Path) -> None:
    shutil.rmtree(state)
    state.mkdir()


def renumbered(state: Path) -> None:
    state.rename(state.with_name(f"step_{int(state.name[5:]) + 50:08d}"))


DEEP = b"[" * 200_000
LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)
NUMBERS = json.dumps(dict.fromkeys(states.FILES, 1)).encode()
TAG = b"model: !!python/object/apply:os.system ['touch executed']\n"
MODEL = "model.safetensors"

PLANS: list[dict[str, Any]] = [
    {"micro_batch": -3}, {"micro_batch": 0}, {"micro_batch": 10**30}, {"micro_batches": [[12, -4]]},
    {"micro_batches": [[]]}, {"micro_batches": [[4, 3]]}, {"micro_batches": [[4, 4], []]}, {"world_size": "one"},
    {"world_size": 10**9}, {"effective_batch": 16, "micro_batches": [[4] * 4]}, {"precision": "fp12"},
    {"sync": "evil"}, {"checkpointing": "everything"}, {"compile": "rm -rf"}, {"trials": [{}]},
    {"notes": {"a": 1}}, {"reason": None},
]  # fmt: skip
PROGRESS: list[dict[str, Any]] = [
    {"step": -5}, {"step": 10**30}, {"step": "1"}, {"samples": -1}, {"samples": 10**12}, {"tokens": 1.5},
    {"effective_batch": 0}, {"updates": 10**6}, {"skipped": -1}, {"moved": 2}, {"drop_last": None},
    {"scaler": []}, {"evil": 1}, {"aliases": 1}, {"optimizer": 1}, {"seed": None},
]  # fmt: skip
LINKS = (
    "saved", "logs", "metrics.jsonl", "plan.json", "config.yaml", "env.json", "hardware.json", "overrides.txt",
)  # fmt: skip
BYTES: dict[str, bytes | None] = {"pickle": None, "deep": DEEP, "empty": b"", "null": b"null", "list": b"[]"}
HOSTILE: dict[str, tuple[int, Change]] = {
    **{f"plan {changes}": (8, in_plan(**changes)) for changes in PLANS},
    **{f"plan {name}": (8, with_bytes("plan.json", content)) for name, content in BYTES.items()},
    "plan without keys": (8, with_bytes("plan.json", b"{}")),
    "plan gone": (7, lambda run: (run / "plan.json").unlink()),
    "plan pipe": (8, lambda run: as_pipe(run / "plan.json")),
    **{f"config {name}": (2, with_bytes("config.yaml", content)) for name, content in BYTES.items()},
    "config laughs": (2, with_bytes("config.yaml", LAUGHS)),
    "config tag": (2, with_bytes("config.yaml", TAG)),
    "config unknown key": (2, in_config("batch:", "evil: 1\nbatch:")),
    "config steps": (2, in_config("steps: 6", "steps: -6")),
    "config seed": (2, in_config("seed: 0", f"seed: {10**30}")),
    "config effective": (8, in_config("effective: 8", "effective: 12")),
    "config precision": (2, in_config("precision: fp32", "precision: fp12")),
    "config target": (2, in_config("hostile_points.Net", "os.system")),
    **{f"link {name}": (7, lambda run, name=name: link_out(run, name)) for name in LINKS},  # type: ignore[misc]
    "lock link": (7, as_lock(lambda plan, lock: lock.symlink_to(plan))),
    "lock hard link": (7, as_lock(lambda plan, lock: lock.hardlink_to(plan))),
    "lock folder": (7, as_lock(lambda plan, lock: lock.mkdir())),
    **{f"states {changes}": (8, in_progress(**changes)) for changes in PROGRESS},
    **{f"states progress {name}": (8, holding("progress.json", content)) for name, content in BYTES.items()},
    **{
        f"states manifest {name}": (8, holding("manifest.json", content, False))
        for name, content in BYTES.items()
    },
    "states manifest without files": (8, holding("manifest.json", b"{}", False)),
    "states manifest of numbers": (8, holding("manifest.json", NUMBERS, False)),
    "states without tensors": (8, on_states(lambda state: (state / MODEL).unlink())),
    "states are files": (8, on_states(as_file)),
    "states are links": (8, on_states(elsewhere)),
    "states are empty": (8, on_states(as_empty)),
    "states with pipes": (8, on_states(lambda state: as_pipe(state / MODEL))),
    "states with links": (8, on_states(lambda state: elsewhere(state, MODEL))),
    "states of other numbers": (8, on_states(renumbered)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_exit_code_and_its_name(
    copied: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, change = HOSTILE[case]
    monkeypatch.chdir(copied.parent)
    monkeypatch.setattr(resuming, "start_ranks", lambda *given, **more: pytest.fail("it was believed"))
    change(copied)
    rows = (copied / "metrics.jsonl").read_bytes()
    with pytest.raises(GatrainError) as found:
        fit.resume(copied)
    assert found.value.exit_code == code, found.value
    kind, _, rest = case.partition(" ")
    assert {"plan": "plan.json", "config": "config.yaml", "states": "step_0000", "lock": ".lock"}.get(
        kind, rest
    ) in str(found.value) or kind == "config"
    assert "mistake in gatrain" not in str(found.value)
    assert (copied / "metrics.jsonl").read_bytes() == rows


def test_a_summary_that_tells_of_a_state_that_is_not_there_is_not_believed(copied: Path) -> None:
    run_dir = RunDir(copied)
    ended = {"status": "completed", "step": 6, "total_steps": 6}
    for changes, is_believed in (
        ({}, True),
        ({"step": 5}, False),
        ({"step": 7, "total_steps": 7}, False),
        ({"step": "6"}, False),
    ):
        write_json(run_dir.summary, {**ended, **changes})
        assert bool(resuming._summary_of(run_dir)) is is_believed
