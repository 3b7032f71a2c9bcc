"""Malformed invocations: each ends with its exit code and one clear message, and leaves nothing behind.

A message names what was given and, where there is one, the nearest right thing. What can be told without
reading data or importing the user's code takes no more than three seconds.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gatrain import cli
from gatrain.rundir import RunDir, locked

LIMIT_S = 3.0
IMPORT_LIMIT_S = 8.0
"""For mistakes that only show when the user's code is imported: half of it is torch on a busy machine."""

CONFIG, PLAN, DATA, FIT, LAUNCH, FOLDER, STATE = 2, 3, 4, 5, 6, 7, 8


@dataclass(frozen=True)
class Bad:
    """One invocation. ``files`` exist before it; a key that ends in a slash is an empty folder."""

    words: str
    code: int
    parts: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    imports: bool = False
    """Whether model or data must be looked at before the mistake can be seen."""


LLM = "defaults: [llm, _self_]\n"
MODULE = """
import torch

class Model(torch.nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
"""

BAD = [
    # the command itself
    Bad("fitt recipe=llm", CONFIG, ("fitt", "'fit'")),
    Bad("recipe=llm", CONFIG, ("recipe=llm", "gatrain fit recipe=llm")),
    Bad("fit --lr 3 recipe=llm", CONFIG, ("--lr", "lr=VALUE")),
    Bad("autotune --retun recipe=llm", CONFIG, ("--retun", "'--retune'")),
    Bad("autotune --plot speed.pdf recipe=llm", CONFIG, ("PNG", "--plot speed.png")),
    Bad("fit recipe=llm batch.effective=null", CONFIG, ("batch.effective=null", "batch.effective=64")),
    Bad("fit recipe=llm precision=null", CONFIG, ("precision=null", "bf16")),
    Bad("launch --nproc many recipe=llm", CONFIG, ("--nproc",)),
    Bad("launch --nproc 0 recipe=llm", LAUNCH, ("0 processes", "--nproc 1")),
    Bad("launch --max-restarts -1 recipe=llm", LAUNCH, ("--max-restarts -1",)),
    Bad("launch --nnodes 2 recipe=llm", LAUNCH, ("--rdzv-endpoint",)),
    Bad("launch --nnodes 2 --rdzv-endpoint here recipe=llm", LAUNCH, ("'here'", "HOST:PORT")),
    Bad("launch --nnodes 2 --rdzv-endpoint h:99999 recipe=llm", LAUNCH, ("99999", "65535")),
    Bad("launch --nnodes 2 --rdzv-endpoint h:1 --node-rank 2 recipe=llm", LAUNCH, ("node rank 2", "0 to 1")),
    Bad("launch --nnodes 2 --rdzv-endpoint localhost:1 recipe=llm", CONFIG, ("run.dir=",)),
    Bad("launch --partition gpu recipe=llm", CONFIG, ("--partition", "--slurm")),
    Bad("launch --slurm --dry-run --nodes 0 recipe=llm", LAUNCH, ("--nodes 0",)),
    Bad("launch --slurm --dry-run --time soon recipe=llm", LAUNCH, ("soon", "HH:MM:SS")),
    # recipes
    Bad("fit", CONFIG, ("recipe=NAME", "llm")),
    Bad("fit recipe=", CONFIG, ("recipe=", "llm")),
    Bad("fit llm", CONFIG, ("'llm'", "recipe=llm")),
    Bad("fit recipe=lmm", CONFIG, ("'lmm'", "'llm'", "vision")),
    Bad("fit recipe=llm recipe=vision", CONFIG, ("recipe=llm and recipe=vision",)),
    Bad("fit recipe=./no/such.yaml", CONFIG, ("such.yaml", "does not exist")),
    Bad("fit recipe=own.yml", CONFIG, ("own.yml", "own.yaml"), {"own.yml": LLM}),
    Bad("fit recipe=llm", CONFIG, ("extends itself", "my_llm.yaml"), {"recipes/llm.yaml": LLM}),
    Bad("fit recipe=a", CONFIG, ("a.yaml", "line 3", "YAML"), {"recipes/a.yaml": "defaults: [llm]\nx: [1\n"}),
    Bad("fit recipe=a", CONFIG, ("a.yaml", "UTF-8"), {"recipes/a.yaml": b"# caf\xe9\nbatch: {}\n"}),
    Bad("fit recipe=a", CONFIG, ("a.yaml", "schema"), {"recipes/a.yaml": "batch: {effective: 3}\n"}),
    Bad("fit recipe=a", CONFIG, ("'lmm'", "'llm'"), {"recipes/a.yaml": "defaults: [lmm, _self_]\n"}),
    Bad("fit recipe=a", CONFIG, ("keys with values", "a.yaml"), {"recipes/a.yaml": "- 1\n- 2\n"}),
    # keys
    Bad("fit recipe=llm optimzer.lr=1", CONFIG, ("optimzer", "'optimizer'")),
    Bad("fit recipe=llm optimizer.lrr=1", CONFIG, ("lrr", "'optimizer.lr'")),
    Bad("fit recipe=llm data.contex=1", CONFIG, ("contex", "'data.context'")),
    Bad("fit recipe=a", CONFIG, ("a.yaml", "efective", "'batch.effective'"),
        {"recipes/a.yaml": LLM + "batch: {efective: 3}\n"}),
    Bad("fit recipe=a", CONFIG, ("a.yaml", "trian", "'train'"),
        {"recipes/a.yaml": LLM + "trian: {steps: 3}\n"}),
    Bad("fit recipe=llm +train.stepz=1", CONFIG, ("stepz", "'train.steps'")),
    # values
    Bad("fit recipe=llm optimizer=adam", CONFIG, ("optimizer=adam", "'adamw'", "sgd")),
    Bad("fit recipe=vision optimizer=sgd optimizer.momentum=0", CONFIG, ("optimizer.nesterov=false",)),
    Bad("fit recipe=llm precision=bf15", CONFIG, ("precision=bf15", "'bf16'")),
    Bad("fit recipe=llm checkpointing=ful", CONFIG, ("checkpointing=ful", "'full'")),
    Bad("fit recipe=llm train.steps=many", CONFIG, ("train.steps=many", "whole number")),
    Bad("fit recipe=llm train.steps=[1,2]", CONFIG, ("train.steps", "whole number")),
    Bad("fit recipe=llm train.steps=1,2", CONFIG, ("train.steps=1,2", "one configuration")),
    Bad("fit recipe=llm train.steps=0", CONFIG, ("train.steps=0",)),
    Bad("fit recipe=llm train.steps=5 train.epochs=1", CONFIG, ("train.steps=5", "train.epochs=1")),
    Bad("fit recipe=llm optimizer.lr=nan", CONFIG, ("optimizer.lr=nan",)),
    Bad("fit recipe=llm optimizer.betas=[0.9]", CONFIG, ("optimizer.betas", "2 numbers")),
    Bad("fit recipe=llm data.path=/a[b", CONFIG, ("/a[b", "quotes")),
    Bad("fit recipe=llm run.name=a/b", CONFIG, ("a/b", "run.dir")),
    Bad("fit recipe=llm data.path=${oc.env:GATRAIN_UNSET}", CONFIG, ("GATRAIN_UNSET", "export")),
    Bad("fit recipe=resnet50", CONFIG, ("data.path", "data.path=/path/to/data")),
    Bad("fit recipe=llm batch.effective=0", CONFIG, ("batch.effective=0", "1")),
    Bad("fit recipe=llm batch.effective=-1", CONFIG, ("batch.effective=-1", "1")),
    Bad("fit recipe=llm batch.effective=1.5", CONFIG, ("batch.effective=1.5", "whole number")),
    Bad("fit recipe=llm batch.effective=abc", CONFIG, ("batch.effective=abc", "whole number")),
    Bad("fit recipe=llm batch.micro=0", CONFIG, ("batch.micro=0", "auto")),
    Bad("fit recipe=llm batch.effective=8 batch.micro=9", CONFIG, ("batch.micro=9", "batch.micro=8")),
    Bad("launch --nproc 4 recipe=llm batch.effective=8 batch.micro=3", PLAN,
        ("batch.micro=3", "batch.micro=2")),
    # run folders
    Bad("fit recipe=llm run.dir=old", FOLDER, ("old", "left alone", "run.dir="), {"old/config.yaml": "x: 1\n"}),
    Bad("fit recipe=llm run.dir=file", FOLDER, ("file", "run.dir="), {"file": "text"}),
    Bad("fit recipe=llm run.dir=file/below", FOLDER, ("file/below", "run.dir="), {"file": "text"}),
    Bad("fit recipe=llm run.dir=/proc/run", FOLDER, ("/proc/run", "cannot be written")),
    Bad("resume nowhere", FOLDER, ("nowhere", "does not exist")),
    Bad("resume empty", FOLDER, ("empty", "config.yaml"), {"empty/": ""}),
    Bad("resume old", CONFIG, ("config.yaml", "YAML"), {"old/config.yaml": "x: [1\n"}),
    Bad("resume old", CONFIG, ("config.yaml", "nonsense"), {"old/config.yaml": "nonsense: 1\n"}),
    Bad("resume", CONFIG, ("run folder",)),
    # the user's code and data
    Bad("fit recipe=llm model._target_=nowhere.Model", CONFIG, ("nowhere.Model", "'nowhere'"), imports=True),
    Bad("fit recipe=llm model._target_=gatrain.models.gpt.GTP", CONFIG, ("GTP", "'GPT'"), imports=True),
    Bad("fit recipe=llm +model.layerz=3", CONFIG, ("layerz", "'layers'"), imports=True),
    Bad("fit recipe=a", CONFIG, ("mine.Modle", "'Model'"), {
        "mine.py": MODULE, "recipes/a.yaml": "defaults: [llm, _self_]\nmodel: {_target_: mine.Modle}\n",
    }, imports=True),
    Bad("fit recipe=a model=own", CONFIG, ("widht", "'width'"), {
        "mine.py": MODULE, "recipes/a.yaml": LLM, "conf/model/own.yaml": "_target_: mine.Model\nwidht: 3\n",
    }, imports=True),
    Bad("fit recipe=llm data.path=nothing.txt", DATA, ("nothing.txt",), imports=True),
    Bad("fit recipe=llm data.path=empty.txt", DATA, ("empty.txt",), {"empty.txt": ""}, imports=True),
    Bad("fit recipe=llm data.path=bad.jsonl", DATA, ("bad.jsonl",), {"bad.jsonl": "{no\n"}, imports=True),
    Bad("fit recipe=resnet50 data.path=images", DATA, ("images",), {"images/": ""}, imports=True),
    Bad("fit recipe=vision batch.effective=5000", DATA, ("5000", "batch.effective="), imports=True),
    Bad("fit recipe=vision model.channels=[4000000]", FIT, ("GiB",), imports=True),
]  # fmt: skip


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GATRAIN_DEBUG", raising=False)
    return folder


def prepare(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def work_s() -> float:
    """Processor seconds of this process and of its children that ended: waiting is not work."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def check_message(code: int, err: str, bad: Bad) -> None:
    assert code == bad.code, err
    assert err.count("error: ") == 1, err
    message = err[err.index("error: ") :]
    for noise in ("Traceback", "full_key", "object_type", "hydra.cc", "This is a mistake in gatrain"):
        assert noise not in message
    for part in bad.parts:
        assert part in message, message


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.words.replace("/", "|"))
def test_bad_input(bad: Bad, cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(cwd, bad.files)
    before, start = listing(cwd), work_s()
    with pytest.raises(SystemExit) as ended:
        cli.main(bad.words.split(" "))
    used = work_s() - start
    out, err = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    check_message(ended.value.code, err, bad)
    assert out == ""
    assert listing(cwd) == before
    if bad.code not in (DATA, FIT):
        assert used < (IMPORT_LIMIT_S if bad.imports else LIMIT_S)


def test_there_are_fifty() -> None:
    assert len({(bad.words, *bad.files.items()) for bad in BAD}) >= 50


@pytest.mark.parametrize("words", ["fit recipe=lmm", "fit recipe=llm optimizer.lrr=1", "fitt"])
def test_a_real_process_tells_it_within_three_seconds(words: str, cwd: Path) -> None:
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "gatrain", *words.split(" ")]
        done = subprocess.run(command, capture_output=True, text=True)
        fastest = min(fastest, time.perf_counter() - start)
        assert done.returncode == CONFIG
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert fastest < LIMIT_S
    assert not list(cwd.iterdir())


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        listener.bind(("", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_port_in_use(cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with taken_port() as port:
        endpoint = f"--nnodes 2 --rdzv-endpoint localhost:{port}"
        bad = Bad(f"launch {endpoint} recipe=llm run.dir=run", LAUNCH, (f"port {port}", "in use"))
        test_bad_input(bad, cwd, capfd)


def test_a_run_folder_in_use(cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(cwd / "run")
    run_dir.path.mkdir()
    with locked(run_dir):
        holder = f"process {os.getpid()}"
        bad = Bad("fit recipe=llm run.dir=run", FOLDER, ("is in use", holder, "run.dir="))
        test_bad_input(bad, cwd, capfd)
    with locked(run_dir):
        pass  # it was let go


def test_a_run_that_saved_nothing(cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from gatrain.compose import compose

    prepare(cwd, {"run/config.yaml": compose(["recipe=llm"]).yaml, "run/overrides.txt": "recipe=llm\n"})
    test_bad_input(Bad("resume run", STATE, ("no saved state", "gatrain resume", "--from-start")), cwd, capfd)
    bad = Bad("resume run batch.effective=3", CONFIG, ("batch.effective=3", "batch.micro"))
    test_bad_input(bad, cwd, capfd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (cwd / "fixed").mkdir(mode=0o500)
    test_bad_input(Bad("fit recipe=llm run.dir=fixed/run", FOLDER, ("cannot be written",)), cwd, capfd)
