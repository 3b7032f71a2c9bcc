"""How the check of the loss ends."""

from __future__ import annotations


class Fault(Exception):
    """The loss is wrong; the text says why."""


class Unclear(Exception):
    """The check can say nothing; the text says why."""
