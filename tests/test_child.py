"""Child processes: their result or their error comes back, and nothing of them stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from gatrain.child import Child
from gatrain.errors import DataError, GatrainError, WorkerError
from gatrain.launch.watch import process_exists

MODULE = """
import os, sys, time
from pathlib import Path
from gatrain import child
from gatrain.errors import DataError

def work(folder, words):
    text = (folder / "asked.txt").read_text()
    if text == "refuse":
        raise DataError("no such data")
    if text == "fail":
        raise ValueError("a mistake of the user's")
    if text == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    if text == "sleep":
        Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
    return {"said": text, "words": words, "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "cwd": os.getcwd()}

if __name__ == "__main__":
    child.main(work, "the work failed")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "at_work.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(text: str, **options: object) -> Child:
    return Child("at_work", {"asked.txt": text}, "the work failed", **options)  # type: ignore[arg-type]


def test_a_result_comes_back_and_nothing_stays(here: Path) -> None:
    with started("hello", words=["--deep"]) as child:
        assert (child.folder / "asked.txt").stat().st_mode & 0o077 == 0
        assert child.result() == {"said": "hello", "words": ["--deep"], "gpus": "", "cwd": str(here)}
        assert not child.folder.exists()
        assert not process_exists(child.pid)
    child.close()  # once more does no harm


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("refuse", DataError, r"^no such data$"),
        ("fail", WorkerError, r"^the work failed: ValueError: a mistake of the user's\n  at .*at_work.py:12"),
        ("die", GatrainError, r"^the work failed \(exit status 3\)\.\nout of luck$"),
    ],
)
def test_an_error_comes_back_with_its_class_and_its_reason(
    text: str, kind: type[GatrainError], message: str
) -> None:
    child = started(text)
    with pytest.raises(GatrainError, match=message) as caught:
        child.result()
    assert type(caught.value) is kind
    assert not child.folder.exists()


def test_closing_ends_it_at_once() -> None:
    with started("sleep") as child:
        assert child.is_running()
        with pytest.raises(TimeoutError):
            child.result(time_limit_s=0.05)
        assert not process_exists(child.pid)
        assert not child.folder.exists()


def test_ctrl_c_ends_it() -> None:
    child = started("sleep")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.result()
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not process_exists(child.pid)


def test_it_ends_with_the_process_that_started_it(here: Path) -> None:
    reader = os.fork()
    if not reader:
        started("sleep")
        time.sleep(60)
    until = time.monotonic() + 30
    while (
        not (pid := (here / "pid").read_text() if (here / "pid").exists() else "")
        and time.monotonic() < until
    ):
        time.sleep(0.02)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    while process_exists(int(pid)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not process_exists(int(pid))
