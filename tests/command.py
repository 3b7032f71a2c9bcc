"""`gatrain` commands of a test, and the environment that they have."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from warm import Warm

REPO = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """This one's, for a machine without a GPU, with the package of this repository."""
    path = ":".join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **more}


@functools.cache
def warm_program() -> Path:
    """The `gatrain` of `warm`, whose folder may stand on a PATH."""
    process = Warm()
    atexit.register(process.close)
    return process.program


def run(
    *words: str, cwd: Path | None = None, timeout_s: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it prints is in ``stdout`` and ``stderr``."""
    return subprocess.run(
        [str(warm_program()), *words],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def gatrain(folder: Path, *words: str, expect: int = 0, **env: str) -> str:
    """Run a command in ``folder``, which must end with the exit code; returns all that it printed."""
    done = run(*words, cwd=folder, **env)
    assert done.returncode == expect, f"{words} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def start(folder: Path, *words: str, **env: str) -> subprocess.Popen[bytes]:
    """Start a command as users do, in a session of its own: for tests that send it signals."""
    return subprocess.Popen(
        [sys.executable, "-m", "gatrain", *words],
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes], limit_s: float = 90) -> None:
    """Wait until a process has made a file."""
    deadline = time.monotonic() + limit_s
    while not path.exists():
        assert process.poll() is None, f"the run ended with {process.returncode} before {path.name} was there"
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)


def project(folder: Path, module: str, recipe: str, name: str = "mine") -> Path:
    """Make ``folder`` a user's: a module NAME.py and a recipe NAME."""
    (folder / f"{name}.py").write_text(module)
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / f"{name}.yaml").write_text(recipe)
    return folder


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
