"""Data sources: objects with ``train`` and ``eval`` datasets (map-style; ``eval`` may be None) and, where
samples differ in shape, ``collate(samples)``. A user's own class with these attributes works as well.

Reading and collating are seeded, so both may draw random numbers. A dataset with ``deterministic = True`` whose
source has ``deterministic_collate = True`` (or no ``collate``) draws none: it is read ahead in a thread.

A source may also offer ``report``, a `gatrain.data.report.DataReport` of what it has read and left out, and
``check(progress)``, which reads everything once: see `gatrain.data.report`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatrain.data.digits import Digits
    from gatrain.data.docstrings import Docstrings
    from gatrain.data.image_folder import ImageFolderData
    from gatrain.data.mixture import Mixture
    from gatrain.data.padded import PaddedText
    from gatrain.data.text import TextWindows

__all__ = ["Digits", "Docstrings", "ImageFolderData", "Mixture", "PaddedText", "TextWindows"]

_HOMES = {
    "Digits": "digits",
    "Docstrings": "docstrings",
    "ImageFolderData": "image_folder",
    "Mixture": "mixture",
    "PaddedText": "padded",
    "TextWindows": "text",
}


def __getattr__(name: str) -> Any:
    """Sources import torch; whoever only reads a report needs none of it."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
