"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


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


@pytest.fixture
def weird_tmp_path(tmp_path: Path) -> Path:
    """A folder whose name holds what quoting gets wrong."""
    path = tmp_path / "we ird, 'single' \"double\" [a]{b}=é"
    path.mkdir()
    return path
