"""What `gatrain explain` looks at: the plan, remembered, measured or predicted, and the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gatrain import fit as work
from gatrain import imports
from gatrain.cli.terminal import Progress
from gatrain.compose import Composed, compose
from gatrain.errors import DoesNotFitError
from gatrain.explain import Situation
from gatrain.inspected import Inspected
from gatrain.inspection import check_modules, inspect_run
from gatrain.launch.world import WorldRequest
from gatrain.plan import Plan
from gatrain.secrets import redact
from gatrain.units import plural


def look(
    overrides: Sequence[str], request: WorldRequest, progress: Progress, *, gpu: str | None, retune: bool
) -> Situation:
    """Plan the recipe as `gatrain autotune` does, or predict the plan on a kind of GPU.

    Raises:
        GatrainError: as they do.
    """
    imports.use_working_folder()  # each part says in its own words what is exact, a person's own too
    if gpu is not None:
        return _predicted(overrides, request.nproc or 1, progress, gpu)
    found = work.autotune(overrides, request, progress.listener(print_plan=False), retune)
    machine = f"{found.hardware.describe()}, {plural(found.nodes.world_size, 'rank')}"
    return _situation(
        overrides,
        found.composed,
        found.inspected,
        found.plan,
        machine,
        on_gpu=found.hardware.device == "cuda",
    )


def _predicted(overrides: Sequence[str], nproc: int, progress: Progress, gpu: str) -> Situation:
    from gatrain.predict import find_gpu, predict

    kind = find_gpu(gpu)
    composed = compose(overrides)
    check_modules(composed.config, Path.cwd())
    progress.tell("Tracing the model without data")
    prediction = predict(composed, [kind], nproc)
    plan = prediction.gpus[0].plan
    if plan is None:
        raise DoesNotFitError(prediction.refusal or f"it does not fit on {kind.name}.")
    progress.tell("Looking at model and data")
    found = inspect_run(composed.yaml)
    return _situation(
        overrides, composed, found, plan, f"{nproc} x {kind.name}", on_gpu=True, is_predicted=True
    )


def _situation(
    words: Sequence[str],
    composed: Composed,
    found: Inspected,
    plan: Plan,
    machine: str,
    *,
    on_gpu: bool,
    is_predicted: bool = False,
) -> Situation:
    return Situation(
        recipe=composed.recipe,
        config=composed.config,
        found=found,
        plan=plan,
        machine=machine,
        on_gpu=on_gpu,
        is_predicted=is_predicted,
        cwd=Path.cwd(),
        words=tuple(map(redact, words)),
    )


def headline(situation: Situation) -> str:
    """What was looked at."""
    how = "predicted for" if situation.is_predicted else "planned on"
    return (
        f"Recipe {situation.recipe}, {how} {situation.machine}: {situation.found.parameters:,} parameters, "
        f"effective batch {situation.plan.effective_batch:,}, {situation.plan.reason}"
    )
