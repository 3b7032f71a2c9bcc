"""What `gatrain verify` found, as data and as lines for people."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One way of computing the window's gradient, against the one-shot gradient.

    ``relative_error`` is the L2 norm of the difference over the norm of the one-shot gradient. A ``mutation``
    is wrong on purpose and passes when the error is seen.
    """

    name: str
    precision: str
    processes: int
    micro_batches: list[list[int]]
    relative_error: float
    tolerance: float
    mutation: bool = False
    error: str | None = None

    @property
    def passed(self) -> bool:
        equal = self.relative_error <= self.tolerance  # nan is not <= anything
        return self.error is None and equal != self.mutation


@dataclass(frozen=True)
class VerifyReport:
    """All cases of one recipe. ``passed`` needs every case equal and every mutation caught."""

    recipe: str
    samples: int
    effective_batch: int
    planned_by: str
    cases: list[Case]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        cases = []
        for case in self.cases:
            row = {**asdict(case), "passed": case.passed}
            if not math.isfinite(case.relative_error):
                row["relative_error"] = None
            cases.append(row)
        return {**asdict(self), "cases": cases, "passed": self.passed}

    def lines(self) -> list[str]:
        """Plain text, a line each."""
        whole = "" if self.samples == self.effective_batch else f" (the first of {self.effective_batch})"
        lines = [
            f"{self.recipe}: gradient of a window of {self.samples} samples{whole}, split against one shot",
            f"planned split: {self.planned_by}",
            "",
        ]
        width = max(len(case.name) for case in self.cases)
        for case in self.cases:
            lines.append(
                f"  {case.name:<{width}}  {case.precision}  {_sizes(case.micro_batches):<28}  "
                f"relative error {case.relative_error:8.1e}  {self._verdict(case)}"
            )
            if case.error:
                lines.append(f"  {'':<{width}}  {case.error}")
        lines += ["", *(f"note: {note}" for note in self.notes)]
        verdict = (
            "exact: every split gives the gradient of the whole window"
            if self.passed
            else "NOT exact: see the lines marked with FAILED"
        )
        return [*lines, verdict]

    @staticmethod
    def _verdict(case: Case) -> str:
        if case.mutation:
            return "caught, as it must be" if case.passed else "FAILED: this mutation must be caught"
        return (
            f"equal (limit {case.tolerance:.0e})" if case.passed else f"FAILED (limit {case.tolerance:.0e})"
        )


def _sizes(micro_batches: list[list[int]]) -> str:
    text = " | ".join("+".join(map(str, sizes)) or "0" for sizes in micro_batches)
    return text if len(text) <= 28 else text[:25] + "..."
