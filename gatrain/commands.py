"""Commands that messages tell people to type: the one place that writes them, so that each of them works.

A command is quoted for a shell, names its run folder in full where the reader may stand elsewhere, and keeps
what the run was started with: `gatrain launch --nproc 2` never turns into `gatrain fit`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gatrain import trust
from gatrain.errors import RunFolderError
from gatrain.rundir import RunDir, read_json
from gatrain.secrets import REDACTED

OVERWRITE = "--overwrite"
_FOLDER_KEYS = ("run.dir", "run.name")


def quoted(word: str) -> str:
    """``word`` quoted for a shell; control characters, which no terminal should get, as bash names them."""
    if word.isprintable():
        return shlex.quote(word)
    safe = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{safe}'"


def typed(*words: str | os.PathLike[str]) -> str:
    """``gatrain`` with these words, as it is typed in a shell."""
    return " ".join(["gatrain", *(quoted(os.fspath(word)) for word in words)])


def resume(run_dir: RunDir, *words: str) -> str:
    """The command that goes on with a run."""
    return typed("resume", run_dir.path, *words, *trust.options())


def setting(key: str, text: str) -> str:
    """``key=text`` such that the text stays text, whatever it holds."""
    if re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII):
        return f"{key}={text}"
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no reference
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"{key}='{text}'"


@dataclass(frozen=True)
class Again:
    """The command that starts a run from its first step once more, and what has to be known about it."""

    words: tuple[str, ...]
    """Of the command line after ``gatrain``; secrets are redacted."""
    cwd: Path
    """Folder where it was typed: recipes and data may be named from there."""

    @property
    def is_whole(self) -> bool:
        """Whether the words are all that is needed: no secret was left out of them."""
        return not any(REDACTED in word for word in self.words)

    def text(
        self, folder: Path | None = None, changes: Mapping[str, str] | None = None, overwrite: bool = True
    ) -> str:
        """The command for a shell.

        Args:
            folder: the run folder, named in full; None leaves it to the words.
            changes: settings that take the place of earlier ones.
            overwrite: whether what the folder holds is replaced.
        """
        changes = changes or {}
        dropped = {*changes, *(_FOLDER_KEYS if folder is not None else ())}
        words = [word for word in self.words if word.partition("=")[0] not in dropped and word != OVERWRITE]
        words += [f"{key}={value}" for key, value in changes.items()]
        words += [setting("run.dir", str(folder))] if folder is not None else []
        command = typed(*words, *([OVERWRITE] if overwrite else []), *trust.options())
        return command if is_here(self.cwd) else f"cd {quoted(str(self.cwd))} && {command}"


def again(run_dir: RunDir) -> Again | None:
    """How the run in this folder was started; None where nobody wrote it down."""
    try:
        env = read_json(run_dir.env)
    except RunFolderError:
        return None
    words, cwd = env.get("command"), env.get("working_dir")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
        return None
    return Again(tuple(trust.without_options(words)), Path(cwd)) if isinstance(cwd, str) else None


def start_over(run_dir: RunDir, changes: Mapping[str, str] | None = None) -> str:
    """What to type to begin the run in this folder again at its first step, in place of what is there."""
    known = again(run_dir)
    if known is None or not known.is_whole:  # the configuration, which is private, holds what is missing
        return resume(run_dir, "--from-start", *(f"{key}={value}" for key, value in (changes or {}).items()))
    return known.text(run_dir.path, changes)


def is_here(folder: Path) -> bool:
    """Whether the reader stands in ``folder``: a rank's own folder alone says nothing of the shell's."""
    try:
        shell = os.environ.get("PWD")
        return shell is not None and os.path.samefile(shell, folder) and os.path.samefile(os.getcwd(), folder)
    except OSError:
        return False
