"""Data sources: objects with ``train`` and ``eval`` datasets (map-style; ``eval`` may be None) and, where
samples differ in shape, ``collate(samples)``. A user's own class with these attributes works as well.

Reading and collating are seeded, so both may draw random numbers. A dataset with ``deterministic = True`` whose
source has ``deterministic_collate = True`` (or no ``collate``) draws none: it is read ahead in a thread.
"""

from gatrain.data.digits import Digits
from gatrain.data.image_folder import ImageFolderData
from gatrain.data.padded import PaddedText
from gatrain.data.text import TextWindows

__all__ = ["Digits", "ImageFolderData", "PaddedText", "TextWindows"]
