"""No advice in a circle: what a message says to type is typed, in a shell, from exactly that state, and works.

A command in a message ends its line, or stands before " (". So a machine can find it, and people can copy it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer.main
from command import environment, project, warm_program
from safetensors.torch import load_file

from gatrain import cli, commands
from gatrain.rundir import RunDir

PACKAGE = Path(__file__).parent.parent / "gatrain"
NAMES = "|".join(cli.COMMANDS)
COMMAND = re.compile(
    rf"((?:(?:cd|mkdir|mv) [^\n]*? && )*gatrain (?:{NAMES})\b[^\n]*?)(?: \(|$)", re.MULTILINE
)

MODULE = """
import os, signal
import torch

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        trouble, _, when = os.environ.get("TROUBLE", "").partition(":")
        if trouble == "bad" and index == int(when):
            raise OSError("cannot read image_7.jpg: truncated")
        x = torch.tensor([float(index % 7), 1.0])
        return x * float("nan") if trouble == "nan" and index == int(when) else x, index % 2

class Net(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        trouble, _, when = os.environ.get("TROUBLE", "").partition(":")
        if self.training:
            Net.calls += 1
        if when and Net.calls == int(when) and trouble in ("kill", "out of memory", "raise"):
            if trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory.") if trouble != "raise" else ValueError("planted")
        if trouble == "evaluation" and not self.training:
            raise ValueError("planted in the evaluation")
        return super().forward(x)

def net(token="none"):
    return Net(2, 2)

def normed(token="none"):
    return torch.nn.Sequential(torch.nn.BatchNorm1d(2), Net(2, 2))
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: tiny.net, token: none}
data: {_target_: tiny.Points}
task: {eval_fraction: 0.1}
batch: {effective: 4, micro: 2}
train: {steps: 8, seed: 3, log_every: 1, check: false}
precision: fp32
checkpointing: none
compile: false
sync: window
save: {every: 3}
"""


class Place:
    """A user's folder, and a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        project(folder, MODULE, RECIPE, "tiny")

    def environment(self, trouble: str = "", programs: Path = Path(sys.executable).parent) -> dict[str, str]:
        path = f"{programs}:{os.environ['PATH']}"
        return environment(PATH=path, PWD=str(self.folder), TROUBLE=trouble)

    def type(self, line: str, trouble: str = "", cwd: Path | None = None) -> tuple[int, str]:
        """Exit code and output of a line that is typed in bash."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=cwd or self.folder,
            env=self.environment(trouble, warm_program().parent) | {"PWD": str(cwd or self.folder)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done.returncode, done.stdout + done.stderr

    def told(self, line: str, code: int, trouble: str = "", cwd: Path | None = None) -> list[str]:
        """The commands that a line which fails with ``code`` is answered with."""
        found, output = self.type(line, trouble, cwd)
        assert found == code, output
        assert "Traceback" not in output
        return advice_in(output)

    def kill_early(self, line: str, run: Path, signum: int, steps: int = 2) -> None:
        """Start a run that waits in its third step or so, and end it there."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signum)
        process.wait(120)


def advice_in(text: str) -> list[str]:
    """The commands in a message, as they are to be typed."""
    return [found.strip() for found in COMMAND.findall(text)]


def only(commands_told: list[str], word: str) -> str:
    """The one command with this word."""
    (found,) = [each for each in commands_told if word in each]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("a user's") / "folder")


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    """A run that came to its end; tests take copies."""
    code, output = place.type("gatrain fit recipe=tiny run.dir=finished")
    assert code == 0, output
    return place.folder / "finished"


@pytest.fixture(scope="module")
def killed(place: Place) -> Path:
    """A run of two processes, killed before its first state."""
    run = place.folder / "killed"
    words = (
        "launch --nproc 2 recipe=tiny run.dir=killed train.steps=4000 save.every=0 schedule.warmup_steps=0"
    )
    place.kill_early(f"gatrain {words}", run, signal.SIGKILL)
    time.sleep(0.5)  # its ranks end with it
    env = json.loads((run / "env.json").read_text())
    env["command"] = [word.replace("4000", "6") for word in env["command"]]  # the test shall end
    (run / "env.json").write_text(json.dumps(env))
    return run


def copy(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.parent / name))


ODD = [
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "été",
    "a=b",
    "{x}",
    "a,b",
    "${y}",
    "new\nline",
    "back\\slash",
    "#1;&|*?",
]


@pytest.mark.chaos
@pytest.mark.parametrize("name", ['a b, it\'s "x" été=b', "$HOME {x} ${y} #1;&|*? back\\slash", "new\nline"])
def test_a_run_killed_before_its_first_state_is_started_over_in_any_folder(
    place: Place, killed: Path, name: str
) -> None:
    run = copy(killed, name)
    line = only(place.told(commands.typed("resume", run), 8), "--overwrite")
    assert "gatrain launch --nproc 2 recipe=tiny" in line
    assert RunDir(run).saved_entries() == []
    code, output = place.type(line)
    assert code == 0, output
    assert RunDir(run).saved_steps() == [6]


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["2 b'é $=,"])
def test_a_finished_run_is_trained_further_or_replaced_in_any_folder(
    place: Place, finished: Path, name: str
) -> None:
    run = copy(finished, name)
    same = commands.typed("fit", "recipe=tiny", commands.setting("run.dir", name), "train.steps=4")
    further, replaced = place.told(same, 7)
    code, output = place.type(further)
    assert code == 0, output
    assert RunDir(run).saved_steps()[-1] == 16
    code, output = place.type(replaced)
    assert code == 0, output
    assert "Replaced in" in output
    assert RunDir(run).saved_steps() == [3, 4]


@pytest.mark.chaos
def test_a_command_is_right_wherever_it_is_typed(place: Place, killed: Path, tmp_path: Path) -> None:
    run = copy(killed, "from elsewhere")
    line = only(place.told(commands.typed("resume", run), 8, cwd=tmp_path), "--overwrite")
    assert line.startswith("cd ")
    code, output = place.type(line, cwd=tmp_path)
    assert code == 0, output


@pytest.mark.chaos
def test_a_secret_is_not_in_the_command_and_the_run_starts_over_all_the_same(
    place: Place, killed: Path
) -> None:
    run = copy(killed, "secret")
    env = json.loads((run / "env.json").read_text())
    env["command"].append("model.token=<redacted>")
    (run / "env.json").write_text(json.dumps(env))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 4000", "steps: 6"))
    line = only(place.told("gatrain resume secret", 8), "resume")
    assert "--from-start" in line
    code, output = place.type(line)
    assert code == 0, output
    assert RunDir(run).saved_steps() == [6]


@pytest.mark.chaos
def test_a_complete_run_says_how_to_train_on(place: Place, finished: Path) -> None:
    run = copy(finished, "complete")
    (line,) = place.told("gatrain resume complete", 0)
    code, output = place.type(line)
    assert code == 0, output
    assert RunDir(run).saved_steps()[-1] == 16


@pytest.mark.chaos
def test_where_every_state_is_damaged_it_is_said_how_to_start_over(place: Place, finished: Path) -> None:
    run = copy(finished, "damaged")
    for state in RunDir(run).saved.iterdir():
        (state / "model.safetensors").write_bytes(b"rot")
    (run / "summary.json").unlink()
    lines = place.told("gatrain resume damaged", 8)
    assert lines
    code, output = place.type(lines[0])
    assert code == 0, output
    assert RunDir(run).saved_steps()[-1] == 8


TROUBLES: dict[str, tuple[str, str, int, str]] = {
    # trouble, settings, exit code, a word of the command that is taken
    "a sample that is not finite": ("nan:13", "save.every=2", 9, "train.nonfinite=skip"),
    "a sample that is not finite, before a state": ("nan:13", "save.every=0", 9, "train.nonfinite=skip"),
    "out of memory, with a state": ("out of memory:12", "save.every=2", 5, "batch.micro=1"),
    "out of memory, before a state": ("out of memory:5", "save.every=0", 5, "batch.micro=1"),
    "a rank that is killed, with a state": ("kill:12", "save.every=2", 11, "resume"),
    "a rank that is killed, before a state": ("kill:5", "save.every=0", 11, "--overwrite"),
    "an error of the user's, with a state": ("raise:12", "save.every=2", 11, "resume"),
    "an error of the user's, before a state": ("raise:5", "save.every=0", 11, ""),
    "an unreadable sample, with a state": ("bad:7", "save.every=1", 4, "resume"),
    "an error after training": ("evaluation:", "save.every=0", 12, "resume"),
}


@pytest.mark.chaos
@pytest.mark.parametrize("what", TROUBLES)
def test_after_trouble_what_is_said_works(place: Place, what: str) -> None:
    trouble, settings, expected, word = TROUBLES[what]
    name = what.replace(" ", "_").replace("'", "_").replace(",", "_")
    lines = place.told(f"gatrain fit recipe=tiny run.dir={name} {settings} train.steps=9", expected, trouble)
    line = next(each for each in lines if word in each)
    stays = trouble if trouble.startswith("nan") else ""  # all else is mended before
    code, output = place.type(line, stays)
    assert code == 0, output
    assert RunDir(place.folder / name).saved_steps()[-1] == 9


@pytest.mark.chaos
@pytest.mark.parametrize("trouble", ["raise:6", "bad:7"])
def test_no_step_is_lost_to_an_error(place: Place, trouble: str) -> None:
    words = "recipe=tiny model._target_=tiny.normed train.steps=9 save.every=0"
    processes = 2 if trouble.startswith("raise") else 1
    whole, broken = place.folder / f"whole {trouble[:3]}", place.folder / f"broken {trouble[:3]}"
    for run, code, how in ((whole, 0, ""), (broken, 11 if processes == 2 else 4, trouble)):
        folder = commands.quoted(commands.setting("run.dir", str(run)))
        line = f"gatrain launch --nproc {processes} {words} {folder}"
        found, output = place.type(line, how)
        assert found == code, output
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert RunDir(broken).saved_steps() == [steps[-1]]
    found, output = place.type(only(advice_in(output), "resume"))
    assert found == 0, output
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run / "saved" / "step_00000009" / name) for run in (whole, broken))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.chaos
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_with_what_its_folder_says(place: Place, signum: int) -> None:
    name = f"stopped {signum}"
    run = place.folder / name
    same = commands.typed(
        "fit", "recipe=tiny", commands.setting("run.dir", name), "train.steps=3000", "save.every=1"
    )
    place.kill_early(same, run, signum, steps=3)
    line = only(place.told(same, 7), "resume")
    at = RunDir(run).saved_steps()[-1]
    code, output = place.type(f"{line} train.steps={at + 2}")
    assert code == 0, output
    assert RunDir(run).saved_steps()[-1] == at + 2


@pytest.mark.chaos
def test_a_run_that_is_under_way_is_named_and_can_be_stopped(place: Place) -> None:
    run = place.folder / "busy"
    line = "gatrain fit recipe=tiny run.dir=busy train.steps=100000 save.every=0"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line}"], cwd=place.folder, env=place.environment(), stdout=subprocess.DEVNULL
    )
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    for other in (line, f"{line} --overwrite", "gatrain resume busy"):
        code, output = place.type(other)
        assert code == 7, output
        assert f"process {process.pid}" in output
    assert place.type(re.findall(r"kill \d+", output)[0])[0] == 0
    assert process.wait(60) == 143
    assert RunDir(run).saved_steps()


# --- every message --------------------------------------------------------------------------------------------


def _texts() -> list[tuple[str, str]]:
    """(place, text) of every string in the package that is no docstring; what is filled in later is a ``X``."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values]
                found.append((f"{path.name}:{node.lineno}", "".join(parts)))
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in inside | docs
            ):
                found.append((f"{path.name}:{node.lineno}", node.value))
    return found


def _options(command: str) -> set[str]:
    group = typer.main.get_command(cli.app)
    return {option for p in group.commands[command].params for option in p.opts}  # type: ignore[attr-defined]


def test_every_command_and_option_in_a_message_exists() -> None:
    known = set().union(*map(_options, cli.COMMANDS)) | {"--help", "--version", "--nproc-per-node"}
    foreign = {
        "srun", "sbatch", "docker", "pip", "torchrun", "#SBATCH", "scontrol", "Docker", "jupyter", "--keep",
    }  # fmt: skip
    wrong, seen = [], 0
    for where, text in _texts():
        for name in re.findall(r"(?<![\w./-])gatrain ([a-z]+)(?= [a-z]+=| --|$|[.,;:)'`]| X)", text):
            seen += 1
            if name not in cli.COMMANDS and name not in ("needs", "again", "printed"):
                wrong.append(f"{where}: gatrain {name}")
        for command, rest in re.findall(rf"gatrain ({NAMES})((?: --?[\w-]+)+)", text):
            wrong += [
                f"{where}: {command} {option}" for option in rest.split() if option not in _options(command)
            ]
        if any(word in text for word in foreign) or " " not in text:
            continue
        options = re.findall(r"(?<![\w-])(--[a-z][a-z-]+)\b", text)
        wrong += [f"{where}: {option}" for option in options if option not in known]
    assert not wrong, "\n".join(wrong)
    assert seen > 10


def test_commands_that_go_on_with_a_run_are_written_in_one_place() -> None:
    """Elsewhere they would be neither quoted nor in full."""
    written = [
        where
        for where, text in _texts()
        if re.search(r"gatrain (resume|fit|launch)( --?\S+)* X", text)
        and not where.startswith(("commands.py", "rundir.py"))  # the latter is below the former, and quotes
    ]
    assert not written


@pytest.mark.parametrize("name", [*ODD, "-rf", "~", "tab\there", "\x1b[31m", "b'\\'", "ends\\"])
def test_a_shell_reads_back_every_word_that_is_quoted(name: str) -> None:
    line = commands.typed("resume", name)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line.replace("gatrain resume", "printf %s", 1)], capture_output=True)
    assert done.stdout == os.fsencode(name)


@pytest.mark.parametrize("name", [*ODD, "7e91234", "null", "[a]", "b\\'", "ends\\", "\\${z}", "x y "])
def test_a_setting_is_read_back_as_the_text_that_it_was(name: str) -> None:
    from gatrain.compose import compose

    word = commands.setting("run.dir", f"/{name}")
    assert compose(["recipe=llm", "data.path=x", word]).config.run.dir == f"/{name}"


def test_a_machine_finds_the_commands_in_a_message() -> None:
    text = (
        "error: no state. Start again: cd 'a b' && gatrain launch --nproc 2 recipe=x --overwrite (save.every=9).\n"
        "To go on: gatrain resume /a\nWhat helps:\n- less: gatrain resume '/a b' batch.micro=1\n"
    )
    assert advice_in(text) == [
        "cd 'a b' && gatrain launch --nproc 2 recipe=x --overwrite",
        "gatrain resume /a",
        "gatrain resume '/a b' batch.micro=1",
    ]
    assert all(shlex.split(each) for each in advice_in(text))
