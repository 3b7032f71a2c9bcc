"""``batch.effective=auto``: a short run measures the gradient's noise, and a batch is proposed. None is ever set.

The pilot is a run like any other, in a folder of its own: the recipe at its own effective batch, with the hook
`noise_scale`, ended after some steps. The proposal is the power of two nearest to the noise scale, with the command
that trains at it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatrain import batch_rule, fit, noise_advice
from gatrain.commands import setting, typed
from gatrain.compose import compose
from gatrain.config import RunConfig, SGDConfig
from gatrain.doors import SHIPPED, nodes_of
from gatrain.errors import ConfigError
from gatrain.fit.listener import Listener
from gatrain.launch.world import WorldRequest
from gatrain.optimizer_config import AdamWConfig
from gatrain.rundir import RunDir
from gatrain.secrets import redact

AUTO = "batch.effective=auto"
STEPS = 100
"""Steps that a pilot measures."""
FEWEST_SAMPLES = 2
"""A window of one sample has no parts to compare."""


@dataclass(frozen=True)
class Proposal:
    """What a pilot found."""

    run_dir: Path
    measured: str
    """The noise scale in words."""
    effective_batch: int
    """Proposed."""
    before: int
    """The recipe's own, which the pilot trained with."""
    rule: str
    """What the change does to the optimizer, in words; empty for nothing."""
    command: str

    def lines(self) -> list[str]:
        """For people."""
        same = self.effective_batch == self.before
        return [
            f"Noise scale: {self.measured}, measured in {self.run_dir}.",
            f"Proposed: batch.effective={self.effective_batch}"
            + (", the recipe's own" if same else f", where the recipe has {self.before}")
            + ". Nothing was set.",
            *([f"{self.rule}."] if self.rule else []),
            noise_advice.CAVEATS,
            f"Type: {self.command}",
        ]


def is_asked(words: Sequence[str]) -> bool:
    """Whether the words of a command ask for a proposal: the last one counts, as for every key."""
    given = [word for word in words if word.partition("=")[0] == "batch.effective"]
    return bool(given) and given[-1] == AUTO


def propose(
    words: Sequence[str], request: WorldRequest, listener: Listener, *, retune: bool = False
) -> Proposal:
    """Run the pilot and propose.

    Args:
        words: the recipe and the overrides, `AUTO` among them.

    Raises:
        ConfigError: the pilot measured too few steps to tell; says what to change.
        GatrainError: as `gatrain.fit.autotune` and `gatrain.fit.fit`.
    """
    kept = [word for word in words if word.partition("=")[0] != "batch.effective"]
    config = compose(kept).config
    if config.batch.counts_tokens:
        raise ConfigError(
            "batch.effective=auto proposes a number of samples, and this recipe has batch.count=tokens. Measure "
            "with a number of tokens and hooks=[noise_scale], or write batch.count=samples."
        )
    size = max(FEWEST_SAMPLES, config.batch.stages.first)
    pilot = [*kept, f"batch.effective={size}", f"hooks={spelt(_hooks(config))}", "eval.samples=16"]
    # a folder of its own: the proposed command is for the recipe's
    if config.run.dir is not None:
        pilot.append(f"run.dir={config.run.dir}_pilot")
    elif config.run.name is not None:
        pilot.append(f"run.name={config.run.name}_pilot")
    else:
        pilot.append(f"run.name=pilot_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    listener.notice(f"A pilot of {STEPS} steps at batch.effective={size} measures the gradient's noise.")
    silent = Listener(progress=listener.progress, notice=listener.notice)
    try:
        plan = fit.autotune(pilot, request, silent, retune).plan
    except ConfigError as error:  # the hook is this pilot's, not the recipe's
        own = "Leave noise_scale out of hooks"
        raise ConfigError(str(error).replace(own, "Give batch.effective a number")) from error
    if plan.world_size == 1 and plan.accumulation_steps == 1:  # one micro-batch has no part to compare
        pilot = [word for word in pilot if word.partition("=")[0] != "batch.micro"]
        pilot.append(f"batch.micro={(size + 1) // 2}")
    run_dir = fit.fit(pilot, request, listener).run_dir
    found = noise_advice.last_noise_scale(RunDir(run_dir).metrics)
    if found is None:
        raise ConfigError(
            f"the pilot in {run_dir} measured too few steps to tell the gradient's noise. It needs train.steps="
            f"{STEPS} or more, at more than one micro-batch or rank, and loss terms that count the same weights."
        )
    value, low, high = found
    scale = noise_advice.in_words(value, low, high)
    samples = plan.made_for.samples if plan.made_for is not None else None
    proposed = noise_advice.proposal(value if value < float("inf") else low)
    proposed = min(proposed, samples or proposed)
    rule_words, rule = _rule(config, size, proposed)
    if isinstance(config.batch.micro, int) and config.batch.micro > proposed:
        kept = [*(word for word in kept if word.partition("=")[0] != "batch.micro"), "batch.micro=auto"]
    command = typed("fit", *map(redact, kept), f"batch.effective={proposed}", *rule_words)
    return Proposal(run_dir, scale, proposed, size, rule, command)


def _hooks(config: RunConfig) -> list[dict[str, Any]]:
    """The recipe's own hooks, which may be a part of what is trained, and the one that measures and ends it."""
    nodes = [node for _, node in nodes_of("hooks", config.hooks)]
    noise = SHIPPED["hooks"]["noise_scale"]
    if all(node["_target_"] != noise for node in nodes):
        nodes.append({"_target_": noise})
    return [node | {"stop_after": STEPS} if node["_target_"] == noise else node for node in nodes]


def _rule(config: RunConfig, before: int, proposed: int) -> tuple[list[str], str]:
    """Words for the command that scale the optimizer to another batch, and what they do; the recipe's own stay."""
    optimizer = config.optimizer
    if proposed == before or config.batch.rule != "none":
        return [], ""
    adam = isinstance(optimizer, AdamWConfig)
    if not adam and not isinstance(optimizer, SGDConfig):
        return [], f"No rule is known for {optimizer.name}: tune optimizer.lr again"
    betas, eps = (optimizer.betas, optimizer.eps) if isinstance(optimizer, AdamWConfig) else (None, None)
    k = proposed / before
    for rule in ("sqrt", "half_life") if adam else ("linear",):
        try:
            now = batch_rule.scaled(rule, k, betas, eps)
        except ConfigError:  # sqrt has an end where a decay would be 0
            continue
        base = batch_rule.Scaled(1.0, betas, eps)
        said = batch_rule.in_words(rule, before, proposed, optimizer.lr, base, now)
        return [f"batch.rule={rule}", f"batch.base={before}"], said
    return [], "No rule holds for a change so large: tune optimizer.lr again"


def spelt(value: Any) -> str:
    """A value as an override of the command line spells it, whatever text it holds."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{spelt(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(spelt, value)) + "]"
    if isinstance(value, str):
        return setting("", value).removeprefix("=")
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
