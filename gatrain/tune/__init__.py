"""The tuner: the fastest exact split of one effective batch on the hardware at hand, by measurement.

    config + hardware -> knobs (what is asked: the search space) -> estimate (what cannot fit) -> planner
    planner -> cache (what is known) or runner (what is measured) -> judging -> search (the model's choice)
            -> finalists (full steps decide close calls) -> explain, advice -> Plan, or refusal
    ====== process boundary: folders with trial_spec.json and config.yaml; trials.jsonl comes back (protocol) ======
    trials/: host (imports once, forks) -> session -> measure (one size), full_step (full steps, in turn)

Importing this package imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import GatrainError
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected
from gatrain.launch.world import Nodes
from gatrain.plan import Plan
from gatrain.tune import cache, knobs
from gatrain.tune.cache import Known
from gatrain.tune.estimate import state_bytes
from gatrain.tune.planner import Planner
from gatrain.tune.processes import TrialHost

__all__ = ["Tuner", "state_bytes"]

Run = Callable[[Path], None]


class Tuner:
    """One question to the tuner: how to compute ``config.batch.effective`` fastest on this world.

    Args:
        config: of the run.
        hardware: of this machine; every node is taken to be like it.
        nodes: the world that will train; trials run on this node's part of it.
        cwd: folder of the user's own modules and data; None is the current one.
    """

    def __init__(self, config: RunConfig, hardware: Hardware, nodes: Nodes, cwd: Path | None = None) -> None:
        self._config = config
        self._hardware = hardware
        self._nodes = nodes
        self._cwd = cwd
        self._key = cache.fingerprint(config, hardware, nodes.world_size, cwd)
        self._known = cache.load(self._key)
        self.space = knobs.search_space(config, hardware, nodes)

    def trial_host(self, **options: Any) -> TrialHost:
        """Trial processes for this question, not started yet: `TrialHost.start` lets their imports begin early.

        Args:
            options: ``shared`` and ``announce`` of `TrialHost`, for several nodes.
        """
        return TrialHost(
            self._nodes, self._hardware.device, self._cwd, compiles=self.space.may_compile, **options
        )

    def plan(
        self,
        found: Inspected,
        run: Run,
        *,
        progress: Callable[[str], None] = lambda text: None,
        retune: bool = False,
        config_yaml: str | None = None,
    ) -> Plan:
        """The split with the fastest optimizer step.

        Values that the config fixes are taken as they are; with nothing left to decide no process is started.
        Call it from the main thread: trial processes are stopped by Ctrl-C.

        Args:
            found: what an inspection found model and data to be.
            run: lets trial processes answer, such as `trial_host`.
            progress: told one sentence at a time, also from another thread.
            retune: measure again, whatever the cache holds.
            config_yaml: what the trial processes read, with its references unresolved, so that no secret is
                written for them; None writes the config.

        Raises:
            PlanError: a fixed micro-batch exceeds a rank's share.
            DoesNotFitError: the model does not fit in memory, even at one sample.
            WorkerError: the user's code failed at every size.
            GatrainError: what went wrong while the model or its data were built.
            Interrupted, KeyboardInterrupt: a person stopped it; what was measured is kept in the cache.
        """

        def keep(measured: Known) -> None:
            if (trouble := cache.store(self._key, measured)) is not None:
                progress(trouble)

        known = Known(inspected=found) if retune else self._known.of(found)
        if known.curves and self._known.inspected != found:
            keep(known)  # just looked at: the curves still are theirs
        planner = Planner(
            self.space,
            found,
            known,
            run,
            keep=keep,
            progress=progress,
            shared=run.shared if isinstance(run, TrialHost) else None,
            config_yaml=config_yaml,
        )
        return planner.plan()

    def remembered(self) -> tuple[Plan, Inspected] | None:
        """A plan that nothing has to be measured for, and the model and data that it is for, as they were when it
        was measured.

        None where nothing is known, where a file that they are known to depend on has changed, or where what is
        known would refuse the run: then they are inspected again, and whatever is said is of today.
        """
        known = self._known.inspected
        if known is None:
            return None
        counts_tokens = self._config.batch.counts_tokens
        if not known.mean_tokens if counts_tokens else known.samples < self.space.split.effective_batch:
            return None
        try:
            plan = self.remembered_plan(known)
        except GatrainError:
            return None
        if plan is None or plan.made_for is None or not known.is_current():
            return None
        return dataclasses.replace(
            plan, made_for=dataclasses.replace(plan.made_for, is_remembered=True)
        ), known

    def remembered_plan(self, found: Inspected) -> Plan | None:
        """The plan that `plan` would give without measuring; None if it would have to measure."""

        class NotRemembered(Exception):
            pass

        def refuse(folder: Path) -> None:
            raise NotRemembered

        try:
            return self.plan(found, refuse)
        except NotRemembered:
            return None
