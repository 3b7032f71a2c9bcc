"""The typed configuration of a run: frozen dataclasses and the checks that cross fields. No I/O.

`gatrain.compose` fills them from a recipe and overrides; nothing writes a derived value back.
``model``, ``data``, ``loss`` and ``task`` are open nodes with a ``_target_``: the place for the user's own work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gatrain.batch_rule import OF_ADAM, scaled
from gatrain.batch_rule import RULES as RULES
from gatrain.batch_stages import UNITS as UNITS
from gatrain.batch_stages import BatchStages, read_stages, spelt
from gatrain.config_checks import above_zero, at_least, one_of
from gatrain.errors import ConfigError, nearest
from gatrain.optimizer_config import OPTIMIZERS as OPTIMIZERS
from gatrain.optimizer_config import AdamWConfig as AdamWConfig
from gatrain.optimizer_config import OptimizerConfig as OptimizerConfig
from gatrain.optimizer_config import ScheduleConfig as ScheduleConfig
from gatrain.optimizer_config import SGDConfig as SGDConfig
from gatrain.optimizer_config import check_optimizer, check_schedule
from gatrain.phase_config import phase_configs

OPEN_NODES = ("model", "data", "loss", "task")
"""Sections for the user's own work, with keys that only the ``_target_`` knows."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CHECKPOINTING = ("auto", "none", "selective", "every_4", "every_3", "every_2", "full", "offload")
REDUCE_OVERHEAD = "reduce-overhead"
"""Of ``compile``, as torch calls it: compiled code is replayed as CUDA graphs."""
SYNCS = ("auto", "overlap", "window")
DEVICES = ("auto", "cpu", "cuda")
NONFINITE = ("stop", "skip")
CHECKS = ("error", "warn", "off")
COUNTS = ("samples", "tokens")


@dataclass(frozen=True)
class BatchConfig:
    effective: Any = 32
    """Samples per optimizer step over all ranks and micro-steps. Nothing changes it but you: ``{0: 64, 1000: 256}``
    are stages, 64 for 1000 steps and 256 after them."""
    micro: Any = "auto"
    """Samples in one forward and backward on one rank: ``auto`` (measured) or a number."""
    count: str = "samples"
    """What ``effective`` counts: ``samples``, or ``tokens``, of which a window then holds at most so many in whole
    samples; the data must tell its ``lengths``. ``micro`` counts samples in any case."""
    effective_by: str = "steps"
    """What the places in stages of ``effective`` count: ``steps``, ``samples``, ``tokens`` or ``epochs``."""
    rule: str = "none"
    """What a change of the effective batch does to the optimizer: ``none``, ``linear`` (lr * k), ``sqrt`` (Adam: lr
    * sqrt(k), 1 - beta by k, eps / sqrt(k)) or ``half_life`` (Adam: beta2 ** k); k is relative to ``base``."""
    base: int | None = None
    """The effective batch that ``optimizer.lr`` was chosen for, in ``count``; null is that of the first stage."""

    def __post_init__(self) -> None:
        if isinstance(self.effective, str) and self.effective.isdigit():  # from ${oc.env:...}
            object.__setattr__(self, "effective", int(self.effective))

    @property
    def stages(self) -> BatchStages:
        """The effective batch over the run.

        Raises:
            ConfigError: ``effective`` is neither a number nor stages.
        """
        return read_stages(self.effective, self.effective_by)

    @property
    def largest(self) -> int:
        """The effective batch, the largest where there are stages: what memory and plan are for."""
        return self.stages.largest

    @property
    def counts_tokens(self) -> bool:
        return self.count == "tokens"

    @property
    def rule_base(self) -> int:
        """The effective batch that ``rule`` starts from."""
        return self.stages.first if self.base is None else self.base


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = None
    """Optimizer steps to train. Give this or ``epochs``."""
    epochs: float | None = None
    """Passes over the training data, fractions allowed; rounded up to whole windows."""
    seed: int = 0
    """Of the weights, the order of samples and all that is drawn at random."""
    log_every: int = 10
    """Optimizer steps between two readings of the metrics from the device (at the latest after 256)."""
    data_workers: int = 0
    """Processes per rank that load samples; 0 loads in the rank itself."""
    drop_last: bool = False
    """Leave out the short window at the end of an epoch."""
    nonfinite: str = "stop"
    """A window whose loss or gradient is not finite: ``stop`` before it, or ``skip`` it on every rank."""
    nonfinite_limit: int = 10
    """Such windows in a row that ``skip`` passes over; one more ends the run."""
    check: str = "error"
    """Before the first step, a few samples are computed whole and in pieces: ``error`` refuses a loss that may not
    be split, ``warn`` says so and goes on, ``off`` does not look."""

    def __post_init__(self) -> None:
        if self.check in ("False", "false"):  # what YAML makes of a bare off
            object.__setattr__(self, "check", "off")


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Optimizer steps between evaluations on the held-out split; 0 evaluates at the end only."""
    samples: int | None = None
    """Held-out samples per evaluation; null uses the whole split."""


@dataclass(frozen=True)
class SaveConfig:
    every: int = 0
    """Optimizer steps between saved states; 0 leaves it to ``minutes``. The last state is always saved."""
    minutes: float = 10.0
    """At most this many minutes of work are lost, the writing included, beside ``every``; 0 turns it off."""
    keep: int = 2
    """Newest saved states to keep; 0 keeps all."""


@dataclass(frozen=True)
class TuneConfig:
    max_seconds: float | None = None
    """Time allowed for trials; null means 30 on a CPU and 120 on a GPU."""
    memory_fraction: float = 0.92
    """Share of the free memory that a plan may use at its peak."""


@dataclass(frozen=True)
class RunFolderConfig:
    dir: str | None = None
    """Folder of this run; null means ``outputs/<recipe>/<name or time>``."""
    name: str | None = None
    """Name of the run's folder below ``outputs/<recipe>``, instead of the time."""


@dataclass(frozen=True)
class RunConfig:
    model: Any = None
    """The model: a mapping with the ``_target_`` of a class or function, and its arguments."""
    data: Any = None
    """The data, in the same way."""
    loss: Any = None
    """The loss, in the same way, where the task takes one."""
    task: Any = None
    """What is computed of model and data (a `gatrain.tasks.Task`), in the same way."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    precision: str = "auto"
    """``fp32``, ``bf16`` or ``fp16`` (autocast over fp32 parameters and gradients); ``auto`` is bf16 where the
    GPU computes it natively, else fp32."""
    checkpointing: str = "auto"
    """Activation checkpointing: ``none``, ``selective`` (keep matrix products), ``full`` (keep block inputs),
    ``every_2`` (``full`` for every second block; also 3, 4), ``offload`` (keep all, in main memory; ``auto``
    does not try it)."""
    compile: Any = "auto"
    """torch.compile of the loss computation: true, false, ``reduce-overhead`` (and replayed as CUDA graphs, where
    the GPU waits for the host), or ``auto`` (on a GPU, when trials show a gain)."""
    sync: str = "auto"
    """How gradients are reduced: ``overlap`` (in the last backward) or ``window`` (at once, after agreement)."""
    order: Any = "shuffle"
    """The order of samples: ``shuffle``, ``sequential``, ``{name: weighted, weights: ...}``, ``grouped`` (by
    length), or your own by ``_target_``."""
    hooks: Any = field(default_factory=list)
    """What sees each update and evaluation, in this order: ``ema``, ``early_stopping``, ``keep_best``,
    ``noise_scale`` (of the gradient), or your own `gatrain.Hook` by ``_target_``; with values as
    ``{name: ema, decay: 0.99}``."""
    gradient: Any = "plain"
    """The way from a window to its gradient: ``plain``, ``cached`` (for a loss of all samples of a step, such as a
    contrastive one; one forward more), ``phases`` (an optimizer for each of the task's phases, as a GAN has them;
    ``updates: {critic: 5}`` and ``every: {actor: 5}`` say how many one makes in a window, and in which windows),
    ``fold`` (which comes with ``optimizer=adama``), ``in_backward`` (one micro-batch on one rank: no gradient is
    kept), ``bf16_stochastic`` or ``bf16_kahan`` (sums in bf16, not exact),
    or the ``_target_`` of your own (`gatrain.train.gradient.GradientStrategy`)."""
    norm: Any = "keep"
    """BatchNorm under accumulation: ``keep`` (each micro-batch by itself, running statistics moved once for each
    window), ``torch`` (moved by every micro-batch), ``exact`` (over the whole window: with the activations of all
    its micro-batches in memory, or layer by layer at many times the work; ``{name: exact, activations: window}`` or
    ``micro_batch`` chooses), ``group``, ``layer``, ``instance`` (conversion), ``frozen`` (by
    running statistics), ``sync`` (one micro-batch of all ranks), or your own by ``_target_``."""
    dropout: Any = "torch"
    """Where the random numbers of forwards come from: ``torch`` (masks by micro-batch), ``keyed`` (masks by
    sample, the same in every split; ``{name: keyed, batch_dim: 1}`` where time comes first), or your own."""
    parallel: Any = "replicated"
    """How model and gradients lie on the ranks: ``replicated``, or the ``_target_`` of your own."""
    logger: Any = "auto"
    """Where metrics go beside metrics.jsonl, which is always written: a list of ``auto`` (TensorBoard where it is
    installed), ``tensorboard``, ``wandb``, ``mlflow``, or your own `gatrain.Logger` by ``_target_``; with values as
    ``{name: wandb, project: mine}``."""
    knobs: Any = field(default_factory=list)
    """Further ways to compute the same step that trials try: ``attention`` (which kernel), or your own by
    ``_target_``; see `gatrain.train.knobs`."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: the GPUs if there are any."""
    scheduler: Any = "auto"
    """Who says in which job this process is: ``auto`` (Slurm's, if any), your own by ``_target_``, or null."""


def validate(config: RunConfig) -> None:
    """Check values and their combinations; composition has already checked names and types.

    Raises:
        ConfigError: names the key, the value given and the values allowed.
    """
    one_of("precision", config.precision, PRECISIONS)
    one_of("checkpointing", config.checkpointing, CHECKPOINTING)
    one_of("sync", config.sync, SYNCS)
    one_of("device", config.device, DEVICES)
    if not (isinstance(config.compile, bool) or config.compile in ("auto", REDUCE_OVERHEAD)):
        allowed = ("true", "false", "auto", REDUCE_OVERHEAD)
        hint = nearest(str(config.compile), allowed)
        raise ConfigError(f"compile={config.compile!r} is not one of {', '.join(allowed)}.{hint}")
    _check_batch(config.batch)
    micro = config.batch.micro
    if micro != "auto" and (isinstance(micro, bool) or not isinstance(micro, int) or micro < 1):
        raise ConfigError(f"batch.micro={micro!r} is not 'auto' or a whole number of at least 1.")
    if isinstance(micro, int) and micro > (most := config.batch.largest):
        raise ConfigError(
            f"batch.micro={micro} is larger than batch.effective={most}. "
            f"Use batch.micro={most} or less, or batch.micro=auto."
        )
    train = config.train
    if train.steps is not None and train.epochs is not None:
        raise ConfigError(
            f"train.steps={train.steps} and train.epochs={train.epochs} are both given. "
            "Keep one and set the other to null."
        )
    if train.steps is None and train.epochs is None:
        raise ConfigError("Neither train.steps nor train.epochs is given. Add for example train.steps=1000.")
    if train.steps is not None:
        at_least("train.steps", train.steps, 1)
    if train.epochs is not None:
        above_zero("train.epochs", train.epochs)
    at_least("train.seed", train.seed, 0)
    at_least("train.log_every", train.log_every, 1)
    at_least("train.data_workers", train.data_workers, 0)
    one_of("train.nonfinite", train.nonfinite, NONFINITE)
    at_least("train.nonfinite_limit", train.nonfinite_limit, 1)
    one_of("train.check", config.train.check, CHECKS)
    check_optimizer(config.optimizer)
    phase_configs(config.optimizer)
    _check_rule(config.batch, config.optimizer)
    _check_tokens(config)
    check_schedule(config.schedule)
    at_least("eval.every", config.eval.every, 0)
    if config.eval.samples is not None:
        at_least("eval.samples", config.eval.samples, 1)
    at_least("save.every", config.save.every, 0)
    if not 0 <= config.save.minutes < float("inf"):  # written so that nan is refused too
        raise ConfigError(
            f"save.minutes={config.save.minutes} is not a number of minutes of at least 0 (0 saves by steps only)."
        )
    at_least("save.keep", config.save.keep, 0)
    if config.tune.max_seconds is not None:
        above_zero("tune.max_seconds", config.tune.max_seconds)
    if not 0 < config.tune.memory_fraction <= 1:
        raise ConfigError(f"tune.memory_fraction={config.tune.memory_fraction} is not above 0 and at most 1.")
    _has_target("task", config.task)
    ready = config.task["_target_"].startswith("gatrain.tasks.")
    for key in ("model", "data", "loss"):
        # a task of the user's own may make its model and data itself: `build.check_targets` asks what it takes
        if getattr(config, key) is not None or (ready and key != "loss"):
            _has_target(key, getattr(config, key))


def _check_batch(batch: BatchConfig) -> None:
    one_of("batch.effective_by", batch.effective_by, UNITS)
    one_of("batch.rule", batch.rule, RULES)
    one_of("batch.count", batch.count, COUNTS)
    if batch.base is not None:
        at_least("batch.base", batch.base, 1)
    stages = batch.stages
    if stages.is_constant and batch.effective_by != "steps":
        raise ConfigError(
            f"batch.effective_by={batch.effective_by} counts where stages begin, and batch.effective="
            f"{spelt(batch.effective)} has one. Write stages, or leave batch.effective_by out."
        )
    if batch.counts_tokens and not stages.is_constant:
        raise ConfigError(
            "batch.count=tokens has no stages yet. Write one number of tokens, or stages with batch.count=samples."
        )
    if batch.base is not None and batch.rule == "none":
        raise ConfigError(
            f"batch.base={batch.base} is what batch.rule starts from, and batch.rule=none changes nothing. Add "
            "batch.rule=linear, sqrt or half_life, or leave batch.base out."
        )
    if batch.rule != "none" and batch.base is None and stages.is_constant:
        raise ConfigError(
            f"batch.rule={batch.rule} has nothing to do: batch.effective={batch.effective} never changes. Add "
            "batch.base=... (the effective batch that optimizer.lr was chosen for), or write stages."
        )


def _check_rule(batch: BatchConfig, optimizer: OptimizerConfig) -> None:
    if batch.rule not in OF_ADAM or optimizer.node is not None:  # the user's own: when it is made
        return
    if type(optimizer) is not AdamWConfig:  # AdamA's moments are others
        raise ConfigError(
            f"batch.rule={batch.rule} speaks of Adam's betas, and the optimizer is {optimizer.name}. Use "
            "batch.rule=linear, or set optimizer.lr for the effective batch and leave batch.rule out."
        )
    first, second = optimizer.betas
    for effective in batch.stages.sizes:
        scaled(batch.rule, effective / batch.rule_base, (first, second), optimizer.eps)


def _check_tokens(config: RunConfig) -> None:
    """What counts in samples of the effective batch, which then has no fixed number of them."""
    if not config.batch.counts_tokens or config.schedule.node is not None:
        return
    for key in ("warmup", "decay", "milestone"):
        if getattr(config.schedule, f"{key}_samples") is not None:
            instead = "milestones" if key == "milestone" else f"{key}_steps"
            raise ConfigError(
                f"schedule.{key}_samples counts samples, and with batch.count=tokens no window has a fixed number "
                f"of them. Use schedule.{instead}."
            )


def _has_target(key: str, node: Any) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise ConfigError(
            f"{key} has no _target_ (given: {node!r}). Name a class or function, "
            f"for example {key}: {{_target_: my_module.MyClass}}."
        )
