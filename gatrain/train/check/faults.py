"""How the check of the loss ends."""

from __future__ import annotations


class Fault(Exception):
    """The loss is wrong; the text says why."""


class Unclear(Exception):
    """The check can say nothing; the text says why."""


class NoGradients(Exception):
    """A forward was computed and its backward was not; the text says why."""
