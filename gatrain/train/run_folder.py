"""Looks after the run folder while the run is under way: what is deleted is made again, what is moved is told.

Rank 0 only. A folder is known by its inode: what lies at its path may be another by now.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatrain import commands, disk
from gatrain.errors import RunFolderError
from gatrain.rundir import RunDir, locked, write_bytes


@dataclass(frozen=True)
class _Kept:
    contents: bytes
    mode: int


class RunFolder:
    """What `gatrain resume` needs of the folder beside saved states, kept in memory.

    Args:
        tell: hears what happened.
        put_back: writes metrics.jsonl and the like anew where they were deleted, from what is still open of them.
    """

    def __init__(self, run_dir: RunDir, tell: Callable[[str], None], put_back: Callable[[], None]) -> None:
        self.run_dir = run_dir
        self.needs_state = False
        """A state must be written, as the earlier ones are gone or the folder is elsewhere."""
        self.moved_to: Path | None = None
        self._tell, self._put_back = tell, put_back
        self._lock = contextlib.ExitStack()
        self._told: str | None = None
        self._kept: dict[Path, _Kept] = {}
        files = (run_dir.config, run_dir.overrides, run_dir.plan, run_dir.hardware, run_dir.env, run_dir.data)
        for path in files:
            with contextlib.suppress(OSError):
                self._kept[path] = _Kept(path.read_bytes(), path.stat().st_mode & 0o777)
        self._handle = self._open()

    def close(self) -> None:
        """Give back what is open."""
        self._lock.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def look(self) -> None:
        """Make the folder again where it was deleted, in whole or in part; note where it was moved.

        Raises:
            RunFolderError: the folder was deleted, and another run has taken its place.
        """
        if self.moved_to is not None or self._handle is None:
            return
        if self._is_in_place():
            if self.run_dir.config.exists() or self.run_dir.config not in self._kept:
                with contextlib.suppress(OSError):  # the sink tells of it
                    self._put_back()
                return
            what = "files of the run folder were deleted"
        else:
            self.moved_to = self._elsewhere()
            if self.moved_to is not None:
                self.needs_state = True
                self._tell(f"the run folder was moved to {self.moved_to} while the run was under way.")
                return
            what = f"the run folder {self.run_dir.path} was deleted while the run was under way"
        try:
            self._make_again()
        except OSError as error:
            if self._told != str(error):
                self._told = str(error)
                self._tell(f"{what}, and it cannot be made again: {disk.reason(error)}. It is tried again.")
            return
        self.needs_state = True
        self._told = None
        self._tell(
            f"{what}: made again, with its configuration and metrics. A new state is saved after this step."
        )

    def state_is_saved(self, step: int) -> None:
        """A state was written where `needs_state` asked for one.

        Raises:
            RunFolderError: the folder was moved, and the run ends there.
        """
        self.needs_state = False
        if self.moved_to is not None:
            raise RunFolderError(
                f"the run folder was moved to {self.moved_to} while the run was under way. The state of step "
                f"{step} is saved there. To go on: {commands.resume(RunDir(self.moved_to))}"
            )

    def _open(self) -> int | None:
        with contextlib.suppress(OSError):
            return os.open(self.run_dir.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return None

    def _is_in_place(self) -> bool:
        try:
            there, ours = os.stat(self.run_dir.path), os.fstat(self._handle or 0)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _elsewhere(self) -> Path | None:
        """Where the folder is now; None where it is nowhere, or where the system does not tell."""
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            if path.is_dir() and path.stat().st_ino == os.fstat(self._handle or 0).st_ino:
                return path
        return None

    def _make_again(self) -> None:
        """Write everything that is kept, the configuration last: with it the folder is a run again."""
        self.run_dir.path.mkdir(parents=True, exist_ok=True)
        if not self._is_in_place():
            if self.run_dir.config.exists():
                self._refuse()
            lock = contextlib.ExitStack()
            try:
                lock.enter_context(locked(self.run_dir))
            except RunFolderError:
                if self.run_dir.lock.exists():
                    self._refuse()
                raise OSError("its lock cannot be written") from None
            self._lock.close()
            self._lock = lock
            handle, self._handle = self._handle, self._open()
            if handle is not None:
                os.close(handle)
        self.run_dir.logs.mkdir(exist_ok=True)
        self._put_back()
        for path, kept in reversed(self._kept.items()):
            if not path.exists():
                write_bytes(path, kept.contents, kept.mode)

    def _refuse(self) -> None:
        raise RunFolderError(
            f"the run folder {self.run_dir.path} was deleted while the run was under way, and another run has "
            "begun there. This one ends, and nothing of it is kept."
        )
