"""What hostile files hold: a pickle that tells whether anybody has unpickled it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

MARKER = "executed"


class Payload:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, folder: Path = Path(), name: str = MARKER) -> None:
        self.path = folder / name

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)
