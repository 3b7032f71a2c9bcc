"""What `--help` says below the options of a command: the settings that it reads, and one command as an example."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from typer.core import TyperCommand

SPLIT = ("batch", "precision", "checkpointing", "compile", "sync", "device")
"""Settings that decide how a window is computed."""
READS: dict[str, tuple[str, ...] | None] = {
    "fit": (), "launch": (), "show": (), "doctor": (),
    "autotune": (*SPLIT, "tune", "knobs", "gradient", "dropout", "optimizer", "train.check", "train.seed"),
    "plan": (*SPLIT, "optimizer"),
    "explain": (),
    "verify": ("batch", "precision", "checkpointing", "device", "gradient", "dropout", "train.seed"),
    "resume": None,
}  # fmt: skip
"""The first parts of the keys that a command reads; none named means all. None: `fit.resuming.RESUME_KEYS`."""
EXAMPLES = {
    "fit": "gatrain fit recipe=llm batch.effective=64 optimizer.lr=1e-3",
    "launch": "gatrain launch --nproc 2 recipe=vision train.epochs=3",
    "autotune": "gatrain autotune recipe=llm batch.effective=512",
    "plan": "gatrain plan recipe=gpt2 --gpu 'H100 80GB'",
    "explain": "gatrain explain recipe=vision batch.effective=256",
    "verify": "gatrain verify recipe=vision batch.effective=24",
    "resume": "gatrain resume outputs/llm/2026-01-31_12-00-00 train.steps=2000",
    "show": "gatrain show recipe=llm optimizer=sgd",
    "doctor": "gatrain doctor recipe=llm",
    "recipes": "gatrain recipes",
    "schema": "gatrain schema > recipe.schema.json",
}


class Command(TyperCommand):
    """A command whose help ends with its settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the options as Typer does, then the settings and the example."""
        super().format_help(ctx, formatter)
        print("\n".join(help_lines(self.name or "", min(80, shutil.get_terminal_size((80, 24)).columns))))


def help_lines(command: str, columns: int = 80) -> list[str]:
    """The example and the settings of a command; no line is wider than ``columns``."""
    lines = [" Example:", f"   {EXAMPLES[command]}", ""] if command in EXAMPLES else []
    if command not in READS:
        return lines
    from gatrain.settings import settings, spelt

    lines += [" Settings, as KEY=VALUE (type, default):", ""]
    for setting in settings():
        if not _reads(command, setting.key):
            continue
        head = f"   {setting.key}  ({setting.type_text}; {spelt(setting.default)})"
        lines += textwrap.wrap(
            head, columns, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
        )
        lines += textwrap.wrap(
            setting.text, columns, initial_indent=" " * 7, subsequent_indent=" " * 7, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return [*lines, ""]


def _reads(command: str, key: str) -> bool:
    first = READS[command]
    if first is None:
        from gatrain.fit.resuming import RESUME_KEYS

        first = RESUME_KEYS
    return not first or any(key == each or key.startswith(f"{each}.") for each in first)
