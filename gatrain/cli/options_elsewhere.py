"""Options that other tools have and gatrain has not: what to type instead."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def answer(option: str, arguments: Sequence[str]) -> str | None:
    """A message for an option of Hydra or sbatch; None for any other."""
    if option.partition("=")[0] in ("-m", "--multirun"):
        return _no_multirun(arguments)
    if option.partition("=")[0] in _HYDRAS:
        return f"there is no option '{option.partition('=')[0]}': {_HYDRAS[option.partition('=')[0]]}"
    return _of_sbatch(option) if arguments[0] == "launch" else None


_OF_FOLDERS = (
    "./recipes and ./conf are searched by themselves, and a recipe that lies elsewhere is given by its path: "
    "recipe=/path/to/NAME.yaml."
)
_OF_COMPOSITION = "gatrain show recipe=NAME prints the composed configuration."
_HYDRAS = {
    "--config-dir": _OF_FOLDERS, "--config-path": _OF_FOLDERS, "--config-name": _OF_FOLDERS,
    "-c": _OF_FOLDERS,  # as the first letter of -cd, -cp and -cn is read
    "--cfg": _OF_COMPOSITION, "--info": _OF_COMPOSITION, "--resolve": _OF_COMPOSITION,
}  # fmt: skip
"""Options of Hydra's own command lines."""

_COMMANDS = {
    "train": "gatrain fit", "run": "gatrain fit", "start": "gatrain fit", "tune": "gatrain autotune",
    "predict": "gatrain plan", "estimate": "gatrain plan", "submit": "gatrain launch --slurm",
    "sbatch": "gatrain launch --slurm", "help": "gatrain --help", "version": "gatrain --version",
    "list": "gatrain recipes", "config": "gatrain show", "check": "gatrain verify",
}  # fmt: skip
"""What other tools call a command that there is."""


def command(given: str) -> str | None:
    """A hint for the name of a command as other tools have it; None for any other."""
    meant = _COMMANDS.get(given.lower())
    return f" Did you mean: {meant}?" if meant else None


def _no_multirun(arguments: Sequence[str]) -> str:
    """What to type instead of Hydra's ``-m``."""
    from gatrain.compose.words import as_loop

    words = [word for word in arguments if word not in ("-m", "--multirun")]
    command = ["gatrain", *(word for word in words if "=" not in word or word[0] == "-")]
    loop = as_loop([word for word in words if word not in command[1:]], shlex.join(command))
    text = "gatrain runs one configuration at a time, so there is no -m."
    example = "for lr in 1e-3 3e-3; do gatrain fit recipe=llm optimizer.lr=$lr; done"
    text += f" A loop of the shell runs them one after another{'' if loop else ', for example'}: "
    return text + (loop or example)


_SBATCH = {
    "reservation": "RESERVATION", "gres": "GRES", "array": "ARRAY_INX", "exclusive": "EXCLUSIVE",
    "mem-per-cpu": "MEM_PER_CPU",
    "cpus-per-task": None, "exclude": None, "nodelist": None, "mail-user": None, "mail-type": None, "license": None,
}  # fmt: skip
"""Options of sbatch that gatrain has none for, and the variable by which sbatch takes the same, if any."""


def _of_sbatch(option: str) -> str | None:
    name = option.lstrip("-").partition("=")[0]
    if name not in _SBATCH:
        return None
    variable = _SBATCH[name]
    way = (
        f"sbatch takes it from its environment: SBATCH_{variable}=VALUE gatrain launch --slurm ..."
        if variable
        else f"Print the batch file with --dry-run, add the line #SBATCH --{name}=VALUE, and hand it to sbatch."
    )
    return f"gatrain launch has no option --{name} for Slurm. {way}"
