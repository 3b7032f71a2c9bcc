"""What an inspection of a run's model and data found. Plain data that survives JSON; no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gatrain import schema
from gatrain.data.report import DataRecord
from gatrain.sources import file_states


@dataclass(frozen=True)
class Inspected:
    """What is known of a run's model and data before it starts."""

    samples: int
    eval_samples: int
    fingerprint: str
    """Of the training data: its source's own ``fingerprint`` if it has one, else its type and size."""
    parameters: int
    parameter_bytes: int
    checkpointing_modes: tuple[str, ...]
    """Modes of activation checkpointing that the model offers."""
    half_parameters: int = 0
    """Trained parameters of 16 bits, which get fp32 main gradients and master weights."""
    frozen_bytes: int = 0
    """Of ``parameter_bytes``, what is never trained and so has no gradient."""
    optimizer_bytes: int = 0
    """Tensors that the optimizer keeps for all trained parameters, on each rank; 0 where that cannot be told."""
    gradient_bytes: int | None = None
    """What the gradients take at most at once; None: those of all trained parameters."""
    half_dtypes: str = ""
    """Their dtypes: ``bf16``, ``fp16`` or ``bf16 and fp16``."""
    batch_norms: tuple[str, ...] = ()
    """Names of the modules whose results depend on the micro-batch."""
    synchronises: bool = False
    """Whether there is SyncBatchNorm among them: all ranks need equally many micro-steps."""
    running_statistics: str = ""
    """What the plan says of their running statistics where a window has several micro-batches."""
    mean_tokens: float = 0.0
    """Of a sample, where ``batch.count=tokens`` asks for it."""
    remarks: tuple[str, ...] = ()
    """Sentences on the data and the model for the plan."""
    data: DataRecord | None = None
    """What the data source has read, and a few of its samples."""
    code: tuple[str, ...] = ()
    """Files of the user's own modules that were imported."""
    files: Mapping[str, list[int]] = field(default_factory=dict)
    """Size and mtime (ns) of the files and folders that the configuration names, from before they were read, and of
    those of ``code``."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a count that is none.
        """
        names = (
            "samples",
            "eval_samples",
            "parameters",
            "parameter_bytes",
            "half_parameters",
            "frozen_bytes",
            "optimizer_bytes",
        )
        schema.at_least(0, **{name: getattr(self, name) for name in names})

    def is_current(self) -> bool:
        """Whether every file that it is known to depend on is as it was. What else the user's code reads is not
        seen here: ranks compare what they make with what the plan was made for."""
        return file_states(self.files) == self.files
