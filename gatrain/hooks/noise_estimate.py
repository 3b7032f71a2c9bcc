"""The gradient noise scale from norms of gradients: unbiased estimates, smoothed, with an interval. No torch.

With weights as sizes, the mean gradient G_w of samples of weight w has E|G_w|**2 = |G|**2 + tr(S) / w. So for parts
of weights w_j with mean gradients G_j, whatever their sizes, and the whole window of weight T with mean gradient
G_T, for V = sum_j w_j over J parts::

    tr(S) = (sum_j w_j |G_j|**2 - V |G_T|**2) / (J - V / T)        |G|**2 = |G_T|**2 - tr(S) / T

are both unbiased. (Parts that are all of the window, V = T, give the variance between groups of the analysis of
variance; one part of two sizes gives the estimators of McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.)
Their ratio is biased at every step, so numerator and denominator are averaged over steps, and divided last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatrain.noise_advice import in_words

FEWEST_STEPS = 10
"""Measured steps before anything is said."""
QUANTILE = 1.96
"""Of the normal distribution, for an interval of 95 %."""


@dataclass(frozen=True)
class NoiseScale:
    """tr(S) / |G|**2 in samples, with the interval of 95 %."""

    value: float
    """Infinite where the gradient does not stand out of its noise."""
    low: float
    high: float
    """Infinite where the gradient may be zero, as far as its noise tells."""

    @property
    def text(self) -> str:
        """The value with its interval."""
        return in_words(self.value, self.low, self.high)


def one_step(parts: Mapping[str, float], whole_squared: float) -> tuple[float, float] | None:
    """tr(S) and \\|G\\|**2 from one window, per unit of weight; None where it has no two sizes to compare.

    Args:
        parts: `gatrain.train.records.StepRecord.parts`.
        whole_squared: \\|G_T\\|**2, squared norm of the whole window's mean gradient.
    """
    spare = parts["count"] - parts["weight"] / parts["total"]
    if spare < 1e-9:
        return None
    noise = (parts["squared"] - parts["weight"] * whole_squared) / spare
    signal = whole_squared - noise / parts["total"]
    return (noise, signal) if math.isfinite(noise) and math.isfinite(signal) else None


class NoiseEstimate:
    """Averages over steps, the newest counting most: an exponential moving average without bias at its start.

    Args:
        decay: of the averages; about (1 + decay) / (1 - decay) steps count.
    """

    NAMES = (
        "steps", "weight", "squared_weight", "noise", "signal", "noise_noise", "noise_signal", "signal_signal",
        "total", "samples",
    )  # fmt: skip
    """The state: plain numbers."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._state = dict.fromkeys(self.NAMES, 0.0)

    @property
    def steps(self) -> int:
        """Measured so far."""
        return int(self._state["steps"])

    def add(self, noise: float, signal: float, total: float, samples: float) -> None:
        """Take one window: its two estimates (`one_step`), its weight and its number of samples."""
        state, rest = self._state, 1 - self._decay
        new = {
            "weight": 1.0,
            "noise": noise,
            "signal": signal,
            "noise_noise": noise * noise,
            "noise_signal": noise * signal,
            "signal_signal": signal * signal,
            "total": total,
            "samples": samples,
        }
        for name, value in new.items():
            state[name] += rest * (value - state[name])
        state["squared_weight"] = self._decay**2 * state["squared_weight"] + rest**2
        state["steps"] += 1

    def now(self) -> NoiseScale | None:
        """The noise scale in samples; None before `FEWEST_STEPS`.

        The interval is Fieller's (1954), of a ratio of two averages that may vary together: it is one-sided where
        the denominator may be zero. Variances are those of the steps so far, so a drift of the noise widens it.
        """
        state = self._state
        if state["steps"] < FEWEST_STEPS or not state["samples"]:
            return None
        mean = {name: value / state["weight"] for name, value in state.items()}
        noise, signal = mean["noise"], mean["signal"]
        # of an average with weights a_i that add up to 1: variance of one, times sum a_i**2 / (1 - sum a_i**2)
        share = state["squared_weight"] / state["weight"] ** 2
        factor = QUANTILE**2 * share / (1 - share)
        noise_var = factor * max(0.0, mean["noise_noise"] - noise**2)
        signal_var = factor * max(0.0, mean["signal_signal"] - signal**2)
        both = factor * (mean["noise_signal"] - noise * signal)
        low, high = _fieller(noise, signal, noise_var, signal_var, both)
        samples = mean["samples"] / mean["total"]  # of one unit of weight
        value = max(0.0, noise) / signal if signal > 0 else math.inf
        return NoiseScale(value * samples, low * samples, high * samples)

    def samples(self) -> float:
        """Mean samples of a window."""
        return self._state["samples"] / self._state["weight"] if self._state["weight"] else 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: it is not what `state_dict` gave.
        """
        if state.keys() != self._state.keys() or not all(
            type(value) in (int, float) and math.isfinite(value) for value in state.values()
        ):
            raise ValueError("it holds other numbers than those of a noise scale")
        self._state = {name: float(state[name]) for name in self.NAMES}


def _fieller(
    numerator: float, denominator: float, numerator_var: float, denominator_var: float, covariance: float
) -> tuple[float, float]:
    """Lowest and highest positive ratio r with (numerator - r * denominator)**2 within its variance.

    The variances are those of the averages, times the squared quantile.
    """
    a = denominator**2 - denominator_var
    b = numerator * denominator - covariance
    c = numerator**2 - numerator_var
    if c <= 0 or numerator <= 0:  # the noise does not stand out
        low = 0.0
    else:
        root = math.sqrt(max(0.0, b * b - a * c))
        low = c / (b + root) if b + root > 0 else math.inf
    if a <= 0 or denominator <= 0:
        return low, math.inf
    return low, max(low, (b + math.sqrt(max(0.0, b * b - a * c))) / a)
