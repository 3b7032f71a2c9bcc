"""`gatrain launch --slurm`: check the run here, where the user can read it, then hand it to Slurm."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gatrain import batch, commands, trust
from gatrain.commands import OVERWRITE, Again
from gatrain.compose import compose
from gatrain.errors import ConfigError, RunFolderError
from gatrain.fit.claim import check_free, check_length
from gatrain.imports import SAFE_PATH
from gatrain.inspection import check_modules
from gatrain.launch.schedulers import sbatch
from gatrain.launch.schedulers.sbatch import Resources
from gatrain.rundir import RunDir, write_text
from gatrain.secrets import redact

SCRIPT, OUTPUT = "job.sh", "slurm.log"


@dataclass(frozen=True)
class Submission:
    """A batch file, and the job that came of it (None for a dry run)."""

    script: str
    run_dir: Path
    job_id: int | None = None


def submit(
    overrides: Sequence[str],
    resources: Resources,
    *,
    nproc: int | None = None,
    max_restarts: int = 0,
    retune: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Submission:
    """Write a batch file into the run folder and submit it. A requeued job goes on with its run.

    Raises:
        ConfigError, PlanError: the configuration is not right; nothing was submitted.
        LaunchError: Slurm refuses, or an option is out of range.
        RunFolderError: the run folder holds a run or cannot be written.
    """
    composed = compose(overrides)
    for word in overrides:
        if redact(word) != word:
            raise ConfigError(
                f"'{redact(word)}' would stand in the batch file, for everybody to read. Export the secret as a "
                f"variable, such as MY_SECRET, and refer to it: {word.partition('=')[0]}='${{oc.env:MY_SECRET}}'."
            )
    config, cwd = composed.config, Path.cwd().resolve()
    check_modules(config, cwd)
    # relative to the working folder, so that odd characters in its name stay out of the command
    folder = (
        config.run.dir or f"outputs/{composed.recipe}/{config.run.name or time.strftime('%Y-%m-%d_%H-%M-%S')}"
    )
    run_dir = RunDir(cwd / Path(folder).expanduser())
    check_length(run_dir.path)
    per_node = nproc if nproc is not None else resources.gpus_per_node
    if isinstance(config.batch.micro, int):
        world_size = (resources.nodes or 1) * (per_node or 1)
        batch.Split(config.batch.largest, world_size).check_micro_batch(config.batch.micro)
    words = [word for word in overrides if not word.startswith(("run.dir=", "run.name="))]
    words.append(commands.setting("run.dir", folder))
    options = [] if nproc is None else ["--nproc", str(nproc)]
    options += ["--max-restarts", str(max_restarts)] if max_restarts else []
    options += ["--retune"] if retune else []
    again = Again(("launch", "--slurm", *resources.words(), *options, *map(redact, overrides)), cwd)
    check_free(run_dir, again, overwrite)
    options += [OVERWRITE] if overwrite else []
    script = sbatch.batch_file(
        f"gatrain-{composed.recipe}",
        run_dir.path / OUTPUT,
        resources,
        [sys.executable, SAFE_PATH, "-m", "gatrain", "launch", *options, *trust.options(), *words],
        cwd=cwd,
    )
    if dry_run:
        return Submission(script, run_dir.path)
    return Submission(script, run_dir.path, _submit(script, run_dir))


def _submit(script: str, run_dir: RunDir) -> int:
    created = [path for path in (run_dir.path, *run_dir.path.parents) if not path.exists()]
    path = run_dir.path / SCRIPT
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        write_text(path, script, mode=0o700)  # overrides may hold secrets
        return sbatch.submit(path)
    except OSError as error:
        raise RunFolderError(
            f"the run folder {run_dir.path} cannot be written: {error.strerror}. "
            "Choose another with run.dir=FOLDER."
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        for folder in created:  # empty ones only
            with contextlib.suppress(OSError):
                os.rmdir(folder)
