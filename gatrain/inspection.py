"""A look at the user's work before anything is spent on it, in a process that ends and gives its memory back.

The parent asks with `inspect_run`, or with `begin_inspection` where it has something else to do meanwhile; the
child (`python -m gatrain.inspection FOLDER`) imports every `_target_`, reads the data, and builds the model,
without memory where that works. What is remembered (`gatrain.facts`) needs no child, and the parent never imports
torch.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from gatrain import imports, offspring, scratch, targets
from gatrain.assets import cache_dir
from gatrain.causes import told
from gatrain.config import RunConfig
from gatrain.dependencies import State, Watch, named_paths, own_modules
from gatrain.errors import EXIT_CODES, ConfigError, DataError, GatrainError, WorkerError, nearest
from gatrain.facts import NODES, facts_key, is_known_code, keep, recall
from gatrain.facts import RunFacts as RunFacts
from gatrain.rundir import write_json, write_text

_CONFIG, _RESULT, _STDERR = "config.yaml", "result.json", "stderr.txt"


def check_modules(config: RunConfig, cwd: Path) -> None:
    """Look for the top-level module of every `_target_` without importing it: the quick half of the check.

    Raises:
        ConfigError: a module that is neither installed nor in ``cwd``.
    """
    for key in NODES:
        node = getattr(config, key)
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


def inspect_run(config_yaml: str, cwd: Path | None = None, remember: bool = True) -> RunFacts:
    """Check targets, data and model of a composed configuration, in a child process unless it is remembered.

    Args:
        config_yaml: the configuration as `gatrain.compose` writes it.
        cwd: folder whose modules `_target_` may name; default the current one.
        remember: False looks again, whatever is remembered. What is found is kept either way; errors never are.

    Raises:
        ConfigError, DataError: as found by the child, with its message.
    """
    with begin_inspection(config_yaml, cwd, remember) as inspection:
        return inspection.facts()


def begin_inspection(
    config_yaml: str, cwd: Path | None = None, remember: bool = True, config: RunConfig | None = None
) -> Inspection:
    """Begin what `inspect_run` does. Close what is returned, or use it as a context manager.

    Args:
        config: what the YAML says, where that is known: reading it back takes a tenth of a second.

    Raises:
        OSError: the child cannot be started.
    """
    where = (cwd or Path.cwd()).resolve()
    config = config if config is not None else _read(config_yaml)
    key = facts_key(config, where) if config is not None else None
    known = recall(key, config) if key is not None and config is not None and remember else None
    if known is not None:
        return Inspection(known)
    folder = scratch.make("gatrain-inspect-")
    try:
        write_text(folder / _CONFIG, config_yaml, mode=0o600)
        return Inspection(None, folder, key, _start(folder, where))
    except BaseException:
        scratch.remove(folder)
        raise


class Inspection:
    """A look that is under way, or remembered. As a context manager it ends its child, come what may."""

    def __init__(
        self,
        known: RunFacts | None,
        folder: Path | None = None,
        key: str | None = None,
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.is_remembered = known is not None
        """Whether the answer is there without a child."""
        self._known = known
        self._folder = folder
        self._key = key
        self._child = child

    def facts(self) -> RunFacts:
        """What was found; waits for the child.

        Raises:
            ConfigError, DataError: as found by the child, with its message.
        """
        if self._known is None:
            try:
                self._known = self._answer()
            finally:  # also when the wait is interrupted
                self.close()
        return self._known

    def close(self) -> None:
        """End the child if it still runs, and remove its folder."""
        if self._child is not None:
            offspring.end(self._child)  # with whatever the user's data has started
        if self._folder is not None:
            scratch.remove(self._folder)

    def __enter__(self) -> Inspection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> RunFacts:
        assert self._child is not None
        assert self._folder is not None
        status = self._child.wait()
        try:
            result = json.loads((self._folder / _RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = b""
            with contextlib.suppress(OSError):
                said = (self._folder / _STDERR).read_bytes()
            tail = "\n".join(said.decode(errors="replace").strip().splitlines()[-3:])
            raise GatrainError(
                f"looking at the model and data failed (exit status {status}).\n{tail}"
            ) from None
        if "error" in result:
            raise EXIT_CODES.get(result["exit_code"], GatrainError)(result["error"])
        found = RunFacts.from_dict(result["facts"])
        if self._key is not None and result["reads"] is not None:
            keep(self._key, found, result["reads"])
        return found


def _read(config_yaml: str) -> RunConfig | None:
    """None where it is not right: the child says what is wrong."""
    from gatrain.compose import load_config

    with scratch.folder("gatrain-inspect-") as folder:
        path = folder / _CONFIG
        path.write_text(config_yaml, encoding="utf-8")
        try:
            return load_config(path)
        except ConfigError:
            return None


def _start(folder: Path, cwd: Path) -> subprocess.Popen[bytes]:
    with (folder / _STDERR).open("wb") as said:  # a file never fills up, as a pipe that nobody reads does
        env = {offspring.SOCKETS: str(scratch.sockets_of(folder))}
        return offspring.start(["-m", "gatrain.inspection", str(folder)], cwd=cwd, env=env, said=said)


# --- the child ------------------------------------------------------------------------------------------


class _Again(Exception):
    """The model could not be made; in a fresh process nothing is left of the attempt without memory."""


def _look(config: RunConfig, really: bool = False) -> RunFacts:
    import torch

    from gatrain import build
    from gatrain.tasks.streams import Stream
    from gatrain.train.checkpointing import available_modes
    from gatrain.train.data_look import compare_classes, look_at_data
    from gatrain.train.main_gradients import half_names, half_parameters
    from gatrain.train.modules import batch_norms, mode_remarks

    build.check_targets(config)
    task, source = build.build_task_and_source(config)
    samples = len(task.train_data)
    is_endless = isinstance(task.train_data, Stream) and not task.train_data.is_whole
    if samples < config.batch.effective and not is_endless:
        raise DataError(
            f"the training data has {samples} samples, fewer than batch.effective={config.batch.effective}. "
            f"Use batch.effective={samples} or less, or more data."
            if samples
            else "the training data is empty."
        )
    data = look_at_data(task, source)
    remarks = [*data.warnings(), *compare_classes(data.report, config.model)]
    try:
        if really:
            model = build.build_model(task, config.train.seed, torch.device("cpu"))
        else:
            model = build.model_for_a_look(task, config.train.seed)
    except Exception as error:
        if really:
            raise
        raise _Again from error
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError(f"the model {type(model).__name__} has no parameter to train.")
    half = half_parameters(model)
    own = getattr(task.train_data, "fingerprint", None)
    return RunFacts(
        samples=samples,
        eval_samples=len(task.eval_data) if task.eval_data is not None else 0,
        fingerprint=str(own) if own else f"{type(task.train_data).__qualname__}:{samples}",
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        checkpointing_modes=available_modes(model),
        half_parameters=sum(parameter.numel() for parameter in half),
        half_dtypes=half_names(parameter.dtype for parameter in half),
        batch_norms=tuple(batch_norms(model)),
        synchronises=any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()),
        remarks=(*remarks, *mode_remarks(model)),
        data=data,
        code=tuple(own_modules()),
    )


def _main(folder: Path, really: bool) -> None:
    from gatrain.compose import load_config

    result: dict[str, Any]
    try:
        config = load_config(folder / _CONFIG)
        gc.disable()
        import torch  # noqa: F401

        gc.enable()
        gc.freeze()  # a collection need not look through torch again and again
        watch = None if is_known_code(config) else Watch()
        found = _look(config, really)
        reads: dict[str, State] | None = {}
        if watch is not None:
            named = named_paths({key: getattr(config, key) for key in NODES}, Path.cwd())
            reads = watch.reads([cache_dir(), *(each.path for each in named)])
        result = {"facts": asdict(found), "reads": reads}
    except GatrainError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    except _Again:
        command = [sys.executable, imports.SAFE_PATH, "-m", "gatrain.inspection", str(folder), "--really"]
        os.execv(sys.executable, command)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        text = told(error, "looking at the model and data failed: ")
        result = {"error": text, "exit_code": WorkerError.exit_code}
    write_json(folder / _RESULT, result)


if __name__ == "__main__":
    offspring.die_with_parent()
    imports.use_working_folder()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # nothing here may take GPU memory
    _main(Path(sys.argv[1]), "--really" in sys.argv)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(0)  # taking torch apart, module by module, takes as long as a third of its import
