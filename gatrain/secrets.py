"""What is a secret on a command line, in a configuration or in an address, and how it is hidden: one home."""

from __future__ import annotations

import re
from typing import Any

REDACTED = "<redacted>"
_SECRET = re.compile(r"(^|[._-])(token|key|apikey|secret|password|passwd|credentials?)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def redact(word: str) -> str:
    """Hide the value of ``key=value`` where the key names a secret, and passwords inside addresses.

    References such as ``${oc.env:HF_TOKEN}`` name a secret without holding it, and stay.
    """
    key, equals, value = word.partition("=")
    return f"{key}={redact_value(key.lstrip('+~-'), value)}" if equals else word


def redact_value(key: str, value: Any) -> Any:
    """As `redact`, for a key and its value; numbers and references are no secrets."""
    if not isinstance(value, str) or "${" in value or re.fullmatch(r"[-+.\d]*|null|true|false", value):
        return value
    return REDACTED if _SECRET.search(key) else _USER_INFO.sub(REDACTED, value)
