"""The shape of the code: imports run one way, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gatrain"

# a room may import the rooms named here and what they may import; those of OPEN all may
ROOMS: dict[str, set[str]] = {
    "disk": set(),
    "errors": set(),
    "batch": set(),
    "units": set(),
    "secrets": set(),
    "trust": set(),
    "target_rules": set(),
    "imports": set(),
    "targets": {"doors", "imports", "target_rules"},
    "config_checks": set(),
    "optimizer_config": {"config_checks"},
    "batch_rule": set(),
    "batch_stages": set(),
    "phase_config": {"codec", "optimizer_config"},
    "config": {"batch_rule", "batch_stages", "phase_config"},
    "assets": set(),
    "doors": set(),
    "settings": {"config", "doors"},
    "json_schema": {"doors", "settings"},
    "main_memory": set(),
    "nvml": set(),
    "hardware": {"config", "main_memory", "nvml", "schema"},
    "guardian": set(),
    "offspring": {"guardian", "imports"},
    "scratch": {"guardian"},
    "causes": set(),
    "signatures": set(),
    "child": {"causes", "imports", "offspring", "rundir", "scratch"},
    "construction": set(),
    "sources": {"imports"},
    "models": set(),
    "optimizers": set(),
    "data": {"assets", "batch", "rundir", "train.order", "train.seeding"},
    "tasks": {"construction", "train.order", "train.seeding"},
    "schema": set(),
    "codec": {"schema"},
    "plan": {"batch", "codec", "config"},
    "rundir": {"plan"},
    "states": {"codec", "commands", "rundir"},
    "commands": {"rundir"},
    "recorded": {"commands", "data.compare", "data.report", "rundir"},
    "compose": {"settings", "codec", "commands", "config", "assets", "rundir"},
    "train": {
        "assets",
        "commands",
        "disk",
        "causes",
        "config",
        "batch",
        "batch_rule",
        "data.compare",
        "data.report",
        "main_memory",
        "offspring",
        "optimizers",
        "plan",
        "rundir",
        "states",
        "tasks",
    },
    "noise_advice": set(),
    "hooks": {"config", "noise_advice", "train"},
    "loops": {"tasks", "train"},
    "launch": {"causes", "doors", "imports", "offspring", "rundir", "plan", "scratch"},
    "rank": {"hardware", "launch"},
    "report": {
        "commands",
        "disk",
        "rundir",
        "plan",
        "batch",
        "data.report",
        "predict",
        "config",
        "explain.row",
        "noise_advice",
        "train.records",
        "train.events",
    },
    "build": {"causes", "config", "construction", "doors", "plan", "signatures", "targets", "tasks", "train"},
    "inspected": {"data.report", "schema", "sources"},
    "inspection": {"build", "child", "codec", "compose", "inspected"},
    "outdated": {"recorded", "train"},
    "data_view": {"build", "child", "compose", "data.report", "train"},
    "tune": {
        "batch",
        "batch_rule",
        "build",
        "compose",
        "inspected",
        "hardware",
        "launch",
        "plan",
        "rank",
        "rundir",
        "tasks",
        "units",
    },
    "predict": {
        "batch",
        "build",
        "child",
        "codec",
        "compose",
        "config",
        "hardware",
        "plan",
        "rundir",
        "scratch",
        "tasks",
        "train",
    },
    "worker": {"build", "compose", "outdated", "rank", "recorded", "report", "train"},
    "verify": {"batch", "build", "compose", "inspection", "launch", "rank", "train", "tune"},
    "explain": {"batch_rule", "build", "commands", "inspected", "noise_advice", "plan", "tune"},
    "fit": {
        "batch_rule",
        "commands",
        "disk",
        "doors",
        "compose",
        "inspection",
        "launch",
        "noise_advice",
        "recorded",
        "states",
        "tune",
    },
    "cli": {
        "assets",
        "doors",
        "json_schema",
        "settings",
        "data_view",
        "explain",
        "imports",
        "fit",
        "report",
        "verify",
    },
    "start": {"cli", "imports"},
}
OPEN = {"errors", "labels", "units", "secrets", "trust", "__version__"}
THIRD_PARTY = {
    "typer": {"cli"},
    "rich": {"cli", "report"},
    "hydra": {"compose"},
    "omegaconf": {"build", "compose"},
    "torch": {
        "hooks", "loops", "optimizers",
        "build", "construction", "data", "hardware", "inspection", "launch", "models", "predict", "rank", "report",
        "tasks", "train", "tune", "verify", "worker",
    },
    "torchvision": {"data", "hooks", "models"},
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> list[tuple[Path, str, bool]]:
    """(file, dotted name, whether it is at the top of the file) of every import in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found += [(path, alias.name, id(node) in top) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "gatrain":
                    names = [f"gatrain.{alias.name}" for alias in node.names]
                found += [(path, name, id(node) in top) for name in names]
    assert len(found) > 300
    return found


def reachable(room: str) -> set[str]:
    """Rooms that ``room`` may import: those named and those that these may."""
    allowed: set[str] = set()
    for name in ROOMS.get(room, set()):
        allowed |= {name} | reachable(name)
    return allowed


def test_imports_run_one_way() -> None:
    wrong = []
    for path, name, _ in imports():
        room, parts = room_of(path), name.split(".")
        if parts[0] != "gatrain" or len(parts) < 2 or room not in ROOMS:
            continue
        target = parts[1]
        allowed = reachable(room) | {room} | OPEN
        if target not in allowed and ".".join(parts[1:3]) not in allowed:
            wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_what_plans_imports_nothing_of_the_trials() -> None:
    """The parent starts trial processes by module name: no model, and no GPU, ever comes into it."""
    trials = "gatrain.tune.trials"
    users = {path.relative_to(PACKAGE) for path, name, _ in imports() if f"{name}.".startswith(f"{trials}.")}
    assert users
    assert {path.parts[:2] for path in users} == {("tune", "trials")}
    code = f"import gatrain.tune, sys; print([m for m in sys.modules if m == 'torch' or m.startswith('{trials}')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_room_is_above_itself() -> None:
    for room in ROOMS:
        assert room not in reachable(room)


def test_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, name, _ in imports()
        if (library := name.split(".")[0]) in THIRD_PARTY and room_of(path) not in THIRD_PARTY[library]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["gatrain", "gatrain.cli", "gatrain.config", "gatrain.launch.local"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print({{'torch', 'hydra', 'numpy', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_is_quick() -> None:
    """By the time of the processor: another program on the machine is no fault of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "gatrain", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_only_build_makes_objects_from_configuration() -> None:
    """Hydra's own maker of objects is used nowhere: what a configuration names goes through one door."""
    assert not [path for path, name, _ in imports() if name.startswith(("hydra.utils", "hydra._internal"))]
    users = {room_of(path) for path, name, _ in imports() if name == "gatrain.targets"}
    assert users == {"build", "inspection"}


def test_nothing_unpickles() -> None:
    """No file that gatrain reads may run code: no pickle, no torch.load, no YAML beyond OmegaConf's safe loader."""
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        for word in ("import pickle", "torch.load(", "yaml.load(", "eval(", "exec("):
            lines = [line for line in source.splitlines() if word in line and ".eval(" not in line]
            assert not lines, f"{path.name}: {lines}"


def test_every_file_that_contributors_are_sent_to_is_there() -> None:
    rows = [
        line
        for line in (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    named = 0
    for row in rows:
        folder = PACKAGE
        for word in re.findall(r"`([\w/]+\.py)`", row):
            places = [folder / word, PACKAGE / word, PACKAGE.parent / word]  # beside the one before, say
            found = next((place for place in places if place.is_file()), None)
            assert found is not None, f"{word} in: {row}"
            folder, named = found.parent, named + 1
    assert named > 50
