"""Weights & Biases, online or offline, where the ``wandb`` package is installed."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gatrain.config import RunConfig
from gatrain.report import scalars
from gatrain.report.sink import Logger, require, stored_id
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord


class WandbLogger(Logger):
    """Writes steps, evaluations and settings to a run of Weights & Biases; a resumed run goes on in the same one.

    ``WANDB_MODE=offline`` and the other variables of wandb mean what they always do. Offline files lie in the run
    folder, for `wandb sync`. Settings are sent without secrets.

    Args:
        project: of Weights & Biases.
        name: of the run; the run folder's by default.
        entity: user or team.
        group, tags, notes: as of `wandb.init`.
        mode: ``online``, ``offline`` or ``disabled``; WANDB_MODE's by default.
    """

    def __init__(
        self,
        project: str = "gatrain",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        mode: str | None = None,
    ) -> None:
        self._options = {"project": project, "entity": entity, "group": group, "notes": notes, "mode": mode}
        self._tags, self._name, self._project = list(tags), name, project
        self._run: Any = None

    def check(self, config: RunConfig) -> None:
        require("wandb")

    def start(self, info: RunInfo) -> None:
        wandb: Any = importlib.import_module("wandb")  # untyped: it need not be installed
        self._run = wandb.init(
            **self._options,
            name=self._name or info.run_dir.name,
            tags=self._tags or None,
            dir=str(info.run_dir),
            id=stored_id(info.run_dir, f"wandb/{self._project}", lambda: secrets.token_hex(4)),
            resume="allow",
            config=dict(info.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # steps that are trained again after a resume are drawn at their place: wandb's own steps only go forward
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, record: StepRecord) -> None:
        if self._run is not None:
            self._run.log({"step": record.step, **scalars.of_step(record)})

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log({"step": step, **scalars.of_evaluation(metrics)})

    def end(self, summary: RunSummary) -> None:
        if self._run is not None:
            self._run.summary["status"] = summary.status
        self._finish(0)

    def close(self) -> None:
        self._finish(1)

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=exit_code)
