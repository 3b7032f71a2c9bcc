"""Machines as they really are: streams, homes, temporary folders, caches and import paths that nobody planned."""

from __future__ import annotations

import contextlib
import getpass  # here: another user may not read the folders of this Python
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatrain import assets, imports
from gatrain.cli import machine
from gatrain.data.cache import build_once
from gatrain.errors import ConfigError, GatrainError, LaunchError, RunFolderError
from gatrain.launch.rendezvous import Rendezvous
from gatrain.launch.world import Nodes, parse_endpoint
from gatrain.rundir import open_run_dir

SMALL = (
    "recipe=llm", "model.layers=1", "model.heads=2", "model.width=16", "data.context=16", "data.vocab_size=300",
    "batch.effective=4", "batch.micro=4", "checkpointing=none", "compile=false", "sync=window", "train.steps=2",
    "schedule.warmup_steps=0", "train.check=off",
)  # fmt: skip
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("the cat sat on the mat and saw a rat\n" * 200)
    return path


def gatrain(
    *words: str | Path, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, "text": True} | options
    command = [sys.executable, "-P", "-m", "gatrain", *map(str, words)]
    return subprocess.run(command, env=os.environ | (env or {}), **given)  # type: ignore[call-overload,no-any-return]


# --- standard streams -----------------------------------------------------------------------------------


def in_shell(redirection: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -P -m gatrain "$@" {redirection}; echo "rc=${{PIPESTATUS[0]}}" >&2'
    return subprocess.run(
        ["bash", "-c", command, "bash", *map(str, words)], stderr=subprocess.PIPE, text=True, timeout=120
    )


def test_training_goes_on_without_standard_streams(cwd: Path, corpus: Path) -> None:
    words = ("fit", *SMALL, f"data.path={corpus}", "run.dir=r")
    command = f'"{sys.executable}" -P -m gatrain "$@" <&- 2>&- >&-'
    done = subprocess.run(["bash", "-c", command, "bash", *words], timeout=200)
    assert done.returncode == 0
    assert (cwd / "r" / "summary.json").is_file()


def test_training_goes_on_with_a_full_disk_under_its_output_and_a_long_tmpdir(
    cwd: Path, corpus: Path
) -> None:
    long = cwd / ("d" * 80)
    long.mkdir()
    words = (*SMALL, f"data.path={corpus}", "train.data_workers=2", "run.dir=r")
    with open("/dev/full", "w") as full:
        done = gatrain("fit", *words, env={"TMPDIR": str(long)}, stdout=full, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "standard output could not be written: No space left on device" in done.stderr
    assert (cwd / "r" / "summary.json").is_file()
    assert not [path for path in long.iterdir() if path.name.startswith(("gatrain", "pymp", "torch_"))]


def test_an_answer_that_cannot_be_written_is_an_error(cwd: Path) -> None:
    done = in_shell(">/dev/full", "show", "recipe=llm")
    assert "error: standard output cannot be written: No space left on device." in done.stderr
    assert "rc=1" in done.stderr


@pytest.mark.parametrize("reader", ["true", "head -1 >/dev/null"])
def test_a_reader_that_has_seen_enough_is_no_error(reader: str, cwd: Path) -> None:
    assert in_shell(f"| {reader}", "show", "recipe=llm").stderr == "rc=0\n"


def test_letters_that_an_output_has_not_are_written_as_codes(cwd: Path) -> None:
    done = gatrain("show", "recipe=llm", "run.name=été", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "run.name" in done.stdout


# --- folders --------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    def use(folder: Path) -> None:
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", None)

    yield use
    tempfile.tempdir = None


def test_a_long_tmpdir_gets_a_short_name_that_sockets_bear(
    cwd: Path, temporary: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = cwd / ("d" * 80)
    long.mkdir()
    temporary(long)
    with machine.settled():
        short = tempfile.gettempdir()
        assert os.environ["TMPDIR"] == short
        assert os.path.realpath(short) == str(long.resolve())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{short}/" + "x" * (machine.LONGEST_SOCKET_BYTES - 1))
        dead = Path(short).with_name(f"gatrain-tmp-{os.getuid()}-999999999-x")
        dead.symlink_to(long)
    assert not os.path.lexists(short)
    temporary(long)
    with machine.settled():  # the next command clears what a killed one has left
        assert not os.path.lexists(dead)


def test_a_tmpdir_that_is_missing_is_replaced_with_a_word(
    cwd: Path, temporary: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    temporary(cwd / "missing")
    with machine.settled():
        assert Path(os.environ["TMPDIR"]).is_dir()
    assert f"TMPDIR={cwd}/missing is no folder that may be written" in capsys.readouterr().err


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f'cd "{gone}" && rmdir "{gone}" && "{sys.executable}" -P -m gatrain show recipe=llm'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == LaunchError.exit_code
    assert "error: the working folder is not there any more" in done.stderr
    assert "Traceback" not in done.stderr


# --- users ----------------------------------------------------------------------------------------------


def as_user(uid: int, work: Callable[[], str], umask: int = 0o022) -> str:
    """What ``work`` returns in a fork that has become another user."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([4242])
            os.setgid(4242)
            os.setuid(uid)
            os.umask(umask)
            os.environ.pop("HOME", None)
            answer = work()
        except GatrainError as error:
            answer = f"{type(error).__name__}: {error}"
        except BaseException as error:
            answer = f"crash: {error!r}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        answer = stream.read()
    os.waitpid(pid, 0)
    return answer


def opened(folder: Path, mode: int) -> Path:
    """Let other users come to a folder of pytest's."""
    for parent in (folder, *folder.parents):
        if parent.name.startswith("pytest-of-"):
            parent.chmod(0o755)
            break
        parent.chmod(0o755)
    folder.chmod(mode)
    return folder


@as_root
def test_a_user_without_home_and_entry_gets_a_cache_for_now(
    cwd: Path, temporary: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GATRAIN_CACHE", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    temporary(opened(cwd, 0o1777))

    def work() -> str:
        with machine.settled():
            assets.cache_dir().mkdir(parents=True)
            return f"{assets.cache_dir()} {getpass.getuser()}"

    home = cwd / "gatrain-home-12345"
    assert as_user(12345, work) == f"{home}/.cache/gatrain uid-12345"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700

    def with_root_as_home() -> str:
        os.environ["HOME"] = "/"
        with machine.settled():
            return str(assets.cache_dir())

    assert as_user(12345, with_root_as_home) == f"{cwd}/gatrain-cache-12345"
    home.rename(cwd / "taken")
    home.mkdir()  # somebody else was here first
    assert "LaunchError" in as_user(12345, work)
    assert "Set HOME=FOLDER" in as_user(12345, work)


@as_root
@pytest.mark.parametrize(("umask", "shared"), [(0o077, False), (0o022, True), (0o002, True)])
def test_two_users_share_a_cache_whatever_their_umask(umask: int, shared: bool, cwd: Path) -> None:
    root = cwd / "cache"
    root.mkdir()
    os.chown(root, 0, 4242)
    opened(root, 0o2775)
    built = cwd / "built"
    built.touch()
    built.chmod(0o666)

    def work() -> str:
        def build(folder: Path) -> None:
            (folder / "tokens.bin").write_bytes(b"data")
            with built.open("a") as file:
                file.write("x")

        folder = build_once("text", {"a": 1}, build, root)
        return f"{folder.name} {(folder / 'tokens.bin').read_bytes().decode()}"

    first = as_user(12345, work, umask)
    assert first.endswith(" data")
    second = as_user(12346, work)
    assert second.endswith(" data"), second
    assert (second == first) is shared
    assert built.read_text() == ("x" if shared else "xx")
    assert as_user(12346, work) == second  # found again
    assert built.read_text() == ("x" if shared else "xx")


@as_root
def test_what_a_killed_builder_has_left_shuts_nobody_out(cwd: Path) -> None:
    root = cwd / "cache"
    root.mkdir()
    os.chown(root, 0, 4242)
    opened(root, 0o2775)

    def build_and_die(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        os.kill(os.getpid(), 9)

    def build(folder: Path) -> None:
        (folder / "tokens.bin").write_bytes(b"data")

    for who in (12346, 12345):
        key = {"who": who}
        assert as_user(12345, lambda key=key: str(build_once("text", key, build_and_die, root))) == ""
        assert as_user(who, lambda key=key: build_once("text", key, build, root).name).startswith("text-")
    assert len(list(root.glob(".text-*"))) == 1  # its owner clears what is its own


@as_root
def test_a_cache_that_cannot_be_written_says_what_to_set(cwd: Path) -> None:
    root = cwd / "cache"
    root.mkdir()
    opened(root, 0o755)
    answer = as_user(12345, lambda: str(build_once("text", {}, lambda folder: None, root)))
    assert "DataError" in answer
    assert "Permission denied" in answer
    assert "Set GATRAIN_CACHE" in answer
    assert "free space" not in answer


# --- the user's modules ---------------------------------------------------------------------------------

NET = """
import utils
from torch import nn

class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 10)
        assert utils.WHOSE == "mine"

    def forward(self, x):
        return super().forward(x.flatten(1))
"""


@pytest.fixture
def shadowed(cwd: Path) -> Path:
    """Files that are called as Python's and as installed modules, and a model of the user's own."""
    for name in (
        "random",
        "select",
        "inspect",
        "types",
        "queue",
        "tokenizers",
        "numpy",
        "torch",
        "yaml",
        "tempfile",
    ):
        (cwd / f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    (cwd / "datasets.py").write_text(NET)  # an installed package, too
    (cwd / "utils.py").write_text("WHOSE = 'mine'\n")
    (cwd / "mine.yaml").write_text(
        "defaults: [base, data: digits, _self_]\nmodel: {_target_: datasets.Net}\n"
        "loss: {_target_: torch.nn.CrossEntropyLoss}\ntrain: {steps: 1}\n"
    )
    return cwd


FIXED = (
    "recipe=mine.yaml", "batch.effective=4", "batch.micro=4", "checkpointing=none", "compile=false", "sync=window",
    "train.check=off",
)  # fmt: skip


def test_files_of_the_working_folder_hide_nothing_from_libraries_and_are_found_by_the_users_own(
    shadowed: Path,
) -> None:
    done = gatrain("fit", *FIXED, "run.dir=r", env={"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    assert (shadowed / "r" / "summary.json").is_file()


@pytest.mark.parametrize("flags", [["-c", "from gatrain.start import main; main()"], ["-I", "-m", "gatrain"]])
def test_however_python_is_started(flags: list[str], shadowed: Path) -> None:
    """With the folder on the path in front, through PYTHONPATH too, and isolated from all of it."""
    for name in ("tempfile", "types", "inspect", "queue"):
        (shadowed / f"{name}.py").unlink()
    if (
        "-I" in flags
        and subprocess.run([sys.executable, "-I", "-c", "import gatrain"], check=False).returncode
    ):
        pytest.skip("gatrain is not installed here")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(shadowed)]))
    done = subprocess.run(
        [sys.executable, *flags, "show", "recipe=mine.yaml"],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_file_that_hides_what_a_target_means_is_named(shadowed: Path) -> None:
    (shadowed / "timm.py").write_text("")
    done = gatrain("fit", *FIXED, "model._target_=timm.create_model", "run.dir=r")
    assert done.returncode == 2
    assert f"timm ({shadowed}/timm.py, which hides the installed timm" in done.stderr
    done = gatrain("fit", *FIXED, "model._target_=random.Net", "run.dir=r")
    assert done.returncode == 2
    assert "hides your random.py" in done.stderr


def test_who_asks_decides_whose_module_it_is(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cwd / "colorsys.py").write_text("WHOSE = 'mine'\n")
    (cwd / "asker.py").write_text("import colorsys\n")
    (cwd / "empty_folder").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("colorsys", "asker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    imports.use_working_folder()
    imports.use_working_folder()
    assert sys.path[-1] == str(cwd.resolve())
    import colorsys

    assert not hasattr(colorsys, "WHOSE")
    monkeypatch.delitem(sys.modules, "colorsys")
    __import__("asker")
    assert sys.modules["colorsys"].WHOSE == "mine"  # type: ignore[attr-defined]
    with contextlib.suppress(ModuleNotFoundError):
        __import__("empty_folder")
    for name in ("colorsys", "asker", "empty_folder"):
        sys.modules.pop(name, None)


# --- endpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node_rank", [0, 1])
def test_an_endpoint_that_nobody_has_is_told_at_once_on_every_node(node_rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"cannot find 'nosuchhost\.invalid'"):
        Rendezvous(Nodes(1, 2, node_rank, "nosuchhost.invalid:29656"))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("endpoint", "host"), [("[::1]:29500", "::1"), ("10.0.0.1:1", "10.0.0.1"), ("[node-0]:65535", "node-0")]
)
def test_endpoints_that_are_right(endpoint: str, host: str) -> None:
    assert parse_endpoint(endpoint)[0] == host


@pytest.mark.parametrize(
    "endpoint",
    [
        "::1:29500", "host", "host:", ":29500", "host:0", "host:65536", "host:http", "host:-1", "host: 29500",
        "tcp://host:29500", "[::1]", "[::1:29500", "host:29500/", "", "host:+29500", "ho st:29500",
    ],
)  # fmt: skip
def test_endpoints_that_are_wrong_are_told_with_one_that_works(endpoint: str) -> None:
    with pytest.raises(LaunchError, match="29500"):
        parse_endpoint(endpoint)


def test_homes_that_nobody_has_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", "~nosuchuser/cache")
    with pytest.raises(ConfigError, match="GATRAIN_CACHE=~nosuchuser/cache: there is no such home folder"):
        assets.cache_dir()
    with pytest.raises(RunFolderError, match="is not a run folder"):
        open_run_dir("~nosuchuser/run")
    with pytest.raises(RunFolderError, match="File name too long"):
        open_run_dir("n" * 300)
    for recipe in ("~nosuchuser/x.yaml", "n" * 300):
        with pytest.raises(ConfigError, match="recipe="):
            assets.find_recipe(recipe, Path.cwd())
