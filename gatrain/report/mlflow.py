"""MLflow, on files or a tracking server, where the ``mlflow`` package is installed."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from gatrain.config import RunConfig
from gatrain.report import scalars
from gatrain.report.sink import Logger, require, stored_id
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord

SEND_S = 5.0
"""Seconds between two batches of metrics: a server must not be asked at every step."""
MOST_IN_BATCH = 1000
MOST_WAITING = 200_000
"""Metrics that wait in memory for a server that takes none."""


class MLflowLogger(Logger):
    """Writes steps, evaluations and settings to a run of MLflow; a resumed run goes on in the same one.

    Args:
        tracking_uri: a folder, a database or a server; MLFLOW_TRACKING_URI's by default, else the folder
            ``mlruns``.
        experiment: of MLflow; it is made where it does not exist.
        name: of the run; the run folder's by default.
        tags: of the run.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "gatrain",
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._uri, self._experiment, self._name, self._tags = tracking_uri, experiment, name, dict(tags or {})
        self._client: Any = None
        self._mlflow: Any = None
        self._run_id = ""
        self._waiting: list[tuple[str, float, int, int]] = []
        """(name, value, time in ms, step)"""
        self._sent_at = time.monotonic()
        self.missing = 0

    @property
    def waiting(self) -> int:
        """Metrics that were not sent."""
        return len(self._waiting) if self._client is None else 0

    def check(self, config: RunConfig) -> None:
        require("mlflow")

    def start(self, info: RunInfo) -> None:
        self._mlflow = importlib.import_module("mlflow")  # untyped: it need not be installed
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
        if "://" not in uri or uri.startswith(
            "file:"
        ):  # newer versions ask whether files are meant: they are
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        client = self._mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(self._experiment)
        is_new = False

        def create() -> str:
            nonlocal is_new
            is_new = True
            where = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
            made = client.create_run(where, run_name=self._name or info.run_dir.name, tags=self._tags)
            return str(made.info.run_id)

        self._run_id = stored_id(info.run_dir, f"mlflow/{self._experiment}", create)
        if is_new:
            params = [
                self._mlflow.entities.Param(name, str(value)[:500]) for name, value in info.settings.items()
            ]
            for first in range(0, len(params), 100):
                client.log_batch(self._run_id, params=params[first : first + 100])
        else:
            client.update_run(self._run_id, status="RUNNING")
        self._client = client

    def step(self, record: StepRecord) -> None:
        self._add(scalars.of_step(record), record.step)
        if time.monotonic() > self._sent_at + SEND_S:
            self._send()

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._add(scalars.of_evaluation(metrics), step)
        self._send()

    def end(self, summary: RunSummary) -> None:
        self._send()
        self._finish("FINISHED" if summary.status == "completed" else "KILLED")

    def close(self) -> None:
        self._finish("FAILED")

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._client is None:
            return
        now = int(time.time() * 1000)
        self._waiting += [(name, float(value), now, step) for name, value in values.items()]
        if (surplus := len(self._waiting) - MOST_WAITING) > 0:
            del self._waiting[:surplus]
            self.missing += surplus

    def _send(self) -> None:
        while self._client is not None and self._waiting:
            batch = self._waiting[:MOST_IN_BATCH]
            metrics = [self._mlflow.entities.Metric(*values) for values in batch]
            self._client.log_batch(self._run_id, metrics=metrics)
            del self._waiting[: len(batch)]
        self._sent_at = time.monotonic()

    def _finish(self, status: str) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.set_terminated(self._run_id, status=status)
