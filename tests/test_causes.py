"""The user's own error is the one that is shown, whichever rank is the first to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command import project, run

from gatrain.errors import DataError, PeerFailed, WorkerError
from gatrain.launch.reasons import describe, is_consequence
from gatrain.train.loader import Failure, _MicroBatches
from gatrain.train.samples import _Reader

MODULE = """
import os, sys, time
import torch
from gatrain.tasks import Supervised

class Late(ValueError):
    def __str__(self):
        time.sleep(1)  # the other rank reports first
        return "planted by the user"

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.randn(6), index % 3

class Task(Supervised):
    def loss_sum(self, model, batch):
        rank, _, kind = os.environ["PLANTED"].partition(":")
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] == rank:
            if kind == "late":
                raise Late
            if kind == "exit":
                sys.exit(0)
            if kind == "bare":
                raise KeyboardInterrupt
        return super().loss_sum(model, batch)

def net():
    return torch.nn.Linear(6, 3)
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.net}
data: {_target_: mine.Points}
task: {_target_: mine.Task, eval_fraction: 0.0}
batch: {effective: 8, micro: 2}
train: {steps: 2, check: "off"}
precision: fp32
"""


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("planted", "sync", "nproc", "words"),
    [
        ("0:late", "window", 2, ["rank 0: Late: planted by the user", "mine.py:"]),
        ("1:late", "overlap", 2, ["rank 1: Late: planted by the user", "mine.py:"]),
        ("1:bare", "overlap", 2, ["rank 1: KeyboardInterrupt", "mine.py:"]),
        ("0:exit", "window", 1, ["rank 0: the code called sys.exit(0)", "mine.py:"]),
    ],
)
def test_the_users_own_error_is_shown_whoever_reports_first(
    tmp_path: Path, planted: str, sync: str, nproc: int, words: list[str]
) -> None:
    project(tmp_path, MODULE, RECIPE)
    done = run(
        "launch", "--nproc", str(nproc), "recipe=mine", f"sync={sync}", cwd=tmp_path, PLANTED=planted
    )  # fmt: skip
    assert done.returncode == WorkerError.exit_code, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def raised(error: BaseException, source: str = "<the user's>") -> BaseException:
    """The error as raised in a file of this name."""
    names: dict[str, Any] = {"error": error}
    try:
        exec(compile("def user():\n    raise error\nuser()", source, "exec"), names)
    except BaseException as caught:
        caught.__traceback__ = caught.__traceback__.tb_next  # type: ignore[union-attr]
        return caught
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no answer from the object store"),
        BrokenPipeError(32, "Broken pipe"),
        RuntimeError("Broken pipe to my tokenizer"),
        RuntimeError("my NCCL topology file is missing"),
        ValueError(),
        AssertionError(),
        SystemExit(0),
        SystemExit("bye"),
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=repr,
)
def test_what_the_users_code_raises_is_a_cause_and_has_a_name(error: BaseException) -> None:
    caught = raised(error, "/home/user/mine.py")
    assert not is_consequence(caught)
    code, kind, message = describe(caught)
    assert code in (5, 11)
    assert kind in (type(error).__name__, "DoesNotFitError")
    assert "another rank" not in message
    assert message.strip()
    wrapped = DataError("cannot load the samples 1")
    wrapped.__cause__ = caught
    assert not is_consequence(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5521"),
        RuntimeError("NCCL communicator was aborted on rank 1"),
        ConnectionResetError("Connection reset by peer"),
    ],
    ids=repr,
)
def test_what_a_collective_raises_is_a_consequence(error: BaseException) -> None:
    distributed = str(Path(torch.__file__).parent / "distributed" / "distributed_c10d.py")
    assert is_consequence(raised(error, distributed))
    assert is_consequence(PeerFailed("another rank failed"))


@pytest.mark.parametrize("stop", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_loader_process_that_the_users_code_ends_says_so(stop: BaseException) -> None:
    class Ending:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            raise stop

    class Task:
        train_data = Ending()
        collates_deterministically = False
        collates_by_default = False

    task: Any = Task()
    found = _MicroBatches(task, task.train_data, 0).__getitems__([(0, 1)])
    assert isinstance(found, Failure)
    assert type(stop).__name__ in found.message
    read = _Reader(task, task.train_data, 0).__getitems__([(0, 1)])
    assert type(stop).__name__ in str(read)
