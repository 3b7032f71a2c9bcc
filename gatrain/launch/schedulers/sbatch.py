"""Slurm's batch jobs: what may be asked of sbatch, the batch file, and its submission."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from gatrain.errors import LaunchError
from gatrain.launch.schedulers import slurm

SAVE_BEFORE_S = 120
"""How long before the time limit the ranks are told to save and stop, in seconds."""

_NAME = (r"[A-Za-z0-9_][A-Za-z0-9_.,@+=:/-]*", "letters, digits and _.,@+=:/-")
_FORMS = {
    "partition": _NAME,
    "account": _NAME,
    "qos": _NAME,
    "constraint": (
        r"[A-Za-z0-9_(\[!][A-Za-z0-9_.,:@+=*&|!()\[\]-]*",
        "Slurm's form, for example a100 or 'a100|h100'",
    ),
    "mem": (r"\d+[KMGT]?", "a size on each node such as 64G (megabytes without a letter; 0 is all of it)"),
    "time": (
        r"(\d+-)?\d+(:\d{1,2}){0,2}|UNLIMITED",
        "minutes, HH:MM:SS or D-HH:MM:SS, for example --time 04:00:00",
    ),
}
"""What each text may be, and how to say so: nothing that is more than one value in a batch file."""


@dataclass(frozen=True)
class Resources:
    """What to ask of Slurm; None leaves it to Slurm's own default.

    Raises:
        LaunchError: a number is below 1, or a value is not of the form that sbatch takes.
    """

    partition: str | None = None
    time: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_gpu: int | None = None
    mem: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    def __post_init__(self) -> None:
        for option, value in self.given().items():
            form, words = _FORMS.get(option, ("", ""))
            if isinstance(value, int):
                if value < 1:
                    raise LaunchError(f"--{option} {value} is below 1, the smallest value allowed.")
            elif not re.fullmatch(form, value):
                raise LaunchError(f"--{option} {value!r} is not what sbatch takes. Write {words}.")

    def given(self) -> dict[str, str | int]:
        """The options that are not left out, by sbatch's names."""
        values = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {option: value for option, value in values.items() if value is not None}

    def words(self) -> list[str]:
        """The options as they are typed."""
        return [word for option, value in self.given().items() for word in (f"--{option}", str(value))]


def batch_file(name: str, output: Path, resources: Resources, command: Sequence[str], *, cwd: Path) -> str:
    """Write the batch file that runs ``command`` once on each node of the job.

    Before the time limit Slurm signals the script, which passes SIGUSR1 on; the ranks save and stop (exit
    code 143), and the job queues itself again. It does so too after pre-emption or a lost node: the command must
    then continue its run.

    Args:
        name: the job's.
        output: file for everything that the job prints; Slurm's ``%j`` is not expanded.
        resources: what to ask of Slurm.
        command: program and arguments, such as ``[sys.executable, "-m", "gatrain", "launch", ...]``.
        cwd: working directory of the command.

    Raises:
        LaunchError: an argument or a path holds a line break or another control character.
    """
    for text in (name, str(output), *command, str(cwd)):
        if re.search(r"[\x00-\x1f\x7f]", text):
            raise LaunchError(
                f"{text!r} holds a line break or control character, which a batch file cannot carry."
            )
    nodes = resources.nodes or 1
    options: dict[str, object] = {
        "job-name": re.sub(r"[^A-Za-z0-9_.-]", "_", name),
        **resources.given(),
        "nodes": nodes,
        "ntasks-per-node": 1,
        "output": _quoted(str(output).replace("%", "%%")),  # % starts one of Slurm's patterns
        "open-mode": "append",
        "signal": f"B:USR1@{SAVE_BEFORE_S}",
    }
    if resources.constraint is not None:
        options["constraint"] = _quoted(resources.constraint)
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items()]
    return _BATCH_FILE.format(
        options="\n".join([*lines, "#SBATCH --requeue"]),
        cwd=shlex.quote(str(cwd)),
        step=shlex.join([*slurm.srun_command(nodes), *command]),
    )


_BATCH_FILE = """\
#!/bin/bash
{options}

cd -- {cwd} || exit 7

{step} &
step=$!
at_limit=
# Slurm sends SIGUSR1 before the time limit: the ranks save and stop.
trap 'at_limit=yes; kill -USR1 "$step"' USR1
trap 'kill -TERM "$step"' TERM
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
# 143: stopped and saved. The job goes on from the saved state when its turn comes again.
if [ -n "$at_limit" ] && [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def submit(batch_file: Path) -> int:
    """Hand a batch file to Slurm and return the job id.

    Raises:
        LaunchError: sbatch is missing, or refuses the file (with its own words).
    """
    printed = slurm.run("sbatch", "--parsable", str(batch_file)).strip()
    with contextlib.suppress(ValueError):
        return int(printed.split(";")[0])
    raise LaunchError(f"sbatch printed {printed!r} where a job id was expected.")


def _quoted(text: str) -> str:
    """For a value in an #SBATCH line, which Slurm's own parser reads."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
