"""Full optimizer steps of the finalists, timed in turn, as training runs them. In a trial process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gatrain import batch, build
from gatrain.config import RunConfig
from gatrain.errors import ExactnessError, PeerFailed
from gatrain.plan import FAILED, StepSettings
from gatrain.rank import Rank
from gatrain.tasks.base import Batch
from gatrain.train import batches
from gatrain.train.knobs import Knobs
from gatrain.train.meter import Meter
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.tune import finalists
from gatrain.tune.finalists import Confirmation, Finalist, StepTimings
from gatrain.tune.protocol import FullStepSpec
from gatrain.tune.trials.batches import TrialBatches
from gatrain.tune.trials.measure import Failure, Peers, attempt

if TYPE_CHECKING:
    from gatrain.train.engine import Engine

PROBES = 6
"""Micro-steps, each with other random numbers, that show which parameters are used."""
GIVE_UP_FACTOR = 2.0
"""Times the allowed seconds that full steps may take before they are given up."""


class FullStepTimer:
    """Times finalists in turn; every rank runs it in step.

    Args:
        first: an engine that exists already; one more is built for each further way of computing, with a model
            and an optimizer of its own, so the parent asks only for what fits beside each other.
        warm: sizes that each way of computing has met in this process.
    """

    def __init__(
        self,
        config: RunConfig,
        batches: TrialBatches,
        this: Rank,
        peers: Peers,
        first: Engine,
        warm: dict[StepSettings, set[int]],
        knobs: Knobs,
    ) -> None:
        self._config = config
        self._rank = this
        self._peers = peers
        self._engines = {first.settings: first}
        self._warm = warm
        self._knobs = knobs
        self._batches = batches
        self._meter = Meter(this.device)
        self._windows: dict[Finalist, LoadedWindow] = {}
        self._steps = 0

    def run(self, asked: FullStepSpec) -> Confirmation | None:
        """Time ``asked.finalists``. Collective.

        None where fewer than two can be timed within the time allowed, or a person stops it.
        """
        for engine in self._engines.values():
            engine.last_loss_sums()  # the micro-steps of trials were never counted, so nothing may compare them
        named = asked.finalists
        warm = [self._warm_up(each) for each in named]
        failures = [failure for failure, _ in warm]
        running = [nth for nth, failure in enumerate(failures) if failure is None]
        # seconds that all ranks share, so that all choose the same number of rounds
        total = sum(warm[nth][1] for nth in running)
        rounds = min(finalists.ROUNDS[1], int(asked.max_seconds / max(total, 1e-9)) - 1)
        rounds = max(rounds, finalists.ROUNDS[0])  # they were found affordable by their predicted times
        if len(running) < 2 or rounds * total > GIVE_UP_FACTOR * asked.max_seconds:
            rounds = 0  # what failed is said all the same
            if len(running) == len(named):
                return None
        seconds: dict[int, list[float]] = {nth: [] for nth in running}
        for _ in range(rounds):
            if any(self._peers.gather(self._rank.stop_requested)):
                return None
            for nth in running:
                failure, taken = self._step(named[nth])
                failures[nth] = failures[nth] or failure
                seconds[nth].append(taken)
        entries = [
            StepTimings(each, () if failure else tuple(seconds[nth]), failure.text if failure else None)
            for nth, (each, failure) in enumerate(zip(named, failures, strict=True))
        ]
        return Confirmation(tuple(entries))

    def _warm_up(self, finalist: Finalist) -> tuple[Failure | None, float]:
        """The first step makes buffers and fills caches; one more where it compiled a size, since its time says
        nothing then: (failure of any rank, seconds of the last). Collective."""
        failure = self._peers.worst(attempt(lambda: self._window(finalist)))  # reads its samples
        if failure is None and finalist.settings.sync == "overlap" and self._rank.world_size > 1:
            failure = self._varying(finalist)
        if failure is not None:
            return failure, 0.0
        # every rank goes by all shares, so that all take as many steps
        sizes = {
            part
            for share in finalist.split.shares
            for part in batch.micro_batch_sizes(share, finalist.micro_batch)
        }
        known = self._warm.setdefault(finalist.settings, set())
        failure, seconds = self._step(finalist)
        if failure is None and finalist.settings.compile and not sizes <= known:
            failure, seconds = self._step(finalist)
        known |= sizes
        return failure, seconds

    def _varying(self, finalist: Finalist) -> Failure | None:
        """Whether some micro-step leaves out a parameter: then the buckets of an overlapped reduction wait for it,
        and what these steps take says nothing of others. Collective."""
        engine = self._engine(finalist.settings)
        steps = self._window(finalist).micro_batches
        uses: list[dict[str, bool]] = []

        def look() -> None:
            for nth in range(PROBES if steps else 0):
                uses.append(engine.parameters_used(steps[nth % len(steps)], seed=nth))

        failure = self._peers.worst(attempt(look))
        if failure is not None:
            return failure
        every = [used for of_rank in self._peers.gather(uses) for used in of_rank]
        left_out = {name: sum(used[name] for used in every) for name in (every[0] if every else ())}
        name = next((name for name, count in left_out.items() if count < len(every)), None)
        if name is None:
            return None
        return Failure(FAILED, f"{finalists.VARYING} ({name} by {left_out[name]} of {len(every)})")

    def _step(self, finalist: Finalist) -> tuple[Failure | None, float]:
        """One full step: (failure of any rank, seconds of the slowest). Collective; waits for the device."""
        window = self._window(finalist)
        engine = self._engine(finalist.settings)
        self._peers.gather(None)  # start together
        taken: list[float] = []
        self._steps += 1

        def step() -> None:
            start = self._meter.mark()
            with (
                self._knobs.applied(finalist.settings.knobs),
                contextlib.suppress(PeerFailed),
            ):  # that rank tells of it itself
                engine.step(window, self._steps)
            taken.append(self._meter.seconds(start, self._meter.mark()))

        failure = self._peers.worst(attempt(step))
        if failure is not None:  # on any rank: all forget the half step
            engine.optimizer.zero_grad(set_to_none=True)
            with contextlib.suppress(ExactnessError):
                engine.step.counts.check()
        return failure, max(self._peers.gather(taken[0] if taken else 0.0))

    def _engine(self, settings: StepSettings) -> Engine:
        if settings not in self._engines:
            # lr of the trials' config moves nothing; collective, as weights are broadcast
            with self._knobs.applied(settings.knobs):
                self._engines[settings] = build.build_engine(
                    self._batches.task, self._config, settings, self._rank.device, in_place=True
                )
        return self._engines[settings]

    def _window(self, finalist: Finalist) -> LoadedWindow:
        """This rank's micro-batches, read once: every finalist computes the same samples."""
        if finalist not in self._windows:
            rank = self._rank.rank
            sizes = batch.micro_batch_sizes(finalist.split.shares[rank], finalist.micro_batch)
            made = self._batches.window(finalist.split.shares, rank, sizes)
            pinned: dict[int, Batch] = {}  # equal sizes may share one host batch
            for host_batch, _ in made:
                if id(host_batch) not in pinned:
                    pinned[id(host_batch)] = self._pinned(host_batch)
            self._windows[finalist] = LoadedWindow(
                [MicroBatch(pinned[id(host_batch)], weights) for host_batch, weights in made]
            )
        return self._windows[finalist]

    def _pinned(self, prepared: Batch) -> Batch:
        """As the loader gives it to a GPU, so that the copies overlap as they do in training."""
        if self._rank.device.type != "cuda":
            return prepared
        return batches.pinned(prepared)
