"""``${now:...}`` has one value: that of the moment of composition, in every process and for the whole run.

Hydra's resolvers exist where Hydra runs, which the processes that train do not; and a clock that is asked twice
answers twice. So what they give is written in, once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from omegaconf import DictConfig, OmegaConf

_CALL = re.compile(r"\$\{\s*(now|python_version)\s*(?::\s*([^{}]*?)\s*)?\}")
_OTHERS = re.compile(r"\$\{\s*(hydra)\s*:")


def settle(composed: DictConfig, leaves: dict[str, Any]) -> dict[str, Any]:
    """Write the values in; return what changed, by dotted key."""
    moment = datetime.now()
    changed = {}
    for key, value in leaves.items():
        settled = settle_value(value, moment)
        if settled != value:
            OmegaConf.update(composed, key, settled)
            changed[key] = settled
    return changed


def settle_value(value: Any, moment: datetime) -> Any:
    """A text, or a list of them, with what ``${now:...}`` and ``${python_version:...}`` give."""
    if isinstance(value, list):
        return [settle_value(each, moment) for each in value]
    return _CALL.sub(_answer(moment), value) if isinstance(value, str) else value


def foreign(value: Any) -> str | None:
    """The name of a resolver that asks Hydra's own run-time, which there is none of."""
    found = _OTHERS.search(value) if isinstance(value, str) else None
    return found.group(1) if found else None


def _answer(moment: datetime) -> Callable[[re.Match[str]], str]:
    def answer(call: re.Match[str]) -> str:
        argument = (call.group(2) or "").strip("'\"")
        if call.group(1) == "now":
            return moment.strftime(argument)
        parts = {"major": 1, "minor": 2, "micro": 3}.get(argument or "minor")
        return ".".join(map(str, sys.version_info[:parts])) if parts else call.group()

    return answer
