"""Where the last state of a run goes when its own folder takes none: nothing that was trained is thrown away."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from gatrain import commands, disk
from gatrain.assets import cache_dir
from gatrain.errors import GatrainError
from gatrain.rundir import RunDir

FOLDER = "gatrain-rescued"


def rescue(run_dir: RunDir, step: int, error: OSError, save: Callable[[Path], Path]) -> str:
    """Write the state elsewhere, and say where it is and what to type.

    Args:
        error: why the run folder did not take it.
        save: writes it below a folder and returns its own.
    """
    problem = f"the state of step {step} could not be written to {run_dir.saved}: {disk.reason(error)}."
    then = f"{disk.remedy(error)}, then:"
    path = _saved_elsewhere(run_dir, save)
    if path is not None:
        saved, quoted = commands.quoted(str(run_dir.saved)), commands.quoted(str(path))
        move = f"mkdir -p {saved} && mv {quoted} {saved} && {commands.resume(run_dir)}"
        return f"{problem} It is saved in {path} instead. {then} {move}"
    if steps := run_dir.saved_steps():
        return (
            f"{problem} Nor was there any other place for it; step {steps[-1]} is saved. "
            f"{then} {commands.resume(run_dir)}"
        )
    return f"{problem} Nor was there any other place for it. {then} {commands.start_over(run_dir)}"


def _saved_elsewhere(run_dir: RunDir, save: Callable[[Path], Path]) -> Path | None:
    for place in (cache_dir, lambda: Path(tempfile.gettempdir())):
        folder = None
        try:
            folder = place() / FOLDER / f"{run_dir.path.name[:100]}-{uuid.uuid4().hex[:8]}"
            folder.mkdir(parents=True, mode=0o700)
            return save(folder)
        except (OSError, GatrainError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    return None
