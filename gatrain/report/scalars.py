"""The numbers of a run by the names that trackers show them under: ``train/loss``, ``eval/accuracy``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatrain import units
from gatrain.report import text
from gatrain.train.records import StepRecord

_STEP = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "samples_per_s": "speed/samples_per_s",
    "tokens_per_s": "speed/tokens_per_s",
}


def of_step(record: StepRecord) -> dict[str, float]:
    """Of one step; what was not measured is left out."""
    found = {shown: getattr(record, name) for name, shown in _STEP.items()}
    if record.peak_memory_bytes:
        found["memory/peak_gib"] = record.peak_memory_bytes / units.GIB
    found |= {f"train/loss_terms/{name}": value for name, value in record.loss_terms.items()}
    found |= {f"train/{name}": value for name, value in record.metrics.items()}
    return _numbers(found)


def of_evaluation(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of one evaluation."""
    found = {f"eval/{name}": value for name, value in metrics.items()}  # loss_terms itself is no number
    found |= {f"eval/loss_terms/{name}": value for name, value in text.loss_terms(metrics).items()}
    return _numbers(found)


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
