"""What `gatrain explain` prints: a heading for each technique and sentences below it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from gatrain.explain.row import Row
from gatrain.report.text import clean

INDENT = "    "


def explanation_lines(rows: Sequence[Row], columns: int = 80) -> list[tuple[str, bool]]:
    """Lines of at most ``columns`` where words allow it, each with whether it is a heading."""
    lines: list[tuple[str, bool]] = []
    for row in rows:
        head = textwrap.wrap(
            clean(f"{row.topic}: {row.state}"), columns, subsequent_indent=INDENT, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        body = textwrap.wrap(
            clean(row.text), columns, initial_indent=INDENT, subsequent_indent=INDENT, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        lines += [*((line, True) for line in head), *((line, False) for line in body)]
    return lines


def print_explanation(head: str, rows: Sequence[Row], columns: int = 80) -> None:
    """Print it: headings stand out on a terminal, and are plain lines elsewhere."""
    lines = [*((line, False) for line in textwrap.wrap(clean(head), columns)), ("", False)]
    lines += explanation_lines(rows, columns)
    if not sys.stdout.isatty():
        encoding = sys.stdout.encoding or "utf-8"
        for line, _ in lines:
            print(line.encode(encoding, "replace").decode(encoding))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line, is_heading in lines:
        console.print(Text(line, "bold" if is_heading else ""), soft_wrap=True)
