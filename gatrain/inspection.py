"""An inspection of the user's model and data before anything is spent on them, in a process that ends.

The parent asks with `inspect_run`, or with `begin_inspection` where it has something else to do meanwhile; the
child (`python -m gatrain.inspection FOLDER`) imports every `_target_`, reads the data, and builds the model,
without memory where that works. The parent never imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from gatrain import child, codec, doors, imports, targets
from gatrain.child import Child
from gatrain.config import OPEN_NODES, RunConfig
from gatrain.errors import ConfigError, DataError, nearest
from gatrain.inspected import Inspected
from gatrain.sources import file_states, named_files, own_modules

FAILED = "inspecting the model and the data failed"
_CONFIG, _REALLY = "config.yaml", "--really"


def check_modules(config: RunConfig, cwd: Path) -> None:
    """Look for the top-level module of every `_target_` without importing it: the quick half of the check.

    Raises:
        ConfigError: a module that is neither installed nor in ``cwd``.
    """
    parts = [(key, getattr(config, key)) for key in OPEN_NODES]
    parts += [(key, getattr(config, key).node) for key in ("optimizer", "schedule")]
    parts += [each for door in doors.SHIPPED for each in doors.nodes_of(door, getattr(config, door))]
    for key, node in parts:
        for path, each in targets.nodes(key, node):
            targets.check_name(path, str(each["_target_"]), cwd)
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


def inspect_run(config_yaml: str, cwd: Path | None = None) -> Inspected:
    """Check targets, data and model of a composed configuration, in a child process.

    Args:
        config_yaml: the configuration as `gatrain.compose` writes it.
        cwd: folder whose modules `_target_` may name; default the current one.

    Raises:
        GatrainError: as found by the child, with its message.
    """
    return inspected(begin_inspection(config_yaml, cwd))


def begin_inspection(config_yaml: str, cwd: Path | None = None) -> Child:
    """Begin what `inspect_run` does. Close what is returned, or use it as a context manager.

    Raises:
        OSError: the child cannot be started.
    """
    return Child("gatrain.inspection", {_CONFIG: config_yaml}, FAILED, cwd=cwd)


def inspected(inspection: Child) -> Inspected:
    """What an inspection found; waits for it.

    Raises:
        GatrainError: as found by the child, with its message.
    """
    return codec.decode(Inspected, inspection.result(), finite=False)


# --- the child ------------------------------------------------------------------------------------------


def _work(folder: Path, words: list[str]) -> dict[str, Any]:
    from gatrain.compose import load_config

    found: dict[str, Any] = codec.encode(_inspect(load_config(folder / _CONFIG), folder, _REALLY in words))
    return found


def _inspect(config: RunConfig, folder: Path, really: bool) -> Inspected:
    import numpy as np
    import torch

    from gatrain import build
    from gatrain.tasks.streams import Stream
    from gatrain.train.checkpointing import available_modes
    from gatrain.train.data_look import compare_classes, look_at_data
    from gatrain.train.main_gradients import gradient_bytes, half_names, half_parameters
    from gatrain.train.modules import mode_remarks
    from gatrain.train.token_windows import TokenWindows

    nodes = {key: getattr(config, key) for key in OPEN_NODES}
    files = file_states(named_files(nodes, Path.cwd()))
    build.check_targets(config)
    task, source = build.build_task_and_source(config)
    samples = len(task.train_data)
    is_endless = isinstance(task.train_data, Stream) and not task.train_data.is_whole
    mean_tokens = 0.0
    if config.batch.counts_tokens:
        windows = build.window_schedule(config, task)  # refuses what has no lengths
        mean_tokens = float(np.mean(windows.lengths)) if isinstance(windows, TokenWindows) else 0.0
    elif samples < config.batch.largest and not is_endless:
        raise DataError(
            f"the training data has {samples} samples, fewer than batch.effective={config.batch.largest}. "
            f"Use batch.effective={samples} or less, or more data."
            if samples
            else "the training data is empty."
        )
    data = look_at_data(task, source)
    remarks = [*data.warnings(), *compare_classes(data.report, config.model)]
    norm = build.build_norm(config)
    try:
        if really:
            model = build.build_model(task, config.train.seed, torch.device("cpu"), norm=norm)
        else:
            model = build.model_for_a_look(task, config.train.seed, norm)
    except Exception:
        if really:
            raise
        # in a fresh process nothing is left of the attempt without memory
        command = [sys.executable, imports.SAFE_PATH, "-m", "gatrain.inspection", str(folder), _REALLY]
        os.execv(sys.executable, command)
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError(f"the model {type(model).__name__} has no parameter to train.")
    optimizer_bytes = build.inspect_optimizer(config, task, model)
    strategy = build.build_strategy(config)
    half = half_parameters(model)
    own = getattr(task.train_data, "fingerprint", None)
    code = own_modules()
    return Inspected(
        samples=samples,
        eval_samples=len(task.eval_data) if task.eval_data is not None else 0,
        fingerprint=str(own) if own else f"{type(task.train_data).__qualname__}:{samples}",
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        checkpointing_modes=available_modes(model),
        half_parameters=sum(parameter.numel() for parameter in half),
        frozen_bytes=sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
        optimizer_bytes=optimizer_bytes,
        gradient_bytes=None if strategy.holds_gradients else max(gradient_bytes(model)),
        half_dtypes=half_names(parameter.dtype for parameter in half),
        batch_norms=tuple(norm.mixing(model)),
        synchronises=any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()),
        running_statistics=norm.running_statistics,
        mean_tokens=mean_tokens,
        remarks=(*remarks, *mode_remarks(model), *norm.remarks(model), *strategy.remarks(model)),
        data=data,
        code=tuple(code),
        files=files | file_states(code),
    )


if __name__ == "__main__":
    child.main(_work, FAILED)
