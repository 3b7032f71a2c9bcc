"""A keyed permutation that is computed by index, so that a billion samples cost neither memory nor start-up time.

A Feistel network over the next even power of two, walked until it lands inside the range (cycle walking; Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), with the SplitMix64 finaliser (Steele, Lea and
Flood, OOPSLA 2014) as the round function.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gatrain.train.order import Ids
from gatrain.train.seeding import derive_seed, mix64

_ROUNDS = 8


def permutation(samples: int, seed: int, epoch: int, positions: Ids) -> Ids:
    """Sample ids at ``positions`` of the epoch's order.

    Args:
        samples: size of the training data, at least 1.
        seed: run seed.
        epoch: pass over the data; every epoch has an order of its own.
        positions: int64, shape [n], each in [0, samples).

    Returns:
        int64, shape [n]: over all positions each id appears exactly once.
    """
    half_bits = max(1, math.ceil(math.log2(max(samples, 2)) / 2))
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(derive_seed(seed, epoch, round_)) for round_ in range(_ROUNDS)]

    def encrypt(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = words >> half, words & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & mask)
        return (left << half) | right

    result = encrypt(positions.astype(np.uint64))
    outside = result >= samples
    while outside.any():  # at most 4x the range, so a few rounds on average
        result[outside] = encrypt(result[outside])
        outside = result >= samples
    return result.astype(np.int64)
