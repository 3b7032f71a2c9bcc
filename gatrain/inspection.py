"""A look at the user's work before anything is spent on it, in a process that ends and gives its memory back.

The parent asks with `inspect_run`; the child (`python -m gatrain.inspection FOLDER`) imports every `_target_`,
reads the data, and builds the model without memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import EXIT_CODES, ConfigError, DataError, GatrainError, nearest
from gatrain.rundir import write_json, write_text

_CONFIG, _RESULT = "config.yaml", "result.json"


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run's model and data before it starts."""

    samples: int
    eval_samples: int
    fingerprint: str
    """Of the training data: its source's own ``fingerprint`` if it has one, else its type and size."""
    parameters: int
    parameter_bytes: int
    checkpointing_modes: tuple[str, ...]
    """Modes of activation checkpointing that the model offers."""


def check_modules(config: RunConfig, cwd: Path) -> None:
    """Look for the top-level module of every `_target_` without importing it: the quick half of the check.

    Raises:
        ConfigError: a module that is neither installed nor in ``cwd``.
    """
    for key in ("model", "data", "loss", "task"):
        node = getattr(config, key)
        target = node.get("_target_") if isinstance(node, dict) else None
        if not isinstance(target, str) or "." not in target:
            continue
        name = target.split(".")[0]
        here = (cwd / name).is_dir() or (cwd / f"{name}.py").is_file()
        if here or name in sys.modules or importlib.util.find_spec(name) is not None:
            continue
        own = [path.stem for path in cwd.glob("*.py")]
        raise ConfigError(
            f"{key}._target_={target} does not import: there is no module {name!r} in {cwd}, and none is "
            f"installed.{nearest(name, own)}"
        )


def inspect_run(config_yaml: str, cwd: Path | None = None) -> RunFacts:
    """Check targets, data and model of a composed configuration in a child process.

    Args:
        config_yaml: the configuration as `gatrain.compose` writes it.
        cwd: folder whose modules `_target_` may name; default the current one.

    Raises:
        ConfigError, DataError: as found by the child, with its message.
    """
    with tempfile.TemporaryDirectory(prefix="gatrain-inspect-") as name:
        folder = Path(name)
        write_text(folder / _CONFIG, config_yaml)
        command = [sys.executable, "-m", "gatrain.inspection", str(folder)]
        child = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
        if not (folder / _RESULT).is_file():
            tail = "\n".join(child.stderr.strip().splitlines()[-3:])
            raise GatrainError(
                f"looking at the model and data failed (exit status {child.returncode}).\n{tail}"
            )
        result = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    if "error" in result:
        raise EXIT_CODES.get(result["exit_code"], GatrainError)(result["error"])
    result["checkpointing_modes"] = tuple(result["checkpointing_modes"])
    return RunFacts(**result)


def _facts(folder: Path) -> RunFacts:
    from gatrain.compose import load_config

    config = load_config(folder / _CONFIG)
    import torch

    from gatrain import build
    from gatrain.train.checkpointing import available_modes

    build.check_targets(config)
    task = build.build_task(config)
    samples = len(task.train_data)
    if samples < config.batch.effective:
        raise DataError(
            f"the training data has {samples} samples, fewer than batch.effective={config.batch.effective}. "
            f"Use batch.effective={samples} or less, or more data."
            if samples
            else "the training data is empty."
        )
    try:
        model = build.build_on_meta(task)
    except GatrainError:
        raise
    except Exception:  # some models compute while they are built
        model = build.build_model(task, config.train.seed, torch.device("cpu"))
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError(f"the model {type(model).__name__} has no parameter to train.")
    own = getattr(task.train_data, "fingerprint", None)
    return RunFacts(
        samples=samples,
        eval_samples=len(task.eval_data) if task.eval_data is not None else 0,
        fingerprint=str(own) if own else f"{type(task.train_data).__qualname__}:{samples}",
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        checkpointing_modes=available_modes(model),
    )


def _main(folder: Path) -> None:
    result: dict[str, Any]
    try:
        result = asdict(_facts(folder))
    except GatrainError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    write_json(folder / _RESULT, result)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # nothing here may take GPU memory
    _main(Path(sys.argv[1]))
