"""The parts that a run takes at its doors: hooks, loggers, knobs, and one strategy, norm, layout, random source."""

from __future__ import annotations

from gatrain import doors
from gatrain.build.nodes import instantiate, part_of
from gatrain.config import REDUCE_OVERHEAD, RunConfig
from gatrain.errors import ConfigError
from gatrain.train.dropout import RandomNumbers
from gatrain.train.events import Sink
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.plain import Plain
from gatrain.train.hook import Hook
from gatrain.train.hooks import named
from gatrain.train.knobs import Knobs, by_name
from gatrain.train.norm import Normalisation
from gatrain.train.parallel import Replicated


def build_hooks(config: RunConfig) -> dict[str, Hook]:
    """Make the hooks of a run, by name: a shipped one's own, or that of the class.

    Raises:
        ConfigError: one cannot be made, or is no hook.
    """
    shipped = {dotted: name for name, dotted in doors.SHIPPED["hooks"].items()}
    made = []
    for where, node in doors.nodes_of("hooks", config.hooks):
        hook = instantiate(where, node)
        if not isinstance(hook, Hook):
            raise ConfigError(
                f"{where}._target_={node['_target_']} gave a {type(hook).__name__}, not a gatrain.Hook. "
                "Subclass gatrain.Hook."
            )
        made.append((shipped.get(node["_target_"], node["_target_"].rpartition(".")[2]), hook))
    return named(made)


def build_loggers(config: RunConfig) -> list[Sink]:
    """Make the loggers of a run beside metrics.jsonl, which needs no word of the configuration. For rank 0.

    Raises:
        ConfigError: one cannot be made, or is no logger.
    """
    made = []
    for where, node in doors.nodes_of("logger", config.logger):
        if node["_target_"] == doors.SHIPPED["logger"]["jsonl"]:
            continue
        logger = instantiate(where, node)
        if logger is None:  # a shipped one that is not installed, and was not asked for by name
            continue
        if not isinstance(logger, Sink):
            raise ConfigError(
                f"{where}._target_={node['_target_']} gave a {type(logger).__name__}, not a gatrain.Logger. "
                "Subclass gatrain.Logger."
            )
        made.append(logger)
    return made


def build_knobs(config: RunConfig) -> Knobs:
    """Make the knobs that the configuration names.

    Raises:
        ConfigError: one cannot be made, or is no knob.
    """
    return by_name(
        [(where, instantiate(where, node)) for where, node in doors.nodes_of("knobs", config.knobs)]
    )


def build_strategy(config: RunConfig) -> GradientStrategy:
    """Make the way from a window to its gradient: that of ``gradient``, or the one that the optimizer or ``norm``
    asks for.

    Raises:
        ConfigError: ``gradient`` names something else, or does not go with the rest of the configuration.
    """
    wanted, given = config.optimizer.gradient, config.gradient
    if wanted is not None:
        asked = doors.node_of("gradient", given)["_target_"]
        shipped = doors.SHIPPED["gradient"]
        if asked not in (shipped["plain"], shipped[wanted]):
            leave = "" if asked == shipped["phases"] else "Leave gradient out, or use "  # its task needs it
            raise ConfigError(
                f"optimizer={config.optimizer.name} takes gradients as gradient={wanted} gives them, and gradient="
                f"{given!r} is another way. {leave or 'Use '}optimizer=adamw."
            )
        given = given if asked == shipped[wanted] else wanted
    made: GradientStrategy = part_of("gradient", given, GradientStrategy)  # type: ignore[type-abstract]
    of_norm = build_norm(config).strategy()
    if of_norm is not None:
        if type(made) is not Plain:
            raise ConfigError(
                f"norm={config.norm} computes gradients in a way of its own, and gradient={given!r} is another. "
                "Leave one of the two out."
            )
        made = of_norm
    made.check(config)
    if config.compile == REDUCE_OVERHEAD and type(made) is not Plain:
        raise ConfigError(
            f"compile={REDUCE_OVERHEAD} replays a forward and the backward that follows it, and "
            f"{type(made).__name__} computes windows in another way. Use compile=true."
        )
    return made


def build_norm(config: RunConfig) -> Normalisation:
    """Make what is done about BatchNorm.

    Raises:
        ConfigError: ``norm`` names something else.
    """
    return part_of("norm", config.norm, Normalisation)


def build_parallel(config: RunConfig) -> Replicated:
    """Make what lays the model on the ranks.

    Raises:
        ConfigError: ``parallel`` names something else.
    """
    return part_of("parallel", config.parallel, Replicated)


def build_random(config: RunConfig) -> RandomNumbers:
    """Make the source of the forwards' random numbers.

    Raises:
        ConfigError: ``dropout`` names something else.
    """
    return part_of("dropout", config.dropout, RandomNumbers)
