"""Fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatrain import offspring


def _nothing(*_: object) -> None:
    pass


# nohup, a shell's `&` and some schedulers start this process with signals ignored, which every process that a test
# starts would inherit. A handler that does nothing is as good here and is not inherited.
for _signum in (*offspring.STOP_SIGNALS, signal.SIGQUIT, signal.SIGTSTP):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _nothing)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep measurements and tokenised texts of the tests out of the user's cache, for child processes too."""
    patch = pytest.MonkeyPatch()
    if "GATRAIN_CACHE" not in os.environ:  # xdist workers and outer runs may share one
        patch.setenv("GATRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        patch.delenv(name)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _no_keyed_forward_before() -> Iterator[None]:
    """Whose keyed dropout was drawn last is known to the whole process: no test sees that of another."""
    yield
    if (functions := sys.modules.get("gatrain.train.dropout.functions")) is not None:
        functions.current.draws = functions.current.last = None


@pytest.fixture
def weird_tmp_path(tmp_path: Path) -> Path:
    """A folder whose name holds what quoting gets wrong."""
    path = tmp_path / "we ird, 'single' \"double\" [a]{b}=é"
    path.mkdir()
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test works in a folder of its own, with a cache in it."""
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"
