"""`gatrain` commands in processes that are forked from one that has imported torch already.

A command imports torch in some two seconds before it starts its ranks, and the suite types hundreds. Each of these
is a process of its own all the same, with its own folder, environment and streams, and so are its ranks and the
child that inspects the model. What a test claims of the command's process itself (signals, limits, what it imports,
how it was started) needs a real one: ``python -m gatrain``.

    python warm.py SOCKET    the process that is forked from; it ends with the one that started it
    gatrain                  a small program on the tests' PATH: hands its words over and waits for the exit code
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode(errors="surrogateescape")
    server.sendall(len(asked).to_bytes(8, "big") + asked)
    socket.send_fds(server, [b"."], [0, 1, 2])
    answer = server.recv(16)
sys.exit(int(answer or b"99"))
"""


class Warm:
    """The process that commands are forked from, and the folder with its `gatrain`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-", dir="/tmp")
        place = Path(self._folder.name) / "socket"
        self.program = Path(self._folder.name) / "gatrain"
        self.program.write_text(CLIENT.format(python=os.path.realpath(sys.executable), socket=str(place)))
        self.program.chmod(0o755)
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(place)],
            env=env,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it listens

    def close(self) -> None:
        with self._process:
            self._process.kill()
        self._folder.cleanup()


def serve(place: str) -> None:
    """Fork for whoever connects; ends when standard input does."""
    import torch.distributed.launcher.api  # noqa: F401

    import gatrain.cli
    import gatrain.fit
    import gatrain.launch.local
    import gatrain.report
    import gatrain.verify  # noqa: F401
    from gatrain.compose import compose  # noqa: F401

    base = [entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(":")]
    server = socket.socket(socket.AF_UNIX)
    server.bind(place)
    server.listen()
    print("listens", flush=True)
    while server in select.select([server, sys.stdin], [], [])[0]:
        connection, _ = server.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            server.close()
            _wait_for_one(connection, base)
        connection.close()


def _wait_for_one(connection: socket.socket, base: list[str]) -> None:
    size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    words, cwd, env = json.loads(connection.recv(size, socket.MSG_WAITALL).decode(errors="surrogateescape"))
    _, fds, _, _ = socket.recv_fds(connection, 1, 3)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(words, cwd, env, fds, base)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)  # the client was killed: it said nothing more
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _become(words: list[str], cwd: str, env: dict[str, str], fds: list[int], base: list[str]) -> None:
    """Be ``gatrain WORDS`` as if it had been started so."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["gatrain", *words]
    sys.path[:] = [
        str(Path(sys.executable).parent),
        *filter(None, env.get("PYTHONPATH", "").split(":")),
        *base,
    ]
    streams: Any = [io.TextIOWrapper(open(fd, "wb", closefd=False), encoding="utf-8") for fd in (1, 2)]  # noqa: SIM115
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams
    sys.stderr.reconfigure(write_through=True)
    tempfile.tempdir = None
    from gatrain.start import main

    code: Any = 1
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
