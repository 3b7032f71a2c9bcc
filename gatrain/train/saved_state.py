"""Saved states: model, optimizer and progress on disk, complete or absent, and never a pickle.

A state is a folder ``step_00000100`` with safetensors and JSON and a manifest of sizes and SHA-256 sums. It is
written under a temporary name, flushed, and renamed; older states are removed only after that. Reading checks
every sum and falls back to the newest state that is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gatrain.errors import SavedStateError
from gatrain.rundir import fsync, read_json, write_json
from gatrain.train.main_gradients import MasterWeights

MODEL, OPTIMIZER, PROGRESS, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "manifest.json",
)
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing-"
_MASTER = "master"
"""Key of a 16-bit parameter's fp32 master weight, beside the optimizer's own."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come. ``step`` (consumed windows) is the only position in the data."""

    step: int
    samples: int
    tokens: int
    effective_batch: int
    seed: int
    data_samples: int
    """Size of the training data: the permutation depends on it."""
    scaler: dict[str, float] | None = None
    drop_last: bool = False
    """Whether epochs end with their last full window: the windows depend on it."""
    updates: int = 0
    """Updates of the parameters: the position in the learning-rate schedule."""
    skipped: int = 0
    """Windows that made no update: not finite, or without any label."""
    skipped_in_row: int = 0
    """Those of them at the end."""
    nonfinite_in_row: int = 0
    """Windows at the end that were not finite."""
    moved: bool = False
    """Some gradient was not zero."""


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    masters: MasterWeights | None = None,
) -> Path:
    """Write one saved state under ``folder`` and remove those beyond the newest ``keep`` (0 keeps all).

    Called by rank 0 only. Waits for the device. ``masters`` are what the optimizer steps in place of 16-bit
    parameters.

    Raises:
        OSError: it could not be written (disk full); earlier states are untouched and nothing is left over.
    """
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    try:
        temporary.mkdir()
        tensors, aliases = _unique_tensors(model)
        save_file(tensors, temporary / MODEL, metadata={"format": "pt"})
        state, scalars = _optimizer_state(model, optimizer, masters)
        save_file(state, temporary / OPTIMIZER)
        write_json(temporary / PROGRESS, {**vars(progress), "aliases": aliases, "optimizer": scalars})
        manifest = {name: _fingerprint(temporary / name) for name in (MODEL, OPTIMIZER, PROGRESS)}
        for name in manifest:
            fsync(temporary / name)
        write_json(temporary / MANIFEST, manifest)
        fsync(temporary)
        if final.exists():  # a state of the same step from before a fallback: replaced whole
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if type(error).__module__.startswith("safetensors"):  # it wraps the system's error
            raise OSError(str(error)) from error
        raise
    if keep:
        for _, old in _numbered(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def weights_path(folder: Path, step: int) -> Path:
    """Where `save` puts the model's weights of a step. Tied weights lie there once: `safetensors.torch.load_model`
    fills a model from the file, ``load_state_dict`` would miss the other names."""
    return folder / f"step_{step:08d}" / MODEL


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest saved state whose files are all whole, and what is wrong with each newer one."""
    problems: list[str] = []
    for _, path in _numbered(folder):
        problem = find_damage(path)
        if problem is None:
            return path, problems
        problems.append(f"{path.name}: {problem}")
    return None, problems


def find_damage(path: Path) -> str | None:
    """Compare a saved state with its manifest; None if it is whole."""
    if path.is_symlink():
        return "is a symbolic link"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (MODEL, OPTIMIZER, PROGRESS):
            if (path / name).is_symlink():
                return f"{name} is a symbolic link"
            if manifest[name] != _fingerprint(path / name):
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({error})"
    return None


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None = None
) -> Progress:
    """Fill model and optimizer from a saved state, in place, and return its progress.

    Raises:
        SavedStateError: the state belongs to another model or optimizer; the differences are listed.
    """
    data = read_json(path / PROGRESS)
    aliases, scalars = data.pop("aliases"), data.pop("optimizer")
    tensors = load_file(path / MODEL)
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    _check_same_tensors(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    state = load_file(path / OPTIMIZER)
    if masters is not None:
        owners = {name: parameter for parameter, name in _names(model, None).items()}
        saved = {f"{name}/{_MASTER}": parameter for name, parameter in owners.items()}
        masters.load({saved[place]: state.pop(place) for place in [*state] if place in saved})
    _load_optimizer(path, model, optimizer, state, scalars, masters)
    return Progress(**{"updates": data["step"], "moved": True, **data})


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Saved states, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _remove_leftovers(folder: Path) -> None:
    """A process that was killed while writing leaves a temporary folder; only one run writes here."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and the names under which tied ones appear again."""
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise SavedStateError(f"the model's state {name!r} is a {type(value).__name__}, not a tensor.")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = value.detach().cpu().contiguous()
    return tensors, aliases


def _names(model: nn.Module, masters: MasterWeights | None) -> dict[Tensor, str]:
    """The name of each parameter that the optimizer may step."""
    return {
        masters.of(parameter) if masters is not None else parameter: name
        for name, parameter in model.named_parameters()
    }


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state by parameter name: tensors as ``<parameter>/<key>``, everything else as JSON."""
    names = _names(model, masters)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"class": type(optimizer).__name__, "values": {}}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            place = f"{names[parameter]}/{key}"
            if isinstance(value, Tensor):
                tensors[place] = value.detach().cpu().contiguous()
            else:
                scalars["values"][place] = value
    for _, master in masters.weights() if masters is not None else ():
        tensors[f"{names[master]}/{_MASTER}"] = master.detach().cpu().contiguous()
    return tensors, scalars


def _load_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
    masters: MasterWeights | None,
) -> None:
    if scalars["class"] != type(optimizer).__name__:
        raise SavedStateError(
            f"{path} was saved with the optimizer {scalars['class']}, "
            f"but this run uses {type(optimizer).__name__}."
        )
    parameters = {name: parameter for parameter, name in _names(model, masters).items()}
    for place, value in {**tensors, **scalars["values"]}.items():
        name, _, key = place.rpartition("/")
        if name not in parameters:
            raise SavedStateError(f"{path} has optimizer state for {name!r}, which the model does not have.")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            # fused optimizers keep the step count on the device, the others on the host
            stays = key == "step" and not any(group.get("fused") for group in optimizer.param_groups)
            value = value if stays else value.to(parameter.device)
            if key != "step" and value.shape == parameter.shape:
                value = torch.empty_like(parameter).copy_(value)  # the parameter's memory layout
        optimizer.state[parameter][key] = value


def _check_same_tensors(path: Path, wanted: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    differences = [f"{name} is missing" for name in wanted if name not in given]
    differences += [f"{name} is not in the model" for name in given if name not in wanted]
    for name in wanted.keys() & given.keys():
        ours, theirs = wanted[name], given[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            differences.append(
                f"{name} is {theirs.dtype} {list(theirs.shape)}, the model has {ours.dtype} {list(ours.shape)}"
            )
    if differences:
        shown = "; ".join(sorted(differences)[:5]) + ("; ..." if len(differences) > 5 else "")
        raise SavedStateError(f"{path} belongs to another model: {shown}.")


def check_same_run(progress: Progress, expected: Progress) -> None:
    """Refuse to go on from a state whose windows are not this run's windows.

    Raises:
        SavedStateError: names each number that differs.
    """
    names = {
        "effective_batch": "batch.effective",
        "seed": "train.seed",
        "data_samples": "the number of training samples",
        "drop_last": "train.drop_last",
    }
    differences = [
        f"{label} was {getattr(progress, name)} and is {getattr(expected, name)}"
        for name, label in names.items()
        if getattr(progress, name) != getattr(expected, name)
    ]
    if differences:
        raise SavedStateError(
            f"the saved state of step {progress.step} belongs to other windows: {'; '.join(differences)}. "
            "Restore those values, or start a new run."
        )
