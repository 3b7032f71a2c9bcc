"""The arithmetic of the effective batch: pure functions, integers only.

``E`` effective batch (samples per optimizer step, over all ranks), ``W`` world size, ``b`` micro-batch,
``K`` accumulation steps of the rank that has most. Whatever the numbers, primes included, the micro-batches
of all ranks sum to the window exactly: where a share does not divide, some micro-batches are one sample smaller,
never a rounding.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from gatrain.errors import PlanError

MAX_EXTRA_SIZES = 6


@dataclass(frozen=True)
class Split:
    """How a full window of samples is shared out over the ranks; a micro-batch then cuts each share.

    Raises:
        ValueError: the shares are not those of so many samples and ranks.
    """

    effective_batch: int
    world_size: int
    shares: tuple[int, ...] = ()
    """Samples of each rank; left out, they differ by at most one."""

    def __post_init__(self) -> None:
        if self.effective_batch < 1 or self.world_size < 1:
            raise ValueError(
                f"effective_batch is {self.effective_batch} and world_size {self.world_size}, not 1 or more"
            )
        if not self.shares:
            object.__setattr__(self, "shares", tuple(rank_shares(self.effective_batch, self.world_size)))
        if len(self.shares) != self.world_size or sum(self.shares) != self.effective_batch:
            raise ValueError(
                f"shares of {sum(self.shares)} samples over {len(self.shares)} ranks are none of the effective "
                f"batch {self.effective_batch} over {self.world_size}"
            )
        if min(self.shares) < 0:
            raise ValueError(f"shares has {min(self.shares)} samples")

    @property
    def share(self) -> int:
        """Samples of the busiest rank: the largest micro-batch that can be of use."""
        return max(self.shares)

    @property
    def is_even(self) -> bool:
        """Whether the ranks are equal, up to one sample."""
        return max(self.shares) - min(self.shares) <= 1

    def sizes(self, micro_batch: int) -> list[list[int]]:
        """Sizes of all micro-batches, by rank."""
        return split_shares(self.shares, micro_batch)

    def distinct_sizes(self, micro_batch: int) -> set[int]:
        """Each size that a micro-batch of any rank has."""
        return {size for share in set(self.shares) for size, _ in micro_batch_counts(share, micro_batch)}

    def has_equal_steps(self, micro_batch: int) -> bool:
        """Whether all ranks have as many micro-steps, as SyncBatchNorm needs it."""
        return len({-(-share // micro_batch) for share in self.shares}) == 1

    def accumulation_steps(self, micro_batch: int) -> int:
        """Micro-steps of the busiest rank."""
        return -(-self.share // micro_batch)

    def candidates(self) -> list[int]:
        """Micro-batches worth measuring, rising: see `candidate_sizes`."""
        return candidate_sizes(self.share)

    def equation(self, micro_batch: int) -> str:
        """The split written out, e.g. ``512 = 2 ranks x 16 accumulation steps x 16``."""
        return equation(self.effective_batch, self.sizes(micro_batch))

    def in_proportion(self, weights: Sequence[int]) -> Split:
        """The same window with shares in proportion to ``weights``; as it is where even ones are as good."""
        shares = proportional_shares(self.effective_batch, weights)
        if max(shares) - min(shares) <= 1:
            return Split(self.effective_batch, self.world_size)
        return Split(self.effective_batch, self.world_size, tuple(shares))

    def check_micro_batch(self, micro_batch: int) -> None:
        """Refuse a fixed micro-batch that no rank could fill.

        Raises:
            PlanError: it exceeds the largest share; the message names what is allowed.
        """
        if micro_batch > self.share:
            raise PlanError(
                f"batch.micro={micro_batch} is larger than a rank's share of the effective batch: "
                f"{self.effective_batch} samples over {self.world_size} rank(s) leave at most {self.share} each. "
                f"Use batch.micro={self.share} or less, or batch.micro=auto."
            )


def typical_samples(tokens: int, mean_tokens: float, samples: int) -> int:
    """Samples of a window of so many tokens on average: what a plan is made for; at most all of them."""
    return max(1, min(samples, int(tokens / mean_tokens))) if mean_tokens else samples


def rank_shares(window: int, world_size: int) -> list[int]:
    """Split ``window`` samples over the ranks; shares differ by at most one sample and may be zero."""
    base, extra = divmod(window, world_size)
    return [base + (rank < extra) for rank in range(world_size)]


def proportional_shares(window: int, weights: Sequence[int]) -> list[int]:
    """Split ``window`` samples over the ranks in proportion to ``weights``, one for each rank.

    Largest remainders (Hamilton's method): every share is its exact proportion rounded up or down, and the
    sum is ``window``. Of equal remainders the lower rank's goes first, so that equal weights give
    `rank_shares`.

    Raises:
        ValueError: the weights are negative or all zero.
    """
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights {list(weights)} are not proportions")
    shares = [window * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda rank: (-(window * weights[rank] % total), rank))
    for rank in by_remainder[: window - sum(shares)]:
        shares[rank] += 1
    return shares


def window_shares(window: int, plan_shares: Sequence[int]) -> list[int]:
    """Each rank's part of a window, full or short, under a plan that gives a full one ``plan_shares``.

    Ranks whose shares differ by at most one sample are equal ranks: a short window is split evenly over them.
    """
    if window == sum(plan_shares):
        return list(plan_shares)
    if max(plan_shares) - min(plan_shares) <= 1:
        return rank_shares(window, len(plan_shares))
    return proportional_shares(window, plan_shares)


def micro_batch_sizes(share: int, micro_batch: int) -> list[int]:
    """Cut one rank's share into as few micro-batches of at most ``micro_batch`` samples as it takes.

    They differ by at most one sample, the larger first: a small remainder would cost a whole micro-step, and
    BatchNorm cannot take one of a single sample. A share of zero gives an empty list.

    >>> micro_batch_sizes(512, 16) == [16] * 32
    True
    >>> micro_batch_sizes(9, 4)
    [3, 3, 3]
    """
    steps = -(-share // micro_batch)
    return rank_shares(share, steps) if steps else []


@functools.lru_cache(maxsize=4096)
def micro_batch_counts(share: int, micro_batch: int) -> tuple[tuple[int, int], ...]:
    """The micro-batches of `micro_batch_sizes` as (samples, how many) of each size."""
    return tuple(collections.Counter(micro_batch_sizes(share, micro_batch)).items())


def even_size(share: int, micro_batch: int) -> int:
    """The largest micro-batch of ``share`` cut by ``micro_batch``; cutting by it gives the same."""
    return -(-share // -(-share // micro_batch)) if share else micro_batch


def split_shares(shares: Sequence[int], micro_batch: int) -> list[list[int]]:
    """Sizes of all micro-batches, by rank, where each rank computes the share given for it."""
    return [micro_batch_sizes(share, micro_batch) for share in shares]


def candidate_sizes(share: int) -> list[int]:
    """Micro-batch sizes worth measuring for a share of ``share`` samples, rising; 1 and ``share`` are among
    them.

    Powers of two, as the share is really cut by them, cover the curve; the share itself means no accumulation; a
    few divisors and near-equal cuts (``share / k`` rounded up) avoid a small remainder. Sizes close to another are
    left out.
    """
    powers = (2**power for power in range(share.bit_length()))
    sizes = {1, share, *(even_size(share, power) for power in powers if power <= share)}
    lowest = max(6, share // 32)
    divisors = [share // k for k in range(2, 65) if share % k == 0]
    cuts = [-(-share // k) for k in range(2, 5)]
    extras = 0
    for size in (*divisors, *cuts):
        # a cut that leaves a remainder must fill a real gap to be worth its time
        apart = 1.2 if size in divisors else 1.4
        spaced = all(max(size, other) >= apart * min(size, other) for other in sizes)
        if size >= lowest and spaced and extras < MAX_EXTRA_SIZES:
            sizes.add(size)
            extras += 1
    return sorted(sizes)


def equation(effective_batch: int, micro_batches: Sequence[Sequence[int]]) -> str:
    """Write the split as a sum that a person can check.

    >>> equation(512, [[16] * 16] * 2)
    '512 = 2 ranks x 16 accumulation steps x 16'
    >>> equation(23, [[4, 4], [4, 4], [4, 3]])
    '23 = 2 ranks x (2 x 4) + 1 rank x (4 + 3)'
    """
    if all(sizes == micro_batches[0] for sizes in micro_batches) and len(set(micro_batches[0])) == 1:
        ranks, steps, size = len(micro_batches), len(micro_batches[0]), micro_batches[0][0]
        return (
            f"{effective_batch} = {ranks} rank{'s' * (ranks > 1)} x "
            f"{steps} accumulation step{'s' * (steps > 1)} x {size}"
        )
    groups: list[tuple[Sequence[int], int]] = []
    for sizes in micro_batches:
        if groups and groups[-1][0] == sizes:
            groups[-1] = (sizes, groups[-1][1] + 1)
        else:
            groups.append((sizes, 1))
    terms = [f"{count} rank{'s' * (count > 1)} x ({_sum_of(sizes)})" for sizes, count in groups]
    return f"{effective_batch} = " + " + ".join(terms)


def _sum_of(sizes: Sequence[int]) -> str:
    if not sizes:
        return "0"
    parts = []
    for size in dict.fromkeys(sizes):
        count = sizes.count(size)
        parts.append(f"{count} x {size}" if count > 1 else str(size))
    return " + ".join(parts)
