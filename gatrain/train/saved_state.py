"""The tensors of a saved state: model, optimizer and progress, complete or absent, and never a pickle.

A state is written under a temporary name, flushed, and renamed; older states are removed only after that. What is
read is compared with the model and the optimizer before any of it reaches them. `gatrain.states` has the folders.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gatrain.errors import RunFolderError, SavedStateError
from gatrain.rundir import fsync, list_states, write_json
from gatrain.states import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PROGRESS,
    TEMPORARY,
    check_same_run,
    fingerprint,
    finish_interrupted,
    past_the_end,
    put_in_place,
    read_contents,
    read_part,
    remember_whole,
    remove_old,
    tensors_file,
    text_file,
)
from gatrain.states import Progress as Progress
from gatrain.states import find_damage as find_damage
from gatrain.states import newest_valid as newest_valid
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.parts import join, split
from gatrain.train.saved_optimizer import listed, optimizer_state, optimizer_values, take_masters


@dataclass(frozen=True)
class Snapshot:
    """A state on the host, ready to be written: all that needs the device is done."""

    progress: Progress
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name -> tensors by name. What was on a CPU already is not copied: write it before the next step."""
    texts: Mapping[str, Any]
    """File name -> what it holds as JSON."""


def snapshot(
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masters: MasterWeights | None = None,
    parts: Mapping[str, Any] | None = None,
    exports: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Snapshot:
    """Bring one state to the host. Called by rank 0 only. Waits for the device.

    Args:
        masters: what the optimizer steps in place of 16-bit parameters.
        parts: further parts by name (`gatrain.train.parts` says what one may hold).
        exports: further weights of the model, each by the name of its file.

    Raises:
        SavedStateError: a part holds what no file can hold.
    """
    weights, aliases = _unique_tensors(model.state_dict())
    state, scalars = optimizer_state(model, optimizer, masters)
    tensors = {MODEL: weights, OPTIMIZER: state}
    written = {**vars(progress), "aliases": aliases, "optimizer": scalars}
    texts: dict[str, Any] = {PROGRESS: written}
    for name, values in (exports or {}).items():
        tensors[tensors_file(name)] = _unique_tensors(values)[0]
    for name, part in (parts or {}).items():
        texts[text_file(name)], tensors[tensors_file(name)] = split(part, name)
        written.setdefault("parts", []).append(name)
    return Snapshot(progress, tensors, texts)


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    masters: MasterWeights | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """`snapshot` and `write` in one, of a state without further parts."""
    return write(folder, snapshot(progress, model, optimizer, masters), keep, tell)


def write(folder: Path, state: Snapshot, keep: int, tell: Callable[[str], None] = lambda text: None) -> Path:
    """Write one saved state under ``folder`` and remove those beyond the newest ``keep`` whole ones (0 keeps all).

    Called by rank 0 only. ``tell`` hears of what was in the way.

    Raises:
        OSError: it could not be written (disk full); earlier states are untouched and nothing is left over.
    """
    progress = state.progress
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}-{os.getpid()}"
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fsync(folder.parent)
    for path in folder.glob(f"{TEMPORARY}*"):  # left by a process that was killed; only one run writes here
        shutil.rmtree(path, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, tensors in state.tensors.items():
            save_file(_without_overlap(tensors), temporary / name, metadata={"format": "pt"})
        for name, text in state.texts.items():
            write_json(temporary / name, text, exact=True)
        _follow_umask(temporary, state.tensors)
        manifest = {name: fingerprint(temporary / name) for name in (*state.tensors, *state.texts)}
        for name in manifest:
            fsync(temporary / name)
        write_json(temporary / MANIFEST, manifest, exact=True)
        fsync(temporary)
        put_in_place(temporary, final, tell)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # it wraps the system's error
            raise OSError(str(error)) from error
        raise
    remember_whole(final)
    if keep:
        with contextlib.suppress(RunFolderError, OSError):  # the state is there all the same
            remove_old(folder, progress.step, keep)
    return final


def _without_overlap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with memory of its own for each: safetensors refuses what lies in two tensors, such as one tensor
    that an optimizer has put into each of its groups, or a view that a hook keeps beside the whole."""
    found, end = dict(tensors), 0
    for name, value in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if value.numel() and value.data_ptr() < end:
            found[name] = value.clone()
        end = max(end, value.data_ptr() + value.numel() * value.element_size())
    return found


def weights_path(folder: Path, step: int) -> Path:
    """Where `save` puts the model's weights of a step. Tied weights lie there once: `safetensors.torch.load_model`
    fills a model from the file, ``load_state_dict`` would miss the other names."""
    return folder / f"step_{step:08d}" / MODEL


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A state on the host that fits a model and an optimizer; nothing of it has reached them yet."""

    path: Path
    progress: Progress
    tensors: dict[str, Tensor]
    optimizer: list[tuple[Tensor, str, Any]]
    """(parameter that is stepped, key, value)."""
    masters: dict[Tensor, Tensor]
    """16-bit parameter of the model -> fp32 weight."""
    parts: dict[str, Any]
    """Further parts by name, as they were given to `snapshot`."""

    def fill(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None
    ) -> Progress:
        """Put everything into the model and the optimizer that it was read for, in place."""
        model.load_state_dict(self.tensors)
        if masters is not None:
            masters.load(self.masters)
        groups = optimizer.param_groups
        on_device = {id(p) for g in groups if g.get("fused") or g.get("capturable") for p in g["params"]}
        for parameter, key, value in self.optimizer:
            if isinstance(value, Tensor):
                # fused optimizers keep the step count on the device, the others on the host
                value = (
                    value if key == "step" and id(parameter) not in on_device else value.to(parameter.device)
                )
                if key != "step" and value.shape == parameter.shape:  # the parameter's memory layout
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            optimizer.state[parameter][key] = value
        return self.progress


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None = None
) -> Progress:
    """Fill model and optimizer from a saved state, in place, and return its progress.

    Raises:
        SavedStateError: the state belongs to another model or optimizer, or is odd; nothing was changed.
    """
    return read(path, model, optimizer, masters).fill(model, optimizer, masters)


def newest_usable(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masters: MasterWeights | None,
    expected: Progress,
    total_steps: int,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Loaded | None, list[str]]:
    """The newest state that is whole and fits, and what is wrong with each newer one.

    Raises:
        SavedStateError: it is of a later step than the run has.
        RunFolderError: the folder cannot be listed.
    """
    finish_interrupted(folder)
    problems: list[str] = []
    for _, path in reversed(list_states(folder)):
        problem = find_damage(path)
        if problem is None:
            try:
                check_same_run(read_contents(path).progress, expected)
                loaded = read(path, model, optimizer, masters)
                progress = loaded.progress
                _check_scaler(path, progress, scaler)
            except SavedStateError as error:
                problem = str(error).removeprefix(f"{path} ")
            else:
                if progress.step > total_steps:
                    raise past_the_end(path, progress.step, total_steps)
                return loaded, problems
        problems.append(f"{path.name}: {problem}")
    return None, problems


def read(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None = None
) -> Loaded:
    """Read a saved state and compare it with the model and the optimizer, which are left alone.

    Raises:
        SavedStateError: it belongs to another model or optimizer, or something in it is not possible.
    """
    try:
        contents = read_contents(path)
    except (RunFolderError, ValueError) as error:
        raise SavedStateError(f"{path} cannot be read ({error})") from error
    tensors = _with_aliases(path, model, _tensors_of(path / MODEL), contents.aliases)
    _check_same_tensors(path, model.state_dict(), tensors)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_finite(tensors[name]):
            raise SavedStateError(f"{path} has the parameter {name} with a value that is not finite.")
    state = _tensors_of(path / OPTIMIZER)
    if contents.tensors is not None and contents.tensors != len(state):
        raise SavedStateError(f"{path} has {len(state)} tensors of the optimizer, not {contents.tensors}.")
    weights = take_masters(path, model, masters, state, contents.progress)
    return Loaded(
        path,
        contents.progress,
        tensors,
        optimizer_values(path, model, optimizer, masters, state, contents),
        weights,
        {name: _part(path, name) for name in contents.parts},
    )


def _part(path: Path, name: str) -> Any:
    try:
        return join(read_part(path, name), _tensors_of(path / tensors_file(name)))
    except (RunFolderError, ValueError) as error:
        raise SavedStateError(f"{path} has a part {name!r} that cannot be read ({error}).") from error


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SavedStateError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error


def _with_aliases(
    path: Path, model: nn.Module, tensors: dict[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """All names of the model's state: tied weights are in the file once."""
    owners: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            tied[name] = owners[id(parameter)]
        owners.setdefault(id(parameter), name)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, target in aliases.items():
        if target not in tensors or name in tensors:
            raise SavedStateError(f"{path} gives {name} as a second name of {target}, which it is not.")
        if name in parameters and tied.get(name, name) != tied.get(target, target):
            raise SavedStateError(
                f"{path} belongs to another model: {name} and {target} are one tensor there, and two in the model."
            )
    whole = tensors | {name: tensors[target] for name, target in aliases.items()}
    for name, target in tied.items():
        if name in whole and target in whole and not torch.equal(whole[name], whole[target]):
            raise SavedStateError(
                f"{path} belongs to another model: {name} and {target} are two tensors there, and one in the model."
            )
    return whole


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
        raise SavedStateError(f"{path} belongs to another model: {listed(differences)}.")


def _check_scaler(path: Path, progress: Progress, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None or progress.scaler is None:
        return
    usual, given = scaler.state_dict(), progress.scaler
    if usual.keys() != given.keys() or not all(
        type(given[key]) is type(usual[key]) and (given[key] > 0 or key.startswith("_")) for key in usual
    ):
        raise SavedStateError(f"{path} has a loss scale that cannot be.")


def _is_finite(tensor: Tensor) -> bool:
    # PyTorch cannot ask this of floats of one byte
    return not tensor.is_floating_point() or tensor.element_size() == 1 or bool(torch.isfinite(tensor).all())


# --- writing --------------------------------------------------------------------------------------------


def _follow_umask(temporary: Path, names: Iterable[str]) -> None:
    """safetensors makes its files private; these get the permissions of any other file here."""
    mode = stat.S_IMODE((temporary / PROGRESS).stat().st_mode)
    for name in names:
        (temporary / name).chmod(mode)


def _unique_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with each tensor once, and the names under which tied ones appear again."""
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SavedStateError(f"the model's state {name!r} is a {type(value).__name__}, not a tensor.")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = value.detach().cpu().contiguous()
    return tensors, aliases
