"""What another effective batch does to the learning rate and to Adam's decays: rules that a person asks for.

With ``k`` the effective batch over the one that ``optimizer.lr`` was chosen for (``batch.base``):

    none        nothing changes
    linear      lr * k (Goyal et al. 2017, arXiv:1706.02677): SGD
    sqrt        lr * sqrt(k), 1 - beta' = k (1 - beta) of both betas, eps / sqrt(k)
                (Malladi et al. 2022, arXiv:2205.10287): Adam, where the gradient's noise outweighs its mean
    half_life   beta2' = beta2 ** k: its half-life stays the same number of samples (Marek et al. 2025,
                arXiv:2507.07101): Adam

The split of a window has no part in any of them. Pure functions; `gatrain.train.batch_scaling` applies them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gatrain.errors import ConfigError

RULES = ("none", "linear", "sqrt", "half_life")
OF_ADAM = ("sqrt", "half_life")
"""Rules that speak of Adam's decays."""


@dataclass(frozen=True)
class Scaled:
    """What a rule makes of an optimizer's values."""

    lr_factor: float
    betas: tuple[float, float] | None = None
    eps: float | None = None


def scaled(rule: str, k: float, betas: tuple[float, float] | None, eps: float | None) -> Scaled:
    """The values at ``k`` times the base.

    Args:
        rule: one of `RULES`.
        k: effective batch / base, above 0.
        betas: Adam's, of the base; None for another optimizer, which only ``none`` and ``linear`` know.
        eps: Adam's, of the base.

    Raises:
        ConfigError: ``1 - k (1 - beta)`` is not above 0.
    """
    if rule == "linear":
        return Scaled(k, betas, eps)
    if rule == "none" or betas is None:
        return Scaled(1.0, betas, eps)
    first, second = betas
    if rule == "half_life":
        return Scaled(1.0, (first, float(second**k)), eps)
    if k == 1.0:
        return Scaled(1.0, betas, eps)  # not through 1 - (1 - beta), which rounds
    for name, beta in (("beta1", first), ("beta2", second)):
        made = round(1 - k * (1 - beta), 12)  # ten times 0.9 is 0, not 2e-16
        if not made > 0:
            raise ConfigError(
                f"batch.rule=sqrt at {k:g} times batch.base: {name}={beta:g} would become 1 - {k:g} (1 - "
                f"{beta:g}) = {made:g}, which is not above 0: the rule holds below {1 / (1 - beta):.4g} times the "
                "base. Use a larger beta, a smaller change, or batch.rule=half_life."
            )
    root = math.sqrt(k)
    decays = (1 - k * (1 - first), 1 - k * (1 - second))
    return Scaled(root, decays, None if eps is None else eps / root)


def in_words(rule: str, base: int, effective: int, lr: float | None, before: Scaled, now: Scaled) -> str:
    """What the rule does at one effective batch, with its numbers: ``lr 0.001 -> 0.002, betas ...``.

    Args:
        lr: peak rate of the base; None where the optimizer's own class knows it.
        before: values of the base.
        now: values at ``effective``.
    """
    if lr is None:
        said = [f"the rate times {now.lr_factor:.6g}"]
    elif now.lr_factor == 1.0:
        said = [f"optimizer.lr stays {lr:g}"]
    else:
        said = [f"optimizer.lr {lr:g} -> {lr * now.lr_factor:.6g}"]
    if now.betas != before.betas and now.betas and before.betas:
        was, is_now = (f"[{first:.6g},{second:.6g}]" for first, second in (before.betas, now.betas))
        said.append(f"betas {was} -> {is_now}")
    if now.eps != before.eps and now.eps is not None:
        said.append(f"eps {before.eps:g} -> {now.eps:.4g}")
    return f"batch.rule={rule} at {effective} samples, {effective / base:.4g} times {base}: {', '.join(said)}"
