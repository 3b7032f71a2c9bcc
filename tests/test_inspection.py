"""What is remembered of a look at model and data: it answers at once, and only while nothing has changed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gatrain import dependencies, facts, inspection
from gatrain.compose import compose
from gatrain.dependencies import named_state
from gatrain.errors import ConfigError, DataError, GatrainError
from gatrain.inspection import RunFacts, begin_inspection, inspect_run

FOUND = {
    "samples": 100, "eval_samples": 5, "fingerprint": "Data:100", "parameters": 7, "parameter_bytes": 28,
    "checkpointing_modes": ["none", "full"],
}  # fmt: skip
CHILD = "import sys; open(sys.argv[1] + '/result.json', 'w').write(sys.argv[2])"
TINY = (
    "recipe=llm", "data.path=text.txt", "data.vocab_size=300", "data.context=8", "data.eval_fraction=0.2",
    "model.layers=1", "model.heads=1", "model.width=8", "batch.effective=8",
)  # fmt: skip


@dataclass
class Looks:
    """Stands for the child: says what is put into ``result``, and counts how often it was asked."""

    result: dict[str, Any] = field(default_factory=lambda: {"facts": FOUND, "reads": {}})
    count: int = 0

    def start(self, folder: Path, cwd: Path) -> subprocess.Popen[bytes]:
        self.count += 1
        return subprocess.Popen([sys.executable, "-S", "-c", CHILD, str(folder), json.dumps(self.result)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a module of one's own, and an empty cache."""
    folder = tmp_path / "here"
    (folder / "images" / "cat").mkdir(parents=True)
    (folder / "images" / "cat" / "1.png").write_bytes(b"1")
    (folder / "text.txt").write_text("some words and more of them\n" * 200)
    (folder / "mine.py").write_text("import helper\n")
    (folder / "helper.py").write_text("SIZE = 3\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    stand_in = Looks()
    monkeypatch.setattr(inspection, "_start", stand_in.start)
    return stand_in


def run(effective: int = 32, **nodes: Any) -> str:
    """A stored configuration; YAML takes JSON."""
    known = {
        "model": {"_target_": "gatrain.models.gpt.GPT", "width": 8},
        "data": {"_target_": "gatrain.data.TextWindows", "path": "text.txt"},
        "task": {"_target_": "gatrain.tasks.LanguageModel"},
        "batch": {"effective": effective},
        "train": {"steps": 5},
    }
    return json.dumps({**known, **nodes})


OWN = {"data": {"_target_": "mine.points"}}
MODEL = {"model": {"_target_": "mine.net"}}
IMAGES = {"data": {"_target_": "torchvision.datasets.ImageFolder", "root": "images"}}
NESTED = {"model": {"_target_": "torch.nn.Identity", "parts": [1, {"a": ["b", "images"]}]}}
PATTERN = {"data": {"_target_": "gatrain.data.TextWindows", "path": "images/**/*.txt"}}
FLAT = {"data": {"_target_": "gatrain.data.TextWindows", "path": "*.txt"}}


def stored() -> list[Path]:
    return list((facts.cache_dir() / "facts").glob("*"))


def test_the_second_look_asks_nobody(here: Path, looks: Looks) -> None:
    first = inspect_run(run())
    assert first == RunFacts(100, 5, "Data:100", 7, 28, ("none", "full"))
    began = time.perf_counter()
    assert inspect_run(run()) == first
    assert time.perf_counter() - began < 0.5
    assert looks.count == 1
    with begin_inspection(run(), here) as inspection:
        assert inspection.is_remembered
        assert inspection.facts() == inspection.facts() == first


# --- what it depends on ---------------------------------------------------------------------------------


def touch(path: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: os.utime(path, ns=(1, 1))


def write(path: str, text: str) -> Callable[[pytest.MonkeyPatch], None]:
    def act(patch: pytest.MonkeyPatch) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)

    return act


def swap_unseen(patch: pytest.MonkeyPatch) -> None:
    """Another file of the same size and the same mtime."""
    before = os.stat("text.txt")
    Path("other").write_text("SOME WORDS AND MORE OF THEM\n" * 200)
    os.utime("other", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace("other", "text.txt")


def upgrade(package: str) -> Callable[[pytest.MonkeyPatch], None]:
    version = importlib.metadata.version

    def act(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(importlib.metadata, "version", lambda name: "99" if name == package else version(name))

    return act


def an_hour_later(patch: pytest.MonkeyPatch) -> None:
    now = time.time()
    patch.setattr(time, "time", lambda: now + 3601)


def other_environment(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("SOMETHING", "else")


def edited_gatrain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(facts, "hash_files", lambda paths: "other")


def new_python(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "version", "4.0")


@pytest.mark.parametrize(
    ("nodes", "change"),
    [
        pytest.param({}, touch("text.txt"), id="data touched"),
        pytest.param({}, write("text.txt", "longer" * 999), id="data rewritten"),
        pytest.param({}, swap_unseen, id="data replaced, same size and mtime"),
        pytest.param(IMAGES, write("images/cat/2.png", ""), id="image added"),
        pytest.param(IMAGES, write("images/dog/1.png", ""), id="class added"),
        pytest.param(IMAGES, lambda patch: os.remove("images/cat/1.png"), id="image removed"),
        pytest.param(NESTED, write("images/cat/2.png", ""), id="named inside lists, in the model"),
        pytest.param(PATTERN, write("images/cat/2.txt", ""), id="pattern matches more, deep"),
        pytest.param(PATTERN, write("images/cat/1.png", "longer"), id="within a pattern's reach, rewritten"),
        pytest.param(FLAT, write("more.txt", ""), id="pattern matches more, here"),
        pytest.param(OWN, write("mine.py", "pass\n"), id="module edited"),
        pytest.param(MODEL, write("helper.py", "SIZE = 4\n"), id="module beside it edited"),
        pytest.param({}, upgrade("torch"), id="torch upgraded"),
        pytest.param(IMAGES, upgrade("torchvision"), id="torchvision upgraded"),
        pytest.param({}, new_python, id="another Python"),
        pytest.param({}, edited_gatrain, id="gatrain edited"),
        pytest.param(OWN, an_hour_later, id="own data, an hour later"),
        pytest.param(MODEL, an_hour_later, id="own model, an hour later"),
        pytest.param(OWN, other_environment, id="own code, other environment"),
    ],
)
def test_a_change_is_looked_at(
    here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch, nodes: dict[str, Any], change: Any
) -> None:
    inspect_run(run(**nodes))
    inspect_run(run(**nodes))
    assert looks.count == 1
    change(monkeypatch)
    inspect_run(run(**nodes))
    assert looks.count == 2


@pytest.mark.parametrize(
    "other",
    [
        run(effective=7),
        run(train={"steps": 99, "seed": 3}, optimizer={"name": "adamw", "lr": 0.5}, precision="bf16"),
    ],
)
def test_what_changes_no_answer_is_no_part_of_it(here: Path, looks: Looks, other: str) -> None:
    inspect_run(run())
    inspect_run(other)
    assert looks.count == 1


@pytest.mark.parametrize(
    "change", [other_environment, an_hour_later, write("helper.py", ""), write("b/new.txt", "")]
)
def test_known_code_depends_on_what_it_names_alone(
    here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    inspect_run(run())
    change(monkeypatch)
    inspect_run(run())
    assert looks.count == 1


def test_files_that_the_code_was_seen_to_read_count(here: Path, looks: Looks) -> None:
    sizes = here.parent / "sizes.json"
    looks.result["reads"] = {str(sizes): None, str(here): dependencies.file_state(str(here))}
    inspect_run(run(**OWN))
    inspect_run(run(**OWN))
    assert looks.count == 1
    sizes.write_text("{}")
    inspect_run(run(**OWN))
    assert looks.count == 2
    looks.result["reads"] = None  # the child says that it cannot tell
    sizes.write_text("[]")
    inspect_run(run(**OWN))
    inspect_run(run(**OWN))
    assert looks.count == 4


def test_another_folder_is_another_run(here: Path, looks: Looks, tmp_path: Path) -> None:
    digits = run(data={"_target_": "gatrain.data.Digits"})
    inspect_run(digits)
    inspect_run(digits, tmp_path)
    assert looks.count == 2


def test_asking_anew_keeps_what_was_found(here: Path, looks: Looks) -> None:
    inspect_run(run())
    looks.result["facts"] = {**FOUND, "samples": 99}
    assert inspect_run(run(), remember=False).samples == 99
    assert inspect_run(run()).samples == 99
    assert looks.count == 2


# --- nothing is lost ------------------------------------------------------------------------------------


def test_a_memory_refuses_no_run(here: Path, looks: Looks) -> None:
    inspect_run(run())
    message = "the training data has 100 samples, fewer than batch.effective=101."
    looks.result = {"error": message, "exit_code": 4}
    with pytest.raises(DataError, match="100 samples"):
        inspect_run(run(effective=101))
    assert looks.count == 2  # it was looked at again
    assert inspect_run(run(effective=100)).samples == 100
    assert looks.count == 2


def test_errors_are_not_remembered(here: Path, looks: Looks) -> None:
    looks.result = {"error": "model: no", "exit_code": 2}
    for _ in range(2):
        with pytest.raises(ConfigError, match="model: no"):
            inspect_run(run())
    assert looks.count == 2
    assert stored() == []


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", "{}", '{"version": 1}', "\0",
        lambda text: text.replace('"samples": 100', '"samples": "100"'),
        lambda text: text.replace('"samples": 100', '"samples": -1'),
        lambda text: text.replace('"reads": {}', '"reads": {"text.txt": [1]}'),
        lambda text: text.replace('"reads": {}', '"reads": 3'),
        lambda text: text.replace('"version": 2', '"version": 0'),
        lambda text: text.replace('"made": ', '"made": "x", "was": '),
        lambda text: text.replace('["none", "full"]', "[1]"),
    ],
)  # fmt: skip
def test_a_damaged_memory_is_ignored(here: Path, looks: Looks, damage: Any) -> None:
    inspect_run(run(**MODEL))
    (path,) = stored()
    text = path.read_text()
    damaged = damage if isinstance(damage, str) else damage(text)
    assert damaged != text
    path.write_text(damaged)
    assert inspect_run(run(**MODEL)).samples == 100
    assert looks.count == 2
    assert inspect_run(run(**MODEL)).samples == 100  # and it is whole again
    assert looks.count == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("GATRAIN_CACHE", str(here / "file" / "below"))
    assert inspect_run(run()).samples == inspect_run(run()).samples == 100
    assert looks.count == 2
    monkeypatch.setenv("GATRAIN_CACHE", "/proc/gatrain")
    assert inspect_run(run()).samples == 100


def test_a_full_disk_leaves_nothing(here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(facts, "write_text", full)
    assert inspect_run(run()).samples == 100
    assert stored() == []


def test_the_oldest_are_dropped(here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MAX_FILES", 3)
    for width in range(5):
        inspect_run(run(model={"_target_": "gatrain.models.gpt.GPT", "width": width}))
        for path in stored():
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns - 10**9))
    assert len(stored()) == 3
    inspect_run(run(model={"_target_": "gatrain.models.gpt.GPT", "width": 4}))
    assert looks.count == 5


def test_no_secret_is_written(here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2-environment")
    inspect_run(run(data={"_target_": "mine.points", "token": "hunter2-value", "also": "${oc.env:TOKEN}"}))
    (path,) = stored()
    assert "hunter2" not in path.read_text() + path.name
    assert path.stat().st_mode & 0o077 == 0


def test_a_child_that_dies_tells_why(here: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: Path, cwd: Path) -> subprocess.Popen[bytes]:
        with (folder / "stderr.txt").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", "raise SystemExit('out of luck')"], stderr=said
            )

    monkeypatch.setattr(inspection, "_start", start)
    with pytest.raises(GatrainError, match=r"exit status 1(.|\n)*out of luck"):
        inspect_run(run())


# --- the child is ended ---------------------------------------------------------------------------------


def sleeper(patch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    children: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, cwd: Path) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]))
        return children[-1]

    patch.setattr(inspection, "_start", start)
    return children


def test_closing_ends_the_child_and_removes_its_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = sleeper(monkeypatch)
    began = time.perf_counter()
    with begin_inspection(run()) as inspection:
        assert not inspection.is_remembered
        folder = inspection._folder
        assert folder is not None
        assert folder.is_dir()
    inspection.close()  # once more does no harm
    assert time.perf_counter() - began < 10
    assert children[0].returncode == -signal.SIGKILL
    assert not folder.exists()


def test_an_answer_leaves_nothing_to_close(here: Path, looks: Looks) -> None:
    inspection = begin_inspection(run())
    assert inspection.facts().samples == 100
    assert inspection._folder is not None
    assert not inspection._folder.exists()
    assert inspection.facts().samples == 100


def test_ctrl_c_ends_the_child(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = sleeper(monkeypatch)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            inspect_run(run())
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert children[0].returncode == -signal.SIGKILL


# --- looking at folders ---------------------------------------------------------------------------------


def test_a_look_at_many_files_is_bounded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (here / "images" / f"class{number}").mkdir()
        (here / "images" / f"class{number}" / "1.png").write_bytes(b"1")
    monkeypatch.setattr(dependencies, "MAX_ENTRIES", 60)
    before = named_state("images", here)
    assert before == named_state("images", here)
    assert before[0][1][1] == 60
    (here / "images" / "class9" / "2.png").write_bytes(b"")  # not reached itself, but its folder was
    assert named_state("images", here) != before


def test_a_slow_disk_ends_the_look(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (here / "images" / f"{number}.png").write_bytes(b"")
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 70)  # 0.15 s are over after 11 entries
    (name, (_, count, _)), (other, (_, none, _)) = named_state(["images", "."], here)
    assert (other, name) == ("images", ".")
    assert count == 8
    assert none == 0


def test_odd_values_name_nothing(here: Path) -> None:
    (here / "circle").symlink_to(here, target_is_directory=True)
    (here / "nowhere").symlink_to(here / "gone")
    odd = [
        "",
        "no\0path",
        "x" * 5000,
        "~nobody-of-this-name/x",
        "nowhere",
        3,
        None,
        True,
        {"a": ("missing",)},
    ]
    assert named_state(odd, here) == []
    assert named_state("circle", here)[0][1][1] < 20
    ours = {"_target_": "gatrain.data.TextWindows", "cache_dir": "images", "path": "text.txt"}
    assert [text for text, _ in named_state(ours, here)] == ["text.txt"]


# --- what code is seen to read --------------------------------------------------------------------------


def watched(code: str) -> dict[str, Any] | None:
    """What a `Watch` in a process of its own says of ``code``, which runs as an imported module."""
    Path("watched.py").write_text(code)
    os.utime("watched.py", ns=(1, 1))
    script = (
        "import json, sys; from pathlib import Path; from gatrain.dependencies import Watch; watch = Watch();"
        "sys.path.insert(0, '.'); import watched; print(json.dumps(watch.reads([Path('images').resolve()])))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    result: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return result


def test_reads_are_seen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # writing __pycache__ is no change
    reads = watched(
        "import helper, os, contextlib, json\n"
        "open('text.txt').read(); os.listdir('..'); open('images/cat/1.png', 'rb'); open('out.log', 'w')\n"
        "with contextlib.suppress(OSError): open('not there')\n"
    )
    assert reads is not None
    own = {path for path in reads if "site-packages" not in path}
    names = {"watched.py", "helper.py", "text.txt", "not there"}
    assert own == {*(str(here / name) for name in names), str(here.parent)}
    assert reads[str(here / "not there")] is None
    assert reads[str(here / "text.txt")] == dependencies.file_state(str(here / "text.txt"))


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import sqlite3; sqlite3.connect(':memory:')",
        "import socket, contextlib\nwith contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9))",
        "open('new.txt', 'w').write('x'); open('new.txt').read()",  # written while it was looked at
        "[open(f'missing{i}', 'a+').close() for i in range(1100)]",
    ],
)
def test_code_that_asks_elsewhere_is_not_remembered(here: Path, code: str) -> None:
    assert watched(code) is None


# --- the real child -------------------------------------------------------------------------------------


def test_a_real_look_and_its_memory(here: Path) -> None:
    yaml = compose(TINY, here).yaml
    first = inspect_run(yaml)
    assert first.parameters > 0
    assert first.checkpointing_modes == ("none", "selective", "full")
    script = (
        "import sys, time; began = time.perf_counter(); from gatrain.inspection import begin_inspection;"
        "inspection = begin_inspection(sys.argv[1]); found = inspection.facts().samples;"
        "print(inspection.is_remembered, found, 'torch' in sys.modules, time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", script, yaml], capture_output=True, text=True, check=True)
    remembered, samples, loaded_torch, seconds = done.stdout.split()
    assert (remembered, int(samples), loaded_torch) == ("True", first.samples, "False")
    assert float(seconds) < 1.0
    began = time.perf_counter()
    assert inspect_run(yaml) == first
    assert time.perf_counter() - began < 0.5
    most = compose([*TINY[:-1], f"batch.effective={first.samples}"], here).yaml
    with begin_inspection(most) as inspection:
        assert inspection.is_remembered
    too_many = most.replace(f"effective: {first.samples}", f"effective: {first.samples + 1}")
    with pytest.raises(DataError, match=f"has {first.samples} samples, fewer than batch.effective="):
        inspect_run(too_many)
    (here / "text.txt").write_text("something else\n" * 900)
    assert inspect_run(yaml).samples != first.samples


def test_a_run_of_ones_own_code(here: Path) -> None:
    (here / "sizes.json").write_text("[500, 16]")
    (here / "mine.py").write_text(
        "import json, torch\n"
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Linear(4, json.load(open('sizes.json'))[1]), nn.ReLU())\n"
        "def points():\n"
        "    x = torch.randn(json.load(open('sizes.json'))[0], 4)\n"
        "    return torch.utils.data.TensorDataset(x, x)\n"
    )
    yaml = run(
        **OWN,
        **MODEL,
        loss={"_target_": "torch.nn.MSELoss"},
        task={"_target_": "gatrain.tasks.Supervised"},
    )
    assert inspect_run(yaml).parameters == 5 * 16
    with begin_inspection(yaml) as inspection:
        assert inspection.is_remembered
        assert inspection.facts().samples == 500
    (here / "sizes.json").write_text("[400, 8]")
    found = inspect_run(yaml)
    assert (found.samples, found.parameters) == (400, 5 * 8)


def test_the_parent_can_work_while_the_child_looks(here: Path) -> None:
    yaml = compose(TINY, here).yaml
    began = time.perf_counter()
    with begin_inspection(yaml) as inspection:
        assert time.perf_counter() - began < 0.5
        assert not inspection.is_remembered
        assert inspection.facts().samples > 0
