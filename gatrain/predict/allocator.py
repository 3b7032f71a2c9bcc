"""A model of PyTorch's CUDA caching allocator, in plain Python: what would be reserved, without a GPU.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.10 to 2.15) with default settings:

- a request is rounded up to a multiple of 512 bytes;
- up to 1 MiB it is served from the small pool, whose segments are 2 MiB; beyond that from the large pool, where
  a request below 10 MiB makes a segment of 20 MiB and a larger one a segment of its own size rounded up to 2 MiB;
- the smallest free block that is large enough is taken (the lowest address among equals), and split if the rest
  is at least 512 bytes (small pool) or more than 1 MiB (large pool);
- a freed block is merged with its free neighbours in the same segment and kept; segments are given back only when
  the driver refuses memory.

Streams have pools of their own: use one model for each.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from gatrain.units import MIB

MIN_BLOCK_BYTES = 512
SMALL_LIMIT_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_OWN_SEGMENT_BYTES = 10 * MIB
LARGE_ROUNDING_BYTES = 2 * MIB
OWN_MAPPING_BYTES = 32 * MIB


@dataclass(eq=False)
class Block:
    """A part of a segment. ``previous`` and ``next`` are its neighbours in the same segment."""

    start: int
    size: int
    is_small: bool
    requested: int = 0
    is_free: bool = True
    previous: Block | None = None
    next: Block | None = None


FreeBlock = tuple[int, int, int, Block]
"""Size, start, and what tells two pools' equal ones apart: ordered as the best fit is looked for."""


class CachingAllocator:
    """Counts bytes in use and bytes reserved from the driver, and the peaks of both."""

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self.peak_allocated = 0
        self.peak_reserved = 0
        self._free: dict[bool, list[FreeBlock]] = {True: [], False: []}
        self._start = self._end = 0  # of the addresses in use

    def allocate(self, requested: int) -> Block | None:
        """Take memory; nothing is taken for zero bytes, as in PyTorch."""
        if requested == 0:
            return None
        size = rounded(requested)
        is_small = size <= SMALL_LIMIT_BYTES
        block = self._best_fit(size, is_small) or self._from_driver(size, is_small)
        self._split(block, size)
        block.is_free = False
        block.requested = requested
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back to its pool."""
        if block is None:
            return
        assert not block.is_free, "a block is freed twice"
        self.allocated -= block.size
        block.is_free = True
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.is_free:
                self._take_out(neighbour)
                block = _merged(block, neighbour)
        self._put_in(block)

    def empty_cache(self) -> None:
        """Give segments that are wholly free back to the driver, and start new peaks."""
        for is_small, pool in self._free.items():
            kept = [entry for entry in pool if entry[-1].previous or entry[-1].next]
            self.reserved -= sum(entry[0] for entry in pool) - sum(entry[0] for entry in kept)
            self._free[is_small] = kept
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _best_fit(self, size: int, is_small: bool) -> Block | None:
        pool = self._free[is_small]
        index = bisect.bisect_left(pool, (size,))
        return pool.pop(index)[-1] if index < len(pool) else None

    def _from_driver(self, size: int, is_small: bool) -> Block:
        length = segment_bytes(size)
        block = Block(self._address(length), length, is_small)
        self._reserve(length)
        return block

    def _reserve(self, length: int) -> None:
        self.reserved += length
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _address(self, length: int) -> int:
        """Where the driver puts a segment, which decides between free blocks of one size: small ones beside each
        other upwards, each large one in a mapping of its own, below the last (seen on an H100, driver 580)."""
        if length < OWN_MAPPING_BYTES:
            self._end += length
            return self._end - length
        self._start -= length
        return self._start

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest < MIN_BLOCK_BYTES or (not block.is_small and rest <= SMALL_LIMIT_BYTES):
            return
        remaining = Block(block.start + size, rest, block.is_small, previous=block, next=block.next)
        if block.next is not None:
            block.next.previous = remaining
        block.next, block.size = remaining, size
        self._put_in(remaining)

    def _put_in(self, block: Block) -> None:
        bisect.insort(self._free[block.is_small], (block.size, block.start, id(block), block))

    def _take_out(self, block: Block) -> None:
        pool = self._free[block.is_small]
        index = bisect.bisect_left(pool, (block.size, block.start, id(block)))
        assert pool[index][-1] is block
        del pool[index]


def rounded(requested: int) -> int:
    """Bytes that a request takes of a block."""
    return -(-requested // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_bytes(size: int) -> int:
    """Bytes that are asked of the driver where no cached block is large enough for ``size``."""
    if size <= SMALL_LIMIT_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // LARGE_ROUNDING_BYTES) * LARGE_ROUNDING_BYTES


def _merged(block: Block, neighbour: Block) -> Block:
    """The one block of two neighbours; ``block`` is kept."""
    block.size += neighbour.size
    block.start = min(block.start, neighbour.start)
    if neighbour is block.previous:
        block.previous = neighbour.previous
        if block.previous is not None:
            block.previous.next = block
    else:
        block.next = neighbour.next
        if block.next is not None:
            block.next.previous = block
    return block
