"""What fails beside the training (evaluation, showcase, plots, a logger): told with its reason, never fatal."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)


@dataclass
class Aftermath:
    """The failures so far. Nothing of it is collective.

    Args:
        describe: an error in words, with the user's own lines.
        tell: hears of each failure at once.
    """

    describe: Callable[[BaseException], str]
    tell: Callable[[str], None]
    _last: dict[str, str] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """A line for each thing that failed, with the reason of the last time."""
        times = {what: f" ({count} times)" if count > 1 else "" for what, count in self._count.items()}
        return [f"{what}{times[what]}: {reason}" for what, reason in self._last.items()]

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Run code of the user's or a library's; an error of it is told as that of ``what`` and goes no further."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self.add(what, explain(error, self.describe))

    def add(self, what: str, reason: str, when: str = "") -> None:
        """Note that ``what`` failed for ``reason``, and tell it."""
        self._last[what] = f"{when}{': ' if when else ''}{reason}"
        self._count[what] = self._count.get(what, 0) + 1
        self.tell(f"{what} failed{' ' if when else ''}{when}: {reason}")


def explain(error: BaseException, describe: Callable[[BaseException], str]) -> str:
    """The error in one line; the whole traceback goes to the log of this rank."""
    _log.error("an error beside the training\n%s", "".join(traceback.format_exception(error)))
    lines = [line.strip() for line in describe(error).splitlines()]
    return " ".join(line for line in lines if line)
